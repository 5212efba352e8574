//! [`Links`]: guests on wires. One thread moves the packets of all of them.
//!
//! A link is a [`Bridge`] between the guest's socket and its port of the network. A link without work
//! sleeps: the descriptors of its rings are in one set of the system's (epoll, kqueue). So an idle guest
//! costs no processor time, and a wake-up costs the same for ten guests and for a thousand. Nobody waits
//! for a guest that does not read: its link has frames of its own, and turns that end.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use polling::{Event, Events, PollMode, Poller};

use crate::bridge::forwarding::Bridge;
use crate::failure::Failure;

/// How often a link without work is looked at before it sleeps.
const ROUNDS: u32 = 16;
/// How many rounds there are between two looks at the links that sleep, while others do not.
const ROUNDS_PER_CHECK: u32 = 16;

/// See the [module](self).
pub(super) struct Links {
    /// `None` once the thread is to end.
    orders: Option<Sender<Order>>,
    poller: Arc<Poller>,
    thread: Option<JoinHandle<()>>,
    /// The thread that stops what a link had. An interface may take its time to stop, and the other links
    /// must not wait.
    finisher: Option<JoinHandle<()>>,
    /// How often a link was looked at.
    #[cfg(test)]
    looks: Arc<AtomicU64>,
}

/// What is told, on a thread of its own, that a link has ended.
pub(super) trait Owner: Send {
    /// The link moves no more packets, and its counters stay as they are. They can still be read.
    fn ended(&mut self, bridge: &Bridge);

    /// Its sockets are closed, and its port is free. `outcome` says whether it has ended well: it has
    /// not if an end of it had failed, such as a socket whose peer has gone.
    fn gone(self: Box<Self>, outcome: Result<(), Failure>);
}

enum Order {
    /// A link, by the number that its owner gives it.
    Begin(u64, Box<Bridge>, Box<dyn Owner>),
    End(u64),
}

impl Links {
    /// Starts the thread, without a link.
    ///
    /// # Errors
    ///
    /// [`Failure::Step`] if the system refuses the thread or its descriptors.
    pub(super) fn start() -> Result<Self, Failure> {
        let failed =
            |error| Failure::Step(format!("the thread of the wires cannot start: {error}"));
        let poller = Arc::new(Poller::new().map_err(failed)?);
        let (orders, receiver) = mpsc::channel();
        let (finished, links) = mpsc::channel::<(Link, Result<(), Failure>)>();
        let finish = || links.into_iter().for_each(|(link, outcome)| link.finish(outcome));
        let finisher = thread::Builder::new().name("wires-end".to_owned()).spawn(finish);
        let finisher = Some(finisher.map_err(failed)?);
        let worker = Worker::new(receiver, finished, poller.clone());
        #[cfg(test)]
        let looks = worker.looks.clone();
        let thread = thread::Builder::new().name("wires".to_owned()).spawn(|| worker.run());
        Ok(Self {
            orders: Some(orders),
            poller,
            thread: Some(thread.map_err(failed)?),
            finisher,
            #[cfg(test)]
            looks,
        })
    }

    /// Gives the thread a link. `number` is no other link's. The link ends when an end of it fails, or
    /// when it is told to.
    pub(super) fn begin(&self, number: u64, bridge: Bridge, owner: impl Owner + 'static) {
        self.order(Order::Begin(number, Box::new(bridge), Box::new(owner)));
    }

    /// Tells a link to end. It does nothing if the link has ended.
    pub(super) fn end(&self, number: u64) {
        self.order(Order::End(number));
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The thread has panicked if this fails, and everybody who waits for a link is told so by
            // the drop of its owner.
            let _ = orders.send(order);
            let _ = self.poller.notify();
        }
    }
}

