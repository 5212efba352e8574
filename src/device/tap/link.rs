//! The host's network interfaces, over rtnetlink: what `ip link` and `ip address` do.
//!
//! [`Netlink`] is built on [`Socket`], which serves any netlink protocol; `nat.rs` uses it for
//! nf_tables.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::{fmt, io};

use macaddr::MacAddr6;
use netlink_bindings::builtin::{NlmsgerrAttrs, Nlmsghdr};
use netlink_bindings::consts;
use netlink_bindings::rt_addr::{self, Ifaddrmsg};
use netlink_bindings::rt_link::{self, IfinfoFlags, Ifinfomsg, IterableLinkAttrs, RtextFilter};
use netlink_bindings::rt_route::{self, RtmType, Rtmsg};
use netlink_bindings::traits::{NetlinkRequest, Protocol};

use super::limits::{NETLINK_DATAGRAM_MAX, NETLINK_TIMEOUT};
use crate::error::Error;

/// The interfaces of one network namespace: the namespace of the thread that called
/// [`open`](Self::open), whichever thread uses it later.
pub(crate) struct Netlink {
    socket: Socket,
}

/// The state of one interface at the time of the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// The interface index, which a rename does not change.
    pub(crate) index: u32,
    /// The name.
    pub(crate) name: String,
    /// Whether somebody has set the interface up (`IFF_UP`). This does not mean that it has a
    /// carrier.
    pub(crate) up: bool,
    /// The largest IP packet, in bytes.
    pub(crate) mtu: u32,
    /// The MAC address; nil if the interface has no address of six bytes.
    pub(crate) mac: MacAddr6,
    /// The index of the bridge (or other master) that the interface is a port of.
    pub(crate) master: Option<u32>,
    /// Whether the interface is a bridge of the kernel. Such a bridge takes ports by
    /// [`set_master`](Netlink::set_master).
    pub(crate) is_bridge: bool,
    /// The kernel's name for the kind of interface: `bridge`, `tun`, `veth`. A plain network card
    /// has no kind.
    pub(crate) kind: Option<String>,
}

/// An IPv4 address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AddressOnLink {
    /// The interface's index.
    pub(crate) index: u32,
    pub(crate) address: Ipv4Addr,
    /// An address in the network that the interface is on.
    pub(crate) network: Ipv4Addr,
    pub(crate) prefix_len: u8,
}

