//! Interfaces: start, events, reads, writes, stop.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::net::Ipv4Addr;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use libc::iovec;
use macaddr::MacAddr6;
use vmring_embedded::network::mac_of_interface;
use vmring_embedded::{Ipv4Range, NetworkConfig, NetworkMode, PortConfig, Receiver, Sender, Sent};

use crate::availability::require_key;
use crate::blocks::Held;
use crate::dispatch::{Name, Target};
use crate::keys::{self, key};
use crate::network::Network;
use crate::objects::{lock, violation};
use crate::rules::Rule;
use crate::script::{CallPlan, Counts, Dead, Events, Reported, Script, StartHandler, Value};
use crate::world::{Entry, World};
use crate::xpc::{self, Handle, Object};

pub(crate) const SUCCESS: u32 = 1000;
pub(crate) const FAILURE: u32 = 1001;
pub(crate) const INVALID_ARGUMENT: u32 = 1003;
const SETUP_INCOMPLETE: u32 = 1004;
const PACKET_TOO_BIG: u32 = 1006;
const TOO_MANY_PACKETS: u32 = 1008;

pub(crate) const HOST_MODE: u64 = 1000;
pub(crate) const SHARED_MODE: u64 = 1001;
const BRIDGED_MODE: u64 = 1002;

/// `max_packet_size` with TSO.
const TSO_MAX: u64 = 65_550;
/// Bytes of a virtio header.
const HEADER: usize = 12;
/// Packets per call where the keys do not say.
const BATCH: usize = 200;
/// Buffers lent to the network; what they receive is collected at every flush.
const LENT: usize = 64;
/// Packets sent between two flushes.
const FLUSH: usize = 16;
/// Behind a frame on the simulated wire stands its virtio header, if that says anything, and this.
const MARK: &[u8; 8] = b"vmnetsim";
/// Behind a ticket stands this.
const LONG_MARK: &[u8; 8] = b"vmnetlng";

/// `struct vmpktdesc` as Apple has it (vmnet.h).
#[repr(C)]
pub(crate) struct Descriptor {
    vm_pkt_size: usize,
    vm_pkt_iov: *mut iovec,
    vm_pkt_iovcnt: u32,
    vm_flags: u32,
}

const START_HANDLER: &str = "the start's handler";

const STARTING: u8 = 0;
const RUNNING: u8 = 1;
const STOPPED: u8 = 2;

/// An interface. Foreign code has it as a pointer; it is never freed, so that a use after its stop
/// is told.
pub(crate) struct Interface {
    state: AtomicU8,
    world: World,
    entry: Arc<Mutex<Entry>>,
    settings: Settings,
    /// Calls under way.
    reading: AtomicBool,
    writing: AtomicBool,
    calls: AtomicUsize,
    kernel: Mutex<Kernel>,
    sender: Mutex<Option<Sender<Vec<u8>>>>,
    /// The longest packet of the wire.
    wire: usize,
    /// Where the network gives out no addresses: the gateway, whose DHCP then does not come through.
    no_dhcp: Option<MacAddr6>,
    events: Mutex<Option<Arc<EventTarget>>>,
    /// Events on the queue or under way.
    underway: AtomicUsize,
    /// The queue of the last event callback.
    events_queue: Mutex<Option<Name>>,
    /// A repeated event is on its way.
    repeating: AtomicBool,
    dead: Arc<Mutex<Option<Dead>>>,
    pub(crate) rules: Mutex<Vec<Rule>>,
    /// On a network object, which it keeps.
    pub(crate) network: Mutex<Option<Arc<Network>>>,
}

/// What was negotiated.
struct Settings {
    id: [u8; 16],
    mtu: u64,
    max: u64,
    header: bool,
    header_in_max: bool,
    limits: (usize, usize),
    mac: Option<MacAddr6>,
    addresses: Option<Ipv4Range>,
    nat66: Option<String>,
    several_iovecs: bool,
    free_of_charge: Option<usize>,
    call_cost: Duration,
}

/// The queue of packets that nobody has read.
#[derive(Default)]
struct Kernel {
    receiver: Option<Receiver<Vec<u8>>>,
    waiting: VecDeque<(Vec<u8>, usize)>,
    free: Vec<Vec<u8>>,
}

/// Keeps a buffer to be lent again.
fn spare(free: &mut Vec<Vec<u8>>, buffer: Vec<u8>) {
    if free.len() < LENT {
        free.push(buffer);
    }
}

struct EventTarget {
    block: Held,
    queue: Target,
    /// An event is on the queue and has not begun.
    pending: AtomicBool,
}

/// All handles: so that they are kept, and not leaked.
static ALL: Mutex<Vec<AtomicPtr<Arc<Interface>>>> = Mutex::new(Vec::new());

/// # Safety
///
/// `interface` is a handle from a start of this process.
pub(crate) unsafe fn borrow<'a>(interface: *const c_void, role: &str) -> &'a Arc<Interface> {
    if interface.is_null() {
        violation(&format!("{role}: the interface is null"));
    }
    // SAFETY: as the caller says; a handle's box is never freed.
    unsafe { &*interface.cast::<Arc<Interface>>() }
}

/// A subnet's addresses from its gateway's to the last but one: the last is the broadcast's.
pub(crate) fn range_from(gateway: Ipv4Addr, mask: Ipv4Addr) -> Ipv4Range {
    let end = Ipv4Addr::from((u32::from(gateway) | !u32::from(mask)).wrapping_sub(1));
    Ipv4Range { gateway, end, mask }
}

/// A description, understood.
struct Wish {
    id: Option<[u8; 16]>,
    mode: u64,
    values: BTreeMap<String, Value>,
}

