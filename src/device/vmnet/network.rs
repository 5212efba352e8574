//! VmnetNetwork objects, macOS 26: a network with its addresses, rules and reservations, made before any
//! interface is on it.

use std::ffi::{CString, c_void};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;
use std::{fmt, thread};

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

/// A network of its own (macOS 26): its addresses are reserved while it exists. Interfaces join it
/// with [`InterfaceBuilder::network`](crate::InterfaceBuilder::network), in this process or, through
/// [`serialize`](Self::serialize), in another.
///
/// Cloning it is cheap; the reservation ends with the last clone and the last interface. When the
/// last interface leaves, macOS 27 has been seen to forget the network's reservations and forwarding
/// rules: keep one on it.
#[derive(Clone)]
#[doc(alias = "vmnet_network_ref")]
pub struct VmnetNetwork(Arc<Inner>);

struct Inner {
    network: NetworkRef,
    api: Networks,
    mode: Mode,
}

// SAFETY: the object is counted atomically and does not change after it was made.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: our reference, which the creation gave us.
        unsafe { (self.api.release)(self.network) }
    }
}

impl fmt::Debug for VmnetNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmnetNetwork").field("mode", &self.0.mode).finish_non_exhaustive()
    }
}

/// Makes a [`VmnetNetwork`]. Apple's defaults where nothing is said: NAT, DHCP, DNS proxy and router
/// advertisements on, a free /24 of 192.168.0.0/16, MTU 1500.
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

/// What a network does for its guests unless it is told not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Service {
    /// Translation of IPv4 addresses to the outside.
    Nat44,
    /// Translation of IPv6 addresses to the outside.
    Nat66,
    /// Giving out IPv4 addresses.
    Dhcp,
    /// Answering DNS queries at the gateway.
    DnsProxy,
    /// Announcing IPv6 routers.
    RouterAdvertisement,
}

impl VmnetNetworkBuilder {
    /// The gateway's IPv4 address and the subnet mask. Exclusive while the network exists. (Of the
    /// subnet's own address, ending in .0, the system makes a network on which nothing starts.)
    pub fn ipv4(mut self, gateway: Ipv4Addr, mask: Ipv4Addr) -> Self {
        self.subnet = Some((gateway, mask));
        self
    }

    /// The IPv6 prefix and its length in bits.
    pub fn ipv6(mut self, prefix: Ipv6Addr, bits: u8) -> Self {
        self.prefix = Some((prefix, bits));
        self
    }

    /// The MTU in bytes.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// The way out, by the name of a physical interface; shared mode only. Default: as routes say.
    pub fn external_interface(mut self, name: impl Into<String>) -> Self {
        self.external_interface = Some(name.into());
        self
    }

    /// Turns a service off.
    pub fn without(mut self, service: Service) -> Self {
        self.off.push(service);
        self
    }

    /// The address that DHCP gives to `mac`.
    pub fn reserve(mut self, mac: MacAddr6, address: Ipv4Addr) -> Self {
        self.reservations.push((mac, address));
        self
    }

    /// Forwards a port of the host. (The functions of an interface refuse to, on such a network.)
    pub fn forward(mut self, rule: PortForward) -> Self {
        self.forwards.push(rule);
        self
    }