/// An IPv4 route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// The index of the interface by which packets leave, if there is exactly one.
    pub(crate) index: Option<u32>,
    pub(crate) network: Ipv4Addr,
    pub(crate) prefix_len: u8,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> Result<Self, Error> {
        let socket = Socket::open(consts::NETLINK_ROUTE)
            .map_err(Error::io("opening a socket to the kernel's network interfaces"))?;
        Ok(Self { socket })
    }

    /// Returns the interface of that name, or `None` if there is none.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        if !is_interface_name(name) {
            return Ok(None);
        }
        let mut request = rt_link::Request::new().op_getlink_do(&Ifinfomsg::new());
        request
            .encode()
            .push_ifname_bytes(name.as_bytes())
            .push_ext_mask(RtextFilter::SkipStats as u32);
        self.one_link(&request)
    }

    /// Returns the interface with that index, or `None` if there is none.
    pub(crate) fn link_at(&mut self, index: u32) -> Result<Option<Link>, Error> {
        let mut request = rt_link::Request::new().op_getlink_do(&interface(index));
        request.encode().push_ext_mask(RtextFilter::SkipStats as u32);
        self.one_link(&request)
    }

    fn one_link(&mut self, request: &impl NetlinkRequest) -> Result<Option<Link>, Error> {
        let mut link = None;
        let answer = self.socket.request(request, |payload| {
            let (header, attributes) = rt_link::OpGetlinkDo::decode_reply(payload);
            link = Some(Link::new(&header, &attributes));
        });
        match answer {
            Ok(()) => Ok(link),
            Err(refusal) if refusal.is(libc::ENODEV) => Ok(None),
            Err(refusal) => Err(refusal.into_error("looking at a network interface")),
        }
    }

    /// Sets the interface up or down.
    pub(crate) fn set_up(&mut self, index: u32, up: bool) -> Result<(), Error> {
        let flag = IfinfoFlags::Up as u32;
        let mut header = interface(index);
        header.ifi_flags = if up { flag } else { 0 };
        header.ifi_change = flag;
        let request = rt_link::Request::new().op_setlink_do(&header);
        let what =
            if up { "setting a network interface up" } else { "setting a network interface down" };
        self.change(&request, what)
    }

    /// Sets the MTU: the largest IP packet, in bytes.
    pub(crate) fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), Error> {
        let mut request = rt_link::Request::new().op_setlink_do(&interface(index));
        request.encode().push_mtu(mtu);
        self.change(&request, "setting the MTU of a network interface")
    }

    /// Sets the MAC address. Some drivers accept it only while the interface is down.
    pub(crate) fn set_mac(&mut self, index: u32, mac: MacAddr6) -> Result<(), Error> {
        let mut request = rt_link::Request::new().op_setlink_do(&interface(index));
        request.encode().push_address(mac.as_bytes());
        self.change(&request, "setting the MAC address of a network interface")
    }

    /// Makes the interface a port of a bridge, or with `None` takes it off its bridge.
    pub(crate) fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<(), Error> {
        let mut request = rt_link::Request::new().op_setlink_do(&interface(index));
        request.encode().push_master(master.unwrap_or(0));
        let what = match master {
            Some(_) => "adding a network interface to a bridge",
            None => "taking a network interface off its bridge",
        };
        self.change(&request, what)
    }

    /// Adds an IPv4 address to the interface. Returns false if it had the address already.
    pub(crate) fn add_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> Result<bool, Error> {
        let header = ipv4_of(index, prefix_len);
        let mut request = rt_addr::Request::new().set_create().set_excl().op_newaddr_do(&header);
        request.encode().push_local(IpAddr::V4(address)).push_address(IpAddr::V4(address));
        match self.socket.request(&request, |_| ()) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.is(libc::EEXIST) => Ok(false),
            Err(refusal) => Err(refusal.into_error("adding an address to a network interface")),
        }
    }

    /// Removes an IPv4 address from the interface. Returns false if it did not have the address.
    pub(crate) fn remove_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> Result<bool, Error> {
        let mut request = rt_addr::Request::new().op_deladdr_do(&ipv4_of(index, prefix_len));
        // The kernel compares IFA_ADDRESS too, with its prefix length.
        request.encode().push_local(IpAddr::V4(address)).push_address(IpAddr::V4(address));
        match self.socket.request(&request, |_| ()) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.is(libc::EADDRNOTAVAIL) => Ok(false),
            Err(refusal) => Err(refusal.into_error("removing an address from a network interface")),
        }
    }

    /// Deletes the interface.
    #[cfg(test)]
    pub(crate) fn delete_link(&mut self, index: u32) -> Result<(), Error> {
        let request = rt_link::Request::new().op_dellink_do(&interface(index));
        self.change(&request, "deleting a network interface")
    }

    /// Keeps the port of a bridge from becoming the way to the root of the spanning tree, whatever its
    /// guest claims (`root_block`). Has no effect on a bridge without a spanning tree.
    pub(crate) fn block_root(&mut self, index: u32) -> Result<(), Error> {
        // RTM_SETLINK does not look at the settings of a port, but RTM_NEWLINK does.
        let mut request = rt_link::Request::new().op_newlink_do(&interface(index));
        request
            .encode()
            .nested_linkinfo()
            .nested_slave_data_bridge()
            .push_protect(1)
            .end_nested()
            .end_nested();
        self.change(&request, "keeping a bridge's port out of its spanning tree")
    }

    /// Returns all interfaces.
    pub(crate) fn links(&mut self) -> Result<Vec<Link>, Error> {
        let mut request = rt_link::Request::new().op_getlink_dump(&Ifinfomsg::new());
        request.encode().push_ext_mask(RtextFilter::SkipStats as u32);
        let links = self.list(&request, |payload| {
            let (header, attributes) = rt_link::OpGetlinkDump::decode_reply(payload);
            Some(Link::new(&header, &attributes))
        });
        links.map_err(|refusal| refusal.into_error("listing the network interfaces"))
    }

    /// Returns the names of all bridges: those of the kernel and those of Open vSwitch. (The latter
    /// are listed, but accept ports only from Open vSwitch itself.)
    pub(crate) fn bridges(&mut self) -> Result<Vec<String>, Error> {
        let mut links = self.links()?;
        links.retain(|link| matches!(link.kind.as_deref(), Some("bridge" | "openvswitch")));
        Ok(links.into_iter().map(|link| link.name).collect())
    }

    /// Returns the IPv4 networks that interfaces have by their addresses.
    pub(crate) fn addresses(&mut self) -> Result<Vec<AddressOnLink>, Error> {
        let request = rt_addr::Request::new().op_getaddr_dump(&ipv4_of(0, 0));
        let addresses = self.list(&request, |payload| {
            let (header, attributes) = rt_addr::OpGetaddrDump::decode_reply(payload);
            let v4 = |address| match address {
                Ok(IpAddr::V4(address)) => Some(address),
                _ => None,
            };
            // On a line between two, IFA_ADDRESS is the other end.
            let network = v4(attributes.get_address());
            let address = v4(attributes.get_local()).or(network)?;
            Some(AddressOnLink {
                index: header.ifa_index,
                address,
                network: network.unwrap_or(address),
                prefix_len: header.ifa_prefixlen,
            })
        });
        addresses.map_err(|refusal| refusal.into_error("listing the addresses of this host"))
    }

    /// Returns the IPv4 routes of all tables but the kernel's own for local addresses.
    pub(crate) fn routes(&mut self) -> Result<Vec<Route>, Error> {
        let mut header = Rtmsg::new();
        header.rtm_family = libc::AF_INET as u8;
        let request = rt_route::Request::new().op_getroute_dump(&header);
        let routes = self.list(&request, |payload| {
            let (header, attributes) = rt_route::OpGetrouteDump::decode_reply(payload);
            let kinds =
                [RtmType::Unicast, RtmType::Blackhole, RtmType::Unreachable, RtmType::Prohibit];
            let network = match attributes.get_dst() {
                Ok(IpAddr::V4(network)) => network,
                _ => Ipv4Addr::UNSPECIFIED,
            };
            kinds.iter().any(|kind| *kind as u8 == header.rtm_type).then(|| Route {
                index: attributes.get_oif().ok(),
                network,
                prefix_len: header.rtm_dst_len,
            })
        });
        routes.map_err(|refusal| refusal.into_error("listing the routes of this host"))
    }

    /// Sends the request of a list. Repeats it if the list changes while the kernel sends it.
    fn list<T>(
        &mut self,
        request: &impl NetlinkRequest,
        mut each: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Refusal> {
        let mut tries = 10;
        loop {
            let mut all = Vec::new();
            tries -= 1;
            match self.socket.request(request, |payload| all.extend(each(payload))) {
                Ok(()) => return Ok(all),
                Err(refusal) if refusal.is(libc::EINTR) && tries > 0 => {}
                Err(refusal) => return Err(refusal),
            }
        }
    }

    fn change(&mut self, request: &impl NetlinkRequest, what: &'static str) -> Result<(), Error> {
        self.socket.request(request, |_| ()).map_err(|refusal| refusal.into_error(what))
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("socket", &self.socket).finish()
    }
}

