//! [`Transfer`]: the state of the device, on its way through a descriptor of the front end (section
//! "Migrating back-end state").
//!
//! The state is the magic `VMRG`, a version and the number of the device's bytes, each of four bytes
//! in little-endian order, and the device's bytes. Features, memory and rings are not in it, since
//! the front end sets them up again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use crate::sys::{self, kind};
use crate::vhost_user::message::StateDirection;

/// The most bytes of a device in a transferred state.
pub const STATE_MAX: usize = 64 << 10;

const MAGIC: [u8; 4] = *b"VMRG";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 12;

/// A transfer, or its outcome.
#[derive(Debug, Default)]
pub(super) enum Transfer {
    /// There was none since the last check.
    #[default]
    None,
    Saving {
        to: File,
        bytes: Vec<u8>,
        written: usize,
    },
    Loading {
        from: File,
        bytes: Vec<u8>,
    },
    /// The bytes of a whole state have arrived, and the device has not seen them.
    Loaded(Vec<u8>),
    Ended {
        well: bool,
    },
}

impl Transfer {
    /// Begins to write the device's bytes. `None` if the descriptor cannot carry them.
    pub(super) fn save(to: OwnedFd, device: &[u8]) -> Option<Self> {
        if device.len() > STATE_MAX {
            return None;
        }
        let mut bytes = Vec::with_capacity(HEADER_LEN + device.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(device.len() as u32).to_le_bytes());
        bytes.extend_from_slice(device);
        Some(Transfer::Saving { to: channel(to)?, bytes, written: 0 })
    }

    /// Begins to read. `None` if the descriptor cannot carry a state.
    pub(super) fn load(from: OwnedFd) -> Option<Self> {
        Some(Transfer::Loading { from: channel(from)?, bytes: Vec::new() })
    }

    /// Moves what can be moved without waiting. When all bytes are written, or the end of what is to
    /// be read is reached, the descriptor is closed.
    pub(super) fn advance(&mut self) {
        loop {
            let step = match self {
                Transfer::Saving { bytes, written, .. } if *written == bytes.len() => {
                    *self = Transfer::Ended { well: true };
                    return;
                }
                Transfer::Saving { to, bytes, written } => {
                    sys::write(to.as_fd(), &bytes[*written..]).map(|len| *written += len)
                }
                Transfer::Loading { from, bytes } => {
                    let mut piece = [0; 4096];
                    let step = from.read(&mut piece);
                    if let Ok(len) = step {
                        if len == 0 {
                            *self = match device_bytes(bytes) {
                                Some(device) => Transfer::Loaded(device.to_vec()),
                                None => Transfer::Ended { well: false },
                            };
                            return;
                        }
                        bytes.extend_from_slice(&piece[..len]);
                        if bytes.len() > HEADER_LEN + STATE_MAX {
                            *self = Transfer::Ended { well: false };
                            return;
                        }
                    }
                    step.map(drop)
                }
                Transfer::None | Transfer::Loaded(_) | Transfer::Ended { .. } => return,
            };
            match step.map_err(|error| error.kind()) {
                Ok(()) | Err(io::ErrorKind::Interrupted) => {}
                Err(io::ErrorKind::WouldBlock) => return,
                Err(_) => {
                    *self = Transfer::Ended { well: false };
                    return;
                }
            }
        }
    }

    /// The descriptor on which the transfer waits, if it does.
    pub(super) fn waits_for(&self) -> Option<(BorrowedFd<'_>, StateDirection)> {
        match self {
            Transfer::Saving { to, .. } => Some((to.as_fd(), StateDirection::Save)),
            Transfer::Loading { from, .. } => Some((from.as_fd(), StateDirection::Load)),
            _ => None,
        }
    }
}

/// A descriptor that carries a state without waiting: a pipe, a socket or a file.
fn channel(fd: OwnedFd) -> Option<File> {
    let file = File::from(fd);
    let found = sys::file_type(file.metadata().ok()?.mode());
    if ![kind::PIPE, kind::SOCKET, kind::FILE].contains(&found) {
        return None;
    }
    sys::set_nonblocking(file.as_fd()).ok()?;
    Some(file)
}

/// The device's bytes of a whole state, if it is one of this version.
fn device_bytes(state: &[u8]) -> Option<&[u8]> {
    let (magic, rest) = state.split_first_chunk()?;
    let (version, rest) = rest.split_first_chunk()?;
    let (len, device) = rest.split_first_chunk()?;
    let right = *magic == MAGIC
        && u32::from_le_bytes(*version) == VERSION
        && u32::from_le_bytes(*len) as usize == device.len();
    right.then_some(device)
}
