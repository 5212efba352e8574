//! What a port may do: which source addresses it sends from, what it may be for others, and how much it
//! sends, receives and floods.
//!
//! A policy holds below every kind of port, whatever moves its frames. A frame that breaks it is
//! dropped and counted by cause, and never waits.
//!
//! # Source addresses
//!
//! [`SourceRule`] says from which addresses a port sends. Where that is one address, a frame from
//! another one is dropped ([`DropReason::Spoofed`](crate::DropReason::Spoofed)), as libvirt's filter
//! `no-mac-spoofing` does. So is an ARP or RARP packet that names another sender than its frame, as
//! `no-arp-mac-spoofing` does: otherwise the guest would take over the traffic of others by ARP
//! alone. Behind up to three VLAN tags the packet is found as well. The IP addresses in a packet,
//! and the link-layer addresses that IPv6's neighbour discovery names, are not looked at.
//!
//! # Roles
//!
//! [`PortRole`] says whether a port's stations may be routers and DHCP servers for others. A guest that
//! announces itself as a router becomes the way of all others, and one that answers their DHCP messages
//! chooses their addresses and name servers, from whatever source address it sends. From a port whose role
//! is [`Host`](PortRole::Host), router advertisements and redirects of IPv6 and what DHCP servers tell
//! clients are dropped ([`DropReason::Role`](crate::DropReason::Role)), also behind tags, extension headers
//! and in first fragments (RFC 6105, 7113 and 7610). The network's own gateway is behind no port.
//!
//! # Limits
//!
//! Each limit is a token bucket. It holds at most `burst` tokens, is full at first, and gains
//! `per_second` tokens a second. A frame takes one token of a packet limit, and a token per byte of
//! a byte limit, from its destination address to its last byte. It passes if the bucket holds
//! enough. A frame that is longer than the whole burst passes if the bucket is full, and the bucket
//! is in debt afterwards. So in `t` seconds pass at most `burst + per_second * t` tokens, and one
//! frame that is longer than the burst.
//!
//! Time is the network's clock, which each sender reads once per batch. A bucket is one word that a
//! compare-and-swap changes. A port without limits pays a branch.
//!
//! - The *send limit* holds for every frame that the port may send by its source address, also for
//!   those to the gateway.
//! - The *receive limit* holds for every frame that would reach the port, also for the gateway's
//!   answers. A packet that then finds no buffer has used its tokens all the same.
//! - The *flood limit* holds for frames that go to all ports. It is the sender's own, so nobody's
//!   frame is refused because another port floods. The gateway gets a broadcast that is over the
//!   limit: it answers on the sender's own thread, and to the sender alone.

use core::num::NonZeroU64;
use core::time::Duration;

use crossbeam_utils::CachePadded;
use vmring_core::sync::{AtomicU32, AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::frame;
use crate::limits::{
    CLOCK_LAG, FLOODS_AT_ONCE, FLOODS_PER_SECOND, HEAD_LEN, LONGEST_FRAME, VLAN_TAG_LEN,
};
use crate::table::Mac;

/// The source addresses from which a port sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceRule {
    /// Every address that is not another port's or the gateway's. The network learns that the
    /// address is behind the port. This is for ports behind which several stations may be. A guest
    /// that is not trusted can take over the traffic of stations whose addresses were learned, though
    /// not of those that a port was assigned or is bound to.
    #[default]
    Any,
    /// The port's own MAC address and no other.
    Fixed,
    /// The first unicast address from which the port sends, and no other until it leaves the
    /// network. From then on the address is the port's like one that was assigned: nobody else can
    /// send from it, and it does not age. It must not be another port's or the gateway's. The rule is
    /// for guests whose address is not known beforehand; the guest chooses it, so it can be first
    /// with the address of a station that has no port.
    LearnOnce,
}

/// A token bucket: a rate, and how much may pass at once. The [module](self) says what it lets
/// through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    /// The tokens that the bucket gains per second.
    pub per_second: NonZeroU64,
    /// The most tokens it holds.
    pub burst: NonZeroU64,
}

