//! Network namespaces, TAPs, and the frames that go through them.
//!
//! Nothing here touches the network of the host. Every name, address and counter belongs to a
//! namespace that a thread made for itself. The namespace goes away with the thread and its files.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::thread;

use crate::result::Result;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
/// The longest Ethernet frame of an MTU of 1,500.
pub(crate) const FULL_FRAME: usize = 1514;
/// The shortest Ethernet frame.
pub(crate) const SMALL_FRAME: usize = 60;
/// How many packets a TAP's queue holds. It is more than any reader takes at once, and full frames still
/// fit into a processor's second or third cache.
pub(crate) const QUEUE: usize = 1000;

/// `Ok` if the system call did not return -1.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Moves the calling thread into a new network namespace without addresses, names or noise.
fn leave_network() -> Result<()> {
    // SAFETY: unshare takes no pointer, and moves only this thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    // Packets that IPv6 sends by itself would be counted as ours. These files belong to the calling
    // thread's namespace. A kernel without IPv6 does not have them.
    for which in ["default", "all"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        match fs::write(path, "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    ip("link set lo up")
}

/// Runs `work` on a thread in a network namespace of its own.
pub(crate) fn in_new_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            leave_network()?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err("a measuring thread panicked".into()))
    })
}

/// A network namespace for others to work in. It lives as long as this value and as long as
/// something is in it.
pub(crate) struct Namespace(File);

impl Namespace {
    pub(crate) fn new() -> Result<Self> {
        in_new_namespace(|| Ok(Self(File::open("/proc/thread-self/ns/net")?)))
    }

    /// The namespace of a process's first thread.
    pub(crate) fn of_process(process: u32) -> Result<Self> {
        Ok(Self(File::open(format!("/proc/{process}/ns/net"))?))
    }

    /// The same namespace once more.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// A path at which other programs find it while this value lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Runs `work` on a thread in this namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: setns takes no pointer, and moves only this thread.
                check(unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) })?;
                work()
            });
            thread.join().unwrap_or_else(|_| Err("a thread in a namespace panicked".into()))
        })
    }

    /// Moves an interface here from the calling thread's namespace.
    pub(crate) fn adopt(&self, interface: &str) -> Result<()> {
        ip(&format!("link set {interface} netns {}", self.path()))
    }
}

/// Runs `ip` in the calling thread's namespace.
pub(crate) fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(format!("`ip {arguments}` failed: {}", reason.trim()).into())
}

/// One queue of a TAP, without packet information.
pub(crate) struct Tap {
    file: File,
    name: String,
}

/// Whether a TAP has the virtio header, and exchanges large packets that the other side segments.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offload {
    Off,
    On,
}

/// A request about the interface `name`.
fn request_for(name: &str) -> Result<libc::ifreq> {
    // SAFETY: an ifreq is plain old data, and all zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte terminates the name.
    if name.len() >= request.ifr_name.len() {
        return Err(format!("{name} is too long for a network interface's name").into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

impl Tap {
    /// A new non-blocking TAP in the calling thread's namespace, not yet up.
    pub(crate) fn open(name: &str, offload: Offload) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut request = request_for(name)?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
        if offload == Offload::On {
            flags |= libc::IFF_VNET_HDR;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        if offload == Offload::On {
            let length: libc::c_int = VIRTIO_HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
            check(unsafe {
                libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length)
            })?;
            let wanted = libc::TUN_F_CSUM
                | libc::TUN_F_TSO4
                | libc::TUN_F_TSO6
                | libc::TUN_F_USO4
                | libc::TUN_F_USO6;
            // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
            check(unsafe {
                libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(wanted))
            })?;
        }
        Ok(Self { file, name: name.to_owned() })
    }

    /// A TAP that is up and whose queue holds `queue` packets.
    pub(crate) fn open_up(name: &str, queue: usize) -> Result<Self> {
        let tap = Self::open(name, Offload::Off)?;
        ip(&format!("link set {name} txqueuelen {queue} up"))?;
        Ok(tap)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A second descriptor of the same queue.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Bytes of the virtio header with the number of buffers, as in virtio 1.
pub(crate) const VIRTIO_HEADER: usize = 12;

/// The kernel's counters of one interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Packets that the kernel received: for a TAP, those written.
    pub(crate) received: u64,
    /// Their bytes.
    pub(crate) received_bytes: u64,
    /// Packets that the kernel sent: for a TAP, those read.
    pub(crate) sent: u64,
    /// Their bytes.
    pub(crate) sent_bytes: u64,
    /// Packets that the kernel could not send: for a TAP, those that found its queue full.
    pub(crate) dropped: u64,
}

/// The counters of `name` in the calling thread's namespace.
pub(crate) fn counters(name: &str) -> Result<Counters> {
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    let fields: Vec<u64> = table
        .lines()
        .filter_map(|line| line.trim().split_once(':'))
        .find(|(interface, _)| *interface == name)
        .ok_or_else(|| format!("no interface {name}"))?
        .1
        .split_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    // Eight columns for receiving, eight for sending: bytes, packets, errors, drops, ...
    let [received_bytes, received, .., sent_bytes, sent, _, dropped, _, _, _, _] = fields[..]
    else {
        return Err(format!("/proc/net/dev has {} columns", fields.len()).into());
    };
    Ok(Counters { received, received_bytes, sent, sent_bytes, dropped })
}

/// Disables on an interface of the calling thread's namespace what a TAP without offload does not
/// have. Without checksums there are no scattered packets and no segmentation either.
pub(crate) fn without_checksums(name: &str) -> Result<()> {
    /// `struct ethtool_value` of linux/ethtool.h.
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    const ETHTOOL_STXCSUM: u32 = 0x17;

    // SAFETY: socket takes no pointer.
    let socket =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut value = EthtoolValue { command: ETHTOOL_STXCSUM, data: 0 };
    let mut request = request_for(name)?;
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: SIOCETHTOOL reads one ifreq and the value that it points to; both outlive the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) })?;
    Ok(())
}

