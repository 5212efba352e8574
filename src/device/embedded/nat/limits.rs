//! The numbers of the way out that are limits or policy. Those of the translator itself are in
//! `vmring-nat`, and those of a network's router in `vmring-embedded`.

use std::time::Duration;

/// How many sockets that are ready are looked at before guests have their turn.
pub(super) const EVENTS: usize = 256;
/// What the turns of ports may cost before it is looked again who has frames and which sockets are ready, in
/// units of the translator's prices: 0.5 ms.
pub(super) const ROUND_COST: u64 = 5000;
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
/// How soon the host's routes over IPv6 are looked at again while guests send.
pub(super) const ROUTES: Duration = Duration::from_secs(2);
/// How soon they are looked at again while no guest sends.
pub(super) const ROUTES_IDLE: Duration = Duration::from_secs(30);
/// The shortest and the longest time between two router advertisements (`MinRtrAdvInterval` and
/// `MaxRtrAdvInterval`, RFC 4861, 6.2.1).
pub(super) const ADVERTISE_MIN: Duration = Duration::from_secs(200);
pub(super) const ADVERTISE_MAX: Duration = Duration::from_secs(600);
/// How often guests are told of a change, since one may miss an advertisement
/// (`MAX_INITIAL_RTR_ADVERTISEMENTS`, RFC 4861, 6.2.4 and 10).
pub(super) const ADVERTISEMENTS_OF_A_CHANGE: u32 = 3;
/// The time between these. It is no longer than `MAX_INITIAL_RTR_ADVERT_INTERVAL` (RFC 4861, 10), and no
/// shorter than `MIN_DELAY_BETWEEN_RAS`.
pub(super) const ADVERTISE_AGAIN: Duration = Duration::from_secs(4);
/// How soon guests are asked again for an address that a port forward leads to.
pub(super) const ASK_FOR_GUESTS: Duration = Duration::from_secs(1);
/// How long a command to the translator may take.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
