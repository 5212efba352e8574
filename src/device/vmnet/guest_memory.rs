//! Memory of a virtual machine. The [probe](super::probe) uses it to find out whether vmnet can
//! read packets into such memory and write them from it.

use memmap2::MmapMut;

/// The size of the memory in bytes.
const LEN: usize = 64 * 1024;

/// Memory that Hypervisor.framework has mapped into a virtual machine. The machine has no
/// processor, so nothing runs in it.
pub(super) struct GuestMemory {
    /// Declared first, so that the machine is destroyed before its memory is unmapped.
    _machine: Option<imp::Machine>,
    pub(super) bytes: MmapMut,
}

impl GuestMemory {
    /// Allocates the memory and tries to map it into a virtual machine. If that fails, the memory
    /// still comes, with the reason for the failure.
    ///
    /// # Errors
    ///
    /// The error of mmap(2).
    pub(super) fn new() -> std::io::Result<(Self, Option<String>)> {
        let mut bytes = MmapMut::map_anon(LEN)?;
        let (machine, why_not) = match imp::Machine::with(&mut bytes) {
            Ok(machine) => (Some(machine), None),
            Err(why_not) => (None, Some(why_not)),
        };
        Ok((Self { _machine: machine, bytes }, why_not))
    }
}

#[cfg(target_os = "macos")]
mod imp {
    use std::ffi::{CStr, c_void};
    use std::mem::transmute;

    use memmap2::MmapMut;

    // These functions are looked up instead of linked, because nothing else here needs
    // Hypervisor.framework. The argument of `hv_vm_create` is a pointer on Apple silicon, which may
    // be null, and flags on Intel, which may be 0.
    type Create = unsafe extern "C" fn(usize) -> i32;
    type Map = unsafe extern "C" fn(*mut c_void, u64, usize, u64) -> i32;
    type Destroy = unsafe extern "C" fn() -> i32;

    const FRAMEWORK: &CStr = c"/System/Library/Frameworks/Hypervisor.framework/Hypervisor";
    /// The guest's physical address of the memory. Any address on a page boundary would do.
    const GUEST_ADDRESS: u64 = 0x8000_0000;
    /// `HV_MEMORY_READ | HV_MEMORY_WRITE`.
    const READ_WRITE: u64 = 3;

    /// The virtual machine of this process, which can have one. It holds `hv_vm_destroy`.
    pub(super) struct Machine(Destroy);

    /// Looks up a function of the framework.
    fn find(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: `with`, the only caller, passes a handle that dlopen(3) has returned and that is
        // never closed. `name` is a C string by its type.
        let found = unsafe { libc::dlsym(library, name.as_ptr()) };
        if found.is_null() { Err(format!("no {name:?} on this macOS")) } else { Ok(found) }
    }

    impl Machine {
        /// Creates the process's virtual machine and maps `memory` into it.
        pub(super) fn with(memory: &mut MmapMut) -> Result<Self, String> {
            // SAFETY: the path is a C string literal. It names a framework of the system, whose
            // initialisers any process may run. The handle is never closed.
            let library = unsafe { libc::dlopen(FRAMEWORK.as_ptr(), libc::RTLD_LAZY) };
            if library.is_null() {
                return Err("no Hypervisor.framework on this macOS".to_owned());
            }
            let create = find(library, c"hv_vm_create")?;
            let map = find(library, c"hv_vm_map")?;
            let destroy = find(library, c"hv_vm_destroy")?;
            // SAFETY: `find` returned addresses that are not null, and the functions of these names
            // have these types (Hypervisor/hv.h on Intel, hv_vm.h on Apple silicon).
            let (create, map, destroy) = unsafe {
                (
                    transmute::<*mut c_void, Create>(create),
                    transmute::<*mut c_void, Map>(map),
                    transmute::<*mut c_void, Destroy>(destroy),
                )
            };
            let refused = |what, code: i32| {
                Err(format!("{what} answered {code:#010x}; it needs com.apple.security.hypervisor"))
            };
            // SAFETY: 0 asks for the defaults on both kinds of processor. The call changes nothing
            // but this process's virtual machine.
            let code = unsafe { create(0) };
            if code != 0 {
                return refused("hv_vm_create", code);
            }
            let machine = Self(destroy);
            // SAFETY: the memory is whole pages of an anonymous mapping. It stays mapped until the
            // machine is destroyed, because `GuestMemory` declares the machine first. The machine
            // has no processor, so nothing in it reads or writes the memory.
            let code =
                unsafe { map(memory.as_mut_ptr().cast(), GUEST_ADDRESS, memory.len(), READ_WRITE) };
            if code != 0 {
                return refused("hv_vm_map", code);
            }
            Ok(machine)
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            // SAFETY: a `Machine` exists only after `hv_vm_create` has succeeded in `with`, and
            // this is the only call that destroys it.
            unsafe { (self.0)() };
        }
    }
}

#[cfg(not(target_os = "macos"))]
mod imp {
    use memmap2::MmapMut;

    pub(super) enum Machine {}

    impl Machine {
        pub(super) fn with(_: &mut MmapMut) -> Result<Self, String> {
            Err("Hypervisor.framework exists on macOS only".to_owned())
        }
    }
}
