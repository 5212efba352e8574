//! What can go wrong: one enum per boundary, and every error about a frame gives the frame back.

#[cfg(all(target_os = "linux", feature = "tap"))]
mod tap;

use std::io;
use std::time::Duration;

use thiserror::Error as ThisError;
use vmring_core::offload::OffloadError;
use vmring_core::{Frame, LayoutError, Outcome};

#[cfg(all(target_os = "linux", feature = "tap"))]
pub use tap::TapError;

/// What a device answers instead of success: a vmnet return code, or an error of the operating
/// system.
///
/// The names and numbers of the codes are those of Apple's `vmnet.h` (`vmnet_return_t`); the first
/// nine are `Lwt_vmnet`'s closed list of errors. Devices other than vmnet use these codes for what
/// they refuse themselves. What the kernel refuses keeps its errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
#[doc(alias = "vmnet_return_t")]
pub enum Status {
    /// 1001, `VMNET_FAILURE`.
    #[error("the device reported a general failure (1001)")]
    Failure,
    /// 1002, `VMNET_MEM_FAILURE`.
    #[error("the device could not allocate memory (1002)")]
    MemFailure,
    /// 1003, `VMNET_INVALID_ARGUMENT`.
    #[error("the device was given an invalid argument (1003)")]
    InvalidArgument,
    /// 1004, `VMNET_SETUP_INCOMPLETE`.
    #[error("the interface is not set up yet (1004)")]
    SetupIncomplete,
    /// 1005, `VMNET_INVALID_ACCESS`.
    #[error("access to the interface was denied (1005)")]
    InvalidAccess,
    /// 1006, `VMNET_PACKET_TOO_BIG`.
    #[error("the packet is larger than the interface allows (1006)")]
    PacketTooBig,
    /// 1007, `VMNET_BUFFER_EXHAUSTED`.
    #[error("the device ran out of buffers (1007)")]
    BufferExhausted,
    /// 1008, `VMNET_TOO_MANY_PACKETS`.
    #[error("the batch has more packets than the device takes (1008)")]
    TooManyPackets,
    /// 1009, `VMNET_SHARING_SERVICE_BUSY`.
    #[error("a conflicting sharing service is in use (1009)")]
    SharingServiceBusy,
    /// 1010, `VMNET_NOT_AUTHORIZED`.
    #[error("the process lacks the authorization (1010)")]
    NotAuthorized,
    /// Any other code, below 2^31.
    #[error("the device answered with the unknown status {0}")]
    Unknown(u32),
    /// An error of the operating system: its errno, as in [`io::Error::raw_os_error`].
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Os(i32),
}

/// Tells an errno from a vmnet code where a status is stored as a number: in a completion queue's
/// entry, and in the mailbox.
const OS: u32 = 1 << 31;

impl Status {
    /// The status of a vmnet return code. 1000 is success and so has none.
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            1000 => return None,
            1001 => Status::Failure,
            1002 => Status::MemFailure,
            1003 => Status::InvalidArgument,
            1004 => Status::SetupIncomplete,
            1005 => Status::InvalidAccess,
            1006 => Status::PacketTooBig,
            1007 => Status::BufferExhausted,
            1008 => Status::TooManyPackets,
            1009 => Status::SharingServiceBusy,
            1010 => Status::NotAuthorized,
            other => Status::Unknown(other),
        })
    }

    /// The vmnet return code. [`Os`](Self::Os) has none.
    pub fn code(self) -> Option<u32> {
        Some(match self {
            Status::Failure => 1001,
            Status::MemFailure => 1002,
            Status::InvalidArgument => 1003,
            Status::SetupIncomplete => 1004,
            Status::InvalidAccess => 1005,
            Status::PacketTooBig => 1006,
            Status::BufferExhausted => 1007,
            Status::TooManyPackets => 1008,
            Status::SharingServiceBusy => 1009,
            Status::NotAuthorized => 1010,
            Status::Unknown(code) => code,
            Status::Os(_) => return None,
        })
    }

    /// The status as a number, from which [`from_raw`](Self::from_raw) makes it again.
    pub(crate) fn to_raw(self) -> u32 {
        match (self, self.code()) {
            (Status::Os(errno), _) => OS | errno as u32,
            (_, code) => code.unwrap_or_default().min(OS - 1),
        }
    }

    /// The status that [`to_raw`](Self::to_raw) made a number of.
    pub(crate) fn from_raw(raw: u32) -> Self {
        if raw & OS != 0 {
            return Status::Os((raw & !OS) as i32);
        }
        Self::from_code(raw).unwrap_or(Status::Unknown(raw))
    }
}

