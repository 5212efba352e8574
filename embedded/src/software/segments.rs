//! [`Segments`]: cuts one packet into many.

use smoltcp::wire::{EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket};
use vmring_core::offload::{Checksum, Gso, OffloadError, OffloadHeader};

use super::checksum::{complete, sum};
use super::error::SoftwareError;
use super::headers::{
    IPV6_HEADER_LEN, Ip, TCP_CHECKSUM_AT, UDP_CHECKSUM_AT, behind_ethernet, ipv4, ipv6, tcp, udp,
};

/// Cuts one packet into segments. See the [module](super) for an example.
#[derive(Clone, Copy, Debug)]
pub struct Segments<'a> {
    packet: &'a [u8],
    is_v4: bool,
    is_tcp: bool,
    /// The offsets of the IP header, the transport header and the payload.
    ip: usize,
    transport: usize,
    payload: usize,
    segment_size: usize,
    count: usize,
    /// The sum of the pseudo header without the length.
    pseudo: u16,
}

impl<'a> Segments<'a> {
    /// Checks the packet and its header, and prepares to cut the packet.
    ///
    /// # Errors
    ///
    /// Every error but [`NoSuchSegment`](SoftwareError::NoSuchSegment),
    /// [`Space`](SoftwareError::Space) and [`ToBeCut`](SoftwareError::ToBeCut).
    pub fn new(header: &OffloadHeader, packet: &'a [u8]) -> Result<Self, SoftwareError> {
        header.validate(packet.len())?;
        let (is_v4, is_tcp) = match header.gso {
            Gso::None => return Err(SoftwareError::NotToBeCut),
            Gso::Udp => return Err(SoftwareError::FragmentsNotSupported),
            Gso::TcpV4 => (Some(true), true),
            Gso::TcpV6 => (Some(false), true),
            Gso::UdpL4 => (None, false),
        };
        let Checksum::Partial { start, .. } = header.checksum else {
            return Err(OffloadError::GsoWithoutChecksum.into());
        };
        let (ip, ethertype) = behind_ethernet(packet)?;
        let found_v4 = match ethertype {
            EthernetProtocol::Ipv4 => true,
            EthernetProtocol::Ipv6 => false,
            other => return Err(SoftwareError::NotThatIp { ethertype: other.into() }),
        };
        if is_v4.is_some_and(|wanted| wanted != found_v4) {
            return Err(SoftwareError::NotThatIp { ethertype: ethertype.into() });
        }
        let Ip { transport, protocol, addresses } =
            if found_v4 { ipv4(packet, ip)? } else { ipv6(packet, ip)? };
        let wanted = if is_tcp { IpProtocol::Tcp } else { IpProtocol::Udp };
        if protocol != wanted {
            return Err(SoftwareError::NotThatTransport { protocol: protocol.into() });
        }
        if usize::from(start) != transport {
            return Err(SoftwareError::TransportAt { said: start, is: transport });
        }

        let datagram = &packet[transport..];
        let (header_len, flagged, field) = if is_tcp { tcp(datagram)? } else { udp(datagram)? };
        let payload = transport + header_len;
        let segment_size = usize::from(header.segment_size);
        let count = (packet.len() - payload).div_ceil(segment_size).max(1);
        if flagged && count > 1 {
            return Err(SoftwareError::TcpFlags);
        }
        let protocol = u16::from(u8::from(protocol));
        let pseudo = match addresses {
            Some(addresses) => sum(addresses, &protocol.to_be_bytes()),
            // Only the sender knows the final address. Its sum is in the checksum field; subtract
            // the length from it. (`ipv6` has checked that the length fits.)
            None => sum(field, &(!(datagram.len() as u16)).to_be_bytes()),
        };
        Ok(Self {
            packet,
            is_v4: found_v4,
            is_tcp,
            ip,
            transport,
            payload,
            segment_size,
            count,
            pseudo,
        })
    }

    /// Returns the number of segments, which is at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the length of the longest segment, in bytes.
    pub fn len_max(&self) -> usize {
        self.packet.len().min(self.payload + self.segment_size)
    }

    /// Returns the offload header of every segment that [`write_partial`](Self::write_partial)
    /// writes.
    pub fn partial_header(&self) -> OffloadHeader {
        let (start, offset) = (self.transport as u16, self.checksum_at() as u16);
        let checksum = Checksum::Partial { start, offset };
        OffloadHeader { checksum, ..OffloadHeader::NONE }
    }

    /// Writes segment `index` (from 0) to the front of `out`, with all checksums, and returns its
    /// length in bytes.
    ///
    /// # Errors
    ///
    /// [`SoftwareError::NoSuchSegment`] if `index` is not below [`count`](Self::count);
    /// [`SoftwareError::Space`] if `out` is too short. In both cases `out` has not changed.
    pub fn write(&self, index: usize, out: &mut [u8]) -> Result<usize, SoftwareError> {
        let len = self.write_partial(index, out)?;
        complete(&mut out[self.transport..len], self.checksum_at());
        Ok(len)
    }

    /// Writes segment `index` like [`write`](Self::write), but with a partial transport checksum,
    /// which the receiver completes. Send the [`partial_header`](Self::partial_header) with it.
    ///
    /// # Errors
    ///
    /// The errors of [`write`](Self::write).
    pub fn write_partial(&self, index: usize, out: &mut [u8]) -> Result<usize, SoftwareError> {
        let count = self.count;
        if index >= count {
            return Err(SoftwareError::NoSuchSegment { index, count });
        }
        let begin = index * self.segment_size;
        let payload = &self.packet[self.payload + begin..];
        let payload = &payload[..payload.len().min(self.segment_size)];
        let needed = self.payload + payload.len();
        let available = out.len();
        let out = out.get_mut(..needed).ok_or(SoftwareError::Space { needed, available })?;
        let (headers, rest) = out.split_at_mut(self.payload);
        headers.copy_from_slice(&self.packet[..self.payload]);
        rest.copy_from_slice(payload);

        // The casts do not truncate: a segment's lengths are no larger than the packet's own, which
        // fit.
        let ip_len = needed - self.ip;
        let len = (needed - self.transport) as u16;
        if self.is_v4 {
            let mut ip = Ipv4Packet::new_unchecked(&mut headers[self.ip..self.transport]);
            let ident = ip.ident();
            ip.set_total_len(ip_len as u16);
            ip.set_ident(ident.wrapping_add(index as u16));
            ip.fill_checksum();
        } else {
            let mut ip = Ipv6Packet::new_unchecked(&mut headers[self.ip..self.transport]);
            ip.set_payload_len((ip_len - IPV6_HEADER_LEN) as u16);
        }
        let pseudo = sum(self.pseudo, &len.to_be_bytes());
        let transport = &mut headers[self.transport..];
        if self.is_tcp {
            let mut tcp = TcpPacket::new_unchecked(transport);
            let (first, last) = (index == 0, index + 1 == count);
            let sequence = tcp.seq_number();
            tcp.set_seq_number(sequence + begin);
            tcp.set_fin(last && tcp.fin());
            tcp.set_psh(last && tcp.psh());
            tcp.set_cwr(first && tcp.cwr());
            tcp.set_checksum(pseudo);
        } else {
            let mut udp = UdpPacket::new_unchecked(transport);
            udp.set_len(len);
            udp.set_checksum(pseudo);
        }
        Ok(needed)
    }

    fn checksum_at(&self) -> usize {
        if self.is_tcp { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT }
    }
}
