//! Network objects (macOS 26): a network with its addresses, rules and reservations. It is created
//! before any interface is on it.

use std::ffi::{CString, c_void};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use dispatch2::DispatchQueue;
use libc::{in_addr, in6_addr};
use macaddr::MacAddr6;

use super::address::address;
use super::availability::{Networks, System};
use super::events::check;
use super::ffi::{
    ConfigurationRef, HOST_MODE, InterfaceRef, NetworkRef, SHARED_MODE, SUCCESS, StartBlock,
};
use super::permission;
use super::xpc::{Dictionary, Owned};
use crate::config::{Mode, PortForward};
use crate::error::{ConfigError, Error, Status};
use crate::sys::spawn_detached;

/// A network object (macOS 26). Its addresses are reserved while it exists. Interfaces join it with
/// [`Vmnet::network`](super::Vmnet::network), in this process or, through
/// [`serialize`](Self::serialize), in another.
///
/// Cloning is cheap. The address reservation ends when the last clone is dropped and the last
/// interface on the network has stopped. Keep at least one interface on the network: on macOS 27
/// others have seen that the network's DHCP reservations and forwarding rules are lost when its
/// last interface leaves (Apple's FB24895271).
#[derive(Clone)]
#[doc(alias = "vmnet_network_ref")]
pub struct VmnetNetwork(Arc<Inner>);

/// The network object. A clone of [`VmnetNetwork`] shares it.
struct Inner {
    network: NetworkRef,
    api: Networks,
    mode: Mode,
}

// SAFETY: Apple's documentation says to release the object with CFRelease, and CoreFoundation
// counts references atomically, so any thread may release it. From which threads vmnet's functions
// may be called is an open question (the row "from which threads may its functions be called?" in
// ARCHITECTURE.md); we assume any thread.
unsafe impl Send for Inner {}
// SAFETY: the functions called with a shared network (the getters, serialization, an interface's
// start) do not change it: vmnet has no function that does after `vmnet_network_create`. That
// several threads may call them at a time is the same open question.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: `adopt` took over one reference to the network, and this is the only call that
        // releases it.
        unsafe { (self.api.release)(self.network) }
    }
}

impl fmt::Debug for VmnetNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmnetNetwork").field("mode", &self.0.mode).finish_non_exhaustive()
    }
}

/// Settings of a [`VmnetNetwork`] to create. Apple's defaults apply to what is not set: NAT, DHCP,
/// the DNS proxy and router advertisements are on, the IPv4 subnet is a free /24 of 192.168.0.0/16,
/// the MTU is 1500 bytes.
#[derive(Clone, Debug)]
pub struct VmnetNetworkBuilder {
    mode: Mode,
    subnet: Option<(Ipv4Addr, Ipv4Addr)>,
    prefix: Option<(Ipv6Addr, u8)>,
    mtu: Option<u32>,
    external_interface: Option<String>,
    off: Vec<Service>,
    reservations: Vec<(MacAddr6, Ipv4Addr)>,
    forwards: Vec<PortForward>,
    timeout: Duration,
}

/// A service of a network for its guests. All services are on unless
/// [`VmnetNetworkBuilder::without`] turns one off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Service {
    /// Translation of IPv4 addresses for traffic to the outside (NAT44).
    Nat44,
    /// Translation of IPv6 addresses for traffic to the outside (NAT66).
    Nat66,
    /// The DHCP server, which assigns IPv4 addresses.
    Dhcp,
    /// The DNS proxy, which answers queries at the gateway.
    DnsProxy,
    /// The announcement of IPv6 routers.
    RouterAdvertisement,
}

impl VmnetNetworkBuilder {
    /// Sets the gateway's IPv4 address and the subnet mask. No other network can have the subnet
    /// while this one exists.
    ///
    /// Pass the gateway's address, not the subnet's own (which ends in .0 in a /24): others have
    /// measured on macOS 26 that the system accepts the latter, and that no interface starts on
    /// such a network. [`create`](Self::create) refuses it.
    pub fn ipv4(mut self, gateway: Ipv4Addr, mask: Ipv4Addr) -> Self {
        self.subnet = Some((gateway, mask));
        self
    }

    /// Sets the IPv6 prefix and its length in bits.
    pub fn ipv6(mut self, prefix: Ipv6Addr, bits: u8) -> Self {
        self.prefix = Some((prefix, bits));
        self
    }

