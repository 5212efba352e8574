//! The file with the number of the process (`--pid-file`).

use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// The file of this process. Its lock lives as long as the process. So a file that a process has left
/// over is taken, and one of a process that lives is not. Dropping it removes the file, if it is still
/// this process's own.
#[derive(Debug)]
pub(super) struct PidFile {
    file: File,
    path: PathBuf,
}

impl PidFile {
    pub(super) fn write(path: &Path) -> Result<Self, Failure> {
        let name = path.display();
        let failed =
            |error| Failure::Usage(format!("the file '{name}' cannot be written: {error}"));
        if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(Failure::Usage(format!("'{name}' is no file for a process's number")));
        }
        let mut options = File::options();
        // What the path names may have changed since: a link is not followed, a pipe not waited for.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let options =
            options.read(true).write(true).create(true).truncate(false).custom_flags(flags);
        let mut file = options.mode(0o644).open(path).map_err(failed)?;
        // The lock ends with the file, and needs no call then.
        // SAFETY: the call takes numbers only, and the descriptor is open.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::WouldBlock => Failure::Step(format!(
                    "a process that runs has the file '{name}'; end it, or name another file"
                )),
                _ => failed(error),
            });
        }
        let number = format!("{}\n", std::process::id());
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(number.as_bytes()))
            .map_err(failed)?;
        Ok(Self { file, path: path.to_owned() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let id = |found: fs::Metadata| (found.dev(), found.ino());
        let found = fs::symlink_metadata(&self.path).map(id).ok();
        if found.is_some() && found == self.file.metadata().map(id).ok() {
            // If it cannot be removed, the next process takes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_left_over_is_taken_and_one_in_use_is_not() {
        let path = std::env::temp_dir().join(format!("vmring-pid-{}", std::process::id()));
        fs::write(&path, "99999999999 of somebody\n").expect("a file");
        let file = PidFile::write(&path).expect("it is left over");
        let number = format!("{}\n", std::process::id());
        assert_eq!(fs::read_to_string(&path).expect("a file"), number);
        let refused = PidFile::write(&path).expect_err("it is in use");
        assert!(refused.to_string().contains("a process that runs has the file"), "{refused}");
        assert_eq!(fs::read_to_string(&path).expect("a file"), number);
        drop(file);
        assert!(!path.exists());
        // One that another process has put there stays.
        let file = PidFile::write(&path).expect("a file");
        fs::remove_file(&path).expect("it is there");
        fs::write(&path, "1\n").expect("a file");
        drop(file);
        assert_eq!(fs::read_to_string(&path).expect("a file"), "1\n");
        fs::remove_file(&path).expect("it is there");
        std::os::unix::fs::symlink("/dev/null", &path).expect("a link");
        let refused = PidFile::write(&path).expect_err("it is a link");
        assert!(refused.to_string().contains("is no file"), "{refused}");
        fs::remove_file(&path).expect("it is there");
    }
}
