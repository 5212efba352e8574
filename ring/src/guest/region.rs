//! [`GuestRegion`]: a part of a guest's memory, and [`GuestSlice`]: bytes of it, and every access to
//! them.

use crate::prefetch::{LINE, prefetch};
use crate::sync::foreign::{AtomicU16, AtomicU32, compiler_fence};
use alloc::sync::Arc;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

/// The largest number of regions of one guest. vhost-user front ends use up to 512.
pub const REGIONS_MAX: usize = 1024;

/// A mapping of memory that a guest shares with this program. It is dropped when nothing refers to
/// the memory any more.
///
/// # Safety
///
/// From construction until drop, `len()` bytes at `start()` must be mapped at a fixed address, and
/// valid for the reads and writes of this program that its regions are used for. Anybody may change
/// the bytes at any time. No Rust reference to them may exist meanwhile.
pub unsafe trait GuestMapping: Send + Sync {
    /// The first byte.
    fn start(&self) -> NonNull<u8>;
    /// The number of bytes.
    fn len(&self) -> usize;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where it is recorded which pages of a guest this program has written, for a live migration.
pub trait DirtyLog: Send + Sync {
    /// Records that `len` bytes from `guest_address` on were written. It is called after the bytes
    /// were written, and before the guest is told of them.
    fn mark(&self, guest_address: u64, len: u64);
}

/// A part of a guest's memory.
#[derive(Clone)]
pub struct GuestRegion {
    pub(super) guest_address: u64,
    pub(super) user_address: u64,
    pub(super) len: u64,
    pub(super) host: NonNull<u8>,
    pub(super) mapping: Arc<dyn GuestMapping>,
    pub(super) dirty_log: Option<Arc<dyn DirtyLog>>,
}

// SAFETY: the pointer is into the mapping, which is `Send` and lives as long as the region. Nobody
// makes references of it.
unsafe impl Send for GuestRegion {}
// SAFETY: the same; a shared region gives away addresses only, and its accesses are those that a
// guest may make at the same time anyway.
unsafe impl Sync for GuestRegion {}

impl GuestRegion {
    /// The region of a whole mapping, whose first byte the guest calls `guest_address`.
    pub fn new(guest_address: u64, mapping: Arc<dyn GuestMapping>) -> Self {
        let (host, len) = (mapping.start(), mapping.len() as u64);
        Self { guest_address, user_address: guest_address, len, host, mapping, dirty_log: None }
    }

    /// The region of the mapping's bytes from `offset` on, `len` of them.
    ///
    /// # Errors
    ///
    /// [`GuestMemoryError::OutsideMapping`] if the mapping has fewer bytes.
    pub fn part(
        guest_address: u64,
        mapping: Arc<dyn GuestMapping>,
        offset: u64,
        len: u64,
    ) -> Result<Self, GuestMemoryError> {
        let outside = GuestMemoryError::OutsideMapping { guest_address };
        let end = offset.checked_add(len).ok_or(outside)?;
        if end > mapping.len() as u64 {
            return Err(outside);
        }
        // SAFETY: `offset` is at most the mapping's length, so this is in the mapping or directly
        // behind it. It fits into a `usize`, as that length does.
        let host = unsafe { mapping.start().add(offset as usize) };
        Ok(Self { host, len, ..Self::new(guest_address, mapping) })
    }

    /// Sets the address that the front end of a vhost-user connection has for the region's first
    /// byte. Without this it is the guest's address.
    #[must_use]
    pub fn user_address(self, user_address: u64) -> Self {
        Self { user_address, ..self }
    }

    /// Sets where it is recorded which pages were written.
    #[must_use]
    pub fn dirty_log(self, dirty_log: Option<Arc<dyn DirtyLog>>) -> Self {
        Self { dirty_log, ..self }
    }

    /// Whether it is recorded which pages were written.
    pub fn has_dirty_log(&self) -> bool {
        self.dirty_log.is_some()
    }

    /// The address of the first byte in the guest's memory.
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// The number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapping in which the region is.
    pub fn mapping(&self) -> &Arc<dyn GuestMapping> {
        &self.mapping
    }

    /// The same bytes under another address. Dirty marks name the new address.
    #[must_use]
    pub fn readdressed(self, guest_address: u64) -> Self {
        Self { guest_address, ..self }
    }

