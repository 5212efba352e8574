//! A guest's port: the frames that it gets, and a translator that gives them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use vmring_core::offload::{OffloadHeader, Offloads};
use vmring_nat::{Full, GuestFrame, Link, Nat, NatConfig, Output, Port};

use super::kernel::Kernel;

pub(crate) const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The frames for a guest.
#[derive(Debug)]
pub(crate) struct Frames {
    pub(crate) frames: VecDeque<(Vec<u8>, OffloadHeader)>,
    pub(crate) link: Link,
    /// How many more frames it takes.
    pub(crate) space: usize,
    /// Whether `space` is told before.
    pub(crate) tells: bool,
}

impl Output for Frames {
    fn link(&self, _: Port) -> Link {
        self.link
    }

    fn space(&self, _: Port) -> usize {
        if self.tells { self.space } else { usize::MAX }
    }

    fn send(&mut self, _: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full> {
        assert!(frame.len() <= self.link.longest, "too long a frame: {}", frame.len());
        if self.space == 0 {
            return Err(Full);
        }
        self.space -= 1;
        self.frames.push_back((frame.to_vec(), *header));
        Ok(())
    }
}

/// A translator over the model of the kernel, for one guest.
pub(crate) struct Net {
    pub(crate) nat: Nat<Kernel>,
    pub(crate) kernel: Kernel,
    pub(crate) out: Frames,
    pub(crate) now: Duration,
    /// When the translator wants to be called.
    pub(crate) next: Option<Duration>,
    /// How often it was called because it wanted to be.
    pub(crate) calls: usize,
}

pub(crate) const PORT: Port = Port(3);

pub(crate) fn config(rings_only: bool) -> NatConfig {
    let v4 = "192.168.64.1".parse().unwrap();
    let v6 = "fd00::1".parse().unwrap();
    let mut config = NatConfig::new(GATEWAY_MAC, v4, v6);
    config.rings_only = rings_only;
    config
}

pub(crate) fn plain_link() -> Link {
    Link { mtu: 1500, offloads: Offloads::default(), longest: 1514 }
}

impl Net {
    pub(crate) fn new(config: NatConfig, link: Link) -> Self {
        let kernel = Kernel::new();
        let now = Duration::from_secs(1000);
        let nat = Nat::new(config, kernel.clone(), now);
        let out = Frames { frames: VecDeque::new(), link, space: usize::MAX, tells: true };
        Self { nat, kernel, out, now, next: None, calls: 0 }
    }

    /// Gives the translator a batch of frames.
    pub(crate) fn send(&mut self, frames: &[Vec<u8>]) {
        let header = OffloadHeader::NONE;
        let frames: Vec<_> = frames.iter().map(|bytes| GuestFrame { bytes, header }).collect();
        self.nat.from_guest(PORT, &frames, self.now, &mut self.out);
        self.settle();
    }

    /// Tells the translator what is ready, until nothing is. Nothing may be ready again and again.
    pub(crate) fn settle(&mut self) {
        for _ in 0..10_000 {
            self.next = self.nat.on_time(self.now, &mut self.out);
            let Some((token, readiness)) = self.kernel.take_event() else {
                if self.next.is_none_or(|next| next > self.now) {
                    return;
                }
                continue;
            };
            self.nat.on_ready(token, readiness, self.now, &mut self.out);
        }
        panic!("it spins");
    }

    /// Lets time pass, and calls the translator when it wants to be called.
    pub(crate) fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        let mut calls = 0;
        while let Some(next) = self.next.filter(|&next| next <= end) {
            self.now = self.now.max(next);
            self.settle();
            calls += 1;
            assert!(calls < 100_000, "it spins");
        }
        self.calls += calls;
        self.now = end;
        self.settle();
    }

    /// The port takes so many frames from now on.
    pub(crate) fn set_space(&mut self, space: usize) {
        self.out.space = space;
        if space > 0 {
            self.nat.on_space(PORT, self.now, &mut self.out);
            self.settle();
        }
    }

    pub(crate) fn accept(&mut self, from: SocketAddr, guest: SocketAddr) -> usize {
        let socket = self.kernel.accepted(from);
        let index = socket.index;
        let guest = (guest, GUEST_MAC);
        let (now, out) = (self.now, &mut self.out);
        self.nat.accept_tcp(socket, from, PORT, guest, from, now, out).unwrap();
        self.settle();
        index
    }

    /// Nothing is left: no flow, no descriptor.
    pub(crate) fn assert_empty(&mut self) {
        assert_eq!(self.nat.usage(), (0, 0), "flows and descriptors");
        assert_eq!(self.kernel.open(), 0, "sockets");
    }
}
