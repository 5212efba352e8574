//! Checks whether there is memory at an address.

use std::ffi::c_void;
use std::sync::OnceLock;

use libc::iovec;

/// Tells pointers from numbers: a descriptor with a wrong layout has numbers where the pointers
/// belong.
#[derive(Default)]
pub(crate) struct Mapped {
    /// The last page that was found to be mapped.
    page: Option<usize>,
}

impl Mapped {
    /// Whether there is memory at `pointer`.
    pub(crate) fn holds(&mut self, pointer: *const iovec) -> bool {
        // No system maps anything for a program below this address.
        const LOWEST: usize = 1 << 16;
        let address = pointer as usize;
        if address < LOWEST || !pointer.is_aligned() {
            return false;
        }
        let page = address & !(page_size() - 1);
        if self.page != Some(page) && !is_mapped(page) {
            return false;
        }
        self.page = Some(page);
        true
    }
}

fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    // SAFETY: `sysconf` only returns a constant.
    *SIZE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize)
}

#[cfg(target_os = "linux")]
fn is_mapped(page: usize) -> bool {
    let mut resident = 0_u8;
    // SAFETY: `mincore` writes one byte, whether the page is resident, and touches nothing else.
    unsafe { libc::mincore(page as *mut c_void, 1, &mut resident) == 0 }
}

/// On other systems a wrong pointer ends the process without a message.
#[cfg(not(target_os = "linux"))]
fn is_mapped(_page: usize) -> bool {
    true
}
