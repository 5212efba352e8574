//! What a contender for packets out of a TAP, or into it, has to do.

use std::time::Duration;

use crate::result::Result;

/// The packets of one look at the TAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Taken {
    pub(crate) fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
    }
}

/// A contender that reads packets.
pub(crate) trait Reader {
    /// Takes the packets that are there, about a batch. If there are none, waits for at most
    /// `patience`.
    fn read(&mut self, patience: Duration) -> Result<Taken>;

    /// Leaves packets that arrive in the TAP's queue until the next `read`. Most contenders do so
    /// anyway.
    fn rest(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A contender that writes packets.
pub(crate) trait Writer {
    /// Writes `count` packets and returns when the kernel has all of them.
    fn write(&mut self, count: usize) -> Result<()>;
}