    /// The bytes from `offset` on, `len` of them. `None` if not all of them are in the region, or if
    /// their addresses exceed 64 bits.
    #[inline]
    pub fn get(&self, offset: u64, len: u32) -> Option<GuestSlice<'_>> {
        let end = offset.checked_add(u64::from(len))?;
        self.guest_address.checked_add(end)?;
        (end <= self.len).then(|| self.slice_inside(offset, len))
    }

    /// The `len` bytes from a guest's address on. `None` if not all of them are in the region, or if their
    /// addresses exceed 64 bits.
    #[inline]
    pub fn at(&self, guest_address: u64, len: u32) -> Option<GuestSlice<'_>> {
        let offset = guest_address.checked_sub(self.guest_address)?;
        guest_address.checked_add(u64::from(len))?;
        let behind = self.len.checked_sub(offset)?;
        (u64::from(len) <= behind).then(|| self.slice_inside(offset, len))
    }

    /// The `N` bytes from `offset` on, copied out once. `None` if not all of them are in the region.
    #[inline]
    pub fn read<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        if offset > self.len.checked_sub(N as u64)? {
            return None;
        }
        // SAFETY: `N` bytes from `offset` on are in the region, and the region is in its mapping, by
        // `new` and `part`.
        let start = unsafe { self.host.add(offset as usize) };
        // SAFETY: the same; the mapping lives as long as the region does.
        unsafe { GuestSlice::new(start, N as u32, 0, None) }.read()
    }

    /// The region of the bytes from `offset` on, `len` of them, which the caller has checked.
    pub(super) fn cut(&self, offset: u64, len: u64) -> Self {
        debug_assert!(offset <= self.len && len <= self.len - offset);
        Self {
            guest_address: self.guest_address + offset,
            user_address: self.user_address + offset,
            len,
            // SAFETY: `offset` is at most the region's length, and the region is in its mapping, by
            // `new` and `part`.
            host: unsafe { self.host.add(offset as usize) },
            ..self.clone()
        }
    }

    /// The bytes from `offset` on, `len` of them, or as many as there are.
    ///
    /// The caller has checked that `offset` is not behind the region's end.
    pub(super) fn slice(&self, offset: u64, len: u32) -> GuestSlice<'_> {
        self.slice_inside(offset, u64::from(len).min(self.len - offset) as u32)
    }

    /// The bytes from `offset` on, `len` of them, which the caller has found to be inside.
    #[inline]
    fn slice_inside(&self, offset: u64, len: u32) -> GuestSlice<'_> {
        debug_assert!(offset <= self.len && u64::from(len) <= self.len - offset);
        // SAFETY: `offset` is at most the region's length, and the region is in its mapping, by
        // `new` and `part`.
        let start = unsafe { self.host.add(offset as usize) };
        // SAFETY: `len` bytes from `offset` on are in the region, and with it in its mapping, which
        // lives as long as the region does.
        unsafe { GuestSlice::new(start, len, self.guest_address + offset, Some(self)) }
    }

    #[inline]
    pub(super) fn mark_dirty(&self, guest_address: u64, len: u32) {
        if let Some(log) = &self.dirty_log {
            log.mark(guest_address, u64::from(len));
        }
    }
}

impl fmt::Debug for GuestRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRegion")
            .field("guest_address", &format_args!("{:#x}", self.guest_address))
            .field("user_address", &format_args!("{:#x}", self.user_address))
            .field("len", &self.len)
            .field("has_dirty_log", &self.dirty_log.is_some())
            .finish_non_exhaustive()
    }
}

/// Why regions are no memory of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestMemoryError {
    /// The mapping has fewer bytes than the region.
    OutsideMapping {
        /// Where the region begins in the guest's memory.
        guest_address: u64,
    },
    /// The region has no bytes.
    Empty {
        /// Where the region begins in the guest's memory.
        guest_address: u64,
    },
    /// The addresses of the region go beyond 2^64.
    Overflow {
        /// Where the region begins in the guest's memory.
        guest_address: u64,
    },
    /// Two regions have an address in common, in the guest's memory or in the front end's.
    Overlap {
        /// Where the second of them begins in the guest's memory.
        guest_address: u64,
    },
    /// There are more than [`REGIONS_MAX`] regions.
    TooMany,
}

