//! A wrapper that records the packets of any device; see [`Capture`].

use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::format::{
    BYTE_ORDER_MAGIC, END_OF_OPTIONS, ENHANCED_PACKET, EPB_DROPCOUNT, EPB_FLAGS, ETHERNET,
    IF_MACADDR, IF_NAME, IF_TSRESOL, INTERFACE_DESCRIPTION, SECTION_HEADER,
};
use super::spool::{Spool, Stage};
use crate::config::{InterfaceConfig, InterfaceInfo};
use crate::device::context::{CompletedSlot, PollContext};
use crate::device::relay::{Relay, delegate_device};
use crate::device::seam::{Device, Driver, Progress, Queue, QueueConfig, Wake};
use crate::error::{ConfigError, Error, Status};
use crate::sys::set_blocking;

/// Bits 0 and 1 of `epb_flags` (draft-ietf-opsawg-pcapng, section 4.3.1): 1 is inbound, 2 is
/// outbound. Here the direction is that seen from the guest.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;
/// The value of `if_tsresol` for timestamps in nanoseconds (10^-9 seconds).
const NANOSECONDS: u8 = 9;

/// The most bytes that a packet's block has besides the packet: its fields, the padding, the
/// options.
const BLOCK_LEN_MAX: usize = 64;

/// A pcapng file in which any number of interfaces are recorded. Clones are handles to one file.
///
/// A thread of the capture's own writes the file, so that a slow disk, or a program that reads a
/// pipe slowly, does not hold up the network. A packet is written at the latest about 100 ms after
/// it came, so it can be watched live and is in the file even if the process is killed. The thread
/// ends with the last handle, which waits up to 5 seconds for it.
///
/// 4 MiB may wait to be written. If there is no space for a packet, the poller's thread waits for
/// it up to a second. After that it does not wait again: packets without space are left out of the
/// recording until something was written, [`lost`](Self::lost) counts them, and the next packet of
/// their interface has their number in the file (`epb_dropcount`).
#[derive(Clone)]
pub struct Capture {
    spool: Arc<Spool<Blocks>>,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("packets", &self.packets()).finish_non_exhaustive()
    }
}

impl Capture {
    /// Creates the file, or empties it if it exists, and writes the capture's header.
    ///
    /// It may be a named pipe, for example one that Wireshark reads (`wireshark -k -i PIPE`). The
    /// reader must be there first. If the reader goes away, the capture has failed, and the network
    /// goes on.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be created or the header cannot be written. In the second
    /// case an empty file stays behind. [`ConfigError::Invalid`] if it is a pipe that nobody reads.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, Error> {
        const CREATING: &str = "creating the capture file";
        let path = path.as_ref();
        let mut options = File::options();
        // Without this flag, opening a pipe waits for a reader, and nothing could interrupt that.
        options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(|error| {
            let is_pipe = fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo());
            if is_pipe && error.raw_os_error() == Some(libc::ENXIO) {
                let sentence = "no program reads the pipe; start the reader first";
                return ConfigError::Invalid(sentence.to_owned()).into();
            }
            Error::io(CREATING)(error)
        })?;
        set_blocking(file.as_fd()).map_err(Error::io(CREATING))?;
        Self::to_writer(file)
    }

    /// Records to any writer, on a thread of the capture's own. The header is written and flushed
    /// now, so that a writer that takes nothing is found before the first packet comes. Each later
    /// `write` is followed by a `flush`, and begins and ends with a whole block.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the header cannot be written, or not within 5 seconds.
    pub fn to_writer(writer: impl Write + Send + 'static) -> Result<Self, Error> {
        let failed = |error| Error::io("writing the capture")(error);
        let spool = Spool::start(Blocks::new(), Box::new(writer)).map_err(failed)?;
        spool.finish().map_err(failed)?;
        Ok(Self { spool: Arc::new(spool) })
    }

    /// Returns a driver that starts `inner` and records its packets. `name` is the interface's name
    /// in the file.
    pub fn wrap(&self, name: impl Into<String>, inner: impl Driver) -> Recorded {
        Recorded { capture: self.clone(), name: name.into(), inner: Box::new(inner) }
    }

    /// Returns how many packets were recorded so far.
    pub fn packets(&self) -> u64 {
        self.spool.lock().packets()
    }

    /// Returns how many packets were left out of the recording, because the writer was too slow. No
    /// packet on the wire was lost by that.
    pub fn lost(&self) -> u64 {
        self.spool.lock().lost
    }

    /// Waits until everything is written. A queue that is closed has done this already, for up to a
    /// second.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the first error since the capture was created, for example because the
    /// disk is full or the reader of a pipe is gone. Packets that came after that error are not in
    /// the file. If nothing is written for 5 seconds, its source is
    /// [`TimedOut`](std::io::ErrorKind::TimedOut).
    pub fn finish(&self) -> Result<(), Error> {
        self.spool.finish().map_err(Error::io("writing the capture"))
    }

    fn describe(&self, name: &str, info: &InterfaceInfo) -> u32 {
        let mut state = self.spool.lock();
        let number = state.stage.describe(name, info);
        self.spool.appended(&mut state);
        number
    }
}

