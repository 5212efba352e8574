//! DNS at the gateway, over the model of the kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;
use vmring_core::offload::{Gso, OffloadHeader};
use vmring_nat::{
    Counter, DatagramError, ForwardRule, Guest, GuestFrame, NatConfig, Policy, Port, Protocol,
    Request, Resolvers, SocketError, Verdict,
};

use crate::support::datagram::{Got, Receiver, udp_frame};
use crate::support::kernel::Answer;
use crate::support::port::{GUEST_MAC, Net, PORT, config, plain_link};
use crate::support::script::{Script, Segment};

pub(crate) const A: u16 = 1;
const PTR: u16 = 12;
const AAAA: u16 = 28;

/// A guest that asks the gateway.
struct Asker {
    net: Net,
    receiver: Receiver,
    guest: SocketAddr,
    gateway: SocketAddr,
}

fn resolver(n: u8) -> SocketAddr {
    // The usual one of a host with systemd-resolved comes first.
    let list = ["127.0.0.53:53", "192.0.2.53:53", "[2001:db8::53]:53", "[::1]:53"];
    list[usize::from(n)].parse().unwrap()
}

fn fixed(list: &[u8]) -> Resolvers {
    Resolvers::Fixed(list.iter().map(|&n| resolver(n)).collect())
}

fn message(id: u16, flags: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [id, flags, 1, 0, 0, 0] {
        bytes.extend(word.to_be_bytes());
    }
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    bytes
}

pub(crate) fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    message(id, 0x100, name, kind)
}

/// What a resolver answers to a query.
pub(crate) fn answer_to(query: &[u8], code: u8) -> Vec<u8> {
    let mut answer = query.to_vec();
    (answer[2], answer[3]) = (answer[2] | 0x80, 0x80 | code);
    answer[7] = 1;
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 7]);
    answer
}

impl Asker {
    fn new(v6: bool) -> Self {
        Self::with(config(false), v6, &[0, 1, 2])
    }

    fn with(mut config: NatConfig, v6: bool, list: &[u8]) -> Self {
        config.resolvers = fixed(list);
        let (guest, gateway) = if v6 {
            ("[fd00::2]:4000", "[fd00::1]:53")
        } else {
            ("192.168.64.2:4000", "192.168.64.1:53")
        };
        let net = Net::new(config, plain_link());
        let (guest, gateway) = (guest.parse().unwrap(), gateway.parse().unwrap());
        Self { net, receiver: Receiver::default(), guest, gateway }
    }

    fn send(&mut self, data: &[u8]) {
        self.net.send(&[udp_frame(self.guest, self.gateway, data)]);
    }

    /// Asks from another port than before, as most guests do.
    fn ask(&mut self, id: u16, name: &str) {
        self.guest.set_port(self.guest.port() + 1);
        self.send(&query(id, name, A));
    }

    fn got(&mut self) -> Vec<Got> {
        let frames: Vec<_> = self.net.out.frames.drain(..).collect();
        let link = self.net.out.link;
        frames.iter().flat_map(|(frame, head)| self.receiver.take(frame, head, &link)).collect()
    }

    /// The answer that the guest gets, which comes from the gateway.
    fn answer(&mut self) -> Option<Vec<u8>> {
        let mut got = self.got();
        assert!(got.len() <= 1, "{got:?}");
        Some(match got.pop()? {
            Got::Udp { from, to, data } => {
                assert_eq!((from, to), (self.gateway, self.guest));
                data
            }
            other => panic!("no answer: {other:?}"),
        })
    }

    /// The answer of the translator itself: its code, and its records.
    fn local(&mut self, name: &str, kind: u16) -> (u8, Vec<Vec<u8>>) {
        let query = query(7, name, kind);
        let sockets = self.net.kernel.len();
        self.send(&query);
        assert_eq!(self.net.kernel.len(), sockets, "{name} was asked for outside");
        let answer = self.answer().expect("an answer");
        // It is authoritative, offers recursion, and has the question.
        assert_eq!(answer[..2], query[..2]);
        assert_eq!((answer[2], answer[3] & 0xf0), (0x85, 0x80), "{name}");
        assert_eq!(answer[12..query.len()], query[12..]);
        let (mut at, mut records) = (query.len(), Vec::new());
        let count = answer[7] + answer[9] + answer[11];
        for _ in 0..count {
            assert_eq!(answer[at] & 0xc0, 0xc0);
            let len = usize::from(u16::from_be_bytes([answer[at + 10], answer[at + 11]]));
            records.push(answer[at + 2..at + 4].to_vec());
            records.last_mut().unwrap().extend(&answer[at + 12..at + 12 + len]);
            at += 12 + len;
        }
        assert_eq!(at, answer.len());
        (answer[3] & 15, records)
    }

    /// Where the last socket leads to.
    fn last(&self) -> (usize, SocketAddr) {
        let index = self.net.kernel.len().checked_sub(1).expect("a socket");
        (index, self.net.kernel.with(index, |peer| peer.to))
    }

    /// Whatever the guest gets says that a query which waits has failed. It waits no longer.
    fn close_failed(&mut self, open: &mut BTreeMap<(u16, u8), String>) {
        for got in self.got() {
            let Got::Udp { from, to, mut data } = got else { panic!("{got:?}") };
            assert_eq!((from, data[3] & 15), (self.gateway, 2));
            let asked = open.remove(&(to.port(), data[1])).expect("it was asked");
            data.make_ascii_lowercase();
            assert_eq!(data[12..], query(0, &asked, A)[12..]);
        }
    }

    /// The guest gets an answer to its query that says that the server has failed, and nothing else.
    fn assert_failed(&mut self, query: &[u8]) {
        let answer = self.answer().expect("an answer");
        let mut expected = query.to_vec();
        (expected[2], expected[3]) = (0x81, 0x82);
        assert_eq!(answer, expected);
    }

    fn reply(&mut self, index: usize, data: &[u8]) {
        let from = self.net.kernel.with(index, |peer| peer.to);
        self.net.kernel.datagram(index, from, data, 0);
        self.net.settle();
    }

    fn counted(&self, counter: Counter) -> u64 {
        self.net.nat.counters()[counter]
    }

    /// How the sockets of this test are left.
    fn flows(&self) -> usize {
        self.net.nat.datagram_flows().count()
    }
}

fn each(test: impl Fn(Asker)) {
    for v6 in [false, true] {
        test(Asker::new(v6));
    }
}