impl Wish {
    /// # Safety
    ///
    /// `description` is an XPC object, or nothing that lives, which is told.
    unsafe fn read(description: *const c_void, on_network: bool) -> Self {
        let role = "the interface's description";
        // SAFETY: as the caller says.
        let (object, _) = unsafe { xpc::borrow(description, role) };
        let mut values = BTreeMap::new();
        for (name, value) in xpc::values(object, role) {
            let Some(short) = keys::input(&name) else {
                violation(&format!("{role}: there is no key '{name}' that goes in"));
            };
            let expected = keys::input_type(short);
            let found = match value {
                Value::U64(_) => 'u',
                Value::Bool(_) => 'b',
                Value::Str(_) => 's',
                Value::Uuid(_) => 'i',
            };
            if expected != found {
                violation(&format!("{role}: the value of '{short}' is of the wrong type"));
            }
            values.insert(short.to_owned(), value);
        }
        let id = match values.get("interface_id") {
            Some(Value::Uuid(id)) => Some(*id),
            _ => None,
        };
        let mode = match values.get("operation_mode") {
            Some(Value::U64(mode)) => *mode,
            _ if on_network => 0, // the network's, as the caller knows
            _ => violation(&format!("{role}: it has no operation mode")),
        };
        Self { id, mode, values }
    }

    fn str(&self, key: &str) -> Option<&str> {
        match self.values.get(key) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    fn bool(&self, key: &str) -> Option<bool> {
        match self.values.get(key) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    fn u64(&self, key: &str) -> Option<u64> {
        match self.values.get(key) {
            Some(Value::U64(value)) => Some(*value),
            _ => None,
        }
    }

    fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Whether vmnet's header allows it.
    fn allowed(&self) -> bool {
        let range = ["start_address", "end_address", "subnet_mask"].map(|key| self.has(key));
        let bridged = self.mode == BRIDGED_MODE;
        let lawful = [
            matches!(self.mode, HOST_MODE..=BRIDGED_MODE),
            range.iter().all(|has| *has == range[0]),
            !(bridged
                && (range[0] || self.has("mtu") || self.bool("enable_isolation") == Some(true))),
            bridged == self.has("shared_interface_name"),
            self.str("nat66_prefix").is_none_or(|text| {
                self.mode == SHARED_MODE && text.to_ascii_lowercase().starts_with("fd")
            }),
            !self.has("network_identifier") || self.mode == HOST_MODE,
            self.has("host_ip_address") == self.has("host_subnet_mask"),
            !self.has("host_ip_address") || self.has("network_identifier"),
            !(self.bool("enable_virtio_header") == Some(true)
                && self.bool("enable_checksum_offload") == Some(true)),
        ];
        lawful.into_iter().all(|holds| holds)
    }

    /// The addresses of the network it joins, as far as they were asked for or are the mode's.
    fn addresses(&self) -> Result<Option<Ipv4Range>, u32> {
        let address = |key| self.str(key).map(|text| text.parse::<Ipv4Addr>());
        let asked = (address("start_address"), address("end_address"), address("subnet_mask"));
        let host = (address("host_ip_address"), address("host_subnet_mask"));
        if let (Some(gateway), Some(mask)) = host {
            let (Ok(gateway), Ok(mask)) = (gateway, mask) else { return Err(INVALID_ARGUMENT) };
            let range = range_from(gateway, mask);
            range.check().map_err(|_| INVALID_ARGUMENT)?;
            return Ok(Some(range));
        }
        match (self.mode, asked) {
            (BRIDGED_MODE, _) => Ok(None),
            (_, (Some(Ok(gateway)), Some(Ok(end)), Some(Ok(mask)))) => {
                let range = Ipv4Range { gateway, end, mask };
                range.check().map_err(|_| INVALID_ARGUMENT)?;
                Ok(Some(range))
            }
            (HOST_MODE, (None, ..)) => Ok(Some(Ipv4Range::of(NetworkMode::Host))),
            (_, (None, ..)) => Ok(Some(Ipv4Range::of(NetworkMode::Shared))),
            _ => Err(INVALID_ARGUMENT),
        }
    }
}

impl Settings {
    fn negotiate(
        wish: &Wish,
        script: &Script,
        world: &World,
        network: Option<&Network>,
    ) -> Result<Self, u32> {
        let asked = |key| wish.bool(key) == Some(true);
        let (tso, header) = (asked("enable_tso"), asked("enable_virtio_header"));
        let id = wish.id.unwrap_or_else(|| world.interface_id());
        let own = network.map_or_else(|| wish.u64("mtu"), |network| Some(network.mtu().into()));
        let mtu = own.unwrap_or(1500);
        if !(68..=65_535).contains(&mtu) {
            return Err(INVALID_ARGUMENT);
        }
        let max = if tso { TSO_MAX } else { mtu + 14 };
        let mac = match wish.str("mac_address") {
            Some(text) if script.honours_mac => Some(text.parse().map_err(|_| INVALID_ARGUMENT)?),
            _ if wish.bool("allocate_mac_address") == Some(false) => None,
            _ => Some(mac_of_interface(id)),
        };
        let addresses = match network {
            Some(network) => Some(network.range()),
            None => wish.addresses()?,
        };
        let shared = wish.mode == SHARED_MODE;
        let told = world.host().macos >= (15, 0);
        let limit = |limit: Option<u32>| limit.filter(|_| told).map_or(BATCH, |n| n as usize);
        Ok(Self {
            id,
            mtu: script.mtu.unwrap_or(mtu),
            max: script.max_packet_size.unwrap_or(max),
            header,
            header_in_max: script.header_in_max,
            limits: (limit(script.read_max_packets), limit(script.write_max_packets)),
            mac,
            addresses,
            nat66: shared.then(|| wish.str("nat66_prefix").unwrap_or("fd00:64::").to_owned()),
            several_iovecs: script.several_iovecs,
            free_of_charge: script.free_of_charge,
            call_cost: script.call_cost,
        })
    }

    /// The longest packet, header included.
    fn max_frame(&self) -> usize {
        let header = if self.header && !self.header_in_max { HEADER } else { 0 };
        self.max as usize + header
    }

    /// The dictionary for the start's handler.
    fn parameters(&self, script: &Script, world: &World) -> Handle {
        let all = Handle::dictionary();
        let told = world.host().macos >= (15, 0);
        let text = |text: String| Object::String(std::ffi::CString::new(text).unwrap_or_default());
        let set = |name: &'static str, value: Object| {
            if !script.start.missing.contains(&name) {
                all.set(key(name), value);
            }
        };
        set("mtu", Object::U64(self.mtu));
        set("max_packet_size", Object::U64(self.max));
        set("interface_id", Object::Uuid(self.id));
        if let Some(mac) = self.mac {
            set("mac_address", text(mac.to_string().to_lowercase()));
        }
        if let Some(range) = self.addresses {
            set("start_address", text(range.gateway.to_string()));
            set("end_address", text(range.end.to_string()));
            set("subnet_mask", text(range.mask.to_string()));
        }
        if let Some(prefix) = &self.nat66 {
            set("nat66_prefix", text(prefix.clone()));
        }
        let limits = [
            ("read_max_packets", script.read_max_packets),
            ("write_max_packets", script.write_max_packets),
        ];
        for (name, limit) in limits {
            if let (true, Some(limit)) = (told, limit) {
                set(name, Object::U64(limit.into()));
            }
        }
        all
    }
}

/// # Safety
///
/// The arguments are an XPC object, a queue and a block, or nothing that lives, which is told.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_start_interface(
    description: *const c_void,
    queue: *const c_void,
    handler: *const c_void,
) -> *mut c_void {
    // SAFETY: as the caller says.
    unsafe { start(description, queue, handler, None) }
}

