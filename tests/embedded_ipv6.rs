//! A kernel as a guest of the embedded network over IPv6: a network namespace behind a TAP, whose frames
//! go to a port of the network. It gets its address, its routes and its name servers as a guest does.

use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeWriter, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;

use vmring_embedded::{Ipv6Config, Network, NetworkConfig, PortConfig, Receiver, Sender};

use crate::netns::{has, in_namespace, sh, try_sh};
use crate::support::{LONG, eventually, skip, stage, unique};

const MTU: u32 = 1400;
/// The name of the guest's interface.
const CARD: &str = "guest0";

/// Makes a TAP of this name, whose reads do not block.
fn tap() -> Option<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").ok()?;
    // SAFETY: an `ifreq` consists of numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(CARD.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return None;
    }
    // SAFETY: the call takes no pointer.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    (done == 0).then_some(file)
}

/// Carries frames between a TAP and a port until it is dropped.
struct Relay {
    /// What wakes the thread, until it is dropped.
    bell: Option<Arc<PipeWriter>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Relay {
    fn start(tap: File, network: &Arc<Network<Vec<u8>>>) -> Self {
        let (listener, bell) = io::pipe().expect("a pipe");
        let bell = Arc::new(bell);
        let ringer = Arc::downgrade(&bell);
        let wake = Arc::new(move || {
            if let Some(bell) = ringer.upgrade() {
                let _ = (&*bell).write(&[1]);
            }
        });
        let (receiver, sender) = network.join(PortConfig::new([1; 16], wake)).unwrap().split();
        let thread = thread::spawn(move || carry(tap, listener, receiver, sender));
        Self { bell: Some(bell), thread: Some(thread) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The pipe has no writer then, and the thread ends.
        self.bell = None;
        let ended = self.thread.take().expect("taken here only").join();
        if !thread::panicking() {
            ended.expect("the relay");
        }
    }
}

fn carry(
    mut tap: File,
    mut listener: impl Read + AsRawFd,
    mut receiver: Receiver<Vec<u8>>,
    mut sender: Sender<Vec<u8>>,
) {
    let size = sender.network().max_packet_size();
    for _ in 0..64 {
        receiver.post(vec![0; size]).expect("a place");
    }
    let mut frame = vec![0; 65_535];
    loop {
        while let Some((buffer, len)) = receiver.collect() {
            let _ = tap.write(&buffer[..len]);
            receiver.post(buffer).expect("a place");
        }
        while let Ok(len) = tap.read(&mut frame) {
            sender.send(&frame[..len]);
        }
        sender.flush();
        if !receiver.arm() {
            continue;
        }
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut entries = [entry(tap.as_raw_fd()), entry(listener.as_raw_fd())];
        // SAFETY: there are two entries.
        unsafe { libc::poll(entries.as_mut_ptr(), 2, LONG.as_millis() as libc::c_int) };
        if entries[1].revents != 0 && listener.read(&mut [0; 64]).unwrap_or(0) == 0 {
            return;
        }
    }
}

/// Enables IPv6 for interfaces that are made from now on, as a guest has it.
fn enable_ipv6() -> bool {
    for (switch, value) in
        [("disable_ipv6", "0"), ("forwarding", "0"), ("accept_ra", "1"), ("autoconf", "1")]
    {
        for set in ["all", "default"] {
            if fs::write(format!("/proc/sys/net/ipv6/conf/{set}/{switch}"), value).is_err() {
                skip("this kernel has no IPv6");
                return false;
            }
        }
    }
    true
}

/// The addresses of the guest with this scope that are in use: not those that it still probes.
fn addresses(scope: &str) -> Vec<Ipv6Addr> {
    let listed = sh(&format!("ip -6 -o addr show dev {CARD} scope {scope} -tentative"));
    let words = listed.split_whitespace();
    let found = words.filter_map(|word| word.split_once('/')?.0.parse().ok());
    found.collect()
}

/// Goal: a kernel that is connected to nothing but the network has a working IPv6. Method: it configures
/// itself; what it has, and what it reaches, is looked at from inside.
#[test]
fn a_kernel_configures_itself_over_ipv6() {
    in_namespace(|| {
        if !has("ip") || !enable_ipv6() {
            return;
        }
        let ipv6 = Ipv6Config::of_name("shared/lab");
        let (prefix, gateway) = (ipv6.clone(), ipv6.gateway());
        let config = NetworkConfig {
            mtu: MTU,
            ipv6: Some(Ipv6Config { dns: vec![gateway], ..ipv6 }),
            ..NetworkConfig::default()
        };
        let network = Network::new(config).expect("a network");
        let link_local = network.gateway().and_then(|gateway| gateway.link_local()).unwrap();
        let Some(tap) = tap() else { return skip("there is no TAP") };
        let _relay = Relay::start(tap, &network);
        sh(&format!("ip link set {CARD} up"));

        stage("an address by SLAAC");
        eventually("an address", || !addresses("global").is_empty());
        let address = addresses("global")[0];
        assert!(prefix.contains(address), "{address}");
        let mtu = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{CARD}/mtu")).unwrap();
        assert_eq!(mtu.trim(), MTU.to_string());

        stage("routes");
        let routes = || sh(&format!("ip -6 route show dev {CARD}"));
        let default = format!("default via {link_local}");
        assert!(!routes().contains("default"), "{}", routes());
        network.set_ipv6_router(true);
        eventually("a default route", || routes().contains(&default));

        stage("what the gateway serves and refuses");
        if has("ping") {
            for target in [gateway.to_string(), format!("{link_local}%{CARD}")] {
                sh(&format!("ping -6 -c 1 -w 20 {target}"));
                sh(&format!("ping -6 -c 1 -w 20 -s 1000 {target}"));
            }
        }
        let connect =
            |to: Ipv6Addr| TcpStream::connect_timeout(&SocketAddr::new(to.into(), 80), LONG);
        let refused = connect(gateway).expect_err("nobody listens at the gateway");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let asks = UdpSocket::bind("[::]:0").expect("a socket");
        asks.set_read_timeout(Some(LONG)).unwrap();
        asks.connect((gateway, 53)).expect("a route");
        asks.send(b"?").expect("a packet");
        let refused = asks.recv(&mut [0; 16]).expect_err("nobody answers");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let nowhere = connect("2001:db8::1".parse().unwrap()).expect_err("there is no way out");
        // The kernel's name for "no route to destination".
        assert_eq!(nowhere.raw_os_error(), Some(libc::ENETUNREACH), "{nowhere}");

        stage("the gateway's address is taken");
        sh(&format!("ip -6 addr add {gateway}/64 dev {CARD}"));
        let listed = || sh(&format!("ip -6 -o addr show dev {CARD}"));
        eventually("the duplicate is found", || listed().contains("dadfailed"));
        sh(&format!("ip -6 addr del {gateway}/64 dev {CARD}"));

        stage("DHCPv6");
        dhcp(gateway);

        stage("a way out that is lost");
        network.set_ipv6_router(false);
        eventually("the default route is gone", || !routes().contains("default"));
        assert_eq!(addresses("global"), [address], "the address stays");
        let stats = network.gateway().unwrap().stats().ipv6;
        assert_eq!((stats.malformed, stats.unsent), (0, 0), "{stats:?}");
    });
}

/// Asks for name servers by stateless DHCPv6, as a guest's client does.
fn dhcp(gateway: Ipv6Addr) {
    if !has("dhclient") {
        return;
    }
    let folder = std::env::temp_dir().join(unique("vmring-dhcpv6"));
    fs::create_dir(&folder).expect("a folder");
    let path = |name: &str| folder.join(name).display().to_string();
    // dhclient calls a script with what it has got.
    let (script, told) = (path("script"), path("told"));
    fs::write(&script, format!("#!/bin/sh\necho \"$reason $new_dhcp6_name_servers\" >> {told}\n"))
        .unwrap();
    sh(&format!("chmod 755 {script}"));
    let options = format!("-sf {script} -lf {} -pf {}", path("leases"), path("pid"));
    let said = try_sh(&format!("timeout 30 dhclient -6 -S -1 -d {options} {CARD} 2>&1 || true"));
    let told = fs::read_to_string(&told).unwrap_or_default();
    fs::remove_dir_all(&folder).expect("the folder");
    assert!(told.contains(&gateway.to_string()), "{told}\n{said:?}");
}
