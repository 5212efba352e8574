//! The numbers of the way out that are limits or policy. Those of the translator itself are in
//! `vmring-nat`, and those of a network's router in `vmring-embedded`.

use std::time::Duration;

/// How many sockets that are ready are looked at before guests have their turn.
pub(super) const EVENTS: usize = 256;
/// How many batches of guests' frames are translated before sockets have their turn.
pub(super) const BATCHES: usize = 32;
/// How soon a port that took no frame is asked again whether it does. Each further look takes twice as
/// long.
pub(super) const LOOK_FIRST: Duration = Duration::from_millis(1);
/// The longest time between two such looks.
pub(super) const LOOK_MAX: Duration = Duration::from_millis(64);
/// How old what is known of the guests' addresses may be although the gateway has seen a change.
pub(super) const ADDRESSES: Duration = Duration::from_millis(20);
/// Looks at the guests' addresses take at most one part in so many of the thread's time.
pub(super) const ADDRESSES_SHARE: u32 = 20;
/// How old it may be if the gateway has seen none. Leases end without one.
pub(super) const ADDRESSES_MAX: Duration = Duration::from_secs(10);
/// How long a command to the translator may take.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