/// A UDP frame of `length` bytes to a station that does not exist. The kernel looks at its address
/// and drops it, so no answer comes back.
pub(crate) fn udp_frame(length: usize) -> Vec<u8> {
    let mut frame = vec![0; length];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0x99]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 0x11]);
    frame[12..14].copy_from_slice(&[8, 0]);
    let packet = &mut frame[14..];
    packet[..2].copy_from_slice(&[0x45, 0]);
    packet[2..4].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    packet[8..10].copy_from_slice(&[64, 17]);
    packet[12..16].copy_from_slice(&[10, 9, 0, 2]);
    packet[16..20].copy_from_slice(&[10, 9, 0, 1]);
    let mut sum: u32 = packet[..20]
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet[20..24].copy_from_slice(&[0x13, 0x88, 0x13, 0x89]);
    packet[24..26].copy_from_slice(&((length - 34) as u16).to_be_bytes());
    frame
}

/// A packet socket that puts frames straight into an interface's queue.
pub(crate) struct PacketSocket {
    socket: OwnedFd,
}

/// The number of frames that one `sendmmsg` takes.
const SEND_BATCH: usize = 64;

impl PacketSocket {
    /// A socket on interface `name` of the calling thread's namespace.
    pub(crate) fn on(name: &str) -> Result<Self> {
        // SAFETY: socket takes no pointer; with a protocol of 0 it only sends.
        let socket = check(unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0)
        })?;
        // SAFETY: the descriptor is new, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let name = std::ffi::CString::new(name)?;
        // SAFETY: the name is a C string that outlives the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        // SAFETY: a sockaddr_ll is plain old data, and all zeroes are a valid value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as i32;
        // SAFETY: the address and its length belong together and outlive the call.
        check(unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        })?;
        let yes: libc::c_int = 1;
        // SAFETY: the option is one int, which outlives the call.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const yes).cast(),
                size_of::<libc::c_int>() as u32,
            )
        })?;
        Ok(Self { socket })
    }

    /// Sends `frame` `count` times. Frames that find the queue full are lost, and the interface
    /// counts them.
    pub(crate) fn send(&self, frame: &[u8], count: usize) -> Result<()> {
        let mut part =
            libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
        // SAFETY: an mmsghdr is plain old data, and all zeroes (no address, no control) are a valid
        // value.
        let mut messages: [libc::mmsghdr; SEND_BATCH] = unsafe { mem::zeroed() };
        for message in &mut messages {
            message.msg_hdr.msg_iov = &raw mut part;
            message.msg_hdr.msg_iovlen = 1;
        }
        let mut left = count;
        while left > 0 {
            let batch = left.min(SEND_BATCH);
            // SAFETY: the messages, their one part and the frame outlive the call, which only reads
            // the frame.
            let sent = check(unsafe {
                libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), batch as u32, 0)
            });
            match sent {
                Ok(sent) => left -= sent as usize,
                // The queue was full, and that frame is lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => left -= 1,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
