//! A device that reads its packets out of a capture file; see [`Replay`].

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::{Block, PcapNgReader};
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;

use super::error::into_io;
use crate::config::{Direction, InterfaceConfig, InterfaceInfo};
use crate::device::common::{mac_of, no_offloads};
use crate::device::context::PollContext;
use crate::device::seam::{Capabilities, Device, Driver, Progress, Queue, Wake};
use crate::error::{ConfigError, Error, Status};
use crate::sync::Mutex;
use crate::sys::lock;

/// The first four bytes of a pcapng file. They are the same in either byte order.
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
/// The length of the largest packet that is replayed, in bytes: the largest IP packet and an
/// Ethernet header.
const LEN_MAX: usize = 65_535 + ETHERNET_HEADER_LEN;

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
/// The interface's `max_packet_size` is at least the length of the file's longest packet. Packets
/// that were recorded incompletely, and those of more than 65,549 bytes, are left out and counted
/// in [`Interface::drops`](crate::Interface::drops). All packets of a recorded interface are
/// replayed, both those that it had received and those that it had sent. Clones are handles to one
/// replay, which can be started once.
///
/// The poller's thread reads the file.
#[derive(Clone)]
pub struct Replay {
    state: Arc<State>,
}

struct State {
    path: Option<PathBuf>,
    /// The number of packets that can be replayed, and the length of the longest.
    packets: u64,
    len_max: usize,
    /// How many of them have not been read yet.
    left: AtomicU64,
    truncated: AtomicU64,
    too_big: AtomicU64,
    discarded: AtomicU64,
    /// `None` before the start and after the last packet.
    source: Mutex<Option<Source>>,
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl Replay {
    /// Opens a capture file. The whole file is read once, so that an error in it is found now.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read, or if any part of it is not in a capture's format.
    /// [`ConfigError::Invalid`] if its packets are not Ethernet frames.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let mut source = Source::open(path)?;
        let (mut packets, mut len_max) = (0, 0);
        while let Some(len) = source.next(|packet| packet.fitting().map(<[u8]>::len).ok())? {
            if let Some(len) = len {
                packets += 1;
                len_max = len_max.max(len);
            }
        }
        Ok(Self::new(Some(path.to_owned()), packets, len_max))
    }

    /// Returns a driver whose device has no packets. Wrapped in a [`Capture`](super::Capture), it
    /// records what is written.
    pub fn nothing() -> Self {
        Self::new(None, 0, 0)
    }

