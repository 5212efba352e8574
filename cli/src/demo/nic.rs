//! A guest's network card: smoltcp's device over a [`Ring`].
//!
//! Frames are neither copied nor allocated on the way. A packet is parsed where the device wrote
//! it, and built where the device reads it. What the stack receives and sends in one round is
//! submitted in two batches at the end of the round.

use std::collections::{BTreeMap, VecDeque};
use std::iter;
use std::time::{Duration, Instant as SystemInstant};

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ETHERNET_HEADER_LEN, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket,
    UdpPacket,
};
use vmring::device::Capabilities;
use vmring::{
    Checksum as HeaderChecksum, EntryError, Error, Frame, Gso, OffloadHeader, Ring, RingControl,
    RingOp,
};

use super::limits::{LARGE_PACKET, LAST_WRITES_TIMEOUT};

/// Packets that did not arrive, by reason.
pub(crate) type Losses = BTreeMap<String, u64>;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct NetworkCard {
    ring: Ring,
    control: RingControl,
    capabilities: DeviceCapabilities,
    /// What the stack leaves to the device, if it leaves anything.
    offload: Option<LeftToDevice>,
    /// Packets for the stack.
    received: VecDeque<Frame>,
    /// Frames that will be posted for reading.
    to_read: VecDeque<Frame>,
    /// Packets that will be written.
    to_write: VecDeque<Frame>,
    /// Frames in which packets can be built.
    free: Vec<Frame>,
    /// Writes that have not completed.
    writing: usize,
    /// The stack wanted to send, but there was no free frame.
    starved: bool,
    losses: Losses,
}

impl NetworkCard {
    /// Takes over a ring with nothing in flight. Posts `reads` of its frames for reading and keeps
    /// `writes` for sending. If `sends_large`, the stack leaves checksums and segments to the device.
    pub(crate) fn new(ring: Ring, reads: usize, writes: usize, sends_large: bool) -> Self {
        let mut capabilities = capabilities(&ring.capabilities());
        let offload = sends_large.then(|| LeftToDevice { mtu: ring.capabilities().mtu as usize });
        if sends_large {
            capabilities.max_transmission_unit = LARGE_PACKET as usize + ETHERNET_HEADER_LEN;
            capabilities.checksum.tcp = Checksum::None;
            capabilities.checksum.udp = Checksum::None;
        }
        let frames = |n| iter::from_fn(|| ring.alloc()).take(n);
        let to_read = frames(reads).collect();
        let free = frames(writes).collect();
        Self {
            capabilities,
            offload,
            received: VecDeque::with_capacity(reads),
            to_read,
            to_write: VecDeque::with_capacity(writes),
            free,
            writing: 0,
            starved: false,
            losses: Losses::new(),
            control: ring.control(),
            ring,
        }
    }

    /// Handles what has completed.
    pub(crate) fn collect(&mut self) {
        for done in self.ring.reap() {
            let (op, result) = (done.op, done.result);
            if op == RingOp::Write {
                self.writing -= 1;
            }
            let Some(frame) = done.take_frame() else { continue };
            match (op, result) {
                (RingOp::Read, Ok(_)) => self.received.push_back(frame),
                (RingOp::Read, Err(error)) => {
                    // A read that fails because the ring has ended was for no packet.
                    if error != EntryError::Cancelled && self.control.closed().is_none() {
                        lose(&mut self.losses, format!("read failed: {error}"), 1);
                    }
                    self.to_read.push_back(frame);
                }
                (_, result) => {
                    match result {
                        Ok(_) => {}
                        Err(EntryError::Cancelled) => {
                            lose(&mut self.losses, NOT_SENT.to_owned(), 1);
                        }
                        Err(error) => lose(&mut self.losses, format!("write failed: {error}"), 1),
                    }
                    self.free.push(frame);
                }
            }
        }
    }

    /// Submits what the stack has sent and what it has received, each in one batch.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        if !self.to_write.is_empty() {
            let frames = iter::from_fn(|| self.to_write.pop_front().map(|frame| (frame, 0)));
            self.writing += self.ring.submit_writes(frames)?;
        }
        if !self.to_read.is_empty() {
            let frames = iter::from_fn(|| self.to_read.pop_front().map(|frame| (frame, 0)));
            self.ring.submit_reads(frames)?;
        }
        Ok(())
    }

    /// Whether packets wait for the stack.
    pub(crate) fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// Returns whether the stack has to wait for frames, and resets that.
    pub(crate) fn take_starved(&mut self) -> bool {
        std::mem::take(&mut self.starved)
    }

    /// Sleeps until a packet arrives, at most `timeout`. A write completes soon and without help,
    /// and only yields a free frame. So it is not worth waking for, unless frames are short.
    pub(crate) fn wait(&mut self, timeout: Duration, for_frames: bool) {
        let completions = if for_frames { 1 } else { self.writing + 1 };
        self.ring.wait(completions, Some(timeout));
    }

    /// Waits a moment for the writes in flight, and closes the ring. Returns the packets that did
    /// not arrive while the card existed, and the failure to close the ring if it failed.
    pub(crate) fn close(mut self) -> (Losses, Result<(), Error>) {
        let deadline = SystemInstant::now() + LAST_WRITES_TIMEOUT;
        while self.writing > 0
            && let left = deadline.saturating_duration_since(SystemInstant::now())
            && !left.is_zero()
        {
            self.ring.wait(1, Some(left));
            self.collect();
        }
        let closed = self.ring.close();
        self.collect();
        let unsent = self.to_write.len() + self.writing;
        lose(&mut self.losses, NOT_SENT.to_owned(), unsent as u64);
        (self.losses, closed)
    }
}

