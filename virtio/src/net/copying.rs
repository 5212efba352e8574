//! [`Copier`]: packets that go to the guest through frames of the device's own, because the guest
//! cannot take them as the interface delivers them. Work that the sender left undone is done here, and
//! a long packet is spread over mergeable buffers.
//!
//! It costs one more copy. It is used if the guest has not accepted an offload that the interface
//! delivers and a ring cannot refuse ([`Capabilities::receive_offloads`]), and if packets may be longer than mergeable buffers while the interface cannot fill
//! several buffers with one packet.
//!
//! [`Capabilities::receive_offloads`]: vmring::device::Capabilities::receive_offloads

use std::collections::VecDeque;

use vmring::config::Offloads;
use vmring::software::{self, Left, Segments};
use vmring::{Completion, Frame, OFFLOAD_LEN, OffloadHeader, Ring};

use crate::net::header::HEADER_LEN;
use crate::net::running::{Context, Next, RunningQueue};
use crate::queue::Chain;

/// The frames of a device that wait for its guest, at most.
pub(super) const FRAMES: usize = 64;

/// What the guest takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The work that may be left undone.
    pub(super) offloads: Offloads,
    /// Whether TCP with ECN may be left to be cut.
    pub(super) ecn: bool,
    /// Whether one packet may fill several buffers.
    pub(super) merging: bool,
}

/// Packets that wait for the guest's buffers.
#[derive(Debug)]
pub(super) struct Copier {
    wanted: Wanted,
    waiting: VecDeque<Waiting>,
    /// One segment of a packet.
    segment: Box<[u8]>,
    /// Whether the guest's buffers did not suffice for the first packet.
    lacks_buffers: bool,
}

/// A packet, and what is still to be done to it.
#[derive(Debug)]
struct Waiting {
    frame: Frame,
    header: OffloadHeader,
    left: Left,
    /// The next segment.
    segment: usize,
}

/// Why a packet was not copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copied {
    /// It cannot be. It is lost.
    Lost,
    /// The guest has too few buffers.
    NoBuffers,
    /// Others have their turn first.
    Later,
}

impl Copier {
    pub(super) fn new(wanted: Wanted, max_packet_size: u32) -> Self {
        let segment = vec![0; max_packet_size as usize].into();
        let waiting = VecDeque::with_capacity(FRAMES);
        Self { wanted, waiting, segment, lacks_buffers: false }
    }

    /// Posts every free frame. Returns whether the ring is open.
    pub(super) fn post(&mut self, ring: &mut Ring) -> Result<(), vmring::SubmitErrorKind> {
        while let Some(frame) = ring.alloc() {
            match ring.submit_read(frame, 0) {
                Ok(()) => {}
                Err(refused) if refused.is_backpressure() => break,
                Err(refused) => return Err(refused.kind),
            }
        }
        Ok(())
    }

    /// Takes what a read of a frame has brought.
    pub(super) fn take(&mut self, cx: Context<'_>, done: &Completion) {
        // A read that was cancelled has no packet, and its frame is free again.
        let Ok(mut frame) = done.take_packet() else { return };
        let header = match frame.offload() {
            Ok(header) => header.unwrap_or(OffloadHeader::NONE),
            Err(_) => return cx.counters.rx_malformed.add(1),
        };
        let mut left = software::left_by(&self.wanted.offloads, &header);
        if header.ecn && !self.wanted.ecn && left == Left::Nothing {
            left = Left::Segments { partial: self.wanted.offloads.checksum };
        }
        let header = match left {
            Left::Checksum => match software::complete_checksum(&header, &mut frame) {
                Ok(header) => header,
                Err(_) => return cx.counters.rx_malformed.add(1),
            },
            _ => header,
        };
        if left != Left::Nothing {
            cx.counters.rx_software.add(1);
        }
        // There are no more frames than it has space for.
        self.waiting.push_back(Waiting { frame, header, left, segment: 0 });
    }

    /// Copies packets into the guest's buffers, at most `budget` of them. Returns how many.
    pub(super) fn deliver(
        &mut self,
        cx: Context<'_>,
        running: &mut RunningQueue,
        budget: u16,
    ) -> u16 {
        let Self { wanted, waiting, segment, lacks_buffers } = self;
        let mut delivered = 0;
        let lacked = std::mem::take(lacks_buffers);
        while delivered < budget
            && let Some(first) = waiting.front_mut()
        {
            let copied = match first.left {
                Left::Segments { partial } => {
                    deliver_segment(cx, running, first, segment, wanted.merging, partial)
                }
                _ => {
                    let header = first.header.for_guest();
                    copy(cx, running, &first.frame, header, wanted.merging).map(|()| true)
                }
            };
            match copied {
                Ok(is_last) => {
                    delivered += 1;
                    if is_last {
                        waiting.pop_front();
                    }
                }
                Err(Copied::Lost) => drop(waiting.pop_front()),
                Err(Copied::Later) => break,
                Err(Copied::NoBuffers) => {
                    *lacks_buffers = true;
                    // It is counted when they run out, and not at each look.
                    cx.counters.rx_no_buffer.add((!lacked).into());
                    break;
                }
            }
        }
        delivered
    }

    /// Returns how many packets wait for the guest's buffers.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Asks the guest for buffers if packets wait for them. Returns whether the device may sleep.
    pub(super) fn arm(&mut self, running: &mut RunningQueue) -> bool {
        match (self.waiting.is_empty(), self.lacks_buffers) {
            (true, _) => true,
            // The buffers have not ended.
            (false, false) => false,
            // Some buffers may be there, but not enough.
            (false, true) => running.broken || !running.queue.enable_notifications_for_more(),
        }
    }
}