/// Section 9, 11: a query goes to the resolver although that is on loopback, as it is, and the answer comes
/// from the gateway. The socket goes with the last answer.
#[test]
fn a_query_goes_to_the_resolver_and_its_answer_comes_from_the_gateway() {
    each(|mut asker| {
        let (one, two) = (query(1, "example.com", A), query(2, "eXample.com", AAAA));
        asker.send(&one);
        asker.send(&two);
        assert_eq!((asker.net.kernel.len(), asker.last()), (1, (0, resolver(0))));
        let sent: Vec<_> = asker.net.kernel.sent(0).into_iter().map(|sent| sent.bytes).collect();
        assert_eq!(sent, [one.clone(), two.clone()]);
        // The port is the system's choice.
        assert_eq!(asker.net.kernel.with(0, |peer| peer.datagrams.port), 50_000);
        for query in [&two, &one] {
            assert_eq!(asker.flows(), 1);
            let answer = answer_to(query, 0);
            asker.reply(0, &answer);
            assert_eq!(asker.answer(), Some(answer));
        }
        asker.net.assert_empty();
        let counters = [Counter::DnsForwarded, Counter::DnsAnswered, Counter::UdpReceived];
        assert_eq!(counters.map(|counter| asker.counted(counter)), [2, 2, 2]);
        // No rule of a policy is about it.
        asker.net.nat.set_policy(Box::new(NoOne));
        asker.ask(3, "example.com");
        assert_eq!(asker.net.kernel.open(), 1);
    });
}

struct NoOne;

impl Policy for NoOne {
    fn decide(&mut self, _: &Request) -> Verdict {
        Verdict::Deny(Counter::DeniedByRule)
    }
}

/// S2: only port 53 of the gateway is DNS. The resolver itself, and other ports, are as denied as ever.
#[test]
fn the_exception_is_the_gateways_port_only() {
    each(|mut asker| {
        let gateway = asker.gateway;
        let v4 = gateway.is_ipv4();
        let loopback: IpAddr = if v4 { "127.0.0.53" } else { "::1" }.parse().unwrap();
        let guest: IpAddr = if v4 { "192.168.64.9" } else { "fd00::9" }.parse().unwrap();
        for ip in [gateway.ip(), loopback, guest] {
            for port in [853, 80, 53] {
                let to = SocketAddr::new(ip, port);
                if to != gateway {
                    asker.net.send(&[udp_frame(asker.guest, to, &query(1, "a", A))]);
                    let syn = Segment { flags: "S".into(), window: 1, ..Segment::default() };
                    asker.net.send(&[syn.frame(asker.guest, to)]);
                }
            }
        }
        assert_eq!(asker.net.kernel.len(), 0);
        let denied = asker.counted(Counter::DeniedSubnet) + asker.counted(Counter::DeniedLoopback);
        assert_eq!((denied, asker.got().len()), (16, 16));
        // Nor does somebody ask who says that he is another.
        asker.net.nat.sources().reserve([9; 6], asker.guest.ip());
        asker.send(&query(1, "example.com", A));
        asker.net.nat.names_mut().set("host.internal", &[]).unwrap();
        asker.send(&query(1, "host.internal", A));
        assert_eq!((asker.net.kernel.len(), asker.counted(Counter::SourceReserved)), (0, 2));
    });
}

/// A query whose hop limit is used up has arrived, and goes on with a new one.
#[test]
fn the_gateway_is_where_a_querys_way_ends() {
    each(|mut asker| {
        let mut frame = udp_frame(asker.guest, asker.gateway, &query(1, "example.com", A));
        if asker.guest.is_ipv4() {
            frame[22] = 1;
            smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
        } else {
            frame[21] = 1;
        }
        asker.net.send(&[frame]);
        let sent = asker.net.kernel.sent(0);
        assert_eq!(sent[0].ip_fields.map(|fields| fields.0), Some(64));
    });
}

/// M4: a resolver that answers nothing is passed over, and asked again later.
#[test]
fn a_silent_resolver_is_passed_over() {
    each(|mut asker| {
        let mut asked = Vec::new();
        for n in 0..4 {
            asker.ask(n, "example.com");
            asked.push(asker.last().1);
            asker.net.wait(Duration::from_secs(5));
        }
        assert_eq!(asked, [resolver(0), resolver(1), resolver(2), resolver(0)]);
        assert_eq!(asker.counted(Counter::ResolverSilent), 3);
        // A second query that comes soon goes where the first has gone.
        asker.net.wait(Duration::from_secs(100));
        // Nobody has answered the first four.
        assert_eq!(asker.got().len(), 4);
        for n in 0..2 {
            asker.ask(n, "example.com");
            assert_eq!(asker.last().1, resolver(0));
        }
        // One that answers something is not silent, whatever else it does not know.
        let (index, to) = asker.last();
        asker.reply(index, &answer_to(&query(1, "example.com", A), 3));
        assert_eq!(asker.answer().map(|answer| answer[3] & 15), Some(3));
        asker.net.wait(Duration::from_secs(4));
        asker.ask(9, "example.com");
        assert_eq!(asker.last().1, to);
        // Those that were not answered are forgotten.
        asker.net.wait(Duration::from_secs(15));
        asker.net.assert_empty();
        asker.ask(10, "example.com");
        assert_eq!(asker.counted(Counter::DnsUnanswered), 6);
    });
}

/// Goal: when all resolvers are gone, each query has an answer, whatever way the system tells of that: by
/// silence, by an error that quotes the query, or by one that does not.
#[test]
fn a_query_that_no_resolver_answers_has_failed() {
    // EDNS with DNSSEC is answered with EDNS (RFC 6891, 7).
    let mut asked = query(7, "Slow.Example.com", AAAA);
    asked[11] = 1;
    asked.extend([0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0]);
    for how in ["silence", "quoted", "not quoted", "at once"] {
        each(|mut asker| {
            if how == "at once" {
                asker.net.kernel.0.borrow_mut().failure = Some(SocketError::NoDescriptor);
            }
            asker.send(&asked);
            let error =
                DatagramError { icmp: Some((3, 3)), offender: None, to: resolver(0), quoted: 0 };
            match how {
                "silence" => {
                    asker.net.wait(Duration::from_secs(9));
                    assert_eq!(asker.got().len(), 0);
                    asker.net.wait(Duration::from_secs(2));
                    assert_eq!(asker.counted(Counter::DnsUnanswered), 1);
                }
                "quoted" => asker.net.kernel.datagram_error(0, error, &asked[..40]),
                "not quoted" => asker.net.kernel.datagram_error(0, error, &[]),
                _ => assert_eq!(asker.counted(Counter::DnsFailed), 1),
            }
            asker.net.settle();
            let answer = asker.answer().expect(how);
            let mut expected = asked.clone();
            (expected[2], expected[3]) = (0x81, 0x82);
            assert_eq!(answer, expected, "{how}");
            let counted = [Counter::DnsUnanswered, Counter::DnsFailed].map(|c| asker.counted(c));
            assert_eq!(counted.iter().sum::<u64>(), 1, "{how}");
            asker.net.assert_empty();
            // It is answered once.
            asker.net.wait(Duration::from_secs(20));
            assert_eq!(asker.got().len(), 0, "{how}");
        });
    }
}

