//! The memory that a front end shares: its mappings, and the dirty log.

use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use vmring_core::guest::{DirtyLog, GuestMapping, GuestMemory, GuestRegion};
use vmring_core::sync::Ordering;

use crate::sys::{self, kind};
use crate::vhost_user::error::MapError;

/// The largest page of a file that is believed: 16 GiB.
const PAGE_MAX: u64 = 1 << 34;

/// Is told which of this process's addresses are a front end's file.
///
/// A front end that shortens a file that it shares makes every access to the lost pages raise SIGBUS.
/// A program that handles the signal must know whether the address belongs to a front end, and to
/// which. See the module [`vhost_user`](crate::vhost_user).
pub trait MappingObserver: Send + Sync {
    /// `len` bytes from the address `start` on are the front end's now, in whole pages. Nothing has
    /// accessed them yet.
    ///
    /// Returns whether the observer can look after them. If not, the memory is refused, by
    /// [`MapError::Unobserved`].
    fn mapped(&self, start: usize, len: usize) -> bool;

    /// Nothing accesses these bytes any more, which were [mapped](Self::mapped). They are unmapped
    /// after this returns.
    fn unmapped(&self, start: usize, len: usize);
}

/// A range that an observer looks after, until this is dropped.
struct Observed {
    observer: Arc<dyn MappingObserver>,
    start: usize,
    len: usize,
}

impl Observed {
    /// Tells the observer of the pages that have `len` bytes from `start` on.
    ///
    /// They are pages of this machine. A mapping of huge pages begins and ends with one, and `len` says
    /// so. The size that a file system claims for its blocks would not do, because an address need not
    /// be a multiple of it: the observer would take what is mapped in front for the front end's.
    fn new(
        observer: &Arc<dyn MappingObserver>,
        start: *mut u8,
        len: usize,
    ) -> Result<Self, MapError> {
        let page = sys::page_size();
        let end = (start.addr() + len).next_multiple_of(page);
        let start = start.addr() / page * page;
        match observer.mapped(start, end - start) {
            true => Ok(Self { observer: observer.clone(), start, len: end - start }),
            false => Err(MapError::Unobserved),
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.observer.unmapped(self.start, self.len);
    }
}

/// Bytes of a file that the front end shares.
pub(super) struct Mapping {
    /// It is declared before `map`, so that the observer is told before the bytes are unmapped.
    _observed: Option<Observed>,
    map: MmapRaw,
    /// The mapping begins at a page; this is where the wanted bytes begin.
    skip: usize,
    len: usize,
}

// SAFETY: the mapping is readable and writable (`map_raw`), and it stays at its address until it is
// dropped, because nothing here resizes it. `skip + len` bytes are mapped, by `Mapping::new`. `map`
// is private to this file, which makes no reference to the bytes. A front end that shortens the file
// makes accesses fail with SIGBUS, which is no undefined behaviour; see the module `vhost_user`.
unsafe impl GuestMapping for Mapping {
    fn start(&self) -> NonNull<u8> {
        let start = self.map.as_mut_ptr().wrapping_add(self.skip);
        NonNull::new(start).expect("a mapping is not at address 0")
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Mapping {
    /// Maps `len` bytes from `offset` on. The file must have `needed` of them.
    fn new(
        file: &File,
        metadata: &Metadata,
        offset: u64,
        len: u64,
        needed: u64,
        observer: Option<&Arc<dyn MappingObserver>>,
    ) -> Result<Self, MapError> {
        let overflow = || MapError::Overflow { offset, len };
        let mode = metadata.mode();
        let kind = sys::file_type(mode);
        if kind != kind::FILE && !(cfg!(target_vendor = "apple") && kind == kind::NONE) {
            return Err(MapError::NotMemory { mode });
        }
        let needed = offset.checked_add(needed).ok_or_else(overflow)?;
        if needed > metadata.len() {
            return Err(MapError::TooShort { file: metadata.len(), needed });
        }
        // The kernel maps and unmaps a file on hugetlbfs in its own pages only; their size is the
        // block size. `MmapOptions` cares for the pages of every other file.
        let page = Some(metadata.blksize())
            .filter(|size| size.is_power_of_two() && *size <= PAGE_MAX)
            .unwrap_or(1);
        let skip = offset % page;
        let whole = (skip.checked_add(len))
            .and_then(|len| len.checked_next_multiple_of(page))
            .and_then(|len| isize::try_from(len).ok())
            .ok_or_else(overflow)?;
        let map = MmapOptions::new().offset(offset - skip).len(whole as usize).map_raw(file)?;
        let observed = observer
            .map(|observer| Observed::new(observer, map.as_mut_ptr(), map.len()))
            .transpose()?;
        Ok(Self { _observed: observed, map, skip: skip as usize, len: len as usize })
    }
}

/// What a connection may map.
#[derive(Clone, Copy)]
pub(super) struct Limits<'a> {
    pub(super) slots: usize,
    pub(super) bytes: u64,
    pub(super) demand_seals: bool,
    pub(super) observer: Option<&'a Arc<dyn MappingObserver>>,
}

impl Limits<'_> {
    /// Seals a file against shrinking. Returns whether it is sealed. It asks no file system that could
    /// belong to the front end and never answer.
    ///
    /// # Errors
    ///
    /// [`MapError::NotSealed`], if it is to be sealed and cannot be.
    fn seal(&self, file: &File) -> Result<bool, MapError> {
        match sys::seal_against_shrinking(file.as_fd()) {
            false if self.demand_seals => Err(MapError::NotSealed),
            sealed => Ok(sealed),
        }
    }
}

/// A region of the guest's memory that is mapped.
#[derive(Clone)]
pub(super) struct Region {
    pub(super) guest_address: u64,
    pub(super) user_address: u64,
    pub(super) size: u64,
    /// Whether the front end cannot shorten the file.
    pub(super) sealed: bool,
    mapping: Arc<Mapping>,
}

impl Region {
    pub(super) fn map(
        file: &File,
        guest_address: u64,
        user_address: u64,
        size: u64,
        offset: u64,
        limits: Limits<'_>,
    ) -> Result<Self, MapError> {
        // The seal comes before the look at the length.
        let sealed = limits.seal(file)?;
        let mapping = Mapping::new(file, &file.metadata()?, offset, size, size, limits.observer)?;
        Ok(Self { guest_address, user_address, size, sealed, mapping: Arc::new(mapping) })
    }

