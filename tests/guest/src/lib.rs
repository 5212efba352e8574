//! Real Linux guests for tests, in QEMU and in user-mode Linux.
//!
//! A guest is a kernel of Debian with busybox. It boots in seconds, needs no root, and runs shell
//! scripts that the test gives it:
//!
//! ```no_run
//! # fn main() -> Result<(), vmring_guest::Missing> {
//! use vmring_guest::{Guest, Nic};
//!
//! let mut guest = Guest::qemu()?.nic(Nic::netdev("user")).start();
//! guest.sh("udhcpc -i eth0 -n -q && ping -c 3 10.0.2.2");
//! let outcome = guest.run("wget -q http://10.0.2.2:1/");
//! assert_ne!(outcome.status, 0, "{}", outcome.output);
//! # Ok(())
//! # }
//! ```
//!
//! What is not on this machine is taken from Debian's packages, which are unpacked in
//! `target/guest-image` and never installed. If that is not possible either, [`Missing`] says why,
//! and the test reports itself skipped.
//!
//! A guest ends with its test: a guard kills it and removes its folder, even if the test is killed.
//! Every wait has a limit, and a panic shows what the guest said.

mod cpio;
mod image;
mod packages;
mod process;
mod qmp;
mod running;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use process::{Folder, Process};
pub use running::{Outcome, Running};

use image::Image;

/// What a guest needs and this machine does not have: the reason to skip a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing(String);

impl Missing {
    pub(crate) fn new(why: String) -> Self {
        Self(why)
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// What runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// QEMU, which emulates the processor (TCG).
    Qemu,
    /// User-mode Linux: a Linux kernel as a process of this machine.
    Uml,
}

/// A guest that is not started. A clone starts the same guest again, with the same MAC addresses.
#[derive(Clone, Debug)]
pub struct Guest {
    engine: Engine,
    program: PathBuf,
    image: Image,
    nics: Vec<Nic>,
    files: Vec<(String, Vec<u8>)>,
    memory_mib: u32,
    timeout: Duration,
    is_incoming: bool,
    launcher: Vec<String>,
}

impl Guest {
    /// A guest in QEMU.
    ///
    /// # Errors
    ///
    /// Says what is missing on this machine.
    pub fn qemu() -> Result<Self, Missing> {
        Self::new(Engine::Qemu)
    }

    /// A guest in user-mode Linux. It has one processor and one kind of virtio device, which is
    /// over vhost-user.
    ///
    /// # Errors
    ///
    /// Says what is missing on this machine.
    pub fn uml() -> Result<Self, Missing> {
        Self::new(Engine::Uml)
    }

    /// A guest of this kind, for tests that run on both.
    ///
    /// # Errors
    ///
    /// Says what is missing on this machine.
    pub fn new(engine: Engine) -> Result<Self, Missing> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err(Missing("guests are for Linux on x86-64".to_owned()));
        }
        if std::env::var_os("VMRING_SKIP_GUESTS").is_some() {
            return Err(Missing("VMRING_SKIP_GUESTS is set".to_owned()));
        }
        let program = match engine {
            Engine::Qemu => Some(packages::program("qemu-system-x86_64")?),
            Engine::Uml => None,
        };
        let image = image::image(engine)?;
        let program = program.unwrap_or_else(|| image.kernel.clone());
        Ok(Self {
            engine,
            program,
            image,
            nics: Vec::new(),
            files: Vec::new(),
            memory_mib: 128,
            timeout: Duration::from_secs(60),
            is_incoming: false,
            launcher: Vec::new(),
        })
    }

    /// Adds a network interface: `eth0`, then `eth1`, and so on. They are down at first.
    #[must_use]
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// The guest's memory in MiB (128).
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// How long the boot, or one script, may take (60 s). The guest fails the test after it.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Puts a file into the guest, which can be run there. `path` begins with a slash.
    #[must_use]
    pub fn file(mut self, path: &str, contents: impl Into<Vec<u8>>) -> Self {
        let path = path.strip_prefix('/').expect("an absolute path").to_owned();
        self.files.push((path, contents.into()));
        self
    }

    /// Puts a program of this machine into the guest, with its shared libraries.
    ///
    /// # Errors
    ///
    /// Says that the program is missing.
    pub fn program(mut self, name: &str) -> Result<Self, Missing> {
        let path = packages::program(name)?;
        let read = |path: &Path| {
            std::fs::read(path).map_err(|error| Missing(format!("{}: {error}", path.display())))
        };
        self = self.file(&format!("/usr/bin/{name}"), read(&path)?);
        for library in packages::libraries(&path) {
            self = self.file(library.to_str().expect("UTF-8"), read(&library)?);
        }
        Ok(self)
    }

    /// Lets this command line start the guest's program, which is added to it with its arguments: a
    /// program that opens a descriptor for it, for example.
    #[must_use]
    pub fn launched_by(mut self, words: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.launcher = words.into_iter().map(Into::into).collect();
        self
    }

    /// A guest of QEMU that waits for another one to migrate to it: [`Running::migrate_to`]. It has
    /// to be built as the other one is, but its interfaces may be elsewhere.
    #[must_use]
    pub fn incoming(mut self) -> Self {
        assert_eq!(self.engine, Engine::Qemu, "user-mode Linux cannot migrate");
        self.is_incoming = true;
        self
    }

    /// Boots the guest, in the network namespace of this thread. A guest that waits for a migration
    /// is ready for it, and any other has booted, when this returns.
    ///
    /// # Panics
    ///
    /// Panics with the guest's last words if it does not boot in time.
    pub fn start(self) -> Running {
        Running::start(self)
    }
}