/// A guest that asks again from the same port, as the C library does, finds the next resolver there.
#[test]
fn a_query_that_is_made_again_goes_to_the_next_resolver() {
    each(|mut asker| {
        let slow = query(1, "slow.example.com", A);
        asker.send(&slow);
        // Made again at once, it goes to the same, and is one query.
        asker.send(&slow);
        assert_eq!((asker.net.kernel.len(), asker.net.kernel.sent(0).len()), (1, 2));
        // The resolver answers others in between.
        let other = query(2, "example.com", A);
        asker.send(&other);
        asker.reply(0, &answer_to(&other, 0));
        asker.answer().unwrap();
        asker.net.wait(Duration::from_secs(3));
        asker.send(&slow);
        assert_eq!((asker.last(), asker.net.kernel.open()), ((1, resolver(1)), 1));
        assert_eq!(asker.counted(Counter::ResolverSilent), 0);
        asker.reply(1, &answer_to(&slow, 0));
        assert!(asker.answer().is_some());
        asker.net.assert_empty();
        asker.ask(3, "example.com");
        assert_eq!(asker.last().1, resolver(0));
    });
}

/// M4: a resolver that is not there, or says that it cannot help, is passed over at once, for this guest.
#[test]
fn a_resolver_that_fails_is_passed_over() {
    for code in [None, Some(2), Some(4), Some(5)] {
        each(|mut asker| {
            asker.ask(1, "example.com");
            match code {
                None => {
                    let error = DatagramError {
                        icmp: Some((3, 3)),
                        offender: None,
                        to: resolver(0),
                        quoted: 0,
                    };
                    asker.net.kernel.datagram_error(0, error, &query(1, "example.com", A));
                    asker.net.settle();
                    // The guest need not wait for an answer, and hears of no error of a resolver.
                    asker.assert_failed(&query(1, "example.com", A));
                    assert_eq!((asker.counted(Counter::DnsFailed), asker.flows()), (1, 0));
                }
                Some(code) => {
                    asker.reply(0, &answer_to(&query(1, "example.com", A), code));
                    assert_eq!(asker.answer().map(|answer| answer[3] & 15), Some(code));
                }
            }
            assert_eq!(asker.counted(Counter::ResolverFailed), 1);
            asker.ask(2, "example.com");
            assert_eq!(asker.last().1, resolver(1));
            // Another guest is not moved by what this one meets.
            let mut other = asker.guest;
            let last = if other.is_ipv4() { "192.168.64.7" } else { "fd00::7" };
            other.set_ip(last.parse().unwrap());
            let frame = udp_frame(other, asker.gateway, &query(3, "example.com", A));
            let header = OffloadHeader::NONE;
            let frames = [GuestFrame { bytes: &frame, header }];
            asker.net.nat.from_guest(Port(9), &frames, asker.net.now, &mut asker.net.out);
            assert_eq!(asker.last().1, resolver(0));
            asker.net.wait(Duration::from_secs(61));
            asker.ask(4, "example.com");
            assert_eq!(asker.last().1, resolver(0));
        });
    }
}

/// M4: the first resolver follows the last one, and is asked again a minute after it was left, however often
/// others fail in between.
#[test]
fn failed_resolvers_are_passed_over_in_turn() {
    each(|mut asker| {
        let begin = asker.net.now;
        let mut ask = |at: u64, expected: u8, fails: bool| {
            asker.net.wait(begin + Duration::from_secs(at) - asker.net.now);
            asker.ask(1, "example.com");
            let (index, to) = asker.last();
            assert_eq!(to, resolver(expected), "after {at} s");
            let code = if fails { 2 } else { 0 };
            asker.reply(index, &answer_to(&query(1, "example.com", A), code));
            assert!(asker.answer().is_some());
        };
        for n in 0..3 {
            ask(u64::from(n), n, true);
        }
        // Its turn has come again, so the minute that began when it was left does not count any more.
        ask(3, 0, false);
        ask(30, 0, true);
        ask(61, 1, false);
        ask(80, 1, true);
        ask(89, 2, false);
        ask(90, 0, true);
        ask(91, 1, false);
        assert_eq!(asker.counted(Counter::ResolverFailed), 6);
    });
}

/// A flow whose query goes to another resolver now has as many queries as before: it ends with the last one's
/// answer, and not sooner.
#[test]
fn a_flow_that_moves_keeps_its_queries() {
    each(|mut asker| {
        let (slow, other) = (query(1, "slow.example.com", A), query(2, "example.com", A));
        asker.send(&slow);
        asker.send(&other);
        asker.net.wait(Duration::from_secs(3));
        asker.send(&slow);
        assert_eq!((asker.last(), asker.net.kernel.open()), ((1, resolver(1)), 1));
        asker.reply(1, &answer_to(&slow, 0));
        assert!(asker.answer().is_some());
        // The other query is made again, and is no new one.
        assert_eq!((asker.flows(), asker.net.kernel.open()), (1, 1));
        asker.send(&other);
        asker.reply(1, &answer_to(&other, 0));
        assert!(asker.answer().is_some());
        asker.net.assert_empty();
    });
}

/// A query that is made again has its whole time again. When that is over, nobody gets an answer if the address
/// is another guest's by then.
#[test]
fn a_query_that_is_made_again_has_its_time_again() {
    for other_has_address in [false, true] {
        each(|mut asker| {
            let asked = query(1, "slow.example.com", A);
            asker.send(&asked);
            asker.net.wait(Duration::from_secs(6));
            asker.send(&asked);
            asker.net.wait(Duration::from_secs(9));
            assert_eq!((asker.got().len(), asker.counted(Counter::DnsUnanswered)), (0, 0));
            if other_has_address {
                let mac = [2, 0, 0, 0, 0, 9];
                assert!(asker.net.nat.sources().lease(Port(9), mac, asker.guest.ip()));
            }
            asker.net.wait(Duration::from_secs(2));
            assert_eq!(asker.counted(Counter::DnsUnanswered), 1);
            if other_has_address {
                assert_eq!(asker.got(), []);
            } else {
                asker.assert_failed(&asked);
            }
            asker.net.assert_empty();
        });
    }
}

/// Section 9, 17: a resolver that no socket can be opened to is passed over within the same query, and if
/// there is no other the guest is told.
#[test]
fn a_resolver_without_a_way_is_passed_over_in_the_same_query() {
    each(|mut asker| {
        asker.net.kernel.0.borrow_mut().failure = Some(SocketError::NetworkUnreachable);
        asker.ask(1, "example.com");
        assert_eq!(asker.counted(Counter::ResolverFailed), 3);
        assert_eq!(asker.counted(Counter::ConnectUnreachable), 3);
        asker.assert_failed(&query(1, "example.com", A));
        assert_eq!(asker.counted(Counter::DnsFailed), 1);
        asker.net.assert_empty();
        asker.net.kernel.0.borrow_mut().failure = None;
        asker.ask(1, "example.com");
        assert_eq!(asker.net.kernel.open(), 1);
    });
}

