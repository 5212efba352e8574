//! Port forwarding, through the older functions and the newer ones. Nothing is forwarded: the
//! simulator only keeps the rules.

use std::ffi::c_void;

use libc::in_addr;

use crate::availability::require;
use crate::blocks::GivenBlock;
use crate::interface::{self, Interface};
use crate::objects::{lock, violation};
use crate::rules::{INET, Rule, address, address_len};
use crate::status::{FAILURE, INVALID_ARGUMENT, SUCCESS};
use crate::threads::spawn;
use crate::xpc::{self, Handle, Object};

impl Interface {
    /// Whether port forwarding applies to this interface. If not, the functions fail at once and
    /// never call their handler.
    fn forwards(&self) -> bool {
        self.is_running() && lock(&self.network).is_none()
    }

    fn add(&self, rule: Rule) -> u32 {
        let mut rules = lock(&self.rules);
        let same = |known: &Rule| {
            (known.protocol, known.outside, known.family)
                == (rule.protocol, rule.outside, rule.family)
        };
        if rules.iter().any(same) || !matches!(rule.protocol, 6 | 17) {
            return FAILURE;
        }
        rules.push(rule);
        SUCCESS
    }

    fn remove(&self, protocol: u8, outside: u16, family: u8) -> u32 {
        let mut rules = lock(&self.rules);
        let before = rules.len();
        rules.retain(|rule| {
            (rule.protocol, rule.outside, rule.family) != (protocol, outside, family)
        });
        if rules.len() < before { SUCCESS } else { FAILURE }
    }
}

/// Calls a handler from a thread of vmnet's own, because these functions take no queue.
///
/// # Safety
///
/// `handler` must be null or point at a block. The simulator aborts if it is null or a released
/// heap block; but in the older functions null is allowed and means that no answer is wanted.
unsafe fn answer(interface: &Interface, handler: *const c_void, status: u32, older: bool) -> u32 {
    if older && handler.is_null() {
        return SUCCESS;
    }
    // SAFETY: guaranteed by the caller.
    let handler = unsafe { GivenBlock::new(handler, "the forwarding's handler", true) };
    interface.world().track(handler.life(), "the forwarding's handler");
    spawn("vmnet-sim-answer", move || handler.call_status(status));
    SUCCESS
}

/// # Safety
///
/// The caller keeps the contract of [`answer`].
unsafe fn answer_rules(interface: &Interface, handler: *const c_void, family: u8) -> u32 {
    let rules = lock(&interface.rules);
    let handle = |rule: &Rule| Handle::new(Object::Opaque(Box::new(rule.clone())));
    let rules: Vec<Handle> =
        rules.iter().filter(|rule| rule.family == family).map(handle).collect();
    // SAFETY: guaranteed by the caller.
    let handler = unsafe { GivenBlock::new(handler, "the rules' handler", true) };
    interface.world().track(handler.life(), "the rules' handler");
    spawn("vmnet-sim-answer", move || {
        // vmnet passes null instead of an empty list.
        let array = (!rules.is_empty()).then(|| Handle::new(Object::Array(rules)));
        handler.call_object(array.as_ref().map_or(std::ptr::null_mut(), Handle::as_raw));
    });
    SUCCESS
}

/// # Safety
///
/// `interface` must be a handle from a start of this process. `inner` must point at an address of
/// this family. For `handler` see [`answer`]. The functions below have the same contract.
unsafe fn add(
    interface: &Interface,
    rule: (u8, u16, u16),
    family: u8,
    inner: *const c_void,
    handler: *const c_void,
    older: bool,
) -> u32 {
    if !interface.forwards() {
        return FAILURE;
    }
    // SAFETY: guaranteed by the caller.
    let Some(address) = (unsafe { address(inner, family) }) else {
        return interface.world().misuse("an unknown address family", INVALID_ARGUMENT);
    };
    let (protocol, outside, inside) = rule;
    let status = interface.add(Rule { protocol, outside, family, address, inside });
    // SAFETY: guaranteed by the caller.
    unsafe { answer(interface, handler, status, older) }
}

/// # Safety
///
/// As for [`add`].
unsafe fn remove(
    interface: &Interface,
    (protocol, outside): (u8, u16),
    family: u8,
    handler: *const c_void,
    older: bool,
) -> u32 {
    if !interface.forwards() {
        return FAILURE;
    }
    let status = interface.remove(protocol, outside, family);
    // SAFETY: guaranteed by the caller.
    unsafe { answer(interface, handler, status, older) }
}

