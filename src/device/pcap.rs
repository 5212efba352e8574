//! A wrapper that records what goes over any device, both ways, as a pcapng file.
//!
//! ```no_run
//! use vmring::device::pcap::Capture;
//! use vmring::{Embedded, Interface};
//!
//! let capture = Capture::create("run.pcapng")?;
//! let driver = capture.wrap("guest0", Embedded::network("lab"));
//! let interface = Interface::builder().device(driver).start()?;
//! // ... rings, packets ...
//! drop(interface);
//! capture.finish()?;
//! # Ok::<(), vmring::Error>(())
//! ```
//!
//! Recording writes to the file on the poller's thread, one block per packet, buffered.
//!
//! And the other way: [`Replay`], a device that reads out of such a file.

mod error;
mod replay;

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::PcapNgBlock;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};

use crate::config::{Direction, InterfaceConfig, InterfaceInfo};
use crate::device::context::{CompletedSlot, PollContext};
use crate::device::pcap::error::into_io;
use crate::device::relay::{Relay, delegate_device};
use crate::device::seam::{Device, Driver, Progress, Queue, Wake};
use crate::error::{Error, Status};
use crate::sys::lock;

pub use replay::Replay;

/// `epb_flags` bits 0-1 (draft-ietf-opsawg-pcapng, section 4.3.1): inbound is 1, outbound 2; here
/// as seen from the guest.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
/// `if_tsresol`: timestamps count nanoseconds (10^-9).
const NANOSECONDS: u8 = 9;

/// A pcapng file to which any number of interfaces record.
#[derive(Clone)]
pub struct Capture {
    file: Arc<Mutex<Recorder>>,
}

struct Recorder {
    writer: PcapNgWriter<BufWriter<Box<dyn Write + Send>>>,
    interfaces: u32,
    packets: u64,
    /// The first error; nothing is written after it.
    failed: Option<io::Error>,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("packets", &self.packets()).finish_non_exhaustive()
    }
}

impl Capture {
    /// Creates the file, or empties it, and writes the capture's header.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system refuses either; then a file that was created stays, empty.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, Error> {
        let file = File::create(path).map_err(Error::io("creating the capture file"))?;
        Self::to_writer(file)
    }

    /// Records to anything that takes bytes. The header is written out now, so that a writer which
    /// takes nothing is found before a packet is on its way.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the header cannot be written.
    pub fn to_writer(writer: impl Write + Send + 'static) -> Result<Self, Error> {
        let writer: Box<dyn Write + Send> = Box::new(writer);
        let mut writer = PcapNgWriter::new(BufWriter::with_capacity(1 << 20, writer))
            .map_err(|error| Error::io("writing the capture")(into_io(error)))?;
        writer.get_mut().flush().map_err(Error::io("writing the capture"))?;
        let recorder = Recorder { writer, interfaces: 0, packets: 0, failed: None };
        Ok(Self { file: Arc::new(Mutex::new(recorder)) })
    }

    /// A driver that starts `inner` and records its packets under `name`.
    pub fn wrap(&self, name: impl Into<String>, inner: impl Driver) -> Recorded {
        Recorded { capture: self.clone(), name: name.into(), inner: Box::new(inner) }
    }

    /// Packets recorded so far.
    pub fn packets(&self) -> u64 {
        lock(&self.file).packets
    }

    /// Writes out what is buffered. Queues that are closed have done so already.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the first error there was, as when the disk is full: packets went on
    /// unrecorded after it.
    pub fn finish(&self) -> Result<(), Error> {
        let mut recorder = lock(&self.file);
        let flushed = recorder.writer.get_mut().flush();
        // The first error stays: what was recorded behind a gap would deceive.
        let failed = recorder.failed.as_ref();
        failed
            .map_or(flushed, |error| Err(io::Error::new(error.kind(), error.to_string())))
            .map_err(Error::io("writing the capture"))
    }
}

impl Recorder {
    fn block<'a>(&mut self, block: impl PcapNgBlock<'a>) {
        if self.failed.is_none()
            && let Err(error) = self.writer.write_pcapng_block(block)
        {
            let error = into_io(error);
            tracing::error!(%error, "the capture failed; no further packets are recorded");
            self.failed = Some(error);
        }
    }

    fn describe(&mut self, name: &str, info: &InterfaceInfo) -> u32 {
        let mac = info.mac.into_array();
        self.block(InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                InterfaceDescriptionOption::IfMacAddr(Cow::Borrowed(&mac)),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        });
        self.interfaces += 1;
        self.interfaces - 1
    }

    fn packet(&mut self, interface_id: u32, direction: u32, packet: &[u8]) {
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.block(EnhancedPacketBlock {
            interface_id,
            timestamp,
            original_len: packet.len() as u32,
            data: Cow::Borrowed(packet),
            options: vec![EnhancedPacketOption::Flags(direction)],
        });
        self.packets += u64::from(self.failed.is_none());
    }
}

/// A driver that records; see [`Capture::wrap`].
pub struct Recorded {
    capture: Capture,
    name: String,
    inner: Box<dyn Driver>,
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorded").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Driver for Recorded {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let device = self.inner.start(config)?;
        let interface = lock(&self.capture.file).describe(&self.name, &device.info());
        Ok(Arc::new(RecordedDevice { device, capture: self.capture, interface }))
    }
}

struct RecordedDevice {
    device: Arc<dyn Device>,
    capture: Capture,
    interface: u32,
}

delegate_device!(RecordedDevice {
    fn queue(&self, direction: Direction, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let inner = self.device.queue(direction, wake)?;
        let (capture, interface) = (self.capture.clone(), self.interface);
        Ok(Box::new(RecordedQueue { inner, relay: Relay::default(), capture, interface }))
    }
});

struct RecordedQueue {
    inner: Box<dyn Queue>,
    relay: Relay,
    capture: Capture,
    interface: u32,
}

impl RecordedQueue {
    /// Records what the inner queue has completed and passes it on.
    fn pass_on(&mut self, cx: &mut PollContext<'_>) {
        let mut recorder = None;
        while let Some(done) = self.relay.next_done() {
            if done.result().is_ok() {
                recorder.get_or_insert_with(|| lock(&self.capture.file)).packet(
                    self.interface,
                    direction(&done),
                    done.slot().packet(),
                );
            }
            cx.forward(done);
        }
    }
}

fn direction(done: &CompletedSlot) -> u32 {
    if done.slot().is_read() { INBOUND } else { OUTBOUND }
}

impl Queue for RecordedQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let result = self.relay.pass_through(&mut *self.inner, cx);
        self.pass_on(cx);
        result
    }

    fn bind_to_thread(&mut self) {
        self.inner.bind_to_thread();
    }

    fn arm(&mut self) -> bool {
        self.inner.arm()
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        self.inner.cancel(target)
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let closed = self.relay.close(&mut *self.inner);
        self.pass_on(cx);
        if closed && let Err(error) = lock(&self.capture.file).writer.get_mut().flush() {
            tracing::error!(%error, "the capture could not be flushed");
        }
        closed
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }
}
