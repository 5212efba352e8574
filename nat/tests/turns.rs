//! Guests that share one translator: each has an equal part of what it costs.

use std::net::SocketAddr;
use std::time::Duration;

use vmring_core::offload::OffloadHeader;
use vmring_nat::limits::{BATCH, COST_DATAGRAM_SOCKET, TURN_COST};
use vmring_nat::{Counter, GuestFrame, Nat, Port};

use crate::support::datagram::udp_frame;
use crate::support::kernel::{Answer, Kernel};
use crate::support::port::{Frames, config, plain_link};

const HOSTILE: Port = Port(3);
const GOOD: Port = Port(2);

/// A translator of two guests, whose port numbers are also the last bytes of their addresses.
struct Shared {
    nat: Nat<Kernel>,
    kernel: Kernel,
    out: Frames,
    now: Duration,
}

impl Shared {
    fn new() -> Self {
        let kernel = Kernel::new();
        kernel.0.borrow_mut().answer = Answer::Connect;
        let mut config = config(false);
        (config.limits.new_flows_per_second, config.limits.port.new_flows_per_second) =
            (u32::MAX, u32::MAX);
        let now = Duration::from_secs(1000);
        let nat = Nat::new(config, kernel.clone(), now);
        let out = Frames {
            frames: Default::default(),
            link: plain_link(),
            space: usize::MAX,
            tells: true,
        };
        Self { nat, kernel, out, now }
    }

    /// Gives the translator a batch of a port, and returns what it has cost.
    fn send(&mut self, port: Port, frames: &[Vec<u8>]) -> u64 {
        let header = OffloadHeader::NONE;
        let frames: Vec<_> = frames.iter().map(|bytes| GuestFrame { bytes, header }).collect();
        let before = self.nat.cost();
        self.nat.from_guest(port, &frames, self.now, &mut self.out);
        self.out.frames.clear();
        self.nat.cost() - before
    }
}

fn address(port: Port) -> SocketAddr {
    ([192, 168, 64, port.0 as u8], 4000).into()
}

/// A datagram to the peer with this number.
fn datagram(port: Port, peer: u32) -> Vec<u8> {
    let [high, low] = (peer as u16).to_be_bytes();
    udp_frame(
        address(port),
        ([192, 0, 2 + (peer >> 16) as u8, high], 1 + u16::from(low)).into(),
        b"x",
    )
}

/// Goal: a guest all of whose frames open a flow has no more of the translator than one whose frames belong
/// to one flow. Both always have frames waiting.
#[test]
fn a_guest_has_its_share_beside_one_whose_frames_cost_more() {
    let mut shared = Shared::new();
    let (mut cost, mut batches, mut peers) = ([0, 0], [0, 0], 0..);
    let good: Vec<_> = (0..BATCH).map(|_| datagram(GOOD, 0)).collect();
    let mut longest = 0;
    while cost[0] < 200_000 {
        let port = shared.nat.next_port([HOSTILE, GOOD].into_iter()).expect("both wait");
        let spent = match port {
            HOSTILE => {
                let new = peers.by_ref().take(BATCH).map(|peer| datagram(HOSTILE, peer));
                shared.send(HOSTILE, &new.collect::<Vec<_>>())
            }
            _ => shared.send(GOOD, &good),
        };
        let who = usize::from(port == GOOD);
        (cost[who], batches[who], longest) =
            (cost[who] + spent, batches[who] + 1, longest.max(spent));
        assert!(cost[0].abs_diff(cost[1]) <= 2 * longest, "{cost:?}");
    }
    assert!(
        longest >= BATCH as u64 * COST_DATAGRAM_SOCKET,
        "each frame of the hostile guest costs a socket"
    );
    // So the good guest gets many more frames through.
    assert!(batches[1] > 5 * batches[0], "{batches:?}");
    let opened = shared.nat.counters()[Counter::UdpOpened];
    assert_eq!(opened, batches[0] * BATCH as u64 + 1);
}

/// Goal: a guest that is alone has every turn.
#[test]
fn a_guest_that_is_alone_loses_no_turn() {
    let mut shared = Shared::new();
    for peer in 0..300 {
        assert_eq!(shared.nat.next_port([HOSTILE].into_iter()), Some(HOSTILE));
        shared.send(HOSTILE, &[datagram(HOSTILE, peer)]);
    }
    assert_eq!(shared.nat.next_port([].into_iter()), None);
}

/// Goal: a guest whose thousand sockets are ready at once is not in front of another one's single socket.
/// Nothing is lost on the way, also of a socket that has more than one turn takes.
#[test]
fn a_socket_does_not_wait_for_all_sockets_of_another_guest() {
    let mut shared = Shared::new();
    let peers = 1000;
    for peer in 0..peers {
        shared.send(HOSTILE, &[datagram(HOSTILE, peer)]);
    }
    shared.send(GOOD, &[datagram(GOOD, 0)]);
    // Both are even now: the good guest's last socket was opened long ago.
    while shared.nat.next_port([HOSTILE, GOOD].into_iter()) == Some(GOOD) {
        shared.send(GOOD, &[datagram(GOOD, 0)]);
    }
    let from = |index| shared.kernel.with(index, |peer| peer.to);
    let all: Vec<_> = (0..shared.kernel.len()).map(|index| (index, from(index))).collect();
    for (index, from) in all {
        shared.kernel.datagram(index, from, &[0; 1000], 0);
    }
    let more = 299;
    for _ in 0..more {
        shared.kernel.datagram(peers as usize, from(peers as usize), &[0; 1000], 0);
    }
    while let Some((token, readiness)) = shared.kernel.take_event() {
        shared.nat.note_ready(token, readiness);
    }
    let (mut before, start) = (None, shared.nat.cost());
    let mut turns = 0;
    while let Some(port) = shared.nat.next_port([].into_iter()) {
        if port == GOOD {
            before.get_or_insert(shared.nat.cost() - start);
        }
        shared.nat.on_turn(port, shared.now, &mut shared.out);
        turns += 1;
        assert!(turns < 10_000, "it spins");
    }
    assert!(before.is_some_and(|before| before <= 2 * TURN_COST), "{before:?}");
    assert!(shared.nat.cost() - start > 5 * TURN_COST, "the others take several turns");
    assert_eq!(shared.out.frames.len() as u32, peers + 1 + more);
    assert!(!shared.nat.has_due());
}
