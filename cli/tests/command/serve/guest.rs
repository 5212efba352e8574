//! A guest of a server: a front end of vhost-user, and the drivers of a receive and a transmit queue.
//! Its memory is a file that it shares with the server, which is another process.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vmring::GuestMmap;
use vmring_core::guest::{GuestMemory, GuestRegion};
use vmring_virtio::queue::{AddressSpace, QueueFeatures, QueueLayout};
use vmring_virtio::vhost_user::features::{LOG_ALL, PROTOCOL_FEATURES};

use super::LIMIT;
use super::driver::{ARENA, Driver};
use super::frontend::*;

pub(super) const HEADER: usize = 12;
/// How far the front end's addresses are from the guest's.
const USER: u64 = 0x7f00_0000_0000;
const RINGS: u64 = 0x1_0000;
pub(super) const RINGS_LEN: u64 = 0x10_0000;
const RING_SPACE: u64 = 0x2_0000;
const ARENA_LEN: u64 = 0x40_0000;
pub(super) const MEMORY: u64 = RINGS_LEN + 2 * ARENA_LEN;
const SIZE: u16 = 256;

struct Ring {
    driver: Driver,
    kick: File,
    call: File,
    /// The ends that the server gets.
    ends: (OwnedFd, OwnedFd),
}

pub(super) struct Guest {
    pub(super) frontend: Frontend,
    pub(super) file: File,
    pub(super) mac: [u8; 6],
    pub(super) features: u64,
    /// Features that it does not accept.
    refused: u64,
    rings: [Ring; 2],
    /// Packets with their headers.
    received: VecDeque<(Header, Vec<u8>)>,
    /// A packet of which more buffers come: how many, its header, and what has come.
    begun: Option<(u16, Header, Vec<u8>)>,
}

/// A `virtio_net_hdr` of virtio 1.x.
pub(super) type Header = [u8; HEADER];

fn regions() -> [Region; 2] {
    let region = |guest_address, size, mmap_offset| {
        let user_address = USER + guest_address;
        Region { guest_address, size, user_address, mmap_offset }
    };
    [region(RINGS, RINGS_LEN, 0), region(ARENA, 2 * ARENA_LEN, RINGS_LEN)]
}

fn layout(index: u64) -> QueueLayout {
    let descriptors = RINGS + index * RING_SPACE;
    let available = descriptors + u64::from(SIZE) * 16;
    let used = (available + 6 + u64::from(SIZE) * 2).next_multiple_of(4);
    let addresses = AddressSpace::Guest;
    QueueLayout { size: SIZE.into(), descriptors, available, used, addresses, used_log: None }
}

