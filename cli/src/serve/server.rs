//! The main thread: accepts connections, and waits for their ends, for signals and for time.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;
use vmring::Socket;
use vmring::device::embedded::nat::NatReport;

use super::connection::{Connection, Ended, Guest, Stats};
use super::counts::Counts;
use super::exposition::{Figures, GuestFigures, SocketFigures};
use super::limits::{END_TIMEOUT, LAST_ENDS, REQUESTS, TICK};
use super::links::Links;
use super::listen::{Incoming, Listening};
use super::network::{Network, Relayed};
use super::sigbus::{Places, Ringer};
use super::spec::ListenSpec;
use super::table::{Row, Rows, live_table};
use super::teller::{Event, Teller};
use super::wire::LinkOwner;
use super::wire_stats::{PORT, WireStats};
use crate::bridge::summary::Summary as UplinkSummary;
use crate::failure::Failure;
use crate::progress::Live;
use crate::recording::Recording;
use crate::report::round;
use crate::stop::Stop;
use crate::system;

/// See the [module](self).
pub(super) struct Server {
    pub(super) network: Network,
    teller: Rc<dyn Teller>,
    since: Instant,
    pub(super) entrances: Vec<Entrance>,
    running: Vec<Running>,
    /// The most connections at once.
    connections: usize,
    /// Those over vhost-user have a place each.
    places: &'static Places,
    /// The thread of the wires, if there are any.
    links: Option<Links>,
    /// How many links it has got.
    links_begun: u64,
    ends: Receiver<Key>,
    ending: Sender<Key>,
    /// Each thread that ends writes to the second.
    bell: Arc<(UnixStream, UnixStream)>,
    /// The thread of the uplink, if there is one.
    relay: Option<JoinHandle<Relayed>>,
    /// What the uplink has moved, when it has ended.
    pub(super) uplink: Option<UplinkSummary>,
    /// What the way out did when the server began to end. Its flows end with their guests.
    way_out: Option<NatReport>,
    /// What other threads ask for, until the server ends.
    requests: Option<Receiver<Request>>,
    asking: SyncSender<Request>,
}

/// What another thread asks the main thread for.
enum Request {
    /// A report, although the server goes on.
    Report,
    /// The counters.
    Figures(SyncSender<Figures>),
}

/// Asks the main thread from another one.
#[derive(Clone)]
pub(super) struct Asker {
    asking: SyncSender<Request>,
    bell: Arc<(UnixStream, UnixStream)>,
}

impl Asker {
    /// Asks for a report. If many wait already, this one is left out.
    pub(super) fn report(&self) {
        if self.asking.try_send(Request::Report).is_ok() {
            self.ring();
        }
    }

    /// The counters. `None` if the server ends.
    pub(super) fn figures(&self) -> Option<Figures> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.asking.send(Request::Figures(answer)).ok()?;
        self.ring();
        answered.recv().ok()
    }

    fn ring(&self) {
        let _ = (&self.bell.1).write(&[1]);
    }
}

/// The place of an entrance, and the number of a connection there.
type Key = (usize, u64);
/// No entrance has this place.
const RELAY: Key = (usize::MAX, 0);

/// A socket, and what became of its connections.
pub(super) struct Entrance {
    pub(super) spec: ListenSpec,
    listening: Listening,
    connected: usize,
    places: Numbers,
    pub(super) connections: u64,
    /// What the guests that have gone had counted.
    pub(super) before: Counts,
    /// The last connections that have ended, oldest first.
    pub(super) ends: VecDeque<End>,
    teller: Rc<dyn Teller>,
    /// What is said of this socket's connections in a second has a limit.
    said: Sayings,
    recording: Option<Recording>,
}

/// A connection that has ended.
#[derive(Clone, Debug, Serialize)]
pub(super) struct End {
    pub(super) guest: u64,
    pub(super) seconds: f64,
    /// In words.
    pub(super) how: String,
}

/// A connection that is served.
struct Running {
    key: Key,
    /// It tells the connection from the others of its entrance, and is given again when it ends.
    place: usize,
    served: Served,
    guest: Arc<Guest>,
}

/// By whom a connection is served.
enum Served {
    /// By a thread of its own, and the bell that ends it.
    Thread(JoinHandle<Ended>, Ringer),
    /// By the thread of the wires. It has a number there, and how it has ended is found here.
    Link(u64, Arc<OnceLock<Ended>>),
}

