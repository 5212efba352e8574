//! The queue of a socket of messages, datagrams or sequenced packets: many messages in one call, straight
//! into the posted slots and out of them.
//!
//! No slot stays with the queue between two polls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::batch::Batch;
use super::counters::{Counters, add_one};
use super::datagram::Datagram;
use super::framing::{Message, MessageRules, Unfit};
use super::limits::{HEADER_LEN, MESSAGES, MESSAGES_MIN, RECEIVES_PER_POLL};
use super::link::{Connection, End, Handle, errno, is_busy};
use super::packet::{Header, Layout, complete_with_header};
use super::sys::Address;
use crate::config::Direction;
use crate::device::bounce::set_part_len;
use crate::device::context::PollContext;
use crate::device::seam::{Progress, Queue};
use crate::device::slot::PostedSlot;
use crate::error::Status;
use crate::sync::Ordering;

/// Where a queue's messages come from and go to.
pub(super) enum Endpoint {
    Datagram(Arc<Datagram>),
    /// Sequenced packets, over a connection.
    Connections(Handle),
}

/// One ring's queue of a socket of messages.
pub(super) struct MessageQueue {
    endpoint: Endpoint,
    mover: Mover,
    direction: Direction,
}

/// What moves messages between a socket and slots.
struct Mover {
    layout: Layout,
    rules: MessageRules,
    /// The slots of one call. Empty between two polls.
    slots: Vec<PostedSlot>,
    /// What became of each write of a call that was not sent: the status with which it completes.
    refused: Vec<Option<Status>>,
    /// The virtio headers of one call.
    headers: Box<[Header]>,
    batch: Batch,
    /// The messages of one call that are packets. Empty between two polls.
    packets: Vec<ReceivedPacket>,
    /// How many messages the next call asks for. It is few while there are few, so that a look that
    /// finds none does not take many slots to put them back.
    want: usize,
}

/// A message that is a packet.
struct ReceivedPacket {
    /// The number of its slot in the call.
    at: usize,
    len: usize,
    /// What goes in front of it.
    header: Option<Header>,
}

/// Why receiving or sending ends.
enum Stop {
    /// There is nothing more to do now.
    Rest,
    /// The peer is gone.
    Gone(io::Error),
}

impl MessageQueue {
    pub(super) fn new(
        endpoint: Endpoint,
        layout: Layout,
        direction: Direction,
        many_at_once: bool,
    ) -> Self {
        let mover = Mover {
            layout,
            rules: MessageRules::new(layout.max_packet_size, layout.header()),
            slots: Vec::with_capacity(MESSAGES),
            refused: Vec::with_capacity(MESSAGES),
            headers: vec![[0; HEADER_LEN]; MESSAGES].into_boxed_slice(),
            batch: Batch::new(many_at_once),
            packets: Vec::with_capacity(MESSAGES),
            want: MESSAGES_MIN,
        };
        Self { endpoint, mover, direction }
    }
}

impl Mover {
    /// Sends the posted writes until none is left or the system takes no more.
    fn send(&mut self, cx: &mut PollContext<'_>, socket: &OwnedFd) -> Stop {
        loop {
            self.gather(cx);
            if self.slots.is_empty() {
                return Stop::Rest;
            }
            let mut at = 0;
            let stop = loop {
                if at == self.slots.len() {
                    break None;
                }
                // SAFETY: the pieces are bytes of `headers`, of the frames in `slots`, and in the
                // mappings that the guests' buffers in `slots` keep alive. All stay through the call.
                match unsafe { self.batch.send(socket, at) } {
                    Ok(sent) => at += sent,
                    Err(error) if is_busy(&error) => break Some(Stop::Rest),
                    Err(error) if is_gone(&error) => break Some(Stop::Gone(error)),
                    Err(error) => {
                        self.refused[at] = Some(match errno(&error) {
                            libc::EMSGSIZE => Status::PacketTooBig,
                            errno => Status::Os(errno),
                        });
                        at += 1;
                    }
                }
            };
            for (slot, refused) in self.slots.drain(..at).zip(&self.refused) {
                match refused {
                    None => cx.complete_write(slot),
                    Some(status) => cx.fail(slot, *status),
                }
            }
            while let Some(slot) = self.slots.pop() {
                cx.put_back(slot);
            }
            if let Some(stop) = stop {
                return stop;
            }
        }
    }

    /// Takes writes for one call.
    fn gather(&mut self, cx: &mut PollContext<'_>) {
        self.batch.clear();
        self.refused.clear();
        while self.slots.len() < MESSAGES
            && let Some(mut slot) = cx.take_write()
        {
            match self.layout.front_of(&mut slot) {
                Ok(None) => {}
                Ok(Some(header)) => {
                    let place = &mut self.headers[self.slots.len()];
                    *place = header;
                    self.batch.pieces.push_bytes(place);
                }
                Err(status) => {
                    cx.fail(slot, status);
                    continue;
                }
            }
            self.batch.pieces.push_packet(&slot);
            self.batch.end_message();
            self.slots.push(slot);
            self.refused.push(None);
        }
    }

