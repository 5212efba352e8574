//! A guest that moves between two servers while it runs.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use sha2::{Digest, Sha256};

use super::*;

/// Runs `body` on a thread in a network namespace of its own, which needs root.
fn in_namespace(body: impl FnOnce() + Send) {
    let why = if std::env::var_os("VMRING_SKIP_TAP").is_some() {
        Some("VMRING_SKIP_TAP is set")
    } else if !Path::new("/dev/net/tun").exists() {
        Some("there is no /dev/net/tun")
    } else {
        None
    };
    if let Some(why) = why {
        return skip(why);
    }
    let name = thread::current().name().unwrap_or("test").to_owned();
    thread::scope(|scope| {
        let body = || {
            // SAFETY: the argument is a plain number. The call concerns this thread only, and what it
            // starts.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
                body();
            } else {
                skip("a network namespace needs root");
            }
        };
        let thread = thread::Builder::new().name(name).spawn_scoped(scope, body);
        if let Err(panic) = thread.expect("a thread").join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Runs a shell command of this machine, which must succeed.
fn sh(command: &str) -> String {
    let seconds = LIMIT.as_secs().to_string();
    let output = Command::new("timeout").args(["-k5", &seconds, "sh", "-c", command]).output();
    let output = output.expect("a shell");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "`{command}`: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Accepts the guest's connection, and reads its request.
fn accept(listener: &TcpListener) -> TcpStream {
    let (mut stream, _) = listener.accept().expect("the guest connects");
    stream.set_write_timeout(Some(LIMIT)).expect("a time of more than 0");
    let mut request = [0; 4096];
    let len = stream.read(&mut request).expect("a request");
    assert!(request[..len].ends_with(b"\r\n\r\n"), "a whole request");
    stream
}

const ANSWER: &[u8] = b"HTTP/1.0 200 OK\r\n\r\n";

/// Numbers of four bytes each, from `first` on.
fn numbers(first: u32, count: u32) -> Vec<u8> {
    (first..first + count).flat_map(u32::to_be_bytes).collect()
}

fn hexadecimal(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Answers one request with 4 MB, in at least ten seconds. Returns their digest.
fn send(listener: &TcpListener) -> String {
    let mut stream = accept(listener);
    stream.write_all(ANSWER).expect("the guest reads");
    let mut digest = Sha256::new();
    for part in 0..100 {
        let bytes = numbers(part * 10_000, 10_000);
        digest.update(&bytes);
        stream.write_all(&bytes).expect("the guest reads");
        thread::sleep(Duration::from_millis(100));
    }
    hexadecimal(digest)
}

/// Answers a request whose answer nobody reads yet. When this returns, all of it is in the guest's
/// memory. Returns its digest.
fn fill(mut stream: TcpStream) -> String {
    let bytes = [ANSWER, &numbers(1 << 30, QUEUED / 4)].concat();
    stream.write_all(&bytes).expect("the guest has the space");
    until("the guest has all", || {
        let mut unacknowledged = 0;
        // SAFETY: the call writes one number into `unacknowledged`.
        let result =
            unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &mut unacknowledged) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        unacknowledged == 0
    });
    hexadecimal(Sha256::new_with_prefix(&bytes[ANSWER.len()..]))
}

/// How many bytes wait in the guest's socket while it moves. They have no space in a pipe.
const QUEUED: u32 = 1 << 20;

/// A socket that has the frames of this namespace with an EtherType.
fn frames(ether_type: u16) -> File {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, ether_type.to_be().into()) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and nobody else has it.
    File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How others learn where a guest is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Announcement {
    /// By an ARP packet of the guest about its own address (RFC 5227, section 1.1).
    Arp,
    /// By a RARP packet, which the server sends because QEMU asks for it.
    Rarp,
}

impl Announcement {
    fn ether_type(self) -> u16 {
        match self {
            Announcement::Arp => 0x0806,
            Announcement::Rarp => 0x8035,
        }
    }

    /// Whether `frame` is the announcement of this guest.
    fn is(self, frame: &[u8], mac: &str) -> bool {
        let Some((ethernet, packet)) = frame.split_at_checked(14) else { return false };
        let octets: Vec<_> = ethernet[6..12].iter().map(|octet| format!("{octet:02x}")).collect();
        // The protocol address of the sender, and that of the target.
        let is_own = packet.get(14..18).is_some_and(|address| packet.get(24..28) == Some(address));
        ethernet[..6] == [0xff; 6] && octets.join(":") == mac && is_own
    }
}

/// Goal: a guest moves from one server to another, on one bridge, in the middle of a transfer from
/// the host, and not a byte is lost. The host and the bridge are told where the guest is now: by the
/// guest itself, or by the server.
///
/// What the guest reads at once does not tell whether the server has marked the pages into which it was
/// received, because they are free again before the guest moves. So a second transfer fills the
/// guest's socket when all memory was copied, and is read after the move. Its packets are long,
/// because Linux itself writes behind a packet into a buffer that is not full, and so QEMU copies that
/// page anyway. Broken by: a server that does not mark received packets.
fn migrates(properties: &str, announcement: Announcement) {
    if !can_serve() {
        return;
    }
    let Some(guest) = guest(Engine::Qemu) else { return };
    in_namespace(move || {
        let folder = Folder::new();
        let sockets = [folder.join("old"), folder.join("new")];
        // A bridge learns addresses for five minutes; longer than this test.
        sh("ip link set lo up; ip link add br0 type bridge forward_delay 0; \
            ip addr add 10.0.0.1/24 dev br0; ip link set br0 up");
        // With offload this guest gets copies, because its QEMU does not know USO.
        // Without, the server receives into the guest's memory itself.
        let options = match announcement {
            Announcement::Arp => ",announce,offload=off",
            Announcement::Rarp => "",
        };
        let serve = |tap: &str, socket: &PathBuf| {
            let network = format!("tap:{tap},bridged:br0");
            let listen = format!("{}{options}", socket.display());
            Server::start(&network, &[Path::new(&listen)], &["--mtu", "9000"])
        };
        let (source, destination) = (serve("tap0", &sockets[0]), serve("tap1", &sockets[1]));
        sh("ip link set br0 mtu 9000");
        let at = |socket: &PathBuf, nic: &Nic| guest.clone().nic(nic.clone().at(socket));
        let nic = Nic::vhost_user(&sockets[0]);
        let nic = if properties.is_empty() { nic } else { nic.device(properties) };
        let mut old = at(&sockets[0], &nic).start();
        old.sh("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 mtu 9000 up");
        old.sh("ping -c 3 -i 0.2 -W 5 10.0.0.1");
        let listen = |port| TcpListener::bind(("10.0.0.1", port)).expect("a port in the namespace");
        let (listener, queueing) = (listen(80), listen(81));
        old.keep_changing();
        // The window of a reader that does not read is what it was at first.
        old.sh("echo 4096 8388608 8388608 >/proc/sys/net/ipv4/tcp_rmem");
        old.sh("(wget -q -O - http://10.0.0.1:81/ |
                 (until [ -e /tmp/moved ]; do usleep 100000; done; sha256sum) >/tmp/queued
                ) </dev/null >/dev/null 2>&1 &");
        let queueing = accept(&queueing);
        let receiving = old.begin("wget -q -O - http://10.0.0.1/ | sha256sum");
        let mut new = at(&sockets[1], &nic).incoming().start();
        let mut announcements = frames(announcement.ether_type());
        let (digest, queued) = thread::scope(|scope| {
            let sending = scope.spawn(|| send(&listener));
            let mut queued = String::new();
            old.migrate_to(&mut new, |_| queued = fill(queueing));
            (sending.join().expect("the host sends all"), queued)
        });
        until("the guest is announced", || {
            let mut frame = [0; 128];
            let len = announcements.read(&mut frame).unwrap_or_default();
            announcement.is(&frame[..len], nic.mac())
        });
        let received = new.finish(&receiving).output;
        assert_eq!(received, format!("{digest}  -\n"));
        let received = new.sh("touch /tmp/moved; until [ -s /tmp/queued ]; do usleep 100000; done
                               cat /tmp/queued");
        assert_eq!(received, format!("{queued}  -\n"), "what waited in the socket has changed");
        drop((old, new));
        assert_eq!(source.end()["ok"], true);
        assert_eq!(destination.end()["ok"], true);
    });
}

#[test]
fn a_guest_that_announces_itself_migrates_between_servers() {
    migrates("", Announcement::Arp);
}

#[test]
fn a_guest_that_is_announced_migrates_between_servers() {
    migrates("guest_announce=off", Announcement::Rarp);
}