impl Served {
    /// How the connection has ended, when it has nothing left to do but to end.
    fn ended(self) -> Ended {
        let panicked =
            || Ended::Failed("this is a fault of vmring: the thread has panicked".to_owned());
        match self {
            Served::Thread(thread, _) => thread.join().unwrap_or_else(|_| panicked()),
            Served::Link(_, ended) => ended.get().cloned().unwrap_or_else(panicked),
        }
    }
}

/// Numbers from 0 on, of which the least that is free is taken.
#[derive(Debug, Default)]
struct Numbers {
    /// Numbers below `next` that are free.
    free: BTreeSet<usize>,
    next: usize,
}

impl Numbers {
    fn take(&mut self) -> usize {
        self.free.pop_first().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    fn give_back(&mut self, number: usize) {
        self.free.insert(number);
    }
}

/// Lets a few sentences pass each second, so that a front end cannot fill a log.
struct Sayings {
    since: Instant,
    left: u32,
    unsaid: u64,
}

impl Sayings {
    const EACH_SECOND: u32 = 4;

    fn new(now: Instant) -> Self {
        Self { since: now, left: Self::EACH_SECOND, unsaid: 0 }
    }

    /// Whether a sentence may be said now: then returns how many before it were not.
    fn pass(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.left) = (now, Self::EACH_SECOND);
        }
        if self.left == 0 {
            self.unsaid += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// Tells the main thread of the end of a thread, also if the thread panics.
struct Ending {
    key: Key,
    ending: Sender<Key>,
    bell: Arc<(UnixStream, UnixStream)>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        // The main thread has gone if this fails.
        let _ = self.ending.send(self.key);
        let _ = (&self.bell.1).write(&[1]);
    }
}

impl Server {
    /// Everything that the confinement forbids later is made here.
    pub(super) fn new(
        network: Network,
        teller: Rc<dyn Teller>,
        entrances: Vec<(ListenSpec, Listening, Option<Recording>)>,
        connections: usize,
        places: &'static Places,
    ) -> Result<Self, Failure> {
        let failed = |error| Failure::Step(format!("the server cannot start: {error}"));
        let bell = UnixStream::pair().map_err(failed)?;
        bell.0.set_nonblocking(true).map_err(failed)?;
        // A bell that nobody has listened to yet rings already.
        bell.1.set_nonblocking(true).map_err(failed)?;
        let now = Instant::now();
        let has_wires = entrances.iter().any(|(spec, ..)| spec.is_wire());
        let links = has_wires.then(Links::start).transpose()?;
        let entrance = |(spec, listening, recording)| Entrance {
            spec,
            listening,
            connected: 0,
            places: Numbers::default(),
            connections: 0,
            before: Counts::default(),
            ends: VecDeque::new(),
            teller: teller.clone(),
            said: Sayings::new(now),
            recording,
        };
        let entrances = entrances.into_iter().map(entrance).collect();
        let (ending, ends) = mpsc::channel();
        let (asking, requests) = mpsc::sync_channel(REQUESTS);
        let requests = Some(requests);
        let bell = Arc::new(bell);
        let running = Vec::new();
        Ok(Self {
            network,
            teller,
            since: now,
            entrances,
            running,
            connections,
            places,
            links,
            links_begun: 0,
            ends,
            ending,
            bell,
            relay: None,
            uplink: None,
            way_out: None,
            requests,
            asking,
        })
    }

    pub(super) fn asker(&self) -> Asker {
        Asker { asking: self.asking.clone(), bell: self.bell.clone() }
    }

    /// Serves until it is told to stop, the `deadline` is reached, or the network fails.
    pub(super) fn run(
        &mut self,
        stop: &Stop,
        deadline: Option<Instant>,
        live: &Live,
        mut report: impl FnMut(&Self),
    ) -> Result<(), Failure> {
        self.start_relay()?;
        let mut tick = live.is_watched().then(|| (Instant::now() + TICK, self.rows()));
        let mut count = self.teller.interval().map(|every| (Instant::now() + every, every));
        loop {
            let now = Instant::now();
            if stop.is_wanted() || deadline.is_some_and(|deadline| now >= deadline) {
                return Ok(());
            }
            self.take_ends(now)?;
            self.accept(now);
            if let Some((at, before)) = &mut tick
                && now >= *at
            {
                let rows = self.rows();
                live.show(&live_table(before, &rows));
                (*at, *before) = (now + TICK, rows);
            }
            if let Some((at, every)) = &mut count
                && now >= *at
            {
                *at = now + *every;
                self.teller.tell(&Event::Counted(&self.counts()))?;
            }
            self.answer(&mut report);
            if self.relay.is_none() && self.is_over() {
                return Ok(());
            }
            let open = self.entrances.iter().filter(|entrance| self.has_room(entrance));
            let due = open.filter_map(|entrance| entrance.listening.due());
            let due = due.chain(deadline).chain(tick.as_ref().map(|(at, _)| *at));
            let due = due.chain(count.map(|(at, _)| at)).min();
            self.sleep(stop, now, due);
        }
    }

