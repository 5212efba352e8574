//! Memory of a virtual machine, for the [probe](super::probe): whether vmnet reads into it and writes
//! out of it.

use memmap2::MmapMut;

const LEN: usize = 64 * 1024;

/// Memory that Hypervisor.framework has mapped into a virtual machine, in which nothing runs.
pub(super) struct GuestMemory {
    /// Declared first, so that it ends before its memory does.
    _machine: Option<imp::Machine>,
    pub(super) bytes: MmapMut,
}

impl GuestMemory {
    /// Memory, and why no virtual machine has it, if none has.
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

    // Looked up and not linked: nothing else here needs Hypervisor.framework. `hv_vm_create` takes a
    // pointer that may be null on Apple silicon, and on Intel flags that may be 0.
    type Create = unsafe extern "C" fn(usize) -> i32;
    type Map = unsafe extern "C" fn(*mut c_void, u64, usize, u64) -> i32;
    type Destroy = unsafe extern "C" fn() -> i32;

    const FRAMEWORK: &CStr = c"/System/Library/Frameworks/Hypervisor.framework/Hypervisor";
    /// Where the guest would see it: any address on a page boundary.
    const GUEST_ADDRESS: u64 = 0x8000_0000;
    /// `HV_MEMORY_READ | HV_MEMORY_WRITE`.
    const READ_WRITE: u64 = 3;

    /// The process's virtual machine: there can be one.
    pub(super) struct Machine(Destroy);

    fn find(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: a library that was opened, and a C string.
        let found = unsafe { libc::dlsym(library, name.as_ptr()) };
        if found.is_null() { Err(format!("no {name:?} on this macOS")) } else { Ok(found) }
    }

    impl Machine {
        pub(super) fn with(memory: &mut MmapMut) -> Result<Self, String> {
            // SAFETY: a C string; the framework has no initialisers that matter to us, and is never
            // closed.
            let library = unsafe { libc::dlopen(FRAMEWORK.as_ptr(), libc::RTLD_LAZY) };
            if library.is_null() {
                return Err("no Hypervisor.framework on this macOS".to_owned());
            }
            let create = find(library, c"hv_vm_create")?;
            let map = find(library, c"hv_vm_map")?;
            let destroy = find(library, c"hv_vm_destroy")?;
            // SAFETY: functions of these names have these types (Hypervisor/hv.h on Intel, hv_vm.h on
            // Apple silicon).
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
            // SAFETY: the defaults; it changes nothing but this process's virtual machine.
            let code = unsafe { create(0) };
            if code != 0 {
                return refused("hv_vm_create", code);
            }
            let machine = Self(destroy);
            // SAFETY: whole pages that stay mapped until the machine is destroyed. It has no processor,
            // so nothing in it reads or writes them.
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
            // SAFETY: the machine exists, and this is its end.
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
            Err("Hypervisor.framework is macOS's".to_owned())
        }
    }
}