/// # Safety
///
/// As [`vmnet_start_interface`].
pub(crate) unsafe fn start(
    description: *const c_void,
    queue: *const c_void,
    handler: *const c_void,
    network: Option<Arc<Network>>,
) -> *mut c_void {
    // SAFETY: as the caller says.
    let mut wish = unsafe { Wish::read(description, network.is_some()) };
    let asked_for_mode = wish.has("operation_mode");
    if let Some(network) = &network {
        wish.mode = network.mode();
    }
    let world = network.as_ref().map_or_else(|| World::of_interface(wish.id), |n| n.world());
    let entry = world.entry(wish.id.unwrap_or_default());
    let script = {
        let mut entry = lock(&entry);
        entry.counts.starts += 1;
        entry.description = wish.values.clone();
        entry.script.clone()
    };
    // Without a copy of its own vmnet could not come back later, so a second call implies one.
    let copies = world.retains() || script.start.handler == StartHandler::Twice;
    // SAFETY: as the caller says.
    let handler = unsafe { Held::new(handler, START_HANDLER, copies) };
    let queue = Target::new(queue, "the start's queue", world.retains());
    for key in wish.values.keys() {
        require_key(world.host().macos, key);
    }
    world.saw(handler.life(), START_HANDLER);
    world.saw(queue.life(), "the start's queue");
    // SAFETY: as the caller says.
    world.saw(unsafe { xpc::borrow(description, "the description") }.1, "the description");

    let made = if script.start.status != SUCCESS {
        Err(script.start.status)
    } else if !wish.allowed() || (network.is_some() && asked_for_mode) {
        Err(INVALID_ARGUMENT)
    } else if network.as_ref().is_some_and(|network| !network.startable()) {
        Err(FAILURE)
    } else {
        Settings::negotiate(&wish, &script, &world, network.as_deref())
            .and_then(|settings| Interface::make(&wish, settings, &world, &entry, network.clone()))
    };
    let (status, interface) = match made {
        Ok(interface) => (SUCCESS, Some(interface)),
        Err(status) if script.start.handle_on_failure => {
            let settings = Settings::negotiate(&wish, &Script::default(), &world, None);
            let interface = settings
                .and_then(|settings| Interface::make(&wish, settings, &world, &entry, network));
            (status, interface.ok())
        }
        Err(status) => (status, None),
    };
    let parameters = match (&interface, status) {
        (Some(interface), SUCCESS) if !script.start.no_parameters => {
            Some(interface.settings.parameters(&script, &world))
        }
        _ => None,
    };
    if let Some(parameters) = &parameters {
        // SAFETY: it lives: we have it.
        world.saw(unsafe { xpc::borrow(parameters.as_raw(), "parameters") }.1, "the parameters");
    }
    let handle = match &interface {
        Some(interface) if !script.start.no_handle => interface.handle(),
        _ => ptr::null_mut(),
    };
    let answer =
        Answer { queue, handler, status, parameters, interface, patience: script.patience };
    answer.give(script.start.handler);
    handle
}

/// What a start has for its handler.
struct Answer {
    queue: Target,
    handler: Held,
    status: u32,
    parameters: Option<Handle>,
    interface: Option<Arc<Interface>>,
    patience: Duration,
}

impl Answer {
    /// Calls the handler, as the plan says.
    fn give(self, plan: StartHandler) {
        match plan {
            StartHandler::Prompt => self.call_on_queue(),
            StartHandler::After(delay) => spawn("vmnet-sim-late", move || {
                thread::sleep(delay);
                self.call_on_queue();
            }),
            // It keeps for ever what it has.
            StartHandler::Never => std::mem::forget((self.queue, self.handler)),
            StartHandler::Twice => {
                let (queue, patience) = (self.queue.clone(), self.patience);
                let first = Arc::new(self);
                let again = first.clone();
                queue.run_within(patience, START_HANDLER, move || first.call());
                spawn("vmnet-sim-again", move || {
                    thread::sleep(Duration::from_millis(20));
                    again.call();
                });
            }
        }
    }

    fn call_on_queue(self) {
        // The references end with the job, as far as there are any.
        self.queue.clone().run_within(self.patience, START_HANDLER, move || self.call());
    }

