//! The errors. [`SubmitError`], [`BatchError`] and [`CompletionError`] contain the frame; converting
//! them to [`Error`] (as `?` does) returns it to its pool.
//!
//! # A refused submit
//!
//! [`SubmitErrorKind`] says why. The packet was not submitted, and its frame is in the error.
//!
//! | kind | what to do |
//! |---|---|
//! | [`SqFull`](SubmitErrorKind::SqFull) | submit again; the next poll makes space |
//! | [`NoCredit`](SubmitErrorKind::NoCredit) | reap, or wait for a write that [skips success](crate::Ring::submit_write_skip_success), then submit again |
//! | [`Draining`](SubmitErrorKind::Draining) | submit again after [`Ring::resume`](crate::Ring::resume) |
//! | [`TooBig`](SubmitErrorKind::TooBig) | drop the packet, or cut it with [`software`](crate::software) if it has an offload header |
//! | [`TooSmall`](SubmitErrorKind::TooSmall) | use a pool whose frames hold [`max_packet_size`](crate::device::Capabilities::max_packet_size) bytes |
//! | [`NoHeadroom`](SubmitErrorKind::NoHeadroom) | use a pool with as much [`headroom`](crate::device::Capabilities::headroom) as the device needs |
//! | [`Offload`](SubmitErrorKind::Offload) | drop the packet, or correct its offload header |
//! | [`OffloadNotNegotiated`](SubmitErrorKind::OffloadNotNegotiated) | let [`software`](crate::software) do the work, then submit |
//! | [`ForeignPool`](SubmitErrorKind::ForeignPool) | copy the packet into a frame of one of the ring's [pools](crate::Ring::pools) |
//! | [`WrongDirection`](SubmitErrorKind::WrongDirection) | submit to a ring that was built for this direction |
//! | [`Closed`](SubmitErrorKind::Closed) | reap what is in flight, and give the ring up |
//!
//! # A failed completion
//!
//! [`EntryError`] says why. The frame is in the completion.
//!
//! | error | the packet | what to do |
//! |---|---|---|
//! | [`Cancelled`](EntryError::Cancelled) | was not received or sent | submit again, if the ring is open |
//! | [`Device(BufferExhausted)`](Status::BufferExhausted) | was not sent, because the device took no writes within the [`RetryPolicy`](crate::RetryPolicy) | submit it again, or drop it |
//! | [`Device(Os(EIO))`](Status::Os) on a TAP | was not sent, because the link is down | drop it, or submit it again later |
//! | [`Device`](EntryError::Device) with another status | was not received or sent | drop it |
//! | [`Abandoned`](EntryError::Abandoned) | was not received; may have been sent | drop it; the device has a bug |
//! | [`DevicePanicked`](EntryError::DevicePanicked) | was not received; may have been sent | give the ring up; the device has a bug |
//! | [`NoPacket`](EntryError::NoPacket) | there is none | skip the completion |
//!
//! `ring.control().closed()` tells whether the ring itself is over; see
//! [`RingControl::closed`](crate::RingControl::closed). While it returns `None`, an error concerns
//! its own packet alone. A ring closes before the entries that fail for that reason complete, so the
//! answer is right when such a completion is reaped.

#[cfg(feature = "socket")]
mod socket;
#[cfg(all(target_os = "linux", feature = "tap"))]
mod tap;

use std::io;
use std::time::Duration;

use thiserror::Error as ThisError;
use vmring_core::offload::OffloadError;
use vmring_core::{Frame, GuestBuffer, LayoutError, Outcome};

#[cfg(feature = "socket")]
pub use socket::SocketError;
#[cfg(all(target_os = "linux", feature = "tap"))]
pub use tap::TapError;

