//! A device that reads its packets out of a capture file; see [`Replay`].

use std::fmt;
use std::fs::File;
use std::mem;
use std::path::Path;
use std::sync::Arc;

use vmring_core::view::ETHERNET_HEADER_LEN;

use super::record::{Record, Stop, Unfit};
use super::source::{Source, note, open_file};
use crate::config::{InterfaceConfig, InterfaceInfo};
use crate::device::common::{mac_of, no_offloads};
use crate::device::context::PollContext;
use crate::device::seam::{Capabilities, Device, Driver, Progress, Queue, QueueConfig, Wake};
use crate::error::{ConfigError, Error, Status};
use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::sys::lock;

/// A driver whose device reads the packets of a capture file (pcap or pcapng), as fast as reads are
/// posted. It takes writes and discards them.
///
/// ```no_run
/// use vmring::Interface;
/// use vmring::device::pcap::Replay;
///
/// let replay = Replay::open("run.pcapng")?;
/// let interface = Interface::builder().device(replay.clone()).start()?;
/// // ... a ring, reads, packets ...
/// assert_eq!(replay.left(), 0, "all of them");
/// # Ok::<(), vmring::Error>(())
/// ```
///
/// Every whole Ethernet packet is replayed, in the order of the file, whether its interface had
/// received or sent it. A frame check sequence is cut off, because a device adds its own.
/// Timestamps are not looked at. What cannot be replayed is left out and counted by its reason in
/// [`Interface::drops`](crate::Interface::drops): packets that were recorded incompletely, packets
/// of more than 65,549 bytes, packets of an interface that is not Ethernet or that the file does
/// not describe, and records that contradict themselves. A file that is cut off or damaged is
/// replayed up to there, and [`note`](Self::note) says so.
///
/// It reads pcap in either byte order, with timestamps in microseconds or nanoseconds, in the
/// versions 2.0 to 2.4, and in the modified form with the magic number `0xa1b2cd34`; and pcapng of
/// version 1, with any number of sections. Blocks and options that it does not know are skipped.
///
/// The interface's `max_packet_size` is at least the length of the file's longest packet. Clones
/// are handles to one replay, which can be started once.
///
/// The poller's thread reads the file.
#[derive(Clone)]
pub struct Replay {
    state: Arc<State>,
}

struct State {
    /// The number of packets that can be replayed, and the length of the longest.
    packets: u64,
    len_max: usize,
    note: Option<String>,
    /// How many of them have not been read yet.
    left: AtomicU64,
    /// Packets that were left out, by reason.
    unfit: [AtomicU64; Unfit::ALL.len()],
    discarded: AtomicU64,
    file: Mutex<Reading>,
}

enum Reading {
    /// There is no file.
    Nothing,
    /// The file, and how many of its bytes are read.
    Ready(File, u64),
    Running(Source),
    /// No packet is left to read.
    Ended,
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl Replay {
    /// Opens a capture file, which must be a regular file. All of it is read once, so that its
    /// packets are counted and a damage in it is known now. What is appended to it later is not
    /// replayed.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read. [`ConfigError::Invalid`] with a sentence if it is
    /// not a regular file, if it begins like no pcap or pcapng file, or if it has no Ethernet
    /// interface. A pipe is refused at once, without waiting for its writer.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let failed = |error| Error::io("reading the capture")(error);
        let file = open_file(path.as_ref())?;
        let len = file.metadata().map_err(failed)?.len();
        let mut source = Source::open(file.try_clone().map_err(failed)?, len)?;
        let (mut packets, mut len_max) = (0, 0);
        let stop = loop {
            match source.next() {
                Ok(Record::Packet(packet)) => {
                    packets += 1;
                    len_max = len_max.max(packet.len());
                }
                Ok(Record::Unfit(_)) => {}
                Err(Stop::Io(error)) => return Err(failed(error)),
                Err(stop) => break stop,
            }
        };
        source.check_link()?;
        Ok(Self::new(Reading::Ready(file, len), packets, len_max, note(&stop, source.at())))
    }

    /// Returns a driver whose device has no packets. Wrapped in a [`Capture`](super::Capture), it
    /// records what is written.
    pub fn nothing() -> Self {
        Self::new(Reading::Nothing, 0, 0, None)
    }

    fn new(file: Reading, packets: u64, len_max: usize, note: Option<String>) -> Self {
        let state = State {
            packets,
            len_max,
            note,
            left: AtomicU64::new(packets),
            unfit: Unfit::ALL.map(|_| AtomicU64::new(0)),
            discarded: AtomicU64::new(0),
            file: Mutex::new(file),
        };
        Self { state: Arc::new(state) }
    }

