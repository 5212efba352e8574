//! Port forwarding: ports of the host that lead to a guest.
//!
//! vmnet has two generations of these functions. The newer ones know IPv6 and are used where the
//! system has them.
//!
//! Each function here borrows a [`StartedInterface`], and so its interface runs during the call:
//! see the invariant at [`StartedInterface`]. The borrow comes from `VmnetDevice::with_started`,
//! which holds the lock that the device's `stop` needs, or from `VmnetDevice::restart`, which owns
//! the new interface.

use std::ffi::c_void;
use std::mem::forget;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::mpsc::sync_channel;

use block2::RcBlock;
use libc::in_addr;

use super::address::address;
use super::availability::{IpForwarding, System};
use super::events::check;
use super::ffi::{
    AF_INET, AF_INET6, Object, ObjectBlock, StatusBlock, vmnet_interface_add_port_forwarding_rule,
    vmnet_interface_get_port_forwarding_rules, vmnet_interface_remove_port_forwarding_rule,
    vmnet_port_forwarding_rule_get_details,
};
use super::limits::FORWARDING_TIMEOUT;
use super::started::StartedInterface;
use super::xpc::Borrowed;
use crate::config::{PortForward, Protocol};
use crate::error::Error;

/// Calls a function that answers through a block, and waits for the answer.
///
/// # Errors
///
/// [`Error::Status`] with the status that the function returned at once or gave to the block;
/// [`Error::Timeout`] if no answer came in time. The block is leaked then.
fn ask(call: impl FnOnce(&StatusBlock) -> u32) -> Result<(), Error> {
    let (answer, answers) = sync_channel(1);
    let handler = RcBlock::new(move |status: u32| {
        let _ = answer.try_send(status);
    });
    check(call(&handler))?;
    match answers.recv_timeout(FORWARDING_TIMEOUT) {
        Ok(status) => Ok(check(status)?),
        Err(_) => {
            // vmnet may still call the block, so it must live on.
            forget(handler);
            Err(Error::Timeout(FORWARDING_TIMEOUT))
        }
    }
}

impl Protocol {
    /// Returns the protocol's number in an IP header (IANA).
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
        }
    }

    /// Returns the protocol with this number, if it is one that can be forwarded.
    fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            _ => None,
        }
    }
}

/// The error for IPv6 on a system without the newer functions.
fn needs_newer() -> Error {
    Error::NeedsMacos { what: "forwarding a port over IPv6", version: "12" }
}

/// Adds a rule.
///
/// # Errors
///
/// [`Error::Status`], [`Error::Timeout`], and [`Error::NeedsMacos`] for IPv6 before macOS 12.
pub(crate) fn add(
    started: &StartedInterface,
    system: &System,
    rule: &PortForward,
) -> Result<(), Error> {
    let (family, bytes) = address(rule.internal_address);
    let (protocol, outside, inside) =
        (rule.protocol.number(), rule.external_port, rule.internal_port);
    match (system.forwarding, rule.internal_address) {
        (Some(newer), _) => ask(|handler| {
            let bytes = bytes.as_ptr().cast::<c_void>();
            // SAFETY: the interface runs, because we borrow its `StartedInterface`. `bytes` holds
            // 16 bytes, enough for either family, and `address` has put those of `family` there.
            unsafe {
                (newer.add)(
                    started.interface(),
                    protocol,
                    outside,
                    family,
                    bytes,
                    inside,
                    Some(handler),
                )
            }
        }),
        (None, IpAddr::V4(inner)) => ask(|handler| {
            let inner = in_addr { s_addr: u32::from_ne_bytes(inner.octets()) };
            // SAFETY: the interface runs, because we borrow its `StartedInterface`.
            unsafe {
                vmnet_interface_add_port_forwarding_rule(
                    started.interface(),
                    protocol,
                    outside,
                    inner,
                    inside,
                    Some(handler),
                )
            }
        }),
        (None, IpAddr::V6(_)) => Err(needs_newer()),
    }
}

/// Removes the rule for that external port, whether it is for IPv4 or for IPv6.
///
/// # Errors
///
/// [`Error::Status`] and [`Error::Timeout`].
pub(crate) fn remove(
    started: &StartedInterface,
    system: &System,
    protocol: Protocol,
    outside: u16,
) -> Result<(), Error> {
    let protocol = protocol.number();
    let Some(newer) = system.forwarding else {
        return ask(|handler| {
            // SAFETY: the interface runs, because we borrow its `StartedInterface`.
            unsafe {
                vmnet_interface_remove_port_forwarding_rule(
                    started.interface(),
                    protocol,
                    outside,
                    Some(handler),
                )
            }
        });
    };
    let remove = |family| {
        ask(|handler| {
            // SAFETY: the interface runs, because we borrow its `StartedInterface`.
            unsafe { (newer.remove)(started.interface(), protocol, outside, family, Some(handler)) }
        })
    };
    // The rule is for one of the two families. To remove a rule that does not exist is an error
    // (the tests of the crate `vmnet` 0.10 show it on macOS 26), so one success of the two is
    // enough.
    let (four, six) = (remove(AF_INET), remove(AF_INET6));
    four.or(six)
}