impl Link {
    fn new(header: &Ifinfomsg, attributes: &IterableLinkAttrs<'_>) -> Self {
        let mac = attributes.get_address().ok().and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        let kind = attributes.get_linkinfo().and_then(|info| info.get_kind()).ok();
        Self {
            index: header.ifi_index.unsigned_abs(),
            name: attributes
                .get_ifname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            up: header.ifi_flags & IfinfoFlags::Up as u32 != 0,
            mtu: attributes.get_mtu().unwrap_or(0),
            mac: mac.map_or(MacAddr6::nil(), MacAddr6::from),
            master: attributes.get_master().ok().filter(|&index| index != 0),
            is_bridge: kind == Some(c"bridge"),
            kind: kind.map(|kind| kind.to_string_lossy().into_owned()),
        }
    }
}

/// Whether an interface can have that name. The rule is that of the kernel's `dev_valid_name`,
/// except that spaces are not checked.
pub(super) fn is_interface_name(name: &str) -> bool {
    (1..libc::IFNAMSIZ).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.bytes().any(|byte| matches!(byte, b'/' | b':' | 0))
}

fn interface(index: u32) -> Ifinfomsg {
    let mut header = Ifinfomsg::new();
    header.ifi_index = index.cast_signed();
    header
}

fn ipv4_of(index: u32, prefix_len: u8) -> Ifaddrmsg {
    let mut header = Ifaddrmsg::new();
    header.ifa_family = libc::AF_INET as u8;
    header.ifa_index = index;
    header.ifa_prefixlen = prefix_len;
    header
}

