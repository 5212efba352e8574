//! Port forwarding on interfaces, through the older functions and the newer ones.

use std::ptr;
use std::sync::mpsc::channel;

use block2::RcBlock;
use libc::in_addr;
use vmnet_sim::{Rules, World};

use crate::abi::{self, Pointer};
use crate::support::*;

const INET: u8 = 2;
const INET6: u8 = 30;

/// A rule as the tests write it: protocol, external port, address, internal port.
type Rule = (u8, u16, Vec<u8>, u16);

/// Calls a function that answers through a block. Returns its own status if it fails at once, else
/// the handler's.
fn ask(call: impl FnOnce(*const std::ffi::c_void) -> u32) -> u32 {
    let (handler, answers) = status_block();
    match call(block(&handler)) {
        SUCCESS => answers.recv_timeout(LONG).expect("the handler"),
        status => {
            assert!(answers.recv_timeout(SOON).is_err(), "it failed at once and called");
            status
        }
    }
}

fn add_old(of: &Interface, outside: u16, address: [u8; 4], inside: u16) -> u32 {
    let address = in_addr { s_addr: u32::from_ne_bytes(address) };
    // SAFETY: a handle, and a block that lives until it has been called.
    ask(|handler| unsafe {
        abi::vmnet_interface_add_port_forwarding_rule(
            of.handle, 6, outside, address, inside, handler,
        )
    })
}

fn remove_old(of: &Interface, outside: u16) -> u32 {
    // SAFETY: as in `add_old`.
    ask(|handler| unsafe {
        abi::vmnet_interface_remove_port_forwarding_rule(of.handle, 6, outside, handler)
    })
}

fn add(of: &Interface, family: u8, protocol: u8, outside: u16, address: &[u8], inside: u16) -> u32 {
    // SAFETY: as in `add_old`; the address has the bytes of its family.
    ask(|handler| unsafe {
        abi::vmnet_interface_add_ip_port_forwarding_rule(
            of.handle,
            protocol,
            outside,
            family,
            address.as_ptr().cast(),
            inside,
            handler,
        )
    })
}

fn remove(of: &Interface, family: u8, protocol: u8, outside: u16) -> u32 {
    // SAFETY: as in `add_old`.
    ask(|handler| unsafe {
        abi::vmnet_interface_remove_ip_port_forwarding_rule(
            of.handle, protocol, outside, family, handler,
        )
    })
}

/// The rules, or `None` if vmnet passes null.
fn list(of: &Interface, family: Option<u8>) -> Option<Vec<Rule>> {
    let (answer, answers) = channel();
    let handler = RcBlock::new(move |rules: Pointer| {
        // SAFETY: null, or an array that lives during this call; and so do its elements.
        let rules = (!rules.is_null()).then(|| unsafe {
            (0..abi::xpc_array_get_count(rules))
                .map(|i| details(abi::xpc_array_get_value(rules, i), family))
                .collect()
        });
        let _ = answer.send(rules);
    });
    // SAFETY: a handle, and a block that lives until it has been called.
    let status = unsafe {
        match family {
            Some(family) => abi::vmnet_interface_get_ip_port_forwarding_rules(
                of.handle,
                family,
                block(&handler),
            ),
            None => abi::vmnet_interface_get_port_forwarding_rules(of.handle, block(&handler)),
        }
    };
    assert_eq!(status, SUCCESS);
    answers.recv_timeout(LONG).expect("the handler")
}

/// # Safety
///
/// `rule` must be one of the rules of a list.
unsafe fn details(rule: Pointer, family: Option<u8>) -> Rule {
    let (mut protocol, mut outside, mut inside) = (0, 0, 0);
    let mut bytes = [0_u8; 16];
    // SAFETY: guaranteed by the caller; and there is space for each result.
    let status = unsafe {
        match family {
            Some(family) => abi::vmnet_ip_port_forwarding_rule_get_details(
                rule,
                &mut protocol,
                &mut outside,
                family,
                bytes.as_mut_ptr().cast(),
                &mut inside,
            ),
            None => abi::vmnet_port_forwarding_rule_get_details(
                rule,
                &mut protocol,
                &mut outside,
                bytes.as_mut_ptr().cast(),
                &mut inside,
            ),
        }
    };
    assert_eq!(status, SUCCESS);
    let len = if family == Some(INET6) { 16 } else { 4 };
    (protocol, outside, bytes[..len].to_vec(), inside)
}