    /// Sets the MTU in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// Sets the physical interface, by its name, through which traffic leaves. Shared mode only. By
    /// default the host's routing table decides.
    pub fn external_interface(mut self, name: impl Into<String>) -> Self {
        self.external_interface = Some(name.into());
        self
    }

    /// Turns a service off.
    pub fn without(mut self, service: Service) -> Self {
        self.off.push(service);
        self
    }

    /// Reserves `address` for `mac`: DHCP assigns it to that MAC only.
    pub fn reserve(mut self, mac: MacAddr6, address: Ipv4Addr) -> Self {
        self.reservations.push((mac, address));
        self
    }

    /// Forwards a port of the host. On an interface of a network object this is the only way:
    /// there, vmnet refuses [`Interface::add_port_forward`](crate::Interface::add_port_forward) with
    /// [`Status::Failure`] (others have measured it on macOS 26 and 27), which comes as an
    /// [`Error::Config`] that says so.
    pub fn forward(mut self, rule: PortForward) -> Self {
        self.forwards.push(rule);
        self
    }

    /// Sets how long [`create`](Self::create) waits for the system. Default 10 seconds. On macOS 27
    /// the system has been seen never to answer (apple/container issue 2275).
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Creates the network and reserves its addresses.
    ///
    /// # Errors
    ///
    /// - [`Error::NeedsMacos`] before macOS 26.
    /// - [`Error::Config`] for [`Mode::Bridged`].
    /// - [`Error::PermissionDenied`] if the process may lack the privilege.
    /// - [`Error::Status`] with vmnet's status. [`Status::Failure`] can mean that another network
    ///   has the subnet; unless the process is root it comes as [`Error::PermissionDenied`].
    /// - [`Error::Timeout`] if the system did not answer in time. The call goes on in a thread of
    ///   its own, and a network that still comes is released.
    /// - [`Error::Io`] if that thread could not be started.
    pub fn create(self) -> Result<VmnetNetwork, Error> {
        let system = System::look();
        let api = system.networks()?;
        let mode = match &self.mode {
            Mode::Host => HOST_MODE,
            Mode::Shared => SHARED_MODE,
            Mode::Bridged(_) => {
                let sentence =
                    "a network object has host or shared mode, and not bridged mode".to_owned();
                return Err(ConfigError::Invalid(sentence).into());
            }
        };
        let configuration = Configuration::new(api, mode)
            .and_then(|configuration| self.fill(&configuration).map(|()| configuration))
            .map_err(|status| permission::error(status, &system))?;
        let (answer, answers) = sync_channel(1);
        // On a thread of its own, because the call may never return.
        let mode = self.mode;
        let create = move || {
            // Capture all of `configuration`, which is `Send`, instead of the raw pointer in it.
            let configuration = configuration;
            let mut status = SUCCESS;
            // SAFETY: this thread owns the configuration, so it is not released during the call.
            // `status` is a local variable of the declared type.
            let network = unsafe { (api.create)(configuration.0, &mut status) };
            // After the timeout nobody receives this. The network is dropped, which releases it.
            let _ = answer.send(VmnetNetwork::adopt(api, network, status, mode));
        };
        spawn_detached("vmring-network", create)
            .map_err(Error::io("starting the thread that makes the network"))?;
        answers
            .recv_timeout(self.timeout)
            .map_err(|_| Error::Timeout(self.timeout))?
            .map_err(|status| permission::error(status, &system))
    }