/// A netlink socket that receives only from the kernel. It belongs to the network namespace of the
/// thread that opened it.
pub(super) struct Socket {
    /// A netlink socket in a type for Unix sockets: std has no netlink sockets, but its datagram
    /// calls (`send`, `recv`, timeouts) are the same for any family once the socket is connected.
    socket: UnixDatagram,
    /// The buffer for answers.
    answer: Box<[u8]>,
    /// The next sequence number.
    sequence: u32,
}

impl Socket {
    /// Opens a socket for a netlink protocol (`NETLINK_ROUTE`, `NETLINK_NETFILTER`) in the calling
    /// thread's network namespace.
    pub(super) fn open(protocol: i32) -> io::Result<Self> {
        // SAFETY: socket(2) takes three numbers and no pointer.
        let fd = check(unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol)
        })?;
        // SAFETY: the call above has just opened this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Errors are to contain the kernel's message, and no copy of the request.
        for option in [consts::NETLINK_EXT_ACK, consts::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            // SAFETY: `on` is an int that lives until the call returns, and the length passed is
            // its length.
            check(unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const on).cast(),
                    size_of_val(&on) as libc::socklen_t,
                )
            })?;
        }
        // SAFETY: a `sockaddr_nl` consists of integers, so all zeroes are a valid value.
        let mut kernel: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        kernel.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        // Connects the socket to the kernel (port 0). From here on the socket refuses messages of
        // other processes, and it has a port of its own.
        // SAFETY: `kernel` lives until the call returns, and the length passed is its length.
        check(unsafe {
            libc::connect(
                fd.as_raw_fd(),
                (&raw const kernel).cast(),
                size_of_val(&kernel) as libc::socklen_t,
            )
        })?;
        let socket = UnixDatagram::from(fd);
        socket.set_read_timeout(Some(NETLINK_TIMEOUT))?;
        socket.set_write_timeout(Some(NETLINK_TIMEOUT))?;
        Ok(Self { socket, answer: vec![0; NETLINK_DATAGRAM_MAX].into(), sequence: 0 })
    }

    /// Sends a request, and calls `each` with the payload of every message of the answer (without
    /// the netlink header).
    pub(super) fn request(
        &mut self,
        request: &impl NetlinkRequest,
        each: impl FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let Protocol::Raw { request_type, .. } = request.protocol() else {
            unreachable!("neither rtnetlink nor nf_tables is generic netlink");
        };
        let sequence = self.sequences(1);
        let payload = request.payload();
        let mut header = Nlmsghdr::new();
        header.len = (Nlmsghdr::len() + payload.len()) as u32;
        header.r#type = request_type;
        header.flags = request.flags() | consts::NLM_F_REQUEST as u16 | consts::NLM_F_ACK as u16;
        header.seq = sequence;
        self.exchange(&[header.as_slice(), payload].concat(), sequence, sequence, each)
    }

    /// Reserves `count` sequence numbers that no earlier request had. Returns the first.
    pub(super) fn sequences(&mut self, count: u32) -> u32 {
        let first = self.sequence;
        self.sequence = self.sequence.wrapping_add(count);
        first
    }

    /// Sends `messages` in one datagram and reads the answers. The messages are numbered from
    /// `first`. Returns when the kernel has acknowledged the message numbered `last`, or has
    /// refused one of them. Skips answers to earlier requests, which may still arrive after an
    /// error.
    pub(super) fn exchange(
        &mut self,
        messages: &[u8],
        first: u32,
        last: u32,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let sent = loop {
            match self.socket.send(messages) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => break sent?,
            }
        };
        if sent != messages.len() {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        let mut interrupted = false;
        loop {
            let received = match self.socket.recv(&mut self.answer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let text = format!("the kernel did not answer within {NETLINK_TIMEOUT:?}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
                }
                Err(error) => return Err(error.into()),
            };
            let mut rest = &self.answer[..received];
            while !rest.is_empty() {
                let (header, payload) = take_message(&mut rest)?;
                if header.seq.wrapping_sub(first) > last.wrapping_sub(first) {
                    continue;
                }
                interrupted |= header.flags & consts::NLM_F_DUMP_INTR as u16 != 0;
                match libc::c_int::from(header.r#type) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        if let Some(mut refusal) = Refusal::of(&header, payload)? {
                            refusal.message = header.seq.wrapping_sub(first);
                            return Err(refusal);
                        }
                        if header.seq == last {
                            return if interrupted {
                                Err(io::Error::from_raw_os_error(libc::EINTR).into())
                            } else {
                                Ok(())
                            };
                        }
                    }
                    libc::NLMSG_NOOP => {}
                    _ => each(payload),
                }
            }
        }
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("fd", &self.socket.as_raw_fd()).finish_non_exhaustive()
    }
}

