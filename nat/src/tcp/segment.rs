//! TCP segments: those that a guest sends, and those that it gets.

use core::fmt;
use core::net::{IpAddr, SocketAddr};

use smoltcp::wire::{IpProtocol, TcpOption, TcpPacket, TcpSeqNumber};
use vmring_core::offload::{Checksum, Gso, OffloadHeader};

use crate::endpoint::Endpoint;
use crate::output::Port;
use crate::packet::{Addresses, Datagram};
use crate::seq::Seq;
use crate::stats::Counter;

/// The bytes of a TCP header without options.
pub(crate) const HEADER_LEN: usize = 20;
/// The bytes of the options that this crate sends with SYN.
pub(crate) const SYN_OPTIONS_LEN: usize = 8;
/// The bytes of the longest frame without data: headers, options, and padding.
pub(crate) const CONTROL_LEN: usize = 14 + 40 + HEADER_LEN + SYN_OPTIONS_LEN;
/// Where the checksum is in a TCP header.
const CHECKSUM_AT: u16 = 16;

/// What a flow is found by: its port, and both addresses as the guest sees them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) port: Port,
    pub(crate) guest: Endpoint,
    pub(crate) remote: Endpoint,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {}: {} - {}", self.port.0, self.guest, self.remote)
    }
}

/// Flags of a TCP header (RFC 9293, 3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) psh: bool,
}

impl Flags {
    pub(crate) const ACK: Self = Self { ack: true, syn: false, fin: false, rst: false, psh: false };
}

/// What a guest says of itself in its SYN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SynOptions {
    pub(crate) mss: Option<u16>,
    pub(crate) window_shift: Option<u8>,
}

/// A segment of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'f> {
    pub(crate) key: Key,
    pub(crate) seq: Seq,
    pub(crate) ack: Seq,
    pub(crate) flags: Flags,
    pub(crate) window: u16,
    pub(crate) payload: &'f [u8],
    options: &'f [u8],
    /// The packet that the segment is in.
    pub(crate) datagram: Datagram<'f>,
}

impl<'f> Segment<'f> {
    /// Reads the TCP header of a packet. Urgent data is data.
    ///
    /// # Errors
    ///
    /// Why the segment cannot be translated.
    pub(crate) fn parse(port: Port, datagram: Datagram<'f>) -> Result<Self, Counter> {
        let packet = TcpPacket::new_checked(datagram.payload).map_err(|_| Counter::Malformed)?;
        let flags = Flags {
            syn: packet.syn(),
            ack: packet.ack(),
            fin: packet.fin(),
            rst: packet.rst(),
            psh: packet.psh(),
        };
        let nonsense = flags.syn && (flags.fin || flags.rst) || flags.fin && flags.rst;
        if nonsense || packet.src_port() == 0 || packet.dst_port() == 0 {
            return Err(Counter::TcpFlags);
        }
        let header_len = usize::from(packet.header_len());
        Ok(Self {
            key: Key {
                port,
                guest: SocketAddr::new(datagram.source, packet.src_port()).into(),
                remote: SocketAddr::new(datagram.destination, packet.dst_port()).into(),
            },
            seq: Seq(packet.seq_number().0 as u32),
            ack: Seq(packet.ack_number().0 as u32),
            flags,
            window: packet.window_len(),
            payload: &datagram.payload[header_len..],
            options: &datagram.payload[HEADER_LEN..header_len],
            datagram,
        })
    }

    /// The sequence number behind the segment, which SYN and FIN count for.
    pub(crate) fn end(&self) -> Seq {
        let flags = u32::from(self.flags.syn) + u32::from(self.flags.fin);
        self.seq.add(self.payload.len() as u32 + flags)
    }

    /// The options of a SYN. What is behind a malformed one is not read.
    pub(crate) fn syn_options(&self) -> SynOptions {
        let (mut found, mut rest) = (SynOptions::default(), self.options);
        while let Ok((next, option)) = TcpOption::parse(rest) {
            match option {
                TcpOption::MaxSegmentSize(mss) => found.mss = Some(mss),
                TcpOption::WindowScale(shift) => found.window_shift = Some(shift),
                TcpOption::EndOfList => break,
                _ => {}
            }
            if next.is_empty() {
                break;
            }
            rest = next;
        }
        found
    }
}

/// The header of a segment for a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) addresses: Addresses,
    pub(crate) from_port: u16,
    pub(crate) to_port: u16,
    pub(crate) seq: Seq,
    pub(crate) ack: Seq,
    pub(crate) flags: Flags,
    pub(crate) window: u16,
    /// The options of a SYN.
    pub(crate) options: Option<(u16, Option<u8>)>,
}

impl Header {
    /// The bytes of all headers.
    pub(crate) fn len(&self) -> usize {
        let options = if self.options.is_some() { SYN_OPTIONS_LEN } else { 0 };
        self.addresses.header_len() + HEADER_LEN + options
    }

    /// Writes all headers to the start of a frame that ends with the segment, and leaves the checksum
    /// to the reader. `mss` is the length of each segment's data.
    pub(crate) fn emit(&self, frame: &mut [u8], mss: u16) -> OffloadHeader {
        let (ip_end, len) = (self.addresses.header_len(), self.len());
        let data_len = frame.len() - len;
        let segment = self.addresses.emit(IpProtocol::Tcp, frame);
        let sum = self.addresses.pseudo_sum(IpProtocol::Tcp, segment.len());
        segment[..HEADER_LEN].fill(0);
        let mut tcp = TcpPacket::new_unchecked(&mut *segment);
        tcp.set_src_port(self.from_port);
        tcp.set_dst_port(self.to_port);
        tcp.set_seq_number(TcpSeqNumber(self.seq.0 as i32));
        tcp.set_ack_number(TcpSeqNumber(self.ack.0 as i32));
        tcp.set_header_len((len - ip_end) as u8);
        tcp.set_syn(self.flags.syn);
        tcp.set_ack(self.flags.ack);
        tcp.set_fin(self.flags.fin);
        tcp.set_rst(self.flags.rst);
        tcp.set_psh(self.flags.psh);
        tcp.set_window_len(self.window);
        tcp.set_checksum(sum);
        if let Some((mss, shift)) = self.options {
            let rest = TcpOption::MaxSegmentSize(mss).emit(&mut segment[HEADER_LEN..]);
            match shift {
                Some(shift) => {
                    let rest = TcpOption::NoOperation.emit(rest);
                    TcpOption::WindowScale(shift).emit(rest);
                }
                None => rest[..4].fill(0),
            }
        }
        let gso = match self.addresses.to {
            _ if data_len <= usize::from(mss) => Gso::None,
            IpAddr::V4(_) => Gso::TcpV4,
            IpAddr::V6(_) => Gso::TcpV6,
        };
        OffloadHeader {
            checksum: Checksum::Partial { start: ip_end as u16, offset: CHECKSUM_AT },
            gso,
            segment_size: if gso == Gso::None { 0 } else { mss },
            header_len: if gso == Gso::None { 0 } else { len as u16 },
            ..OffloadHeader::NONE
        }
    }
}