/// The status with which a device reports a failure: a vmnet return code, or an error of the
/// operating system.
///
/// The names and numbers of the codes are those of Apple's `vmnet.h` (`vmnet_return_t`); the first
/// nine are `Lwt_vmnet`'s closed list of errors. Devices other than vmnet use these codes for what
/// they refuse themselves. What the kernel refuses is [`Os`](Self::Os) with the kernel's errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
#[doc(alias = "vmnet_return_t")]
pub enum Status {
    /// 1001, `VMNET_FAILURE`.
    #[error("the device reported a failure and gave no reason (1001)")]
    Failure,
    /// 1002, `VMNET_MEM_FAILURE`.
    #[error("the device could not allocate memory (1002)")]
    MemFailure,
    /// 1003, `VMNET_INVALID_ARGUMENT`. Every device completes the write of a packet shorter than an
    /// Ethernet header with it.
    #[error(
        "the device was given an invalid argument (1003): a packet shorter than an Ethernet header, \
         14 bytes, or a setting that it does not have"
    )]
    InvalidArgument,
    /// 1004, `VMNET_SETUP_INCOMPLETE`.
    #[error("the interface is not set up yet (1004): start it, or wait for its start, first")]
    SetupIncomplete,
    /// 1005, `VMNET_INVALID_ACCESS`.
    #[error("the system denied access to the interface (1005): another process may have it")]
    InvalidAccess,
    /// 1006, `VMNET_PACKET_TOO_BIG`.
    #[error("the packet is longer than the interface's max_packet_size (1006)")]
    PacketTooBig,
    /// 1007, `VMNET_BUFFER_EXHAUSTED`.
    #[error(
        "the device ran out of buffers (1007): submit the packet again later, or give the ring a \
         longer RetryPolicy"
    )]
    BufferExhausted,
    /// 1008, `VMNET_TOO_MANY_PACKETS`.
    #[error("the batch has more packets than the device takes at once (1008)")]
    TooManyPackets,
    /// 1009, `VMNET_SHARING_SERVICE_BUSY`.
    #[error(
        "another sharing service of the system, such as Internet Sharing, is in the way (1009): \
         turn it off first"
    )]
    SharingServiceBusy,
    /// 1010, `VMNET_NOT_AUTHORIZED`.
    #[error(
        "the system does not authorize this process (1010): run it as root, or with the \
         entitlement that the device asks for"
    )]
    NotAuthorized,
    /// Any other code. It is below 2^31.
    #[error("the device failed with the status {0}, which this version does not know")]
    Unknown(u32),
    /// An error of the operating system. The number is its errno, as in
    /// [`io::Error::raw_os_error`].
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Os(i32),
}

/// The bit that is set for an errno and clear for a vmnet code, where a status is stored as a
/// number: in an entry of the completion queue, and in the mailbox.
const OS: u32 = 1 << 31;

impl Status {
    /// Returns the status of a vmnet return code. Returns `None` for 1000, which is success.
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
            // Bit 31 tells an errno from a code where a status is stored as a number.
            other => Status::Unknown(other.min(OS - 1)),
        })
    }

    /// Returns the vmnet return code, or `None` for [`Os`](Self::Os), which has none.
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

    /// Returns the status as a number, which [`from_raw`](Self::from_raw) converts back.
    pub(crate) fn to_raw(self) -> u32 {
        match (self, self.code()) {
            (Status::Os(errno), _) => OS | errno as u32,
            (_, code) => code.unwrap_or_default().min(OS - 1),
        }
    }

    /// Returns the status of a number that [`to_raw`](Self::to_raw) returned.
    pub(crate) fn from_raw(raw: u32) -> Self {
        if raw & OS != 0 {
            return Status::Os((raw & !OS) as i32);
        }
        Self::from_code(raw).unwrap_or(Status::Unknown(raw))
    }
}

