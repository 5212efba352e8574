//! One direction of the bridge: what happens to a packet between its read and its write.

use std::collections::{BTreeMap, VecDeque};

use vmring::device::{Capabilities, Offloads};
use vmring::software::{self, Left, Merging, Outgoing, Segments};
use vmring::{
    BatchError, Checksum, Completion, EntryError, Error, Frame, Gso, OffloadHeader, Pool, Status,
    SubmissionHalf, SubmitErrorKind,
};

use super::spec::InSoftware;

/// `user_data` of reads; of writes of a frame as it was read, of a frame with a segment, and of a frame
/// in which packets were merged.
pub(crate) const READ: u64 = 0;
const WHOLE: u64 = 1;
const SEGMENT: u64 = 2;
const MERGED: u64 = 3;

/// Why a packet is dropped that the bridge had read when it ended.
const NOT_WRITTEN: &str = "not written at the end";

const ETHERNET: usize = 14;
const ETHERNET_AND_VLAN: u32 = 18;

/// See the [module](self).
///
/// It owns its frames: they are posted for reading at one end, wait here, are written at the other
/// end, and come back. So however slow the other end is, this direction holds no more than these
/// frames, and takes none from the other direction.
#[derive(Debug)]
pub(crate) struct BridgeDirection {
    /// What the other end offloads, and the longest frame that it takes without segmentation.
    offloads: Offloads,
    max_packet_size: usize,
    max_plain: usize,
    /// Whether the rest is done here, in software.
    software: bool,
    /// Merges the packets of one batch for an end that cuts them, or that has others cut them.
    merging: Option<Merging<Frame>>,
    /// Whether the other end is a TAP, whose kernel answers EIO while its link is down.
    to_tap: bool,
    /// Frames to be posted for reading.
    spare: Vec<Frame>,
    /// Frames for segments.
    blank: Vec<Frame>,
    /// Packets for the other end, oldest first.
    waiting: VecDeque<Waiting>,
    /// The index of the next segment of the first waiting packet.
    segment: usize,
    /// `user_data` of the last write.
    last: u64,
    /// Writes that have not completed.
    pub(crate) writing: usize,
    pub(crate) counts: Counts,
}

#[derive(Debug)]
enum Waiting {
    Packet(Frame),
    /// Several packets in one.
    Merged(Frame),
    /// A packet to be segmented as its header says.
    Large(Frame, OffloadHeader),
}

/// Counters.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) packets_read: u64,
    pub(crate) bytes_read: u64,
    pub(crate) packets_written: u64,
    pub(crate) bytes_written: u64,
    /// Checksums of whole packets that were completed in software.
    pub(crate) checksums: u64,
    /// Packets that were segmented in software.
    pub(crate) packets_cut: u64,
    /// Packets that were merged with others, and the large packets that they became.
    pub(crate) segments_merged: u64,
    pub(crate) packets_merged: u64,
    pub(crate) drops: BTreeMap<String, u64>,
}

impl Counts {
    fn count_drop(&mut self, why: &str) {
        match self.drops.get_mut(why) {
            Some(n) => *n += 1,
            None => drop(self.drops.insert(why.to_owned(), 1)),
        }
    }
}

impl BridgeDirection {
    /// A direction towards an end with the capabilities `caps`. It takes `reads` frames from the
    /// pool for reading, as many again to be in flight, `segments` for segments, and `merged` to merge
    /// in.
    pub(crate) fn new(
        caps: &Capabilities,
        to_tap: bool,
        software: InSoftware,
        pool: &Pool,
        reads: usize,
        segments: usize,
        merged: usize,
    ) -> Self {
        let offloads = caps.offloads;
        // If the end segments large packets, the other packets must still keep to the MTU.
        let cuts = offloads.tso4 || offloads.tso6 || offloads.uso;
        let max_plain = match cuts {
            true => caps.max_packet_size.min(caps.mtu + ETHERNET_AND_VLAN),
            false => caps.max_packet_size,
        };
        let merging = Merging::new(&offloads, caps.max_packet_size as usize).with_constant_ids();
        let merges = software == InSoftware::CutAndMerge && merging.is_able();
        let frames = |n| std::iter::from_fn(|| pool.alloc()).take(n).collect();
        Self {
            offloads,
            max_packet_size: caps.max_packet_size as usize,
            max_plain: max_plain as usize,
            software: software != InSoftware::Nothing,
            merging: merges.then_some(merging),
            to_tap,
            spare: frames(2 * reads + merged),
            blank: frames(segments),
            waiting: VecDeque::with_capacity(2 * reads + merged),
            segment: 0,
            last: WHOLE,
            writing: 0,
            counts: Counts::default(),
        }
    }

