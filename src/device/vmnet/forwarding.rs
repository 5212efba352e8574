//! Ports of the host that lead to a guest. Both generations of functions: the newer ones know IPv6.

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

/// Calls a function that answers through a block; the answer, or the status it failed with at once.
fn ask(call: impl FnOnce(&StatusBlock) -> u32) -> Result<(), Error> {
    let (answer, answers) = sync_channel(1);
    let handler = RcBlock::new(move |status: u32| {
        let _ = answer.try_send(status);
    });
    check(call(&handler))?;
    match answers.recv_timeout(FORWARDING_TIMEOUT) {
        Ok(status) => Ok(check(status)?),
        Err(_) => {
            // It may still be called.
            forget(handler);
            Err(Error::Timeout(FORWARDING_TIMEOUT))
        }
    }
}

impl Protocol {
    /// Its number in an IP header (IANA).
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Protocol::Tcp),
            17 => Some(Protocol::Udp),
            _ => None,
        }
    }
}

fn needs_newer() -> Error {
    Error::NeedsMacos { what: "forwarding a port over IPv6", version: "12" }
}

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
            // SAFETY: the interface runs; the address has the bytes of its family.
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
            // SAFETY: the interface runs.
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

/// Ends the rule of that port, of whichever family it is.
pub(crate) fn remove(
    started: &StartedInterface,
    system: &System,
    protocol: Protocol,
    outside: u16,
) -> Result<(), Error> {
    let protocol = protocol.number();
    let Some(newer) = system.forwarding else {
        return ask(|handler| {
            // SAFETY: the interface runs.
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
            // SAFETY: the interface runs.
            unsafe { (newer.remove)(started.interface(), protocol, outside, family, Some(handler)) }
        })
    };
    // A rule that is not there is an error (measured), so one success is a success.
    let (four, six) = (remove(AF_INET), remove(AF_INET6));
    four.or(six)
}

pub(crate) fn list(started: &StartedInterface, system: &System) -> Result<Vec<PortForward>, Error> {
    let Some(newer) = system.forwarding else {
        let get = |handler: &ObjectBlock| {
            // SAFETY: the interface runs.
            unsafe { vmnet_interface_get_port_forwarding_rules(started.interface(), handler) }
        };
        return fetch(get, old_details);
    };
    let mut rules = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let get = |handler: &ObjectBlock| {
            // SAFETY: the interface runs.
            unsafe { (newer.get)(started.interface(), family, handler) }
        };
        rules.extend(fetch(get, move |rule| new_details(newer, family, rule))?);
    }
    Ok(rules)
}

/// Asks for rules and reads each inside the block, while it lives.
fn fetch(
    get: impl FnOnce(&ObjectBlock) -> u32,
    details: impl Fn(Borrowed<'_>) -> Option<PortForward> + Send + 'static,
) -> Result<Vec<PortForward>, Error> {
    let (answer, answers) = sync_channel(1);
    let handler = RcBlock::new(move |rules: Object| {
        // SAFETY: null, which means no rules, or an array that lives during this call.
        let rules = unsafe { Borrowed::from_raw(rules) };
        let rules: Vec<_> =
            rules.into_iter().flat_map(Borrowed::elements).filter_map(&details).collect();
        let _ = answer.try_send(rules);
    });
    check(get(&handler))?;
    match answers.recv_timeout(FORWARDING_TIMEOUT) {
        Ok(rules) => Ok(rules),
        Err(_) => {
            forget(handler);
            Err(Error::Timeout(FORWARDING_TIMEOUT))
        }
    }
}

fn old_details(rule: Borrowed<'_>) -> Option<PortForward> {
    let (mut protocol, mut external_port, mut internal_port) = (0, 0, 0);
    let mut inner = in_addr { s_addr: 0 };
    // SAFETY: the rule lives, and there is room for each detail.
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

fn new_details(newer: IpForwarding, family: u8, rule: Borrowed<'_>) -> Option<PortForward> {
    let (mut protocol, mut external_port, mut internal_port) = (0, 0, 0);
    let mut bytes = [0_u8; 16];
    // SAFETY: as in `old_details`; 16 bytes are room for either family.
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
