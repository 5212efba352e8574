//! A flow of TCP: what it knows, and what the other files of this folder share.
//!
//! Names are those of RFC 9293, 3.3.1, from this side's view: `snd` is towards the guest, `rcv` is
//! from it.

use core::net::SocketAddr;

use crate::buffers::ByteQueue;
use crate::dns::stream::Stream;
use crate::endpoint::Endpoint;
use crate::io::Io;
use crate::limits::{
    ASKED_MSS, MAX_WINDOW_SHIFT, MIN_MSS, PROBE_AFTER, RETRANSMIT_FIRST, RETRANSMIT_MAX,
    TAIL_PROBE, WINDOW_SHIFT,
};
use crate::output::{Full, Link, Port};
use crate::packet::Addresses;
use crate::ports::{SECOND, Share};
use crate::retained::Retained;
use crate::retained::kernel::KernelQueue;
use crate::retained::place::Place;
use crate::retained::ring::Ring;
use crate::seq::Seq;
use crate::sockets::{SendSpace, SocketError, Sockets, Token};
use crate::stats::{Carried, Counter};
use crate::table::Keyed;
use crate::tcp::memory::Memory;
use crate::tcp::segment::{CONTROL_LEN, Flags, Header, Key, Segment, SynOptions};

/// Where a flow is between its beginning and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The guest has sent SYN. The host connects, and the guest gets no answer yet.
    Connecting,
    /// The host has connected, and the guest has got SYN,ACK.
    SynReceived,
    /// A peer has connected to the host, and the guest has got SYN.
    SynSent,
    /// The handshake is complete. Each direction may have ended.
    Open,
    /// Both directions have ended and there is no socket. Late segments of the guest are answered.
    TimeWait,
    /// There is no socket, and the guest has yet to get a reset, which its port did not take.
    Resetting,
    /// The flow is to be removed.
    Closed,
}

/// A flow. It has no block of memory of its own while nothing waits in it.
#[derive(Debug)]
pub(crate) struct Flow<T> {
    pub(crate) key: Key,
    /// Where the host's socket is connected to.
    pub(crate) to: Endpoint,
    /// Where the guest's frames come from.
    pub(crate) mac: [u8; 6],
    pub(crate) phase: Phase,
    pub(crate) socket: Option<T>,
    /// What the socket was opened with.
    pub(crate) token: Token,

    // From the guest to the world.
    /// The guest's first sequence number.
    pub(crate) irs: Seq,
    /// Everything before it was taken from the guest.
    pub(crate) rcv_nxt: Seq,
    /// The right edge of the window that the guest was offered. It never moves back.
    pub(crate) rcv_edge: Seq,
    /// Bytes that were taken from the guest and that the kernel has yet to take.
    pub(crate) spill: Option<ByteQueue>,
    /// Where in its queries the guest is, if it has connected to the gateway's DNS.
    pub(crate) queries: Option<Box<Stream>>,
    /// What the socket took, the last time it was asked, less what it was given since.
    pub(crate) space: SendSpace,

    // From the world to the guest.
    pub(crate) place: Place,
    /// The first sequence number that the guest has not acknowledged.
    pub(crate) snd_una: Seq,
    /// The next one to send. After a loss it goes back.
    pub(crate) snd_nxt: Seq,
    /// The one behind everything that was ever sent.
    pub(crate) snd_max: Seq,
    /// The sequence number of FIN, when the end of the stream has been found.
    pub(crate) fin: Option<Seq>,
    /// How many bytes are acknowledged but not yet discarded.
    pub(crate) acked: u32,
    /// How many bytes were discarded since the socket was asked what it costs.
    pub(crate) since_asked: u32,
    /// The window that the guest offers, in bytes from `snd_una` on.
    pub(crate) snd_wnd: u32,
    /// The largest that it has offered.
    pub(crate) max_wnd: u32,
    /// The segment that `snd_wnd` is from.
    pub(crate) wl1: Seq,
    pub(crate) wl2: Seq,
    /// Where `snd_max` was when data was last sent again. Duplicate acknowledgments of anything up to
    /// here may be about the duplicates (RFC 6582, 3.2).
    pub(crate) recover: Seq,
    pub(crate) dup_acks: u8,
    /// The last segment was sent again, and nothing has been acknowledged since.
    pub(crate) probed: bool,
    pub(crate) mss: u16,
    /// The place of the port forward that it has come through, from 1 on, or 0.
    pub(crate) forward: u16,
    /// The guest's windows are in units of 2 to this power.
    pub(crate) snd_shift: u8,
    /// The windows that the guest is offered are in units of 2 to this power.
    pub(crate) rcv_shift: u8,

    /// Bytes that the socket has taken, and that the guest has acknowledged.
    pub(crate) sent: u64,
    pub(crate) received: u64,

