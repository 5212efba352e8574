//! Every default and limit of the library that is a number. The limits of one driver are in a file
//! of the same name below it (`device/vmnet/limits.rs`, `device/tap/limits.rs`), those of the queues
//! in `vmring-core`, those of the embedded network in `vmring-embedded`. How long to wait and how
//! often to retry is in `policy.rs`.

use std::time::Duration;

/// How long a start waits for the driver unless asked otherwise.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a close waits for the device to release its slots unless asked otherwise.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a closing engine on a poller asks the device again.
pub(crate) const CLOSE_RETRY: Duration = Duration::from_millis(1);
/// How often `close` polls an engine that it drives itself.
pub(crate) const CLOSE_POLL: Duration = Duration::from_micros(200);
/// The longest sleep of a wait for a cancel: it covers the moment between a look and going to sleep.
/// The engine's notification ends the sleep early.
pub(crate) const CANCEL_WAIT: Duration = Duration::from_millis(1);

/// Reads, and writes, that may be in flight on a ring unless asked otherwise.
pub(crate) const DEPTH: u32 = 256;
/// Cancels that may be in flight on a ring unless asked otherwise.
pub(crate) const CANCEL_DEPTH: u32 = 16;
/// The largest depth of one direction: twice the largest virtqueue.
pub(crate) const DEPTH_MAX: u32 = vmring_core::DEPTH_MAX / 4;

/// Rings that one poller can drive: a bit each in a word for each bit of a word.
pub(crate) const RINGS_PER_POLLER_MAX: usize = 64 * 64;
/// Turns of rings between two looks of a busy poller at the clock, for the rings that sleep.
pub(crate) const SLEEPER_CHECK_TURNS: usize = 32;
/// The least time between two poll(2) calls of a busy poller: a few times what one costs.
pub(crate) const SLEEPER_CHECK_INTERVAL: Duration = Duration::from_micros(50);

/// Packets per device call unless the device says otherwise: vmnet's documented limit.
pub(crate) const PACKETS_PER_CALL: u32 = 200;

/// Reads that a queue over an inbox shows to senders at a time; more stay with the poller.
pub(crate) const INBOX_READS_MAX: u32 = 1024;
/// Packets that wait in a loopback while no read is posted.
pub(crate) const LOOPBACK_QUEUE: u32 = 256;

/// Bytes to whose multiple a slot's size is rounded up: the line size of Apple silicon, two lines
/// elsewhere.
pub(crate) const SLOT_ALIGN: usize = 128;
/// Bytes kept free in front of a fresh frame unless asked otherwise: space for an offload header and
/// an encapsulation.
pub const HEADROOM_DEFAULT: usize = 64;
