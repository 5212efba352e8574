//! Network objects of macOS 26.

use std::ffi::{CStr, c_char, c_void};
use std::net::Ipv4Addr;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use libc::{in_addr, in6_addr};
use vmring_embedded::AddressRange;

use crate::availability::require;
use crate::objects::{self, Kind, lock, violation};
use crate::rules::{Rule, address, address_len};
use crate::script::{ForwardMade, NetworkMade};
use crate::status::{FAILURE, HOST_MODE, INVALID_ARGUMENT, SHARED_MODE, SUCCESS};
use crate::world::World;
use crate::xpc::{self, Handle, Object};

/// What `CFRelease` is given: an object of either kind.
pub(crate) enum CfObject {
    Configuration(Configuration),
    Network(Arc<Network>),
}

/// What a new network is asked for.
pub(crate) struct Configuration {
    world: World,
    request: Mutex<NetworkRequest>,
}

#[derive(Clone)]
struct NetworkRequest {
    mode: u64,
    subnet: Option<(Ipv4Addr, Ipv4Addr)>,
    prefix: Option<([u8; 16], u8)>,
    mtu: u32,
    external: Option<String>,
    off: Vec<&'static str>,
    reservations: Vec<([u8; 6], Ipv4Addr)>,
    rules: Vec<Rule>,
}

/// A network. Its addresses are reserved as long as it exists.
pub(crate) struct Network {
    world: World,
    request: NetworkRequest,
    gateway: Ipv4Addr,
    mask: Ipv4Addr,
    serial: u64,
}

/// Networks by number, for those that were serialized.
static SERIALIZED: Mutex<Vec<(u64, Weak<Network>)>> = Mutex::new(Vec::new());

impl Network {
    pub(crate) fn world(&self) -> World {
        self.world.clone()
    }

    pub(crate) fn mtu(&self) -> u32 {
        self.request.mtu
    }

    pub(crate) fn gateway(&self) -> Ipv4Addr {
        self.gateway
    }

    /// A network whose gateway is the subnet's own address can be created, but no interface starts
    /// on it (measured).
    pub(crate) fn startable(&self) -> bool {
        self.range().check().is_ok()
    }

    pub(crate) fn range(&self) -> AddressRange {
        range_from(self.gateway, self.mask)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let subnet = self.subnet();
        lock(&self.world.0.subnets).retain(|held| *held != subnet);
    }
}

impl Network {
    fn subnet(&self) -> Ipv4Addr {
        self.gateway & self.mask
    }

    fn describe(&self) -> NetworkMade {
        let NetworkRequest { mode, prefix, mtu, external, off, reservations, rules, .. } =
            self.request.clone();
        let rule = |rule: Rule| ForwardMade {
            protocol: rule.protocol,
            external_port: rule.outside,
            address: rule.address[..address_len(rule.family).unwrap_or(0)].to_vec(),
            internal_port: rule.inside,
        };
        NetworkMade {
            mode,
            gateway: self.gateway,
            mask: self.mask,
            prefix,
            mtu,
            external,
            off,
            reservations,
            rules: rules.into_iter().map(rule).collect(),
        }
    }

    pub(crate) fn reservations(&self) -> &[([u8; 6], Ipv4Addr)] {
        &self.request.reservations
    }

    /// Whether the network gives out addresses.
    pub(crate) fn dhcp(&self) -> bool {
        !self.request.off.contains(&"dhcp")
    }

    pub(crate) fn mode(&self) -> u64 {
        self.request.mode
    }

    fn create(world: &World, request: NetworkRequest) -> Result<Arc<Self>, u32> {
        let mut subnets = lock(&world.0.subnets);
        let (gateway, mask) = match request.subnet {
            Some(subnet) => subnet,
            None => {
                let free = (100..=254)
                    .map(|third| Ipv4Addr::new(192, 168, third, 1))
                    .find(|gateway| {
                        let third = gateway.octets()[2];
                        !subnets.contains(&Ipv4Addr::new(192, 168, third, 0))
                    })
                    .ok_or(FAILURE)?;
                (free, Ipv4Addr::new(255, 255, 255, 0))
            }
        };
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let serial = NEXT.fetch_add(1, Ordering::Relaxed);
        let subnet = gateway & mask;
        if subnets.contains(&subnet) {
            return Err(FAILURE);
        }
        subnets.push(subnet);
        drop(subnets);
        Ok(Arc::new(Self { world: world.clone(), request, gateway, mask, serial }))
    }
}

