//! Packet memory: one page-aligned anonymous mapping per pool.

use std::io;
use std::ptr::NonNull;

use memmap2::{MmapMut, MmapOptions};
use vmring_core::Backing;

use crate::error::Error;

/// The system's page size in bytes: 4 KiB on most machines, 16 KiB on Apple silicon.
pub fn page_size() -> usize {
    // SAFETY: sysconf takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("the system knows its page size")
}

/// How a region is mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Touch every page now, so that no packet pays for a page fault.
    pub(crate) prefault: bool,
    /// Ask for transparent huge pages where the system has them.
    pub(crate) huge_pages: bool,
}

/// A private anonymous mapping, zeroed, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapMut,
    base: NonNull<u8>,
}

// SAFETY: the pointer is to the mapping that this value owns.
unsafe impl Send for Region {}

// SAFETY: the mapping is zeroed, owned by this value alone, never moved or resized, and `map` is not
// handed out.
unsafe impl Backing for Region {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.map.len()
    }
}

impl Region {
    /// At least `bytes` bytes, rounded up to whole pages.
    pub(crate) fn map(bytes: usize, mapping: Mapping) -> Result<Self, Error> {
        let fail = |source| Error::Memory { bytes, source };
        let len = bytes
            .checked_next_multiple_of(page_size())
            .filter(|len| isize::try_from(*len).is_ok())
            .ok_or_else(|| fail(io::Error::from(io::ErrorKind::OutOfMemory)))?;
        let mut map = MmapOptions::new().len(len).map_anon().map_err(fail)?;
        #[cfg(target_os = "linux")]
        if mapping.huge_pages {
            // Advice: a kernel without transparent huge pages refuses it, and nothing changes.
            if let Err(error) = map.advise(memmap2::Advice::HugePage) {
                tracing::debug!(%error, "no transparent huge pages");
            }
        }
        if mapping.prefault {
            // Writing one byte of each page makes it ours, on every system and after the advice.
            map.iter_mut().step_by(page_size()).for_each(|byte| {
                // Volatile, so that storing a zero over a zero is not optimised away.
                // SAFETY: a valid, exclusively borrowed byte.
                unsafe { std::ptr::write_volatile(byte, 0) }
            });
        }
        let base = NonNull::new(map.as_mut_ptr()).expect("a mapping is not at address 0");
        Ok(Self { map, base })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_page_aligned_and_whole_pages() {
        for prefault in [false, true] {
            let region =
                Region::map(page_size() + 1, Mapping { prefault, huge_pages: true }).unwrap();
            assert_eq!(region.base().as_ptr() as usize % page_size(), 0);
            assert_eq!(Backing::len(&region), 2 * page_size());
            assert!(region.map.iter().all(|byte| *byte == 0));
        }
    }

    /// Protection goes by whole pages, so the system itself says whether we believe in too small or
    /// too large ones. An emulator that only pretends other pages says no such thing: there the size
    /// must be the one that `VMRING_TEST_PAGE_SIZE` names.
    #[test]
    fn the_page_size_is_the_systems() {
        let page = page_size();
        let region = Region::map(3 * page, Mapping::default()).unwrap();
        let protect = |from: usize| {
            let start = region.base().as_ptr().wrapping_add(from);
            // SAFETY: within the mapping, which stays readable and writable.
            unsafe { libc::mprotect(start.cast(), page, libc::PROT_READ | libc::PROT_WRITE) }
        };
        assert_eq!(protect(page), 0, "larger than {page}: {}", io::Error::last_os_error());
        match std::env::var("VMRING_TEST_PAGE_SIZE") {
            Ok(emulated) => assert_eq!(page.to_string(), emulated),
            Err(_) => assert_eq!(protect(page / 2), -1, "smaller than {page}"),
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_with_the_number() {
        let error = Region::map(usize::MAX / 4, Mapping::default()).unwrap_err();
        assert!(matches!(error, Error::Memory { bytes, .. } if bytes == usize::MAX / 4), "{error}");
        let error = Region::map(usize::MAX - 5, Mapping::default()).unwrap_err();
        assert!(matches!(error, Error::Memory { .. }), "{error}");
    }
}