/// Why an entry that was in flight did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
pub enum EntryError {
    /// The entry was cancelled: by a cancel, by `cancel_and_wait`, by a restart or by a close.
    #[error("the entry was cancelled, by a cancel, a restart or a close")]
    Cancelled,
    /// The device panicked.
    #[error("the device panicked while the entry was in flight")]
    DevicePanicked,
    /// The device dropped the entry without completing it.
    #[error("the device dropped the entry without completing it, which is a mistake of the device")]
    Abandoned,
    /// The completion has no packet: it is a cancel's, or its frame was taken before. Only
    /// [`Completion::take_packet`](crate::Completion::take_packet) returns this; no entry completes
    /// with it.
    #[error("the completion has no packet: it is a cancel's, or its frame was taken before")]
    NoPacket,
    /// The device did not do it: nothing was received or sent. The ring stays open unless the
    /// device failed for good (then submits return [`Closed(Failed(_))`](CloseReason::Failed)).
    /// [`BufferExhausted`](Status::BufferExhausted): the device took no writes within the
    /// [`RetryPolicy`](crate::RetryPolicy); submit it again or drop it.
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

/// The error of a completion that has no packet, with the frame if there is one.
#[derive(Debug, ThisError)]
#[error("{error}")]
pub struct CompletionError {
    /// What went wrong.
    pub error: EntryError,
    /// The number that the caller gave when it submitted the entry.
    pub user_data: u64,
    /// The frame that was submitted. `None` for the completion of a cancel, and if the frame was
    /// taken out of the completion before.
    pub frame: Option<Frame>,
}

/// Why a ring takes no more submissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ThisError)]
#[non_exhaustive]
pub enum CloseReason {
    /// It was closed or stopped: by its owner, by a control handle or by the interface.
    #[error("the ring was closed or its interface stopped: build another ring")]
    Stopped,
    /// Its device failed for good, with this status.
    #[error("the device failed for good: {0}")]
    Failed(Status),
    /// Its device panicked.
    #[error("the device panicked, which closed the ring")]
    DevicePanicked,
}

impl CloseReason {
    /// The outcome of an entry that is in flight when its ring closes for this reason.
    pub(crate) fn outcome(self) -> Outcome {
        match self {
            CloseReason::Stopped => Outcome::Cancelled,
            CloseReason::Failed(status) => status.into(),
            CloseReason::DevicePanicked => Outcome::DevicePanicked,
        }
    }
}

/// Why the submission of a frame was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum SubmitErrorKind {
    /// The submission queue is full. The next poll makes space.
    #[error("the submission queue is full: submit again after the next poll of the ring")]
    SqFull,
    /// Every credit of this direction is taken by an entry in flight. Reaping a completion returns
    /// its credit. The credit of a write that skips success returns when the write succeeds.
    #[error(
        "the ring has as many entries of this direction in flight as it takes: reap completions, \
         then submit again, or build it with a greater depth"
    )]
    NoCredit,
    /// The packet is longer than the interface's `max_packet_size`.
    #[error("the packet has {len} bytes, but the interface takes at most {max} (max_packet_size)")]
    TooBig {
        /// The packet's length in bytes.
        len: usize,
        /// The interface's `max_packet_size` in bytes.
        max: usize,
    },
    /// The frame is smaller than the largest packet that the device may put into it.
    #[error(
        "the frame can hold {capacity} bytes, but a packet may have {needed} (max_packet_size): \
         take a frame of a pool with larger packets"
    )]
    TooSmall {
        /// How many bytes the frame can hold.
        capacity: usize,
        /// The interface's `max_packet_size` in bytes.
        needed: usize,
    },
    /// There is less space in front of the packet than the device's offload header needs.
    #[error(
        "there are {headroom} bytes in front of the packet, but the interface needs {needed} for its \
         offload header: take a frame of a pool with that much headroom"
    )]
    NoHeadroom {
        /// How many bytes are in front of the packet.
        headroom: usize,
        /// How many bytes the interface needs there.
        needed: usize,
    },
    /// The packet's offload header does not describe the packet.
    #[error("the packet's offload header is wrong: {0}")]
    Offload(OffloadError),
    /// The packet's offload header asks for an offload that was not negotiated, so nobody would
    /// complete the checksum or make the segments.
    #[error(
        "the packet's offload header asks for work that the device does not do: ask for it with \
         InterfaceBuilder::offloads, or do it with vmring::software"
    )]
    OffloadNotNegotiated,
    /// The frame belongs to a pool that this ring was not built with.
    #[error(
        "the frame belongs to a pool that this ring was not built with: add the pool with \
         RingBuilder::pool, or copy the packet into a frame of the ring's own"
    )]
    ForeignPool,
    /// The ring was built without this direction.
    #[error(
        "the ring was built for the other direction only: reads need Direction::Read or Both, and \
         writes need Direction::Write or Both"
    )]
    WrongDirection,
    /// The ring is drained, and takes no submissions until [`resume`](crate::Ring::resume).
    #[error("the ring is drained and takes nothing until resume is called")]
    Draining,
    /// The ring takes no more submissions.
    #[error(transparent)]
    Closed(#[from] CloseReason),
}