impl CfObject {
    fn into_raw(self) -> *mut c_void {
        let (kind, world) = match &self {
            CfObject::Configuration(configuration) => {
                (Kind::Configuration, configuration.world.clone())
            }
            CfObject::Network(network) => (Kind::Network, network.world.clone()),
        };
        let object = Arc::new(self);
        let memory = Box::new(Arc::downgrade(&object));
        let object = Arc::into_raw(object);
        let role = match kind {
            Kind::Configuration => "a network configuration",
            _ => "a network object",
        };
        world.track(objects::register(object, kind, memory), role);
        object.cast_mut().cast()
    }
}

/// # Safety
///
/// If `configuration` is a live configuration, the caller must hold it during this call. The
/// simulator aborts if no live configuration has this address.
unsafe fn configuration<'a>(configuration: *const c_void, role: &str) -> &'a Configuration {
    objects::expect_live(configuration, Kind::Configuration, role);
    // SAFETY: `expect_live` has just found a CfObject of this kind, and the caller holds it.
    match unsafe { &*configuration.cast::<CfObject>() } {
        CfObject::Configuration(configuration) => configuration,
        CfObject::Network(_) => violation(role),
    }
}

/// # Safety
///
/// If `network` is a live network object, the caller must hold it during this call. The simulator
/// aborts if no live network object has this address.
pub(crate) unsafe fn network<'a>(network: *const c_void, role: &str) -> &'a Arc<Network> {
    objects::expect_live(network, Kind::Network, role);
    // SAFETY: `expect_live` has just found a CfObject of this kind, and the caller holds it.
    match unsafe { &*network.cast::<CfObject>() } {
        CfObject::Network(network) => network,
        CfObject::Configuration(_) => violation(role),
    }
}

/// # Safety
///
/// `status` must be null or valid for writing.
unsafe fn store_status(status: *mut u32, value: u32) {
    if !status.is_null() {
        // SAFETY: guaranteed by the caller.
        unsafe { *status = value }
    }
}

/// # Safety
///
/// The caller gives up its reference to `object`. The simulator aborts if no live configuration or
/// network has this address.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "the name is Apple's")]
pub(crate) unsafe extern "C" fn CFRelease(object: *const c_void) {
    if object.is_null() {
        violation("CFRelease: null");
    }
    let object = object.cast::<CfObject>();
    match objects::kind(object) {
        Some(Kind::Configuration | Kind::Network) => {}
        Some(other) => violation(&format!("CFRelease: {other} is no object of CoreFoundation's")),
        None => violation("CFRelease: nothing lives there (any more)"),
    }
    drop(objects::unregister(object));
    // SAFETY: `kind` has just found it alive, and it is an Arc that `into_raw` gave out, with one
    // owner.
    drop(unsafe { Arc::from_raw(object) });
}

/// # Safety
///
/// `status` must be null or valid for writing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_create(
    mode: u32,
    status: *mut u32,
) -> *mut c_void {
    require(World::current().host().macos, c"vmnet_network_configuration_create");
    let mode = u64::from(mode);
    if !matches!(mode, HOST_MODE | SHARED_MODE) {
        // SAFETY: guaranteed by the caller.
        unsafe { store_status(status, INVALID_ARGUMENT) };
        return ptr::null_mut();
    }
    let request = NetworkRequest {
        mode,
        subnet: None,
        prefix: None,
        mtu: 1500,
        external: None,
        off: Vec::new(),
        reservations: Vec::new(),
        rules: Vec::new(),
    };
    // SAFETY: guaranteed by the caller.
    unsafe { store_status(status, SUCCESS) };
    CfObject::Configuration(Configuration { world: World::current(), request: Mutex::new(request) })
        .into_raw()
}