/// Removes the first message from a datagram. Returns its header and its payload.
fn take_message<'a>(datagram: &mut &'a [u8]) -> io::Result<(Nlmsghdr, &'a [u8])> {
    let cut_off = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer was cut off");
    let header = datagram.get(..Nlmsghdr::len()).and_then(Nlmsghdr::new_from_slice);
    let header = header.ok_or_else(cut_off)?;
    let len = header.len as usize;
    let payload = datagram.get(Nlmsghdr::len()..len).ok_or_else(cut_off)?;
    *datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    Ok((header, payload))
}

/// Why a request failed: the kernel's error, and its message if it sent one.
#[derive(Debug)]
pub(super) struct Refusal {
    /// The kernel's error. `None` if the failure is not an error of the system.
    errno: Option<i32>,
    /// Which message of the request was refused, counted from 0.
    message: u32,
    source: io::Error,
}

impl Refusal {
    /// Reads an error or done message. Returns `None` if it reports success.
    fn of(header: &Nlmsghdr, payload: &[u8]) -> io::Result<Option<Self>> {
        let Some((code, rest)) = payload.split_first_chunk::<4>() else {
            // A done message without an error code.
            return Ok(None);
        };
        let errno = i32::from_ne_bytes(*code).wrapping_neg();
        if errno == 0 {
            return Ok(None);
        }
        // An error message repeats the request's header. Because of NETLINK_CAP_ACK it does not
        // repeat the rest of the request.
        let repeated =
            if libc::c_int::from(header.r#type) == libc::NLMSG_ERROR { Nlmsghdr::len() } else { 0 };
        let text = (header.flags & consts::NLM_F_ACK_TLVS as u16 != 0)
            .then(|| rest.get(repeated..))
            .flatten()
            .and_then(|attributes| NlmsgerrAttrs::new(attributes).get_msg().ok())
            .map(|text| text.to_string_lossy());
        let plain = io::Error::from_raw_os_error(errno);
        let source = match text {
            Some(text) => io::Error::new(plain.kind(), format!("{plain}: {text}")),
            None => plain,
        };
        Ok(Some(Self { errno: Some(errno), message: 0, source }))
    }

    /// Whether the kernel answered with this error.
    pub(super) fn is(&self, errno: i32) -> bool {
        self.errno == Some(errno)
    }

    /// Whether the request was refused because a table of nf_tables belongs to another socket. (If
    /// the process lacks the privilege, the kernel refuses the first message, which begins the batch.)
    pub(super) fn belongs_to_another(&self) -> bool {
        self.is(libc::EPERM) && self.message > 0
    }

    /// Converts into the error for the user. `trying` says what was tried, such as "setting the MTU
    /// of a network interface".
    pub(super) fn into_error(self, trying: &'static str) -> Error {
        if self.is(libc::EPERM) || self.is(libc::EACCES) {
            needs_net_admin(trying)
        } else {
            Error::Io { what: trying, source: self.source }
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(source: io::Error) -> Self {
        Self { errno: source.raw_os_error(), message: 0, source }
    }
}

/// Returns the error that says what privilege is missing for `trying`.
pub(super) fn needs_net_admin(trying: &str) -> Error {
    Error::PermissionDenied {
        needs: format!(
            "CAP_NET_ADMIN for {trying} (run as root, or let root prepare a persistent TAP: \
             ip tuntap add dev NAME mode tap user USER; ip link set NAME up)"
        ),
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Network namespaces for tests, so that no test touches the host's own namespace.
#[cfg(test)]
pub(crate) mod testing {
    use std::fs::File;
    use std::io::{self, Write as _};
    use std::os::fd::AsRawFd as _;
    use std::process::Command;

    /// A new network namespace. It disappears when this value and everything created in it are
    /// gone.
    pub(crate) struct Namespace {
        file: File,
    }

    impl Namespace {
        /// Creates a namespace. Returns `None`, and reports the skipped test, if this process may
        /// not create one or one of the programs is missing.
        pub(crate) fn new(programs: &[&str]) -> Option<Self> {
            if std::env::var_os("VMRING_SKIP_TAP").is_some() {
                skip("VMRING_SKIP_TAP is set");
                return None;
            }
            for program in programs {
                if let Err(error) = Command::new(program).arg("-V").output() {
                    skip(&format!("needs the program {program}: {error}"));
                    return None;
                }
            }
            let made = std::thread::spawn(|| {
                // SAFETY: unshare(2) takes a flag and no pointer. It changes only this thread,
                // which ends here.
                super::check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
                File::open("/proc/thread-self/ns/net")
            });
            match made.join().unwrap() {
                Ok(file) => Some(Self { file }),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    skip("needs CAP_SYS_ADMIN for a network namespace");
                    None
                }
                Err(error) => panic!("no network namespace: {error}"),
            }
        }

        /// Runs `body` on a new thread in this namespace. Programs that `body` starts run there
        /// too.
        pub(crate) fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
            std::thread::scope(|scope| {
                let inside = scope.spawn(|| {
                    let fd = self.file.as_raw_fd();
                    // SAFETY: setns(2) takes two numbers and no pointer. `self.file` keeps the
                    // descriptor open. The call changes only this thread, which ends after `body`.
                    super::check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) }).unwrap();
                    body()
                });
                inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        }

        /// Returns a path by which `ip link set NAME netns PATH` finds this namespace.
        pub(crate) fn path(&self) -> String {
            format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
        }
    }

    /// Runs a program in the calling thread's namespace and returns its output. Panics if it fails.
    pub(crate) fn run(line: &str) -> String {
        let mut words = line.split_whitespace();
        let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{line}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Reports a skipped test. Writes to stderr directly, because the test harness hides what a
    /// passing test prints.
    pub(crate) fn skip(why: &str) {
        let _ = writeln!(io::stderr(), "skipped: {why}");
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Namespace, run};
    use super::*;

    #[test]
    fn an_interface_is_set_up_and_down() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            let mut netlink = Netlink::open().unwrap();
            let lo = netlink.link("lo").unwrap().unwrap();
            assert_eq!((lo.name.as_str(), lo.up, lo.mac), ("lo", false, MacAddr6::nil()));
            netlink.set_up(lo.index, true).unwrap();
            assert!(netlink.link("lo").unwrap().unwrap().up);
            assert!(run("ip -br link show lo").contains("UP"));
            netlink.set_up(lo.index, false).unwrap();
            assert_eq!(netlink.link("lo").unwrap().unwrap(), lo);
        });
    }

