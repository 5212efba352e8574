//! Names: what guests ask the gateway by DNS, and what they are called.

use std::net::IpAddr;

use smoltcp::wire::IpAddress;
use vmring::device::embedded::nat::{Counter, NatControl, NatSettings};

use super::guest::Guest;
use super::{GATEWAY, join};
use crate::support::{guarded, stage, unique};

/// A query of DNS for a name.
pub(super) fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    query
}

// Types of records (RFC 1035, 3.2.2; RFC 3596, 2.1).
pub(super) const A: u16 = 1;
const PTR: u16 = 12;
pub(super) const AAAA: u16 = 28;

/// Asks the gateway, and returns the code and the data of the first answer.
pub(super) fn ask(guest: &mut Guest, at: IpAddr, name: &str, kind: u16) -> (u8, Vec<u8>) {
    let port = 10_000 + (guest.asked % 40_000);
    guest.asked += 1;
    let socket = guest.udp_at(port);
    let question = query(name, kind);
    guest.udp(socket).send_slice(&question, (IpAddress::from(at), 53)).expect("space");
    let answer = guest.until(&format!("the answer about {name}"), |guest| {
        guest.udp(socket).recv().ok().map(|(bytes, _)| bytes.to_vec())
    });
    guest.close(socket);
    read_answer(&answer, question.len())
}

fn read_answer(answer: &[u8], question: usize) -> (u8, Vec<u8>) {
    assert_eq!(answer[..2], [0x12, 0x34]);
    let code = answer[3] & 0xf;
    if answer[6..8] == [0, 0] {
        return (code, Vec::new());
    }
    // A pointer to the name, the type, the class, the time to live, and a length (RFC 1035, 3.2.1).
    let record = &answer[question..];
    assert_eq!(record[0] & 0xc0, 0xc0);
    let len = usize::from(u16::from_be_bytes([record[10], record[11]]));
    (code, record[12..12 + len].to_vec())
}

/// Goal: guests find each other by the names that they call themselves in DHCP, with and without the domain,
/// and back; a guest takes nobody's name, and has its own as long as it is there.
#[test]
fn guests_are_found_by_their_names() {
    guarded(|| {
        let (name, control) = (unique("names"), NatControl::default());
        let settings = NatSettings::new();
        let join = || join(&name, &settings, &control);
        let mut web = Guest::with_dhcp_as(join(), b"Web.example.com");
        let mut other = Guest::with_dhcp_as(join(), b"db");
        let gateway = IpAddr::from(GATEWAY);
        let (of_web, of_db) = (web.address(), other.address());
        for (name, kind, address) in [
            ("web.internal", A, of_web.octets().to_vec()),
            ("WEB", A, of_web.octets().to_vec()),
            ("db.internal", A, of_db.octets().to_vec()),
            ("web.internal", AAAA, vec![]),
        ] {
            assert_eq!(ask(&mut other, gateway, name, kind), (0, address), "{name}");
        }
        let [a, b, c, d] = of_web.octets();
        let reverse = format!("{d}.{c}.{b}.{a}.in-addr.arpa");
        let pointer = b"\x03web\x08internal\0".to_vec();
        assert_eq!(ask(&mut other, gateway, &reverse, PTR), (0, pointer));

        stage("names that are refused");
        let refused = || control.report().expect("a report").counters[Counter::NameRefused];
        for (hostile, count) in
            [(&b"WEB"[..], 1), (b"host", 2), (b"gateway.internal", 3), (b"wpad", 4)]
        {
            let guest = Guest::with_dhcp_as(join(), hostile);
            other.until("a refusal", |_| {
                // The thread looks when it is awake.
                let _ = control.report();
                (refused() == count).then_some(())
            });
            assert_eq!(ask(&mut other, gateway, "web.internal", A), (0, of_web.octets().to_vec()));
            drop(guest);
        }
        assert_eq!(ask(&mut other, gateway, "host.internal", A), (0, vec![192, 168, 64, 1]));
        assert_eq!(ask(&mut other, gateway, "wpad.internal", A), (3, vec![]));
        let bad = Guest::with_dhcp_as(join(), b"../a b");
        assert_eq!(bad.counter("DHCP bad names"), 1);

        stage("the guest leaves");
        web.turn();
        drop(web);
        other.until("its name is nobody's", |other| {
            (ask(other, gateway, "web.internal", A).0 == 3).then_some(())
        });
        // Now somebody else may have it.
        let next = Guest::with_dhcp_as(join(), b"web");
        let address = next.address().octets().to_vec();
        other.until("it is the next one's", |other| {
            (ask(other, gateway, "web.internal", A).1 == address).then_some(())
        });
    });
}