    /// The region as a part of a [`GuestMemory`].
    pub(super) fn part(&self, log: Option<Arc<DirtyBitmap>>) -> GuestRegion {
        GuestRegion::new(self.guest_address, self.mapping.clone())
            .user_address(self.user_address)
            .dirty_log(log.map(|log| log as Arc<dyn DirtyLog>))
    }
}

/// The pages that a bit of the log stands for have 4 KiB (`VHOST_LOG_PAGE`).
const LOG_PAGE_SHIFT: u32 = 12;

/// The dirty log that the front end shares: a bit for each 4 KiB of the guest's addresses, from the
/// address 0 on (section "Migration").
pub(super) struct DirtyBitmap {
    /// The log's mapping as a memory of its own, which lends atomics.
    memory: GuestMemory,
    /// The bytes of the mapping before the log. The mapping begins at a multiple of four, as the
    /// atomics demand; the log need not.
    skip: u64,
    /// The bytes of the log.
    size: u64,
}

impl DirtyBitmap {
    pub(super) fn map(
        file: &File,
        offset: u64,
        size: u64,
        limits: Limits<'_>,
    ) -> Result<Self, MapError> {
        limits.seal(file)?;
        let skip = offset % 4;
        let overflow = MapError::Overflow { offset, len: size };
        let Some(needed) = skip.checked_add(size).filter(|_| size > 0) else {
            return Err(overflow);
        };
        // The last word may end up to three bytes behind the log, but in the same page.
        let Some(len) = needed.checked_next_multiple_of(4) else { return Err(overflow) };
        let metadata = file.metadata()?;
        let mapping = Mapping::new(file, &metadata, offset - skip, len, needed, limits.observer)?;
        let memory = GuestMemory::new([GuestRegion::new(0, Arc::new(mapping))]);
        Ok(Self { memory: memory.map_err(|_| overflow)?, skip, size })
    }

    /// Whether the page of this address has a bit.
    pub(super) fn covers(&self, guest_address: u64) -> bool {
        (guest_address >> LOG_PAGE_SHIFT) / 8 < self.size
    }
}

impl DirtyLog for DirtyBitmap {
    fn mark(&self, guest_address: u64, len: u64) {
        let Some(further) = len.checked_sub(1) else { return };
        let mut page = guest_address >> LOG_PAGE_SHIFT;
        // The session has seen that the log covers the memory and the used rings. Nothing else may
        // be written behind it.
        let pages = self.size.saturating_mul(8);
        let end = (guest_address.saturating_add(further) >> LOG_PAGE_SHIFT).saturating_add(1);
        let end = end.min(pages);
        while page < end {
            let word = (self.skip + page / 8) / 4;
            let mut bits = [0u8; 4];
            while page < end && (self.skip + page / 8) / 4 == word {
                // The bits of a byte begin at the lowest one, and the bytes of the word are in the
                // order of the machine.
                bits[((self.skip + page / 8) % 4) as usize] |= 1 << (page % 8);
                page += 1;
            }
            let slice = self.memory.slice(word * 4, 4);
            let word = slice.and_then(|slice| slice.atomic_u32(0)).expect("the log has this word");
            // Release: pairs with the atomic exchange in which the front end takes the bits. If it
            // sees the bit, it sees the bytes that were written before. The bit is set even if it
            // is set already, because the front end may have taken it while the bytes were written.
            word.fetch_or(u32::from_ne_bytes(bits), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::without_provenance_mut;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(usize, usize)>>);

    impl MappingObserver for Seen {
        fn mapped(&self, start: usize, len: usize) -> bool {
            self.0.lock().unwrap().push((start, len));
            true
        }

        fn unmapped(&self, start: usize, len: usize) {
            assert_eq!(self.0.lock().unwrap().pop(), Some((start, len)));
        }
    }

    /// Goal: whatever the size of a file's blocks is, nothing is observed but what is mapped. A handler
    /// of SIGBUS replaces all that is observed.
    #[test]
    fn nothing_in_front_of_a_mapping_is_observed() {
        let page = sys::page_size();
        let seen = Arc::new(Seen::default());
        let observer: Arc<dyn MappingObserver> = seen.clone();
        for (start, len, pages) in [
            // One block of a file system with large ones.
            (3 * page, 512 * page, 3..515),
            (512 * page, 512 * page, 512..1024),
            // A part of a page, and of two.
            (3 * page + 16, 5, 3..4),
            (3 * page - 1, 2, 2..4),
        ] {
            let observed = Observed::new(&observer, without_provenance_mut(start), len);
            let range = (pages.start * page, pages.len() * page);
            assert_eq!(seen.0.lock().unwrap().as_slice(), [range]);
            drop(observed);
            assert!(seen.0.lock().unwrap().is_empty());
        }
    }
}
