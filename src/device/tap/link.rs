//! Network interfaces of the host, over rtnetlink: what `ip link` and `ip address` do.
//!
//! [`Socket`] below [`Netlink`] is any netlink socket; `nat.rs` speaks to nf_tables over it.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::{fmt, io};

use macaddr::MacAddr6;
use netlink_bindings::builtin::{NlmsgerrAttrs, Nlmsghdr};
use netlink_bindings::consts;
use netlink_bindings::rt_addr::{self, Ifaddrmsg};
use netlink_bindings::rt_link::{self, IfinfoFlags, Ifinfomsg, IterableLinkAttrs, RtextFilter};
use netlink_bindings::traits::{NetlinkRequest, Protocol};

use super::limits::{NETLINK_DATAGRAM_MAX, NETLINK_TIMEOUT};
use crate::error::Error;

/// The interfaces of one network namespace: that of the thread that opened it, whichever thread
/// uses it later.
pub(crate) struct Netlink {
    socket: Socket,
}

/// One interface, as it was when asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Its number, which a rename does not change.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: String,
    /// Whether it was set up (`IFF_UP`); a cable need not be there.
    pub(crate) up: bool,
    /// Largest IP packet, bytes.
    pub(crate) mtu: u32,
    /// Its address; nil if it has none of six bytes.
    pub(crate) mac: MacAddr6,
    /// The bridge (or other master) that it is a port of.
    pub(crate) master: Option<u32>,
    /// Whether it is a bridge of the kernel, which takes ports through
    /// [`set_master`](Netlink::set_master).
    pub(crate) is_bridge: bool,
    /// What the kernel calls its kind: `bridge`, `tun`, `veth`. A plain network card has none.
    pub(crate) kind: Option<String>,
}

impl Netlink {
    /// A socket in this thread's network namespace.
    pub(crate) fn open() -> Result<Self, Error> {
        let socket = Socket::open(consts::NETLINK_ROUTE)
            .map_err(Error::io("opening a socket to the kernel's network interfaces"))?;
        Ok(Self { socket })
    }

