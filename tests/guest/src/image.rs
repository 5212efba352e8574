//! What a guest boots from: a kernel of Debian, and an archive with its modules, busybox and
//! `init.sh`. They are made once, in `target/guest-image`, for all tests that run at once.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::cpio::Archive;
use crate::{Engine, Missing, packages};

const INIT: &str = include_str!("init.sh");
const UDHCPC: &str = include_str!("udhcpc.sh");

/// The files that a guest boots from.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// A bootable kernel, or the program that user-mode Linux is.
    pub(crate) kernel: PathBuf,
    pub(crate) archive: PathBuf,
}

/// The image for guests of this kind. The first call in a process makes or finds it, and the others
/// have its result.
pub(crate) fn image(engine: Engine) -> Result<Image, Missing> {
    static QEMU: OnceLock<Result<Image, Missing>> = OnceLock::new();
    static UML: OnceLock<Result<Image, Missing>> = OnceLock::new();
    let (cell, make): (_, fn(&Path) -> _) = match engine {
        Engine::Qemu => (&QEMU, for_qemu),
        Engine::Uml => (&UML, for_uml),
    };
    cell.get_or_init(|| with_lock(make)).clone()
}

/// Calls `f` with the folder of the images, while no other process does.
fn with_lock<T>(f: impl FnOnce(&Path) -> T) -> T {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(here, PathBuf::from);
    let folder = target.join("guest-image");
    fs::create_dir_all(&folder).expect("a folder for images");
    let folder = folder.canonicalize().expect("it was made above");
    let lock = File::create(folder.join("lock")).expect("a lock");
    // SAFETY: `lock` is an open descriptor, and the call takes no pointer.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0, "a lock can be held");
    // Closing the file, which the kernel does for a process that is killed, frees the lock.
    f(&folder)
}

fn for_qemu(folder: &Path) -> Result<Image, Missing> {
    let (kernel, modules) = match installed_kernel() {
        Some(found) => found,
        None => downloaded_kernel(folder)?,
    };
    // The driver of the bus has to be there before the device's.
    let archive = archive(folder, &modules, &["virtio_pci", "virtio_net"])?;
    Ok(Image { kernel, archive })
}

fn for_uml(folder: &Path) -> Result<Image, Missing> {
    // Linux 6.1 has less space for a process's registers than such a processor needs (EFAULT of
    // PTRACE_SETREGSET), so it kills its first program.
    if fs::read_to_string("/proc/cpuinfo").is_ok_and(|processor| processor.contains(" amx_tile")) {
        return Err(Missing::new("user-mode Linux cannot run on a processor with AMX".to_owned()));
    }
    let (kernel, modules) = match packages::program("linux.uml") {
        Ok(program) => (program, PathBuf::from("/usr/lib/uml/modules")),
        Err(_) => {
            let package = packages::unpacked("user-mode-linux", folder)?;
            (package.join("usr/bin/linux.uml"), package.join("usr/lib/uml/modules"))
        }
    };
    let archive = archive(folder, &modules, &["virtio_net", "ipv6"])?;
    Ok(Image { kernel, archive })
}

/// A kernel of this machine that this user may read, with its modules.
fn installed_kernel() -> Option<(PathBuf, PathBuf)> {
    let mut names: Vec<_> = fs::read_dir("/boot").ok()?.flatten().collect();
    names.sort_by_key(fs::DirEntry::file_name);
    names.iter().rev().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let modules = Path::new("/lib/modules").join(name.strip_prefix("vmlinuz-")?);
        File::open(entry.path()).ok()?;
        find(&modules, "virtio_net").map(|_| (entry.path(), modules))
    })
}

/// Debian's kernel for virtual machines, from its package.
fn downloaded_kernel(folder: &Path) -> Result<(PathBuf, PathBuf), Missing> {
    // The metapackage changes with each update of the kernel. An older one serves as well.
    let name = folder.join("kernel");
    let package = match fs::read_to_string(&name) {
        Ok(package) => package,
        Err(_) => packages::kernel_package("linux-image-cloud-amd64")?,
    };
    let root = packages::unpacked(&package, folder)?;
    fs::write(&name, &package).expect("a file in the folder of images");
    let version = package.strip_prefix("linux-image-").expect("it was chosen by this prefix");
    let kernel = root.join("boot").join(format!("vmlinuz-{version}"));
    Ok((kernel, root.join("lib/modules").join(version)))
}