    fn call(&self) {
        if let Some(interface) = &self.interface {
            let _ = interface.state.compare_exchange(
                STARTING,
                RUNNING,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
        }
        let parameters = self.parameters.as_ref().map_or(ptr::null_mut(), Handle::as_raw);
        self.handler.call_status_object(self.status, parameters);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    thread::Builder::new().name(name.to_owned()).spawn(body).expect("a thread");
}

impl Interface {
    fn make(
        wish: &Wish,
        settings: Settings,
        world: &World,
        entry: &Arc<Mutex<Entry>>,
        network: Option<Arc<Network>>,
    ) -> Result<Arc<Self>, u32> {
        let name = match (&network, wish.mode) {
            (Some(network), _) => format!("network object {}", network.gateway()),
            (None, BRIDGED_MODE) => {
                let name = wish.str("shared_interface_name").unwrap_or_default();
                if !world.host().shared_interfaces.iter().flatten().any(|known| known == name) {
                    return Err(FAILURE);
                }
                format!("bridged {name}")
            }
            (None, mode) => match wish.values.get("network_identifier") {
                Some(identifier) => format!("isolated {identifier:?}"),
                None => format!("mode {mode} {:?}", settings.addresses),
            },
        };
        let mode = if wish.mode == HOST_MODE { NetworkMode::Host } else { NetworkMode::Shared };
        let mut config = NetworkConfig::of(mode);
        config.ipv4 = settings.addresses.unwrap_or(Ipv4Range {
            gateway: Ipv4Addr::new(192, 168, 1, 1),
            end: Ipv4Addr::new(192, 168, 1, 254),
            mask: Ipv4Addr::new(255, 255, 255, 0),
        });
        // What is longer, as the offloads make it, does not go over the wire itself: see `Long`.
        config.mtu = settings.mtu.clamp(1280, 65_521) as u32;
        config.inbox_depth = LENT as u32;
        let name = format!("{name} mtu {}", config.mtu);
        let wire = world.0.networks.open(&name, &config).map_err(|_| FAILURE)?;
        for (mac, address) in network.iter().flat_map(|network| network.reservations()) {
            // One that DHCP cannot give is ignored; who asks for it learns by its absence.
            let dhcp = wire.gateway().dhcp();
            let _ = dhcp.reserve(MacAddr6::from(*mac), *address, Duration::ZERO);
        }
        let gives = !wish.has("network_identifier")
            && network.as_ref().is_none_or(|network| network.dhcp());
        let no_dhcp = (!gives).then(|| wire.gateway().mac());
        let longest = wire.max_packet_size();
        let port_of: Arc<OnceLock<Weak<Interface>>> = Arc::default();
        let woken = port_of.clone();
        let wake = Arc::new(move || {
            if let Some(interface) = woken.get().and_then(Weak::upgrade) {
                interface.arrived();
            }
        });
        let isolated = wish.bool("enable_isolation") == Some(true);
        let port = wire
            .join(PortConfig { interface_id: settings.id, mac: settings.mac, isolated, wake })
            .map_err(|_| FAILURE)?;
        let (receiver, sender) = port.split();
        let interface = Arc::new(Self {
            state: AtomicU8::new(STARTING),
            world: world.clone(),
            entry: entry.clone(),
            settings,
            reading: AtomicBool::new(false),
            writing: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
            kernel: Mutex::new(Kernel { receiver: Some(receiver), ..Kernel::default() }),
            sender: Mutex::new(Some(sender)),
            wire: longest,
            no_dhcp,
            events: Mutex::new(None),
            underway: AtomicUsize::new(0),
            events_queue: Mutex::new(None),
            repeating: AtomicBool::new(false),
            dead: Arc::default(),
            rules: Mutex::default(),
            network: Mutex::new(network),
        });
        port_of.get_or_init(|| Arc::downgrade(&interface));
        lock(entry).dead = Arc::downgrade(&interface.dead);
        interface.arrived(); // lends the first buffers
        Ok(interface)
    }

    /// The pointer that foreign code gets: never freed.
    fn handle(self: &Arc<Self>) -> *mut c_void {
        let handle = Box::into_raw(Box::new(self.clone()));
        lock(&ALL).push(AtomicPtr::new(handle));
        handle.cast()
    }

    fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut lock(&self.entry).counts);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state.load(Ordering::Acquire) == RUNNING
    }

    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// Takes in what the network has for us, on the sender's thread, and says so.
    fn arrived(self: &Arc<Self>) {
        let depth = lock(&self.entry).script.queue_depth;
        let mut kernel = lock(&self.kernel);
        let Kernel { receiver: Some(receiver), waiting, free } = &mut *kernel else { return };
        let (was_empty, mut arrived, mut dropped) = (waiting.is_empty(), false, 0);
        loop {
            while let Some((mut buffer, mut len)) = receiver.collect() {
                if let Some(ticket) = ticket(&buffer[..len]) {
                    // The wire's own buffer goes back to be lent again.
                    spare(free, std::mem::replace(&mut buffer, self.world.0.long.take(ticket)));
                    len = buffer.len();
                }
                if self.no_dhcp.is_some_and(|gateway| is_dhcp(&buffer[..len], gateway)) {
                    spare(free, buffer);
                    continue;
                }
                let (frame, _) = parts(&buffer[..len]);
                let header = if self.settings.header { HEADER } else { 0 };
                let too_long = header + frame.len() > self.settings.max_frame();
                if waiting.len() < depth && !too_long {
                    waiting.push_back((buffer, len));
                    arrived = true;
                } else {
                    spare(free, buffer);
                    dropped += 1;
                }
            }
            while !receiver.is_full() {
                let buffer = free.pop().unwrap_or_else(|| vec![0; self.wire]);
                if receiver.post(buffer).is_err() {
                    break;
                }
            }
            if receiver.arm() {
                break;
            }
        }
        drop(kernel);
        if dropped > 0 {
            self.count(|counts| counts.dropped += dropped);
        }
        if arrived {
            let events = lock(&self.entry).script.events;
            match events {
                Events::Arrival | Events::Level => self.fire(),
                Events::Edge if was_empty => self.fire(),
                Events::Edge | Events::Lost => {}
            }
        }
    }