#[test]
fn the_older_functions_keep_rules() {
    guarded(|| {
        let world = World::new();
        world.set_host(|host| host.macos = (11, 0));
        let of = Start::of(&Description::shared(world.interface_id())).interface();
        assert_eq!(list(&of, None), None);
        assert_eq!(add_old(&of, 8080, [192, 168, 64, 2], 80), SUCCESS);
        assert_eq!(add_old(&of, 8081, [192, 168, 64, 3], 81), SUCCESS);
        assert_eq!(add_old(&of, 8080, [192, 168, 64, 9], 80), FAILURE);
        let first = (6, 8080, vec![192, 168, 64, 2], 80);
        let second = (6, 8081, vec![192, 168, 64, 3], 81);
        assert_eq!(list(&of, None), Some(vec![first, second.clone()]));
        assert_eq!(remove_old(&of, 8080), SUCCESS);
        assert_eq!(remove_old(&of, 8080), FAILURE);
        assert_eq!(list(&of, None), Some(vec![second]));
        // In these two functions the handler may be null (vmnet.h).
        let address = in_addr { s_addr: 0 };
        // SAFETY: a handle, and no block.
        unsafe {
            let add = abi::vmnet_interface_add_port_forwarding_rule;
            assert_eq!(add(of.handle, 17, 53, address, 53, ptr::null()), SUCCESS);
            let remove = abi::vmnet_interface_remove_port_forwarding_rule;
            assert_eq!(remove(of.handle, 17, 53, ptr::null()), SUCCESS);
        }
        assert_eq!(list(&of, None).map(|rules| rules.len()), Some(1));
        assert_eq!(of.stop(), SUCCESS);
        drop(of);
        assert!(world.unreleased(LONG).is_empty());
    });
}

#[test]
fn the_newer_functions_keep_rules_of_both_families() {
    guarded(|| {
        let (_world, _, of) = one(|_| ());
        let (four, six) = ([192, 168, 64, 2], [0xfd; 16]);
        assert_eq!(add(&of, INET, 6, 8080, &four, 80), SUCCESS);
        assert_eq!(add(&of, INET6, 6, 8080, &six, 80), SUCCESS);
        assert_eq!(add(&of, INET6, 17, 8080, &six, 80), SUCCESS);
        assert_eq!(add(&of, INET6, 17, 8080, &six, 80), FAILURE);
        assert_eq!(add(&of, INET, 1, 8080, &four, 80), FAILURE);
        assert_eq!(list(&of, Some(INET)), Some(vec![(6, 8080, four.to_vec(), 80)]));
        let both = [6, 17].map(|protocol| (protocol, 8080, six.to_vec(), 80));
        assert_eq!(list(&of, Some(INET6)), Some(both.to_vec()));
        // The older functions only see the IPv4 rules.
        assert_eq!(list(&of, None).map(|rules| rules.len()), Some(1));
        assert_eq!(remove(&of, INET, 17, 8080), FAILURE);
        assert_eq!(remove(&of, INET, 6, 8080), SUCCESS);
        assert_eq!(list(&of, Some(INET)), None);
    });
}

#[test]
fn an_unknown_family_is_answered_where_the_world_answers() {
    guarded(|| {
        let world = World::with(Rules::Answers, true);
        let of = Start::of(&Description::shared(world.interface_id())).interface();
        assert_eq!(add(&of, 10, 6, 80, &[0; 16], 80), INVALID_ARGUMENT);
    });
}