/// Writes the next segment of a packet, and copies it. Returns whether it was the last one.
fn deliver_segment(
    cx: Context<'_>,
    running: &mut RunningQueue,
    first: &mut Waiting,
    space: &mut [u8],
    merging: bool,
    partial: bool,
) -> Result<bool, Copied> {
    let lost = |_| {
        cx.counters.rx_malformed.add(1);
        Copied::Lost
    };
    let segments = Segments::new(&first.header, &first.frame).map_err(lost)?;
    let (len, header) = match partial {
        true => (segments.write_partial(first.segment, space), segments.partial_header()),
        false => (segments.write(first.segment, space), OffloadHeader::NONE),
    };
    let len = len.map_err(lost)?;
    copy(cx, running, &space[..len], header.for_guest(), merging)?;
    first.segment += 1;
    Ok(first.segment == segments.count())
}

/// What became of a buffer for a part of a packet.
enum Part {
    Filled(u32),
    /// It has no space for a header, and is none of the packet's.
    Useless,
    TooSmall,
}

/// The most buffers that one packet may fill. 64 KiB in buffers of 256 bytes are as many.
const PARTS_MAX: usize = 257;

/// Copies one packet into the guest's buffers. A packet that does not fit is lost, and is done too.
fn copy(
    cx: Context<'_>,
    running: &mut RunningQueue,
    packet: &[u8],
    header: OffloadHeader,
    merging: bool,
) -> Result<(), Copied> {
    let mut bytes = [0; OFFLOAD_LEN];
    header.write(&mut bytes);
    let total = packet.len() + OFFLOAD_LEN;
    // The used lengths of the buffers, and where the first one has its header.
    let mut parts = [0; PARTS_MAX];
    let mut count = 0;
    let mut place = HeaderPlace::default();
    let mut written = 0;
    while written < total {
        let rest = total - written;
        let next = running.next(cx, |chain| {
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX);
            if count == 0 && room < OFFLOAD_LEN {
                return Part::Useless;
            }
            if room < rest && (!merging || count + 1 == PARTS_MAX) {
                return Part::TooSmall;
            }
            if count == 0 {
                place = HeaderPlace::of(&chain);
            }
            let len = rest.min(room);
            fill(&chain, &bytes, packet, written, len);
            Part::Filled(len as u32)
        });
        match next {
            Next::Chain(Part::Filled(len)) => {
                (parts[count], written) = (len, written + len as usize);
                count += 1;
            }
            Next::Chain(Part::Useless) => {
                cx.counters.rx_useless.add(1);
                running.queue.push(0);
            }
            Next::Chain(Part::TooSmall) => {
                cx.counters.rx_too_small.add(1);
                (0..=count).for_each(|_| running.queue.push(0));
                return Ok(());
            }
            Next::Nothing | Next::Later => {
                running.queue.unpop(count as u16);
                let later = matches!(next, Next::Later);
                return Err(if later { Copied::Later } else { Copied::NoBuffers });
            }
        }
    }
    if count > 1 {
        bytes[10..].copy_from_slice(&(count as u16).to_le_bytes());
        place.write(running, &bytes);
    }
    parts[..count].iter().for_each(|len| running.queue.push(*len));
    cx.counters.rx_packets.add(1);
    cx.counters.rx_copied.add(1);
    cx.counters.rx_bytes.add(packet.len() as u64);
    Ok(())
}

/// Copies `len` bytes into a chain: those from `from` on of a header and the packet behind it.
fn fill(chain: &Chain<'_>, header: &[u8; OFFLOAD_LEN], packet: &[u8], from: usize, len: usize) {
    let (mut at, end) = (from, from + len);
    for segment in chain.writable() {
        let mut space = Some(segment);
        while at < end
            && let Some(place) = space.filter(|place| !place.is_empty())
        {
            let piece = match at.checked_sub(OFFLOAD_LEN) {
                None => &header[at..end.min(OFFLOAD_LEN)],
                Some(behind) => &packet[behind..end - OFFLOAD_LEN],
            };
            let copied = place.copy_from(piece);
            place.mark_dirty(copied as u32);
            at += copied;
            space = place.skip(copied as u32);
        }
        if at == end {
            break;
        }
    }
}

/// Where the header of a packet is in the guest's memory. It may be in several pieces.
#[derive(Default)]
struct HeaderPlace {
    pieces: [(u64, u32); OFFLOAD_LEN],
}

impl HeaderPlace {
    fn of(chain: &Chain<'_>) -> Self {
        let mut place = Self::default();
        let mut left = HEADER_LEN;
        for (piece, segment) in place.pieces.iter_mut().zip(chain.writable()) {
            let len = segment.len().min(left);
            *piece = (segment.guest_address(), len);
            left -= len;
            if left == 0 {
                break;
            }
        }
        place
    }

    fn write(&self, running: &RunningQueue, header: &[u8; OFFLOAD_LEN]) {
        let mut written = 0;
        for (address, len) in self.pieces {
            // The piece was in one region when the chain was walked, and the memory is the same.
            let slice = running.queue.memory().slice(address, len).filter(|_| len > 0);
            let Some(slice) = slice else { continue };
            let copied = slice.copy_from(&header[written..]);
            // A migration may have copied the page since the packet was written.
            slice.mark_dirty(copied as u32);
            written += copied;
        }
    }
}