/// The limits of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RateLimit {
    /// The limit in packets.
    pub packets: Option<Rate>,
    /// The limit in bytes of Ethernet frames, without preamble and checksum.
    pub bytes: Option<Rate>,
}

/// The limits of a port. They can be [changed](crate::port::Monitor::set_limits) while it is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortLimits {
    /// The limit of what the port sends. By default there is none.
    pub send: RateLimit,
    /// The limit of what the port receives. By default there is none.
    pub receive: RateLimit,
    /// The limit in packets of what this port sends to all others. The default is far more than a
    /// guest needs: [`FLOODS_PER_SECOND`], and [`FLOODS_AT_ONCE`], which the default inbox of each
    /// other port has buffers for.
    pub flood: Option<Rate>,
}

impl Default for PortLimits {
    fn default() -> Self {
        let flood = Rate { per_second: FLOODS_PER_SECOND, burst: FLOODS_AT_ONCE };
        let none = RateLimit::default();
        Self { send: none, receive: none, flood: Some(flood) }
    }
}

/// What a port's stations may be for the others of the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PortRole {
    /// Anything, also routers and DHCP servers. This is for ports behind which such are wanted, and for
    /// guests that are trusted.
    #[default]
    Any,
    /// Hosts, and neither routers nor DHCP servers. It costs a look at the headers of each IP packet of the
    /// port, and a copy of those of UDP and ICMPv6 that are in the memory of a guest; so the port sends IP
    /// packets one by one, and not in [runs](crate::Sender::run).
    Host,
}

/// What a port may do. See the [module](self).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortPolicy {
    /// From which addresses it sends.
    pub source: SourceRule,
    /// What its stations may be for others.
    pub role: PortRole,
    /// How much passes through it.
    pub limits: PortLimits,
}

/// Units of time per nanosecond.
const TICKS: u64 = 1 << 8;
/// The fractional bits of a price.
const FRACTION: u32 = 16;
/// The longest that a bucket takes to fill, in ticks: 104 days.
const LONGEST_FILL: u64 = 1 << 61;

/// A moment of the network's clock, in ticks. It wraps after 2.2 years, so only differences mean
/// something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(u64);

impl Moment {
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) fn new(time: Duration) -> Self {
        let nanoseconds = time.as_secs().wrapping_mul(1_000_000_000);
        Self(nanoseconds.wrapping_add(u64::from(time.subsec_nanos())).wrapping_mul(TICKS))
    }
}

/// Returns how many ticks it takes to gain `tokens` at this price, rounded up.
fn ticks(price: u64, tokens: u64) -> u64 {
    let fractions = u128::from(price) * u128::from(tokens);
    let ticks = (fractions + ((1 << FRACTION) - 1)) >> FRACTION;
    u64::try_from(ticks).unwrap_or(u64::MAX).min(LONGEST_FILL)
}

/// A token bucket. Instead of its tokens it keeps the moment at which it will be full: a taken token
/// moves that moment into the future.
///
/// Every access is relaxed, because each value is one number and publishes nothing else. A thread
/// that sees a part of a change decides one frame by a mixture of both rates, and the moment that it
/// stores is bounded at the next take.
#[derive(Default)]
struct Bucket {
    /// How long it takes to gain a token, in ticks with [`FRACTION`] fractional bits. With 0 there
    /// is no limit.
    price: AtomicU64,
    /// How long it takes to fill the empty bucket, in ticks.
    fill: AtomicU64,
    /// The moment at which the bucket is full. It is full now if that is in the past.
    full_at: AtomicU64,
}

impl Bucket {
    /// Sets the rate, and fills the bucket.
    fn set(&self, rate: Option<Rate>, now: Moment) {
        let (price, fill) = rate.map_or((0, 0), |rate| {
            let price = ((1_000_000_000 * TICKS) << FRACTION).div_ceil(rate.per_second.get());
            (price, ticks(price, rate.burst.get()))
        });
        self.full_at.store(now.0, Ordering::Relaxed);
        self.fill.store(fill, Ordering::Relaxed);
        self.price.store(price, Ordering::Relaxed);
    }