    /// Puts an event on the queue, unless one is there that has not begun.
    fn fire(self: &Arc<Self>) {
        if lock(&self.dead).is_some() {
            return;
        }
        let Some(target) = lock(&self.events).clone() else { return };
        if target.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        let interface = self.clone();
        self.underway.fetch_add(1, Ordering::AcqRel);
        target.queue.clone().run(move || {
            let delay = lock(&interface.entry).script.event_delay;
            thread::sleep(delay);
            target.pending.store(false, Ordering::Release);
            interface.count(|counts| counts.events += 1);
            let event = Handle::dictionary();
            let truth = lock(&interface.kernel).waiting.len() as u64;
            if let Some(estimate) = lock(&interface.entry).script.estimate {
                let estimate = Object::U64(estimate.unwrap_or(truth));
                event.set(key("estimated_packets_available"), estimate);
            }
            // It may have been taken off meanwhile: an event that is on the queue still comes.
            target.block.call_status_object(1, event.as_raw());
            drop(target);
            interface.underway.fetch_sub(1, Ordering::AcqRel);
            interface.repeat();
        });
    }

    /// Where events are level-triggered, another one while packets wait.
    fn repeat(self: &Arc<Self>) {
        let level = lock(&self.entry).script.events == Events::Level;
        if !level || lock(&self.kernel).waiting.is_empty() {
            return;
        }
        if self.repeating.swap(true, Ordering::AcqRel) {
            return;
        }
        let interface = Arc::downgrade(self);
        spawn("vmnet-sim-level", move || {
            thread::sleep(Duration::from_millis(1));
            if let Some(interface) = interface.upgrade() {
                interface.repeating.store(false, Ordering::Release);
                if !lock(&interface.kernel).waiting.is_empty() {
                    interface.fire();
                }
            }
        });
    }

    /// What a call finds before anything else: `Err` is its answer.
    fn enter<'a>(&'a self, busy: &'a AtomicBool, what: &str) -> Result<Call<'a>, u32> {
        match self.state.load(Ordering::Acquire) {
            RUNNING => {}
            STARTING => return Err(SETUP_INCOMPLETE),
            _ => {
                return Err(self
                    .world
                    .forbids(&format!("{what} after the stop"), INVALID_ARGUMENT));
            }
        }
        if busy.swap(true, Ordering::AcqRel) {
            let status = self.world.forbids(&format!("two calls of {what} at once"), FAILURE);
            return Err(status);
        }
        self.calls.fetch_add(1, Ordering::AcqRel);
        let call = Call { interface: self, busy };
        match *lock(&self.dead) {
            Some(Dead::Fails(status)) => Err(status),
            _ => Ok(call),
        }
    }