/// M4: other resolvers are asked from the next query on, whoever says so.
#[test]
fn resolvers_are_read_again() {
    each(|mut asker| {
        asker.net.nat.set_resolvers(Resolvers::Host);
        let host = |asker: &Asker, list: &[u8]| {
            let list = list.iter().map(|&n| resolver(n)).collect();
            asker.net.kernel.0.borrow_mut().resolvers = Ok(Some(list));
        };
        host(&asker, &[1, 3]);
        asker.ask(1, "example.com");
        assert_eq!(asker.last().1, resolver(1));
        assert_eq!(asker.net.nat.current_resolvers(), [resolver(1), resolver(3)]);
        // It is looked at every few seconds only, and only if somebody asks.
        host(&asker, &[3]);
        asker.net.wait(Duration::from_secs(1));
        asker.ask(2, "example.com");
        assert_eq!((asker.last().1, asker.net.kernel.calls().resolvers), (resolver(1), 1));
        asker.net.wait(Duration::from_secs(100));
        assert_eq!(asker.net.kernel.calls().resolvers, 1);
        asker.ask(3, "example.com");
        assert_eq!((asker.last().1, asker.net.kernel.calls().resolvers), (resolver(3), 2));
        // A flow that is there moves with its next query.
        host(&asker, &[1]);
        asker.net.wait(Duration::from_secs(6));
        asker.send(&query(4, "example.com", A));
        assert_eq!((asker.last().1, asker.net.kernel.open()), (resolver(1), 1));
        // If they cannot be read, the old ones are asked.
        asker.net.kernel.0.borrow_mut().resolvers = Err(SocketError::Denied);
        asker.net.wait(Duration::from_secs(6));
        asker.ask(5, "example.com");
        assert_eq!((asker.last().1, asker.counted(Counter::HostResolvers)), (resolver(1), 1));
        // The caller's own list is not looked at, and has three at most.
        let calls = asker.net.kernel.calls().resolvers;
        asker.net.nat.set_resolvers(fixed(&[3, 2, 1, 0]));
        assert_eq!(asker.net.nat.current_resolvers().len(), 3);
        asker.net.wait(Duration::from_secs(60));
        asker.ask(6, "example.com");
        assert_eq!((asker.last().1, asker.net.kernel.calls().resolvers), (resolver(3), calls));
        // The host's are known still, although they have not changed.
        asker.net.kernel.0.borrow_mut().resolvers = Ok(None);
        asker.net.nat.set_resolvers(Resolvers::Host);
        asker.ask(7, "example.com");
        assert_eq!(asker.last().1, resolver(1));
        // Without any, nobody waits for an answer.
        asker.got();
        asker.net.nat.set_resolvers(Resolvers::Fixed(Vec::new()));
        asker.ask(8, "example.com");
        assert_eq!(asker.answer().map(|answer| answer[3] & 15), Some(5));
        assert_eq!(asker.counted(Counter::DnsRefused), 1);
    });
}

/// S6: queries that wait are bounded for each port and for the network, the guest is told, and what is
/// answered makes room.
#[test]
fn queries_that_wait_are_bounded() {
    for own in [false, true] {
        each(|mut asker| {
            let mut config = config(false);
            let limit = if own {
                &mut config.limits.port.dns_pending
            } else {
                &mut config.limits.dns_pending
            };
            *limit = 40;
            asker = Asker::with(config, asker.guest.is_ipv6(), &[0]);
            for n in 0..100 {
                asker.ask(n, "example.com");
            }
            let refused = asker.got();
            assert_eq!((refused.len(), asker.counted(Counter::DnsPendingLimit)), (60, 60));
            for got in refused {
                let Got::Udp { data, .. } = got else { panic!("{got:?}") };
                assert_eq!((data[3] & 15, data[5]), (2, 1));
            }
            assert_eq!((asker.net.kernel.open(), asker.flows()), (40, 40));
            asker.reply(0, &answer_to(&query(0, "example.com", A), 0));
            assert_eq!((asker.got().len(), asker.net.kernel.open()), (1, 39));
            asker.ask(200, "example.com");
            assert_eq!(asker.net.kernel.open(), 40);
            // Another port has its share, unless the network has none left.
            let mut other = asker.guest;
            let last = if other.is_ipv4() { "192.168.64.7" } else { "fd00::7" };
            other.set_ip(last.parse().unwrap());
            let frame = udp_frame(other, asker.gateway, &query(3, "example.com", A));
            let frames = [GuestFrame { bytes: &frame, header: OffloadHeader::NONE }];
            asker.net.nat.from_guest(Port(9), &frames, asker.net.now, &mut asker.net.out);
            assert_eq!(asker.net.kernel.open(), if own { 41 } else { 40 });
            // A port that leaves takes its queries along.
            asker.net.nat.port_left(PORT, asker.net.now, &mut asker.net.out);
            asker.got();
            for n in 0..39 {
                asker.ask(n, "example.com");
            }
            assert_eq!(asker.got().len(), 0);
            // And all end by themselves.
            asker.net.wait(Duration::from_secs(30));
            asker.net.assert_empty();
            assert_eq!(asker.got().len(), if own { 40 } else { 39 });
            for n in 0..40 {
                asker.ask(n, "example.com");
            }
            assert_eq!(asker.got().len(), 0);
        });
    }
}

