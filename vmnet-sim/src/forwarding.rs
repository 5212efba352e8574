//! Port forwarding of both generations. Nothing is forwarded: the rules are kept.

use std::ffi::c_void;
use std::thread;

use libc::in_addr;

use crate::availability::require;
use crate::blocks::GivenBlock;
use crate::interface::{self, Interface};
use crate::objects::{lock, violation};
use crate::rules::{INET, Rule, address, address_len};
use crate::status::{FAILURE, INVALID_ARGUMENT, SUCCESS};
use crate::xpc::{self, Handle, Object};

impl Interface {
    /// Whether forwarding is for it; else the functions fail at once, without their handler.
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

/// Calls a handler from a thread of vmnet's own. There is no queue in these functions.
///
/// # Safety
///
/// `handler` is a block, or nothing that lives, which is told; in the older functions null means that
/// nobody wants to know.
unsafe fn answer(interface: &Interface, handler: *const c_void, status: u32, older: bool) -> u32 {
    if older && handler.is_null() {
        return SUCCESS;
    }
    // SAFETY: as the caller says.
    let handler = unsafe { GivenBlock::new(handler, "the forwarding's handler", true) };
    interface.world().track(handler.life(), "the forwarding's handler");
    thread::spawn(move || handler.call_status(status));
    SUCCESS
}

/// # Safety
///
/// As [`answer`].
unsafe fn answer_rules(interface: &Interface, handler: *const c_void, family: u8) -> u32 {
    let rules = lock(&interface.rules);
    let handle = |rule: &Rule| Handle::new(Object::Opaque(Box::new(rule.clone())));
    let rules: Vec<Handle> =
        rules.iter().filter(|rule| rule.family == family).map(handle).collect();
    // SAFETY: as the caller says.
    let handler = unsafe { GivenBlock::new(handler, "the rules' handler", true) };
    interface.world().track(handler.life(), "the rules' handler");
    thread::spawn(move || {
        // None is null.
        let array = (!rules.is_empty()).then(|| Handle::new(Object::Array(rules)));
        handler.call_object(array.as_ref().map_or(std::ptr::null_mut(), Handle::as_raw));
    });
    SUCCESS
}

/// # Safety
///
/// `interface` is a handle, `inner` points at an address of that family, and `handler` is as in
/// [`answer`]; so in all that follow.
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
    // SAFETY: as the caller says.
    let Some(address) = (unsafe { address(inner, family) }) else {
        return interface.world().misuse("an unknown address family", INVALID_ARGUMENT);
    };
    let (protocol, outside, inside) = rule;
    let status = interface.add(Rule { protocol, outside, family, address, inside });
    // SAFETY: as the caller says.
    unsafe { answer(interface, handler, status, older) }
}

/// # Safety
///
/// As [`add`].
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
    // SAFETY: as the caller says.
    unsafe { answer(interface, handler, status, older) }
}

/// # Safety
///
/// As [`add`].
unsafe fn get(interface: &Interface, family: u8, handler: *const c_void) -> u32 {
    if !interface.forwards() {
        return FAILURE;
    }
    // SAFETY: as the caller says.
    unsafe { answer_rules(interface, handler, family) }
}

/// # Safety
///
/// As [`add`].
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
    // SAFETY: as the caller says; the address is an IPv4 one.
    unsafe {
        let interface = interface::borrow(interface, "adding a forwarding");
        add(interface, (protocol, outside, inside), INET, inner.as_ptr().cast(), handler, true)
    }
}

/// # Safety
///
/// As [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_remove_port_forwarding_rule(
    interface: *mut c_void,
    protocol: u8,
    outside: u16,
    handler: *const c_void,
) -> u32 {
    // SAFETY: as the caller says.
    unsafe {
        let interface = interface::borrow(interface, "removing a forwarding");
        remove(interface, (protocol, outside), INET, handler, true)
    }
}

/// # Safety
///
/// As [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_get_port_forwarding_rules(
    interface: *mut c_void,
    handler: *const c_void,
) -> u32 {
    // SAFETY: as the caller says.
    unsafe { get(interface::borrow(interface, "listing forwardings"), INET, handler) }
}

/// # Safety
///
/// `rule` is one of the rules of a handler's call; the others point at room for what they name.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_port_forwarding_rule_get_details(
    rule: *mut c_void,
    protocol: *mut u8,
    outside: *mut u16,
    inner: *mut in_addr,
    inside: *mut u16,
) -> u32 {
    // SAFETY: as the caller says.
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
/// As [`add`].
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
    // SAFETY: as the caller says.
    unsafe {
        let interface = interface::borrow(interface, "adding a forwarding");
        require(interface.world().host().macos, c"vmnet_interface_add_ip_port_forwarding_rule");
        add(interface, (protocol, outside, inside), family, inner, handler, false)
    }
}

/// # Safety
///
/// As [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_remove_ip_port_forwarding_rule(
    interface: *mut c_void,
    protocol: u8,
    outside: u16,
    family: u8,
    handler: *const c_void,
) -> u32 {
    // SAFETY: as the caller says.
    unsafe {
        let interface = interface::borrow(interface, "removing a forwarding");
        require(interface.world().host().macos, c"vmnet_interface_remove_ip_port_forwarding_rule");
        remove(interface, (protocol, outside), family, handler, false)
    }
}

/// # Safety
///
/// As [`add`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_interface_get_ip_port_forwarding_rules(
    interface: *mut c_void,
    family: u8,
    handler: *const c_void,
) -> u32 {
    // SAFETY: as the caller says.
    unsafe {
        let interface = interface::borrow(interface, "listing forwardings");
        require(interface.world().host().macos, c"vmnet_interface_get_ip_port_forwarding_rules");
        get(interface, family, handler)
    }
}

/// # Safety
///
/// As [`vmnet_port_forwarding_rule_get_details`].
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn vmnet_ip_port_forwarding_rule_get_details(
    rule: *mut c_void,
    protocol: *mut u8,
    outside: *mut u16,
    family: u8,
    inner: *mut c_void,
    inside: *mut u16,
) -> u32 {
    // SAFETY: as the caller says.
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
    // SAFETY: as the caller says.
    unsafe {
        *protocol = rule.protocol;
        *outside = rule.outside;
        inner.cast::<u8>().copy_from_nonoverlapping(rule.address.as_ptr(), len);
        *inside = rule.inside;
    }
    SUCCESS
}