    // Time, in microseconds. 0 is never.
    /// When the handshake, a segment, a probe or TIME-WAIT times out.
    pub(crate) retry_at: u64,
    /// When to look again whether the port or the socket takes something.
    pub(crate) look_at: u64,
    /// When the guest was last heard.
    pub(crate) heard: u64,
    /// The second in which the guest was last asked whether it knows the flow. 0 is never.
    pub(crate) asked: u32,
    /// What the timer wheel was told.
    pub(crate) timer_at: u64,
    /// What the flow counts for its port's windows.
    pub(crate) share: Share,
    /// How often something was sent without an answer.
    pub(crate) attempts: u8,
    /// How often the time between attempts was doubled.
    pub(crate) backoff: u8,

    /// The socket may have bytes, or the end of the stream.
    pub(crate) readable: bool,
    /// A read that gives less than it could may have more behind it: the end of the stream, because the
    /// peer sends no more, or urgent bytes, in front of which a read stops.
    pub(crate) reads_short: bool,
    /// After a timeout, one segment is sent and then nothing until it is acknowledged.
    pub(crate) slow: bool,
    /// FIN of the guest was taken.
    pub(crate) guest_fin: bool,
    /// FIN was sent to the guest in a segment that acknowledges the guest's own.
    pub(crate) fin_acks_fin: bool,
    /// The socket was told that the guest sends no more.
    pub(crate) shut: bool,
    /// The guest is to get an acknowledgment, or in a handshake SYN or SYN,ACK.
    pub(crate) ack_due: bool,
    /// The socket will tell when it takes bytes.
    pub(crate) armed: bool,
    /// The socket has told so, and the guest has sent nothing since.
    pub(crate) just_writable: bool,
    /// The guest was offered more after its window was almost closed, and has sent nothing since.
    pub(crate) reopened: bool,
    /// The flow is in the list of those that have more to do.
    pub(crate) queued: bool,
    /// There is more to send to the guest, but others are to have their turn.
    pub(crate) unfinished: bool,
    /// The flow is in its port's list of those that wait for space.
    pub(crate) waiting: bool,
    /// The port did not take a frame.
    pub(crate) refused: bool,
}

static_assertions::const_assert!(size_of::<Flow<i32>>() <= 328);

impl<T> Keyed for Flow<T> {
    type Key = Key;
    fn key(&self) -> Key {
        self.key
    }
}

/// What ends with an open socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// What was sent still goes out.
    Close,
    /// The peer gets a reset.
    Reset,
}

impl<T> Flow<T> {
    /// A flow in this phase. `place` is chosen by the address that the socket is connected to.
    pub(crate) fn new(
        key: Key,
        to: SocketAddr,
        mac: [u8; 6],
        phase: Phase,
        place: Place,
        token: Token,
    ) -> Self {
        Self {
            key,
            to: to.into(),
            mac,
            phase,
            socket: None,
            token,
            irs: Seq(0),
            rcv_nxt: Seq(0),
            rcv_edge: Seq(0),
            spill: None,
            queries: None,
            space: SendSpace::default(),
            place,
            snd_una: Seq(0),
            snd_nxt: Seq(0),
            snd_max: Seq(0),
            fin: None,
            acked: 0,
            since_asked: 0,
            snd_wnd: 0,
            max_wnd: 0,
            wl1: Seq(0),
            wl2: Seq(0),
            recover: Seq(0),
            dup_acks: 0,
            probed: false,
            mss: MIN_MSS,
            forward: 0,
            snd_shift: 0,
            rcv_shift: 0,
            sent: 0,
            received: 0,
            retry_at: 0,
            look_at: 0,
            heard: 0,
            asked: 0,
            timer_at: 0,
            share: Share::NONE,
            attempts: 0,
            backoff: 0,
            readable: false,
            reads_short: false,
            slow: false,
            guest_fin: false,
            fin_acks_fin: false,
            shut: false,
            ack_due: false,
            armed: false,
            just_writable: false,
            reopened: false,
            queued: false,
            unfinished: false,
            waiting: false,
            refused: false,
        }
    }

    /// What has gone through the flow.
    pub(crate) fn carried(&self) -> Carried {
        Carried { bytes_sent: self.sent, bytes_received: self.received, ..Carried::default() }
    }