    /// Checks the descriptors of a call.
    ///
    /// # Safety
    ///
    /// There are `n` of them, with as many iovecs as they say.
    unsafe fn check(
        &self,
        packets: *const Descriptor,
        n: usize,
        limit: usize,
        what: &str,
    ) -> Result<(), u32> {
        let forbids =
            |why: String, status| Err(self.world.forbids(&format!("{what}: {why}"), status));
        if n > limit {
            return forbids(format!("{n} packets where {limit} are allowed"), TOO_MANY_PACKETS);
        }
        let mut mapped = Mapped::default();
        for i in 0..n {
            // SAFETY: as the caller says.
            let packet = unsafe { &*packets.add(i) };
            if !mapped.holds(packet.vm_pkt_iov) {
                return forbids(
                    format!(
                        "packet {i}: vm_pkt_iov is no pointer to iovecs (is the layout right?)"
                    ),
                    INVALID_ARGUMENT,
                );
            }
            if packet.vm_pkt_iovcnt == 0 || packet.vm_pkt_iovcnt > 1024 {
                let count = packet.vm_pkt_iovcnt;
                return forbids(format!("packet {i}: vm_pkt_iovcnt is {count}"), INVALID_ARGUMENT);
            }
            if packet.vm_flags != 0 {
                return forbids(
                    format!("packet {i}: vm_flags is {:#x}: it was not reset", packet.vm_flags),
                    INVALID_ARGUMENT,
                );
            }
            // SAFETY: as the caller says.
            let iovecs = unsafe { iovecs(packet) };
            if iovecs.iter().any(|iovec| iovec.iov_base.is_null()) {
                return forbids(format!("packet {i}: an iov_base is null"), INVALID_ARGUMENT);
            }
            let sum = iovecs.iter().fold(0_usize, |sum, iovec| sum.saturating_add(iovec.iov_len));
            if sum != packet.vm_pkt_size {
                let size = packet.vm_pkt_size;
                return forbids(
                    format!("packet {i}: vm_pkt_size is {size} and the iovecs have {sum} bytes"),
                    INVALID_ARGUMENT,
                );
            }
        }
        // SAFETY: as the caller says.
        let several = || (0..n).any(|i| unsafe { (*packets.add(i)).vm_pkt_iovcnt } > 1);
        if !self.settings.several_iovecs && several() {
            return Err(INVALID_ARGUMENT);
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As [`check`](Self::check), and what the iovecs point at may be written.
    unsafe fn read(
        self: &Arc<Self>,
        packets: *mut Descriptor,
        count: &mut c_int,
    ) -> Result<(), u32> {
        let what = "vmnet_read";
        let _call = self.enter(&self.reading, what)?;
        let asked = self.asked(*count, what)?;
        let settings = &self.settings;
        if let Some(len) = settings.free_of_charge {
            pay(settings.call_cost);
            for i in 0..asked {
                // SAFETY: as the caller says.
                unsafe { (*packets.add(i)).vm_pkt_size = len }
            }
            return Ok(());
        }
        // SAFETY: as the caller says.
        unsafe { self.check(packets, asked, settings.limits.0, what)? };
        for i in 0..asked {
            // SAFETY: as the caller says.
            let size = unsafe { (*packets.add(i)).vm_pkt_size };
            if size < settings.max_frame() {
                let why =
                    format!("{what}: a buffer of {size} bytes for up to {}", settings.max_frame());
                return Err(self.world.forbids(&why, INVALID_ARGUMENT));
            }
        }
        pay(settings.call_cost);
        let plan = lock(&self.entry).script.reads.pop_front().unwrap_or(CallPlan::Well);
        let most = match plan {
            CallPlan::Well => asked,
            CallPlan::Takes(n) => n.min(asked),
            CallPlan::Fails { status, reported, .. } => {
                *count = reported.count(asked, 0);
                self.count(|counts| counts.reads += 1);
                return Err(status);
            }
        };
        let dead = lock(&self.dead).is_some();
        let mut kernel = lock(&self.kernel);
        let n = if dead { 0 } else { kernel.waiting.len().min(most) };
        for i in 0..n {
            let Some((buffer, len)) = kernel.waiting.pop_front() else { break };
            // SAFETY: as the caller says; the room was checked.
            unsafe { self.deliver(&buffer[..len], &mut *packets.add(i)) };
            spare(&mut kernel.free, buffer);
        }
        for i in 0..asked {
            // In and out: whoever does not reset it shows.
            // SAFETY: as the caller says.
            unsafe { (*packets.add(i)).vm_flags = 0x5a5a }
        }
        drop(kernel);
        *count = n as c_int;
        self.count(|counts| {
            counts.reads += 1;
            counts.packets_read += n as u64;
        });
        if n == most && most < asked {
            // It came back short although packets may wait: an event will say so.
            self.again_if_waiting();
        }
        Ok(())
    }

    /// An event for what is left.
    fn again_if_waiting(self: &Arc<Self>) {
        let events = lock(&self.entry).script.events;
        if events != Events::Lost && !lock(&self.kernel).waiting.is_empty() {
            self.fire();
        }
    }

    /// Writes a frame from the wire, with its header if there is one, to a descriptor's buffer.
    ///
    /// # Safety
    ///
    /// As [`read`](Self::read).
    unsafe fn deliver(&self, wire: &[u8], packet: &mut Descriptor) {
        let (frame, header) = parts(wire);
        let mut pieces = if self.settings.header { [header, frame] } else { [&[], frame] };
        let len = pieces[0].len() + pieces[1].len();
        let mut left = len;
        // SAFETY: as the caller says.
        for iovec in unsafe { iovecs_mut(packet) } {
            // SAFETY: as the caller says: `iov_len` bytes at `iov_base`.
            let mut room = unsafe {
                std::slice::from_raw_parts_mut(iovec.iov_base.cast::<u8>(), iovec.iov_len)
            };
            // "Both are in/out": it says what is used of it.
            iovec.iov_len = left.min(room.len());
            left -= iovec.iov_len;
            for piece in &mut pieces {
                let (now, later) = piece.split_at(piece.len().min(room.len()));
                let (to, rest) = room.split_at_mut(now.len());
                to.copy_from_slice(now);
                (*piece, room) = (later, rest);
            }
            if left == 0 {
                break;
            }
        }
        packet.vm_pkt_size = len;
    }

    /// # Safety
    ///
    /// As [`check`](Self::check).
    unsafe fn write(
        self: &Arc<Self>,
        packets: *mut Descriptor,
        count: &mut c_int,
    ) -> Result<(), u32> {
        let what = "vmnet_write";
        let _call = self.enter(&self.writing, what)?;
        let asked = self.asked(*count, what)?;
        if self.settings.free_of_charge.is_some() {
            pay(self.settings.call_cost);
            return Ok(());
        }
        // SAFETY: as the caller says.
        unsafe { self.check(packets, asked, self.settings.limits.1, what)? };
        pay(self.settings.call_cost);
        let (plan, failed_batch) = {
            let script = &mut lock(&self.entry).script;
            (script.writes.pop_front().unwrap_or(CallPlan::Well), script.failed_batch)
        };
        // SAFETY: as the caller says.
        let frames: Vec<Vec<u8>> =
            (0..asked).map(|i| unsafe { gather(&*packets.add(i)) }).collect();
        let fault = frames.iter().enumerate().find_map(|(i, frame)| {
            let status = self.refuses(frame);
            (status != SUCCESS).then_some((i, status))
        });
        // What cannot be sent is not, whatever the plan.
        let possible = fault.map_or(asked, |(i, _)| i);
        let (n, status, reported) = match (plan, fault) {
            (CallPlan::Takes(n), _) => (n.min(possible), SUCCESS, Reported::Done),
            (CallPlan::Fails { status, sent, reported }, _) => {
                (sent.min(possible), status, reported)
            }
            (CallPlan::Well, None) => (asked, SUCCESS, Reported::Done),
            (CallPlan::Well, Some((i, status))) => {
                (if failed_batch.0 { i } else { 0 }, status, failed_batch.1)
            }
        };
        let dead = lock(&self.dead).is_some();
        if !dead {
            let mut sender = lock(&self.sender);
            if let Some(sender) = &mut *sender {
                for (i, frame) in frames[..n].iter().enumerate() {
                    self.send(sender, frame);
                    if i % FLUSH == FLUSH - 1 {
                        sender.flush();
                    }
                }
                sender.flush();
            }
        }
        *count = reported.count(asked, n);
        self.count(|counts| {
            counts.writes += 1;
            counts.packets_written += n as u64;
        });
        if status == SUCCESS { Ok(()) } else { Err(status) }
    }

    /// What is said to a packet, header included.
    fn refuses(&self, packet: &[u8]) -> u32 {
        let header = if self.settings.header { HEADER } else { 0 };
        if packet.len() < header + 14 {
            INVALID_ARGUMENT
        } else if packet.len() > self.settings.max_frame() {
            PACKET_TOO_BIG
        } else {
            SUCCESS
        }
    }

    fn send(&self, sender: &mut Sender<Vec<u8>>, packet: &[u8]) {
        let header_len = if self.settings.header { HEADER } else { 0 };
        let (header, frame) = packet.split_at(header_len);
        // num_buffers says nothing on this way.
        let says = header.iter().take(10).any(|byte| *byte != 0);
        let marked = says.then(|| [frame, header, MARK].concat());
        let whole = marked.as_deref().unwrap_or(frame);
        if whole.len() <= self.wire {
            sender.send(whole);
            return;
        }
        let long = &self.world.0.long;
        let ticket = long.give(whole.to_vec());
        let copies = match sender.send(&[&whole[..14], &ticket.to_le_bytes(), LONG_MARK].concat()) {
            Sent::Forwarded => 1,
            Sent::Flooded { reached } => reached,
            Sent::Gateway | Sent::Dropped(_) => 0,
        };
        long.expect(ticket, copies);
    }

    fn asked(&self, count: c_int, what: &str) -> Result<usize, u32> {
        usize::try_from(count).ok().filter(|count| *count > 0).ok_or_else(|| {
            self.world.forbids(&format!("{what}: a count of {count}"), INVALID_ARGUMENT)
        })
    }
}

impl Reported {
    fn count(self, asked: usize, done: usize) -> c_int {
        (match self {
            Reported::Asked => asked,
            Reported::Done => done,
            Reported::Zero => 0,
        }) as c_int
    }
}

/// A call under way.
struct Call<'a> {
    interface: &'a Interface,
    busy: &'a AtomicBool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.busy.store(false, Ordering::Release);
        self.interface.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Frames that are longer than the simulated wire takes. A short one goes over it instead, which
/// finds its way by the same addresses and says with a ticket what it stands for.
#[derive(Default)]
pub(crate) struct Long(Mutex<HashMap<u64, Awaited>>);

struct Awaited {
    bytes: Vec<u8>,
    /// How many still come for it, as soon as that is known; those who came before are below zero.
    copies: i64,
    known: bool,
}

impl Long {
    fn give(&self, bytes: Vec<u8>) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let ticket = NEXT.fetch_add(1, Ordering::Relaxed);
        lock(&self.0).insert(ticket, Awaited { bytes, copies: 0, known: false });
        ticket
    }

    fn expect(&self, ticket: u64, copies: u32) {
        self.change(ticket, |awaited| {
            awaited.copies += i64::from(copies);
            awaited.known = true;
        });
    }

    fn take(&self, ticket: u64) -> Vec<u8> {
        self.change(ticket, |awaited| {
            awaited.copies -= 1;
            awaited.bytes.clone()
        })
    }

    fn change<T>(&self, ticket: u64, change: impl FnOnce(&mut Awaited) -> T) -> T {
        let mut all = lock(&self.0);
        let awaited = all.get_mut(&ticket).expect("a ticket is good until all have come for it");
        let result = change(awaited);
        if awaited.known && awaited.copies == 0 {
            all.remove(&ticket);
        }
        result
    }
}

/// The ticket of a frame that stands for a long one.
fn ticket(wire: &[u8]) -> Option<u64> {
    let rest = wire.strip_suffix(LONG_MARK)?;
    Some(u64::from_le_bytes(*rest.last_chunk()?))
}

/// A frame of the simulated wire, and its virtio header.
fn parts(wire: &[u8]) -> (&[u8], &[u8]) {
    match wire.strip_suffix(MARK) {
        Some(rest) => rest.split_at(rest.len() - HEADER),
        None => (wire, &[0; HEADER]),
    }
}

/// Whether that is the gateway's answer to a DHCP client.
fn is_dhcp(frame: &[u8], gateway: MacAddr6) -> bool {
    let at = |from: usize, bytes: &[u8]| frame.get(from..from + bytes.len()) == Some(bytes);
    // Ethernet's source and type, IPv4's protocol; the gateway's headers have no options: UDP's ports.
    at(6, gateway.as_bytes()) && at(12, &[8, 0]) && at(23, &[17]) && at(34, &[0, 67, 0, 68])
}

/// Tells pointers from the numbers that stand in their place in a descriptor of another layout.
#[derive(Default)]
struct Mapped {
    /// The last page that was found.
    page: Option<usize>,
}

impl Mapped {
    /// Whether there is memory at `pointer`.
    fn holds(&mut self, pointer: *const iovec) -> bool {
        // Below that no system maps anything for a program.
        const LOWEST: usize = 1 << 16;
        let address = pointer as usize;
        if address < LOWEST || !pointer.is_aligned() {
            return false;
        }
        let page = address & !(page_size() - 1);
        if self.page != Some(page) && !is_mapped(page) {
            return false;
        }
        self.page = Some(page);
        true
    }
}

fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    // SAFETY: it asks for a constant.
    *SIZE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize)
}

