//! The DHCP server of host and shared mode, so that the guest gets an address although nothing is
//! installed on the host. Leases and replies are those of `vmring_embedded`'s server; this module
//! connects it to the TAP.
//!
//! A request is taken out of the guest's writes before the kernel sees it. The reply takes the path
//! of every other packet to the guest: a packet socket sends it on the TAP, and a ring reads it
//! from there. So a reply needs no slot of its own, and several queues are no special case.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use macaddr::MacAddr6;
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_embedded::dhcp::{DhcpConfig, DhcpServer};

use super::limits::{DHCP_REPLY_MAX, DHCP_REQUEST_MAX};
use crate::device::seam::Lease;
use crate::error::Error;
use crate::software::complete_checksum;

/// The DHCP server of one TAP.
#[derive(Debug)]
pub(crate) struct Dhcp {
    server: DhcpServer,
    /// A packet socket, by which replies are sent.
    socket: OwnedFd,
    /// The TAP's interface index.
    interface: i32,
    /// The server's time counts from here.
    started: Instant,
    /// Replies that the kernel did not take.
    unsent: AtomicU64,
}

impl Dhcp {
    pub(crate) fn new(config: DhcpConfig, interface: u32) -> Result<Self, Error> {
        // Protocol 0: the socket receives nothing.
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket(2) takes three numbers and no pointer.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => Error::PermissionDenied {
                    needs: "CAP_NET_RAW for the DHCP server on the TAP; Tap::dhcp(false) does \
                            without it"
                        .to_owned(),
                },
                _ => Error::Io { what: "opening the DHCP server's socket", source },
            });
        }
        // SAFETY: the call above has just opened this descriptor, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            server: DhcpServer::new(config),
            socket,
            interface: interface as i32,
            started: Instant::now(),
            unsent: AtomicU64::new(0),
        })
    }

    /// Whether a frame that the guest writes is for a DHCP server. Runs for each frame, so it looks
    /// at as few bytes as it can.
    #[inline]
    pub(crate) fn is_request(frame: &[u8]) -> bool {
        // An untagged IPv4 packet that carries UDP ...
        let Some(&[0x08, 0x00, version, ..]) = frame.get(12..36) else { return false };
        if frame[23] != 17 {
            return false;
        }
        // ... to port 67, and is not a later fragment.
        let port = 14 + usize::from(version & 0x0f) * 4 + 2;
        frame.get(port..port + 2) == Some(&[0, 67]) && frame[20] & 0x1f == 0 && frame[21] == 0
    }

    /// Takes a request and sends the reply, if there is one, on the TAP. Returns false if the frame
    /// is not a request that this server handles; the frame must then go on to the host.
    pub(crate) fn take(&self, frame: &[u8], header: Option<&[u8]>) -> bool {
        if frame.len() > DHCP_REQUEST_MAX {
            return false;
        }
        let mut request = [0; DHCP_REQUEST_MAX];
        let request = &mut request[..frame.len()];
        request.copy_from_slice(frame);
        let header = header.and_then(|bytes| bytes.first_chunk::<{ offload::LEN }>());
        if let Some(Ok(header)) = header.map(OffloadHeader::parse_ignoring_reserved)
            && complete_checksum(&header, request).is_err()
        {
            return false;
        }
        let before = self.server.stats();
        let mut reply = [0; DHCP_REPLY_MAX];
        match self.server.handle(request, &mut reply, self.started.elapsed()) {
            Some(len) => self.send(&reply[..len]),
            None if self.server.stats() == before => return false,
            None => {}
        }
        true
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: a `sockaddr_ll` consists of integers, so all zeroes are a valid value.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as libc::c_ushort;
        to.sll_ifindex = self.interface;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `frame` and `to` are borrowed for the whole call, and the lengths passed are
        // theirs.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                len,
            )
        };
        if sent < 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(%error, "a DHCP reply was not sent");
            self.unsent.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        let lease = self.server.lease_of(mac, self.started.elapsed())?;
        let duration: Duration = self.server.config().lease_time;
        Some(Lease { address: lease.address, duration })
    }

    pub(crate) fn counters(&self) -> [(&'static str, u64); 4] {
        let stats = self.server.stats();
        [
            ("DHCP replies", stats.offers + stats.acks + stats.naks),
            ("DHCP malformed", stats.malformed),
            ("DHCP out of addresses", stats.exhausted),
            ("DHCP unsent", self.unsent.load(Ordering::Relaxed)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp_to(port: u16, version: u8, fragment: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![0; 300];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = version;
        frame[20..22].copy_from_slice(&fragment);
        frame[23] = 17;
        let at = 14 + usize::from(version & 15) * 4;
        frame[at + 2..at + 4].copy_from_slice(&port.to_be_bytes());
        frame
    }

    #[test]
    fn a_request_is_told_from_other_packets() {
        assert!(Dhcp::is_request(&udp_to(67, 0x45, [0, 0])));
        assert!(Dhcp::is_request(&udp_to(67, 0x46, [0, 0])), "with an option");
        assert!(Dhcp::is_request(&udp_to(67, 0x45, [0x40, 0])), "not to be fragmented");
        assert!(!Dhcp::is_request(&udp_to(68, 0x45, [0, 0])));
        assert!(!Dhcp::is_request(&udp_to(67, 0x45, [0, 1])), "a later fragment");
        let mut tcp = udp_to(67, 0x45, [0, 0]);
        tcp[23] = 6;
        assert!(!Dhcp::is_request(&tcp));
        for len in 0..60 {
            // Must not index out of bounds, whatever the length.
            let _ = Dhcp::is_request(&udp_to(67, 0x4f, [0, 0])[..len]);
        }
    }
}
