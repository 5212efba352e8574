//! The three questions that the driver asks the system itself: where a symbol is, which macOS is
//! running, and whether the process is root. With the simulator, the simulator answers them, so
//! that a test can pretend to run on any macOS.

use std::ffi::{CStr, c_void};
use std::fmt;

/// A version of macOS: major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Macos(pub(crate) u32, pub(crate) u32);

impl fmt::Display for Macos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Macos(major, 0) => write!(f, "macOS {major}"),
            Macos(major, minor) => write!(f, "macOS {major}.{minor}"),
        }
    }
}

#[cfg(target_os = "macos")]
mod imp {
    use std::ffi::{CStr, c_void};

    use crate::device::vmnet::system::Macos;

    pub(crate) fn symbol(name: &CStr) -> *const c_void {
        // SAFETY: `name` is a C string by its type, and dlsym(3) only reads it. RTLD_DEFAULT is a
        // valid handle: it searches all loaded libraries.
        unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }
    }

    pub(crate) fn macos() -> Macos {
        let mut text = [0_u8; 32];
        let mut len = text.len();
        // SAFETY: the name is a C string literal; `len` is the number of bytes at `text`, and
        // sysctlbyname(3) writes at most that many. The new value is null with length 0, so nothing
        // is set.
        let failed = unsafe {
            libc::sysctlbyname(
                c"kern.osproductversion".as_ptr(),
                text.as_mut_ptr().cast(),
                &mut len,
                std::ptr::null_mut(),
                0,
            )
        };
        let text = if failed == 0 { &text[..len.min(text.len())] } else { b"" };
        let text = String::from_utf8_lossy(text);
        let mut parts = text.trim_end_matches('\0').split('.').map(|part| part.parse().ok());
        let mut next = || parts.next().flatten().unwrap_or(0);
        Macos(next(), next())
    }

    pub(crate) fn is_root() -> bool {
        // SAFETY: geteuid(2) has no arguments and always succeeds.
        unsafe { libc::geteuid() == 0 }
    }
}

#[cfg(not(target_os = "macos"))]
mod imp {
    use std::ffi::{CStr, c_void};

    use crate::device::vmnet::system::Macos;

    pub(crate) fn symbol(name: &CStr) -> *const c_void {
        vmnet_sim::symbol(name)
    }

    pub(crate) fn macos() -> Macos {
        let (major, minor) = vmnet_sim::macos_version();
        Macos(major, minor)
    }

    pub(crate) fn is_root() -> bool {
        vmnet_sim::is_root()
    }
}

/// Returns the address of a symbol, or null if the running system does not have it.
pub(crate) fn symbol(name: &CStr) -> *const c_void {
    imp::symbol(name)
}

/// Returns the version of the running macOS; 0.0 if the system does not tell it.
pub(crate) fn macos() -> Macos {
    imp::macos()
}

/// Returns whether the process runs as root.
pub(crate) fn is_root() -> bool {
    imp::is_root()
}