/// The archive with these modules, and those that they need. Its name is a digest of what is in it.
fn archive(folder: &Path, modules: &Path, wanted: &[&str]) -> Result<PathBuf, Missing> {
    let busybox = busybox(folder)?;
    let mut files = Vec::new();
    for module in wanted {
        add_module(modules, module, &mut files)?;
    }
    let mut digest = DefaultHasher::new();
    (INIT, UDHCPC, &busybox, &files).hash(&mut digest);
    let path = folder.join(format!("initramfs-{:016x}", digest.finish()));
    if path.exists() {
        return Ok(path);
    }
    let mut archive = Archive::new();
    for empty in ["dev", "proc", "root", "sys", "tmp", "usr/sbin"] {
        archive.folder(empty);
    }
    // The kernel opens it for the first program.
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", &busybox);
    archive.link("bin/sh", "busybox");
    archive.file("init", INIT.as_bytes());
    archive.file("etc/udhcpc/default.script", UDHCPC.as_bytes());
    let order: String = files.iter().map(|(name, _)| format!("{name}\n")).collect();
    archive.file("lib/modules/order", order.as_bytes());
    for (name, bytes) in &files {
        archive.file(&format!("lib/modules/{name}"), bytes);
    }
    // A file of that name is whole.
    let new = path.with_extension("new");
    fs::write(&new, archive.finish()).expect("an archive can be written");
    fs::rename(&new, &path).expect("it was written above");
    Ok(path)
}

/// A busybox that needs no library.
fn busybox(folder: &Path) -> Result<Vec<u8>, Missing> {
    let installed = packages::program("busybox").ok().filter(|path| {
        packages::libraries(path).is_empty()
            && Command::new(path).arg("--list").output().is_ok_and(|output| {
                let applets = String::from_utf8_lossy(&output.stdout).into_owned();
                ["insmod", "nc", "sha256sum", "udhcpc", "xxd"]
                    .iter()
                    .all(|applet| applets.lines().any(|line| line == *applet))
            })
    });
    let path = match installed {
        Some(path) => path,
        None => {
            let root = packages::unpacked("busybox-static", folder)?;
            let paths = ["bin/busybox", "usr/bin/busybox"].map(|path| root.join(path));
            paths.into_iter().find(|path| path.exists()).expect("the package has its program")
        }
    };
    fs::read(&path).map_err(|error| Missing::new(format!("{}: {error}", path.display())))
}

/// Adds a module behind those that it depends on. A module that is no file is built into the kernel.
fn add_module(
    modules: &Path,
    name: &str,
    files: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), Missing> {
    let file_name = format!("{name}.ko");
    if files.iter().any(|(file, _)| *file == file_name) {
        return Ok(());
    }
    let Some(path) = find(modules, name) else { return Ok(()) };
    let bytes = unpacked_module(&path)?;
    for needed in dependencies(&bytes) {
        add_module(modules, &needed, files)?;
    }
    files.push((file_name, bytes));
    Ok(())
}

/// The names in the section `.modinfo` of a module, after "depends=".
fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let start = module.windows(key.len()).position(|window| window == key);
    let list = start.map_or(&[][..], |start| &module[start + key.len()..]);
    let list = list.split(|byte| *byte == 0).next().unwrap_or_default();
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn unpacked_module(path: &Path) -> Result<Vec<u8>, Missing> {
    let why = |error| Missing::new(format!("{}: {error}", path.display()));
    let tool = match path.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).map_err(why),
    };
    let output = Command::new(tool).arg("-dc").arg(path).output().map_err(why)?;
    assert!(output.status.success(), "{tool} cannot read {}", path.display());
    Ok(output.stdout)
}

/// The file of a module somewhere below `folder`. Its name has `_` or `-` between words.
fn find(folder: &Path, module: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        // A link leads to sources, which may not be there.
        let found = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find(&path, module)
        } else {
            let name = entry.file_name().to_string_lossy().replace('-', "_");
            let (stem, rest) = name.split_once(".ko").unwrap_or_default();
            (stem == module.replace('-', "_") && ["", ".xz", ".zst"].contains(&rest))
                .then_some(path)
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_that_a_module_needs_are_read_from_it() {
        let module = b"\x7fELF\0license=GPL\0depends=net_failover,virtio\0name=virtio_net\0";
        assert_eq!(dependencies(module), ["net_failover", "virtio"]);
        assert_eq!(dependencies(b"\0depends=\0name=virtio\0"), [""; 0]);
        assert_eq!(dependencies(b"\0name=virtio\0"), [""; 0]);
    }
}