    /// Whether a packet waits or is being written.
    pub(crate) fn is_busy(&self) -> bool {
        let is_merging = self.merging.as_ref().is_some_and(|merging| !merging.is_empty());
        self.writing > 0 || is_merging || !self.waiting.is_empty()
    }

    /// Handles a read that has completed. `is_closed` says whether its ring is closed: then a read
    /// that failed was for no packet.
    pub(crate) fn read_done(&mut self, done: Completion, is_closed: bool) {
        let Some(mut frame) = done.take_frame() else { return };
        if let Err(error) = done.result {
            if error != EntryError::Cancelled && !is_closed {
                self.counts.count_drop(&format!("read failed: {error}"));
            }
            return self.spare.push(frame);
        }
        self.counts.packets_read += 1;
        self.counts.bytes_read += frame.len() as u64;
        match self.prepare(&mut frame) {
            Ok(None) => self.merge(frame),
            Ok(Some(header)) => {
                self.end_batch();
                self.waiting.push_back(Waiting::Large(frame, header));
            }
            Err(why) => {
                self.counts.count_drop(why);
                self.spare.push(frame);
            }
        }
    }

    /// Lets a packet wait, perhaps as a part of another.
    fn merge(&mut self, frame: Frame) {
        let Self { merging: Some(merging), waiting, counts, .. } = self else {
            return self.waiting.push_back(Waiting::Packet(frame));
        };
        // `prepare` has read the header before.
        let header = frame.offload().ok().flatten().unwrap_or_default();
        let free = merging.push(frame, &header, |packet| wait(waiting, counts, packet));
        self.spare.extend(free);
    }

    /// Lets the packets wait that are being merged.
    fn end_batch(&mut self) {
        let Self { merging, waiting, counts, .. } = self;
        if let Some(merging) = merging {
            merging.flush(|packet| wait(waiting, counts, packet));
        }
    }