    fn new(path: Option<PathBuf>, packets: u64, len_max: usize) -> Self {
        let count = AtomicU64::new;
        let state = State {
            path,
            packets,
            len_max,
            left: count(packets),
            truncated: count(0),
            too_big: count(0),
            discarded: count(0),
            source: Mutex::new(None),
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
        if let Some(path) = &self.state.path {
            let mut source = lock(&self.state.source);
            if source.is_some() || self.left() < self.packets() {
                let sentence =
                    "a replay runs once; to run it again, open the file again".to_owned();
                return Err(ConfigError::Invalid(sentence).into());
            }
            *source = Some(Source::open(path)?);
        }
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

    fn queue(&self, _: Direction, _: Wake) -> Result<Box<dyn Queue>, Error> {
        // The queue has no use for the wake: everything that can be read is there from the start.
        Ok(Box::new(ReplayQueue { state: self.state.clone() }))
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        vec![
            ("recorded incompletely", count(&self.state.truncated)),
            ("too big", count(&self.state.too_big)),
        ]
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
    fn read(&self, cx: &mut PollContext<'_>) -> Result<Progress, Error> {
        let mut source = lock(&self.state.source);
        // After the last packet that can be replayed, read on to the end of the file: packets that
        // are left out there count as dropped, too.
        while let Some(file) = &mut *source
            && (cx.reads() > 0 || self.state.left.load(Ordering::Relaxed) == 0)
        {
            let taken = file.next(|packet| match packet.fitting() {
                Ok(bytes) => {
                    let Some(mut slot) = cx.take_read() else { return };
                    // `max_packet_size` is at least the longest packet's length, so the packet
                    // fits, unless another file has been written there since `open`. In that case
                    // `complete_read` refuses the length.
                    let buffer = slot.buffer_mut();
                    let n = bytes.len().min(buffer.len());
                    buffer[..n].copy_from_slice(&bytes[..n]);
                    cx.complete_read(slot, bytes.len());
                    let left = &self.state.left;
                    left.store(left.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
                }
                Err(Unfit::Truncated) => add_one(&self.state.truncated),
                Err(Unfit::TooBig) => add_one(&self.state.too_big),
            })?;
            if taken.is_none() {
                self.state.left.store(0, Ordering::Relaxed);
                *source = None;
            }
        }
        Ok(if source.is_some() { Progress::More } else { Progress::Idle })
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
        self.read(cx).map_err(|error| {
            tracing::error!(%error, "the replay failed");
            Status::Failure
        })
    }
}

/// A packet of the file.
struct Packet<'a> {
    bytes: &'a [u8],
    /// The packet's length on the wire, in bytes.
    len: usize,
}

/// Why a packet is not replayed.
enum Unfit {
    Truncated,
    TooBig,
}

impl<'a> Packet<'a> {
    /// Removes padding behind the packet. (The reader of simple packet blocks does not remove it.)
    fn new(bytes: &'a [u8], len: u32) -> Self {
        let len = len as usize;
        Self { bytes: &bytes[..bytes.len().min(len)], len }
    }

    fn fitting(&self) -> Result<&'a [u8], Unfit> {
        if self.bytes.len() < self.len {
            Err(Unfit::Truncated)
        } else if self.bytes.len() > LEN_MAX {
            Err(Unfit::TooBig)
        } else {
            Ok(self.bytes)
        }
    }
}

/// A capture file that is being read.
enum Source {
    Pcap(PcapReader<Box<dyn Read + Send>>),
    PcapNg(PcapNgReader<Box<dyn Read + Send>>),
}

const READING: &str = "reading the capture";

fn ethernet(link: DataLink) -> Result<(), Error> {
    if link == DataLink::ETHERNET {
        return Ok(());
    }
    let sentence =
        format!("the capture's link type is {link:?}, but only Ethernet can be replayed");
    Err(ConfigError::Invalid(sentence).into())
}

impl Source {
    fn open(path: &Path) -> Result<Self, Error> {
        let mut file = File::open(path).map_err(Error::io(READING))?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic).map_err(Error::io(READING))?;
        let whole: Box<dyn Read + Send> = Box::new(io::Cursor::new(magic).chain(file));
        let failed = |error| Error::io(READING)(into_io(error));
        if magic == PCAPNG_MAGIC {
            return PcapNgReader::new(whole).map(Source::PcapNg).map_err(failed);
        }
        let reader = PcapReader::new(whole).map_err(failed)?;
        ethernet(reader.header().datalink)?;
        Ok(Source::Pcap(reader))
    }

    /// Calls `f` with the next packet and returns its result. Returns `None` at the end of the
    /// file.
    fn next<T>(&mut self, f: impl FnOnce(Packet<'_>) -> T) -> Result<Option<T>, Error> {
        let failed = |error| Error::io(READING)(into_io(error));
        match self {
            Source::Pcap(reader) => {
                let Some(packet) = reader.next_packet() else { return Ok(None) };
                let packet = packet.map_err(failed)?;
                Ok(Some(f(Packet::new(&packet.data, packet.orig_len))))
            }
            Source::PcapNg(reader) => loop {
                let Some(block) = reader.next_block() else { return Ok(None) };
                let (data, len) = match block.map_err(failed)? {
                    Block::InterfaceDescription(interface) => {
                        ethernet(interface.linktype)?;
                        continue;
                    }
                    Block::EnhancedPacket(packet) => (packet.data, packet.original_len),
                    Block::SimplePacket(packet) => (packet.data, packet.original_len),
                    Block::Packet(packet) => (packet.data, packet.original_len),
                    _ => continue,
                };
                return Ok(Some(f(Packet::new(&data, len))));
            },
        }
    }
}