    /// Whether the handshake is not complete.
    pub(crate) fn is_half_open(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::SynReceived | Phase::SynSent)
    }

    /// Whether the flow counts as one: it has a socket.
    pub(crate) fn counts(&self) -> bool {
        self.is_half_open() || self.phase == Phase::Open
    }

    /// The place for bytes that come over a socket to this address.
    pub(crate) fn place_for(
        port: Port,
        to: SocketAddr,
        memory: &Memory,
        rings_only: bool,
    ) -> Place {
        let capabilities = &memory.capabilities;
        let kernel =
            if to.is_ipv4() { capabilities.peek_offset_v4 } else { capabilities.peek_offset_v6 };
        if kernel && !rings_only {
            Place::Kernel(KernelQueue::default())
        } else {
            Place::Ring(Ring::new(port))
        }
    }

    /// Takes over what the guest says in its SYN, and has said where its sequence begins.
    pub(crate) fn take_syn(&mut self, segment: &Segment<'_>, link: &Link) {
        let SynOptions { mss, window_shift } = segment.syn_options();
        self.irs = segment.seq;
        self.rcv_nxt = segment.seq.add(1);
        self.rcv_edge = self.rcv_nxt;
        let default =
            if self.key.guest.is_ipv4() { MIN_MSS } else { crate::limits::DEFAULT_MSS_V6 };
        self.mss = mss.unwrap_or(default).clamp(MIN_MSS, largest_mss(self.key.guest, link));
        match window_shift {
            Some(shift) => {
                // RFC 7323, 2.3: a larger shift is taken for 14.
                (self.snd_shift, self.rcv_shift) = (shift.min(MAX_WINDOW_SHIFT), WINDOW_SHIFT);
            }
            None => (self.snd_shift, self.rcv_shift) = (0, 0),
        }
        // The window of a SYN is not scaled.
        (self.snd_wnd, self.max_wnd) = (segment.window.into(), segment.window.into());
        (self.wl1, self.wl2) = (segment.seq, segment.ack);
    }

    /// When the flow's timer is to expire, or 0.
    pub(crate) fn deadline(&self) -> u64 {
        let probe = if self.phase == Phase::Open { self.probe_at() } else { 0 };
        let waits = [self.retry_at, self.look_at, probe];
        waits.into_iter().filter(|&at| at > 0).min().unwrap_or(0)
    }

    /// When the guest is next to be asked whether it knows the flow.
    pub(crate) fn probe_at(&self) -> u64 {
        self.heard.max(u64::from(self.asked) * SECOND) + PROBE_AFTER
    }

    /// Sets the timer for an answer to what was sent.
    pub(crate) fn expect_answer(&mut self, now: u64) {
        let again = (RETRANSMIT_FIRST << self.backoff.min(16)).min(RETRANSMIT_MAX);
        self.retry_at = now + if self.may_probe_tail() { TAIL_PROBE } else { again };
    }

    /// Whether the last segment may be sent again, to find out whether acknowledgments were lost, or the
    /// segments at the end (RFC 8985, 7). A guest acknowledges every second segment at once (RFC 5681,
    /// 4.2), so it does not delay the answer to three.
    pub(crate) fn may_probe_tail(&self) -> bool {
        self.phase == Phase::Open
            && !self.probed
            && self.backoff == 0
            && self.fin.is_none()
            && self.snd_max.since(self.snd_una) > 2 * u32::from(self.mss)
    }

    /// Whether the guest has acknowledged FIN.
    pub(crate) fn fin_acked(&self) -> bool {
        self.fin.is_some_and(|fin| self.snd_una.after(fin))
    }

    /// Whether there is, or may be, something that is to be sent to the guest: for the first time, or
    /// again.
    pub(crate) fn has_more(&self) -> bool {
        match self.fin {
            // What the socket tells behind the end of the stream is no news.
            Some(fin) => !self.snd_nxt.after(fin),
            None => self.readable || self.snd_nxt != self.snd_max,
        }
    }

    fn header(&self, flags: Flags, seq: Seq, window: u16, from_mac: [u8; 6]) -> Header {
        Header {
            addresses: Addresses {
                from_mac,
                to_mac: self.mac,
                from: self.key.remote.ip(),
                to: self.key.guest.ip(),
            },
            from_port: self.key.remote.port(),
            to_port: self.key.guest.port(),
            seq,
            ack: if flags.ack { self.rcv_nxt } else { Seq(0) },
            flags,
            window,
            options: None,
        }
    }

    /// The header of a segment with data.
    pub(crate) fn data_header(&self, window: u16, from_mac: [u8; 6]) -> Header {
        self.header(Flags::ACK, self.snd_nxt, window, from_mac)
    }

    /// Ends the socket.
    pub(crate) fn end_socket<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
        ending: Ending,
    ) {
        if let Some(socket) = self.socket.take() {
            io.ports.note_end(self.key.port, &mut self.share, io.now);
            memory.descriptors -= 1;
            memory.charge(self.key.port, self.space.charge, 0);
            match ending {
                Ending::Close => drop(socket),
                Ending::Reset => io.sockets.reset(socket),
            }
        }
        self.space = SendSpace::default();
        Retained::<S>::release(&mut self.place, &mut memory.rings);
        if let Some(spill) = self.spill.take() {
            memory.spill.give_back(spill);
        }
    }

    /// Takes a new socket.
    pub(crate) fn begin_socket(&mut self, socket: T, memory: &mut Memory) {
        self.socket = Some(socket);
        self.space.charge = crate::limits::SOCKET_CHARGE;
        memory.descriptors += 1;
        memory.charge(self.key.port, 0, self.space.charge);
    }

    /// Asks the socket how much it takes.
    pub(crate) fn ask_space<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        let Some(socket) = &self.socket else { return };
        self.since_asked = 0;
        if let Ok(space) = io.sockets.send_space(socket) {
            memory.charge(self.key.port, self.space.charge, space.charge);
            self.space = space;
        }
    }

    /// Sends a segment without data.
    pub(crate) fn send_control<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        flags: Flags,
        seq: Seq,
        window: u16,
    ) -> Result<(), Full> {
        let mut header = self.header(flags, seq, window, io.config.gateway_mac);
        if flags.syn {
            let link = io.out.link(self.key.port);
            // SYN offers scaling. SYN,ACK does so only if the guest has.
            let shift = if flags.ack { self.rcv_shift } else { WINDOW_SHIFT };
            let offers = !flags.ack || self.rcv_shift > 0;
            header.options = Some((asked_mss(self.key.guest, &link), offers.then_some(shift)));
        }
        send_header(io, self.key.port, &header)
    }

    /// Sends a reset to the guest: now if the port takes it, else as soon as it does. The flow has no
    /// socket afterwards.
    pub(crate) fn reset_guest<S: Sockets<Socket = T>>(
        &mut self,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
        ending: Ending,
    ) {
        self.end_socket(io, memory, ending);
        (self.retry_at, self.attempts, self.backoff, self.ack_due) = (0, 0, 0, false);
        let (flags, seq) = if self.phase == Phase::Connecting {
            // The guest expects an answer to its SYN (RFC 9293, 3.10.7.1).
            (Flags { rst: true, ack: true, ..Flags::default() }, Seq(0))
        } else {
            (Flags { rst: true, ack: true, ..Flags::default() }, self.snd_max)
        };
        if self.send_control(io, flags, seq, 0).is_ok() {
            self.phase = Phase::Closed;
        } else if self.phase == Phase::Connecting {
            // The guest sends its SYN again, and gets the answer then.
            self.phase = Phase::Closed;
        } else {
            self.phase = Phase::Resetting;
            self.refused = true;
            self.expect_answer(io.now);
        }
    }

    /// Ends a flow whose peer is gone.
    pub(crate) fn world_failed<S: Sockets<Socket = T>>(
        &mut self,
        error: SocketError,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        let counter = match error {
            SocketError::Reset => Counter::WorldReset,
            SocketError::TimedOut => Counter::ConnectTimedOut,
            _ => Counter::OtherError,
        };
        io.count(self.key.port, counter);
        self.reset_guest(io, memory, Ending::Reset);
    }

    /// Ends a flow whose guest is gone, or has said that it is.
    pub(crate) fn guest_failed<S: Sockets<Socket = T>>(
        &mut self,
        counter: Counter,
        io: &mut Io<'_, S>,
        memory: &mut Memory,
    ) {
        io.count(self.key.port, counter);
        self.end_socket(io, memory, Ending::Reset);
        self.phase = Phase::Closed;
    }
}

