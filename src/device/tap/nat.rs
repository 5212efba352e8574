//! The rules of one network of ours: [`Rules`] keeps a guest's packets where its mode says, and in
//! shared mode gives those that leave the address of the host.

use std::ffi::CStr;
use std::io;
use std::net::Ipv4Addr;

use netlink_bindings::consts;
use netlink_bindings::nftables::{
    CmpOps, CtKeys, MetaKeys, PayloadBase, PushExprListAttrs, Registers, TableFlags, VerdictCode,
};
use netlink_bindings::utils::Pusher;

use super::link::{Refusal, Socket, is_interface_name};
use super::nft::{FORWARD, PREFIX, TRANSLATION, inet, transact};
use crate::error::{ConfigError, Error};

/// The rules of one network, in an nftables table of its own, `inet vmring_TAP`. They hold whatever
/// `ip_forward` is, and each of them counts what it takes.
///
/// | chain | what it drops |
/// |---|---|
/// | `prerouting` | from the TAP: IPv4 from an address outside the network, ICMP redirects, ICMPv6 redirects and router advertisements |
/// | `forward`, host mode | all that comes from the TAP or goes to it |
/// | `forward`, shared mode | IPv6 from and to the TAP; IPv4 to the TAP, unless it belongs to a connection of the guest's or a rule of the operator's (`dnat`) has sent it there |
///
/// In shared mode the chain `postrouting` translates: the network's packets leave with the address of
/// the interface by which they leave.
///
/// Dropping this removes the table. The kernel also removes it when the process ends, in whatever
/// way. Until then no other process can change the table, and `nft flush ruleset` leaves it alone.
/// (Linux before 5.12 does not have such tables. There a killed process leaves its table behind,
/// and the next start for the same TAP replaces it.)
///
/// Connections that are translated at the time of the drop stay translated until they end.
#[derive(Debug)]
pub(crate) struct Rules {
    socket: Socket,
    table: String,
}

/// A network, and the TAP behind which its guest is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network<'a> {
    pub(crate) tap: &'a str,
    pub(crate) address: Ipv4Addr,
    pub(crate) prefix_len: u8,
    /// The guest reaches other networks, with the address of the host.
    pub(crate) shared: bool,
}

impl Rules {
    /// Makes the rules in the calling thread's network namespace. The bits of the address after the
    /// prefix are ignored.
    pub(crate) fn start(network: Network<'_>) -> Result<Self, Error> {
        let rules = rules_of(network)?;
        match Self::start_as(network.tap, &rules, true) {
            // A kernel before 5.12 does not know the flag. If the error had another reason, the
            // second attempt fails with it too.
            Err(refusal) if refusal.is(libc::EOPNOTSUPP) || refusal.is(libc::EINVAL) => {
                Self::start_as(network.tap, &rules, false)
            }
            answer => answer,
        }
        .map_err(|refusal| {
            let missing = [libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT];
            let trying = if missing.into_iter().any(|errno| refusal.is(errno)) {
                "making the nftables table of the network, for which the kernel (5.2 or later) \
                 needs nf_tables, nf_tables_inet, nft_ct, nft_chain_nat and nft_masq"
            } else {
                "making the nftables table of the network"
            };
            refusal.into_error(trying)
        })
    }

    /// Creates the table. If `owned`, the kernel removes it when the socket is closed.
    fn start_as(tap: &str, rules: &[Rule], owned: bool) -> Result<Self, Refusal> {
        let mut socket = Socket::open(consts::NETLINK_NETFILTER)?;
        let table = format!("{PREFIX}{tap}");
        let mut made = make_table(&mut socket, &table, rules, owned, false);
        // A process that was killed on an older kernel has left this table behind. It is replaced.
        if made.as_ref().is_err_and(|refusal| refusal.is(libc::EEXIST)) {
            made = make_table(&mut socket, &table, rules, owned, true);
        }
        made.map_err(|refusal| {
            if refusal.belongs_to_another() {
                let text = format!(
                    "the table {table} belongs to another interface, which has a network on {tap} \
                     already; stop that one first"
                );
                io::Error::new(io::ErrorKind::AddrInUse, text).into()
            } else {
                refusal
            }
        })?;
        Ok(Self { socket, table })
    }
}