impl fmt::Display for GuestMemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestMemoryError::OutsideMapping { guest_address } => {
                write!(f, "the region at {guest_address:#x} is longer than its mapping")
            }
            GuestMemoryError::Empty { guest_address } => {
                write!(f, "the region at {guest_address:#x} has no bytes")
            }
            GuestMemoryError::Overflow { guest_address } => {
                write!(f, "the addresses of the region at {guest_address:#x} exceed 64 bits")
            }
            GuestMemoryError::Overlap { guest_address } => {
                write!(f, "the region at {guest_address:#x} overlaps another region")
            }
            GuestMemoryError::TooMany => {
                write!(f, "a guest has at most {REGIONS_MAX} regions of memory")
            }
        }
    }
}

impl core::error::Error for GuestMemoryError {}

/// Adjacent bytes of a guest's memory. It is never a Rust slice, because the guest may change the
/// bytes at any time; see [`crate::guest`].
///
/// What is read may be torn: a byte of it may be older than its neighbours. What is written appears
/// to the guest in any order. The atomics ([`atomic_u16`](Self::atomic_u16)) order the rest, as the
/// virtio specification demands of a device.
///
/// A write does not enter the pages into the guest's dirty log. Call [`mark_dirty`](Self::mark_dirty)
/// before the guest is told of what was written. That costs once per packet what it would cost for
/// each piece.
#[derive(Clone, Copy)]
pub struct GuestSlice<'m> {
    start: NonNull<u8>,
    len: u32,
    guest_address: u64,
    /// `None` in a [`GuestBuffer`](crate::GuestBuffer), which does not know it.
    region: Option<&'m GuestRegion>,
    /// The mapping is borrowed, so it stays.
    memory: PhantomData<&'m ()>,
}

// SAFETY: the bytes are reached by copies and atomics only, and everybody may do that at any time.
unsafe impl Send for GuestSlice<'_> {}
// SAFETY: the same.
unsafe impl Sync for GuestSlice<'_> {}

impl<'m> GuestSlice<'m> {
    /// # Safety
    ///
    /// `len` bytes at `start` are in a [`GuestMapping`] that lives for `'m`.
    #[inline]
    pub(super) unsafe fn new(
        start: NonNull<u8>,
        len: u32,
        guest_address: u64,
        region: Option<&'m GuestRegion>,
    ) -> Self {
        Self { start, len, guest_address, region, memory: PhantomData }
    }