/// A submission that was refused. It contains the frame, which is unchanged, except that the frame
/// of a read was [reset](Frame::reset).
#[derive(Debug, ThisError)]
#[error("{kind}")]
pub struct SubmitError {
    /// Why it was refused.
    pub kind: SubmitErrorKind,
    /// The frame that was refused.
    pub frame: Frame,
}

impl SubmitErrorKind {
    /// True for [`SqFull`](Self::SqFull) and [`NoCredit`](Self::NoCredit): reap, then submit again.
    /// False for [`Draining`](Self::Draining), which only [`resume`](crate::Ring::resume) ends.
    pub fn is_backpressure(&self) -> bool {
        matches!(self, SubmitErrorKind::SqFull | SubmitErrorKind::NoCredit)
    }
}

impl SubmitError {
    /// True if it is enough to reap and then submit again; see
    /// [`SubmitErrorKind::is_backpressure`].
    pub fn is_backpressure(&self) -> bool {
        self.kind.is_backpressure()
    }
}

/// A submission of a guest's buffer that was refused. It contains the buffer, which is unchanged.
#[derive(Debug, ThisError)]
#[error("{kind}")]
pub struct GuestSubmitError {
    /// Why it was refused.
    pub kind: SubmitErrorKind,
    /// The buffer that was refused.
    pub buffer: GuestBuffer,
}

impl GuestSubmitError {
    /// True if it is enough to reap and then submit again; see
    /// [`SubmitErrorKind::is_backpressure`].
    pub fn is_backpressure(&self) -> bool {
        self.kind.is_backpressure()
    }
}

/// The submission of a batch that ended at a frame which was refused.
#[derive(Debug, ThisError)]
#[error("{kind} (after {accepted} frames that were accepted)")]
pub struct BatchError {
    /// Why the batch stopped.
    pub kind: SubmitErrorKind,
    /// The frame that was refused.
    pub frame: Frame,
    /// How many frames before it were accepted. They are in flight.
    pub accepted: usize,
}

/// An invalid setting.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum ConfigError {
    /// A number of zero, where at least one is needed.
    #[error("the {what} must not be 0")]
    Zero {
        /// The setting.
        what: &'static str,
    },
    /// A setting of something that does not exist here.
    #[error("the {what} cannot be set: {why}")]
    NotApplicable {
        /// The setting.
        what: &'static str,
        /// Why the setting does not apply.
        why: &'static str,
    },
    /// A value above the limit.
    #[error("the {what} must be at most {max}, but it is {value}")]
    TooLarge {
        /// The setting.
        what: &'static str,
        /// The value that was given.
        value: u64,
        /// The limit.
        max: u64,
    },
    /// A pool whose frames are smaller than the device's largest packet.
    #[error(
        "the pool's frames hold {capacity} bytes, but the device's packets have up to {needed} \
         (max_packet_size): build the pool for packets of that size"
    )]
    PoolTooSmall {
        /// How many bytes a frame of the pool can hold.
        capacity: usize,
        /// How many bytes a packet may have.
        needed: usize,
    },
    /// A pool whose frames have less headroom than the device's offload header needs.
    #[error(
        "the pool's frames have {headroom} bytes of headroom, but the device needs {needed}: set it \
         with PoolBuilder::headroom"
    )]
    PoolHeadroom {
        /// How many bytes are in front of a packet.
        headroom: usize,
        /// How many bytes the device needs there.
        needed: usize,
    },
    /// A memory region that cannot be divided into the slots that were asked for.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Any other invalid setting, described in a sentence.
    #[error("{0}")]
    Invalid(String),
}

/// What helps if a ring does not release its device.
const DRIVE_OR_CLOSE: &str = "close it, or, if it is driven inline, reap or wait";

