//! [`Sleepers`]: the rings of a poller that sleep, and what wakes them besides their doorbells: a
//! deadline, or a descriptor of the device that is readable.
//!
//! The descriptors are in one [`Selector`]. A descriptor stays there while its ring is polled, so a
//! ring that falls asleep again costs no system call. The cost of a sleep does not grow with the number
//! of rings.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use vmring_core::doorbell::{Doorbell, Park};

use crate::limits::{SLEEPER_CHECK_INTERVAL, SLEEPER_CHECK_POLLS, UNWATCHED_CHECK_INTERVAL};
use crate::notify::{Notifier, OWN_TOKEN};
use crate::selector::{Selector, Watch};
use crate::sys::{after, now};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Sleepers {
    /// By the rings' places.
    places: Vec<Sleeper>,
    /// The places of rings that sleep until a deadline, and of some that are awake again.
    timed: Vec<usize>,
    /// The descriptors, once there is one, and the notifier's.
    selector: Option<Selector>,
    /// The descriptors in the selector besides the notifier's, and the places that watch them.
    watched: HashMap<RawFd, usize>,
    /// How many were ever added.
    added: u32,
    /// How many rings sleep here.
    asleep: usize,
    /// Polls of rings since the last [`check`](Self::check).
    polls: usize,
    /// A busy poller asks for no readable descriptor before this time.
    next_check: Option<Instant>,
}

/// The place of a ring.
#[derive(Clone, Copy, Debug, Default)]
struct Sleeper {
    /// Whether the ring sleeps, and has a deadline or a descriptor.
    asleep: bool,
    /// When the ring is woken in any case.
    wake_at: Option<Instant>,
    /// Whether the place is in the list of those with a deadline.
    timed: bool,
    watch: Watch,
}

impl Sleepers {
    /// Makes space for `places` rings, so that nothing grows in the path of a packet.
    pub(super) fn reserve(&mut self, places: usize) {
        if self.places.len() < places {
            self.places.resize(places, Sleeper::default());
        }
        self.timed.reserve(self.places.len().saturating_sub(self.timed.len()));
        self.watched.reserve(self.places.len().saturating_sub(self.watched.len()));
    }

    /// Takes up a ring that falls asleep: until `deadline`, or until the descriptor of its `device` is
    /// readable. The number beside it is that of the queue, as [`Watch::set`] takes it.
    pub(super) fn add(
        &mut self,
        place: usize,
        deadline: Option<Instant>,
        device: Option<(RawFd, u64)>,
        notifier: &Notifier,
    ) {
        let watched = self.watch(place, device, notifier);
        let sleeper = &mut self.places[place];
        sleeper.wake_at = deadline;
        if !watched {
            sleeper.wake_soon();
        }
        sleeper.asleep = sleeper.wake_at.is_some() || sleeper.watch.token().is_some();
        self.asleep += usize::from(sleeper.asleep);
        if sleeper.wake_at.is_some() && !sleeper.timed {
            sleeper.timed = true;
            self.timed.push(place);
        }
    }

    /// Watches the descriptor of a ring. Returns whether the system does it.
    ///
    /// A selector has one token for a descriptor. So if two rings have the same one, which may be two
    /// rings of one device, only the first is watched.
    fn watch(&mut self, place: usize, device: Option<(RawFd, u64)>, notifier: &Notifier) -> bool {
        let watch = &mut self.places[place].watch;
        let before = watch.descriptor();
        if device.is_none() && before.is_none() {
            return true;
        }
        if self.selector.is_none() {
            self.selector = new_selector(notifier);
        }
        let Some(selector) = &self.selector else { return false };
        let (fd, queue) = device.map_or((None, 0), |(fd, queue)| (Some(fd), queue));
        let free = fd.filter(|fd| self.watched.get(fd).is_none_or(|of| *of == place));
        let added = &mut self.added;
        let token = || {
            *added = added.wrapping_add(1);
            u64::from(*added) << 32 | place as u64
        };
        let done = watch.set(selector, free, queue, token).is_ok();
        let now = watch.descriptor();
        if now != before {
            before.and_then(|fd| self.watched.remove(&fd));
            now.and_then(|fd| self.watched.insert(fd, place));
        }
        done && free == fd
    }

    /// Notes that a ring is polled again. Its descriptor stays in the selector.
    pub(super) fn remove(&mut self, place: usize) {
        self.asleep -= usize::from(std::mem::take(&mut self.places[place].asleep));
    }

    /// Forgets a ring that has closed. Another one may take its place.
    pub(super) fn forget(&mut self, place: usize) {
        self.remove(place);
        let sleeper = &mut self.places[place];
        sleeper.watch.descriptor().and_then(|fd| self.watched.remove(&fd));
        // The place is in the list of those with a deadline until the list is gone through.
        *sleeper = Sleeper { timed: sleeper.timed, ..Sleeper::default() };
    }