/// Creates the table, its chains and its rules, or nothing on error. If `replace`, first removes the
/// table of that name.
fn make_table(
    socket: &mut Socket,
    table: &str,
    rules: &[Rule],
    owned: bool,
    replace: bool,
) -> Result<(), Refusal> {
    let table = table.as_bytes();
    transact(socket, |batch| {
        if replace {
            batch.request().op_deltable_do(&inet()).encode().push_name_bytes(table);
        }
        batch
            .request()
            .set_create()
            .set_excl()
            .op_newtable_do(&inet())
            .encode()
            .push_name_bytes(table)
            .push_flags(if owned { TableFlags::Owner as u32 } else { 0 });
        for chain in [&ARRIVING, &PASSING, &LEAVING] {
            if rules.iter().any(|rule| rule.chain.name == chain.name) {
                batch
                    .request()
                    .set_create()
                    .op_newchain_do(&inet())
                    .encode()
                    .push_table_bytes(table)
                    .push_name(chain.name)
                    .push_type(chain.kind)
                    .nested_hook()
                    .push_num(chain.hook)
                    .push_priority(chain.priority);
            }
        }
        for rule in rules {
            let mut expressions = batch
                .request()
                .set_create()
                .set_append()
                .op_newrule_do(&inet())
                .into_encoder()
                .push_table_bytes(table)
                .push_chain(rule.chain.name)
                .nested_expressions();
            for expression in &rule.expressions {
                expressions = expression.push(expressions);
            }
        }
    })
}

impl Drop for Rules {
    fn drop(&mut self) {
        // Closing the socket is not enough: a child that another thread has just forked has a copy
        // of it until it executes its program.
        let table = self.table.as_bytes();
        let gone = transact(&mut self.socket, |batch| {
            batch.request().op_deltable_do(&inet()).encode().push_name_bytes(table);
        });
        // ENOENT: before Linux 5.12 any process may have removed the table.
        if let Err(refusal) = gone
            && !refusal.is(libc::ENOENT)
        {
            let error = refusal.into_error("removing the nftables table of a network");
            tracing::warn!(table = self.table, %error, "the network's rules could not be removed");
        }
    }
}

/// A chain of the table. The priorities are those that nft calls `raw`, `filter` and `srcnat`
/// (`NF_IP_PRI_RAW`, `NF_IP_PRI_FILTER` and `NF_IP_PRI_NAT_SRC`).
#[derive(Debug)]
struct Chain {
    name: &'static CStr,
    kind: &'static CStr,
    hook: u32,
    priority: i32,
}

const ARRIVING: Chain = Chain {
    name: c"prerouting",
    kind: c"filter",
    hook: libc::NF_INET_PRE_ROUTING as u32,
    priority: -300,
};
const PASSING: Chain = Chain { name: c"forward", kind: c"filter", hook: FORWARD, priority: 0 };
const LEAVING: Chain = Chain {
    name: TRANSLATION,
    kind: c"nat",
    hook: libc::NF_INET_POST_ROUTING as u32,
    priority: 100,
};

/// A rule: all matches, a counter, and what becomes of the packet.
#[derive(Debug)]
struct Rule {
    chain: &'static Chain,
    expressions: Vec<Expression>,
}

