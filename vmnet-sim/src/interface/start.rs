//! Starts: reads the description, joins the network and calls the handler.

use std::ffi::c_void;
use std::net::Ipv4Addr;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use macaddr::MacAddr6;
use vmring_embedded::{AddressRange, NetworkConfig, NetworkMode, PortConfig};

use super::{Interface, RUNNING, ReceiveQueue, STARTING};
use crate::availability::require_key;
use crate::blocks::GivenBlock;
use crate::description::Request;
use crate::dispatch::GivenQueue;
use crate::limits::LENT;
use crate::network::{Network, network};
use crate::objects::lock;
use crate::script::{Script, StartHandler};
use crate::settings::Settings;
use crate::status::{BRIDGED_MODE, FAILURE, HOST_MODE, INVALID_ARGUMENT, SUCCESS};
use crate::threads::spawn;
use crate::world::{Record, World};
use crate::xpc::{self, Handle, Object};

const START_HANDLER: &str = "the start's handler";

/// # Safety
///
/// `description` must be as for [`xpc::borrow`], `queue` as for [`GivenQueue::new`], and `handler`
/// as for [`GivenBlock::new`]: the simulator aborts if one of them is null or has already been
/// released.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_start_interface(
    description: *const c_void,
    queue: *const c_void,
    handler: *const c_void,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    unsafe { start(description, queue, handler, None) }
}