    /// Copies the settings into a configuration.
    ///
    /// # Errors
    ///
    /// [`Status::InvalidArgument`], and what vmnet answers to a setting.
    fn fill(&self, into: &Configuration) -> Result<(), Status> {
        // SAFETY (for the calls below): we borrow the `Configuration`, which is released only when
        // it is dropped, so its object lives during each call. vmnet copies what a pointer shows it
        // during the call: no setter is documented to keep a pointer. The function types are those
        // of `Networks`.
        let (configuration, api) = (into.0, into.1);
        if let Some((gateway, mask)) = self.subnet {
            if gateway & mask == gateway {
                // The system would accept it, and then no interface would start on the network.
                return Err(Status::InvalidArgument);
            }
            let (gateway, mask) = (in_addr_of(gateway), in_addr_of(mask));
            // SAFETY: `into` keeps the configuration; both pointers are to local `in_addr`s.
            check(unsafe { (api.set_ipv4_subnet)(configuration, &gateway, &mask) })?;
        }
        if let Some((prefix, bits)) = self.prefix {
            let prefix = in6_addr { s6_addr: prefix.octets() };
            // SAFETY: `into` keeps the configuration; the pointer is to a local `in6_addr`.
            check(unsafe { (api.set_ipv6_prefix)(configuration, &prefix, bits) })?;
        }
        if let Some(mtu) = self.mtu {
            // SAFETY: `into` keeps the configuration; the MTU is passed by value.
            check(unsafe { (api.set_mtu)(configuration, mtu) })?;
        }
        if let Some(name) = &self.external_interface {
            let name = CString::new(name.as_str()).map_err(|_| Status::InvalidArgument)?;
            // SAFETY: `into` keeps the configuration; `name` is a C string that lives through the
            // call.
            check(unsafe { (api.set_external_interface)(configuration, name.as_ptr()) })?;
        }
        for service in &self.off {
            let disable = match service {
                Service::Nat44 => api.disable_nat44,
                Service::Nat66 => api.disable_nat66,
                Service::Dhcp => api.disable_dhcp,
                Service::DnsProxy => api.disable_dns_proxy,
                Service::RouterAdvertisement => api.disable_router_advertisement,
            };
            // SAFETY: `into` keeps the configuration, which is the only argument.
            unsafe { disable(configuration) }
        }
        for (mac, address) in &self.reservations {
            let (mac, address) = (mac.into_array(), in_addr_of(*address));
            // SAFETY: `into` keeps the configuration; the pointers are to a local MAC and
            // `in_addr`.
            check(unsafe { (api.add_dhcp_reservation)(configuration, &mac, &address) })?;
        }
        for rule in &self.forwards {
            let (family, bytes) = address(rule.internal_address);
            // The internal port comes first here; in the functions of an interface it comes last.
            // SAFETY: `into` keeps the configuration; `bytes` holds 16 bytes, enough for either
            // family, and `address` has put those of `family` there.
            check(unsafe {
                (api.add_port_forwarding_rule)(
                    configuration,
                    rule.protocol.number(),
                    family,
                    rule.internal_port,
                    rule.external_port,
                    bytes.as_ptr().cast::<c_void>(),
                )
            })?;
        }
        Ok(())
    }
}

/// Converts an address to C's type, which has it in network order.
fn in_addr_of(address: Ipv4Addr) -> in_addr {
    in_addr { s_addr: u32::from_ne_bytes(address.octets()) }
}

/// A configuration of a network to create, which is released when this is dropped. vmnet copies the
/// configuration when it creates the network (the tests of the crate `vmnet` 0.10 show it on macOS
/// 26), so it need not outlive the call.
struct Configuration(ConfigurationRef, Networks);

// SAFETY: the object has one owner, `Configuration`, which is not `Sync`, so one thread at a time
// uses it. That it may change threads is an assumption (the row "from which threads may its
// functions be called?" of the open questions in ARCHITECTURE.md).
unsafe impl Send for Configuration {}

impl Configuration {
    fn new(api: Networks, mode: u32) -> Result<Self, Status> {
        let mut status = SUCCESS;
        // SAFETY: `status` is a local variable of the declared type; the mode is passed by value.
        let configuration = unsafe { (api.configuration_create)(mode, &mut status) };
        if configuration.is_null() {
            return Err(Status::from_code(status).unwrap_or(Status::Failure));
        }
        Ok(Self(configuration, api))
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        // SAFETY: `vmnet_network_configuration_create` gave us one reference in `new`, and this is
        // the only call that releases it.
        unsafe { (self.1.release)(self.0) }
    }
}

/// A network in the form in which it can be sent to another process: an XPC dictionary.
#[derive(Debug)]
pub struct SerializedNetwork(Owned);

impl SerializedNetwork {
    /// Returns the `xpc_object_t`, to be sent in an XPC message. It lives as long as this value.
    pub fn as_xpc_object(&self) -> *mut c_void {
        self.0.as_raw()
    }

    /// Takes ownership of an `xpc_object_t` that came in an XPC message.
    ///
    /// # Safety
    ///
    /// `object` is null, or an `xpc_object_t`. The caller gives up one reference to it.
    ///
    /// # Errors
    ///
    /// [`Status::InvalidArgument`] if `object` is null.
    pub unsafe fn from_xpc_object(object: *mut c_void) -> Result<Self, Error> {
        // SAFETY: the caller promises null or an XPC object with one reference for us, which is
        // what `Owned::from_raw` asks for.
        let owned = unsafe { Owned::from_raw(object) };
        Ok(Self(owned.ok_or(Status::InvalidArgument)?))
    }
}

