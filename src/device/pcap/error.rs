//! Errors of the capture library as the standard library's.

use std::io;

use pcap_file::PcapError;

pub(super) fn into_io(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