/// Sends a segment without data.
pub(crate) fn send_header<S: Sockets>(
    io: &mut Io<'_, S>,
    port: Port,
    header: &Header,
) -> Result<(), Full> {
    let mut frame = [0; CONTROL_LEN];
    let len = header.len();
    let offload = header.emit(&mut frame[..len], u16::MAX);
    vmring_embedded::software::complete_checksum(&offload, &mut frame[..len])
        .expect("the header describes the frame");
    io.send_plain(port, &mut frame, len)
}

/// The largest segment that fits into a packet of the link.
pub(crate) fn largest_mss(guest: Endpoint, link: &Link) -> u16 {
    let headers = if guest.is_ipv4() { 40 } else { 60 };
    let longest = (link.mtu as usize).min(link.longest.saturating_sub(14));
    longest.saturating_sub(headers).clamp(MIN_MSS.into(), u16::MAX.into()) as u16
}

/// The largest segment that the guest is asked for. Many stacks send nothing while less than a segment fits
/// into the window. So a window has to be several segments, also while the socket has its first buffer: else
/// the guest waits for bytes to leave a buffer that was never full, of which the system says nothing.
pub(crate) fn asked_mss(guest: Endpoint, link: &Link) -> u16 {
    largest_mss(guest, link).min(ASKED_MSS)
}