#[cfg(target_os = "linux")]
fn is_mapped(page: usize) -> bool {
    let mut resident = 0_u8;
    // SAFETY: it tells whether the page is there, in one byte, and touches nothing else.
    unsafe { libc::mincore(page as *mut c_void, 1, &mut resident) == 0 }
}

/// Elsewhere a wrong pointer ends the process without a sentence.
#[cfg(not(target_os = "linux"))]
fn is_mapped(_page: usize) -> bool {
    true
}

/// # Safety
///
/// There are as many iovecs as the descriptor says.
unsafe fn iovecs(packet: &Descriptor) -> &[iovec] {
    // SAFETY: as the caller says; the pointer was checked.
    unsafe { std::slice::from_raw_parts(packet.vm_pkt_iov, packet.vm_pkt_iovcnt as usize) }
}

/// # Safety
///
/// As [`iovecs`], and nobody else looks at them.
unsafe fn iovecs_mut(packet: &mut Descriptor) -> &mut [iovec] {
    // SAFETY: as the caller says.
    unsafe { std::slice::from_raw_parts_mut(packet.vm_pkt_iov, packet.vm_pkt_iovcnt as usize) }
}

/// # Safety
///
/// As [`iovecs`], and they point at bytes.
unsafe fn gather(packet: &Descriptor) -> Vec<u8> {
    let mut all = Vec::with_capacity(packet.vm_pkt_size);
    // SAFETY: as the caller says.
    for iovec in unsafe { iovecs(packet) } {
        // SAFETY: as the caller says.
        all.extend(unsafe {
            std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), iovec.iov_len)
        });
    }
    all
}

