//! A guest on an embedded network that sends as soon as its windows allow: what it sends finds a place
//! in its outbox.

use std::any::Any;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmring_core::offload::OffloadHeader;
use vmring_embedded::limits::{ROUTER_BATCH, ROUTER_FRAMES};
use vmring_embedded::{
    DropReason, Network, NetworkConfig, PortConfig, Receiver, Router, RouterBatch, RouterEnd,
    Sender, Sent,
};
use vmring_nat::{Counter, Full, GuestFrame, Link, Nat, Output, Port};

use crate::support::datagram::udp_frame;
use crate::support::kernel::{Answer, Kernel};
use crate::support::port::{GUEST_MAC, config, plain_link};
use crate::support::script::Segment;

type Buffer = Vec<u8>;

const GUEST: [u8; 4] = [192, 168, 64, 2];
const SERVER: ([u8; 4], u16) = ([192, 0, 2, 1], 80);
const MSS: usize = 1460;
/// The batches of one turn of the worker.
const BATCHES: usize = 3;

/// A router that keeps its end for the test.
#[derive(Default)]
struct Kept(Mutex<Option<RouterEnd<Buffer>>>);

impl Router<Buffer> for Kept {
    fn start(&self, end: RouterEnd<Buffer>) -> io::Result<()> {
        *self.0.lock().unwrap() = Some(end);
        Ok(())
    }

    fn stop(&self) {}

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// A flow of the guest, which sends without an end.
struct Upload {
    from: SocketAddr,
    seq: u32,
    ack: u32,
    /// The right edge of its window.
    edge: u32,
    is_open: bool,
}

/// A guest that answers at once.
struct Guest {
    sender: Sender<Buffer>,
    receiver: Receiver<Buffer>,
    gateway: [u8; 6],
    uploads: Vec<Upload>,
    /// Whether a datagram follows each segment, as long as so many do not wait.
    datagrams: usize,
    waiting: usize,
    refused: usize,
}

impl Guest {
    fn send(&mut self, mut frame: Vec<u8>) {
        frame[..6].copy_from_slice(&self.gateway);
        match self.sender.send(&frame) {
            Sent::Gateway => {}
            Sent::Dropped(DropReason::RouterBusy) => self.refused += 1,
            other => panic!("{other:?}"),
        }
    }

    fn open(&mut self, number: u16) {
        let from = SocketAddr::from((GUEST, number));
        let syn =
            Segment { flags: "S".into(), mss: Some(1460), shift: Some(7), ..Segment::default() };
        self.uploads.push(Upload { from, seq: 1, ack: 0, edge: 0, is_open: false });
        self.send(syn.frame(from, SERVER.into()));
        self.sender.flush();
    }

    /// Takes what has come, and sends what its windows allow.
    fn react(&mut self) {
        while let Some((buffer, len)) = self.receiver.collect() {
            let (frame, link) = (buffer[..len].to_vec(), plain_link());
            self.receiver.post(buffer).unwrap();
            let to = u16::from_be_bytes([frame[36], frame[37]]);
            let (segment, _) = Segment::parse(&frame, &OffloadHeader::NONE, &link).unwrap();
            let upload = self.uploads.iter_mut().find(|one| one.from.port() == to).unwrap();
            let shift = if segment.flags.contains('S') { 0 } else { 8 };
            if segment.flags.contains('S') {
                (upload.ack, upload.is_open) = (segment.seq.wrapping_add(1), true);
            }
            upload.edge = upload.edge.max(segment.ack + (u32::from(segment.window) << shift));
        }
        for index in 0..self.uploads.len() {
            while self.uploads[index].is_open {
                let Upload { from, seq, ack, edge, .. } = self.uploads[index];
                if seq as usize + MSS > edge as usize {
                    break;
                }
                self.uploads[index].seq += MSS as u32;
                let (flags, data) = (".".into(), vec![0; MSS]);
                let segment = Segment { flags, seq, ack, window: 512, data, ..Segment::default() };
                self.send(segment.frame(from, SERVER.into()));
                if self.waiting < self.datagrams {
                    self.waiting += 1;
                    self.send(udp_frame((GUEST, 9).into(), SERVER.into(), b"a datagram"));
                }
            }
        }
        self.sender.flush();
    }
}

/// The router's end, with the guest behind it: it answers while the translator is at work, so that
/// nothing could be sent earlier.
struct Ends {
    end: RouterEnd<Buffer>,
    guest: Guest,
}

impl Output for Ends {
    fn link(&self, port: Port) -> Link {
        let link = self.end.link(port.0);
        Link { mtu: 1500, offloads: link.offloads, longest: link.longest }
    }