    /// How long [`create`](Self::create) waits for the system, which has been seen never to answer.
    /// Default 10 seconds.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Makes the network and reserves its addresses.
    ///
    /// # Errors
    ///
    /// [`Error::NeedsMacos`] before macOS 26; [`Error::PermissionDenied`]; [`Error::Status`], with
    /// [`Status::Failure`] also for a subnet that is in use; [`Error::Timeout`], and then the call
    /// goes on on a thread that is left behind.
    pub fn create(self) -> Result<VmnetNetwork, Error> {
        let system = System::look();
        let api = system.networks()?;
        let mode = match &self.mode {
            Mode::Host => HOST_MODE,
            Mode::Shared => SHARED_MODE,
            Mode::Bridged(_) => {
                let sentence = "a network object is for host or shared mode".to_owned();
                return Err(ConfigError::Invalid(sentence).into());
            }
        };
        let configuration = Configuration::new(api, mode)
            .and_then(|configuration| self.fill(&configuration).map(|()| configuration))
            .map_err(|status| permission::error(status, &system))?;
        let (answer, answers) = sync_channel(1);
        // On a thread of its own, because it may never come back.
        let creating = thread::Builder::new().name("vmring-network".to_owned());
        let mode = self.mode;
        creating
            .spawn(move || {
                // The whole of it, which may change threads, and not the pointer in it.
                let configuration = configuration;
                let mut status = SUCCESS;
                // SAFETY: the configuration lives; `status` is there to be written.
                let network = unsafe { (api.create)(configuration.0, &mut status) };
                // If nobody waits any more, it is dropped and released.
                let _ = answer.send(VmnetNetwork::adopt(api, network, status, mode));
            })
            .map_err(Error::io("starting the thread that makes the network"))?;
        answers
            .recv_timeout(self.timeout)
            .map_err(|_| Error::Timeout(self.timeout))?
            .map_err(|status| permission::error(status, &system))
    }