/// Why an entry in flight did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
pub enum EntryError {
    /// It was cancelled: by a cancel, a cancel_and_wait, a restart or a close.
    #[error("the entry was cancelled")]
    Cancelled,
    /// The device panicked.
    #[error("the device panicked while the entry was in flight")]
    DevicePanicked,
    /// The device dropped the entry without completing it.
    #[error("the device dropped the entry without completing it")]
    Abandoned,
    /// The device refused it.
    #[error(transparent)]
    Device(#[from] Status),
}

impl EntryError {
    pub(crate) fn from_outcome(outcome: Outcome) -> Result<(), Self> {
        match outcome {
            Outcome::Done => Ok(()),
            Outcome::Cancelled => Err(EntryError::Cancelled),
            Outcome::DevicePanicked => Err(EntryError::DevicePanicked),
            Outcome::Abandoned => Err(EntryError::Abandoned),
            Outcome::Refused(code) => Err(EntryError::Device(Status::from_raw(code))),
        }
    }
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Outcome::Refused(status.to_raw())
    }
}

/// A completion that carries no packet: the error, and the frame if there is one.
#[derive(Debug, ThisError)]
#[error("{error}")]
pub struct CompletionError {
    /// What went wrong.
    pub error: EntryError,
    /// The number the caller gave at submit.
    pub user_data: u64,
    /// The frame that was submitted. `None` for a cancel's completion, and when the frame was
    /// taken from the completion before.
    pub frame: Option<Frame>,
}

/// Why a ring takes no more submissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
pub enum CloseReason {
    /// It was closed or stopped, by its owner, by a control handle or by the interface.
    #[error("the ring was closed")]
    Stopped,
    /// Its device failed for good.
    #[error("the device failed for good: {0}")]
    Failed(Status),
    /// Its device panicked.
    #[error("the device panicked")]
    DevicePanicked,
}

impl CloseReason {
    /// How an entry ends on a ring closed for this reason.
    pub(crate) fn outcome(self) -> Outcome {
        match self {
            CloseReason::Stopped => Outcome::Cancelled,
            CloseReason::Failed(status) => status.into(),
            CloseReason::DevicePanicked => Outcome::DevicePanicked,
        }
    }
}

/// Why a submit was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum SubmitErrorKind {
    /// The submission queue is full until the poller comes round.
    #[error("the submission queue is full")]
    SqFull,
    /// As many entries of this direction are in flight as the ring has credits; reaping frees some.
    #[error("every credit of this direction is in flight")]
    NoCredit,
    /// The packet is longer than the interface's `max_packet_size`.
    #[error("the packet has {len} bytes, but the interface takes at most {max}")]
    TooBig {
        /// The packet's length in bytes.
        len: usize,
        /// The interface's `max_packet_size` in bytes.
        max: usize,
    },
    /// The frame is smaller than the largest packet that the device may put into it.
    #[error("the frame can hold {capacity} bytes, but a packet may have {needed}")]
    TooSmall {
        /// How many bytes the frame can hold.
        capacity: usize,
        /// The interface's `max_packet_size` in bytes.
        needed: usize,
    },
    /// The frame has less room in front of the packet than the device's offload header needs.
    #[error("there are {headroom} bytes in front of the packet, but the interface needs {needed}")]
    NoHeadroom {
        /// Bytes in front of the packet.
        headroom: usize,
        /// Bytes the interface needs there.
        needed: usize,
    },
    /// The packet's offload header is not true of the packet.
    #[error("the packet's offload header is wrong: {0}")]
    Offload(OffloadError),
    /// The packet's offload header asks for what was not negotiated: the checksum or the segments
    /// would never be made.
    #[error("the packet's offload header asks for an offload that was not negotiated")]
    OffloadNotNegotiated,
    /// The frame belongs to a pool that this ring was not built with.
    #[error("the frame belongs to a pool that this ring does not know")]
    ForeignPool,
    /// The ring was built without this direction.
    #[error("the ring was not built for this direction")]
    WrongDirection,
    /// The ring takes no more submissions.
    #[error(transparent)]
    Closed(#[from] CloseReason),
}

/// A refused submit; the frame is inside, unchanged but for a read's reset view.
#[derive(Debug, ThisError)]
#[error("{kind}")]
pub struct SubmitError {
    /// Why.
    pub kind: SubmitErrorKind,
    /// The frame that was not taken.
    pub frame: Frame,
}

impl SubmitErrorKind {
    /// Whether it is only for now: the same submit may succeed after reaping, or once the poller
    /// has come round.
    pub fn is_backpressure(&self) -> bool {
        matches!(self, SubmitErrorKind::SqFull | SubmitErrorKind::NoCredit)
    }
}

impl SubmitError {
    /// Whether it is only for now; see [`SubmitErrorKind::is_backpressure`].
    pub fn is_backpressure(&self) -> bool {
        self.kind.is_backpressure()
    }
}

