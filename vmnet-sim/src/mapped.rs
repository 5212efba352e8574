//! Whether there is memory at an address.

use std::ffi::c_void;
use std::sync::OnceLock;

use libc::iovec;

/// Tells pointers from the numbers that stand in their place in a descriptor of another layout.
#[derive(Default)]
pub(crate) struct Mapped {
    /// The last page that was found.
    page: Option<usize>,
}

impl Mapped {
    /// Whether there is memory at `pointer`.
    pub(crate) fn holds(&mut self, pointer: *const iovec) -> bool {
        // Below that no system maps anything for a program.
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
    // SAFETY: it asks for a constant.
    *SIZE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize)
}

#[cfg(target_os = "linux")]
fn is_mapped(page: usize) -> bool {
    let mut resident = 0_u8;
    // SAFETY: it tells whether the page is there, in one byte, and touches nothing else.
    unsafe { libc::mincore(page as *mut c_void, 1, &mut resident) == 0 }
}

/// Elsewhere a wrong pointer ends the process without a sentence.
#[cfg(not(target_os = "linux"))]
fn is_mapped(_page: usize) -> bool {
    true
}