    /// Takes `each` tokens for each of `wanted` frames, or of as many as the bucket has tokens for.
    /// Returns their number.
    fn take(&self, wanted: u64, each: u64, now: Moment) -> u64 {
        let price = self.price.load(Ordering::Relaxed);
        if price == 0 {
            return wanted;
        }
        let (fill, cost) = (self.fill.load(Ordering::Relaxed), ticks(price, each));
        // A take leaves no bucket further from being full, by the clock of any sender.
        let furthest = fill.max(ticks(price, LONGEST_FRAME)) + Moment::new(CLOCK_LAG).0;
        let mut taken = 0;
        let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let missing = full_at.wrapping_sub(now.0);
            let missing = if missing > u64::MAX / 2 { 0 } else { missing };
            if missing > furthest {
                // Another rate left this moment, or nothing was taken for a year and the clock has
                // wrapped. The bucket counts as empty.
                taken = 0;
                return Some(now.0.wrapping_add(fill));
            }
            taken = match fill.saturating_sub(missing) / cost {
                0 => u64::from(missing == 0),
                enough => enough.min(wanted),
            };
            (taken > 0).then(|| now.0.wrapping_add(missing).wrapping_add(taken * cost))
        });
        taken
    }

    /// Puts tokens back that were taken and not used.
    fn put_back(&self, tokens: u64) {
        let back = ticks(self.price.load(Ordering::Relaxed), tokens);
        self.full_at.fetch_sub(back, Ordering::Relaxed);
    }
}

/// The buckets of one direction.
#[derive(Default)]
struct Limiter {
    packets: Bucket,
    bytes: Bucket,
}

impl Limiter {
    fn set(&self, limit: RateLimit, now: Moment) {
        self.packets.set(limit.packets, now);
        self.bytes.set(limit.bytes, now);
    }

    /// Takes the tokens of one packet of `len` bytes that counts as so many `frames`. Returns false,
    /// and takes none, if there are too few.
    fn take(&self, frames: usize, len: usize, now: Moment) -> bool {
        if self.packets.take(1, frames as u64, now) == 0 {
            return false;
        }
        let passes = self.bytes.take(1, len as u64, now) == 1;
        if !passes {
            self.packets.put_back(frames as u64);
        }
        passes
    }

    /// Takes the tokens of up to `wanted` frames of unknown lengths. Returns for how many.
    fn take_frames(&self, wanted: usize, now: Moment) -> usize {
        if self.bytes.price.load(Ordering::Relaxed) != 0 {
            return 0;
        }
        self.packets.take(wanted as u64, 1, now) as usize
    }
}

/// A direction that a limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Send,
    Receive,
}

#[derive(Default)]
struct Buckets {
    send: CachePadded<Limiter>,
    receive: CachePadded<Limiter>,
    flood: CachePadded<Bucket>,
}

/// No address: no frame has this source.
const UNBOUND: u64 = u64::MAX;

/// The state of a port's policy. Its own senders and those of other ports share it.
pub(crate) struct PolicyState {
    /// A bit for each [`Way`] that has a limit. Every sender that delivers to the port reads it, and
    /// it lies beside what they read anyway. The buckets are elsewhere.
    limited: AtomicU32,
    /// The address that the port is bound to by [`SourceRule::LearnOnce`], or [`UNBOUND`]. Writers
    /// hold the lock of the network's members.
    bound: AtomicU64,
    buckets: Box<Buckets>,
}

impl Default for PolicyState {
    fn default() -> Self {
        Self { limited: AtomicU32::new(0), bound: AtomicU64::new(UNBOUND), buckets: Box::default() }
    }
}

impl PolicyState {
    /// Begins a port's time on the network.
    pub(crate) fn reset(&self, limits: PortLimits, now: Moment) {
        self.bound.store(UNBOUND, Ordering::Relaxed);
        self.set_limits(limits, now);
    }