/// # Safety
///
/// As for [`add`].
unsafe fn get(interface: &Interface, family: u8, handler: *const c_void) -> u32 {
    if !interface.forwards() {
        return FAILURE;
    }
    // SAFETY: guaranteed by the caller.
    unsafe { answer_rules(interface, handler, family) }
}

/// # Safety
///
/// As for [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_add_port_forwarding_rule(
    interface: *mut c_void,
    protocol: u8,
    outside: u16,
    inner: in_addr,
    inside: u16,
    handler: *const c_void,
) -> u32 {
    let inner = inner.s_addr.to_ne_bytes();
    // SAFETY: guaranteed by the caller; the address is an IPv4 address.
    unsafe {
        let interface = interface::borrow(interface, "adding a forwarding");
        add(interface, (protocol, outside, inside), INET, inner.as_ptr().cast(), handler, true)
    }
}

/// # Safety
///
/// As for [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_remove_port_forwarding_rule(
    interface: *mut c_void,
    protocol: u8,
    outside: u16,
    handler: *const c_void,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let interface = interface::borrow(interface, "removing a forwarding");
        remove(interface, (protocol, outside), INET, handler, true)
    }
}

/// # Safety
///
/// As for [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_get_port_forwarding_rules(
    interface: *mut c_void,
    handler: *const c_void,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    unsafe { get(interface::borrow(interface, "listing forwardings"), INET, handler) }
}

/// # Safety
///
/// `rule` must be one of the rules that a handler was called with. The other pointers must be valid
/// for writing what they name.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_port_forwarding_rule_get_details(
    rule: *mut c_void,
    protocol: *mut u8,
    outside: *mut u16,
    inner: *mut in_addr,
    inside: *mut u16,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    unsafe {
        vmnet_ip_port_forwarding_rule_get_details(
            rule,
            protocol,
            outside,
            INET,
            inner.cast(),
            inside,
        )
    }
}

/// # Safety
///
/// As for [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_add_ip_port_forwarding_rule(
    interface: *mut c_void,
    protocol: u8,
    outside: u16,
    family: u8,
    inner: *const c_void,
    inside: u16,
    handler: *const c_void,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let interface = interface::borrow(interface, "adding a forwarding");
        require(interface.world().host().macos, c"vmnet_interface_add_ip_port_forwarding_rule");
        add(interface, (protocol, outside, inside), family, inner, handler, false)
    }
}

/// # Safety
///
/// As for [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_remove_ip_port_forwarding_rule(
    interface: *mut c_void,
    protocol: u8,
    outside: u16,
    family: u8,
    handler: *const c_void,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let interface = interface::borrow(interface, "removing a forwarding");
        require(interface.world().host().macos, c"vmnet_interface_remove_ip_port_forwarding_rule");
        remove(interface, (protocol, outside), family, handler, false)
    }
}

/// # Safety
///
/// As for [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_get_ip_port_forwarding_rules(
    interface: *mut c_void,
    family: u8,
    handler: *const c_void,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let interface = interface::borrow(interface, "listing forwardings");
        require(interface.world().host().macos, c"vmnet_interface_get_ip_port_forwarding_rules");
        get(interface, family, handler)
    }
}

/// # Safety
///
/// As for [`vmnet_port_forwarding_rule_get_details`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_ip_port_forwarding_rule_get_details(
    rule: *mut c_void,
    protocol: *mut u8,
    outside: *mut u16,
    family: u8,
    inner: *mut c_void,
    inside: *mut u16,
) -> u32 {
    // SAFETY: guaranteed by the caller.
    let (object, _) = unsafe { xpc::borrow(rule, "a forwarding rule") };
    let rule = match object {
        Object::Opaque(rule) => rule.downcast_ref::<Rule>(),
        _ => None,
    };
    let Some(rule) = rule else { violation("the details of what is no forwarding rule") };
    if rule.family != family {
        return INVALID_ARGUMENT;
    }
    let len = address_len(family).unwrap_or(0);
    // SAFETY: guaranteed by the caller.
    unsafe {
        *protocol = rule.protocol;
        *outside = rule.outside;
        inner.cast::<u8>().copy_from_nonoverlapping(rule.address.as_ptr(), len);
        *inside = rule.inside;
    }
    SUCCESS
}