    /// The region that the bytes are in.
    #[inline]
    pub(super) fn region(&self) -> Option<&'m GuestRegion> {
        self.region
    }

    /// The number of bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The guest's address of the first byte.
    #[inline]
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// This program's address of the first byte, for the kernel. Do not make a reference of it.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The first `at` bytes, and those behind. `None` if there are fewer than `at`.
    #[inline]
    pub fn split_at(self, at: u32) -> Option<(Self, Self)> {
        let behind = self.len.checked_sub(at)?;
        // SAFETY: `at` is at most `len`, so this is in the mapping or directly behind it.
        let start = unsafe { self.start.add(at as usize) };
        let rest =
            Self { start, len: behind, guest_address: self.guest_address + u64::from(at), ..self };
        Some((Self { len: at, ..self }, rest))
    }

    /// The bytes from `at` on. `None` if there are fewer than `at`.
    #[inline]
    pub fn skip(self, at: u32) -> Option<Self> {
        self.split_at(at).map(|(_, rest)| rest)
    }

    /// Copies bytes out of the guest's memory, from the start on: as many as both sides have.
    /// Returns how many.
    #[inline]
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.len as usize);
        // SAFETY: `len` bytes are in the mapping (`new`) and in `to`. They do not overlap: no Rust
        // reference to the mapping exists (`GuestMapping`). The guest may write at the same time, so
        // the copy may be torn, and every value of a byte is valid.
        unsafe { core::ptr::copy_nonoverlapping(self.start.as_ptr(), to.as_mut_ptr(), len) };
        // The compiler must not read the guest's bytes again instead of their copy: they may have
        // changed, after the copy was checked.
        compiler_fence(Ordering::SeqCst);
        len
    }

    /// Copies bytes into the guest's memory, from the start on: as many as both sides have. Returns
    /// how many.
    #[inline]
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let len = from.len().min(self.len as usize);
        // SAFETY: as in `copy_to`, with the sides exchanged.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), self.start.as_ptr(), len) };
        compiler_fence(Ordering::SeqCst);
        len
    }

    /// Copies bytes from one guest's memory into another's, or within one: as many as both sides
    /// have. Returns how many. The two may overlap, because a guest names the same memory as often
    /// as it likes.
    #[inline]
    pub fn copy_from_guest(&self, from: GuestSlice<'_>) -> usize {
        let len = from.len.min(self.len) as usize;
        // SAFETY: `len` bytes are in each mapping (`new`), and `copy` allows them to overlap.
        unsafe { core::ptr::copy(from.start.as_ptr(), self.start.as_ptr(), len) };
        compiler_fence(Ordering::SeqCst);
        len
    }

    /// The first `N` bytes, copied out once. `None` if there are fewer.
    #[inline]
    pub fn read<const N: usize>(&self) -> Option<[u8; N]> {
        if (self.len as usize) < N {
            return None;
        }
        let mut bytes = [0; N];
        // SAFETY: as in `copy_to`. The length is a constant, so that this is no call.
        unsafe { core::ptr::copy_nonoverlapping(self.start.as_ptr(), bytes.as_mut_ptr(), N) };
        compiler_fence(Ordering::SeqCst);
        Some(bytes)
    }

    /// Copies `N` bytes into the guest's memory. Returns false, and copies nothing, if there are fewer.
    #[inline]
    pub fn write<const N: usize>(&self, bytes: &[u8; N]) -> bool {
        if (self.len as usize) < N {
            return false;
        }
        // SAFETY: as in `read`, with the sides exchanged.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr(), N) };
        compiler_fence(Ordering::SeqCst);
        true
    }

    /// Asks for the cache lines of the first 128 bytes, which are about to be read: a header and a short
    /// packet. This is a hint, which affects only the time.
    #[inline]
    pub fn prefetch_head(&self) {
        let start = self.start.as_ptr();
        prefetch(start);
        if self.len as usize > LINE {
            prefetch(start.wrapping_add(LINE));
        }
    }

    /// The two bytes at `at`, as an atomic that the guest shares. `None` if they are not in this
    /// slice, or not at an even address.
    #[inline]
    pub fn atomic_u16(&self, at: u32) -> Option<&'m AtomicU16> {
        let place = self.place::<AtomicU16>(at)?;
        // SAFETY: `place` saw that the bytes are in the mapping, which lives for `'m`, and aligned.
        // Others change them at the same time, as an atomic allows.
        Some(unsafe { AtomicU16::from_ptr(place.as_ptr().cast()) })
    }

    /// The four bytes at `at`, as an atomic that the guest shares. `None` if they are not in this
    /// slice, or not at an address that four divides.
    #[inline]
    pub fn atomic_u32(&self, at: u32) -> Option<&'m AtomicU32> {
        let place = self.place::<AtomicU32>(at)?;
        // SAFETY: as in `atomic_u16`.
        Some(unsafe { AtomicU32::from_ptr(place.as_ptr().cast()) })
    }

    fn place<T>(&self, at: u32) -> Option<NonNull<T>> {
        let end = at.checked_add(size_of::<T>() as u32)?;
        if end > self.len {
            return None;
        }
        // SAFETY: `at` is less than `len`.
        let place = unsafe { self.start.add(at as usize) };
        place.addr().get().is_multiple_of(align_of::<T>()).then(|| place.cast())
    }

    /// Enters the first `len` bytes into the guest's dirty log, if there is one. A slice of a
    /// [`GuestBuffer`](crate::GuestBuffer) has none, because a log can begin while the buffer is in a
    /// ring; see [`GuestMemory::mark_dirty`](crate::guest::GuestMemory::mark_dirty).
    #[inline]
    pub fn mark_dirty(&self, len: u32) {
        if let Some(region) = self.region {
            region.mark_dirty(self.guest_address, len.min(self.len));
        }
    }
}

impl fmt::Debug for GuestSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestSlice")
            .field("guest_address", &format_args!("{:#x}", self.guest_address))
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