/// Returns the rules of a network.
fn rules_of(network: Network<'_>) -> Result<Vec<Rule>, Error> {
    let Network { tap, address, prefix_len, shared } = network;
    if !is_interface_name(tap) {
        let what = format!(
            "{tap:?} cannot be an interface's name: it needs 1 to 15 bytes, without / and :"
        );
        return Err(ConfigError::Invalid(what).into());
    }
    if prefix_len > 32 {
        return Err(ConfigError::TooLarge {
            what: "prefix length of the IPv4 network",
            value: prefix_len.into(),
            max: 32,
        }
        .into());
    }
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0);
    let inside = |offset: u32, op: CmpOps| Expression::Payload {
        base: PayloadBase::NetworkHeader,
        offset,
        mask: mask.to_be_bytes().to_vec(),
        op,
        value: (address.to_bits() & mask).to_be_bytes().to_vec(),
    };
    let name = |key: MetaKeys, op: CmpOps| {
        let mut name = vec![0; libc::IFNAMSIZ];
        name[..tap.len()].copy_from_slice(tap.as_bytes());
        Expression::Meta { key, op, value: name }
    };
    let from_tap = || name(MetaKeys::Iifname, CmpOps::Eq);
    let to_tap = || name(MetaKeys::Oifname, CmpOps::Eq);
    let rule = |chain, matches: Vec<Expression>, verdict| {
        let end = [Expression::Counter, verdict];
        Rule { chain, expressions: matches.into_iter().chain(end).collect() }
    };
    let dropped = |chain, matches| rule(chain, matches, Expression::Verdict(VerdictCode::Drop));
    let of = |protocol: i32, kind: u8| {
        // The type is the first byte of ICMP (RFC 792) and ICMPv6 (RFC 4443 section 2.1).
        let protocol = Expression::Meta {
            key: MetaKeys::L4Proto,
            op: CmpOps::Eq,
            value: vec![protocol as u8],
        };
        let kind = Expression::Payload {
            base: PayloadBase::TransportHeader,
            offset: 0,
            mask: vec![0xff],
            op: CmpOps::Eq,
            value: vec![kind],
        };
        vec![from_tap(), protocol, kind]
    };
    let family = |family: i32| Expression::Meta {
        key: MetaKeys::Nfproto,
        op: CmpOps::Eq,
        value: vec![family as u8],
    };
    let nobody = Expression::Payload {
        base: PayloadBase::NetworkHeader,
        offset: SOURCE,
        mask: vec![0xff; 4],
        op: CmpOps::Neq,
        // A host that asks for an address has none (RFC 2131 section 4.1).
        value: vec![0; 4],
    };
    let mut rules = vec![
        dropped(
            &ARRIVING,
            vec![from_tap(), family(libc::NFPROTO_IPV4), inside(SOURCE, CmpOps::Neq), nobody],
        ),
        dropped(&ARRIVING, of(libc::IPPROTO_ICMP, ICMP_REDIRECT)),
        dropped(&ARRIVING, of(libc::IPPROTO_ICMPV6, ROUTER_ADVERTISEMENT)),
        dropped(&ARRIVING, of(libc::IPPROTO_ICMPV6, ICMPV6_REDIRECT)),
    ];
    if !shared {
        rules.push(dropped(&PASSING, vec![from_tap()]));
        rules.push(dropped(&PASSING, vec![to_tap()]));
        return Ok(rules);
    }
    let accept = Expression::Verdict(VerdictCode::Accept);
    let answers = Expression::Conntrack { key: CtKeys::State, any_of: ESTABLISHED | RELATED };
    let operators = Expression::Conntrack { key: CtKeys::Status, any_of: DST_NAT };
    rules.extend([
        dropped(&PASSING, vec![from_tap(), family(libc::NFPROTO_IPV6)]),
        dropped(&PASSING, vec![to_tap(), family(libc::NFPROTO_IPV6)]),
        rule(&PASSING, vec![to_tap(), answers], accept.clone()),
        rule(&PASSING, vec![to_tap(), operators], accept),
        dropped(&PASSING, vec![to_tap()]),
    ]);
    // The host also has an address in the network, and may send to itself from there.
    let leaves = vec![
        family(libc::NFPROTO_IPV4),
        inside(SOURCE, CmpOps::Eq),
        inside(DESTINATION, CmpOps::Neq),
        name(MetaKeys::Oifname, CmpOps::Neq),
    ];
    rules.push(rule(&LEAVING, leaves, Expression::Masquerade));
    Ok(rules)
}

