//! The numbers of this crate that are limits or policy, in one place.

use core::ops::RangeInclusive;
use core::time::Duration;

// A network.

/// How many ports one network can have.
pub const MAX_PORTS: usize = 1024;
/// The MTUs a network can have: from the least IPv6 works with to what an Ethernet frame of at most
/// 65,535 bytes holds.
pub const MTU_RANGE: RangeInclusive<u32> = 1280..=65_521;
/// The MTU of a network, unless configured.
pub const DEFAULT_MTU: u32 = 1500;

// A port's inbox.

/// The largest number of cells of one inbox, posted or overflow.
pub const MAX_INBOX_CELLS: u32 = 1 << 24;
/// How many buffers one port can have posted, at the least and at the most.
pub const INBOX_DEPTH_RANGE: RangeInclusive<u32> = 1..=65_536;
/// How many buffers one port can have posted, unless configured.
pub const DEFAULT_INBOX_DEPTH: u32 = 1024;
/// The longest overflow ring of one port.
pub const MAX_OVERFLOW_DEPTH: u32 = 65_536;
/// The overflow ring's size in bytes, unless configured, as long as its depth stays within
/// [`DEFAULT_OVERFLOW_DEPTH_RANGE`].
pub const DEFAULT_OVERFLOW_BYTES: usize = 512 * 1024;
/// The overflow ring's depth, at the least and at the most, unless configured.
pub const DEFAULT_OVERFLOW_DEPTH_RANGE: RangeInclusive<u32> = 16..=256;

// The table of MAC addresses.

/// Entries of one bucket of the table: one cache line.
pub const TABLE_WAYS: usize = 8;
/// Buckets of the table, for assigned and for learned addresses each.
pub const TABLE_BUCKETS: usize = 1024;
/// After how many seconds of silence a learned address can be forgotten.
pub const MAC_AGEING_SECONDS_RANGE: RangeInclusive<u64> = 1..=86_400;
/// After how long a silence a learned address is forgotten, unless configured.
pub const DEFAULT_MAC_AGEING: Duration = Duration::from_secs(300);

// DHCP.

/// How many seconds a network's leases can last.
pub const LEASE_SECONDS_RANGE: RangeInclusive<u64> = 10..=u32::MAX as u64;
/// How long a lease lasts, unless configured.
pub const DEFAULT_LEASE_TIME: Duration = Duration::from_secs(86_400);
/// How long an offered address waits for its request.
pub const OFFER_TIME: Duration = Duration::from_secs(60);
/// How long an address that a client found in use is put aside.
pub const DECLINE_TIME: Duration = Duration::from_secs(3600);
/// The most addresses one server gives out, however wide its range: what bounds its memory.
pub const MAX_LEASES: u32 = 65_536;
/// How many name servers DHCP can name.
pub const MAX_DNS_SERVERS: usize = 3;