/// S6: the limits of flows hold for those of queries: how many a port opens in a second, and how many it has.
/// The guest is told of a query that has none, and the oldest flow makes way for the next query. A resolver is
/// not to blame.
#[test]
fn flows_of_queries_are_bounded() {
    for (rate, most) in [(10, 1000), (1000, 10)] {
        each(|mut asker| {
            let mut config = config(false);
            config.limits.port.new_flows_per_second = rate;
            config.limits.port.udp_flows = most;
            asker = Asker::with(config, asker.guest.is_ipv6(), &[0, 1]);
            for n in 0..25 {
                asker.ask(n, "example.com");
            }
            assert_eq!((asker.net.kernel.open(), asker.flows()), (10, 10));
            let refused = asker.got();
            let limited = [Counter::NewFlowLimit, Counter::DnsFailed, Counter::Evicted];
            let counted = limited.map(|counter| asker.counted(counter));
            if rate == 10 {
                assert_eq!((refused.len(), counted), (15, [15, 15, 0]));
                for (n, got) in refused.iter().enumerate() {
                    let Got::Udp { data, .. } = got else { panic!("{got:?}") };
                    assert_eq!((data[3] & 15, usize::from(data[1])), (2, 10 + n));
                }
                // The second is over.
                asker.net.wait(Duration::from_secs(1));
                asker.ask(100, "example.com");
            } else {
                // The guest need not wait for the answers to those that made way.
                assert_eq!((refused.len(), counted), (15, [0, 15, 15]));
            }
            let index = asker.last().0;
            let id = if rate == 10 { 100 } else { 24 };
            asker.reply(index, &answer_to(&query(id, "example.com", A), 0));
            assert!(asker.answer().is_some());
            assert_eq!((asker.last().1, asker.counted(Counter::ResolverFailed)), (resolver(0), 0));
            asker.net.wait(Duration::from_secs(11));
            assert_eq!(asker.got().len(), if rate == 10 { 10 } else { 9 });
            asker.net.assert_empty();
        });
    }
    // A port that has no flow to give up is told that there is none left.
    each(|mut asker| {
        let mut config = config(false);
        config.limits.udp_flows = 1;
        asker = Asker::with(config, asker.guest.is_ipv6(), &[0, 1]);
        let mut other = asker.guest;
        other.set_ip(if other.is_ipv4() { "192.168.64.7" } else { "fd00::7" }.parse().unwrap());
        let frame = udp_frame(other, asker.gateway, &query(3, "example.com", A));
        let frames = [GuestFrame { bytes: &frame, header: OffloadHeader::NONE }];
        asker.net.nat.from_guest(Port(9), &frames, asker.net.now, &mut asker.net.out);
        asker.send(&query(1, "example.com", A));
        asker.assert_failed(&query(1, "example.com", A));
        let limited = [Counter::FlowLimit, Counter::ResolverFailed].map(|one| asker.counted(one));
        assert_eq!((asker.net.kernel.len(), limited), (1, [1, 0]));
    });
}

/// When a flow ends that has queries, they end with it, and the guest is told of each. So a flow that is opened
/// later counts all of its queries, and ends with the last answer. A forward that is added ends no flow of
/// queries, which has no port of the host that is its guest's.
#[test]
fn queries_end_with_their_flow() {
    for evicted in [true, false] {
        each(|mut asker| {
            let mut config = config(false);
            let limits = &mut config.limits.port;
            if evicted {
                limits.udp_flows = 1;
            } else {
                limits.new_flows_per_second = 2;
            }
            asker = Asker::with(config, asker.guest.is_ipv6(), &[0, 1]);
            let guest = asker.guest;
            let asked = [1, 2].map(|id| query(id, "example.com", A));
            for query in &asked {
                asker.send(query);
            }
            let ended = if evicted {
                // Another flow of the guest takes its place.
                asker.ask(3, "example.com");
                asker.guest = guest;
                asker.got()
            } else {
                // It is to move, which the rate forbids.
                asker.net.wait(Duration::from_millis(2500));
                for id in 3..5 {
                    asker.ask(id, "example.com");
                }
                asker.guest = guest;
                assert_eq!(asker.got(), []);
                asker.send(&asked[0]);
                assert_eq!(asker.counted(Counter::NewFlowLimit), 1);
                asker.got()
            };
            let mut ids = Vec::new();
            for got in ended {
                let Got::Udp { from, to, data } = got else { panic!("{got:?}") };
                assert_eq!((from, to, data[3] & 15), (asker.gateway, guest, 2));
                ids.push(data[1]);
            }
            ids.sort_unstable();
            assert_eq!((ids, asker.counted(Counter::DnsFailed)), (vec![1, 2], 2));
            // Both are made again.
            asker.net.wait(Duration::from_secs(1));
            for query in &asked {
                asker.send(query);
            }
            asker.got();
            let index = asker.last().0;
            for query in &asked {
                let answer = answer_to(query, 0);
                asker.reply(index, &answer);
                assert_eq!(asker.answer(), Some(answer));
            }
            asker.net.wait(Duration::from_secs(11));
            asker.net.assert_empty();
        });
    }
    // One that ends alone leaves the others their flow.
    for expires in [true, false] {
        each(|mut asker| {
            asker = Asker::with(config(false), asker.guest.is_ipv6(), &[0]);
            let asked = [1, 2].map(|id| query(id, "example.com", A));
            asker.send(&asked[0]);
            asker.net.wait(Duration::from_secs(8));
            asker.send(&asked[1]);
            if expires {
                asker.net.wait(Duration::from_secs(3));
            } else {
                let error =
                    DatagramError { icmp: None, offender: None, to: resolver(0), quoted: 0 };
                asker.net.kernel.datagram_error(0, error, &asked[0]);
                asker.net.settle();
            }
            asker.assert_failed(&asked[0]);
            let answer = answer_to(&asked[1], 0);
            asker.reply(0, &answer);
            assert_eq!(asker.answer(), Some(answer));
            asker.net.assert_empty();
        });
    }
    each(|mut asker| {
        let asked = query(1, "example.com", A);
        asker.send(&asked);
        let guest = Guest::Address(asker.guest.ip());
        let rule = ForwardRule::new(Protocol::Udp, asker.guest.port(), guest, 80);
        asker.net.kernel.0.borrow_mut().ports_in_use.push(rule.port);
        let (now, out) = (asker.net.now, &mut asker.net.out);
        assert!(asker.net.nat.add_forward(&rule, now, out).is_err());
        asker.reply(0, &answer_to(&asked, 0));
        assert!(asker.answer().is_some());
    });
}

/// T14: what is no answer to a question of the guest does not reach it, and does not count as one.
#[test]
fn only_an_answer_to_the_question_reaches_the_guest() {
    each(|mut asker| {
        let question = query(1, "example.com", A);
        asker.send(&question);
        let good = answer_to(&question, 0);
        let change = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        let hostile = [
            Vec::new(),
            good[..11].to_vec(),
            good[..20].to_vec(),
            change(1, 2),     // another identifier
            question.clone(), // a question
            change(2, 0xad),  // another kind of message
            change(5, 0),     // no question
            change(5, 2),     // two
            change(13, b'f'), // another name
            change(12, 0xc0), // a pointer
            change(26, 28),   // another type
            change(28, 3),    // another class
        ];
        for (index, bytes) in hostile.iter().enumerate() {
            asker.reply(0, bytes);
            assert_eq!(asker.answer(), None, "{index}");
            assert_eq!(asker.counted(Counter::DnsUnasked), index as u64 + 1);
        }
        // Somebody else sends the same.
        let liar = SocketAddr::new([198, 51, 100, 1].into(), 53);
        asker.net.kernel.datagram(0, liar, &good, 0);
        asker.net.settle();
        assert_eq!((asker.answer(), asker.counted(Counter::NotAsked)), (None, 1));
        // The case of letters is the resolver's to change, and the rest is the guest's to judge.
        let mut upper = good.clone();
        upper[13].make_ascii_uppercase();
        upper.extend([0xc0; 1000]);
        asker.reply(0, &upper);
        assert_eq!(asker.answer(), Some(upper));
        asker.net.assert_empty();
        // A second answer is none.
        asker.send(&question);
        asker.send(&query(2, "example.com", A));
        asker.reply(1, &good);
        asker.reply(1, &good);
        assert_eq!(asker.got().len(), 1);
        // An error may lack the question (RFC 1035, 4.1.1: the query could not be read).
        let mut bare = vec![0, 2, 0x81, 0x81, 0, 0, 0, 0, 0, 0, 0, 0];
        asker.reply(1, &bare);
        assert_eq!(asker.answer(), Some(bare.clone()));
        // What says that there is no such name may not.
        asker.send(&query(2, "example.com", A));
        (bare[3], bare[1]) = (0x83, 2);
        let index = asker.last().0;
        asker.reply(index, &bare);
        assert_eq!(asker.answer(), None);
    });
}

