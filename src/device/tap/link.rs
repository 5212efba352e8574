//! The kernel's interfaces, by rtnetlink (RFC 3549; rtnetlink(7)).

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use macaddr::MacAddr6;
use netlink_bindings::rt_addr::{self, Ifaddrmsg};
use netlink_bindings::rt_link::{self, Ifinfomsg};
use netlink_bindings::traits::NetlinkRequest;
use netlink_socket2::{NetlinkSocket, ReplyError};

use crate::error::Error;

/// A socket to the kernel's interfaces: those of the network namespace in which it was opened, also
/// when another thread uses it.
pub(crate) struct Netlink(NetlinkSocket);

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Netlink")
    }
}

/// An interface.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) up: bool,
    pub(crate) mtu: u32,
    /// All zeroes where it has none.
    pub(crate) mac: MacAddr6,
    pub(crate) master: Option<u32>,
    pub(crate) is_bridge: bool,
}

/// What the kernel says to a request that it refuses.
pub(crate) fn refused(what: &'static str, error: ReplyError) -> Error {
    let said = error.to_string();
    let source = io::Error::from(error);
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::PermissionDenied {
            needs: format!(
                "CAP_NET_ADMIN for {what}: run as root, or let root set the TAP up \
                 (ip tuntap add NAME mode tap user ME; ip link set NAME up) and use it as it is"
            ),
        },
        // With the kernel's own sentence, if it gave one.
        Some(_) => Error::Io { what, source: io::Error::new(source.kind(), said) },
        None => Error::Io { what, source },
    }
}

fn is(error: &ReplyError, errno: i32) -> bool {
    error.as_io_error().raw_os_error() == Some(errno)
}

impl Netlink {
    /// In the network namespace of this thread.
    pub(crate) fn open() -> Result<Self, Error> {
        let mut netlink = Self(NetlinkSocket::new());
        // It opens its socket at the first request.
        netlink.link("lo")?;
        Ok(netlink)
    }

    /// The interface of that name, if there is one.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        const WHAT: &str = "asking for an interface";
        let mut request = rt_link::Request::new().op_getlink_do(&Ifinfomsg::new());
        request.encode().push_ifname_bytes(name.as_bytes());
        let mut reply = self.0.request(&request).map_err(Error::io(WHAT))?;
        match reply.recv_one() {
            Ok((header, attributes)) => Ok(Some(link_of(&header, &attributes))),
            Err(error) if is(&error, libc::ENODEV) => Ok(None),
            Err(error) => Err(refused(WHAT, error)),
        }
    }

    fn acknowledged<R: NetlinkRequest>(
        &mut self,
        request: &R,
        what: &'static str,
    ) -> Result<(), Error> {
        let mut reply = self.0.request(request).map_err(Error::io(what))?;
        reply.recv_ack().map_err(|error| refused(what, error))
    }

    /// Changes an interface: `flags` of those in `mask`, and what `push` puts into the request.
    fn change(
        &mut self,
        index: u32,
        (flags, mask): (u32, u32),
        what: &'static str,
        push: impl FnOnce(rt_link::PushLinkAttrs<&mut Vec<u8>>),
    ) -> Result<(), Error> {
        let header = Ifinfomsg {
            ifi_index: index as i32,
            ifi_flags: flags,
            ifi_change: mask,
            ..Ifinfomsg::new()
        };
        let mut request = rt_link::Request::new().op_newlink_do(&header);
        push(request.encode());
        self.acknowledged(&request, what)
    }

    pub(crate) fn set_up(&mut self, index: u32, up: bool) -> Result<(), Error> {
        let mask = libc::IFF_UP as u32;
        let flags = if up { mask } else { 0 };
        self.change(index, (flags, mask), "bringing the TAP up or down", |_| {})
    }

    pub(crate) fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), Error> {
        self.change(index, (0, 0), "setting the TAP's MTU", |request| {
            request.push_mtu(mtu);
        })
    }

    pub(crate) fn set_mac(&mut self, index: u32, mac: MacAddr6) -> Result<(), Error> {
        self.change(index, (0, 0), "setting the TAP's MAC address", |request| {
            request.push_address(mac.as_bytes());
        })
    }

    /// Makes it a port of a bridge, or of none.
    pub(crate) fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<(), Error> {
        self.change(index, (0, 0), "putting the TAP on the bridge", |request| {
            request.push_master(master.unwrap_or(0));
        })
    }

    /// False if it was there already.
    pub(crate) fn add_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<bool, Error> {
        const WHAT: &str = "giving the host an address on the TAP";
        let mut request =
            rt_addr::Request::new().set_create().set_excl().op_newaddr_do(&header(index, prefix));
        request.encode().push_local(IpAddr::V4(address)).push_address(IpAddr::V4(address));
        let mut reply = self.0.request(&request).map_err(Error::io(WHAT))?;
        match reply.recv_ack() {
            Ok(()) => Ok(true),
            Err(error) if is(&error, libc::EEXIST) => Ok(false),
            Err(error) => Err(refused(WHAT, error)),
        }
    }

    pub(crate) fn remove_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), Error> {
        let mut request = rt_addr::Request::new().op_deladdr_do(&header(index, prefix));
        request.encode().push_local(IpAddr::V4(address));
        self.acknowledged(&request, "taking the host's address off the TAP")
    }

    /// The names of all bridges.
    pub(crate) fn bridges(&mut self) -> Result<Vec<String>, Error> {
        const WHAT: &str = "asking for the bridges";
        let request = rt_link::Request::new().op_getlink_dump(&Ifinfomsg::new());
        let mut reply = self.0.request(&request).map_err(Error::io(WHAT))?;
        let mut names = Vec::new();
        while let Some(link) = reply.recv() {
            let (header, attributes) = link.map_err(|error| refused(WHAT, error))?;
            if link_of(&header, &attributes).is_bridge
                && let Ok(name) = attributes.get_ifname()
            {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }
}

fn header(index: u32, prefix: u8) -> Ifaddrmsg {
    Ifaddrmsg {
        ifa_family: libc::AF_INET as u8,
        ifa_prefixlen: prefix,
        ifa_index: index,
        ..Ifaddrmsg::new()
    }
}

fn link_of(header: &Ifinfomsg, attributes: &rt_link::IterableLinkAttrs<'_>) -> Link {
    let mac: Option<[u8; 6]> =
        attributes.get_address().ok().and_then(|bytes| bytes.try_into().ok());
    let kind = attributes.get_linkinfo().and_then(|info| info.get_kind());
    Link {
        index: header.ifi_index as u32,
        up: header.ifi_flags & libc::IFF_UP as u32 != 0,
        mtu: attributes.get_mtu().unwrap_or(0),
        mac: mac.unwrap_or_default().into(),
        master: attributes.get_master().ok(),
        is_bridge: kind.is_ok_and(|kind| kind == c"bridge"),
    }
}
