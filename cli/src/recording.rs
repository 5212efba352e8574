//! A capture file that the command was asked to write.

use std::fs::{self, File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmring::Error;
use vmring::device::pcap::Capture;

use crate::failure::Failure;

/// A capture file, which has just been created.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) capture: Capture,
    path: PathBuf,
    /// The file did not exist before.
    is_new: bool,
}

/// A capture file that is open, and that nobody writes yet. If it is dropped, it is removed if it is new.
#[derive(Debug)]
pub(crate) struct CaptureFile {
    file: File,
    path: PathBuf,
    is_new: bool,
    started: bool,
}

impl CaptureFile {
    /// Creates or empties the file. It may be a named pipe that somebody reads.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        refuse_standard_output(path)?;
        let is_new = !path.exists();
        let mut options = File::options();
        // Without this flag, opening a pipe waits for a reader, and nothing could interrupt that.
        options.write(true).create(true).truncate(true).custom_flags(libc::O_NONBLOCK);
        let opened = options.open(path).and_then(|file| {
            fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
            Ok(file)
        });
        let file = opened.map_err(|error| match error.raw_os_error() {
            Some(libc::ENXIO) => {
                unwritable(path, "no program reads the pipe; start the reader first")
            }
            _ => unwritable(path, &error.to_string()),
        })?;
        Ok(Self { file, path: path.to_owned(), is_new, started: false })
    }

    /// Starts the thread that writes it.
    pub(crate) fn start(mut self) -> Result<Recording, Failure> {
        let failed = |error: Error| unwritable(&self.path, &why(error));
        let file =
            self.file.try_clone().map_err(|error| unwritable(&self.path, &error.to_string()))?;
        let capture = Capture::to_writer(file).map_err(failed)?;
        self.started = true;
        Ok(Recording { capture, path: self.path.clone(), is_new: self.is_new })
    }
}

impl Drop for CaptureFile {
    fn drop(&mut self) {
        if self.is_new && !self.started {
            // It is empty. If it cannot be removed, no harm is done.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn unwritable(path: &Path, why: &str) -> Failure {
    Failure::Usage(format!("the capture file '{}' cannot be written: {why}", path.display()))
}

fn refuse_standard_output(path: &Path) -> Result<(), Failure> {
    if is_standard_output(path) {
        return Err(Failure::Usage(format!(
            "the capture '{}' would be mixed with the report on standard output; name a file or a \
             named pipe",
            path.display()
        )));
    }
    Ok(())
}

impl Recording {
    pub(crate) fn create(path: &Path) -> Result<Self, Failure> {
        CaptureFile::open(path)?.start()
    }

    /// The path as people will find the file.
    pub(crate) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Removes the file again if it is new. Called when nothing was started.
    pub(crate) fn discard(&self) {
        if self.is_new {
            // The file has only a header. If it cannot be removed, no harm is done.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    pub(crate) fn finish(&self) -> Result<(), Failure> {
        self.capture.finish().map_err(|error| {
            Failure::Step(format!("the capture file '{}' is incomplete: {error}", self.name()))
        })
    }
}

/// Whether both paths lead to one file, which exists.
pub(crate) fn is_same_file(a: &Path, b: &Path) -> bool {
    let metadata = |path| fs::metadata(path).ok();
    metadata(a).zip(metadata(b)).is_some_and(|(a, b)| is_same(&a, &b))
}

fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Whether the path leads to the file or pipe that the report is printed to. A terminal and
/// `/dev/null` do not count.
fn is_standard_output(path: &Path) -> bool {
    let output = std::io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let (Ok(output), Ok(file)) = (output.and_then(|file| file.metadata()), fs::metadata(path))
    else {
        return false;
    };
    is_same(&output, &file) && !file.file_type().is_char_device()
}

/// The reason in the system's own words, if there are any.
pub(crate) fn why(error: Error) -> String {
    match error {
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