    /// Sleeps until somebody rings, a descriptor is readable, or a deadline has come. It does not sleep
    /// if `has_news`. Calls `wake` for each ring that is to be polled.
    pub(super) fn sleep(
        &mut self,
        bell: &Doorbell<Notifier>,
        has_news: impl FnOnce() -> bool,
        mut wake: impl FnMut(usize),
    ) {
        let timed = self.timed.iter().map(|&place| &self.places[place]);
        let wake_at = timed.filter(|one| one.asleep).filter_map(|one| one.wake_at).min();
        let timeout = wake_at.map(|at| at.saturating_duration_since(now()));
        bell.arm();
        let mut readable = Readable::default();
        if !has_news() {
            match &self.selector {
                Some(selector) if !self.watched.is_empty() => {
                    let places = &mut self.places;
                    bell.parker().park_selecting(timeout, selector, |token| {
                        readable.found(places, token, &mut wake);
                    });
                }
                _ => bell.parker().park(timeout),
            }
        }
        bell.disarm();
        self.count(readable, bell.parker());
        if !self.timed.is_empty() {
            self.wake_due(now(), wake);
        }
    }

    /// Counts a round of `polls` polls of a busy poller. Now and then it calls `wake` for each ring that
    /// sleeps and is to be polled, as those must not wait until all rings sleep. It is never in the path
    /// of a packet.
    pub(super) fn check(&mut self, polls: usize, notifier: &Notifier, mut wake: impl FnMut(usize)) {
        if self.asleep == 0 {
            return;
        }
        self.polls += polls;
        if self.polls < SLEEPER_CHECK_POLLS {
            return;
        }
        self.polls = 0;
        let now = now();
        if let Some(selector) = &self.selector
            && !self.watched.is_empty()
            && self.next_check.is_none_or(|next| now >= next)
        {
            self.next_check = now.checked_add(SLEEPER_CHECK_INTERVAL);
            let (places, mut readable) = (&mut self.places, Readable::default());
            selector.wait(Some(Duration::ZERO), |token| {
                if token != OWN_TOKEN {
                    readable.found(places, token, &mut wake);
                }
            });
            self.count(readable, notifier);
        }
        self.wake_due(now, wake);
    }

    /// Wakes the rings whose deadline has come.
    fn wake_due(&mut self, now: Instant, mut wake: impl FnMut(usize)) {
        let (places, asleep) = (&mut self.places, &mut self.asleep);
        self.timed.retain(|&place| {
            let sleeper = &mut places[place];
            if sleeper.asleep && sleeper.wake_at.is_some_and(|at| at <= now) {
                sleeper.asleep = false;
                *asleep -= 1;
                wake(place);
            }
            sleeper.timed = sleeper.asleep && sleeper.wake_at.is_some();
            sleeper.timed
        });
    }

    fn count(&mut self, readable: Readable, notifier: &Notifier) {
        self.asleep -= readable.woken;
        if readable.is_stale {
            self.renew(notifier);
        }
    }

    /// Begins a new selector, because the old one goes on reporting a descriptor that was closed.
    fn renew(&mut self, notifier: &Notifier) {
        self.selector = new_selector(notifier);
        for (place, sleeper) in self.places.iter_mut().enumerate() {
            let Some(fd) = sleeper.watch.descriptor() else { continue };
            let renewed =
                self.selector.as_ref().is_some_and(|one| sleeper.watch.renew(one).is_ok());
            if !renewed {
                self.watched.remove(&fd);
                sleeper.watch = Watch::default();
                if sleeper.asleep {
                    sleeper.wake_soon();
                    if !sleeper.timed {
                        sleeper.timed = true;
                        self.timed.push(place);
                    }
                }
            }
        }
    }
}

impl Sleeper {
    /// Lets the ring be polled again after a short time, since nobody watches its descriptor.
    fn wake_soon(&mut self) {
        let soon = after(UNWATCHED_CHECK_INTERVAL);
        self.wake_at = Some(self.wake_at.map_or(soon, |at| at.min(soon)));
    }
}

/// A selector with the notifier's descriptor. `None` if the system refuses one.
fn new_selector(notifier: &Notifier) -> Option<Selector> {
    use std::os::fd::AsRawFd;

    let own = notifier.descriptor().ok()?;
    let selector = Selector::new().ok()?;
    selector.add(own.as_raw_fd(), OWN_TOKEN).ok()?;
    Some(selector)
}

/// What a look at the descriptors has found.
#[derive(Debug, Default)]
struct Readable {
    woken: usize,
    /// A descriptor was reported that no ring has any more.
    is_stale: bool,
}