    /// Answers what other threads have asked for.
    fn answer(&self, report: &mut impl FnMut(&Self)) {
        while let Some(Ok(request)) = self.requests.as_ref().map(Receiver::try_recv) {
            match request {
                Request::Report => report(self),
                // If this fails, the thread that asked has gone.
                Request::Figures(answer) => drop(answer.try_send(self.figures())),
            }
        }
    }

    /// Whether nobody is connected, and nobody will be.
    fn is_over(&self) -> bool {
        self.running.is_empty() && self.entrances.iter().all(|one| one.listening.is_over())
    }

    fn sleep(&self, stop: &Stop, now: Instant, due: Option<Instant>) {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let open = self.entrances.iter().filter(|one| self.has_room(one));
        let open = open.filter_map(|one| one.listening.descriptor(now));
        let others = [stop.bell(), self.bell.0.as_raw_fd()];
        let mut polls: Vec<_> =
            others.into_iter().chain(open.map(|fd| fd.as_raw_fd())).map(poll).collect();
        // Rounded up, so that a short sleep does not become a busy loop.
        let millis = due.map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now());
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        system::poll(&mut polls, millis);
        // What rang is looked at in any case.
        let _ = (&self.bell.0).read(&mut [0; 64]);
    }

    /// Whether one more connection of this socket can be served. A place is kept for each socket that has
    /// no guest, so that one whose clients take all they can get keeps nobody from the others.
    fn has_room(&self, entrance: &Entrance) -> bool {
        let is_first = entrance.connected == 0;
        let kept = |is: fn(&Entrance) -> bool| {
            let all = self.entrances.iter().filter(|one| is(one));
            all.filter(|one| one.connected == 0 && !one.listening.is_over()).count()
        };
        let free = self.connections.saturating_sub(self.running.len());
        let has_place = free > if is_first { 0 } else { kept(|_| true) };
        let over_vhost_user = |one: &Entrance| !one.spec.is_wire();
        let has_seat = self.places.vacant() > if is_first { 0 } else { kept(over_vhost_user) };
        entrance.connected < entrance.spec.most(self.connections)
            && has_place
            && (entrance.spec.is_wire() || has_seat)
    }

    /// Serves each guest that has connected and has room.
    fn accept(&mut self, now: Instant) {
        for index in 0..self.entrances.len() {
            while self.has_room(&self.entrances[index]) {
                let entrance = &mut self.entrances[index];
                let next = entrance.listening.next(now);
                entrance.before.add_unnamed(entrance.listening.take_unnamed());
                match next {
                    Ok(None) => break,
                    Ok(Some(incoming)) => {
                        if !self.begin(index, incoming, now) {
                            // The next one would fail too, and whoever connects again and again
                            // must not keep this thread from the others.
                            self.entrances[index].listening.fail(now);
                        }
                    }
                    Err(error) => {
                        let entrance = &mut self.entrances[index];
                        entrance.tell(now, |spec, unsaid| Event::Refused {
                            spec,
                            error: &error,
                            unsaid,
                        });
                        break;
                    }
                }
            }
        }
    }

    /// Returns whether the connection is served.
    fn begin(&mut self, index: usize, incoming: Incoming, now: Instant) -> bool {
        let entrance = &mut self.entrances[index];
        entrance.connections += 1;
        let key = (index, entrance.connections);
        let place = entrance.places.take();
        let begun = match incoming {
            Incoming::VhostUser(socket) => self.begin_thread(key, place, socket),
            Incoming::Wire(socket) => self.begin_link(key, place, *socket),
        };
        let entrance = &mut self.entrances[index];
        match begun {
            Ok((served, guest)) => {
                entrance.connected += 1;
                entrance.tell(now, |spec, unsaid| Event::Joined { spec, guest: key.1, unsaid });
                self.running.push(Running { key, place, served, guest });
                true
            }
            Err(failure) => {
                entrance.places.give_back(place);
                let ended = Ended::Failed(failure.to_string());
                entrance.ended(now, key.1, Duration::ZERO, &ended);
                false
            }
        }
    }