const NOT_SENT: &str = "not sent at the end";

fn lose(losses: &mut Losses, why: String, n: u64) {
    if n > 0 {
        *losses.entry(why).or_default() += n;
    }
}

impl Device for NetworkCard {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = ToSend<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, ToSend<'_>)> {
        if self.free.is_empty() && !self.received.is_empty() {
            // The stack may answer the packet, so the packet has to wait until an answer can be
            // sent.
            self.starved = true;
            return None;
        }
        let frame = self.received.pop_front()?;
        let received = Received { frame, to_read: &mut self.to_read };
        Some((
            received,
            ToSend { free: &mut self.free, to_write: &mut self.to_write, offload: self.offload },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<ToSend<'_>> {
        if self.free.is_empty() {
            self.starved = true;
            return None;
        }
        Some(ToSend { free: &mut self.free, to_write: &mut self.to_write, offload: self.offload })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.capabilities.clone()
    }
}

/// What the stack has to know about the network. It sends no packet longer than the MTU, but
/// accepts the large packets of a device with segmentation offload. Where the device offloads
/// checksums, packets from it have none to check.
fn capabilities(device: &Capabilities) -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ethernet;
    capabilities.max_transmission_unit = device.mtu as usize + ETHERNET_HEADER_LEN;
    if device.offloads.checksum {
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.udp = Checksum::Tx;
    }
    capabilities
}

/// What the stack leaves to the device: the checksums of TCP and UDP, and the segments of TCP.
#[derive(Clone, Copy, Debug)]
struct LeftToDevice {
    /// The longest IP packet of the network. A longer one is to be cut.
    mtu: usize,
}

impl LeftToDevice {
    /// Puts the header of a packet of the stack's in front of it. The stack has written no checksum.
    fn describe(self, frame: &mut Frame) {
        let Some((checksum, gso, headers)) = partial(frame) else { return };
        let large = frame.len() > self.mtu + ETHERNET_HEADER_LEN;
        let header = OffloadHeader {
            checksum,
            gso: if large { gso } else { Gso::None },
            segment_size: if large { (self.mtu + ETHERNET_HEADER_LEN - headers) as u16 } else { 0 },
            header_len: headers as u16,
            ..OffloadHeader::NONE
        };
        frame.set_offload(&header).expect("the ring's frames have headroom for it");
    }
}

/// Makes the checksum of an IPv4 packet partial: writes the sum of its pseudo header. Returns where it
/// is, how the packet is cut, and the bytes of all headers. `None` for what is neither TCP nor UDP.
fn partial(frame: &mut [u8]) -> Option<(HeaderChecksum, Gso, usize)> {
    let mut ethernet = EthernetFrame::new_checked(frame).ok()?;
    if ethernet.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let mut ip = Ipv4Packet::new_checked(ethernet.payload_mut()).ok()?;
    let (protocol, header_len) = (ip.next_header(), usize::from(ip.header_len()));
    let (src, dst, len) = (ip.src_addr(), ip.dst_addr(), ip.total_len() - header_len as u16);
    let words = [src.octets(), dst.octets()].into_iter().flat_map(|[a, b, c, d]| {
        [u32::from(u16::from_be_bytes([a, b])), u32::from(u16::from_be_bytes([c, d]))]
    });
    let sum = words.sum::<u32>() + u32::from(u8::from(protocol)) + u32::from(len);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
    let start = ETHERNET_HEADER_LEN + header_len;
    let (field, gso, transport_len) = match protocol {
        IpProtocol::Tcp => {
            let mut tcp = TcpPacket::new_checked(ip.payload_mut()).ok()?;
            tcp.set_checksum(sum);
            (16, Gso::TcpV4, usize::from(tcp.header_len()))
        }
        IpProtocol::Udp => {
            UdpPacket::new_checked(ip.payload_mut()).ok()?.set_checksum(sum);
            (6, Gso::None, 8)
        }
        _ => return None,
    };
    let checksum = HeaderChecksum::Partial { start: start as u16, offset: field };
    Some((checksum, gso, start + transport_len))
}

/// A received packet. Its frame is posted again once the stack has seen it.
#[derive(Debug)]
pub(crate) struct Received<'a> {
    frame: Frame,
    to_read: &'a mut VecDeque<Frame>,
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.frame);
        self.to_read.push_back(self.frame);
        result
    }
}

/// Permission to send one packet.
#[derive(Debug)]
pub(crate) struct ToSend<'a> {
    free: &'a mut Vec<Frame>,
    to_write: &'a mut VecDeque<Frame>,
    offload: Option<LeftToDevice>,
}

impl TxToken for ToSend<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        // The token is only made when there is a free frame.
        let mut frame = self.free.pop().expect("a token stands for a free frame");
        frame.reset();
        frame.set_len(len).expect("smoltcp keeps to the interface's MTU");
        let result = f(&mut frame);
        if let Some(offload) = self.offload {
            offload.describe(&mut frame);
        }
        self.to_write.push_back(frame);
        result
    }
}
