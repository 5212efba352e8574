//! Converts the errors of the capture library to those of the standard library.

use std::io;

use pcap_file::PcapError;

pub(super) fn into_io(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
