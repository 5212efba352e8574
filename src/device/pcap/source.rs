//! A capture file that is open for reading, in whichever of the two formats it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use super::blocks::PcapNg;
use super::classic::{Pcap, not_ethernet, recognize};
use super::record::{Input, Record, Stop};
use crate::error::{ConfigError, Error};

/// The first four bytes of a pcapng file. They are the same in either byte order.
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
/// The first bytes of compressed files, as capture tools write them, with what decompresses them.
const COMPRESSED: [(&[u8], &str); 5] = [
    (&[0x1f, 0x8b], "gunzip"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "unzstd"),
    (&[0x04, 0x22, 0x4d, 0x18], "unlz4"),
    (&[0xfd, b'7', b'z', b'X'], "unxz"),
    (b"BZh", "bunzip2"),
];
const READING: &str = "reading the capture";

/// A capture file that is being read.
#[derive(Debug)]
pub(super) enum Source {
    Pcap(Pcap<io::Take<File>>),
    PcapNg(PcapNg<io::Take<File>>),
}

/// Opens a regular file. Anything else is refused, because a replay reads its file twice and must
/// not wait for a writer.
pub(super) fn open_file(path: &Path) -> Result<File, Error> {
    // A pipe is not even opened: its writer would take that for a reader.
    check_kind(fs::metadata(path).map_err(Error::io(READING))?.file_type())?;
    // Another file may be there by now. This flag makes the call return at once, whatever it is.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(Error::io(READING))?;
    check_kind(file.metadata().map_err(Error::io(READING))?.file_type())?;
    Ok(file)
}

fn check_kind(kind: fs::FileType) -> Result<(), Error> {
    let what = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a pipe",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    };
    invalid(format!(
        "the capture is {what}, and a replay reads a regular file twice; save it in a file first"
    ))
}

fn invalid<T>(sentence: String) -> Result<T, Error> {
    Err(ConfigError::Invalid(sentence).into())
}

impl Source {
    /// Reads the beginning of the file's first `len` bytes. What comes after them is never read,
    /// so that a file that still grows has the same packets each time.
    pub(super) fn open(mut file: File, len: u64) -> Result<Self, Error> {
        use io::Read as _;

        file.rewind().map_err(Error::io(READING))?;
        let mut input = Input::new(file.take(len));
        let first = input.peek().map_err(Error::io(READING))?;
        if first.is_empty() {
            return invalid("the capture is empty".to_owned());
        }
        let compressed = |(magic, _): &&(&[u8], &str)| first.starts_with(magic);
        if let Some((_, tool)) = COMPRESSED.iter().find(compressed) {
            return invalid(format!("the capture is compressed; decompress it first, with {tool}"));
        }
        let magic = first.first_chunk().copied().unwrap_or_default();
        let opened = if magic == PCAPNG_MAGIC {
            PcapNg::open(input).map(Source::PcapNg)
        } else if let Some(form) = recognize(magic) {
            Pcap::open(input, form).map(Source::Pcap)
        } else {
            return invalid(
                "the capture is neither pcap nor pcapng; if it is in another format, convert it first, \
                 with editcap -F pcapng"
                    .to_owned(),
            );
        };
        opened.or_else(|stop| match stop {
            Stop::End | Stop::Cut { .. } => {
                invalid("the capture ends within its header".to_owned())
            }
            Stop::Damaged(clause) => invalid(clause),
            Stop::Io(error) => Err(Error::io(READING)(error)),
        })
    }

    /// Returns the next packet.
    pub(super) fn next(&mut self) -> Result<Record<'_>, Stop> {
        match self {
            Source::Pcap(pcap) => pcap.next(),
            Source::PcapNg(blocks) => blocks.next(),
        }
    }

    /// Returns an error if the file describes interfaces and none of them is Ethernet, as far as
    /// it was read.
    pub(super) fn check_link(&self) -> Result<(), Error> {
        match self {
            Source::PcapNg(blocks) => {
                blocks.only_other_link().map_or(Ok(()), |link| invalid(not_ethernet(link)))
            }
            // Its header was checked when it was opened.
            Source::Pcap(_) => Ok(()),
        }
    }

    /// Where the record that could not be read begins or is damaged, in bytes from the beginning.
    pub(super) fn at(&self) -> u64 {
        match self {
            Source::Pcap(pcap) => pcap.at(),
            Source::PcapNg(blocks) => blocks.at(),
        }
    }
}

/// The sentence about a file that does not end behind a whole record. `None` if it does.
pub(super) fn note(stop: &Stop, at: u64) -> Option<String> {
    match stop {
        // That a file cannot be read is an error, and no note.
        Stop::End | Stop::Io(_) => None,
        Stop::Cut { .. } => Some(format!(
            "the file ends after {at} bytes in the middle of a record; what comes before is replayed"
        )),
        Stop::Damaged(clause) => Some(format!(
            "the file is damaged near byte {at}: {clause}; what comes before is replayed"
        )),
    }
}