impl Drop for Links {
    /// Ends all links and the thread.
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.poller.notify();
        // The second one ends after the first, which gives it its work.
        for thread in [self.thread.take(), self.finisher.take()].into_iter().flatten() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

struct Link {
    number: u64,
    bridge: Box<Bridge>,
    owner: Box<dyn Owner>,
    /// Rounds without work. `None` while the link sleeps.
    rounds: Option<u32>,
    /// When a link that sleeps is looked at in any case.
    wake_at: Option<Instant>,
}

impl Link {
    fn finish(self, outcome: Result<(), Failure>) {
        let Self { mut bridge, mut owner, .. } = self;
        // Nobody waits for a guest that does not read.
        let ended = bridge.end_within(Duration::ZERO);
        owner.ended(&bridge);
        let stopped = bridge.stop();
        drop(bridge);
        owner.gone(outcome.and(ended).and(stopped));
    }
}

/// What the thread has.
struct Worker {
    orders: Receiver<Order>,
    /// Links that have ended, with their outcomes.
    finished: Sender<(Link, Result<(), Failure>)>,
    poller: Arc<Poller>,
    /// By their places, which are also the keys of their descriptors.
    links: Vec<Option<Link>>,
    free: Vec<usize>,
    active: Vec<usize>,
    /// The links that sleep until a time, by their `wake_at` and their places.
    timed: BTreeSet<(Instant, usize)>,
    events: Events,
    /// The places of the links that a wait has found, while it wakes them.
    ready: Vec<usize>,
    #[cfg(test)]
    looks: Arc<AtomicU64>,
}

impl Worker {
    fn new(
        orders: Receiver<Order>,
        finished: Sender<(Link, Result<(), Failure>)>,
        poller: Arc<Poller>,
    ) -> Self {
        Self {
            orders,
            finished,
            poller,
            links: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            timed: BTreeSet::new(),
            events: Events::new(),
            ready: Vec::new(),
            #[cfg(test)]
            looks: Arc::default(),
        }
    }

    fn run(mut self) {
        let mut rounds: u32 = 0;
        while self.take_orders() {
            let moved = self.turn_all();
            rounds = rounds.wrapping_add(1);
            if self.active.is_empty() {
                self.wait(None);
            } else if rounds.is_multiple_of(ROUNDS_PER_CHECK) {
                // Links that sleep must not wait until all links sleep.
                self.wait(Some(Duration::ZERO));
            } else if !moved {
                thread::yield_now();
            }
        }
        for place in 0..self.links.len() {
            self.remove(place, Ok(()));
        }
    }

    /// Returns false when there will be no further orders.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Begin(number, bridge, owner)) => self.begin(number, bridge, owner),
                Ok(Order::End(number)) => {
                    let is =
                        |link: &Option<Link>| link.as_ref().is_some_and(|l| l.number == number);
                    if let Some(place) = self.links.iter().position(is) {
                        self.remove(place, Ok(()));
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn begin(&mut self, number: u64, bridge: Box<Bridge>, owner: Box<dyn Owner>) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.links.push(None);
            self.links.len() - 1
        });
        let link = Link { number, bridge, owner, rounds: Some(0), wake_at: None };
        let link = self.links[place].insert(link);
        let added = link.bridge.descriptors().and_then(|descriptors| {
            descriptors.iter().try_for_each(|fd| {
                let event = Event::readable(place);
                // SAFETY: the descriptors live as long as the rings of the bridge. `remove` takes them
                // out before it drops the bridge.
                let added =
                    unsafe { self.poller.add_with_mode(fd.as_raw_fd(), event, PollMode::Level) };
                added.map_err(|error| Failure::Step(format!("it cannot be waited for: {error}")))
            })
        });
        self.active.push(place);
        if let Err(failure) = added {
            self.remove(place, Err(failure));
        }
    }

    /// Ends a link.
    fn remove(&mut self, place: usize, outcome: Result<(), Failure>) {
        let Some(link) = self.links[place].take() else { return };
        for fd in link.bridge.descriptors().into_iter().flatten() {
            // It fails if the descriptor was not added.
            let _ = self.poller.delete(fd);
        }
        self.active.retain(|active| *active != place);
        if let Some(at) = link.wake_at {
            self.timed.remove(&(at, place));
        }
        self.free.push(place);
        // It fails if the thread has panicked, and the drop of the owner tells that the link has ended.
        let _ = self.finished.send((link, outcome));
    }

    /// Gives each link that is awake a turn. Returns whether there was anything to do.
    fn turn_all(&mut self) -> bool {
        let (mut moved, mut i) = (false, 0);
        while let Some(&place) = self.active.get(i) {
            #[cfg(test)]
            self.looks.fetch_add(1, Ordering::Relaxed);
            let link = self.links[place].as_mut().expect("an active place has a link");
            let asleep = match link.bridge.turn() {
                Ok(true) => {
                    moved = true;
                    link.rounds = Some(0);
                    Ok(false)
                }
                Ok(false) if link.rounds < Some(ROUNDS) => {
                    link.rounds = link.rounds.map(|rounds| rounds + 1);
                    Ok(false)
                }
                Ok(false) => Ok(link.bridge.arm()),
                Err(failure) => Err(failure),
            };
            match asleep {
                Ok(false) => i += 1,
                Ok(true) => {
                    link.rounds = None;
                    link.wake_at = link.bridge.next_deadline();
                    self.timed.extend(link.wake_at.map(|at| (at, place)));
                    self.active.swap_remove(i);
                }
                Err(failure) => self.remove(place, Err(failure)),
            }
        }
        moved
    }