impl Readable {
    /// Wakes the ring whose descriptor is readable, if it sleeps.
    fn found(&mut self, places: &mut [Sleeper], token: u64, wake: &mut impl FnMut(usize)) {
        let place = token as u32 as usize;
        let ring = places.get_mut(place).filter(|one| one.watch.token() == Some(token));
        let Some(sleeper) = ring else {
            self.is_stale = true;
            return;
        };
        if std::mem::take(&mut sleeper.asleep) {
            self.woken += 1;
            wake(place);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    const LONG: Duration = Duration::from_secs(20);

    /// What a sleep has woken.
    fn slept(sleepers: &mut Sleepers, bell: &Doorbell<Notifier>) -> Vec<usize> {
        let mut woken = Vec::new();
        sleepers.sleep(bell, || false, |place| woken.push(place));
        woken
    }

    fn bell() -> Doorbell<Notifier> {
        Doorbell::new(Notifier::default())
    }

    #[test]
    fn a_readable_descriptor_wakes_its_ring_and_no_other() {
        let (bell, mut sleepers) = (bell(), Sleepers::default());
        let pairs: Vec<_> = (0..100).map(|_| UnixStream::pair().unwrap()).collect();
        sleepers.reserve(pairs.len());
        for (place, (near, _)) in pairs.iter().enumerate() {
            sleepers.add(place, Some(after(LONG)), Some((near.as_raw_fd(), 0)), bell.parker());
        }
        for place in [3, 77, 0] {
            (&pairs[place].1).write_all(&[1]).unwrap();
            assert_eq!(slept(&mut sleepers, &bell), [place]);
        }
        assert_eq!((sleepers.asleep, sleepers.watched.len()), (97, 100));
        // Those that are awake are readable still, and nobody is told again.
        bell.parker().unpark();
        assert!(slept(&mut sleepers, &bell).is_empty());
        let mut woken = Vec::new();
        sleepers.check(SLEEPER_CHECK_POLLS, bell.parker(), |place| woken.push(place));
        assert!(woken.is_empty());
    }

    #[test]
    fn a_descriptor_that_a_copy_keeps_open_is_forgotten() {
        let (bell, mut sleepers) = (bell(), Sleepers::default());
        sleepers.reserve(2);
        let (near, mut far) = UnixStream::pair().unwrap();
        let (other, mut others) = UnixStream::pair().unwrap();
        let _copy = near.try_clone().unwrap();
        sleepers.add(0, None, Some((near.as_raw_fd(), 0)), bell.parker());
        sleepers.add(1, Some(after(LONG)), Some((other.as_raw_fd(), 0)), bell.parker());
        sleepers.forget(0);
        drop(near);
        far.write_all(&[1]).unwrap();
        // The first sleep ends for nothing, and from the second one on there is nothing of it.
        assert!(slept(&mut sleepers, &bell).is_empty());
        others.write_all(&[1]).unwrap();
        let mut woken = Vec::new();
        for _ in 0..2 {
            woken.append(&mut slept(&mut sleepers, &bell));
            bell.parker().unpark();
        }
        assert_eq!(woken, [1]);
        assert_eq!((sleepers.asleep, sleepers.watched.len()), (0, 1));
    }

    #[test]
    fn the_next_ring_of_a_descriptor_is_watched() {
        let (bell, mut sleepers) = (bell(), Sleepers::default());
        sleepers.reserve(2);
        let (near, mut far) = UnixStream::pair().unwrap();
        let device = Some((near.as_raw_fd(), 0));
        sleepers.add(0, None, device, bell.parker());
        sleepers.forget(0);
        sleepers.add(1, None, device, bell.parker());
        assert!(sleepers.timed.is_empty(), "it is polled again without a reason");
        far.write_all(&[1]).unwrap();
        assert_eq!(slept(&mut sleepers, &bell), [1]);
    }

    #[test]
    fn of_two_rings_on_one_descriptor_one_is_watched() {
        let (bell, mut sleepers) = (bell(), Sleepers::default());
        sleepers.reserve(2);
        let (near, mut far) = UnixStream::pair().unwrap();
        let device = Some((near.as_raw_fd(), 0));
        let add = |sleepers: &mut Sleepers, place, device| {
            sleepers.add(place, Some(after(LONG)), device, bell.parker());
        };
        add(&mut sleepers, 0, device);
        add(&mut sleepers, 1, device);
        assert_eq!(slept(&mut sleepers, &bell), [1]);
        far.write_all(&[1]).unwrap();
        assert_eq!(slept(&mut sleepers, &bell), [0]);
        // The first one watches it no more, so the second one does.
        add(&mut sleepers, 0, None);
        add(&mut sleepers, 1, device);
        assert_eq!(sleepers.watched.get(&near.as_raw_fd()), Some(&1));
        assert_eq!(slept(&mut sleepers, &bell), [1]);
    }

    #[test]
    fn a_ring_whose_descriptor_cannot_be_watched_is_polled_soon() {
        let (bell, mut sleepers) = (bell(), Sleepers::default());
        sleepers.reserve(1);
        sleepers.add(0, None, Some((-1, 0)), bell.parker());
        assert_eq!(slept(&mut sleepers, &bell), [0]);
        assert_eq!((sleepers.asleep, sleepers.watched.len()), (0, 0));
    }

    #[test]
    fn a_deadline_ends_a_sleep_once() {
        let (bell, mut sleepers) = (bell(), Sleepers::default());
        sleepers.reserve(2);
        sleepers.add(0, Some(after(LONG)), None, bell.parker());
        sleepers.add(1, Some(after(Duration::from_millis(5))), None, bell.parker());
        assert_eq!(slept(&mut sleepers, &bell), [1]);
        bell.parker().unpark();
        assert!(slept(&mut sleepers, &bell).is_empty());
        assert_eq!((sleepers.asleep, sleepers.timed.len()), (1, 1));
    }
}
