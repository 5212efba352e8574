//! The interfaces of a network namespace: a TAP and the loopback interface. The calls are those of
//! netdevice(7).

use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use vmring::MacAddr6;

use super::ipv6;
use super::settings::Settings;
use crate::args::NetnsOffload;

/// The TAP's name.
const NAME: &str = "tap0";
/// Its hardware address, a locally administered one.
const MAC: MacAddr6 = MacAddr6::new(0x02, 0x6e, 0x65, 0x74, 0x6e, 0x73);
const LOOPBACK: &str = "lo";
/// The device that makes TAPs.
const TUN: &str = "/dev/net/tun";

/// Creates the TAP. With offload there is a header in front of each packet. Its largest IP packet has
/// `mtu` bytes.
pub(super) fn create(mtu: u32, offload: NetnsOffload) -> Result<OwnedFd, String> {
    let failed = |error: io::Error| format!("making a TAP with {TUN} failed: {error}");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(TUN).map_err(failed)?;
    let header = match offload {
        NetnsOffload::All => libc::IFF_VNET_HDR,
        NetnsOffload::None => 0,
    };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | header;
    let mut request = request(NAME);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`.
    unsafe { call(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) }.map_err(failed)?;
    let links = Links::new()?;
    links.set("hardware address", NAME, libc::SIOCSIFHWADDR as _, |request| {
        // SAFETY: every bit pattern is a `sockaddr`.
        let address = unsafe { &mut request.ifr_ifru.ifru_hwaddr };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(MAC.into_array()) {
            *to = from as libc::c_char;
        }
    })?;
    links.set("MTU", NAME, libc::SIOCSIFMTU as _, |request| {
        request.ifr_ifru.ifru_mtu = mtu as libc::c_int;
    })?;
    Ok(file.into())
}

/// Brings both interfaces up. The TAP gets its addresses and the default routes.
pub(super) fn set_up(settings: &Settings) -> Result<(), String> {
    let links = Links::new()?;
    let up = |request: &mut libc::ifreq| {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    };
    links.set("state", LOOPBACK, libc::SIOCSIFFLAGS as _, up)?;
    links.set("address", NAME, libc::SIOCSIFADDR as _, |request| {
        request.ifr_ifru.ifru_addr = address(settings.address);
    })?;
    links.set("mask", NAME, libc::SIOCSIFNETMASK as _, |request| {
        request.ifr_ifru.ifru_netmask = address(settings.mask);
    })?;
    if settings.prefix.is_some() {
        ipv6::prepare(NAME);
    }
    links.set("state", NAME, libc::SIOCSIFFLAGS as _, up)?;
    links.route_by(settings.gateway)?;
    if let Some(prefix) = settings.prefix {
        ipv6::wait(NAME, prefix);
    }
    Ok(())
}

/// The interfaces of this namespace.
struct Links(UdpSocket);

impl Links {
    fn new() -> Result<Self, String> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
        socket.map(Self).map_err(|error| format!("making a socket failed: {error}"))
    }

    /// Makes the call of this number, which reads and writes an `ifreq`.
    fn set(
        &self,
        what: &str,
        name: &str,
        number: u64,
        fill: impl FnOnce(&mut libc::ifreq),
    ) -> Result<(), String> {
        let mut request = request(name);
        fill(&mut request);
        // SAFETY: the callers, which are above, name calls that read and write an `ifreq`.
        unsafe { call(self.0.as_raw_fd(), number, &mut request) }
            .map_err(|error| format!("setting the {what} of {name} failed: {error}"))
    }

    /// Sets the default route.
    fn route_by(&self, gateway: Ipv4Addr) -> Result<(), String> {
        // SAFETY: it consists of numbers and a pointer, for which zero is valid.
        let mut route: libc::rtentry = unsafe { mem::zeroed() };
        route.rt_dst = address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: SIOCADDRT reads an `rtentry`.
        unsafe { call(self.0.as_raw_fd(), libc::SIOCADDRT as _, &mut route) }
            .map_err(|error| format!("setting the default route failed: {error}"))
    }
}

/// # Safety
///
/// The call of this number reads and writes a `T`, and nothing else.
unsafe fn call<T>(fd: libc::c_int, number: u64, argument: &mut T) -> io::Result<()> {
    // SAFETY: the argument lives until the call returns, and the caller answers for its type.
    let done = unsafe { libc::ioctl(fd, number as _, std::ptr::from_mut(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about the interface of this name.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: it consists of numbers and pointers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(ip).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: a `sockaddr_in` is as long as a `sockaddr`, and is one.
    unsafe { mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}
