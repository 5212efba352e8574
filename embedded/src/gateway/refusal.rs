//! How the gateway refuses what it does not serve: a TCP reset, or an ICMP error.

use core::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4TimeExceeded, IpAddress, IpProtocol,
    Ipv4Packet, Ipv4Repr, TcpPacket, TcpSeqNumber,
};
use vmring_core::sync::{AtomicU64, Ordering};

use crate::limits::{CLOCK_LAG, ICMP_ERROR_MAX, MAX_PORTS};

/// The bytes of an IPv4 header without options.
pub(super) const IP_HEADER_LEN: usize = 20;
/// The bytes of an ICMP error before what it quotes.
const ICMP_HEADER_LEN: usize = 8;
/// The bytes of a TCP header without options.
pub(super) const TCP_HEADER_LEN: usize = 20;
/// The differentiated services of an ICMP error: the precedence "internetwork control" (RFC 1812,
/// 4.3.2.5).
const CONTROL: u8 = 6 << 3;

/// An ICMP error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IcmpError {
    Unreachable(Icmpv4DstUnreachable),
    TimeExceeded(Icmpv4TimeExceeded),
}

impl IcmpError {
    /// The bytes of the error's IP packet.
    pub(super) fn len(cause: &[u8]) -> usize {
        IP_HEADER_LEN + ICMP_HEADER_LEN + quoted(cause).len()
    }

    /// Writes the error's IP packet. `cause` is the IP packet that it is about, and `out` has
    /// [`len`](Self::len) bytes.
    pub(super) fn write(self, cause: &[u8], addresses: Ipv4Repr, out: &mut [u8]) {
        let mut ip = Ipv4Packet::new_unchecked(out);
        emit_ip(&addresses, CONTROL, &mut ip);
        let payload = ip.payload_mut();
        payload[..ICMP_HEADER_LEN].fill(0);
        payload[ICMP_HEADER_LEN..].copy_from_slice(quoted(cause));
        let mut icmp = Icmpv4Packet::new_unchecked(payload);
        let (kind, code) = match self {
            IcmpError::Unreachable(why) => (Icmpv4Message::DstUnreachable, why.into()),
            IcmpError::TimeExceeded(why) => (Icmpv4Message::TimeExceeded, why.into()),
        };
        icmp.set_msg_type(kind);
        icmp.set_msg_code(code);
        icmp.fill_checksum();
    }
}

/// As much of an IP packet as an error can quote (RFC 1812, 4.3.2.3).
fn quoted(cause: &[u8]) -> &[u8] {
    &cause[..cause.len().min(ICMP_ERROR_MAX - IP_HEADER_LEN - ICMP_HEADER_LEN)]
}

/// Writes an IP header with these differentiated services.
pub(super) fn emit_ip(repr: &Ipv4Repr, dscp: u8, ip: &mut Ipv4Packet<&mut [u8]>) {
    repr.emit(ip, &ChecksumCapabilities::default());
    ip.set_dscp(dscp);
    ip.fill_checksum();
}

/// The bytes of the IP packet of a reset.
pub(super) const RESET_LEN: usize = IP_HEADER_LEN + TCP_HEADER_LEN;

/// Writes the IP packet of the reset that answers a segment.
pub(super) fn write_reset(cause: &TcpPacket<&[u8]>, addresses: Ipv4Repr, out: &mut [u8]) {
    let (from, to) = (IpAddress::from(addresses.src_addr), IpAddress::from(addresses.dst_addr));
    let mut ip = Ipv4Packet::new_unchecked(out);
    emit_ip(&Ipv4Repr { next_header: IpProtocol::Tcp, ..addresses }, 0, &mut ip);
    fill_reset(cause, from, to, ip.payload_mut());
}

/// Writes the reset that answers a segment (RFC 9293, 3.10.7.1). `out` has [`TCP_HEADER_LEN`] bytes.
pub(super) fn fill_reset(cause: &TcpPacket<&[u8]>, from: IpAddress, to: IpAddress, out: &mut [u8]) {
    out.fill(0);
    let mut tcp = TcpPacket::new_unchecked(out);
    tcp.set_src_port(cause.dst_port());
    tcp.set_dst_port(cause.src_port());
    tcp.set_header_len(TCP_HEADER_LEN as u8);
    tcp.set_rst(true);
    if cause.ack() {
        tcp.set_seq_number(cause.ack_number());
    } else {
        tcp.set_seq_number(TcpSeqNumber(0));
        tcp.set_ack_number(cause.seq_number() + cause.segment_len());
        tcp.set_ack(true);
    }
    tcp.fill_checksum(&from, &to);
}

/// Limits the rate of something for each interface, as RFC 1812, 4.3.2.8 demands for errors. An
/// interface that asks for more gets none in place of another's.
pub(super) struct Limiter {
    /// For each interface, the time in microseconds at which it is back at its full allowance.
    full_at: Box<[AtomicU64]>,
    /// How many microseconds of the allowance one takes.
    cost: u64,
    /// The allowance in microseconds.
    allowance: u64,
}

impl Limiter {
    pub(super) fn new(per_second: u32, at_once: u32) -> Self {
        let cost = 1_000_000 / u64::from(per_second);
        let full_at = (0..MAX_PORTS).map(|_| AtomicU64::new(0)).collect();
        Self { full_at, cost, allowance: cost * u64::from(at_once) }
    }

    /// Whether this interface can have one more now.
    pub(super) fn allows(&self, port: u32, now: Duration) -> bool {
        let now = now.as_micros() as u64;
        // Relaxed: the value is one number and publishes nothing else.
        self.full_at[port as usize % MAX_PORTS]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                // A later moment than any that was stored comes from before the clock was set back.
                let latest = now + self.allowance + CLOCK_LAG.as_micros() as u64;
                let full_at = if full_at > latest { now } else { full_at.max(now) };
                let after = full_at + self.cost;
                (after <= now + self.allowance).then_some(after)
            })
            .is_ok()
    }
}