    /// Fills the posted reads until there are no more messages, or no more reads. `only`: messages of
    /// others are dropped. Returns the progress, or that the peer is gone.
    fn receive(
        &mut self,
        cx: &mut PollContext<'_>,
        socket: &OwnedFd,
        only: Option<Address>,
        counters: &Counters,
        ends: impl Fn() -> bool,
    ) -> Result<Progress, Stop> {
        for _ in 0..RECEIVES_PER_POLL {
            let asked = self.offer(cx);
            if asked == 0 {
                return Ok(Progress::More);
            }
            // SAFETY: the pieces are in `headers`, in the frames in `slots`, and in the mappings that the
            // guests' buffers in `slots` keep alive. All stay through the call.
            let received = unsafe { self.batch.receive(socket, only.is_some()) };
            let received = match received {
                Ok(received) => received,
                Err(error) => {
                    self.take_back(cx);
                    self.want = MESSAGES_MIN;
                    return Err(if is_busy(&error) { Stop::Rest } else { Stop::Gone(error) });
                }
            };
            let is_empty = self.deliver(cx, received, only.as_ref(), counters);
            self.take_back(cx);
            if is_empty && ends() {
                return Err(Stop::Gone(io::Error::from_raw_os_error(libc::ECONNRESET)));
            }
            if received < asked {
                self.want = received.next_power_of_two().clamp(MESSAGES_MIN, MESSAGES);
                return Ok(Progress::Idle);
            }
            self.want = (2 * self.want).min(MESSAGES);
        }
        Ok(Progress::More)
    }

    /// Takes reads for one call. Returns how many.
    fn offer(&mut self, cx: &mut PollContext<'_>) -> usize {
        self.batch.clear();
        let longest = self.layout.max_packet_size;
        while self.slots.len() < self.want
            && let Some(mut slot) = cx.take_read()
        {
            if self.layout.has_header {
                let place = &mut self.headers[self.slots.len()];
                let iov_base = place.as_mut_ptr().cast();
                self.batch.pieces.0.push(libc::iovec { iov_base, iov_len: HEADER_LEN });
            }
            self.batch.pieces.push_space(&mut slot, longest);
            self.batch.end_message();
            self.slots.push(slot);
        }
        self.slots.len()
    }

    /// Completes the reads of the messages that were received. Returns whether one of them was empty.
    ///
    /// The read that was posted first completes first, so a packet behind a message that is dropped
    /// moves into an earlier read.
    fn deliver(
        &mut self,
        cx: &mut PollContext<'_>,
        received: usize,
        only: Option<&Address>,
        counters: &Counters,
    ) -> bool {
        let is_empty = self.judge(received, only, counters);
        for (place, packet) in self.packets.iter().enumerate() {
            if place < packet.at {
                let (before, from) = self.slots.split_at_mut(packet.at);
                move_packet(&mut from[0], &mut before[place], packet.len);
            }
        }
        let reads = self.slots.drain(..self.packets.len());
        for (slot, ReceivedPacket { len, header, .. }) in reads.zip(self.packets.drain(..)) {
            match header {
                None => cx.complete_read(slot, len),
                Some(header) => complete_with_header(cx, slot, &header, len),
            }
        }
        is_empty
    }

    /// Finds the packets among the messages that were received, and counts the others. Returns whether
    /// one of them was empty.
    fn judge(&mut self, received: usize, only: Option<&Address>, counters: &Counters) -> bool {
        let mut is_empty = false;
        for (at, slot) in self.slots[..received].iter_mut().enumerate() {
            let message = self.batch.received[at];
            if only.is_some_and(|only| only != self.batch.sender(at)) {
                add_one(&counters.stranger);
                continue;
            }
            let front = match message.len {
                4 if self.layout.has_header => self.headers[at][..4].try_into().unwrap_or_default(),
                4 => front_of(slot),
                _ => [0; 4],
            };
            let packet = |len, header| ReceivedPacket { at, len, header };
            match self.rules.judge(message.len, front, message.cut) {
                Message::Payload if self.layout.is_implied => {
                    match self.layout.implied(slot, message.len) {
                        None => counters.count_unfit(Unfit::TooBig),
                        header => self.packets.push(packet(message.len, header)),
                    }
                }
                Message::Payload if !self.layout.has_header => {
                    self.packets.push(packet(message.len, None));
                }
                Message::Payload => {
                    let len = message.len - HEADER_LEN;
                    match self.layout.check(&self.headers[at], len) {
                        None => add_one(&counters.bad_header),
                        header => self.packets.push(packet(len, header)),
                    }
                }
                Message::Magic => {}
                Message::Empty => is_empty = true,
                Message::Unfit(unfit) => counters.count_unfit(unfit),
            }
        }
        is_empty
    }