    fn fill(&self, into: &Configuration) -> Result<(), Status> {
        let (configuration, api) = (into.0, into.1);
        if let Some((gateway, mask)) = self.subnet {
            if gateway & mask == gateway {
                // The system would take it, and then start nothing on it.
                return Err(Status::InvalidArgument);
            }
            let (gateway, mask) = (in_addr_of(gateway), in_addr_of(mask));
            // SAFETY: the configuration lives, as in all calls here; both addresses are read.
            check(unsafe { (api.set_ipv4_subnet)(configuration, &gateway, &mask) })?;
        }
        if let Some((prefix, bits)) = self.prefix {
            let prefix = in6_addr { s6_addr: prefix.octets() };
            // SAFETY: as above.
            check(unsafe { (api.set_ipv6_prefix)(configuration, &prefix, bits) })?;
        }
        if let Some(mtu) = self.mtu {
            // SAFETY: as above.
            check(unsafe { (api.set_mtu)(configuration, mtu) })?;
        }
        if let Some(name) = &self.external_interface {
            let name = CString::new(name.as_str()).map_err(|_| Status::InvalidArgument)?;
            // SAFETY: as above; the name is a C string.
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
            // SAFETY: as above.
            unsafe { disable(configuration) }
        }
        for (mac, address) in &self.reservations {
            let (mac, address) = (mac.into_array(), in_addr_of(*address));
            // SAFETY: as above.
            check(unsafe { (api.add_dhcp_reservation)(configuration, &mac, &address) })?;
        }
        for rule in &self.forwards {
            let (family, bytes) = address(rule.internal_address);
            // The internal port comes first here, and last in the functions of an interface.
            // SAFETY: as above; the address has the bytes of its family.
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

fn in_addr_of(address: Ipv4Addr) -> in_addr {
    in_addr { s_addr: u32::from_ne_bytes(address.octets()) }
}

/// A configuration, released when dropped; vmnet copies what it says when it makes the network.
struct Configuration(ConfigurationRef, Networks);

// SAFETY: an object with one owner, not tied to a thread.
unsafe impl Send for Configuration {}

impl Configuration {
    fn new(api: Networks, mode: u32) -> Result<Self, Status> {
        let mut status = SUCCESS;
        // SAFETY: `status` is there to be written.
        let configuration = unsafe { (api.configuration_create)(mode, &mut status) };
        if configuration.is_null() {
            return Err(Status::from_code(status).unwrap_or(Status::Failure));
        }
        Ok(Self(configuration, api))
    }
}

impl Drop for Configuration {
    fn drop(&mut self) {
        // SAFETY: our reference, which the creation gave us.
        unsafe { (self.1.release)(self.0) }
    }
}

/// A network as it goes to another process: an XPC dictionary.
#[derive(Debug)]
pub struct SerializedNetwork(Owned);

impl SerializedNetwork {
    /// The `xpc_object_t`, to be sent in an XPC message; it lives as long as this value.
    pub fn as_xpc_object(&self) -> *mut c_void {
        self.0.as_raw()
    }

    /// Takes over what came in an XPC message.
    ///
    /// # Safety
    ///
    /// `object` is an `xpc_object_t` of which the caller gives up one reference.
    ///
    /// # Errors
    ///
    /// A null pointer is no object.
    pub unsafe fn from_xpc_object(object: *mut c_void) -> Result<Self, Error> {
        // SAFETY: as the caller says.
        let owned = unsafe { Owned::from_raw(object) };
        Ok(Self(owned.ok_or(Status::InvalidArgument)?))
    }
}

impl VmnetNetwork {
    /// Settings, then [`VmnetNetworkBuilder::create`]. Host or shared mode.
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

    fn adopt(api: Networks, network: NetworkRef, status: u32, mode: Mode) -> Result<Self, Status> {
        if network.is_null() {
            return Err(Status::from_code(status).unwrap_or(Status::Failure));
        }
        let network = Self(Arc::new(Inner { network, api, mode }));
        check(status).map(|()| network)
    }

    /// Host or shared.
    pub fn mode(&self) -> &Mode {
        &self.0.mode
    }

    /// The gateway's IPv4 address and the subnet mask.
    pub fn ipv4(&self) -> (Ipv4Addr, Ipv4Addr) {
        let mut addresses = [in_addr { s_addr: 0 }; 2];
        let [gateway, mask] = &mut addresses;
        // SAFETY: the network lives; both are there to be written.
        unsafe { (self.0.api.get_ipv4_subnet)(self.0.network, gateway, mask) }
        let [gateway, mask] = addresses.map(|address| address.s_addr.to_ne_bytes().into());
        (gateway, mask)
    }

    /// The IPv6 prefix and its length in bits.
    pub fn ipv6(&self) -> (Ipv6Addr, u8) {
        let mut prefix = in6_addr { s6_addr: [0; 16] };
        let mut bits = 0;
        // SAFETY: as in `ipv4`.
        unsafe { (self.0.api.get_ipv6_prefix)(self.0.network, &mut prefix, &mut bits) }
        (prefix.s6_addr.into(), bits)
    }

    /// The network for another process. It has to keep this one's existing while it starts.
    ///
    /// # Errors
    ///
    /// [`Error::Status`].
    pub fn serialize(&self) -> Result<SerializedNetwork, Error> {
        let mut status = SUCCESS;
        // SAFETY: the network lives; `status` is there to be written; the result is ours.
        let object = unsafe {
            Owned::from_raw((self.0.api.copy_serialization)(self.0.network, &mut status))
        };
        check(status)?;
        Ok(SerializedNetwork(object.ok_or(Status::Failure)?))
    }

    /// A network that another process has made. The mode is not part of what is told: say it.
    ///
    /// # Errors
    ///
    /// As [`VmnetNetworkBuilder::create`].
    pub fn deserialize(serialized: &SerializedNetwork, mode: Mode) -> Result<Self, Error> {
        let system = System::look();
        let api = system.networks()?;
        let mut status = SUCCESS;
        // SAFETY: the object lives; `status` is there to be written.
        let network =
            unsafe { (api.create_with_serialization)(serialized.0.as_raw(), &mut status) };
        Self::adopt(api, network, status, mode).map_err(|status| permission::error(status, &system))
    }

    /// Starts an interface on it.
    pub(crate) fn start(
        &self,
        description: &Dictionary,
        queue: &DispatchQueue,
        handler: &StartBlock,
    ) -> InterfaceRef {
        let Inner { network, api, .. } = &*self.0;
        // SAFETY: the network lives, and the types are the declared ones; handler and queue stay the
        // caller's until the handler has run.
        unsafe { (api.start_interface)(*network, description.as_raw(), queue, handler) }
    }
}
