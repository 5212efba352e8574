//! A capture file that the command was asked to write.

use std::path::{Path, PathBuf};

use vmring::Error;
use vmring::device::pcap::Capture;

use crate::failure::Failure;

/// The file, made now.
#[derive(Debug)]
pub(crate) struct Recording {
    pub(crate) capture: Capture,
    path: PathBuf,
    /// It was not there before.
    is_new: bool,
}

impl Recording {
    pub(crate) fn create(path: &Path) -> Result<Self, Failure> {
        let is_new = !path.exists();
        let capture = Capture::create(path).map_err(|error| {
            if is_new {
                // There may be an empty file, whose header could not be written.
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

    /// As people are to find it.
    pub(crate) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Nothing was started: leaves no file behind.
    pub(crate) fn discard(&self) {
        if self.is_new {
            // It has a header only; if it cannot be removed there is no harm in it.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    pub(crate) fn finish(&self) -> Result<(), Failure> {
        self.capture.finish().map_err(|error| {
            Failure::Step(format!("the capture file '{}' is incomplete: {error}", self.name()))
        })
    }
}

/// The system's own words, where there are some.
pub(crate) fn why(error: Error) -> String {
    match error {
        Error::Io { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