    /// Puts the reads back that got no packet, in their order.
    fn take_back(&mut self, cx: &mut PollContext<'_>) {
        while let Some(slot) = self.slots.pop() {
            cx.put_back(slot);
        }
    }
}

/// Copies the packet that a read's buffer has received into the buffer of another read. Each has space for
/// the longest packet. The first read can be posted again, as it was.
#[cold]
fn move_packet(from: &mut PostedSlot, to: &mut PostedSlot, len: usize) {
    let before = from.len();
    set_part_len(from.posted_buffer_mut(), len, true);
    let moved = to.copy_from_slot(from);
    debug_assert!(moved.is_ok(), "{moved:?}");
    set_part_len(from.posted_buffer_mut(), before, true);
}

/// The first four bytes of what a read's buffer has received.
#[cold]
fn front_of(slot: &mut PostedSlot) -> [u8; 4] {
    let mut front = [0; 4];
    if let Some(guest) = slot.guest() {
        guest.space().copy_to(&mut front);
    } else if let Some(bytes) = slot.buffer_mut().and_then(|room| room.first_chunk()) {
        front = *bytes;
    }
    front
}

/// Whether an error of sending says that the peer is gone, or is somebody else's. Sources: unix(7), and
/// for `EPERM` (the peer is connected to another socket) `unix_dgram_sendmsg` of Linux.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        errno(error),
        libc::ECONNREFUSED
            | libc::ECONNRESET
            | libc::EDESTADDRREQ
            | libc::ENOENT
            | libc::ENOTCONN
            | libc::EPERM
            | libc::EPIPE
    )
}

/// Fails the posted writes, because there is no peer.
#[cold]
fn refuse_writes(cx: &mut PollContext<'_>, counters: &Counters) {
    while let Some(slot) = cx.take_write() {
        add_one(&counters.no_peer);
        cx.fail(slot, Status::Os(libc::ENOTCONN));
    }
}

fn poll_datagram(
    mover: &mut Mover,
    reads: bool,
    cx: &mut PollContext<'_>,
    datagram: &Datagram,
) -> Result<Progress, Status> {
    if !datagram.find_peer()? {
        refuse_writes(cx, &datagram.counters);
        return Ok(Progress::Idle);
    }
    if let Stop::Gone(error) = mover.send(cx, &datagram.socket) {
        datagram.peer_is_gone(&error)?;
        refuse_writes(cx, &datagram.counters);
        return Ok(Progress::More);
    }
    if !reads {
        return Ok(Progress::Idle);
    }
    let only = datagram.only_sender();
    match mover.receive(cx, &datagram.socket, only, &datagram.counters, || false) {
        Ok(progress) => Ok(progress),
        Err(Stop::Rest) => {
            datagram.found_nothing();
            Ok(Progress::Idle)
        }
        Err(Stop::Gone(error)) => {
            datagram.peer_is_gone(&error)?;
            Ok(Progress::More)
        }
    }
}

fn poll_connection(
    mover: &mut Mover,
    reads: bool,
    cx: &mut PollContext<'_>,
    handle: &mut Handle,
) -> Result<Progress, Status> {
    let Some(connection) = handle.connection()? else {
        refuse_writes(cx, handle.counters());
        return Ok(Progress::Idle);
    };
    if connection.takes_no_more.load(Ordering::Relaxed) {
        refuse_writes(cx, handle.counters());
    } else if let Stop::Gone(error) = mover.send(cx, &connection.socket) {
        handle.takes_no_more(&connection, &error)?;
        refuse_writes(cx, handle.counters());
    }
    if !reads {
        return Ok(Progress::Idle);
    }
    let ends = || has_ended(&connection);
    match mover.receive(cx, &connection.socket, None, handle.counters(), ends) {
        Ok(progress) => Ok(progress),
        Err(Stop::Rest) => Ok(Progress::Idle),
        Err(Stop::Gone(_)) => {
            handle.end(&connection, End::Gone { within: false })?;
            // The next peer may wait already.
            Ok(Progress::More)
        }
    }
}

/// Whether an empty message is the end of the connection.
fn has_ended(connection: &Connection) -> bool {
    #[cfg(target_os = "linux")]
    return super::sys::has_hung_up(&connection.socket);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = connection;
        true
    }
}

impl Queue for MessageQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let reads = self.direction.reads();
        match &mut self.endpoint {
            Endpoint::Datagram(datagram) => poll_datagram(&mut self.mover, reads, cx, datagram),
            Endpoint::Connections(handle) => poll_connection(&mut self.mover, reads, cx, handle),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.endpoint {
            Endpoint::Datagram(datagram) => {
                datagram.takes_messages().then(|| datagram.socket.as_fd())
            }
            Endpoint::Connections(handle) => handle.descriptor(),
        }
    }
}
