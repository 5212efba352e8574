//! Packet memory: one page-aligned anonymous mapping per pool. Mappings for the memory of a guest.

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use vmring_core::Backing;
use vmring_core::guest::GuestMapping;

use crate::error::Error;

/// Returns the system's page size in bytes: 4 KiB on most machines, 16 KiB on Apple silicon.
///
/// # Panics
///
/// If the system does not know its page size.
pub fn page_size() -> usize {
    // SAFETY: sysconf takes a number and no pointers, so no argument can be invalid memory.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("the system knows its page size")
}

/// How a region is mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Touch every page when the region is mapped, so that no packet pays for a page fault.
    pub(crate) prefault: bool,
    /// Ask for transparent huge pages where the system has them.
    pub(crate) huge_pages: bool,
}

/// A private anonymous mapping. It is zeroed when it is made and unmapped when it is dropped.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapMut,
    base: NonNull<u8>,
}

// SAFETY: `base` points into `map`, which this value owns and which is not bound to a thread. The
// value can therefore move to another thread, as `MmapMut` itself can.
unsafe impl Send for Region {}

// SAFETY: `Region::map` makes the mapping, which the kernel zeroes, readable and writable. It stays
// at its address until this value is dropped, because nothing here resizes it. Nobody but the pool
// accesses it: `map` is private to this module, and nothing hands it out.
unsafe impl Backing for Region {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.map.len()
    }
}

impl Region {
    /// Maps at least `bytes` bytes, rounded up to whole pages.
    pub(crate) fn map(bytes: usize, mapping: Mapping) -> Result<Self, Error> {
        let fail = |source| Error::Memory { bytes, source };
        let len = bytes
            .checked_next_multiple_of(page_size())
            .filter(|len| isize::try_from(*len).is_ok())
            .ok_or_else(|| fail(io::Error::from(io::ErrorKind::OutOfMemory)))?;
        let mut map = MmapOptions::new().len(len).map_anon().map_err(fail)?;
        #[cfg(target_os = "linux")]
        if mapping.huge_pages {
            // This is advice. A kernel without transparent huge pages refuses it, which changes
            // nothing.
            if let Err(error) = map.advise(memmap2::Advice::HugePage) {
                tracing::debug!(%error, "no transparent huge pages");
            }
        }
        if mapping.prefault {
            // Writing one byte of a page makes the system allocate the page, on every system. It
            // comes after the advice, so that the pages can be huge.
            map.iter_mut().step_by(page_size()).for_each(|byte| {
                // Volatile, so that the store of a zero over a zero is not optimised away.
                // SAFETY: `byte` is a `&mut u8` into `map`: valid, aligned and borrowed by nobody
                // else.
                unsafe { std::ptr::write_volatile(byte, 0) }
            });
        }
        let base = NonNull::new(map.as_mut_ptr()).expect("a mapping is not at address 0");
        Ok(Self { map, base })
    }
}

/// A mapping that the memory of a guest is in. It is unmapped when nothing refers to it any more; see
/// [`SegmentTable`](crate::SegmentTable). A VMM that has mapped its guest's memory itself implements
/// [`GuestMapping`] instead.
#[derive(Debug)]
pub struct GuestMmap {
    map: MmapRaw,
    base: NonNull<u8>,
}

impl GuestMmap {
    /// Maps `len` bytes of zeroes that belong to this process alone, for a guest that runs in it.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] if the system does not have that much memory, or `len` is 0.
    pub fn anonymous(len: usize) -> Result<Self, Error> {
        let map = MmapOptions::new().len(len).map_anon();
        Self::new(len, map.map(MmapRaw::from))
    }

    /// Maps `len` bytes of a file from `offset` on, readable and writable, shared with everybody who
    /// maps the file, for example a guest's process.
    ///
    /// If somebody makes the file shorter, an access to what is missing ends this process with SIGBUS.
    /// Where the file is another program's, see that it is sealed against that (`F_SEAL_SHRINK`).
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] if the file cannot be mapped, for example because it is not open for reading
    /// and writing, or if `len` is 0.
    pub fn file(file: &File, offset: u64, len: usize) -> Result<Self, Error> {
        Self::new(len, MmapOptions::new().offset(offset).len(len).map_raw(file))
    }

    fn new(bytes: usize, map: io::Result<MmapRaw>) -> Result<Self, Error> {
        let fail = |source| Error::Memory { bytes, source };
        if bytes == 0 {
            return Err(fail(io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let map = map.map_err(fail)?;
        let base = NonNull::new(map.as_mut_ptr()).expect("a mapping is not at address 0");
        Ok(Self { map, base })
    }
}

// SAFETY: `base` points into `map`, which this value owns and which is not bound to a thread.
unsafe impl Send for GuestMmap {}
// SAFETY: a shared value gives away the address and the length only.
unsafe impl Sync for GuestMmap {}

// SAFETY: the mapping is readable and writable, and stays at its address until this value is dropped,
// because nothing here resizes it. `MmapRaw` makes no reference to the bytes, and nothing hands it out.
unsafe impl GuestMapping for GuestMmap {
    fn start(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.map.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_mapping_shares_a_file() {
        let path = std::env::temp_dir().join(format!("vmring-guest-{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let page = page_size();
        file.set_len(3 * page as u64).unwrap();
        let [whole, part] = [(0, 3 * page), (page as u64, page)].map(|(offset, len)| {
            let map = std::sync::Arc::new(GuestMmap::file(&file, offset, len).unwrap());
            let region = vmring_core::guest::GuestRegion::new(0, map);
            vmring_core::GuestMemory::new([region]).unwrap()
        });
        assert_eq!(part.slice(16, 5).unwrap().copy_from(b"hello"), 5);
        assert_eq!(whole.slice(page as u64 + 16, 5).unwrap().read(), Some(*b"hello"));
        assert!(part.slice(page as u64 - 1, 2).is_none());
        assert!(GuestMmap::file(&file, 0, 0).is_err() && GuestMmap::anonymous(0).is_err());
        let read_only = File::open("/dev/null").unwrap();
        assert!(matches!(GuestMmap::file(&read_only, 0, page), Err(Error::Memory { .. })));
    }

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

    /// Goal: `page_size` is the system's. Method: mprotect(2) takes whole pages only, so the system
    /// itself refuses a size that is too small or too large. An emulator that only pretends to have
    /// other pages does not refuse it. There the size must be that of `VMRING_TEST_PAGE_SIZE`.
    #[test]
    fn the_page_size_is_the_systems() {
        let page = page_size();
        let region = Region::map(3 * page, Mapping::default()).unwrap();
        let protect = |from: usize| {
            let start = region.base().as_ptr().wrapping_add(from);
            // SAFETY: the page is within the mapping of three pages, which `region` owns. The call
            // changes nothing: the page stays readable and writable.
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
