//! What the flows of TCP share: blocks of memory, what their sockets cost, and a secret.

use std::hash::{BuildHasher, RandomState};

use crate::buffers::Pool;
use crate::config::Limits;
use crate::limits::{RING_LEN, RINGS, SPILL_BLOCK, SPILL_BLOCKS};
use crate::output::Port;
use crate::seq::Seq;
use crate::sockets::Capabilities;
use crate::tcp::segment::Key;

/// What the flows share.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Blocks for bytes to the world that the kernel did not take.
    pub(crate) spill: Pool,
    /// Rings for bytes to guests, where the kernel cannot keep them.
    pub(crate) rings: Pool,
    /// What all sockets may cost the kernel, in bytes.
    pub(crate) kernel: u64,
    /// What those of each port may cost it.
    kernel_of: Vec<u64>,
    /// How many sockets there are.
    pub(crate) descriptors: usize,
    pub(crate) capabilities: Capabilities,
    secret: RandomState,
}

impl Memory {
    pub(crate) fn new(capabilities: Capabilities) -> Self {
        Self {
            spill: Pool::new(SPILL_BLOCK, SPILL_BLOCKS),
            rings: Pool::new(RING_LEN, RINGS),
            kernel: 0,
            kernel_of: Vec::new(),
            descriptors: 0,
            capabilities,
            secret: RandomState::new(),
        }
    }

    /// Makes room for what is counted for a port.
    pub(crate) fn grow(&mut self, port: Port) {
        self.spill.grow(port);
        self.rings.grow(port);
    }

    /// Counts a socket of a port that may cost the kernel `after` bytes, instead of `before`.
    pub(crate) fn charge(&mut self, port: Port, before: u32, after: u32) {
        let index = port.0 as usize;
        if index >= self.kernel_of.len() {
            self.kernel_of.resize(index + 1, 0);
        }
        for kernel in [&mut self.kernel, &mut self.kernel_of[index]] {
            *kernel = *kernel - u64::from(before) + u64::from(after);
        }
    }

    /// Whether the sockets of a port, or all, may cost the kernel more than they are to.
    pub(crate) fn is_short(&self, port: Port, limits: &Limits) -> bool {
        let own = self.kernel_of.get(port.0 as usize).copied().unwrap_or(0);
        self.kernel > limits.kernel_memory || own > limits.port.kernel_memory
    }

    /// The first sequence number of a flow (RFC 6528, 3): a clock that counts every 4 microseconds,
    /// and a keyed hash of the addresses and ports, so that nobody else can guess it.
    pub(crate) fn initial_sequence(&self, key: &Key, now: u64) -> Seq {
        Seq((self.secret.hash_one(key) as u32).wrapping_add((now / 4) as u32))
    }
}