/// # Safety
///
/// As for [`configuration`]; and `name` must be a C string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_set_external_interface(
    to: *mut c_void,
    name: *const c_char,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let (to, name) = unsafe { (configuration(to, "external interface"), CStr::from_ptr(name)) };
    let known = to.world.host().shared_interfaces.unwrap_or_default();
    let mut request = lock(&to.request);
    match known.into_iter().find(|known| known.as_bytes() == name.to_bytes()) {
        Some(name) if request.mode == SHARED_MODE => request.external = Some(name),
        _ => return INVALID_ARGUMENT,
    }
    SUCCESS
}

macro_rules! disable {
    ($($name:ident $what:literal;)*) => {$(
        /// # Safety
        ///
        /// As for [`configuration`].
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(from: *mut c_void) {
            // SAFETY: guaranteed by the caller.
            let from = unsafe { configuration(from, $what) };
            lock(&from.request).off.push($what);
        }
    )*};
}

disable! {
    vmnet_network_configuration_disable_nat44 "nat44";
    vmnet_network_configuration_disable_nat66 "nat66";
    vmnet_network_configuration_disable_dhcp "dhcp";
    vmnet_network_configuration_disable_dns_proxy "dns proxy";
    vmnet_network_configuration_disable_router_advertisement "router advertisement";
}

/// # Safety
///
/// As for [`configuration`]; and both addresses must be valid for reading.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_set_ipv4_subnet(
    to: *mut c_void,
    subnet: *const in_addr,
    mask: *const in_addr,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let (to, subnet, mask) = unsafe { (configuration(to, "subnet"), *subnet, *mask) };
    let [subnet, mask] = [subnet, mask].map(|addr| Ipv4Addr::from(addr.s_addr.to_ne_bytes()));
    if !subnet.is_private() || u32::from(mask).leading_ones() < 8 {
        return INVALID_ARGUMENT;
    }
    lock(&to.request).subnet = Some((subnet, mask));
    SUCCESS
}

/// # Safety
///
/// As for [`configuration`]; and the prefix must be valid for reading.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_set_ipv6_prefix(
    to: *mut c_void,
    prefix: *const in6_addr,
    bits: u8,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let (to, prefix) = unsafe { (configuration(to, "prefix"), *prefix) };
    if bits > 128 {
        return INVALID_ARGUMENT;
    }
    lock(&to.request).prefix = Some((prefix.s6_addr, bits));
    SUCCESS
}

/// # Safety
///
/// As for [`configuration`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_set_mtu(
    to: *mut c_void,
    mtu: u32,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let to = unsafe { configuration(to, "MTU") };
    if !(1280..=65_521).contains(&mtu) {
        return INVALID_ARGUMENT;
    }
    lock(&to.request).mtu = mtu;
    SUCCESS
}

/// # Safety
///
/// As for [`configuration`]; and both addresses must be valid for reading.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_add_dhcp_reservation(
    to: *mut c_void,
    client: *const [u8; 6],
    reservation: *const in_addr,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let (to, client, reservation) =
        unsafe { (configuration(to, "reservation"), *client, *reservation) };
    let address = Ipv4Addr::from(reservation.s_addr.to_ne_bytes());
    let mut request = lock(&to.request);
    if request.reservations.iter().any(|(_, known)| *known == address) {
        return INVALID_ARGUMENT;
    }
    request.reservations.push((client, address));
    SUCCESS
}

/// # Safety
///
/// As for [`configuration`]; and `inner` must point at an address of this family.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_configuration_add_port_forwarding_rule(
    to: *mut c_void,
    protocol: u8,
    family: u8,
    inside: u16,
    outside: u16,
    inner: *const c_void,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let (to, address) = unsafe { (configuration(to, "forwarding"), address(inner, family)) };
    let Some(address) = address else { return INVALID_ARGUMENT };
    if !matches!(protocol, 6 | 17) {
        return INVALID_ARGUMENT;
    }
    lock(&to.request).rules.push(Rule { protocol, outside, family, address, inside });
    SUCCESS
}