    /// Returns how many packets of the file can be replayed.
    pub fn packets(&self) -> u64 {
        self.state.packets
    }

    /// Returns how many of those packets have not been read yet.
    pub fn left(&self) -> u64 {
        self.state.left.load(Ordering::Relaxed)
    }

    /// Returns a sentence that says where the file is cut off or damaged. `None` if it ends behind
    /// a whole record.
    pub fn note(&self) -> Option<&str> {
        self.state.note.as_deref()
    }
}

impl Driver for Replay {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        no_offloads(config, "pcap")?;
        let mtu = config.mtu.unwrap_or(1500);
        let longest = self.state.len_max as u32;
        if !(1280..=65_521).contains(&mtu) {
            let sentence = format!("a replay's MTU must be 1280 to 65,521 bytes, not {mtu}");
            return Err(ConfigError::Invalid(sentence).into());
        }
        let mut file = lock(&self.state.file);
        *file = match mem::replace(&mut *file, Reading::Ended) {
            Reading::Nothing => Reading::Nothing,
            Reading::Ready(file, len) => Reading::Running(Source::open(file, len)?),
            running => {
                *file = running;
                let sentence =
                    "a replay runs once; to run it again, open the file again".to_owned();
                return Err(ConfigError::Invalid(sentence).into());
            }
        };
        drop(file);
        let info = InterfaceInfo::new(
            config,
            mac_of(config),
            mtu,
            longest.max(mtu + ETHERNET_HEADER_LEN as u32),
        );
        Ok(Arc::new(ReplayDevice { info, state: self.state }))
    }
}

struct ReplayDevice {
    info: InterfaceInfo,
    state: Arc<State>,
}

impl Device for ReplayDevice {
    fn name(&self) -> &str {
        "pcap"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(self.info.mtu, self.info.max_packet_size);
        caps.writing_rings = usize::MAX;
        caps
    }

    fn queue(&self, _: QueueConfig, _: Wake) -> Result<Box<dyn Queue>, Error> {
        // The queue has no use for the wake: everything that can be read is there from the start.
        Ok(Box::new(ReplayQueue { state: self.state.clone() }))
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        let count = |(unfit, name): (Unfit, _)| {
            (name, self.state.unfit[unfit as usize].load(Ordering::Relaxed))
        };
        Unfit::ALL.into_iter().map(count).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let discarded = self.state.discarded.load(Ordering::Relaxed);
        vec![("left", self.state.left.load(Ordering::Relaxed)), ("discarded", discarded)]
    }
}

struct ReplayQueue {
    state: Arc<State>,
}

impl ReplayQueue {
    fn read(&self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let mut file = lock(&self.state.file);
        // After the last packet that can be replayed, read on to the end of the file: packets that
        // are left out there count as dropped, too.
        while let Reading::Running(source) = &mut *file
            && (cx.reads() > 0 || self.state.left.load(Ordering::Relaxed) == 0)
        {
            match source.next() {
                Ok(Record::Packet(bytes)) => self.replay(cx, bytes),
                Ok(Record::Unfit(unfit)) => add_one(&self.state.unfit[unfit as usize]),
                Err(stop) => {
                    if let Stop::Cut { packet: true } = stop {
                        add_one(&self.state.unfit[Unfit::Cut as usize]);
                    }
                    self.state.left.store(0, Ordering::Relaxed);
                    *file = Reading::Ended;
                    if let Stop::Io(error) = stop {
                        tracing::error!(%error, "the replay failed");
                        return Err(Status::Failure);
                    }
                }
            }
        }
        let running = matches!(*file, Reading::Running(_));
        Ok(if running { Progress::More } else { Progress::Idle })
    }

    fn replay(&self, cx: &mut PollContext<'_>, packet: &[u8]) {
        let Some(mut slot) = cx.take_read() else {
            // Somebody has changed the file since it was counted: now it has more packets.
            return add_one(&self.state.unfit[Unfit::Malformed as usize]);
        };
        // `max_packet_size` is at least the longest packet's length, so the packet fits, unless the
        // file was changed. In that case `complete_read` refuses the length.
        let buffer = slot.buffer_mut().unwrap_or_default();
        let n = packet.len().min(buffer.len());
        buffer[..n].copy_from_slice(&packet[..n]);
        cx.complete_read(slot, packet.len());
        let left = &self.state.left;
        left.store(left.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
    }
}

fn add_one(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

impl Queue for ReplayQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_write() {
            add_one(&self.state.discarded);
            cx.complete_write(slot);
        }
        self.read(cx)
    }
}