/// Connects to a server, which may not listen yet.
pub(super) fn connect(path: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return socket,
            Err(error) => assert!(start.elapsed() < LIMIT, "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

impl Guest {
    /// A guest with this address, whose rings run.
    pub(super) fn new(path: &Path, mac: [u8; 6]) -> Self {
        Self::on(connect(path), memory(MEMORY), mac)
    }

    pub(super) fn on(socket: UnixStream, file: File, mac: [u8; 6]) -> Self {
        Self::refusing(socket, file, mac, LOG_ALL)
    }

    /// Like [`new`](Self::new), without offload of checksums and segmentation.
    pub(super) fn without_offload(path: &Path, mac: [u8; 6]) -> Self {
        // CSUM, GUEST_CSUM, and the segmentation of both directions (virtio 1.2, section 5.1.3).
        let bits = [0, 1, 7, 8, 9, 10, 11, 12, 13, 14, 54, 55, 56];
        let offload = bits.into_iter().fold(0, |all, bit| all | 1 << bit);
        Self::refusing(connect(path), memory(MEMORY), mac, LOG_ALL | offload)
    }

    fn refusing(socket: UnixStream, file: File, mac: [u8; 6], refused: u64) -> Self {
        let frontend = Frontend::on(socket);
        let parts = regions().map(|region| {
            let map = GuestMmap::file(&file, region.mmap_offset, region.size as usize);
            GuestRegion::new(region.guest_address, Arc::new(map.expect("a mapping")))
        });
        let memory = GuestMemory::new(parts).expect("the regions are apart");
        let features = offered(&frontend) & !refused;
        let rings = [0, 1].map(|index| {
            let queue = QueueFeatures::from_bits(features);
            let driver = Driver::over(memory.clone(), layout(index), queue, 0, ARENA_LEN)
                .with_arena(ARENA + index * ARENA_LEN);
            let ((kick_end, kick), (call, call_end)) =
                (pipe().expect("a pipe"), pipe().expect("a pipe"));
            Ring {
                driver,
                kick: OwnedFd::from(kick).into(),
                call: OwnedFd::from(call).into(),
                ends: (kick_end.into(), call_end.into()),
            }
        });
        let (received, begun) = (VecDeque::new(), None);
        let guest = Self { frontend, file, mac, features, refused, rings, received, begun };
        guest.set_up([0, 0]);
        guest
    }

    /// Connects to a server that knows nothing of this guest, and lets the rings go on where they are.
    pub(super) fn rejoin(&mut self, path: &Path) {
        self.frontend = Frontend::on(connect(path));
        let features = offered(&self.frontend) & !self.refused;
        assert_eq!(features, self.features, "the same is offered");
        let used = self.rings.each_ref().map(|ring| ring.driver.used_index());
        self.set_up(used);
    }

    fn set_up(&self, base: [u16; 2]) {
        let frontend = &self.frontend;
        frontend.send(&Sent::number(SET_FEATURES, self.features));
        frontend.send(&Sent::table(&regions()).with(&self.file).with(&self.file));
        for (index, (ring, base)) in self.rings.iter().zip(base).enumerate() {
            let index = index as u32;
            let QueueLayout { descriptors, used, available, .. } = layout(index.into());
            let addresses = [USER + descriptors, USER + used, USER + available, used];
            for message in [
                Sent::state(SET_VRING_NUM, index, SIZE.into()),
                Sent::state(SET_VRING_BASE, index, base.into()),
                Sent::addresses(index, 0, addresses),
                Sent::number(SET_VRING_CALL, index.into()).with(&ring.ends.1),
                Sent::number(SET_VRING_KICK, index.into()).with(&ring.ends.0),
                Sent::state(SET_VRING_ENABLE, index, 1),
            ] {
                frontend.send(&message);
            }
        }
        self.sync();
    }

    /// Waits until everything that was sent is handled.
    pub(super) fn sync(&self) {
        self.ask(Sent::new(GET_FEATURES, []));
    }

    pub(super) fn ask(&self, message: Sent) -> Reply {
        self.frontend.send(&message);
        self.frontend.reply()
    }

    fn kick(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        if ring.driver.needs_kick() {
            ring.kick.write_all(&[1; 8]).expect("the kick");
        }
    }

    /// Kicks both rings without a look at them.
    pub(super) fn kick_blindly(&mut self) {
        for ring in &mut self.rings {
            ring.kick.write_all(&[1; 8]).expect("the kick");
        }
    }

    /// Posts buffers for receiving, as many as there is space for, at most `most`.
    pub(super) fn post(&mut self, most: usize) {
        let driver = &mut self.rings[0].driver;
        for _ in 0..most {
            if driver.post(&[(2048, true)], None).is_none() {
                break;
            }
        }
        driver.expose();
        self.kick(0);
    }

    /// Sends a packet. Waits for space, if there is none.
    pub(super) fn send(&mut self, packet: &[u8]) {
        self.send_with(&[0; HEADER], packet);
    }

    /// Sends a packet with this header.
    pub(super) fn send_with(&mut self, header: &Header, packet: &[u8]) {
        let start = Instant::now();
        let shape = [(HEADER as u32, false), (packet.len() as u32, false)];
        let head = loop {
            let driver = &mut self.rings[1].driver;
            driver.collect();
            if let Some(head) = driver.post(&shape, None) {
                break head;
            }
            assert!(start.elapsed() < LIMIT, "nothing is sent");
            thread::sleep(Duration::from_millis(1));
        };
        let driver = &mut self.rings[1].driver;
        let buffers = driver.buffers(head).to_vec();
        driver.write(buffers[0].address, header);
        driver.write(buffers[1].address, packet);
        driver.expose();
        self.kick(1);
    }

    /// Waits until the server has taken all that was sent.
    pub(super) fn until_taken(&mut self) {
        let start = Instant::now();
        while self.rings[1].driver.outstanding() > 0 {
            self.rings[1].driver.collect();
            assert!(start.elapsed() < LIMIT, "the server does not take what was sent");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next packet, if one comes in this time.
    pub(super) fn receive_within(&mut self, time: Duration) -> Option<Vec<u8>> {
        self.receive_with_header_within(time).map(|(_, packet)| packet)
    }

    /// Likewise, with its header.
    pub(super) fn receive_with_header_within(
        &mut self,
        time: Duration,
    ) -> Option<(Header, Vec<u8>)> {
        let start = Instant::now();
        loop {
            let driver = &mut self.rings[0].driver;
            let used = driver.used_index();
            driver.set_used_event(used);
            for one in driver.collect() {
                let bytes = driver.read(one.buffers[0].address, one.len);
                let (left, header, packet) = match self.begun.take() {
                    Some((left, header, packet)) => (left, header, [packet, bytes].concat()),
                    None => {
                        assert!(one.len as usize > HEADER, "{one:?}");
                        let header: Header = bytes[..HEADER].try_into().expect("its length");
                        let buffers = u16::from_le_bytes([header[10], header[11]]);
                        (buffers, header, bytes[HEADER..].to_vec())
                    }
                };
                match left {
                    1 => self.received.push_back((header, packet)),
                    _ => self.begun = Some((left - 1, header, packet)),
                }
            }
            if let Some((header, packet)) = self.received.pop_front() {
                self.post(u16::from_le_bytes([header[10], header[11]]).into());
                return Some((header, packet));
            }
            let left = time.checked_sub(start.elapsed())?;
            let Ring { driver, call, .. } = &mut self.rings[0];
            if driver.used_index() == used && readable(call, left) {
                let _ = call.read(&mut [0; 512]);
            }
        }
    }

    pub(super) fn receive(&mut self) -> Vec<u8> {
        self.receive_within(LIMIT).expect("a packet comes")
    }

    /// The next packet that a test has sent to this guest. It skips those that the switch gives to
    /// everybody, because it does not know the station, and those of the host's kernel.
    pub(super) fn receive_ours(&mut self) -> Vec<u8> {
        loop {
            let packet = self.receive();
            if packet[..6] == self.mac && packet[12..14] == OURS {
                return packet;
            }
        }
    }

    /// Switches the log of what is written on or off.
    pub(super) fn log(&mut self, on: bool) {
        let features = self.features | if on { LOG_ALL } else { 0 };
        self.frontend.send(&Sent::number(SET_FEATURES, features));
        self.sync();
    }

    /// Kicks and is interrupted over sockets from now on, as user-mode Linux does.
    pub(super) fn use_sockets(&mut self) {
        let pair = || UnixStream::pair().expect("sockets");
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let ((kick, kick_end), (call, call_end)) = (pair(), pair());
            ring.kick = OwnedFd::from(kick).into();
            ring.call = OwnedFd::from(call).into();
            ring.ends = (kick_end.into(), call_end.into());
            for (request, end) in [(SET_VRING_CALL, &ring.ends.1), (SET_VRING_KICK, &ring.ends.0)] {
                self.frontend.send(&Sent::number(request, index as u64).with(end));
            }
        }
        self.sync();
    }

    /// Waits for no interrupt any more. The server can see it only when it interrupts.
    pub(super) fn close_calls(&mut self) {
        let (call, _) = pipe().expect("a pipe");
        let call: File = OwnedFd::from(call).into();
        for ring in &mut self.rings {
            ring.call = call.try_clone().expect("a copy");
        }
    }

    /// Gets an address by DHCP (RFC 2131).
    pub(super) fn lease(&mut self) -> [u8; 4] {
        let offer = self.dhcp(1, &[]);
        let acknowledged = self.dhcp(3, &wanted(&offer));
        assert_eq!(acknowledged[58..62], offer[58..62]);
        offer[58..62].try_into().expect("four of the bytes")
    }

    /// Sends a DHCP message of this type with these options, and returns the answer, from its Ethernet
    /// header on.
    fn dhcp(&mut self, kind: u8, options: &[u8]) -> Vec<u8> {
        self.send(&dhcp(self.mac, kind, options));
        loop {
            let answer = self.receive();
            if is_dhcp_answer(&answer) {
                return answer;
            }
        }
    }

    /// Ends the rings as a front end does before a migration: the server gives them back.
    pub(super) fn stop_rings(&self) {
        for index in 0..2 {
            self.ask(Sent::state(GET_VRING_BASE, index, 0));
        }
    }

    /// Whether the server has closed the connection.
    pub(super) fn is_cut_off(&self) -> bool {
        is_cut_off(&self.frontend)
    }
}

/// Whether the server closes the connection, in any time that a test may take.
pub(super) fn is_cut_off(frontend: &Frontend) -> bool {
    let start = Instant::now();
    let mut socket = frontend.socket();
    loop {
        match socket.read(&mut [0; 64]) {
            Ok(0) => return true,
            Ok(_) => assert!(start.elapsed() < LIMIT),
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Negotiates the protocol, and shares this memory.
pub(super) fn share(frontend: &Frontend, file: &File) {
    let features = offered(frontend) & !LOG_ALL;
    frontend.send(&Sent::number(SET_FEATURES, features));
    frontend.send(&Sent::table(&regions()).with(file).with(file));
}

/// Negotiates the protocol, and returns what the server offers.
fn offered(frontend: &Frontend) -> u64 {
    let ask = |request| {
        frontend.send(&Sent::new(request, []));
        frontend.reply().number()
    };
    let offered = ask(GET_FEATURES);
    assert_ne!(offered & PROTOCOL_FEATURES, 0);
    let protocol = ask(GET_PROTOCOL_FEATURES);
    frontend.send(&Sent::number(SET_PROTOCOL_FEATURES, protocol));
    offered
}

fn readable(fd: &impl AsRawFd, timeout: Duration) -> bool {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the pointer is to one entry, which lives until the call returns.
    unsafe { libc::poll(&mut entry, 1, millis) == 1 }
}

/// The EtherType of the tests' own packets: IEEE's for experiments.
pub(super) const OURS: [u8; 2] = [0x88, 0xb5];

/// A packet of this length from one address to another, with a number in it.
pub(super) fn packet(from: [u8; 6], to: [u8; 6], len: usize, number: u32) -> Vec<u8> {
    let mut bytes = [&to[..], &from, &OURS, &number.to_le_bytes()].concat();
    bytes.extend((bytes.len()..len).map(|at| (at as u32 ^ number.wrapping_mul(0x9e37)) as u8));
    bytes
}

pub(super) fn mac(last: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0x12, 0x34, last]
}

/// A DHCP message of this type with these options (RFC 2131), in a frame.
pub(super) fn dhcp(mac: [u8; 6], kind: u8, options: &[u8]) -> Vec<u8> {
    dhcp_between((mac, [0; 4]), ([0xff; 6], [0xff; 4]), kind, options)
}

/// The same, from a client that has an address or 0.0.0.0, to one server or to all.
pub(super) fn dhcp_between(
    (mac, address): ([u8; 6], [u8; 4]),
    (server_mac, server): ([u8; 6], [u8; 4]),
    kind: u8,
    options: &[u8],
) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 7, 7, 7, 7, 0, 0, 0, 0];
    message.extend(address);
    message.resize(28, 0);
    message.extend(mac);
    message.resize(236, 0);
    message.extend([99, 130, 83, 99, 53, 1, kind]);
    message.extend(options);
    message.push(255);
    message.resize(300, 0);
    let len = |extra: usize| ((message.len() + extra) as u16).to_be_bytes();
    let mut ip = [&[0x45, 0][..], &len(28), &[0; 4], &[64, 17, 0, 0], &address, &server].concat();
    let sum: u32 = ip.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // It has no checksum.
    let udp = [&[0, 68, 0, 67][..], &len(8), &[0, 0]].concat();
    let ethernet = [&server_mac[..], &mac, &[8, 0]].concat();
    [ethernet, ip, udp, message].concat()
}

/// Whether a frame is an answer to such a message. The address that it offers is in the bytes 58 to 61.
pub(super) fn is_dhcp_answer(frame: &[u8]) -> bool {
    frame.len() > 282 && frame[34..38] == [0, 67, 0, 68] && frame[46..50] == [7; 4]
}

/// The options of a request for what was offered.
pub(super) fn wanted(offer: &[u8]) -> Vec<u8> {
    // The server's identifier is the option 54.
    let server = offer.windows(2).position(|pair| pair == [54, 4]).expect("an identifier");
    [&[50, 4][..], &offer[58..62], &offer[server..server + 6]].concat()
}