/// A batch submit that met a frame it could not take.
#[derive(Debug, ThisError)]
#[error("{kind} (after {accepted} frames that were accepted)")]
pub struct BatchError {
    /// Why the batch stopped.
    pub kind: SubmitErrorKind,
    /// The frame that was not taken.
    pub frame: Frame,
    /// How many before it were; they are in flight.
    pub accepted: usize,
}

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum ConfigError {
    /// A depth of zero.
    #[error("the {what} must not be 0")]
    Zero {
        /// The setting.
        what: &'static str,
    },
    /// A setting of something that is not there.
    #[error("the {what} cannot be set: {why}")]
    NotApplicable {
        /// The setting.
        what: &'static str,
        /// What is not there.
        why: &'static str,
    },
    /// A value above the limit.
    #[error("the {what} must be at most {max}, but it is {value}")]
    TooLarge {
        /// The setting.
        what: &'static str,
        /// What was given.
        value: u64,
        /// The limit.
        max: u64,
    },
    /// A pool whose slots cannot hold the device's packets.
    #[error(
        "the pool's frames hold {capacity} bytes, but the device's packets have up to {needed}"
    )]
    PoolTooSmall {
        /// How many bytes a frame of the pool can hold.
        capacity: usize,
        /// Bytes a packet may have.
        needed: usize,
    },
    /// A pool whose frames have no place for the device's offload header.
    #[error("the pool's frames have {headroom} bytes of headroom, but the device needs {needed}")]
    PoolHeadroom {
        /// Bytes in front of a packet.
        headroom: usize,
        /// Bytes the device needs there.
        needed: usize,
    },
    /// A region that cannot be cut into such slots.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Anything else, in a sentence.
    #[error("{0}")]
    Invalid(String),
}

/// Everything else that can go wrong.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The device answered with a status.
    #[error(transparent)]
    Status(#[from] Status),
    /// The system does not let this process have the device. Says what is missing.
    #[error("permission denied: {needs}")]
    PermissionDenied {
        /// What would be needed: root, a capability, or which entitlement on which system.
        needs: String,
    },
    /// The device does not have this function.
    #[error("{what} is not supported by the {device} device")]
    NotSupported {
        /// The function.
        what: &'static str,
        /// The device.
        device: String,
    },
    /// The running macOS is too old for it.
    #[error("{what} requires macOS {version} or later")]
    NeedsMacos {
        /// What.
        what: &'static str,
        /// The first macOS that has it.
        version: &'static str,
    },
    /// The device answered with what cannot be.
    #[error("the {device} device answered with {what}")]
    Answer {
        /// The device.
        device: &'static str,
        /// The answer, in words.
        what: &'static str,
    },
    /// A rule of the kernel's TAP was broken.
    #[cfg(all(target_os = "linux", feature = "tap"))]
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A setting that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system has not that much memory to map.
    #[error("{bytes} bytes of packet memory could not be mapped: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's own error.
        source: io::Error,
    },
    /// The device bears no more rings of this direction.
    #[error("the {device} device can serve {limit} {direction} ring(s), and all are in use")]
    TooManyRings {
        /// The device.
        device: String,
        /// Which direction.
        direction: &'static str,
        /// How many it bears.
        limit: usize,
    },
    /// The device did not start in time. Its start goes on in the background and is undone when it
    /// ends.
    #[error("the device did not start within {0:?}")]
    StartTimeout(Duration),
    /// Something did not let go in time; what it holds is leaked on purpose.
    #[error(
        "the device did not return {slots} slot(s) within {timeout:?}; they are leaked on purpose"
    )]
    Leaked {
        /// Slots that will not come home.
        slots: usize,
        /// How long the close waited.
        timeout: Duration,
    },
    /// Every frame of the ring's pool is held by the caller, so nothing can be read or written until
    /// some are dropped.
    #[error("every frame of the pool is held by the caller")]
    OutOfFrames,
    /// It did not happen in time; nothing is lost.
    #[error("the operation did not finish within {0:?}")]
    Timeout(Duration),
    /// The ring takes no more submissions.
    #[error(transparent)]
    Closed(#[from] CloseReason),
    /// The device did not stop or restart cleanly. (Shared, because several may have asked.)
    #[error(transparent)]
    Device(std::sync::Arc<Error>),
    /// A submit was refused. (The frame went back to its pool; keep the [`SubmitError`] to keep the
    /// frame.)
    #[error(transparent)]
    Submit(SubmitErrorKind),
    /// An entry failed. (The frame went back to its pool; keep the [`CompletionError`] to keep the
    /// frame.)
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's own error.
        source: io::Error,
    },
}

impl From<SubmitErrorKind> for Error {
    fn from(kind: SubmitErrorKind) -> Self {
        match kind {
            SubmitErrorKind::Closed(closed) => Error::Closed(closed),
            kind => Error::Submit(kind),
        }
    }
}

impl From<SubmitError> for Error {
    fn from(refused: SubmitError) -> Self {
        refused.kind.into()
    }
}

impl From<CompletionError> for Error {
    fn from(failed: CompletionError) -> Self {
        Error::Entry(failed.error)
    }
}

impl From<BatchError> for Error {
    fn from(refused: BatchError) -> Self {
        refused.kind.into()
    }
}

impl Error {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, source }
    }
}
