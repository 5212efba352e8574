//! What a translator does about IPv6 beside translating: it tells guests whether the gateway leads to the
//! world, and learns which addresses they use.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use vmring_embedded::gateway::Neighbor;
use vmring_nat::sys::{Host, has_ipv6_route};
use vmring_nat::{Counter, Nat, Port};

use super::guests::{Directory, Guests};
use super::limits::{
    ADDRESSES, ADVERTISE_AGAIN, ADVERTISE_MAX, ADVERTISE_MIN, ADVERTISEMENTS_OF_A_CHANGE, ROUTES,
    ROUTES_IDLE,
};

/// See the [module](self).
pub(super) struct Discovery {
    /// Whether the network has IPv6.
    is_on: bool,
    /// Whether this worker is the one that tells guests of the gateway. Each learns.
    tells: bool,
    /// When the host's routes were looked at last. `None` if they were not.
    looked: Option<Duration>,
    /// How many frames guests had sent then.
    frames: u64,
    /// When guests are told of the gateway next.
    advertise_at: Duration,
    /// How often a change is told again.
    again: u32,
    /// What the gateway had seen of neighbours at the last look.
    seen: u64,
    /// When that may be looked at next: a guest can make the gateway see changes.
    learn_at: Duration,
    random: RandomState,
}

impl Discovery {
    pub(super) fn new(is_on: bool, tells: bool) -> Self {
        Self {
            is_on,
            tells,
            looked: None,
            frames: 0,
            advertise_at: Duration::ZERO,
            again: 0,
            seen: 0,
            learn_at: Duration::ZERO,
            random: RandomState::new(),
        }
    }

    /// Does what is due.
    pub(super) fn turn(
        &mut self,
        nat: &mut Nat<Host>,
        guests: &mut Guests,
        directory: &Directory,
        now: Duration,
    ) {
        if self.is_on {
            self.learn(nat, guests, now);
            let frames = nat.counters()[Counter::Frames];
            if self.tells {
                self.tell(frames, guests, directory, now);
            } else if std::mem::replace(&mut self.frames, frames) != frames {
                directory.note_frames(now);
            }
        }
    }

    /// When to call [`turn`](Self::turn) next.
    pub(super) fn next(&self) -> Option<Duration> {
        let look_at = self.looked.map_or(Duration::ZERO, |looked| looked + ROUTES_IDLE);
        (self.is_on && self.tells).then(|| look_at.min(self.advertise_at))
    }

    /// Learns from the gateway who uses which address.
    fn learn(&mut self, nat: &mut Nat<Host>, guests: &Guests, now: Duration) {
        let gateway = guests.end.gateway();
        let changes = gateway.neighbor_changes();
        if changes == self.seen || now < self.learn_at {
            return;
        }
        self.learn_at = now + ADDRESSES;
        let before = std::mem::replace(&mut self.seen, changes);
        for Neighbor { address, mac, port } in gateway.neighbors(before) {
            // An address that is another guest's stays with that one.
            let micros = now.as_micros() as u64;
            let _ = nat.sources().note(Port(port), mac.into_array(), address.into(), micros);
        }
    }

    /// Looks whether the host has a way to the world, and tells guests: at once if that has changed, and
    /// otherwise from time to time.
    fn tell(&mut self, frames: u64, guests: &mut Guests, directory: &Directory, now: Duration) {
        let is_idle = frames == self.frames && !directory.has_frames();
        let pause = if is_idle { ROUTES_IDLE } else { ROUTES };
        if self.looked.is_none_or(|looked| now >= looked + pause) {
            let is_first = self.looked.replace(now).is_none();
            self.frames = frames;
            directory.routes_are_seen();
            if guests.end.set_ipv6_router(has_ipv6_route()) {
                self.again = ADVERTISEMENTS_OF_A_CHANGE - 1;
                self.advertise_at = now + ADVERTISE_AGAIN;
            } else if is_first {
                self.advertise_at = now + self.interval(now);
            }
        }
        if now >= self.advertise_at {
            guests.end.advertise_ipv6();
            self.again = self.again.saturating_sub(1);
            let pause = if self.again > 0 { ADVERTISE_AGAIN } else { self.interval(now) };
            self.advertise_at = now + pause;
        }
    }

    /// A time between two advertisements, by chance (RFC 4861, 6.2.4).
    fn interval(&self, now: Duration) -> Duration {
        let range = (ADVERTISE_MAX - ADVERTISE_MIN).as_millis() as u64;
        ADVERTISE_MIN + Duration::from_millis(self.random.hash_one(now) % range)
    }
}