    fn space(&self, port: Port) -> usize {
        self.end.space(port.0)
    }

    fn send(&mut self, port: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full> {
        self.end.send(port.0, frame, header).map_err(|_| Full)?;
        self.end.flush();
        self.guest.react();
        Ok(())
    }
}

/// Lets so many uploads run through `rounds` turns of a worker. Returns the bytes that the peers got, and
/// how many frames were refused.
fn upload(flows: u16, datagrams: usize, rounds: usize) -> (u64, usize) {
    let network = NetworkConfig { router: Some(Vec::new()), ..NetworkConfig::default() };
    let network = Network::new(network).unwrap();
    let router: Arc<Kept> = Arc::default();
    network.set_router(router.clone()).unwrap();
    let gateway = network.gateway().unwrap().mac().into_array();
    let (mac, wake) = (Some(GUEST_MAC.into()), Arc::new(|| {}));
    let port = network.join(PortConfig { mac, ..PortConfig::new([1; 16], wake) }).unwrap();
    let size = port.max_packet_size();
    let (mut receiver, sender) = port.split();
    for _ in 0..64 {
        receiver.post(vec![0; size]).unwrap();
    }
    let mut guest =
        Guest { sender, receiver, gateway, uploads: Vec::new(), datagrams, waiting: 0, refused: 0 };
    guest.open(1000);
    let end = router.0.lock().unwrap().take().expect("the first frame starts the router");
    let mut ends = Ends { end, guest };

    let mut config = config(false);
    config.limits.port.inbox_frames = ROUTER_FRAMES;
    let kernel = Kernel::new();
    (kernel.0.borrow_mut().answer, kernel.0.borrow_mut().capacity) = (Answer::Connect, 16 << 20);
    let mut now = Duration::from_secs(1000);
    let mut nat = Nat::new(config, kernel.clone(), now);
    let mut batch = RouterBatch::new();
    for round in 0..rounds {
        // One more each few rounds, so that windows of the earlier ones shrink.
        if round % 2 == 1 && ends.guest.uploads.len() < flows.into() {
            let number = 1000 + ends.guest.uploads.len() as u16;
            ends.guest.open(number);
        }
        ends.end.look(|_, _| ());
        // The guest sends on as it is answered, so there is no end.
        for _ in 0..BATCHES {
            let Some(port) = ends.end.receive(&mut batch) else { break };
            let frames: Vec<_> = (0..batch.len())
                .map(|index| batch.get(index).unwrap())
                .map(|(bytes, header)| GuestFrame { bytes, header })
                .collect();
            assert!(frames.len() <= ROUTER_BATCH);
            let is_udp = |frame: &&GuestFrame<'_>| frame.bytes[23] == 17;
            ends.guest.waiting -= frames.iter().filter(is_udp).count();
            nat.from_guest(Port(port), &frames, now, &mut ends);
        }
        nat.on_time(now, &mut ends);
        for _ in 0..kernel.len() {
            let Some((token, readiness)) = kernel.take_event() else { break };
            nat.on_ready(token, readiness, now, &mut ends);
        }
        for index in 0..kernel.len() {
            kernel.read(index, usize::MAX);
            kernel.with(index, |peer| peer.sent.clear());
        }
        // Uneven steps through a few seconds.
        now += Duration::from_millis(10 + round as u64 % 7 * 5);
        ends.guest.react();
    }
    let busy = ends.guest.sender.stats().dropped_router_busy;
    assert_eq!(busy, ends.guest.refused as u64, "what is refused is counted");
    (nat.counters()[Counter::TcpBytesSent], ends.guest.refused)
}

/// Goal: a guest that keeps to its windows loses nothing: one flow alone, one beside as many frames that no
/// window limits, and flows that begin while others have windows.
#[test]
fn what_the_windows_allow_finds_a_place_in_the_outbox() {
    let half = ROUTER_FRAMES as usize / 2;
    for (flows, datagrams) in [(1, 0), (1, half), (4, half / 2), (40, half / 2)] {
        let (bytes, refused) = upload(flows, datagrams, 80);
        assert!(bytes > 3_000_000, "{flows} flows sent {bytes} bytes");
        assert_eq!(refused, 0, "{flows} flows and {datagrams} datagrams");
    }
}