/// The blocks that wait to be written, in the byte order of this machine.
#[derive(Debug)]
struct Blocks {
    bytes: Vec<u8>,
    /// For each interface, how many of its packets were left out since the last one that was not.
    lost: Vec<u64>,
}

impl Blocks {
    /// A section header (draft-ietf-opsawg-pcapng, section 4.1).
    fn new() -> Self {
        let mut this = Self { bytes: Vec::new(), lost: Vec::new() };
        this.block(SECTION_HEADER, |body| {
            body.extend(BYTE_ORDER_MAGIC.to_ne_bytes());
            // Version 1.0.
            body.extend(1_u16.to_ne_bytes());
            body.extend(0_u16.to_ne_bytes());
            // The section's length is not known.
            body.extend((-1_i64).to_ne_bytes());
        });
        this
    }

    /// Appends a block (section 3.1) whose body `append` appends.
    fn block(&mut self, kind: u32, append: impl FnOnce(&mut Vec<u8>)) {
        let begin = self.bytes.len();
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend([0; 4]);
        append(&mut self.bytes);
        pad(&mut self.bytes);
        let len = ((self.bytes.len() - begin + 4) as u32).to_ne_bytes();
        self.bytes.extend(len);
        self.bytes[begin + 4..begin + 8].copy_from_slice(&len);
    }

    /// Appends an interface description (section 4.2), and returns the interface's number.
    fn describe(&mut self, name: &str, info: &InterfaceInfo) -> u32 {
        self.block(INTERFACE_DESCRIPTION, |body| {
            body.extend(ETHERNET.to_ne_bytes());
            body.extend([0; 2]);
            // The snapshot length: no limit.
            body.extend(0_u32.to_ne_bytes());
            option(body, IF_NAME, name.as_bytes());
            option(body, IF_MACADDR, &info.mac.into_array());
            option(body, IF_TSRESOL, &[NANOSECONDS]);
            option(body, END_OF_OPTIONS, &[]);
        });
        self.lost.push(0);
        self.lost.len() as u32 - 1
    }

    /// Appends an enhanced packet block (section 4.3).
    fn packet(&mut self, interface: u32, direction: u32, packet: &[u8]) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The nanoseconds of this number last until the year 2554.
        let time = time.as_nanos() as u64;
        let lost = mem::take(&mut self.lost[interface as usize]);
        self.block(ENHANCED_PACKET, |body| {
            let len = packet.len() as u32;
            for word in [interface, (time >> 32) as u32, time as u32, len, len] {
                body.extend(word.to_ne_bytes());
            }
            body.extend_from_slice(packet);
            pad(body);
            option(body, EPB_FLAGS, &direction.to_ne_bytes());
            if lost > 0 {
                option(body, EPB_DROPCOUNT, &lost.to_ne_bytes());
            }
            option(body, END_OF_OPTIONS, &[]);
        });
    }
}

/// Appends an option (section 3.5), with its padding. A value that is too long is cut off.
fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(u16::MAX as usize)];
    body.extend(code.to_ne_bytes());
    body.extend((value.len() as u16).to_ne_bytes());
    body.extend_from_slice(value);
    pad(body);
}

/// Appends zeros up to a multiple of four bytes. Every block begins at one, so the body does, too.
fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

impl Stage for Blocks {
    fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    fn whole_packets(mut bytes: &[u8]) -> u64 {
        let word = |bytes: &[u8], at| {
            bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes)
        };
        let mut packets = 0;
        while let (Some(kind), Some(len)) = (word(bytes, 0), word(bytes, 4))
            && let Some(rest) = bytes.get(len as usize..)
        {
            packets += u64::from(kind == ENHANCED_PACKET);
            bytes = rest;
        }
        packets
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
        let interface = self.capture.describe(&self.name, &device.info());
        Ok(Arc::new(RecordedDevice { device, capture: self.capture, interface }))
    }
}

struct RecordedDevice {
    device: Arc<dyn Device>,
    capture: Capture,
    interface: u32,
}

delegate_device!(RecordedDevice {
    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let inner = self.device.queue(config, wake)?;
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
        let spool = &self.capture.spool;
        let mut locked = None;
        while let Some(done) = self.relay.next_done() {
            if done.result().is_ok() {
                let packet = done.slot().packet().unwrap_or_default();
                let state = locked.unwrap_or_else(|| spool.lock());
                let (mut state, has_space) = spool.has_space(state, packet.len() + BLOCK_LEN_MAX);
                if state.has_failed() {
                    // Nothing is recorded after a failure.
                } else if has_space {
                    state.stage.packet(self.interface, direction(&done), packet);
                    state.staged += 1;
                } else {
                    state.lost += 1;
                    state.stage.lost[self.interface as usize] += 1;
                }
                locked = Some(state);
            }
            cx.forward(done);
        }
        if let Some(mut state) = locked {
            spool.appended(&mut state);
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
        if closed {
            self.capture.spool.flush();
        }
        closed
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }

    fn deadline(&self) -> Option<Instant> {
        self.inner.deadline()
    }

    fn is_sending(&self) -> bool {
        self.inner.is_sending()
    }
}