    /// Makes the packet one that the other end accepts, or says why that is impossible. Returns the
    /// header of a packet that is to be segmented.
    fn prepare(&mut self, frame: &mut Frame) -> Result<Option<OffloadHeader>, &'static str> {
        const BAD: &str = "bad offload header";
        const RUNT: &str = "shorter than an Ethernet header";
        const TOO_BIG: &str = "too big for the other end";
        const UNDONE: &str = "offload that the other end does not do";
        let header = match frame.forward_offload() {
            Ok(true) => frame.offload().map_err(|_| BAD)?.unwrap_or_default(),
            Ok(false) => OffloadHeader::NONE,
            Err(_) => return Err(BAD),
        };
        if frame.len() < ETHERNET {
            return Err(RUNT);
        }
        header.validate(frame.len()).map_err(|_| BAD)?;
        let left = software::left_by(&self.offloads, &header);
        if left != Left::Nothing && !self.software {
            return Err(UNDONE);
        }
        match left {
            Left::Segments { .. } => {
                let segments = Segments::new(&header, frame).map_err(|_| "cannot be segmented")?;
                if segments.len_max() > self.max_plain {
                    return Err(TOO_BIG);
                }
                self.counts.packets_cut += 1;
                return Ok(Some(header));
            }
            Left::Checksum => {
                software::complete_checksum(&header, frame).map_err(|_| BAD)?;
                frame.clear_offload();
                self.counts.checksums += 1;
            }
            Left::Nothing => {}
            _ => return Err(UNDONE),
        }
        let fits = match (header.gso, header.checksum) {
            (Gso::None, _) => frame.len() <= self.max_plain,
            // The least length of its segments: the fixed part of a header, and the payload.
            (gso, Checksum::Partial { start, .. }) => {
                let fixed = if gso.is_tcp() { 20 } else { 8 };
                let segment = usize::from(start) + fixed + usize::from(header.segment_size);
                frame.len() <= self.max_packet_size && segment.min(frame.len()) <= self.max_plain
            }
            _ => false,
        };
        if fits { Ok(None) } else { Err(TOO_BIG) }
    }

    /// Handles a write that has completed: its frame is free again.
    pub(crate) fn write_done(&mut self, done: Completion) {
        self.writing -= 1;
        let (user_data, result, frame) = done.into_parts();
        match result {
            Ok(len) => {
                self.counts.packets_written += 1;
                self.counts.bytes_written += len as u64;
            }
            Err(EntryError::Cancelled) => self.counts.count_drop(NOT_WRITTEN),
            Err(EntryError::Device(Status::Os(libc::EIO))) if self.to_tap => {
                self.counts.count_drop("write failed: the link of the TAP is down");
            }
            Err(error) => self.counts.count_drop(&format!("write failed: {error}")),
        }
        if let Some(frame) = frame {
            self.recycle(user_data, frame);
        }
    }

    fn recycle(&mut self, user_data: u64, frame: Frame) {
        match (user_data, &mut self.merging) {
            (SEGMENT, _) => self.blank.push(frame),
            (MERGED, Some(merging)) => self.spare.extend(merging.reuse(frame)),
            _ => self.spare.push(frame),
        }
    }

    /// Writes the waiting packets as far as the other end has credits; the rest keeps waiting.
    /// Returns the number of writes.
    pub(crate) fn write(&mut self, to: &mut SubmissionHalf<'_>) -> Result<usize, Error> {
        self.end_batch();
        let mut written = 0;
        while !self.waiting.is_empty() {
            match to.submit_writes(std::iter::from_fn(|| self.next_frame())) {
                Ok(n) => {
                    written += n;
                    break;
                }
                Err(BatchError { kind: SubmitErrorKind::Closed(closed), accepted, .. }) => {
                    self.writing += written + accepted;
                    return Err(closed.into());
                }
                Err(BatchError { kind, frame, accepted }) => {
                    written += accepted;
                    self.counts.count_drop(&format!("refused: {kind}"));
                    self.recycle(self.last, frame);
                }
            }
        }
        self.writing += written;
        Ok(written)
    }

    /// The next frame for the other end. `None` if nothing waits, or if no frame is free for the
    /// next segment.
    fn next_frame(&mut self) -> Option<(Frame, u64)> {
        self.last = WHOLE;
        match self.waiting.front()? {
            Waiting::Packet(_) => {}
            Waiting::Merged(_) => self.last = MERGED,
            Waiting::Large(large, header) => {
                let mut frame = self.blank.pop()?;
                frame.reset();
                let partial = matches!(
                    software::left_by(&self.offloads, header),
                    Left::Segments { partial: true }
                );
                let cut = Segments::new(header, large).and_then(|segments| {
                    let room = frame.buffer_mut();
                    let len = match partial {
                        true => segments.write_partial(self.segment, room)?,
                        false => segments.write(self.segment, room)?,
                    };
                    Ok((len, segments))
                });
                let (len, segments) = cut.expect("it was tried when the packet came");
                frame.set_len(len).expect("it was written there");
                if partial {
                    let header = segments.partial_header();
                    frame.set_offload(&header).expect("the pool's headroom has room for it");
                }
                self.segment += 1;
                if self.segment == segments.count() {
                    self.segment = 0;
                    if let Some(Waiting::Large(large, _)) = self.waiting.pop_front() {
                        self.spare.push(large);
                    }
                }
                self.last = SEGMENT;
                return Some((frame, SEGMENT));
            }
        }
        match self.waiting.pop_front() {
            Some(Waiting::Packet(frame) | Waiting::Merged(frame)) => Some((frame, self.last)),
            _ => None,
        }
    }

    /// Posts the free frames for reading, as far as there are credits. Returns their number.
    pub(crate) fn post(&mut self, from: &mut SubmissionHalf<'_>) -> Result<usize, Error> {
        if self.spare.is_empty() {
            return Ok(0);
        }
        let frames = std::iter::from_fn(|| self.spare.pop().map(|frame| (frame, READ)));
        Ok(from.submit_reads(frames)?)
    }

    /// Counts what still waits as dropped. Called when the bridge has ended.
    pub(crate) fn abandon(&mut self) {
        self.end_batch();
        let lost = self.waiting.len() + self.writing;
        for _ in 0..lost {
            self.counts.count_drop(NOT_WRITTEN);
        }
        self.waiting.clear();
        self.writing = 0;
    }
}

/// Lets a packet wait that comes out of the merging.
fn wait(waiting: &mut VecDeque<Waiting>, counts: &mut Counts, packet: Outgoing<Frame>) {
    let Outgoing { buffer: mut frame, header, packets, .. } = packet;
    // It may be in another frame than the one that it came in.
    frame.set_offload(&header).expect("the pool's headroom has room for it");
    if packets > 1 {
        counts.segments_merged += packets as u64;
        counts.packets_merged += 1;
        waiting.push_back(Waiting::Merged(frame));
    } else {
        waiting.push_back(Waiting::Packet(frame));
    }
}