    /// Waits for a link that has work, for an order or for `timeout`, if there is one.
    fn wait(&mut self, timeout: Option<Duration>) {
        let due = self.timed.first().map(|(at, _)| *at);
        let left = due.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.into_iter().chain(left).min();
        self.events.clear();
        // An error is a signal that came in between, and there are no events.
        let _ = self.poller.wait(&mut self.events, timeout);
        let mut ready = std::mem::take(&mut self.ready);
        ready.extend(self.events.iter().map(|event| event.key));
        if due.is_some() {
            let now = Instant::now();
            ready.extend(self.timed.iter().take_while(|(at, _)| *at <= now).map(|(_, at)| *at));
        }
        for place in ready.drain(..) {
            self.wake(place);
        }
        self.ready = ready;
    }

    /// Wakes a link that sleeps.
    fn wake(&mut self, place: usize) {
        #[cfg(test)]
        self.looks.fetch_add(1, Ordering::Relaxed);
        if let Some(Some(link)) = self.links.get_mut(place)
            && link.rounds.is_none()
        {
            link.rounds = Some(0);
            if let Some(at) = link.wake_at.take() {
                self.timed.remove(&(at, place));
            }
            self.active.push(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use vmring::{Embedded, Interface, Socket};

    use super::*;
    use crate::bridge::spec::{End, InSoftware};

    const LONG: Duration = Duration::from_secs(60);

    struct Told(Sender<Result<(), Failure>>);

    impl Owner for Told {
        fn ended(&mut self, _: &Bridge) {}

        fn gone(self: Box<Self>, outcome: Result<(), Failure>) {
            let _ = self.0.send(outcome);
        }
    }

    /// A guest with this number on the switch `name`, over a stream. Returns the guest's side, and what
    /// tells how the link has ended.
    fn guest(
        links: &Links,
        name: &str,
        number: u64,
    ) -> (UnixStream, Receiver<Result<(), Failure>>) {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_read_timeout(Some(LONG)).unwrap();
        far.set_write_timeout(Some(LONG)).unwrap();
        let start = |driver| Interface::builder().device(driver).start().unwrap();
        let wire = Interface::builder().device(Socket::stream().from_fd(near.into())).start();
        let ends = [
            End::of("the wire", wire.unwrap()),
            End::of("the port", start(Embedded::switch(name))),
        ];
        let bridge = Bridge::new(ends, [InSoftware::Nothing; 2], [64; 2]).unwrap();
        let (told, ended) = mpsc::channel();
        links.begin(number, bridge, Told(told));
        (far, ended)
    }

    /// A frame from guest `from` to guest `to`, as it is on the wire.
    fn frame(to: u8, from: u8, payload: u8) -> [u8; 64] {
        let mut frame = [payload; 64];
        frame[..4].copy_from_slice(&60_u32.to_be_bytes());
        frame[4..10].copy_from_slice(&[2, 0, 0, 0, 0, to]);
        frame[10..16].copy_from_slice(&[2, 0, 0, 0, 0, from]);
        frame[16..18].copy_from_slice(&[0x88, 0xb5]);
        frame
    }

    const ALL: [u8; 6] = [0xff; 6];

    /// Lets the switch learn where a guest is.
    fn announce(guest: &mut UnixStream, number: u8) {
        let mut hello = frame(0, number, 0);
        hello[4..10].copy_from_slice(&ALL);
        guest.write_all(&hello).unwrap();
    }

    /// Waits for a frame of this guest.
    fn next_from(guest: &mut UnixStream, from: u8) {
        let mut frame = [0; 64];
        while frame[15] != from {
            guest.read_exact(&mut frame).expect("a frame arrives");
        }
    }

    /// The next frame that is for one guest only.
    fn next(guest: &mut UnixStream) -> [u8; 64] {
        loop {
            let mut frame = [0; 64];
            guest.read_exact(&mut frame).expect("a frame arrives");
            if frame[4..10] != ALL {
                return frame;
            }
        }
    }

    #[test]
    fn a_guest_that_does_not_read_holds_up_nobody_among_many() {
        let links = Links::start().unwrap();
        let name = "links-many";
        let idle: Vec<_> = (0..100).map(|i| guest(&links, name, 100 + i)).collect();
        let (mut a, _a) = guest(&links, name, 1);
        let (mut b, _b) = guest(&links, name, 2);
        let (mut stuck, _stuck) = guest(&links, name, 3);
        announce(&mut b, 2);
        announce(&mut stuck, 3);
        // Nothing in the world tells when the switch has learned the two.
        let learned = Instant::now();
        loop {
            a.write_all(&frame(2, 1, 0)).unwrap();
            b.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            let mut got = [0; 64];
            if b.read_exact(&mut got).is_ok() && got[4..10] != ALL {
                break;
            }
            assert!(learned.elapsed() < LONG, "the guests are not known to each other");
        }
        b.set_read_timeout(Some(LONG)).unwrap();
        for i in 0..2_000_u32 {
            // More than the stuck guest's socket and link hold.
            for _ in 0..20 {
                a.write_all(&frame(3, 1, 0xcc)).unwrap();
            }
            a.write_all(&frame(2, 1, i as u8)).unwrap();
            while next(&mut b)[30] != i as u8 {}
        }
        drop((links, idle));
    }

    /// Goal: what is looked at for a packet does not depend on the number of guests that are idle.
    #[test]
    fn a_wake_up_looks_at_no_guest_that_is_idle() {
        const FRAMES: u64 = 200;
        /// Both links of a frame are awake for [`ROUNDS`], and may be woken twice.
        const LOOKS: u64 = FRAMES * (ROUNDS as u64 + 4) * 4;
        // Each has at most fourteen descriptors here. macOS allows 10,240.
        crate::system::allow_open_files(10_000);
        let limit = crate::system::open_files().saturating_sub(500) / 14;
        for idle in [10, limit.min(1000)] {
            let links = Links::start().unwrap();
            let name = format!("links-{idle}");
            let (mut a, _a) = guest(&links, &name, 1);
            let (mut b, _b) = guest(&links, &name, 2);
            announce(&mut b, 2);
            next_from(&mut a, 2);
            announce(&mut a, 1);
            next_from(&mut b, 1);
            let looks = || links.looks.load(Ordering::Relaxed);
            let first = looks();
            let others: Vec<_> = (0..idle).map(|i| guest(&links, &name, 100 + i)).collect();
            let mut exchange = |frames: u64| {
                for i in 0..frames as u8 {
                    a.write_all(&frame(2, 1, i)).unwrap();
                    assert_eq!(next(&mut b)[30], i);
                    b.write_all(&frame(1, 2, i)).unwrap();
                    assert_eq!(next(&mut a)[30], i);
                }
            };
            // Each is looked at a few times before it sleeps for the first time. All do when frames of
            // the two cost no more than that.
            const FEW: u64 = 20;
            let start = Instant::now();
            loop {
                let before = looks();
                exchange(FEW);
                if looks() - before <= 2 * LOOKS * FEW / FRAMES
                    && looks() - first >= idle * u64::from(ROUNDS)
                {
                    break;
                }
                assert!(start.elapsed() < LONG, "the links do not sleep");
            }
            let before = looks();
            exchange(FRAMES);
            let looked = looks() - before;
            assert!(looked <= 2 * LOOKS, "{looked} looks with {idle} idle guests");
            assert!(idle == 10 || idle * FRAMES > 2 * LOOKS, "{idle} guests are too few to tell");
            drop((links, others));
        }
    }

    #[test]
    fn a_link_ends_with_its_peer_and_when_it_is_told_to() {
        let links = Links::start().unwrap();
        let (a, a_ended) = guest(&links, "links-end", 1);
        let (mut b, b_ended) = guest(&links, "links-end", 2);
        let (_c, c_ended) = guest(&links, "links-end", 3);
        drop(a);
        let failure = a_ended.recv_timeout(LONG).unwrap().unwrap_err();
        assert!(failure.to_string().starts_with("the wire: "), "{failure}");
        links.end(2);
        b_ended.recv_timeout(LONG).unwrap().unwrap();
        assert_eq!(b.read(&mut [0; 64]).unwrap(), 0, "the socket is closed");
        assert!(c_ended.try_recv().is_err(), "a link that nobody has ended goes on");
        drop(links);
        c_ended.recv_timeout(LONG).unwrap().unwrap();
    }
}