    /// Starts a thread for a front end.
    fn begin_thread(
        &self,
        key: Key,
        place: usize,
        socket: UnixStream,
    ) -> Result<(Served, Arc<Guest>), Failure> {
        let Entrance { spec, recording, .. } = &self.entrances[key.0];
        let failed = |why: String| Failure::Step(why);
        let seat = self.places.take().ok_or_else(|| failed("there is no place for it".into()))?;
        let ringer = seat.ringer();
        let (device, settings) = self.network.port(spec, place, recording.as_ref())?;
        let (connection, guest) = Connection::new(socket, device, settings, seat);
        let ending = Ending { key, ending: self.ending.clone(), bell: self.bell.clone() };
        let body = move || {
            let _ending = ending;
            connection.serve()
        };
        let thread = thread::Builder::new().name(format!("guest{}", key.1)).spawn(body);
        let thread = thread.map_err(|error| failed(error.to_string()))?;
        Ok((Served::Thread(thread, ringer), guest))
    }

    /// Gives a wire to the thread of the wires.
    fn begin_link(
        &mut self,
        key: Key,
        place: usize,
        socket: Socket,
    ) -> Result<(Served, Arc<Guest>), Failure> {
        let Entrance { spec, recording, .. } = &self.entrances[key.0];
        let bridge = self.network.link(spec, place, recording.as_ref(), socket)?;
        let stats = Stats::Wire(WireStats::of(&bridge));
        let guest = Arc::new(Guest::new(stats, bridge.monitor(PORT)));
        let ended = Arc::<OnceLock<Ended>>::default();
        let owner = LinkOwner {
            guest: guest.clone(),
            ended: ended.clone(),
            how: None,
            _ending: Ending { key, ending: self.ending.clone(), bell: self.bell.clone() },
        };
        self.links_begun += 1;
        let links = self.links.as_ref().expect("a server with wires has their thread");
        links.begin(self.links_begun, bridge, owner);
        Ok((Served::Link(self.links_begun, ended), guest))
    }

    /// Takes over what the connections that have ended have counted, and why they ended.
    fn take_ends(&mut self, now: Instant) -> Result<(), Failure> {
        while let Ok(key) = self.ends.try_recv() {
            if key == RELAY {
                // Nobody has told it to end.
                let ended = || Err(Failure::Step("the uplink moves no packets any more".into()));
                return self.relay_ended().and_then(|()| ended());
            }
            let Some(place) = self.running.iter().position(|one| one.key == key) else { continue };
            let Running { place, served, guest, .. } = self.running.swap_remove(place);
            let ended = served.ended();
            let entrance = &mut self.entrances[key.0];
            entrance.places.give_back(place);
            entrance.connected -= 1;
            entrance.before.add(&guest.counts());
            entrance.listening.rest(now);
            entrance.ended(now, key.1, guest.time(), &ended);
        }
        Ok(())
    }

    fn start_relay(&mut self) -> Result<(), Failure> {
        let Some(relay) = self.network.take_relay() else { return Ok(()) };
        let ending = Ending { key: RELAY, ending: self.ending.clone(), bell: self.bell.clone() };
        let body = move || {
            let _ending = ending;
            relay.run()
        };
        let thread = thread::Builder::new().name("uplink".to_owned()).spawn(body);
        let failed = |error| Failure::Step(format!("the uplink cannot start: {error}"));
        self.relay = Some(thread.map_err(failed)?);
        Ok(())
    }

    /// Waits for the end of the uplink, which has been told or has failed.
    fn relay_ended(&mut self) -> Result<(), Failure> {
        let Some(relay) = self.relay.take() else { return Ok(()) };
        let Ok((summary, outcome)) = relay.join() else {
            return Err(Failure::Step("this is a fault of vmring: the uplink has panicked".into()));
        };
        self.uplink = Some(summary);
        outcome
    }

    /// What the way out does, or did when the server began to end, if it has been used.
    pub(super) fn way_out(&self) -> Option<NatReport> {
        self.way_out.clone().or_else(|| self.network.way_out())
    }