    #[test]
    fn an_interface_that_is_not_there_is_none() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            let mut netlink = Netlink::open().unwrap();
            for name in ["tap7", "", ".", "a/b", "sixteen-bytes-xx", "lo\0"] {
                assert_eq!(netlink.link(name).unwrap(), None, "{name:?}");
            }
        });
    }

    #[test]
    fn mtu_and_mac_are_set() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add v0 type veth peer name v1");
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link("v0").unwrap().unwrap().index;
            let mac = MacAddr6::new(2, 0, 0, 1, 2, 3);
            netlink.set_mtu(index, 9000).unwrap();
            netlink.set_mac(index, mac).unwrap();
            let link = netlink.link("v0").unwrap().unwrap();
            assert_eq!((link.mtu, link.mac, link.up), (9000, mac, false));
            assert_eq!((link.kind.as_deref(), link.is_bridge), (Some("veth"), false));
            let shown = run("ip link show v0");
            assert!(shown.contains("mtu 9000") && shown.contains("02:00:00:01:02:03"), "{shown}");
        });
    }

    #[test]
    fn an_interface_joins_a_bridge_and_leaves_it() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add v0 type veth peer name v1");
            let mut netlink = Netlink::open().unwrap();
            assert_eq!(netlink.bridges().unwrap(), [""; 0]);
            run("ip link add br0 type bridge");
            run("ip link add br1 type bridge");
            assert_eq!(netlink.bridges().unwrap(), ["br0", "br1"]);
            let bridge = netlink.link("br0").unwrap().unwrap();
            let port = netlink.link("v0").unwrap().unwrap();
            assert!(bridge.is_bridge);
            assert_eq!(port.master, None);

            netlink.set_master(port.index, Some(bridge.index)).unwrap();
            assert_eq!(netlink.link("v0").unwrap().unwrap().master, Some(bridge.index));
            assert!(run("ip link show master br0").contains("v0"));
            netlink.set_master(port.index, None).unwrap();
            assert_eq!(netlink.link("v0").unwrap().unwrap().master, None);

            netlink.delete_link(bridge.index).unwrap();
            assert_eq!(netlink.link("br0").unwrap(), None);
            assert_eq!(netlink.bridges().unwrap(), ["br1"]);
        });
    }

    /// There are more interfaces than one datagram of the kernel's list holds.
    #[test]
    fn a_long_list_is_read_to_its_end() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            let mut netlink = Netlink::open().unwrap();
            for n in 0..60 {
                run(&format!("ip link add b{n:02} type bridge"));
            }
            let mut names = netlink.bridges().unwrap();
            names.sort();
            let all: Vec<_> = (0..60).map(|n| format!("b{n:02}")).collect();
            assert_eq!(names, all);
        });
    }

    #[test]
    fn an_address_is_added_once_and_removed_once() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add br0 type bridge");
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link("br0").unwrap().unwrap().index;
            let address = Ipv4Addr::new(192, 168, 77, 1);
            assert!(netlink.add_address(index, address, 24).unwrap());
            assert!(!netlink.add_address(index, address, 24).unwrap());
            assert!(run("ip -4 -br address show br0").contains("192.168.77.1/24"));
            assert!(!netlink.remove_address(index, address, 25).unwrap());
            assert!(netlink.remove_address(index, address, 24).unwrap());
            assert!(!netlink.remove_address(index, address, 24).unwrap());
            assert!(!run("ip -4 -br address show br0").contains("192.168.77.1"));
        });
    }

    /// The socket is opened inside the namespace and used outside.
    #[test]
    fn a_socket_stays_in_the_namespace_it_was_opened_in() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        let mut netlink = namespace.run(|| {
            run("ip link add only-inside type bridge");
            Netlink::open().unwrap()
        });
        assert_eq!(Netlink::open().unwrap().link("only-inside").unwrap(), None);
        assert!(netlink.link("only-inside").unwrap().unwrap().is_bridge);
    }

    #[test]
    fn a_refusal_says_why() {
        let Some(namespace) = Namespace::new(&["ip"]) else { return };
        namespace.run(|| {
            run("ip link add v0 type veth peer name v1");
            let mut netlink = Netlink::open().unwrap();
            let index = netlink.link("v0").unwrap().unwrap().index;
            let error = netlink.set_mtu(index, 9).unwrap_err();
            assert_eq!(
                error.to_string(),
                "setting the MTU of a network interface: \
                 Invalid argument (os error 22): mtu less than device minimum"
            );
            // After a refusal the next request gets its own answer.
            assert_eq!(netlink.link("v0").unwrap().unwrap().mtu, 1500);
            let error = netlink.delete_link(7777).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error}");
        });
    }

    #[test]
    fn without_the_privilege_the_error_says_what_is_needed() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            // The socket is opened only after this, because the kernel checks the privilege of the
            // thread that opened the socket as well as that of the thread that uses it.
            // SAFETY: the raw call takes three numbers and no pointer. Unlike libc's setresuid, it
            // changes only this thread, which ends with the test.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            assert_eq!(result, 0);
            let mut netlink = Netlink::open().unwrap();
            let lo = netlink.link("lo").unwrap().unwrap();
            let error = netlink.set_up(lo.index, true).unwrap_err();
            assert!(matches!(error, Error::PermissionDenied { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains("CAP_NET_ADMIN for setting a network interface up"), "{text}");
            assert!(text.contains("ip tuntap add"), "{text}");
        });
    }

    /// An earlier request has timed out, so its answer arrives before the answer to the next
    /// request.
    #[test]
    fn answers_to_an_earlier_request_are_skipped() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            let mut netlink = Netlink::open().unwrap();
            let late = netlink.socket.sequences(1);
            let mut header = Nlmsghdr::new();
            header.len = (Nlmsghdr::len() + Ifinfomsg::len()) as u32;
            header.r#type = libc::RTM_GETLINK;
            header.flags = (consts::NLM_F_REQUEST | consts::NLM_F_ACK) as u16;
            header.seq = late;
            let question = [header.as_slice(), interface(7777).as_slice()].concat();
            netlink.socket.socket.send(&question).unwrap();
            // The late answer would be "no such device".
            assert_eq!(netlink.link("lo").unwrap().unwrap().index, 1);
        });
    }

    #[test]
    fn a_cut_off_answer_is_an_error() {
        let mut whole = Nlmsghdr::new();
        whole.len = 20;
        let mut bytes = [whole.as_slice(), &[1, 2, 3, 4]].concat();
        assert_eq!(take_message(&mut bytes.as_slice()).unwrap().1, [1, 2, 3, 4]);
        bytes.pop();
        assert!(take_message(&mut bytes.as_slice()).is_err());
        assert!(take_message(&mut &bytes[..7]).is_err());
        // The length is shorter than the header itself.
        bytes[0] = 3;
        assert!(take_message(&mut bytes.as_slice()).is_err());
    }
}