/// The error type of the library's functions.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// The device reported a failure.
    #[error(transparent)]
    Status(#[from] Status),
    /// The system does not allow this process to use the device. The error says what is missing.
    #[error("permission denied: {needs}")]
    PermissionDenied {
        /// What is needed: root, a capability, or an entitlement and the system that requires it.
        needs: String,
    },
    /// The device does not support a function.
    #[error("{what} is not supported by the {device} device: leave it out, or use another device")]
    NotSupported {
        /// The function.
        what: &'static str,
        /// The device.
        device: String,
    },
    /// The running macOS is too old for a function.
    #[error("{what} requires macOS {version} or later")]
    NeedsMacos {
        /// The function.
        what: &'static str,
        /// The first version of macOS that has it.
        version: &'static str,
    },
    /// The system behind the device gave an answer that makes no sense.
    #[error("the {device} device answered with {what}, which should not happen")]
    Answer {
        /// The device.
        device: &'static str,
        /// A description of the answer.
        what: &'static str,
    },
    /// A rule of the kernel's TAP interfaces was broken.
    #[cfg(all(target_os = "linux", feature = "tap"))]
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A rule of sockets was broken.
    #[cfg(feature = "socket")]
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// An invalid setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system does not have that much memory to map.
    #[error(
        "{bytes} bytes of packet memory could not be mapped: {source}; ask for fewer or smaller \
         frames"
    )]
    Memory {
        /// How many bytes were asked for.
        bytes: usize,
        /// The system's own error.
        source: io::Error,
    },
    /// The device can serve no more rings of this direction.
    #[error(
        "the {device} device serves {limit} {direction} {} at a time, which {} in use: close one \
         first",
        if *.limit == 1 { "ring" } else { "rings" },
        if *.limit == 1 { "is" } else { "are" }
    )]
    TooManyRings {
        /// The device.
        device: String,
        /// The direction, "reading" or "writing".
        direction: &'static str,
        /// How many rings of this direction it can serve.
        limit: usize,
    },
    /// The device did not start within this time. Its start continues in the background; a device
    /// that starts in the end is stopped again.
    #[error(
        "the device did not start within {0:?}, and is stopped again as soon as it has: a longer \
         InterfaceBuilder::start_timeout may help"
    )]
    StartTimeout(Duration),
    /// The device did not give back all slots in time. The library leaks them on purpose, because
    /// something may still write to them.
    #[error(
        "the device did not return {slots} {} within {timeout:?}; the library leaks their memory on \
         purpose, because the device may still write to it",
        if *.slots == 1 { "slot" } else { "slots" }
    )]
    Leaked {
        /// How many slots are leaked.
        slots: usize,
        /// How long the close waited.
        timeout: Duration,
    },
    /// The caller holds every frame of the ring's pool. Nothing can be read or written until it
    /// drops some.
    #[error(
        "the caller holds every frame of the pool: drop some, or build the ring with more \
         (RingBuilder::frames)"
    )]
    OutOfFrames,
    /// The operation did not finish within this time. Nothing is lost.
    #[error("the device did not finish the operation within {0:?}: call it again, or wait longer")]
    Timeout(Duration),
    /// A stop or restart of the interface did not finish within the time that it was given. It
    /// finishes as soon as the last ring has released the device.
    #[error(
        "the interface did not {action} within {timeout:?}: {}",
        match *.rings {
            0 => "the device itself is not done yet".to_owned(),
            1 => format!("1 ring still uses its device; {DRIVE_OR_CLOSE}"),
            n => format!("{n} rings still use its device; {DRIVE_OR_CLOSE}"),
        }
    )]
    StopTimeout {
        /// What did not finish: "stop" or "restart".
        action: &'static str,
        /// How many rings have not released the device yet. With 0 the device itself is at work.
        rings: usize,
        /// How long the caller waited.
        timeout: Duration,
    },
    /// The ring takes no more submissions.
    #[error(transparent)]
    Closed(#[from] CloseReason),
    /// The device did not stop or restart cleanly. (The error is shared, because several callers
    /// may wait for the same stop or restart.)
    #[error(transparent)]
    Device(std::sync::Arc<Error>),
    /// A submission was refused. (The frame has returned to its pool. Keep the [`SubmitError`] to
    /// keep the frame.)
    #[error(transparent)]
    Submit(SubmitErrorKind),
    /// An entry failed. (The frame has returned to its pool. Keep the [`CompletionError`] to keep
    /// the frame.)
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
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