    /// Ends every connection and the uplink. The sockets are removed.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        self.way_out = self.network.way_out();
        // A thread that waits for an answer gets none.
        self.requests = None;
        for one in &self.running {
            match &one.served {
                Served::Thread(_, ringer) => ringer.ring(),
                Served::Link(number, _) => self.links.iter().for_each(|links| links.end(*number)),
            }
        }
        let deadline = Instant::now() + END_TIMEOUT;
        let mut outcome = Ok(());
        while !self.running.is_empty() && Instant::now() < deadline {
            let ended = self.take_ends(Instant::now());
            outcome = outcome.and(ended);
            if !self.running.is_empty() {
                let bell = self.bell.0.as_raw_fd();
                let mut poll = libc::pollfd { fd: bell, events: libc::POLLIN, revents: 0 };
                let left = deadline.saturating_duration_since(Instant::now());
                system::poll(std::slice::from_mut(&mut poll), left.as_millis() as i32 + 1);
                let _ = (&self.bell.0).read(&mut [0; 64]);
            }
        }
        if let Some(one) = self.running.first() {
            let spec = &self.entrances[one.key.0].spec;
            let sentence = format!("{spec}: guest {} does not end", one.key.1);
            outcome = outcome.and(Err(Failure::Step(sentence)));
        }
        self.entrances.iter_mut().for_each(|entrance| entrance.listening.close());
        self.network.end_relay();
        let recordings = self.entrances.iter().filter_map(|entrance| entrance.recording.as_ref());
        let recorded = recordings.map(Recording::finish).fold(Ok(()), Result::and);
        outcome.and(self.relay_ended()).and(recorded)
    }

    /// The guests of a socket that are connected, with the number of each.
    pub(super) fn guests_of(&self, entrance: usize) -> impl Iterator<Item = (u64, &Guest)> {
        let of_entrance = self.running.iter().filter(move |one| one.key.0 == entrance);
        of_entrance.map(|one| (one.key.1, &*one.guest))
    }

    /// What all guests of a socket, those that have gone too, have counted.
    pub(super) fn counts_of(&self, entrance: usize) -> Counts {
        let mut all = self.entrances[entrance].before.clone();
        self.guests_of(entrance).for_each(|(_, guest)| all.add(&guest.counts()));
        all
    }

    /// What all guests have counted.
    fn counts(&self) -> Counts {
        let mut all = Counts::default();
        (0..self.entrances.len()).for_each(|entrance| all.add(&self.counts_of(entrance)));
        all
    }

    /// The rows of the live table.
    fn rows(&self) -> Rows {
        let guests = self.running.iter().map(|one| {
            let name = self.entrances[one.key.0].spec.to_string();
            (one.key, Row { name, guest: one.key.1, moved: one.guest.counts().moved() })
        });
        let gone = self.entrances.iter().map(|entrance| entrance.before.moved()).sum();
        Rows { guests: guests.collect(), gone }
    }

    /// What each guest of a socket that is connected has counted, by its place there.
    fn guest_figures(&self, entrance: usize) -> Vec<GuestFigures> {
        let guests = self.running.iter().filter(|one| one.key.0 == entrance);
        let guests = guests.map(|one| GuestFigures {
            slot: one.place,
            guest: one.key.1,
            counts: one.guest.counts(),
        });
        let mut guests: Vec<_> = guests.collect();
        guests.sort_unstable_by_key(|one| one.slot);
        guests
    }

    fn figures(&self) -> Figures {
        let sockets = self.entrances.iter().enumerate().map(|(i, entrance)| SocketFigures {
            name: entrance.spec.to_string(),
            connected: entrance.connected,
            connections: entrance.connections,
            counts: self.counts_of(i),
            guests: self.guest_figures(i),
        });
        Figures {
            network: self.network.name().to_owned(),
            seconds: round(self.since.elapsed().as_secs_f64(), 3),
            uplink: self.network.uplink(),
            gateway: self.network.counters(),
            sockets: sockets.collect(),
        }
    }
}

impl Entrance {
    /// Packets of its guests that were not recorded in time.
    pub(super) fn unrecorded(&self) -> u64 {
        self.recording.as_ref().map_or(0, |recording| recording.capture.lost())
    }

    /// Says this of the socket's connections, unless much was said just before.
    fn tell<'a>(&'a mut self, now: Instant, event: impl FnOnce(&'a ListenSpec, u64) -> Event<'a>) {
        if let Some(unsaid) = self.said.pass(now) {
            // Nobody waits to be told of a guest.
            let _ = self.teller.tell(&event(&self.spec, unsaid));
        }
    }

    fn ended(&mut self, now: Instant, guest: u64, time: Duration, ended: &Ended) {
        self.tell(now, |spec, unsaid| Event::Left { spec, guest, how: ended, unsaid });
        if self.ends.len() == LAST_ENDS {
            self.ends.pop_front();
        }
        let seconds = round(time.as_secs_f64(), 3);
        self.ends.push_back(End { guest, seconds, how: ended.to_string() });
    }
}
