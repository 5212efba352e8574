//! Confinement: after its set-up, the server gives up what it does not need to serve.
//!
//! A guest writes into memory that the server reads, and its front end sends the server messages. If
//! one of them ever found a fault in the server, it should find nothing else. So the process, before it
//! accepts the first connection, can gain no privileges (`no_new_privs`), has no capabilities, reaches
//! no files and no network (Landlock), and makes no system calls but those of a list (seccomp).

use std::path::Path;

use serde::Serialize;

pub(super) use part::Needs;
use part::Part;

/// What became of the confinement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Confinement {
    new_privileges: Part,
    capabilities: Part,
    files_and_network: Part,
    system_calls: Part,
}

/// The folder that has this file.
pub(super) fn folder(of: &Path) -> &Path {
    match of.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

impl Confinement {
    /// Nothing is in force, for this reason.
    pub(super) fn none(why: &str) -> Self {
        Self {
            new_privileges: Part::off(why),
            capabilities: Part::off(why),
            files_and_network: Part::off(why),
            system_calls: Part::off(why),
        }
    }

    /// The parts, each with its name.
    pub(super) fn parts(&self) -> [(&'static str, &Part); 4] {
        [
            ("new privileges", &self.new_privileges),
            ("capabilities", &self.capabilities),
            ("files and network (Landlock)", &self.files_and_network),
            ("system calls (seccomp)", &self.system_calls),
        ]
    }

    /// Confines this thread, and every thread that it starts: no privileges, and no files and network
    /// but what is needed.
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(super) fn drop_privileges(&mut self, needs: &Needs) {
        let parts = linux::drop_privileges(needs);
        [self.new_privileges, self.capabilities, self.files_and_network] = parts;
    }

    /// Confines every thread of the process: no system calls but those of the list.
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(super) fn restrict_calls(&mut self, needs: &Needs) {
        self.system_calls = linux::restrict_calls(needs);
    }

    /// There is nothing to confine with.
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    pub(super) fn drop_privileges(&mut self, _: &Needs) {
        *self = Self::none("it exists on Linux for x86_64 and aarch64 only");
    }

    /// There is nothing to confine with.
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    pub(super) fn restrict_calls(&mut self, _: &Needs) {}
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod linux;
mod part;
