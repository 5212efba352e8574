//! What a contender for packets out of a TAP, or into it, has to do.

use std::time::Duration;

use crate::result::Result;

/// What one look at the TAP gave.
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

/// Something that reads packets.
pub(crate) trait Reader {
    /// Takes what is there, about a batch; where nothing is there, waits for at most `patience`.
    fn read(&mut self, patience: Duration) -> Result<Taken>;

    /// Leaves packets that come in the TAP's queue until the next `read`. Most do so anyway.
    fn rest(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Something that writes packets.
pub(crate) trait Writer {
    /// Writes `count` packets and returns when the kernel has all of them.
    fn write(&mut self, count: usize) -> Result<()>;
}
