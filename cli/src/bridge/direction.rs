//! One way over the bridge: what becomes of a packet between its read and its write.

use std::collections::{BTreeMap, VecDeque};

use vmring::device::{Capabilities, Offloads};
use vmring::software::{self, Left, Segments};
use vmring::{
    BatchError, Checksum, Completion, EntryError, Error, Frame, Gso, OffloadHeader, Pool,
    SubmissionHalf, SubmitErrorKind,
};

/// `user_data` of reads, and of writes: a frame as it was read, and one that holds a segment.
pub(crate) const READ: u64 = 0;
const WHOLE: u64 = 1;
const SEGMENT: u64 = 2;

const ETHERNET_AND_VLAN: u32 = 18;

/// See the [module](self).
///
/// Its frames are its own: they are posted for reading at one end, wait here, are written at the
/// other, and come back. So however slow the other end is, this way holds no more than these, and
/// takes none from the way back.
#[derive(Debug)]
pub(crate) struct BridgeDirection {
    /// What the other end does by itself, and the longest frame it takes that is not to be cut.
    offloads: Offloads,
    max_packet_size: usize,
    max_plain: usize,
    /// Whether what it does not do is done here.
    software: bool,
    /// To be posted for reading.
    spare: Vec<Frame>,
    /// For segments.
    blank: Vec<Frame>,
    /// Packets for the other end, oldest first.
    waiting: VecDeque<Waiting>,
    /// The next segment of the first.
    segment: usize,
    /// `user_data` of what went out last.
    last: u64,
    /// Writes that have not completed.
    pub(crate) writing: usize,
    pub(crate) counts: Counts,
}

#[derive(Debug)]
enum Waiting {
    Packet(Frame),
    /// To be cut, as its header says.
    Large(Frame, OffloadHeader),
}

/// What has come and gone.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) packets_read: u64,
    pub(crate) bytes_read: u64,
    pub(crate) packets_written: u64,
    pub(crate) bytes_written: u64,
    /// Completed in software, of whole packets.
    pub(crate) checksums: u64,
    /// Packets cut in software.
    pub(crate) packets_cut: u64,
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
    /// Towards an end that can do `caps`; takes `reads` frames from the pool for reading and as many
    /// to be under way, and `segments` more.
    pub(crate) fn new(
        caps: &Capabilities,
        software: bool,
        pool: &Pool,
        reads: usize,
        segments: usize,
    ) -> Self {
        let offloads = caps.offloads;
        // Where large packets are taken to be cut, the others must still keep to the MTU.
        let cuts = offloads.tso4 || offloads.tso6 || offloads.uso;
        let max_plain = match cuts {
            true => caps.max_packet_size.min(caps.mtu + ETHERNET_AND_VLAN),
            false => caps.max_packet_size,
        };
        let frames = |n| std::iter::from_fn(|| pool.alloc()).take(n).collect();
        Self {
            offloads,
            max_packet_size: caps.max_packet_size as usize,
            max_plain: max_plain as usize,
            software,
            spare: frames(2 * reads),
            blank: frames(segments),
            waiting: VecDeque::with_capacity(2 * reads),
            segment: 0,
            last: WHOLE,
            writing: 0,
            counts: Counts::default(),
        }
    }

    /// Whether a packet waits.
    pub(crate) fn is_busy(&self) -> bool {
        self.writing > 0 || !self.waiting.is_empty()
    }

    /// A read is over.
    pub(crate) fn read_done(&mut self, done: Completion) {
        let Some(mut frame) = done.frame() else { return };
        if done.result.is_err() {
            return self.spare.push(frame);
        }
        self.counts.packets_read += 1;
        self.counts.bytes_read += frame.len() as u64;
        match self.prepare(&mut frame) {
            Ok(None) => self.waiting.push_back(Waiting::Packet(frame)),
            Ok(Some(header)) => self.waiting.push_back(Waiting::Large(frame, header)),
            Err(why) => {
                self.counts.count_drop(why);
                self.spare.push(frame);
            }
        }
    }

    /// Makes the packet one that the other end takes, or says why that cannot be. The header of one
    /// that is to be cut.
    fn prepare(&mut self, frame: &mut Frame) -> Result<Option<OffloadHeader>, &'static str> {
        const BAD: &str = "bad offload header";
        const TOO_BIG: &str = "too big for the other end";
        const UNDONE: &str = "offload that the other end does not do";
        let header = match frame.forward_offload() {
            Ok(true) => frame.offload().map_err(|_| BAD)?.unwrap_or_default(),
            Ok(false) => OffloadHeader::NONE,
            Err(_) => return Err(BAD),
        };
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
        }
        let fits = match (header.gso, header.checksum) {
            (Gso::None, _) => frame.len() <= self.max_plain,
            // What its segments will have at least: a header's fixed part and their payload.
            (gso, Checksum::Partial { start, .. }) => {
                let fixed = if gso.is_tcp() { 20 } else { 8 };
                let segment = usize::from(start) + fixed + usize::from(header.segment_size);
                frame.len() <= self.max_packet_size && segment.min(frame.len()) <= self.max_plain
            }
            _ => false,
        };
        if fits { Ok(None) } else { Err(TOO_BIG) }
    }

    /// A write is over: its frame is free.
    pub(crate) fn write_done(&mut self, done: Completion) {
        self.writing -= 1;
        let (user_data, result, frame) = done.into_parts();
        match result {
            Ok(len) => {
                self.counts.packets_written += 1;
                self.counts.bytes_written += len as u64;
            }
            Err(EntryError::Cancelled) => self.counts.count_drop("not written at the end"),
            Err(error) => self.counts.count_drop(&format!("write failed: {error}")),
        }
        if let Some(frame) = frame {
            self.recycle(user_data, frame);
        }
    }

    fn recycle(&mut self, user_data: u64, frame: Frame) {
        if user_data == SEGMENT { self.blank.push(frame) } else { self.spare.push(frame) }
    }

    /// Writes what waits, as far as the other end has credits for it; the rest goes on waiting.
    /// Returns how many.
    pub(crate) fn write(&mut self, to: &mut SubmissionHalf<'_>) -> Result<usize, Error> {
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

    /// The next frame for the other end. `None` if nothing waits, or no frame is free for the next
    /// segment.
    fn next_frame(&mut self) -> Option<(Frame, u64)> {
        self.last = WHOLE;
        match self.waiting.front()? {
            Waiting::Packet(_) => {}
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
            Some(Waiting::Packet(frame)) => Some((frame, WHOLE)),
            _ => None,
        }
    }

    /// Posts the frames that are free for reading, as far as there are credits. Returns how many.
    pub(crate) fn post(&mut self, from: &mut SubmissionHalf<'_>) -> Result<usize, Error> {
        if self.spare.is_empty() {
            return Ok(0);
        }
        let frames = std::iter::from_fn(|| self.spare.pop().map(|frame| (frame, READ)));
        Ok(from.submit_reads(frames)?)
    }

    /// The bridge has ended: what waits is lost, and counted.
    pub(crate) fn abandon(&mut self) {
        let lost = self.waiting.len() + self.writing;
        for _ in 0..lost {
            self.counts.count_drop("not written at the end");
        }
        self.waiting.clear();
        self.writing = 0;
    }
}
