//! The memory of a guest.
//!
//! A guest changes its memory at any time, and so does the program that runs it. So no reference to
//! these bytes exists here, neither `&[u8]` nor `&mut [u8]`: code copies bytes in or out, or hands
//! an address to the kernel. Code that decides by bytes copies them once and looks at its copy.

pub(crate) mod buffer;
mod memory;
pub(crate) mod region;
pub(crate) mod segments;

pub use buffer::{GuestBuffer, Segments};
pub use memory::{GuestFault, GuestMemory, Slices};
pub use region::{DirtyLog, GuestMapping, GuestMemoryError, GuestRegion, GuestSlice, REGIONS_MAX};
pub use segments::{GuestBufferError, SEGMENTS_MAX, SegmentTable};
