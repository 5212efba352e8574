//! The defaults and limits of the library that are numbers.
//!
//! Those of one driver are in a file of this name below it (`device/vmnet/limits.rs`,
//! `device/tap/limits.rs`). Those of the queues are in `vmring-core`, and those of the embedded
//! network in `vmring-embedded`. How long a thread waits and how often a write is tried is in
//! `policy.rs`.

use std::time::Duration;

/// How long a start waits for the driver, by default.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a close waits for the device to release its slots, by default.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval at which a closing engine on a poller asks the device again.
pub(crate) const CLOSE_RETRY: Duration = Duration::from_millis(1);
/// The interval at which `close` polls an engine that it drives itself.
pub(crate) const CLOSE_POLL: Duration = Duration::from_micros(200);

/// How many reads may be in flight on a ring, and how many writes, by default.
pub(crate) const DEPTH: u32 = 256;
/// How many cancels may be in flight on a ring, by default.
pub(crate) const CANCEL_DEPTH: u32 = 16;
/// The largest depth of one direction: twice the largest virtqueue.
pub(crate) const DEPTH_MAX: u32 = vmring_core::DEPTH_MAX / 4;

/// How many rings one poller can drive. The ready set has one bit for each of them in 64 words, and
/// one more word with a bit for each of those words.
///
/// A model has one of those words, because loom bounds the objects of a model.
pub(crate) const RINGS_PER_POLLER_MAX: usize = if cfg!(loom) { 64 } else { 64 * 64 };
/// How many polls of rings a busy poller makes between two looks at the clock, for the rings that
/// sleep.
pub(crate) const SLEEPER_CHECK_POLLS: usize = 32;
/// The shortest time between two looks of a busy poller at the descriptors of rings that sleep: a few
/// times the cost of one.
pub(crate) const SLEEPER_CHECK_INTERVAL: Duration = Duration::from_micros(50);
/// How long a ring sleeps whose descriptor the system does not watch, for example because no further
/// descriptor can be opened.
pub(crate) const UNWATCHED_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// The largest number of frames that a ring reserves for the packets of guests whose memory its
/// device does not take.
pub(crate) const BOUNCE_FRAMES_MAX: usize = 64;

/// How many packets one device call takes, by default: vmnet's documented limit.
pub(crate) const PACKETS_PER_CALL: u32 = 200;

/// How many reads a queue over an inbox shows to senders at a time. The others stay with the
/// poller.
pub(crate) const INBOX_READS_MAX: u32 = 1024;
/// How many packets wait in a loopback while no read is posted.
pub(crate) const LOOPBACK_QUEUE: u32 = 256;

/// A slot's size is rounded up to a multiple of this many bytes: one cache line of Apple silicon,
/// two cache lines elsewhere.
pub(crate) const SLOT_ALIGN: usize = 128;
/// How many bytes are free in front of the packet in a new frame, by default: space for an offload
/// header and an encapsulation.
pub const HEADROOM_DEFAULT: usize = 64;