/// Spends what a call costs, busily, as a system call does.
#[inline]
fn pay(cost: Duration) {
    if cost.is_zero() {
        return;
    }
    let start = Instant::now();
    while start.elapsed() < cost {
        std::hint::spin_loop();
    }
}

/// # Safety
///
/// `interface` is a handle; `packets` has `*count` descriptors, and what they point at is there for
/// the call, to be written.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_read(
    interface: *mut c_void,
    packets: *mut Descriptor,
    count: *mut c_int,
) -> u32 {
    if packets.is_null() || count.is_null() {
        violation("vmnet_read: the packets and their count are pointers, and one is null");
    }
    // SAFETY: as the caller says.
    unsafe { borrow(interface, "vmnet_read").read(packets, &mut *count) }.err().unwrap_or(SUCCESS)
}

/// # Safety
///
/// As [`vmnet_read`], but for the writing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_write(
    interface: *mut c_void,
    packets: *mut Descriptor,
    count: *mut c_int,
) -> u32 {
    if packets.is_null() || count.is_null() {
        violation("vmnet_write: the packets and their count are pointers, and one is null");
    }
    // SAFETY: as the caller says.
    unsafe { borrow(interface, "vmnet_write").write(packets, &mut *count) }.err().unwrap_or(SUCCESS)
}

/// # Safety
///
/// `interface` is a handle; queue and block are both null, or they live, or it is told.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_set_event_callback(
    interface: *mut c_void,
    mask: u32,
    queue: *const c_void,
    block: *const c_void,
) -> u32 {
    let what = "vmnet_interface_set_event_callback";
    // SAFETY: as the caller says.
    let interface = unsafe { borrow(interface, what) };
    if !interface.is_running() {
        let why = format!("{what} on an interface that does not run");
        return interface.world.forbids(&why, SETUP_INCOMPLETE);
    }
    if mask != 1 {
        return interface
            .world
            .forbids(&format!("{what}: there is one event, 1"), INVALID_ARGUMENT);
    }
    if queue.is_null() != block.is_null() {
        let why = format!("{what}: both the queue and the block, or none of them");
        return interface.world.forbids(&why, INVALID_ARGUMENT);
    }
    let target = if block.is_null() {
        None
    } else {
        let retains = interface.world.retains();
        // SAFETY: as the caller says.
        let block = unsafe { Held::new(block, "the event callback", retains) };
        let queue = Target::new(queue, "the events' queue", retains);
        interface.world.saw(block.life(), "the event callback");
        interface.world.saw(queue.life(), "the events' queue");
        *lock(&interface.events_queue) = Some(queue.name());
        Some(Arc::new(EventTarget { block, queue, pending: AtomicBool::new(false) }))
    };
    let before = std::mem::replace(&mut *lock(&interface.events), target);
    drop(before);
    interface.again_if_waiting();
    SUCCESS
}

/// # Safety
///
/// `interface` is a handle; queue and block live, or it is told.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_stop_interface(
    interface: *mut c_void,
    queue: *const c_void,
    handler: *const c_void,
) -> u32 {
    let what = "vmnet_stop_interface";
    // SAFETY: as the caller says.
    let interface = unsafe { borrow(interface, what) }.clone();
    let world = interface.world.clone();
    if interface.state.load(Ordering::Acquire) == STOPPED {
        return world.forbids(&format!("{what}: a second time"), INVALID_ARGUMENT);
    }
    if lock(&interface.events).is_some() {
        violation(&format!("{what}: the event callback is still set"));
    }
    if interface.calls.load(Ordering::Acquire) > 0 {
        violation(&format!("{what}: a read or a write is under way"));
    }
    if lock(&interface.events_queue).is_some_and(Name::is_current) {
        violation(&format!("{what}: from a job of the queue that its events come on"));
    }
    if interface.underway.load(Ordering::Acquire) > 0 {
        violation(&format!("{what}: an event is on its queue or under way"));
    }
    let queue = Target::new(queue, "the stop's queue", world.retains());
    if queue.is_current() {
        violation(&format!("{what}: from a job of the queue that the handler is to run on"));
    }
    // SAFETY: as the caller says.
    let handler = unsafe { Held::new(handler, "the stop's handler", world.retains()) };
    world.saw(handler.life(), "the stop's handler");
    world.saw(queue.life(), "the stop's queue");
    let (plan, patience) = {
        let script = &lock(&interface.entry).script;
        (script.stop, script.patience)
    };
    if let Some(status) = plan.refused {
        return status;
    }
    interface.state.store(STOPPED, Ordering::Release);
    interface.count(|counts| counts.stops += 1);
    spawn("vmnet-sim-stop", move || {
        interface.leave();
        let Some(delay) = plan.handler else {
            std::mem::forget((queue, handler));
            return;
        };
        thread::sleep(delay);
        // The references end with the job, as far as there are any.
        queue.clone().run_within(patience, "the stop's handler", move || {
            handler.call_status(plan.status);
            drop((handler, queue));
        });
    });
    SUCCESS
}

impl Interface {
    /// Leaves its network.
    fn leave(&self) {
        let sender = lock(&self.sender).take();
        let kernel = std::mem::take(&mut *lock(&self.kernel));
        let network = lock(&self.network).take();
        drop((sender, kernel, network));
    }
}

/// The names of the interfaces that can be shared.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vmnet_copy_shared_interface_list() -> *mut c_void {
    let Some(names) = World::current().host().shared_interfaces else { return ptr::null_mut() };
    let text = |name| Handle::new(Object::String(std::ffi::CString::new(name).unwrap_or_default()));
    Handle::new(Object::Array(names.into_iter().map(text).collect())).into_raw()
}