/// Answers that the system has put together are told apart, and those that nobody has asked for left out.
#[test]
fn answers_in_one_piece_are_told_apart() {
    each(|mut asker| {
        let (one, two) = (query(1, "example.com", A), query(2, "example.org", A));
        asker.send(&one);
        asker.send(&two);
        let answers = [answer_to(&one, 0), answer_to(&two, 0)];
        let lie = answer_to(&query(3, "example.com", A), 0);
        let piece = [&answers[0][..], &lie, &answers[1]].concat();
        asker.net.kernel.datagram(0, resolver(0), &piece, answers[0].len() as u16);
        asker.net.settle();
        let got: Vec<_> = asker.got();
        let (from, to) = (asker.gateway, asker.guest);
        let expected = answers.map(|data| Got::Udp { from, to, data });
        assert_eq!((got, asker.counted(Counter::DnsUnasked)), (expected.to_vec(), 1));
        asker.net.assert_empty();
        // Nor does a frame that is to be cut get more past the gateway than each datagram alone.
        let local = query(5, "nobody.internal", A);
        assert_eq!(local.len(), query(6, "abcdef.internal", A).len());
        let both = [&local[..], &query(6, "abcdefghi.other", A)].concat();
        let bytes = udp_frame(from_port(asker.guest, 5), asker.gateway, &both);
        let header = OffloadHeader {
            gso: Gso::UdpL4,
            segment_size: local.len() as u16,
            ..OffloadHeader::NONE
        };
        let (now, out) = (asker.net.now, &mut asker.net.out);
        asker.net.nat.from_guest(PORT, &[GuestFrame { bytes: &bytes, header }], now, out);
        assert_eq!(asker.counted(Counter::DnsLocal), 1);
        let index = asker.last().0;
        assert_eq!(asker.net.kernel.sent(index).len(), 1);
    });
}

fn from_port(mut address: SocketAddr, port: u16) -> SocketAddr {
    address.set_port(port);
    address
}

/// S8: an answer that is longer than the guest's MTU comes in fragments.
#[test]
fn a_long_answer_comes_in_fragments() {
    each(|mut asker| {
        let question = query(1, "example.com", A);
        asker.send(&question);
        let mut answer = answer_to(&question, 0);
        answer.resize(4096, 0x55);
        asker.reply(0, &answer);
        assert_eq!(asker.answer(), Some(answer));
        assert_eq!(asker.receiver.fragment_count, 3);
    });
}

/// What is no query for a guest gets an answer that says so, and reaches no resolver, which may allow its
/// own host more than others.
#[test]
fn what_is_no_query_reaches_no_resolver() {
    each(|mut asker| {
        let good = query(1, "example.com", A);
        let change = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        let refused = [
            (change(2, 5 << 3), Some(4)),            // an update
            (change(2, 4 << 3), Some(4)),            // a notification
            (query(1, "example.com", 252), Some(5)), // a transfer
            (query(1, "example.com", 251), Some(5)),
            (change(5, 0), Some(1)),                    // no question
            (change(5, 2), Some(1)),                    // two
            (change(12, 0xc0), Some(1)),                // a pointer
            (query(1, &"a".repeat(64), A), Some(1)),    // a label of 64 bytes
            (good[..good.len() - 1].to_vec(), Some(1)), // a part of one
            (change(2, 0x80), None),                    // an answer
            (good[..11].to_vec(), None),
            (vec![0], None),
            (Vec::new(), None),
        ];
        for (index, (bytes, code)) in refused.iter().enumerate() {
            asker.send(bytes);
            let answer = asker.answer();
            assert_eq!(answer.as_ref().map(|answer| answer[3] & 15), *code, "{index}");
            if let Some(answer) = answer {
                assert_eq!((answer[..2].to_vec(), answer[2] >> 7), (bytes[..2].to_vec(), 1));
            }
        }
        assert_eq!(asker.net.kernel.len(), 0);
        let counters = [Counter::DnsRefused, Counter::DnsMalformed];
        assert_eq!(counters.map(|counter| asker.counted(counter)), [4, 9]);
        // A label of 63 bytes is one.
        asker.send(&query(1, &"a".repeat(63), A));
        assert_eq!(asker.net.kernel.len(), 1);
    });
}