    /// Replaces the limits. Each bucket is full afterwards. The caller holds the lock of the network's
    /// members.
    pub(crate) fn set_limits(&self, limits: PortLimits, now: Moment) {
        self.buckets.send.set(limits.send, now);
        self.buckets.receive.set(limits.receive, now);
        self.buckets.flood.set(limits.flood, now);
        let bit = |way, limit| if limit == RateLimit::default() { 0 } else { 1 << way as u32 };
        let limited = bit(Way::Send, limits.send) | bit(Way::Receive, limits.receive);
        self.limited.store(limited, Ordering::Relaxed);
    }

    /// Returns whether there is a limit for this direction.
    #[inline]
    pub(crate) fn is_limited(&self, way: Way) -> bool {
        self.limited.load(Ordering::Relaxed) & (1 << way as u32) != 0
    }

    fn limiter(&self, way: Way) -> &Limiter {
        match way {
            Way::Send => &self.buckets.send,
            Way::Receive => &self.buckets.receive,
        }
    }

    /// Returns whether a packet of `len` bytes that counts as so many `frames` passes the limit of this
    /// direction.
    #[cold]
    pub(crate) fn admits(&self, way: Way, frames: usize, len: usize, now: Moment) -> bool {
        self.limiter(way).take(frames, len, now)
    }

    /// Takes the tokens of up to `wanted` frames, whose lengths are not known yet. Returns for how
    /// many, which is none if bytes are limited.
    #[cold]
    pub(crate) fn take_frames(&self, way: Way, wanted: usize, now: Moment) -> usize {
        self.limiter(way).take_frames(wanted, now)
    }

    /// Puts the tokens of frames back that were not sent.
    #[cold]
    pub(crate) fn put_frames_back(&self, way: Way, frames: usize) {
        self.limiter(way).packets.put_back(frames as u64);
    }

    /// Returns whether the port may send one more packet to all others, which counts as so many
    /// `frames`.
    pub(crate) fn admits_flood(&self, frames: usize, now: Moment) -> bool {
        self.buckets.flood.take(1, frames as u64, now) == 1
    }

    /// Returns the address that the port is bound to.
    pub(crate) fn bound(&self) -> Option<Mac> {
        Mac::from_bits(self.bound.load(Ordering::Relaxed))
    }

    /// Binds the port to an address. The caller holds the lock of the network's members.
    pub(crate) fn bind(&self, to: Mac) {
        self.bound.store(to.bits(), Ordering::Relaxed);
    }
}

/// Takes the tokens of up to `wanted` frames of unknown lengths from both limits, and passes their
/// number to `claim`, which returns how many of them it claims a place for, and the places. The
/// tokens of the others are put back. Returns `None` if not even one frame has its tokens.
pub(crate) fn within<T>(
    limits: [(Way, Option<&PolicyState>); 2],
    wanted: usize,
    now: Moment,
    claim: impl FnOnce(usize) -> (usize, Option<T>),
) -> Option<T> {
    let mut granted = [wanted; 3];
    for (index, (way, state)) in limits.iter().enumerate() {
        let taken = state.map(|state| state.take_frames(*way, granted[index], now));
        granted[index + 1] = taken.unwrap_or(granted[index]);
    }
    let allowed = granted[2];
    let (claimed, places) = if allowed == 0 { (0, None) } else { claim(allowed) };
    for ((way, state), taken) in limits.iter().zip(&granted[1..]) {
        if let Some(state) = state {
            state.put_frames_back(*way, taken - claimed);
        }
    }
    places
}

/// The EtherType of ARP (RFC 826).
const ARP: u16 = 0x0806;
/// The EtherType of RARP (RFC 903), whose packets have the same form.
const RARP: u16 = 0x8035;

/// Returns whether a frame with this Ethernet header may be an ARP or RARP packet.
pub(crate) fn may_be_arp(header: [u8; ETHERNET_HEADER_LEN]) -> bool {
    let [.., high, low] = header;
    let ethertype = u16::from_be_bytes([high, low]);
    matches!(ethertype, ARP | RARP) || frame::is_tag(ethertype)
}

