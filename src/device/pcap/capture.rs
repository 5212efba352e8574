//! A wrapper that records the packets of any device; see [`Capture`].

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::PcapNgBlock;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};

use super::error::into_io;
use crate::config::{Direction, InterfaceConfig, InterfaceInfo};
use crate::device::context::{CompletedSlot, PollContext};
use crate::device::relay::{Relay, delegate_device};
use crate::device::seam::{Device, Driver, Progress, Queue, Wake};
use crate::error::{Error, Status};
use crate::sync::Mutex;
use crate::sys::lock;

/// Bits 0 and 1 of `epb_flags` (draft-ietf-opsawg-pcapng, section 4.3.1): 1 is inbound, 2 is
/// outbound. Here the direction is that seen from the guest.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
/// The value of `if_tsresol` for timestamps in nanoseconds (10^-9 seconds).
const NANOSECONDS: u8 = 9;

/// A pcapng file in which any number of interfaces are recorded. Clones are handles to one file.
#[derive(Clone)]
pub struct Capture {
    file: Arc<Mutex<Recorder>>,
}

struct Recorder {
    writer: PcapNgWriter<BufWriter<Box<dyn Write + Send>>>,
    interfaces: u32,
    packets: u64,
    /// The first error. Nothing is written after it.
    failed: Option<io::Error>,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("packets", &self.packets()).finish_non_exhaustive()
    }
}

impl Capture {
    /// Creates the file, or empties it if it exists, and writes the capture's header.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be created or the header cannot be written. In the second
    /// case an empty file stays behind.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, Error> {
        let file = File::create(path).map_err(Error::io("creating the capture file"))?;
        Self::to_writer(file)
    }

    /// Records to any writer. The header is written and flushed now, so that a writer that takes
    /// nothing is found before the first packet comes.
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

    /// Returns a driver that starts `inner` and records its packets. `name` is the interface's name
    /// in the file.
    pub fn wrap(&self, name: impl Into<String>, inner: impl Driver) -> Recorded {
        Recorded { capture: self.clone(), name: name.into(), inner: Box::new(inner) }
    }

    /// Returns how many packets were recorded so far.
    pub fn packets(&self) -> u64 {
        lock(&self.file).packets
    }

    /// Flushes the buffer to the file. A queue that is closed has done this already.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the first error since the capture was created, for example because the
    /// disk is full. Packets that came after that error are not in the file.
    pub fn finish(&self) -> Result<(), Error> {
        let mut recorder = lock(&self.file);
        let flushed = recorder.writer.get_mut().flush();
        // The first error stays, because a recording with a gap would mislead.
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

/// A driver whose device is recorded; see [`Capture::wrap`].
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
    /// Records the packets that the inner queue has completed, and completes the slots on the ring.
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

    fn cancel_reads(&mut self) -> u32 {
        self.inner.cancel_reads()
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
