//! Where the programs and kernels of guests come from: this machine, or Debian's packages, which
//! are unpacked in a folder of their own and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::Missing;

/// How long apt may take for one call, in seconds.
const LIMIT: u32 = 180;

/// The first folder in `PATH` that has the program.
pub(crate) fn program(name: &str) -> Result<PathBuf, Missing> {
    // The folders of a system's own programs are not in the PATH of every user.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut folders = std::env::split_paths(&path).chain(system);
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|path| path.is_file()));
    found.ok_or_else(|| Missing::new(format!("{name} is not installed")))
}

/// The folder into which the newest version of a package is unpacked. A package that is already
/// there is not downloaded again.
pub(crate) fn unpacked(package: &str, into: &Path) -> Result<PathBuf, Missing> {
    let folder = into.join(package);
    if folder.exists() {
        return Ok(folder);
    }
    let download = into.join(format!("{package}.new"));
    let _ = fs::remove_dir_all(&download);
    fs::create_dir_all(&download).expect("a folder for a download");
    // As root, apt would let another user write there, which may not be possible.
    let apt = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package];
    run(&apt, &download)?;
    let deb = fs::read_dir(&download).expect("it was made above");
    let deb = deb.map(|entry| entry.expect("an entry").path()).next();
    let deb = deb.ok_or_else(|| Missing::new(format!("apt-get downloads no {package}")))?;
    let deb = deb.to_str().expect("a path in UTF-8");
    run(&["dpkg-deb", "--extract", deb, "root"], &download)?;
    fs::rename(download.join("root"), &folder).expect("both are folders beside each other");
    let _ = fs::remove_dir_all(&download);
    Ok(folder)
}

/// The package that a metapackage of Debian's kernel stands for at present.
pub(crate) fn kernel_package(metapackage: &str) -> Result<String, Missing> {
    let output = run(&["apt-cache", "depends", metapackage], Path::new("/"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let name = names.find(|name| name.starts_with("linux-image-")).map(str::to_owned);
    name.ok_or_else(|| Missing::new(format!("apt knows no {metapackage}")))
}

fn run(words: &[&str], folder: &Path) -> Result<Output, Missing> {
    let call = words.join(" ");
    let output = Command::new("timeout")
        .args(["--kill-after=5", &LIMIT.to_string()])
        .args(words)
        .current_dir(folder)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Missing::new(format!("`{call}`: {error}")))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().last().unwrap_or("without a word");
    Err(Missing::new(format!("`{call}` failed: {last}")))
}

/// The shared libraries of a program, as ldd(1) lists them, the loader among them.
pub(crate) fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").stderr(Stdio::null()).output();
    let Ok(output) = output else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}