    /// The interface of that name. `None`: there is none.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, Error> {
        if !is_interface_name(name) {
            return Ok(None);
        }
        let mut request = rt_link::Request::new().op_getlink_do(&Ifinfomsg::new());
        request
            .encode()
            .push_ifname_bytes(name.as_bytes())
            .push_ext_mask(RtextFilter::SkipStats as u32);
        let mut link = None;
        let answer = self.socket.request(&request, |payload| {
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

    /// Sets the largest IP packet, in bytes.
    pub(crate) fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), Error> {
        let mut request = rt_link::Request::new().op_setlink_do(&interface(index));
        request.encode().push_mtu(mtu);
        self.change(&request, "setting the MTU of a network interface")
    }

    /// Sets the address. Some drivers take it only while the interface is down.
    pub(crate) fn set_mac(&mut self, index: u32, mac: MacAddr6) -> Result<(), Error> {
        let mut request = rt_link::Request::new().op_setlink_do(&interface(index));
        request.encode().push_address(mac.as_bytes());
        self.change(&request, "setting the MAC address of a network interface")
    }

    /// Makes it a port of a bridge, or of none.
    pub(crate) fn set_master(&mut self, index: u32, master: Option<u32>) -> Result<(), Error> {
        let mut request = rt_link::Request::new().op_setlink_do(&interface(index));
        request.encode().push_master(master.unwrap_or(0));
        let what = match master {
            Some(_) => "adding a network interface to a bridge",
            None => "taking a network interface off its bridge",
        };
        self.change(&request, what)
    }

    /// Gives it an IPv4 address. `false`: it had that one already.
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

    /// Takes an IPv4 address away. `false`: it did not have that one.
    pub(crate) fn remove_address(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        prefix_len: u8,
    ) -> Result<bool, Error> {
        let mut request = rt_addr::Request::new().op_deladdr_do(&ipv4_of(index, prefix_len));
        // IFA_ADDRESS, too, is compared, with its prefix length.
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

    /// The names of the bridges there are: the kernel's, and Open vSwitch's (which show, but take
    /// ports only from Open vSwitch itself).
    pub(crate) fn bridges(&mut self) -> Result<Vec<String>, Error> {
        let mut request = rt_link::Request::new().op_getlink_dump(&Ifinfomsg::new());
        request.encode().push_ext_mask(RtextFilter::SkipStats as u32);
        let mut tries = 3;
        loop {
            let mut names = Vec::new();
            let answer = self.socket.request(&request, |payload| {
                let (header, attributes) = rt_link::OpGetlinkDump::decode_reply(payload);
                let link = Link::new(&header, &attributes);
                if matches!(link.kind.as_deref(), Some("bridge" | "openvswitch")) {
                    names.push(link.name);
                }
            });
            tries -= 1;
            match answer {
                Ok(()) => return Ok(names),
                // The list changed while it was read.
                Err(refusal) if refusal.is(libc::EINTR) && tries > 0 => {}
                Err(refusal) => return Err(refusal.into_error("listing the network interfaces")),
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

/// Whether an interface can have that name: the kernel's `dev_valid_name`, but for spaces.
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

/// A netlink socket that hears only the kernel. Bound to a network namespace when it is opened.
pub(super) struct Socket {
    /// std has no netlink sockets, but its datagram calls (`send`, `recv`, timeouts) are the same
    /// for any family once the socket is connected.
    socket: UnixDatagram,
    answer: Box<[u8]>,
    sequence: u32,
}

impl Socket {
    pub(super) fn open(protocol: i32) -> io::Result<Self> {
        // SAFETY: socket(2) takes three numbers and no memory.
        let fd = check(unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol)
        })?;
        // SAFETY: the descriptor was just opened, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The kernel's sentences in errors; errors without a copy of the request.
        for option in [consts::NETLINK_EXT_ACK, consts::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            // SAFETY: `on` is an int that lives through the call, and the length is its length.
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
        // SAFETY: all zeros is a valid sockaddr_nl: it is made of integers.
        let mut kernel: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        kernel.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        // Connected to the kernel (port 0): other processes' messages are refused, and the socket
        // has a port of its own from here on.
        // SAFETY: `kernel` lives through the call, and the length is its length.
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

    /// Asks, and calls `each` with every message of the answer (without its header).
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

    /// The first of `count` sequence numbers that no earlier request had.
    pub(super) fn sequences(&mut self, count: u32) -> u32 {
        let first = self.sequence;
        self.sequence = self.sequence.wrapping_add(count);
        first
    }

    /// Sends `messages` in one datagram, numbered from `first`, and reads until the one numbered
    /// `last` is acknowledged or one of them is refused. Answers to earlier requests, which may
    /// be there after an error, are skipped.
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

/// Takes the next message off a datagram: its header, and what follows in it.
fn take_message<'a>(datagram: &mut &'a [u8]) -> io::Result<(Nlmsghdr, &'a [u8])> {
    let cut_off = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer was cut off");
    let header = datagram.get(..Nlmsghdr::len()).and_then(Nlmsghdr::new_from_slice);
    let header = header.ok_or_else(cut_off)?;
    let len = header.len as usize;
    let payload = datagram.get(Nlmsghdr::len()..len).ok_or_else(cut_off)?;
    *datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    Ok((header, payload))
}

/// Why something was not done: the kernel's error, and its sentence if it had one.
#[derive(Debug)]
pub(super) struct Refusal {
    errno: Option<i32>,
    message: u32,
    source: io::Error,
}

impl Refusal {
    /// What an error or done message says. `None`: all is well.
    fn of(header: &Nlmsghdr, payload: &[u8]) -> io::Result<Option<Self>> {
        let Some((code, rest)) = payload.split_first_chunk::<4>() else {
            // A "done" without a code.
            return Ok(None);
        };
        let errno = i32::from_ne_bytes(*code).wrapping_neg();
        if errno == 0 {
            return Ok(None);
        }
        // After an error the request's header is repeated (NETLINK_CAP_ACK: nothing more of it).
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

    /// Which message of several was refused, counted from 0.
    pub(super) fn message(&self) -> u32 {
        self.message
    }

    /// The error to show. `trying` is what was tried: "setting the MTU of a network interface".
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

/// What lets this process do it.
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

/// Network namespaces for tests, so that the host's own is never touched.
#[cfg(test)]
pub(crate) mod testing {
    use std::fs::File;
    use std::io::{self, Write as _};
    use std::os::fd::AsRawFd as _;
    use std::process::Command;

    /// A network namespace of its own, gone when this and what was made in it are.
    pub(crate) struct Namespace {
        file: File,
    }

    impl Namespace {
        /// `None`, and says so, if this process may not make one or a program is missing.
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
                // SAFETY: takes a flag and no memory; it concerns this thread, which ends here.
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

        /// Runs `body` in a thread that is inside, and so the programs that `body` starts.
        pub(crate) fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
            std::thread::scope(|scope| {
                let inside = scope.spawn(|| {
                    let fd = self.file.as_raw_fd();
                    // SAFETY: the descriptor is open, and the call concerns this thread only.
                    super::check(unsafe { libc::setns(fd, libc::CLONE_NEWNET) }).unwrap();
                    body()
                });
                inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        }

        /// A path by which `ip link set NAME netns PATH` finds it.
        pub(crate) fn path(&self) -> String {
            format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
        }
    }

    /// Runs a program in the calling thread's namespace; what it printed. Panics if it fails.
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

    /// Past the harness, which hides what a passing test prints.
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

    /// More interfaces than one datagram of the kernel's list holds.
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

    /// Opened inside, used outside.
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
            // After a refusal the next answer is the right one.
            assert_eq!(netlink.link("v0").unwrap().unwrap().mtu, 1500);
            let error = netlink.delete_link(7777).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error}");
        });
    }

    #[test]
    fn without_the_privilege_the_error_says_what_is_needed() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            // The thread that opens the socket counts as well as the one that uses it.
            // SAFETY: the raw call takes a number and no memory and, unlike libc's setuid, changes
            // this thread only; it ends with the test.
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

    /// As after a time-out: what nobody waited for comes before the next answer.
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
            // Not "no such device", which is the late answer.
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
        // A length that is shorter than the header itself.
        bytes[0] = 3;
        assert!(take_message(&mut bytes.as_slice()).is_err());
    }
}
