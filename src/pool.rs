//! Pools: preallocated, page-aligned packet memory that is divided into frames.
//!
//! A ring makes a pool of its own, unless it is given pools. Several rings can use one pool. This
//! makes it possible to read a frame from one ring and write it to another without a copy.
//!
//! ```
//! use vmring::pool::PoolBuilder;
//!
//! let pool = PoolBuilder::new(256, 1514).headroom(64).prefault(true).build()?;
//! let mut frame = pool.alloc().expect("256 are free");
//! frame.copy_from(b"hello").expect("5 bytes fit");
//! assert_eq!((&frame[..], frame.headroom(), pool.slots_out()), (&b"hello"[..], 64, 1));
//! drop(frame);
//! assert_eq!(pool.slots_out(), 0);
//! # Ok::<(), vmring::Error>(())
//! ```

pub use crate::limits::HEADROOM_DEFAULT;
pub use vmring_core::{Backing, Layout, LayoutError, Pool};

use crate::error::{ConfigError, Error};
use crate::limits::SLOT_ALIGN;
use crate::memory::{Mapping, Region};

/// Builds a [`Pool`] over a new mapping.
#[derive(Clone, Debug)]
pub struct PoolBuilder {
    frames: usize,
    packet_size: usize,
    headroom: usize,
    mapping: Mapping,
}

impl PoolBuilder {
    /// Returns a builder for a pool of `frames` frames, each for packets of up to `packet_size`
    /// bytes (an interface's `max_packet_size`).
    pub fn new(frames: usize, packet_size: usize) -> Self {
        let mapping = Mapping { prefault: false, huge_pages: true };
        Self { frames, packet_size, headroom: HEADROOM_DEFAULT, mapping }
    }

    /// Sets how many bytes are free in front of the packet in a new frame. The default is
    /// [`HEADROOM_DEFAULT`].
    pub fn headroom(mut self, bytes: usize) -> Self {
        self.headroom = bytes;
        self
    }

    /// Sets whether [`build`](Self::build) touches every page, so that no packet pays for a page
    /// fault later. The default is false.
    pub fn prefault(mut self, yes: bool) -> Self {
        self.mapping.prefault = yes;
        self
    }

    /// Sets whether the system is asked for transparent huge pages, where it has them (Linux). The
    /// default is true.
    pub fn huge_pages(mut self, yes: bool) -> Self {
        self.mapping.huge_pages = yes;
        self
    }

    /// Maps the memory and builds the pool.
    ///
    /// The mapping has `frames * slot size` bytes, rounded up to whole pages. A slot's size is the
    /// sum of headroom and packet size, rounded up to a multiple of 128 bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for an invalid size; [`Error::Memory`] if the system does not have that
    /// much memory.
    pub fn build(self) -> Result<Pool, Error> {
        const MAX: u64 = (1 << 31) - 1;
        for (what, value) in [("number of frames", self.frames), ("packet size", self.packet_size)]
        {
            if value == 0 {
                return Err(ConfigError::Zero { what }.into());
            }
            if value as u64 > MAX {
                return Err(ConfigError::TooLarge { what, value: value as u64, max: MAX }.into());
            }
        }
        let slot = self.headroom.saturating_add(self.packet_size);
        let slot = slot.checked_next_multiple_of(SLOT_ALIGN).unwrap_or(usize::MAX);
        let too_large = |value| ConfigError::TooLarge { what: "slot size", value, max: MAX };
        let slot_size = u32::try_from(slot)
            .ok()
            .filter(|s| u64::from(*s) <= MAX)
            .ok_or(too_large(slot as u64))?;
        let bytes = self.frames.checked_mul(slot).ok_or_else(|| Error::Memory {
            bytes: usize::MAX,
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        let region = Region::map(bytes, self.mapping)?;
        let layout =
            Layout { slots: self.frames as u32, slot_size, headroom: self.headroom as u32 };
        Ok(Pool::new(Box::new(region), layout).map_err(ConfigError::from)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_are_refused_in_a_sentence() {
        let message =
            |frames, size| PoolBuilder::new(frames, size).build().unwrap_err().to_string();
        assert_eq!(message(0, 1514), "the number of frames must not be 0");
        assert_eq!(message(8, 0), "the packet size must not be 0");
        assert!(message(1 << 32, 1514).starts_with("the number of frames must be at most"));
        assert!(message(8, usize::MAX).starts_with("the packet size must be at most"));
        assert!(message((1 << 31) - 1, (1 << 31) - 1000).contains("could not be mapped"));
    }

    #[test]
    fn a_slot_holds_headroom_and_a_whole_packet() {
        let pool = PoolBuilder::new(4, 1514).headroom(12).build().unwrap();
        assert!(pool.capacity() >= 1514);
        assert_eq!(pool.alloc().unwrap().headroom(), 12);
        assert_eq!(pool.layout().slot_size % 128, 0);
    }
}