/// # Safety
///
/// As for [`vmnet_start_interface`].
pub(crate) unsafe fn start(
    description: *const c_void,
    queue: *const c_void,
    handler: *const c_void,
    network: Option<Arc<Network>>,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    let mut request = unsafe { Request::read(description, network.is_some()) };
    let asked_for_mode = request.has("operation_mode");
    if let Some(network) = &network {
        request.mode = network.mode();
    }
    let world = network.as_ref().map_or_else(|| World::of_interface(request.id), |n| n.world());
    let record = world.record(request.id.unwrap_or_default());
    let script = {
        let mut record = lock(&record);
        record.counts.starts += 1;
        record.description = request.values.clone();
        record.script.clone()
    };
    // A second call of the handler implies a copy: without one vmnet could not come back later.
    let copies = world.retains() || script.start.handler == StartHandler::Twice;
    // SAFETY: guaranteed by the caller.
    let handler = unsafe { GivenBlock::new(handler, START_HANDLER, copies) };
    let queue = GivenQueue::new(queue, "the start's queue", world.retains());
    for key in request.values.keys() {
        require_key(world.host().macos, key);
    }
    world.track(handler.life(), START_HANDLER);
    world.track(queue.life(), "the start's queue");
    // SAFETY: guaranteed by the caller.
    world.track(unsafe { xpc::borrow(description, "the description") }.1, "the description");

    let made = if script.start.status != SUCCESS {
        Err(script.start.status)
    } else if !request.allowed() || (network.is_some() && asked_for_mode) {
        Err(INVALID_ARGUMENT)
    } else if network.as_ref().is_some_and(|network| !network.startable()) {
        Err(FAILURE)
    } else {
        Settings::negotiate(&request, &script, &world, network.as_deref()).and_then(|settings| {
            Interface::make(&request, settings, &world, &record, network.clone())
        })
    };
    let (status, interface) = match made {
        Ok(interface) => (SUCCESS, Some(interface)),
        Err(status) if script.start.handle_on_failure => {
            let settings = Settings::negotiate(&request, &Script::default(), &world, None);
            let interface = settings
                .and_then(|settings| Interface::make(&request, settings, &world, &record, network));
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
        // SAFETY: `parameters` holds a reference to it.
        world.track(unsafe { xpc::borrow(parameters.as_raw(), "parameters") }.1, "the parameters");
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

/// What a start passes to its handler.
struct Answer {
    queue: GivenQueue,
    handler: GivenBlock,
    status: u32,
    parameters: Option<Handle>,
    interface: Option<Arc<Interface>>,
    patience: Duration,
}

impl Answer {
    /// Calls the handler as the plan says.
    fn give(self, plan: StartHandler) {
        match plan {
            StartHandler::Prompt => self.call_on_queue(),
            StartHandler::After(delay) => spawn("vmnet-sim-late", move || {
                thread::sleep(delay);
                self.call_on_queue();
            }),
            // Keeps its references for ever.
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
        // If there are references, they are released when the job ends.
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

impl Interface {
    fn make(
        request: &Request,
        settings: Settings,
        world: &World,
        record: &Arc<Mutex<Record>>,
        network: Option<Arc<Network>>,
    ) -> Result<Arc<Self>, u32> {
        let name = match (&network, request.mode) {
            (Some(network), _) => format!("network object {}", network.gateway()),
            (None, BRIDGED_MODE) => {
                let name = request.str("shared_interface_name").unwrap_or_default();
                if !world.host().shared_interfaces.iter().flatten().any(|known| known == name) {
                    return Err(FAILURE);
                }
                format!("bridged {name}")
            }
            (None, mode) => match request.values.get("network_identifier") {
                Some(identifier) => format!("isolated {identifier:?}"),
                None => format!("mode {mode} {:?}", settings.addresses),
            },
        };
        let mode = if request.mode == HOST_MODE { NetworkMode::Host } else { NetworkMode::Shared };
        let mut config = NetworkConfig::of(mode);
        config.ipv4 = settings.addresses.unwrap_or(AddressRange {
            gateway: Ipv4Addr::new(192, 168, 1, 1),
            end: Ipv4Addr::new(192, 168, 1, 254),
            mask: Ipv4Addr::new(255, 255, 255, 0),
        });
        // Longer packets, as the offloads make them, do not go over the wire: see `LongFrames`.
        config.mtu = settings.mtu.clamp(1280, 65_521) as u32;
        config.inbox_depth = LENT as u32;
        let name = format!("{name} mtu {}", config.mtu);
        let wire = world.0.networks.open(&name, &config).map_err(|_| FAILURE)?;
        let gateway = wire.gateway().ok_or(FAILURE)?;
        for (mac, address) in network.iter().flat_map(|network| network.reservations()) {
            // A reservation that DHCP cannot honour is ignored. A client sees that by not getting
            // the address.
            let _ = gateway.dhcp().reserve(MacAddr6::from(*mac), *address, Duration::ZERO);
        }
        let gives = !request.has("network_identifier")
            && network.as_ref().is_none_or(|network| network.dhcp());
        let no_dhcp = (!gives).then(|| gateway.mac());
        let longest = wire.max_packet_size();
        let port_of: Arc<OnceLock<Weak<Interface>>> = Arc::default();
        let woken = port_of.clone();
        let wake = Arc::new(move || {
            if let Some(interface) = woken.get().and_then(Weak::upgrade) {
                interface.take_arrivals();
            }
        });
        let isolated = request.bool("enable_isolation") == Some(true);
        let port = wire
            .join(PortConfig { mac: settings.mac, isolated, ..PortConfig::new(settings.id, wake) })
            .map_err(|_| FAILURE)?;
        let (receiver, sender) = port.split();
        let interface = Arc::new(Self {
            state: AtomicU8::new(STARTING),
            world: world.clone(),
            record: record.clone(),
            settings,
            reading: AtomicBool::new(false),
            writing: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
            receive_queue: Mutex::new(ReceiveQueue {
                receiver: Some(receiver),
                ..ReceiveQueue::default()
            }),
            sender: Mutex::new(Some(sender)),
            wire_max: longest,
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
        lock(record).dead = Arc::downgrade(&interface.dead);
        interface.take_arrivals(); // lends the first buffers
        Ok(interface)
    }
}

/// # Safety
///
/// As for [`network`] and [`vmnet_start_interface`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_start_with_network(
    on: *mut c_void,
    description: *const c_void,
    queue: *const c_void,
    handler: *const c_void,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let on = network(on, "vmnet_interface_start_with_network").clone();
        start(description, queue, handler, Some(on))
    }
}

/// The names of the interfaces that bridged mode can share.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn vmnet_copy_shared_interface_list() -> *mut c_void {
    let Some(names) = World::current().host().shared_interfaces else { return ptr::null_mut() };
    let text = |name| Handle::new(Object::String(std::ffi::CString::new(name).unwrap_or_default()));
    Handle::new(Object::Array(names.into_iter().map(text).collect())).into_raw()
}