/// The offsets of the addresses in an IPv4 header, in bytes (RFC 791 section 3.1).
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;

/// The type of a redirect in ICMP (RFC 792), of a router advertisement and a redirect in ICMPv6
/// (RFC 4861 sections 4.2 and 4.5).
const ICMP_REDIRECT: u8 = 5;
const ROUTER_ADVERTISEMENT: u8 = 134;
const ICMPV6_REDIRECT: u8 = 137;

/// The states of a connection (`NF_CT_STATE_BIT`), and the status of one whose destination was
/// translated (`IPS_DST_NAT`).
const ESTABLISHED: u32 = 1 << 1;
const RELATED: u32 = 1 << 2;
const DST_NAT: u32 = 1 << 5;

/// A part of a rule.
#[derive(Clone, Debug)]
enum Expression {
    Meta {
        key: MetaKeys,
        op: CmpOps,
        value: Vec<u8>,
    },
    /// `mask` and `value` have the length of the field.
    Payload {
        base: PayloadBase,
        offset: u32,
        mask: Vec<u8>,
        op: CmpOps,
        value: Vec<u8>,
    },
    /// The word has one of these bits.
    Conntrack {
        key: CtKeys,
        any_of: u32,
    },
    Counter,
    Verdict(VerdictCode),
    Masquerade,
}

impl Expression {
    fn push<Prev: Pusher>(&self, rule: PushExprListAttrs<Prev>) -> PushExprListAttrs<Prev> {
        match self {
            Self::Meta { key, op, value } => {
                let rule = rule
                    .nested_elem()
                    .nested_data_meta()
                    .push_key(*key as u32)
                    .push_dreg(REGISTER)
                    .end_nested()
                    .end_nested();
                push_compare(rule, *op, value)
            }
            Self::Payload { base, offset, mask, op, value } => {
                let rule = rule
                    .nested_elem()
                    .nested_data_payload()
                    .push_dreg(REGISTER)
                    .push_base(*base as u32)
                    .push_offset(*offset)
                    .push_len(mask.len() as u32)
                    .end_nested()
                    .end_nested();
                let whole = mask.iter().all(|byte| *byte == 0xff);
                let rule = if whole { rule } else { push_mask(rule, mask) };
                push_compare(rule, *op, value)
            }
            Self::Conntrack { key, any_of } => {
                let rule = rule
                    .nested_elem()
                    .nested_data_ct()
                    .push_key(*key as u32)
                    .push_dreg(REGISTER)
                    .end_nested()
                    .end_nested();
                let rule = push_mask(rule, &any_of.to_ne_bytes());
                push_compare(rule, CmpOps::Neq, &[0; 4])
            }
            Self::Counter => rule.nested_elem().nested_data_counter().end_nested().end_nested(),
            Self::Verdict(code) => rule
                .nested_elem()
                .nested_data_immediate()
                .push_dreg(Registers::RegVerdict as u32)
                .nested_data()
                .nested_verdict()
                .push_code(*code as u32)
                .end_nested()
                .end_nested()
                .end_nested()
                .end_nested(),
            // A masq expression without attributes may choose any port.
            Self::Masquerade => rule.nested_elem().push_name(c"masq").end_nested(),
        }
    }
}

/// The only register that the rules use.
const REGISTER: u32 = Registers::Reg1 as u32;

/// Adds a mask of the register's content.
fn push_mask<Prev: Pusher>(rule: PushExprListAttrs<Prev>, mask: &[u8]) -> PushExprListAttrs<Prev> {
    rule.nested_elem()
        .nested_data_bitwise()
        .push_sreg(REGISTER)
        .push_dreg(REGISTER)
        .push_len(mask.len() as u32)
        .nested_mask()
        .push_value(mask)
        .end_nested()
        .nested_xor()
        .push_value(&vec![0; mask.len()])
        .end_nested()
        .end_nested()
        .end_nested()
}

