//! A capture file that the command was asked to write.

use std::fs::{self, File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

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

impl Recording {
    pub(crate) fn create(path: &Path) -> Result<Self, Failure> {
        if is_standard_output(path) {
            return Err(Failure::Usage(format!(
                "the capture '{}' would be mixed with the report on standard output; name a file \
                 or a named pipe",
                path.display()
            )));
        }
        let is_new = !path.exists();
        let capture = Capture::create(path).map_err(|error| {
            if is_new {
                // The file may exist but be empty, if its header could not be written.
                let _ = std::fs::remove_file(path);
            }
            Failure::Usage(format!(
                "the capture file '{}' cannot be written: {}",
                path.display(),
                why(error)
            ))
        })?;
        Ok(Self { capture, path: path.to_owned(), is_new })
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