/// # Safety
///
/// As for [`configuration`]; and `status` must be null or valid for writing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_create(
    from: *mut c_void,
    status: *mut u32,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    let from = unsafe { configuration(from, "vmnet_network_create") };
    let request = lock(&from.request).clone();
    let plan = from.world.network_plan();
    std::thread::sleep(plan.delay);
    let made = match plan.status {
        SUCCESS => Network::create(&from.world, request),
        status => Err(status),
    };
    if let Ok(network) = &made {
        lock(&from.world.0.networks_made).push(network.describe());
    }
    // SAFETY: guaranteed by the caller.
    unsafe { return_network(made, status) }
}

/// # Safety
///
/// `status` must be null or valid for writing.
unsafe fn return_network(made: Result<Arc<Network>, u32>, status: *mut u32) -> *mut c_void {
    match made {
        Ok(network) => {
            // SAFETY: guaranteed by the caller.
            unsafe { store_status(status, SUCCESS) };
            CfObject::Network(network).into_raw()
        }
        Err(why) => {
            // SAFETY: guaranteed by the caller.
            unsafe { store_status(status, why) };
            ptr::null_mut()
        }
    }
}

/// # Safety
///
/// As for [`network`]; and both results must be valid for writing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_get_ipv4_subnet(
    of: *mut c_void,
    subnet: *mut in_addr,
    mask: *mut in_addr,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let of = network(of, "vmnet_network_get_ipv4_subnet");
        (*subnet).s_addr = u32::from_ne_bytes(of.gateway.octets());
        (*mask).s_addr = u32::from_ne_bytes(of.mask.octets());
    }
}

/// # Safety
///
/// As for [`network`]; and both results must be valid for writing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_get_ipv6_prefix(
    of: *mut c_void,
    prefix: *mut in6_addr,
    bits: *mut u8,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let of = network(of, "vmnet_network_get_ipv6_prefix");
        let default = ([0xfd, 0, 0, 0x26, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 64);
        let (bytes, length) = of.request.prefix.unwrap_or(default);
        (*prefix).s6_addr = bytes;
        *bits = length;
    }
}

/// A serialized network: its number.
struct Serialized(u64);

/// # Safety
///
/// As for [`network`]; and `status` must be null or valid for writing.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_copy_serialization(
    of: *mut c_void,
    status: *mut u32,
) -> *mut c_void {
    // SAFETY: guaranteed by the caller.
    let of = unsafe {
        store_status(status, SUCCESS);
        network(of, "vmnet_network_copy_serialization")
    };
    lock(&SERIALIZED).push((of.serial, Arc::downgrade(of)));
    let object = Handle::new(Object::Opaque(Box::new(Serialized(of.serial))));
    // SAFETY: `object` holds a reference to it.
    let (_, life) = unsafe { xpc::borrow(object.as_raw(), "a serialization") };
    of.world.track(life, "a serialization");
    object.into_raw()
}

/// # Safety
///
/// `status` must be null or valid for writing. For `object` see [`xpc::borrow`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_network_create_with_serialization(
    object: *mut c_void,
    status: *mut u32,
) -> *mut c_void {
    require(World::current().host().macos, c"vmnet_network_create_with_serialization");
    // SAFETY: guaranteed by the caller.
    let (object, _) = unsafe { xpc::borrow(object, "vmnet_network_create_with_serialization") };
    let serial = match object {
        Object::Opaque(opaque) => opaque.downcast_ref::<Serialized>().map(|found| found.0),
        _ => None,
    };
    let known = lock(&SERIALIZED)
        .iter()
        .find(|(known, _)| Some(*known) == serial)
        .and_then(|(_, network)| network.upgrade());
    // SAFETY: guaranteed by the caller.
    unsafe { return_network(known.ok_or(INVALID_ARGUMENT), status) }
}

/// The addresses of a subnet from its gateway to the last but one. The last one is the broadcast
/// address.
pub(crate) fn range_from(gateway: Ipv4Addr, mask: Ipv4Addr) -> AddressRange {
    let end = Ipv4Addr::from((u32::from(gateway) | !u32::from(mask)).wrapping_sub(1));
    AddressRange { gateway, end, mask }
}