/// Adds a comparison of the register with `value`.
fn push_compare<Prev: Pusher>(
    rule: PushExprListAttrs<Prev>,
    op: CmpOps,
    value: &[u8],
) -> PushExprListAttrs<Prev> {
    rule.nested_elem()
        .nested_data_cmp()
        .push_sreg(REGISTER)
        .push_op(op as u32)
        .nested_data()
        .push_value(value)
        .end_nested()
        .end_nested()
        .end_nested()
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::super::forwarding::Forwarding;
    use super::super::link::testing::{Namespace, run};
    use super::*;

    const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
    const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 0);
    /// Far longer than anything takes on a slow and busy machine.
    const LONG: Duration = Duration::from_secs(60);

    /// A shared network behind `tap`.
    fn shared(tap: &str, address: Ipv4Addr, prefix_len: u8) -> Network<'_> {
        Network { tap, address, prefix_len, shared: true }
    }

    /// Returns the names of all tables.
    fn tables() -> Vec<String> {
        let mut tables = Vec::new();
        for item in ruleset() {
            if let Some(name) = item["table"]["name"].as_str() {
                tables.push(name.to_owned());
            }
        }
        tables
    }

    fn ruleset() -> Vec<Value> {
        let all: Value = serde_json::from_str(&run("nft -j list ruleset")).unwrap();
        all["nftables"].as_array().unwrap().clone()
    }

    #[test]
    fn the_table_says_what_was_asked_and_goes_at_the_drop() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            // The bits of the address after the prefix are ignored.
            let made = Rules::start(shared("tap0", Ipv4Addr::new(10, 9, 8, 77), 24)).unwrap();
            let text = run("nft list table inet vmring_tap0");
            assert!(text.contains("flags owner"), "is this kernel older than 5.12? {text}");
            let hook = "type nat hook postrouting priority srcnat; policy accept;";
            assert!(text.contains(hook), "{text}");
            for rule in [
                "iifname \"tap0\" ip saddr != 10.9.8.0/24 ip saddr != 0.0.0.0",
                "iifname \"tap0\" icmp type redirect",
                "iifname \"tap0\" icmpv6 type nd-router-advert",
                "iifname \"tap0\" icmpv6 type nd-redirect",
                "iifname \"tap0\" meta nfproto ipv6",
                "oifname \"tap0\" meta nfproto ipv6",
                "oifname \"tap0\"",
            ] {
                let rule = format!("{rule} counter packets 0 bytes 0 drop");
                assert!(text.contains(&rule), "{rule} is not in {text}");
            }
            for rule in [
                "oifname \"tap0\" ct state established,related counter packets 0 bytes 0 accept",
                "oifname \"tap0\" ct status dnat counter packets 0 bytes 0 accept",
                "ip saddr 10.9.8.0/24 ip daddr != 10.9.8.0/24 oifname != \"tap0\" \
                 counter packets 0 bytes 0 masquerade",
            ] {
                assert!(text.contains(rule), "{rule} is not in {text}");
            }
            let rules = ruleset().iter().filter(|item| item["rule"].is_object()).count();
            assert_eq!((tables(), rules), (vec!["vmring_tap0".into()], 10));
            drop(made);
            assert_eq!(tables(), [""; 0]);
        });
    }

    #[test]
    fn the_table_of_a_host_network_lets_nothing_pass() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            let network = Network { shared: false, ..shared("tap0", NETWORK, 24) };
            let _rules = Rules::start(network).unwrap();
            let text = run("nft list table inet vmring_tap0");
            for way in ["iifname", "oifname"] {
                let rule = format!("\t\t{way} \"tap0\" counter packets 0 bytes 0 drop\n");
                assert!(text.contains(&rule), "{rule} is not in {text}");
            }
            assert!(!text.contains("masquerade") && !text.contains("accept\n"), "{text}");
        });
    }

    #[test]
    fn every_prefix_length_makes_a_rule() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            for (prefix_len, shown) in [(0, "0.0.0.0/0"), (20, "10.9.0.0/20"), (32, "10.9.8.0")] {
                let _masquerade = Rules::start(shared("tap0", NETWORK, prefix_len)).unwrap();
                let text = run("nft list table inet vmring_tap0");
                assert!(text.contains(&format!("ip saddr {shown} ")), "{text}");
            }
            let error = Rules::start(shared("tap0", NETWORK, 33)).unwrap_err();
            assert!(error.to_string().contains("at most 32, but it is 33"), "{error}");
            let error = Rules::start(shared("no/name", NETWORK, 24)).unwrap_err();
            assert!(error.to_string().contains("cannot be an interface's name"), "{error}");
        });
    }

    #[test]
    fn one_tap_has_one_network_and_others_beside_it() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            let first = Rules::start(shared("tap0", NETWORK, 24)).unwrap();
            let error = Rules::start(shared("tap0", NETWORK, 24)).unwrap_err().to_string();
            assert!(error.contains("stop that one first"), "{error}");
            let other = Rules::start(shared("tap1", NETWORK, 24)).unwrap();
            assert_eq!(tables(), ["vmring_tap0", "vmring_tap1"]);
            drop(first);
            assert_eq!(tables(), ["vmring_tap1"]);
            let _again = Rules::start(shared("tap0", NETWORK, 24)).unwrap();
            drop(other);
            assert_eq!(tables(), ["vmring_tap0"]);
        });
    }

    /// The test drops the socket, as a killed process does: nothing deletes the table explicitly.
    #[test]
    fn an_owners_table_goes_with_its_socket() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            let mut socket = Socket::open(consts::NETLINK_NETFILTER).unwrap();
            let rules = rules_of(shared("tap0", NETWORK, 24)).unwrap();
            make_table(&mut socket, "vmring_tap0", &rules, true, false).unwrap();
            assert_eq!(tables(), ["vmring_tap0"]);
            drop(socket);
            // Tests that run at the same time start programs. Their forks hold the socket for a
            // moment.
            let deadline = Instant::now() + LONG;
            while !tables().is_empty() {
                assert!(Instant::now() < deadline, "the table is still there");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    }

    /// As on a kernel that does not know owners. The value is dropped outside the namespace.
    #[test]
    fn a_table_without_an_owner_is_removed_and_a_left_one_replaced() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        let made = namespace.run(|| {
            run("nft add table inet vmring_tap0");
            run("nft add chain inet vmring_tap0 left-behind");
            let rules = rules_of(shared("tap0", NETWORK, 24)).unwrap();
            let made = Rules::start_as("tap0", &rules, false).unwrap();
            let text = run("nft list table inet vmring_tap0");
            assert!(text.contains("masquerade") && !text.contains("owner"), "{text}");
            assert!(!text.contains("left-behind"), "{text}");
            made
        });
        drop(made);
        namespace.run(|| assert_eq!(tables(), [""; 0]));
    }

    #[test]
    fn without_the_privilege_the_error_says_what_is_needed() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            // SAFETY: the raw call takes three numbers and no pointer. Unlike libc's setresuid, it
            // changes only this thread, which ends with the test.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            assert_eq!(result, 0);
            let error = Rules::start(shared("tap0", NETWORK, 24)).unwrap_err();
            assert!(matches!(error, Error::PermissionDenied { .. }), "{error:?}");
            let error = Forwarding::start().unwrap_err();
            assert!(matches!(error, Error::PermissionDenied { .. }), "{error:?}");
            assert!(error.to_string().contains("sysctl -w net.ipv4.ip_forward=1"), "{error}");
        });
    }

    /// Returns the next packet and its sender. (A receive with a timeout may fail with
    /// "interrupted" at any time.)
    fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 16];
        loop {
            match socket.recv_from(&mut buffer) {
                Ok((len, from)) => return (buffer[..len].to_vec(), from),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!("no packet came: {error}"),
            }
        }
    }

    /// A guest is behind the host. The other network (`world`) has no route back to the guest's
    /// network, so answers arrive only if the host gave the guest's packets its own address.
    #[test]
    fn a_guest_reaches_the_world_by_the_hosts_address() {
        let programs = ["ip", "ping"];
        let Some(guest) = Namespace::new(&programs) else { return };
        let (Some(host), Some(world)) = (Namespace::new(&[]), Namespace::new(&[])) else { return };
        let world_address = Ipv4Addr::new(192, 0, 2, 2);
        let host_address = Ipv4Addr::new(192, 0, 2, 1);

        host.run(|| {
            std::fs::write(IP_FORWARD, "0").unwrap();
            // The interface to the world comes first: the host's own packets would get its address.
            run(&format!("ip link add up0 type veth peer name eth0 netns {}", world.path()));
            run(&format!("ip link add tap0 type veth peer name eth0 netns {}", guest.path()));
            run("ip link set lo up");
            run("ip address add 192.0.2.1/24 dev up0");
            run("ip link set up0 up");
            run("ip address add 10.9.8.1/24 dev tap0");
            run("ip link set tap0 up");
        });
        guest.run(|| {
            run("ip address add 10.9.8.2/24 dev eth0");
            run("ip link set eth0 up");
            run("ip route add default via 10.9.8.1");
        });
        world.run(|| {
            run("ip address add 192.0.2.2/24 dev eth0");
            run("ip link set eth0 up");
        });

        let patience = Some(LONG);
        let server = world.run(|| UdpSocket::bind((world_address, 7000)).unwrap());
        server.set_read_timeout(patience).unwrap();
        let client = guest.run(|| UdpSocket::bind("10.9.8.2:0").unwrap());
        client.set_read_timeout(patience).unwrap();
        let world_server = SocketAddrV4::new(world_address, 7000);

        let (rules, forwarding) = host.run(|| {
            (Rules::start(shared("tap0", NETWORK, 24)).unwrap(), Forwarding::start().unwrap())
        });
        client.send_to(b"ask", world_server).unwrap();
        let (packet, from) = receive(&server);
        assert_eq!((&packet[..], from.ip()), (&b"ask"[..], host_address.into()));
        server.send_to(b"answer", from).unwrap();
        let (packet, from) = receive(&client);
        assert_eq!((&packet[..], from), (&b"answer"[..], world_server.into()));
        guest.run(|| run("ping -c 1 -W 60 192.0.2.2"));

        // When the host sends to its own address in the guest's network, the packets keep that
        // address.
        host.run(|| {
            let own = UdpSocket::bind("10.9.8.1:7001").unwrap();
            own.set_read_timeout(patience).unwrap();
            own.send_to(b"me", "10.9.8.1:7001").unwrap();
            let (_, from) = receive(&own);
            assert_eq!(from, "10.9.8.1:7001".parse().unwrap());
        });

        // Without the translation the world sees an address that it cannot answer. The guest uses a
        // new port, because the connection of the old one stays translated until it ends.
        drop(rules);
        let late = guest.run(|| UdpSocket::bind("10.9.8.2:0").unwrap());
        late.send_to(b"ask", world_server).unwrap();
        let (_, from) = receive(&server);
        assert_eq!(from.ip(), Ipv4Addr::new(10, 9, 8, 2));
        assert!(server.send_to(b"answer", from).is_err(), "the world has a way back");
        forwarding.stop().unwrap();
        host.run(|| assert_eq!(std::fs::read_to_string(IP_FORWARD).unwrap(), "0\n"));
    }
}