/// Returns whether a frame is an ARP or RARP packet whose sender hardware address is not the frame's
/// source. `head` is the first [`HEAD_LEN`] bytes of the frame, or the whole frame if it is
/// shorter. A frame with more tags than `head` shows the end of counts as one.
pub(crate) fn names_other_sender(head: &[u8]) -> bool {
    let word = |at: usize| head.get(at..at + 2).map(|word| u16::from_be_bytes([word[0], word[1]]));
    let mut at = ETHERNET_HEADER_LEN - 2;
    while word(at).is_some_and(frame::is_tag) {
        at += VLAN_TAG_LEN;
    }
    match word(at) {
        // The sender hardware address follows the EtherType and 8 bytes of the packet.
        Some(ARP | RARP) => head.get(at + 10..at + 16) != head.get(6..12),
        Some(_) => false,
        None => head.len() >= HEAD_LEN,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn rate(per_second: u64, burst: u64) -> Rate {
        let number = |number| NonZeroU64::new(number).unwrap();
        Rate { per_second: number(per_second), burst: number(burst) }
    }

    fn at(nanoseconds: u64) -> Moment {
        Moment::new(Duration::from_nanos(nanoseconds))
    }

    /// A token bucket as a textbook has it, in billionths of a token.
    struct Model {
        rate: Rate,
        level: i128,
        last: u64,
    }

    impl Model {
        fn new(rate: Rate, now: u64) -> Self {
            Self { rate, level: Self::full(rate), last: now }
        }

        fn full(rate: Rate) -> i128 {
            i128::from(rate.burst.get()) * 1_000_000_000
        }

        fn take(&mut self, wanted: u64, each: u64, now: u64) -> u64 {
            let full = Self::full(self.rate);
            let gained = i128::from(now - self.last) * i128::from(self.rate.per_second.get());
            self.level = full.min(self.level + gained);
            self.last = now;
            let cost = i128::from(each) * 1_000_000_000;
            let mut taken = 0;
            while taken < wanted && (self.level >= cost || self.level == full) {
                self.level -= cost;
                taken += 1;
            }
            taken
        }
    }

    /// Rates at which a token takes a whole number of ticks, so that the model is exact.
    const EXACT: [u64; 10] =
        [1, 2, 5, 100, 1000, 8000, 62_500, 1_000_000, 128_000_000, 1_000_000_000];

    proptest! {
        /// Goal: a bucket lets through exactly what a textbook's bucket lets through, also when
        /// tokens come back and frames are longer than the burst. Method: random takes at random
        /// moments, beside the model.
        #[test]
        fn a_bucket_is_a_token_bucket(
            per_second in proptest::sample::select(&EXACT[..]),
            burst in 1..5000u64,
            start in 0..u64::MAX / 512,
            takes in proptest::collection::vec((0..2000u64, 1..40u64, 1..9000u64, 0..3u64), 1..100),
        ) {
            let rate = rate(per_second, burst);
            let bucket = Bucket::default();
            let (mut now, mut model) = (start, Model::new(rate, start));
            bucket.set(Some(rate), at(now));
            for (step, wanted, each, unused) in takes {
                // About as long as a few tokens take.
                now += step * (1_000_000_000 / per_second).max(1) / 100;
                let taken = bucket.take(wanted, each, at(now));
                prop_assert_eq!(taken, model.take(wanted, each, now));
                let unused = if each <= burst { unused.min(taken) } else { 0 };
                bucket.put_back(unused * each);
                model.level += i128::from(unused * each) * 1_000_000_000;
            }
        }

        /// Goal: whatever the rate, a bucket lets through no more than its rate and its burst, and
        /// no less than its rate. Method: frames of one length, more often than there are tokens.
        #[test]
        fn a_bucket_keeps_its_rate(
            frames in 1..100_000_000u64,
            burst in 1..100u64,
            each in proptest::sample::select(&[1, 60, 1514u64][..]),
            less in 0..60u64,
        ) {
            let per_second = (frames * each).saturating_sub(less).max(1);
            let bucket = Bucket::default();
            bucket.set(Some(rate(per_second, burst * each)), at(0));
            let (mut passed, steps, step) = (0, 1000, 500_000_000 / frames + 1);
            for number in 0..=steps {
                passed += each * bucket.take(100, each, at(number * step));
            }
            let gained = u128::from(per_second) * u128::from(steps * step) / 1_000_000_000;
            let most = gained + u128::from(burst * each);
            prop_assert!(u128::from(passed) <= most, "{} of {}", passed, most);
            // The bucket holds what is left of a frame and what it gains, so nothing is lost.
            let gain = u128::from(per_second) * u128::from(step);
            if burst > 1 && gain <= 1_000_000_000 * u128::from(each) {
                let least = (gained - gained / 1000).saturating_sub(u128::from(each));
                prop_assert!(u128::from(passed) >= least, "{} of {}", passed, least);
            }
        }
    }

    #[test]
    fn a_bucket_without_a_rate_lets_everything_through() {
        let bucket = Bucket::default();
        assert_eq!(bucket.take(1000, 100_000, at(0)), 1000);
        bucket.set(Some(rate(1, 1)), at(0));
        assert_eq!(bucket.take(1000, 1, at(0)), 1);
        bucket.set(None, at(0));
        assert_eq!(bucket.take(1000, 1, at(0)), 1000);
    }

    /// The clock of a sender that read it earlier costs it tokens and gives nobody any.
    #[test]
    fn an_older_clock_gains_no_token() {
        let bucket = Bucket::default();
        bucket.set(Some(rate(1000, 10)), at(0));
        let second = 1_000_000_000;
        assert_eq!(bucket.take(100, 1, at(second)), 10);
        for _ in 0..100 {
            assert_eq!(bucket.take(100, 1, at(0)), 0);
            assert_eq!(bucket.take(100, 1, at(second)), 0);
        }
        assert_eq!(bucket.take(100, 1, at(second + 5_000_000)), 5);
        // A clock that is older than the longest frame takes to send is a clock all the same.
        bucket.set(Some(rate(1_000_000_000, 10)), at(0));
        assert_eq!(bucket.take(100, 1, at(second)), 10);
        assert_eq!(bucket.take(100, 1, at(0)), 0);
        assert_eq!(bucket.take(100, 1, at(second)), 0);
    }

    /// A moment that no take of this rate has left counts as an empty bucket and no more, so that
    /// neither a race with a change nor a wrapped clock closes a port.
    #[test]
    fn a_moment_out_of_reach_counts_as_empty() {
        let bucket = Bucket::default();
        bucket.set(Some(rate(1000, 10)), at(0));
        bucket.full_at.store(1 << 60, Ordering::Relaxed);
        assert_eq!(bucket.take(100, 1, at(1)), 0);
        assert_eq!(bucket.take(100, 1, at(4_000_001)), 4);
        // The clock wraps while the bucket is in use, and while it is not.
        bucket.set(Some(rate(1000, 10)), Moment(u64::MAX));
        assert_eq!(bucket.take(100, 1, Moment(0)), 10);
        assert_eq!(bucket.take(100, 1, at(2_000_000)), 2);
        assert_eq!(bucket.take(100, 1, Moment(1 << 63)), 10);
    }

    #[test]
    fn threads_share_a_buckets_tokens() {
        let bucket = Bucket::default();
        bucket.set(Some(rate(1, 10_000)), at(0));
        let take = || (0..10_000).map(|_| bucket.take(2, 1, at(0))).sum::<u64>();
        let passed: u64 = thread::scope(|scope| {
            let threads = [scope.spawn(take), scope.spawn(take)];
            threads.map(|thread| thread.join().unwrap()).iter().sum()
        });
        assert_eq!(passed, 10_000);
    }

    /// A frame that one limit refuses takes nothing of the other.
    #[test]
    fn a_frame_takes_tokens_of_both_limits_or_of_none() {
        let limiter = Limiter::default();
        limiter.set(RateLimit { packets: Some(rate(1, 3)), bytes: Some(rate(1, 100)) }, at(0));
        assert!(limiter.take(1, 60, at(0)));
        assert!(!limiter.take(1, 60, at(0)), "40 bytes are left");
        assert!(limiter.take(1, 20, at(0)));
        assert!(limiter.take(1, 20, at(0)), "the refused frame was no packet");
        assert!(!limiter.take(1, 1, at(0)), "three packets");
    }
}