/// Returns the rules of both families. Without the newer functions, those are the rules for IPv4.
///
/// # Errors
///
/// [`Error::Status`] and [`Error::Timeout`].
pub(crate) fn list(started: &StartedInterface, system: &System) -> Result<Vec<PortForward>, Error> {
    let Some(newer) = system.forwarding else {
        let get = |handler: &ObjectBlock| {
            // SAFETY: the interface runs, because we borrow its `StartedInterface`.
            unsafe { vmnet_interface_get_port_forwarding_rules(started.interface(), handler) }
        };
        return fetch(get, old_details);
    };
    let mut rules = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let get = |handler: &ObjectBlock| {
            // SAFETY: the interface runs, because we borrow its `StartedInterface`.
            unsafe { (newer.get)(started.interface(), family, handler) }
        };
        rules.extend(fetch(get, move |rule| new_details(newer, family, rule))?);
    }
    Ok(rules)
}

/// Asks for the rules. The block reads them with `details`, because they live only during its call.
///
/// # Errors
///
/// [`Error::Status`] and [`Error::Timeout`]. After a timeout the block is leaked.
fn fetch(
    get: impl FnOnce(&ObjectBlock) -> u32,
    details: impl Fn(Borrowed<'_>) -> Option<PortForward> + Send + 'static,
) -> Result<Vec<PortForward>, Error> {
    let (answer, answers) = sync_channel(1);
    let handler = RcBlock::new(move |rules: Object| {
        // SAFETY: vmnet.h gives the block null, if there are no rules, or an array. vmnet keeps its
        // reference to the array during the block's call, and `Borrowed` is dropped before that
        // ends.
        let rules = unsafe { Borrowed::from_raw(rules) };
        let rules: Vec<_> =
            rules.into_iter().flat_map(Borrowed::elements).filter_map(&details).collect();
        let _ = answer.try_send(rules);
    });
    check(get(&handler))?;
    match answers.recv_timeout(FORWARDING_TIMEOUT) {
        Ok(rules) => Ok(rules),
        Err(_) => {
            // vmnet may still call the block, so it must live on.
            forget(handler);
            Err(Error::Timeout(FORWARDING_TIMEOUT))
        }
    }
}

/// Reads a rule with the function of macOS 10.15; `None` if vmnet refuses or the protocol is
/// unknown.
fn old_details(rule: Borrowed<'_>) -> Option<PortForward> {
    let (mut protocol, mut external_port, mut internal_port) = (0, 0, 0);
    let mut inner = in_addr { s_addr: 0 };
    // SAFETY: the rule lives, by the lifetime of `Borrowed`. Each pointer is to a local variable of
    // the type that vmnet.h declares.
    let status = unsafe {
        vmnet_port_forwarding_rule_get_details(
            rule.as_raw(),
            &mut protocol,
            &mut external_port,
            &mut inner,
            &mut internal_port,
        )
    };
    check(status).ok()?;
    Some(PortForward {
        protocol: Protocol::from_number(protocol)?,
        external_port,
        internal_address: Ipv4Addr::from(inner.s_addr.to_ne_bytes()).into(),
        internal_port,
    })
}

/// Reads a rule of the given family with the newer function; `None` if vmnet refuses or the
/// protocol is unknown.
fn new_details(newer: IpForwarding, family: u8, rule: Borrowed<'_>) -> Option<PortForward> {
    let (mut protocol, mut external_port, mut internal_port) = (0, 0, 0);
    let mut bytes = [0_u8; 16];
    // SAFETY: the rule lives, by the lifetime of `Borrowed`. Each pointer is to a local variable of
    // the declared type; the 16 bytes for the address are enough for either family.
    let status = unsafe {
        (newer.details)(
            rule.as_raw(),
            &mut protocol,
            &mut external_port,
            family,
            bytes.as_mut_ptr().cast(),
            &mut internal_port,
        )
    };
    check(status).ok()?;
    let internal_address = if family == AF_INET {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    } else {
        Ipv6Addr::from(bytes).into()
    };
    let protocol = Protocol::from_number(protocol)?;
    Some(PortForward { protocol, external_port, internal_address, internal_port })
}