/// A network interface of a guest.
#[derive(Clone, Debug)]
pub struct Nic {
    backend: Backend,
    mac: String,
    device: String,
    reconnects: bool,
}

#[derive(Clone, Debug)]
enum Backend {
    VhostUser(PathBuf),
    Netdev(String),
    Vector(String),
}

impl Nic {
    /// A virtio-net device of a vhost-user back end that listens on this socket.
    pub fn vhost_user(socket: impl Into<PathBuf>) -> Self {
        Self::new(Backend::VhostUser(socket.into()))
    }

    /// A virtio-net device of QEMU. `value` is that of its option `-netdev`, without an id.
    pub fn netdev(value: impl Into<String>) -> Self {
        Self::new(Backend::Netdev(value.into()))
    }

    /// An interface of user-mode Linux. `value` is that of its option `vec0`, without a MAC address.
    pub fn vector(value: impl Into<String>) -> Self {
        Self::new(Backend::Vector(value.into()))
    }

    fn new(backend: Backend) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let [.., high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let mac = format!("52:54:00:00:{high:02x}:{low:02x}");
        Self { backend, mac, device: String::new(), reconnects: false }
    }

    /// The same interface, with the same MAC address, of a vhost-user back end at another socket.
    #[must_use]
    pub fn at(mut self, socket: impl Into<PathBuf>) -> Self {
        self.backend = Backend::VhostUser(socket.into());
        self
    }

    /// The interface's MAC address, in lower case. Each interface that is made has one of its own.
    pub fn mac(&self) -> &str {
        &self.mac
    }

    /// Further properties of QEMU's device, like `csum=off,guest_announce=off`.
    #[must_use]
    pub fn device(mut self, properties: &str) -> Self {
        self.device = format!("{},{properties}", self.device);
        self
    }

    /// Lets QEMU connect to the socket again, each second, when the connection has ended.
    #[must_use]
    pub fn reconnects(mut self) -> Self {
        self.reconnects = true;
        self
    }

    /// QEMU's arguments for the interface.
    fn qemu_arguments(&self, number: usize) -> Vec<String> {
        let (chardev, netdev, vectors) = match &self.backend {
            Backend::VhostUser(socket) => {
                let reconnect = if self.reconnects { ",reconnect=1" } else { "" };
                let socket = socket.display();
                (
                    Some(format!("socket,id=chardev{number},path={socket}{reconnect}")),
                    format!("vhost-user,chardev=chardev{number},id=net{number}"),
                    // QEMU 7.2 crashes in `vhost_net_start` with MSI-X if it emulates the processor.
                    ",vectors=0",
                )
            }
            Backend::Netdev(value) => (None, format!("{value},id=net{number}"), ""),
            Backend::Vector(_) => panic!("only user-mode Linux has vector transports"),
        };
        // Without a file, the option ROM of a network boot is not there, which Debian has in another
        // package.
        let (mac, more) = (&self.mac, &self.device);
        let device = format!("virtio-net-pci,netdev=net{number},mac={mac},romfile={vectors}{more}");
        let chardev = chardev.map(|chardev| ["-chardev".to_owned(), chardev]);
        let rest = ["-netdev".to_owned(), netdev, "-device".to_owned(), device];
        chardev.into_iter().flatten().chain(rest).collect()
    }

    /// The parameter of user-mode Linux for the interface.
    fn uml_parameter(&self, number: usize) -> String {
        assert!(self.device.is_empty() && !self.reconnects, "only QEMU has these options");
        match &self.backend {
            Backend::VhostUser(socket) => format!("virtio_uml.device={}:1", socket.display()),
            Backend::Vector(value) => format!("vec{number}:{value},mac={}", self.mac),
            Backend::Netdev(_) => panic!("only QEMU has netdevs"),
        }
    }
}
