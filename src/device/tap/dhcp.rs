//! The DHCP server of host and shared mode, so that the guest gets an address although nothing is
//! installed on the host. Leases and replies are those of `vmring_embedded`'s server; this module
//! connects it to the TAP.
//!
//! The server learns from the guest's ARP packets, which go on to the host, who uses which address.
//!
//! A request is taken out of the guest's writes before the kernel sees it. The reply takes the path
//! of every other packet to the guest: a packet socket sends it on the TAP, and a ring reads it
//! from there. So a reply needs no slot of its own, and several queues are no special case.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use macaddr::MacAddr6;
use vmring_core::offload::{self, OffloadHeader};
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_embedded::dhcp::{DhcpConfig, DhcpServer, LeaseFile};
use vmring_embedded::limits::DHCP_REPLY_MAX;

use super::limits::DHCP_REQUEST_MAX;
use vmring_embedded::software::complete_checksum;

use crate::device::dhcp_settings::{DhcpSettings, dhcp_counters};
use crate::device::seam::Lease;
use crate::error::{ConfigError, Error};

/// The bytes of a frame up to the UDP ports behind the longest IPv4 header.
pub(crate) const FRONT: usize = 14 + 60 + 4;

/// The DHCP server of one TAP.
#[derive(Debug)]
pub(crate) struct Dhcp {
    server: DhcpServer,
    /// Writes the leases until the server ends.
    _lease_file: Option<LeaseFile>,
    /// A packet socket, by which replies are sent.
    socket: OwnedFd,
    /// The TAP's interface index.
    interface: i32,
    /// The server's time counts from here.
    started: Instant,
    /// Replies and questions that the kernel did not take.
    unsent: AtomicU64,
}

impl Dhcp {
    pub(crate) fn new(
        config: DhcpConfig,
        settings: &DhcpSettings,
        interface: u32,
    ) -> Result<Self, Error> {
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
        let server = DhcpServer::new(config);
        let invalid = |error: String| ConfigError::Invalid(error);
        for (mac, address) in &settings.reservations {
            server
                .reserve(*mac, *address, Duration::ZERO)
                .map_err(|error| invalid(error.to_string()))?;
        }
        // The leases come after the reservations, which say what a client can have.
        let open = |path: &PathBuf| server.open_lease_file(path, Duration::ZERO);
        let lease_file = settings.lease_file.as_ref().map(open).transpose();
        Ok(Self {
            _lease_file: lease_file.map_err(|error| invalid(error.to_string()))?,
            server,
            socket,
            interface: interface as i32,
            started: Instant::now(),
            unsent: AtomicU64::new(0),
        })
    }

    /// Takes a frame that the guest writes if it is a DHCP request that this server handles, and
    /// answers it. Returns whether it did. Runs for each frame, so it looks at as few bytes as it
    /// can. `header` is the offload header, if the TAP has one.
    #[inline]
    pub(crate) fn take(&self, frame: &[u8], header: Option<&[u8]>) -> bool {
        match frame.get(12..14) {
            Some(&[0x08, 0x00]) => is_request(frame, 14) && self.answer(frame, header),
            Some(&[0x08, 0x06]) => {
                self.server.learn_from_arp(frame, 0, self.started.elapsed());
                false
            }
            // A priority tag: the frame belongs to no VLAN.
            Some(&[0x81, 0x00]) => self.take_tagged(frame, header),
            _ => false,
        }
    }

    /// Whether [`take`](Self::take) would do anything with a frame that begins like this: with the
    /// frame's first [`FRONT`] bytes, or with all of them.
    pub(crate) fn looks_at(front: &[u8]) -> bool {
        match front.get(12..14) {
            Some(&[0x08, 0x00]) => is_request(front, 14),
            Some(&[0x08, 0x06] | &[0x81, 0x00]) => true,
            _ => false,
        }
    }

    #[cold]
    fn take_tagged(&self, frame: &[u8], header: Option<&[u8]>) -> bool {
        let Some(&[priority, 0, high, low]) = frame.get(14..18) else { return false };
        match [high, low] {
            _ if priority & 0x0f != 0 => false,
            [0x08, 0x00] => is_request(frame, 18) && self.answer(frame, header),
            [0x08, 0x06] => {
                self.server.learn_from_arp(frame, 0, self.started.elapsed());
                false
            }
            _ => false,
        }
    }

    /// Takes a request and sends the reply, if there is one, on the TAP. Returns false if the frame
    /// is not a request that this server handles. The frame must go on to the host in that case.
    fn answer(&self, frame: &[u8], header: Option<&[u8]>) -> bool {
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
        let mut reply = [0; DHCP_REPLY_MAX];
        let Some(answer) = self.server.handle(request, 0, &mut reply, self.started.elapsed())
        else {
            return false;
        };
        if let Some(len) = answer.reply {
            self.send(&reply[..len]);
        }
        if let Some(question) = answer.to_all {
            self.send(&question);
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
            tracing::debug!(%error, "a frame of the DHCP server was not sent");
            self.unsent.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        let lease = self.server.lease_of(mac, self.started.elapsed())?;
        let duration: Duration = self.server.config().lease_time;
        Some(Lease { address: lease.address, duration })
    }

    pub(crate) fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let unsent = ("DHCP unsent", self.unsent.load(Ordering::Relaxed));
        dhcp_counters(&self.server.stats()).into_iter().chain([unsent])
    }
}

/// Whether an IPv4 packet, which begins at `ip`, is for a DHCP server.
#[inline]
fn is_request(frame: &[u8], ip: usize) -> bool {
    // It carries UDP ...
    let Some(header) = frame.get(ip..ip + 22) else { return false };
    if header[9] != 17 {
        return false;
    }
    // ... to port 67, and is not a later fragment.
    let port = ip + usize::from(header[0] & 0x0f) * 4 + 2;
    frame.get(port..port + 2) == Some(&[0, 67]) && header[6] & 0x1f == 0 && header[7] == 0
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
        assert!(is_request(&udp_to(67, 0x45, [0, 0]), 14));
        assert!(is_request(&udp_to(67, 0x46, [0, 0]), 14), "with an option");
        assert!(is_request(&udp_to(67, 0x45, [0x40, 0]), 14), "not to be fragmented");
        assert!(!is_request(&udp_to(68, 0x45, [0, 0]), 14));
        assert!(!is_request(&udp_to(67, 0x45, [0, 1]), 14), "a later fragment");
        let mut tcp = udp_to(67, 0x45, [0, 0]);
        tcp[23] = 6;
        assert!(!is_request(&tcp, 14));
        let dhcp = udp_to(67, 0x4f, [0, 0]);
        assert!(Dhcp::looks_at(&dhcp[..FRONT]) && !Dhcp::looks_at(&tcp));
        for len in 0..60 {
            // Must not index out of bounds, whatever the length.
            let _ = is_request(&udp_to(67, 0x4f, [0, 0])[..len], 14);
        }
    }
}