/// M4: names of the network's own are answered here, in every type, and never asked for outside.
#[test]
fn local_names_are_answered_here() {
    each(|mut asker| {
        let at = |text: &str| text.parse::<IpAddr>().unwrap();
        let names = asker.net.nat.names_mut();
        names.set("host.internal", &[at("192.168.64.254"), at("fd00::254")]).unwrap();
        names.lease(PORT, GUEST_MAC, b"web", at("192.168.64.2")).unwrap();
        let address = |address: IpAddr| match address {
            IpAddr::V4(v4) => [&[0, 1][..], &v4.octets()].concat(),
            IpAddr::V6(v6) => [&[0, 28][..], &v6.octets()].concat(),
        };
        let (v4, v6) = (address(at("192.168.64.254")), address(at("fd00::254")));
        for name in ["host.internal", "HOST.Internal", "host"] {
            assert_eq!(asker.local(name, A), (0, vec![v4.clone()]));
            assert_eq!(asker.local(name, AAAA), (0, vec![v6.clone()]));
        }
        let mut all = asker.local("host.internal", 255);
        all.1.sort();
        assert_eq!(all, (0, vec![v4, v6]));
        // A name that is there and has nothing of this type, and one that is not there.
        let is_soa = |records: &[Vec<u8>]| matches!(records, [record] if record[..2] == [0, 6] && record.ends_with(&[0; 4]));
        let nothing =
            [("web.internal", AAAA), ("web.internal", 16), ("host.internal", 65), ("internal", 6)];
        for (name, kind) in nothing {
            let (code, records) = asker.local(name, kind);
            assert!(code == 0 && is_soa(&records), "{name}: {records:?}");
        }
        let no_names = [
            ("nobody.internal", A),
            ("a.web.internal", A),
            ("h st.internal", A),
            ("77.64.168.192.in-addr.arpa", PTR),
            ("77.64.168.192.in-addr.arpa", A),
        ];
        for (name, kind) in no_names {
            let (code, records) = asker.local(name, kind);
            assert!(code == 3 && is_soa(&records), "{name}: {records:?}");
        }
        assert_eq!(asker.local("web", AAAA), (0, vec![]));
        let pointer = |name: &[u8]| (0, vec![[&[0, 12][..], name].concat()]);
        let web = pointer(b"\x03web\x08internal\0");
        assert_eq!(asker.local("2.64.168.192.in-addr.arpa", PTR), web);
        let v6 = format!("4.5.2.{}0.0.d.f.ip6.arpa", "0.".repeat(25));
        assert_eq!(asker.local(&v6, PTR), pointer(b"\x04host\x08internal\0"));
        assert_eq!(asker.local("2.64.168.192.in-addr.arpa", 255), web);
        // It has a name, and no address.
        let (code, records) = asker.local("2.64.168.192.in-addr.arpa", A);
        assert!(code == 0 && is_soa(&records), "{records:?}");
        assert_eq!(asker.counted(Counter::DnsLocal), 21);
        // Another class than the Internet's has nothing to do with it.
        let mut chaos = query(1, "host.internal", 16);
        *chaos.last_mut().unwrap() = 3;
        asker.send(&chaos);
        assert_eq!(asker.answer().map(|answer| answer[3] & 15), Some(5));
        assert_eq!(asker.net.kernel.len(), 0);
        // Others' names are.
        for name in ["metadata.google.internal", "webb", "2.0.0.127.in-addr.arpa", "internal.com"] {
            let sockets = asker.net.kernel.len();
            asker.ask(1, name);
            assert_eq!(asker.net.kernel.len(), sockets + 1, "{name}");
        }
        // So are the names of others' addresses.
        let foreign = format!("1.{}8.b.d.0.1.0.0.2.ip6.arpa", "0.".repeat(23));
        for name in ["77.65.168.192.in-addr.arpa", &foreign] {
            let asked = query(1, name, PTR);
            asker.send(&asked);
            let index = asker.last().0;
            assert_eq!(asker.net.kernel.sent(index).pop().map(|sent| sent.bytes), Some(asked));
        }
        asker.net.nat.port_left(PORT, asker.net.now, &mut asker.net.out);
        assert_eq!(asker.local("web.internal", A).0, 3);
    });
}

/// DNS over TCP goes to the resolver, whose answer has the gateway's address.
#[test]
fn a_connection_leads_to_the_resolver() {
    for v6 in [false, true] {
        let mut script = dns_script(v6);
        script.open();
        let to = script.net.kernel.with(0, |peer| peer.to);
        assert_eq!(to, resolver(0));
        let message = framed(&query(1, "example.com", A));
        send(&mut script, 1, &message);
        assert_eq!(script.net.kernel.with(0, |peer| peer.sent.clone()), message);
        script.next().expect("an acknowledgment");
        script.run("peer writes 50\n > . 1:51\n peer is open");
    }
}

fn dns_script(v6: bool) -> Script {
    let mut config = config(false);
    config.resolvers = fixed(&[0, 1]);
    let mut script = Script::new(config, plain_link(), v6);
    let gateway = if v6 { "[fd00::1]:53" } else { "192.168.64.1:53" };
    script.remote = gateway.parse().unwrap();
    script.net.nat.names_mut().set("host.internal", &[]).unwrap();
    script
}

pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

/// The guest sends bytes at a place of its stream.
fn send(script: &mut Script, at: u32, data: &[u8]) {
    let segment = Segment {
        flags: "P.".into(),
        seq: script.isn.wrapping_add(at),
        ack: script.iss.wrapping_add(1),
        window: 512,
        data: data.to_vec(),
        ..Segment::default()
    };
    script.net.send(&[segment.frame(script.guest, script.remote)]);
}

/// Over TCP, what is not to reach the resolver ends the connection, also if it comes in pieces, again, or
/// behind queries that are fine.
#[test]
fn a_connection_ends_before_it_asks_for_what_is_not_outside() {
    let bad = [
        query(2, "host.internal", A),
        query(2, "nobody.internal", AAAA),
        query(2, "example.com", 252),
        message(2, 5 << 11, "example.com", A),
        vec![0; 5],
    ];
    for (index, bad) in bad.iter().enumerate() {
        for split in [1, 2, 3, 15, 17] {
            for most in [usize::MAX, 7] {
                let mut script = dns_script(false);
                script.net.kernel.0.borrow_mut().most = most;
                script.open();
                let good = framed(&query(1, "example.com", A));
                let stream = [&good[..], &framed(bad)].concat();
                let first = good.len() + split.min(bad.len());
                // What the kernel does not take of it is spilled. It is seen once more.
                send(&mut script, 1, &stream[..first]);
                send(&mut script, 1, &stream[..first]);
                script.net.out.frames.clear();
                // A header that is wrong is known before the question is.
                let is_early = index == 4 && split >= 2 || index == 3 && split >= 14;
                let closed = script.net.kernel.with(0, |peer| peer.closed);
                assert_eq!(closed.is_some(), is_early, "message {index} after {split} bytes");
                send(&mut script, 1 + first as u32, &stream[first..]);
                let (closed, sent) =
                    script.net.kernel.with(0, |peer| (peer.closed, peer.sent.clone()));
                assert_eq!(closed, Some(true), "message {index} after {split} bytes");
                assert!(script.next().expect("a reset").flags.starts_with('R'));
                assert!(sent.len() <= first, "the rest has reached the resolver");
                let why = [Counter::DnsStreamRefused, Counter::DnsMalformed][index / 4];
                assert_eq!(script.net.nat.counters()[why], 1, "message {index}");
                script.net.assert_empty();
            }
        }
    }
}