impl VmnetNetwork {
    /// Returns the settings of a network in host or shared mode. [`VmnetNetworkBuilder::create`]
    /// creates the network.
    pub fn builder(mode: Mode) -> VmnetNetworkBuilder {
        VmnetNetworkBuilder {
            mode,
            subnet: None,
            prefix: None,
            mtu: None,
            external_interface: None,
            off: Vec::new(),
            reservations: Vec::new(),
            forwards: Vec::new(),
            timeout: Duration::from_secs(10),
        }
    }

    /// Takes ownership of a network that a function of vmnet has returned with `status`.
    ///
    /// # Errors
    ///
    /// The status if it is not success, and [`Status::Failure`] for null with success.
    fn adopt(api: Networks, network: NetworkRef, status: u32, mode: Mode) -> Result<Self, Status> {
        if network.is_null() {
            return Err(Status::from_code(status).unwrap_or(Status::Failure));
        }
        let network = Self(Arc::new(Inner { network, api, mode }));
        check(status).map(|()| network)
    }

    /// Returns the mode: host or shared.
    pub fn mode(&self) -> &Mode {
        &self.0.mode
    }

    /// Returns the gateway's IPv4 address and the subnet mask.
    pub fn ipv4(&self) -> (Ipv4Addr, Ipv4Addr) {
        let mut addresses = [in_addr { s_addr: 0 }; 2];
        let [gateway, mask] = &mut addresses;
        // SAFETY: the network lives: `Inner` holds a reference until it is dropped. Both pointers
        // are to elements of a local array of the declared type.
        unsafe { (self.0.api.get_ipv4_subnet)(self.0.network, gateway, mask) }
        let [gateway, mask] = addresses.map(|address| address.s_addr.to_ne_bytes().into());
        (gateway, mask)
    }

    /// Returns the IPv6 prefix and its length in bits.
    pub fn ipv6(&self) -> (Ipv6Addr, u8) {
        let mut prefix = in6_addr { s6_addr: [0; 16] };
        let mut bits = 0;
        // SAFETY: the network lives: `Inner` holds a reference until it is dropped. Both pointers
        // are to local variables of the declared types.
        unsafe { (self.0.api.get_ipv6_prefix)(self.0.network, &mut prefix, &mut bits) }
        (prefix.s6_addr.into(), bits)
    }

    /// Returns the network in a form that can be sent to another process. Keep this network until
    /// the other process has started its interface.
    ///
    /// # Errors
    ///
    /// [`Error::Status`] with vmnet's status.
    pub fn serialize(&self) -> Result<SerializedNetwork, Error> {
        let mut status = SUCCESS;
        // SAFETY: the network lives: `Inner` holds a reference until it is dropped. `status` is a
        // local variable. By the function's name ("copy", see xpc_object(3)) the result is null or
        // comes with one reference for us.
        let object = unsafe {
            Owned::from_raw((self.0.api.copy_serialization)(self.0.network, &mut status))
        };
        check(status)?;
        Ok(SerializedNetwork(object.ok_or(Status::Failure)?))
    }

    /// Returns the network that another process has serialized. The serialized form does not carry
    /// the mode, so pass the one that the network was created with.
    ///
    /// # Errors
    ///
    /// [`Error::NeedsMacos`] before macOS 26, [`Error::PermissionDenied`] if the process may lack
    /// the privilege, otherwise [`Error::Status`] with vmnet's status.
    pub fn deserialize(serialized: &SerializedNetwork, mode: Mode) -> Result<Self, Error> {
        let system = System::look();
        let api = system.networks()?;
        let mut status = SUCCESS;
        // SAFETY: the object lives: `SerializedNetwork` holds a reference until it is dropped.
        // `status` is a local variable of the declared type.
        let network =
            unsafe { (api.create_with_serialization)(serialized.0.as_raw(), &mut status) };
        Self::adopt(api, network, status, mode).map_err(|status| permission::error(status, &system))
    }

    /// Calls `vmnet_interface_start_with_network` and returns its handle, which is null after a
    /// failure.
    pub(crate) fn start(
        &self,
        description: &Dictionary,
        queue: &DispatchQueue,
        handler: &StartBlock,
    ) -> InterfaceRef {
        let Inner { network, api, .. } = &*self.0;
        // SAFETY: the network lives: `Inner` holds a reference until it is dropped. The description
        // lives through the call, and the argument types are those of `Networks`.
        // `StartedInterface::start_with`, the only caller, keeps handler and queue until the
        // handler has run, or leaks them.
        unsafe { (api.start_interface)(*network, description.as_raw(), queue, handler) }
    }
}
