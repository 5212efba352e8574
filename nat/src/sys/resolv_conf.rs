//! The host's resolvers, as /etc/resolv.conf names them.
//!
//! On macOS, the system keeps this file for programs of Unix. It has the resolvers of the primary service
//! only, and none that a VPN has for its own domains.

use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::dns::resolvers::parse_resolv_conf;
use crate::limits::RESOLV_CONF_MAX;

/// What tells one state of a file from another. The file is replaced by programs that are careful, and
/// written in place by others. A link, as systemd-resolved's, is followed.
type Stamp = (u64, u64, i64, i64, u64);

/// The file, and what it was when it was last read.
#[derive(Debug)]
pub(super) struct ResolvConf {
    path: PathBuf,
    /// `None` until it was read. Without a file, there is no stamp.
    seen: Option<Option<Stamp>>,
}

impl ResolvConf {
    pub(super) fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned(), seen: None }
    }

    /// The resolvers, if the file is not as it was when it was last read. A file that is not there means
    /// the resolver of the machine itself, as an empty one does.
    ///
    /// # Errors
    ///
    /// If the file is there and cannot be read. It is read again the next time.
    pub(super) fn changed(&mut self) -> io::Result<Option<Vec<SocketAddr>>> {
        let stamp = match std::fs::metadata(&self.path) {
            Ok(metadata) => Some(stamp(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if self.seen == Some(stamp) {
            return Ok(None);
        }
        let mut text = Vec::new();
        if stamp.is_some() {
            File::open(&self.path)?.take(RESOLV_CONF_MAX).read_to_end(&mut text)?;
        }
        // If it was replaced in between, its stamp differs the next time.
        self.seen = Some(stamp);
        Ok(Some(parse_resolv_conf(&text, interface)))
    }
}

fn stamp(metadata: &Metadata) -> Stamp {
    let (at, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    (metadata.dev(), metadata.ino(), at, nanos, metadata.len())
}

/// The number of an interface.
fn interface(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the pointer is to a string that ends with a zero, and the call only reads it.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index > 0).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that is removed at the end.
    struct Folder(PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn folder(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("vmring-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Folder(path)
    }

    /// Goal: a file is read when it is new, written, replaced, removed and there again, and not otherwise.
    #[test]
    fn a_file_is_read_when_it_has_changed() {
        let folder = folder("resolv-conf");
        let path = folder.0.join("resolv.conf");
        let at = |address: &str| Some(vec![address.parse::<SocketAddr>().unwrap()]);
        let mut conf = ResolvConf::new(&path);
        assert_eq!(conf.changed().unwrap(), at("127.0.0.1:53"), "there is no file");
        assert_eq!(conf.changed().unwrap(), None);
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(conf.changed().unwrap(), at("192.0.2.1:53"));
        assert_eq!(conf.changed().unwrap(), None);
        // The other file has the same length, and perhaps the same time.
        let other = folder.0.join("other");
        std::fs::write(&other, "nameserver 192.0.2.2\n").unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(conf.changed().unwrap(), at("192.0.2.2:53"));
        std::fs::write(&path, "nameserver 192.0.2.3 # longer\n").unwrap();
        assert_eq!(conf.changed().unwrap(), at("192.0.2.3:53"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(conf.changed().unwrap(), at("127.0.0.1:53"));
        // What cannot be read is an error each time, and is read as soon as it can be.
        std::fs::create_dir(&path).unwrap();
        assert!(conf.changed().is_err() && conf.changed().is_err());
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, "nameserver ::1\n").unwrap();
        assert_eq!(conf.changed().unwrap(), at("[::1]:53"));
    }

    #[test]
    fn an_interface_has_a_number() {
        assert_eq!(interface("no-such-interface"), None);
        assert_eq!(interface("a\0b"), None);
        let loopback = if cfg!(target_os = "linux") { "lo" } else { "lo0" };
        if interface(loopback).is_none() {
            eprintln!("skipped: this machine has no loopback interface");
        }
    }
}