/// What neither the kernel nor the spill takes is sent again, and is looked at as if for the first time.
#[test]
fn what_is_not_taken_is_looked_at_again() {
    let mut script = dns_script(false);
    (script.net.kernel.0.borrow_mut().most, script.net.kernel.0.borrow_mut().capacity) =
        (1000, 1 << 20);
    script.open();
    let mut stream = Vec::new();
    for id in 0..2500 {
        stream.extend(framed(&query(id, "example.com", A)));
    }
    let len = stream.len();
    let mut acked = 0;
    for round in 0..10 {
        // The first acknowledgment opens the window, which the handshake cannot.
        let most = if round == 0 { 1400 } else { 64 * 1400 };
        let rest = &stream[acked..];
        let frames: Vec<_> = rest[..rest.len().min(most)]
            .chunks(1400)
            .enumerate()
            .map(|(index, data)| {
                let segment = Segment {
                    flags: "P.".into(),
                    seq: script.isn.wrapping_add((1 + acked + index * 1400) as u32),
                    ack: script.iss.wrapping_add(1),
                    window: 512,
                    data: data.to_vec(),
                    ..Segment::default()
                };
                segment.frame(script.guest, script.remote)
            })
            .collect();
        script.net.send(&frames);
        while let Some(segment) = script.next() {
            assert_eq!(segment.flags, ".");
            acked = segment.ack.wrapping_sub(script.isn) as usize - 1;
        }
        if acked == len {
            break;
        }
    }
    let counters = script.net.nat.counters();
    assert!(counters[Counter::SpillFull] > 0, "everything was taken: {counters:?}");
    assert_eq!(acked, len);
    assert!(script.net.kernel.with(0, |peer| peer.sent == stream));
}

/// A resolver that does not take a connection is passed over by the next one.
#[test]
fn a_connection_that_fails_moves_the_next_one() {
    for how in ["refuses", "fails host", "is silent", "at once"] {
        let mut script = dns_script(false);
        if how == "at once" {
            script.net.kernel.0.borrow_mut().answer = Answer::Fail(SocketError::Refused);
        }
        script.run("< S 0 win 65535 mss 1000 ws 7");
        match how {
            "at once" => {}
            "is silent" => script.net.wait(Duration::from_secs(4)),
            how => {
                script.run(&format!("peer {how}"));
            }
        }
        script.net.out.frames.clear();
        script.net.kernel.0.borrow_mut().answer = Answer::Later;
        script.net.assert_empty();
        assert_eq!(script.net.nat.counters()[Counter::ResolverFailed], 1, "{how}");
        script.run("< S 0 win 65535 mss 1000 ws 7");
        let index = script.net.kernel.len() - 1;
        assert_eq!(script.net.kernel.with(index, |peer| peer.to), resolver(1), "{how}");
    }
    // Without a resolver, nobody waits.
    let mut script = dns_script(false);
    script.net.nat.set_resolvers(Resolvers::Fixed(Vec::new()));
    script.run("< S 0 win 65535\n > icmp 3 13\n count DnsRefused 1\n empty");
}

#[derive(Clone, Debug)]
enum Step {
    Ask {
        port: u8,
        id: u8,
        name: u8,
    },
    Raw(Vec<u8>),
    /// The resolver behind a socket says something about a query.
    Say {
        socket: u8,
        id: u8,
        name: u8,
        code: u8,
    },
    Fail {
        socket: u8,
    },
    Wait {
        millis: u32,
    },
    Reload {
        list: Vec<u8>,
    },
    Leave,
}

fn step() -> impl Strategy<Value = Step> {
    let names = 0u8..5;
    prop_oneof![
        6 => (0u8..3, 0u8..4, names.clone()).prop_map(|(port, id, name)| Step::Ask { port, id, name }),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Raw),
        6 => (any::<u8>(), 0u8..4, names, 0u8..6)
            .prop_map(|(socket, id, name, code)| Step::Say { socket, id, name, code }),
        1 => any::<u8>().prop_map(|socket| Step::Fail { socket }),
        2 => (0u32..12_000).prop_map(|millis| Step::Wait { millis }),
        1 => prop::collection::vec(0u8..4, 0..4).prop_map(|list| Step::Reload { list }),
        1 => Just(Step::Leave),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Goal: whatever guests, resolvers and the host do, a guest gets an answer from outside only to a
    /// question that it has asked and that was not answered yet, no local name leaves, and nothing is
    /// left.
    #[test]
    fn every_answer_has_its_question(steps in prop::collection::vec(step(), 1..80)) {
        let names = ["example.com", "host.internal", "a.example", "nobody.internal", "Example.com"];
        let mut asker = Asker::new(false);
        let set = asker.net.nat.names_mut().set("host.internal", &[[192, 168, 64, 254].into()]);
        prop_assert!(set.is_ok());
        // Which questions wait, by the guest's port and the identifier.
        let mut open = BTreeMap::<(u16, u8), String>::new();
        for step in steps {
            match step {
                Step::Ask { port, id, name } => {
                    asker.guest.set_port(4000 + u16::from(port));
                    let name = names[usize::from(name)];
                    asker.send(&query(id.into(), name, A));
                    let answered = asker.answer();
                    let is_local = name.ends_with("internal");
                    if is_local {
                        prop_assert!(answered.is_some_and(|answer| answer[2] & 4 > 0));
                    } else if answered.is_none() {
                        open.insert((asker.guest.port(), id), name.to_ascii_lowercase());
                    } else {
                        prop_assert_eq!(asker.net.nat.current_resolvers().len(), 0);
                    }
                }
                Step::Raw(bytes) => {
                    asker.send(&bytes);
                    asker.got();
                }
                Step::Say { socket, id, name, code } => {
                    let Some(index) = usize::from(socket).checked_rem(asker.net.kernel.len()) else {
                        continue;
                    };
                    let name = names[usize::from(name)];
                    asker.reply(index, &answer_to(&query(id.into(), name, A), code));
                    for got in asker.got() {
                        let Got::Udp { from, to, data } = got else { panic!("{got:?}") };
                        prop_assert_eq!(from, asker.gateway);
                        let asked = open.remove(&(to.port(), data[1]));
                        prop_assert_eq!(asked, Some(name.to_ascii_lowercase()));
                    }
                }
                Step::Fail { socket } => {
                    let Some(index) = usize::from(socket).checked_rem(asker.net.kernel.len()) else {
                        continue;
                    };
                    let to = asker.net.kernel.with(index, |peer| peer.to);
                    let error = DatagramError { icmp: Some((3, 3)), offender: None, to, quoted: 0 };
                    asker.net.kernel.datagram_error(index, error, &[0, 1]);
                    asker.net.settle();
                    asker.close_failed(&mut open);
                }
                Step::Wait { millis } => {
                    asker.net.wait(Duration::from_millis(millis.into()));
                    asker.close_failed(&mut open);
                }
                Step::Reload { list } => asker.net.nat.set_resolvers(fixed(&list)),
                Step::Leave => {
                    asker.net.nat.port_left(PORT, asker.net.now, &mut asker.net.out);
                    open.clear();
                }
            }
            prop_assert!(asker.net.kernel.open() <= 4);
            for index in 0..asker.net.kernel.len() {
                for sent in asker.net.kernel.sent(index) {
                    let local = sent.bytes.windows(9).any(|w| w.eq_ignore_ascii_case(b"\x08internal"));
                    prop_assert!(!local, "a local name has left");
                }
            }
        }
        asker.net.wait(Duration::from_secs(200));
        asker.net.assert_empty();
    }
}
