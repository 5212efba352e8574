//! A world: a simulated Mac, with its version, its networks and the scripts of its interfaces.
//! Tests that run at the same time do not see each other's worlds.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use vmring_embedded::Registry;

use crate::framing::LongFrames;
use crate::objects::{Life, lock, violation};
use crate::script::{Counts, Dead, NetworkMade, NetworkPlan, Script, Value};

/// The simulated machine.
#[derive(Clone, Debug)]
pub struct Host {
    /// The version of macOS.
    pub macos: (u32, u32),
    /// Whether the process is root.
    pub root: bool,
    /// The interfaces that bridged mode can share. With `None` vmnet answers null.
    pub shared_interfaces: Option<Vec<String>>,
}

impl Default for Host {
    fn default() -> Self {
        let shared_interfaces = Some(vec!["en0".to_owned(), "en1".to_owned()]);
        Self { macos: (26, 0), root: true, shared_interfaces }
    }
}

/// What happens on a misuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// The process is aborted.
    Strict,
    /// The call answers with a status, as vmnet may. For programs that ask on purpose.
    Answers,
}

/// A simulated Mac. Cloning is cheap and gives the same world.
#[derive(Clone)]
pub struct World(pub(crate) Arc<Inner>);

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

pub(crate) struct Inner {
    host: Mutex<Host>,
    rules: Rules,
    /// Whether vmnet copies the blocks and retains the queues that it is given.
    retains: bool,
    pub(crate) networks: Registry<Vec<u8>>,
    pub(crate) long_frames: LongFrames,
    records: Mutex<HashMap<[u8; 16], Arc<Mutex<Record>>>>,
    /// What foreign code gave the world and got from it, each with its role.
    seen: Mutex<Vec<(Life, &'static str)>>,
    /// The subnets of the network objects.
    pub(crate) subnets: Mutex<Vec<Ipv4Addr>>,
    network_plan: Mutex<NetworkPlan>,
    pub(crate) networks_made: Mutex<Vec<NetworkMade>>,
}

/// What is known about one interface identity.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) script: Script,
    pub(crate) counts: Counts,
    pub(crate) description: BTreeMap<String, Value>,
    /// What sleep has done to the running interface, which owns this.
    pub(crate) dead: Weak<Mutex<Option<Dead>>>,
}

static BY_ID: LazyLock<Mutex<HashMap<[u8; 16], Weak<Inner>>>> = LazyLock::new(Mutex::default);
static DEFAULT: LazyLock<World> = LazyLock::new(World::new);

thread_local! {
    static CURRENT: RefCell<Option<World>> = const { RefCell::new(None) };
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// A strict world: macOS 26, root. vmnet takes its own references to blocks and queues.
    pub fn new() -> Self {
        Self::with(Rules::Strict, true)
    }

    /// A world with these rules. `retains` says whether vmnet takes its own references to blocks
    /// and queues.
    pub fn with(rules: Rules, retains: bool) -> Self {
        Self(Arc::new(Inner {
            host: Mutex::default(),
            rules,
            retains,
            networks: Registry::new(),
            long_frames: LongFrames::default(),
            records: Mutex::default(),
            seen: Mutex::default(),
            subnets: Mutex::default(),
            network_plan: Mutex::default(),
            networks_made: Mutex::default(),
        }))
    }

    /// The calling thread's world, or the default one of the process.
    pub fn current() -> Self {
        CURRENT.with_borrow(Clone::clone).unwrap_or_else(|| DEFAULT.clone())
    }

    /// Runs `body` in this world: questions to the system are answered for this Mac, and new
    /// network objects belong to it.
    pub fn enter<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Restore(Option<World>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let before = CURRENT.replace(Some(self.clone()));
        let _restore = Restore(before);
        body()
    }

    /// The simulated machine.
    pub fn host(&self) -> Host {
        lock(&self.0.host).clone()
    }

    /// Changes the simulated machine.
    pub fn set_host(&self, change: impl FnOnce(&mut Host)) {
        change(&mut lock(&self.0.host));
    }

    /// A new interface identity. Its interfaces belong to this world.
    pub fn interface_id(&self) -> [u8; 16] {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut id = *b"vmnet-sim_______";
        id[8..].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
        self.adopt(id);
        id
    }

    /// Makes interfaces of this identity belong to this world.
    pub fn adopt(&self, id: [u8; 16]) {
        lock(&BY_ID).insert(id, Arc::downgrade(&self.0));
    }

    /// Changes an interface's script.
    pub fn script(&self, id: [u8; 16], change: impl FnOnce(&mut Script)) {
        change(&mut lock(&self.record(id)).script);
    }

    /// What the interface of this identity has counted.
    pub fn counts(&self, id: [u8; 16]) -> Counts {
        lock(&self.record(id)).counts
    }

    /// The description of the interface's last start. The keys are the names of vmnet's keys
    /// without `vmnet_` and `_key`.
    pub fn description(&self, id: [u8; 16]) -> BTreeMap<String, Value> {
        lock(&self.record(id)).description.clone()
    }

    /// Changes how the creation of network objects goes.
    pub fn plan_networks(&self, change: impl FnOnce(&mut NetworkPlan)) {
        change(&mut lock(&self.0.network_plan));
    }

    /// The network objects that were made so far.
    pub fn networks_made(&self) -> Vec<NetworkMade> {
        lock(&self.0.networks_made).clone()
    }

    pub(crate) fn network_plan(&self) -> NetworkPlan {
        *lock(&self.0.network_plan)
    }

    /// Simulates that the host sleeps and wakes. The interface behaves as `dead` says until it is
    /// started again.
    pub fn sleep(&self, id: [u8; 16], dead: Dead) {
        let running = lock(&self.record(id)).dead.upgrade();
        if let Some(state) = running {
            *lock(&state) = Some(dead);
        }
    }

    /// Waits up to `patience` until everything is released. Returns the blocks, queues and objects
    /// that passed through this world's calls and still exist.
    pub fn unreleased(&self, patience: Duration) -> Vec<&'static str> {
        let start = Instant::now();
        loop {
            let mut seen = lock(&self.0.seen);
            seen.retain(|(life, _)| life.is_live());
            if seen.is_empty() || start.elapsed() > patience {
                return seen.iter().map(|(_, role)| *role).collect();
            }
            drop(seen);
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn of_interface(id: Option<[u8; 16]>) -> Self {
        let known = id.and_then(|id| lock(&BY_ID).get(&id).and_then(Weak::upgrade));
        known.map_or_else(Self::current, World)
    }

    pub(crate) fn record(&self, id: [u8; 16]) -> Arc<Mutex<Record>> {
        lock(&self.0.records).entry(id).or_default().clone()
    }

    pub(crate) fn retains(&self) -> bool {
        self.0.retains
    }

    pub(crate) fn track(&self, life: impl Into<Option<Life>>, role: &'static str) {
        if let Some(life) = life.into() {
            let mut seen = lock(&self.0.seen);
            seen.retain(|(life, _)| life.is_live());
            if !seen.iter().any(|(known, _)| *known == life) {
                seen.push((life, role));
            }
        }
    }

    /// Handles a misuse: aborts in a strict world; else returns the status that the call answers
    /// with.
    pub(crate) fn misuse(&self, what: &str, status: u32) -> u32 {
        match self.0.rules {
            Rules::Strict => violation(what),
            Rules::Answers => status,
        }
    }
}
