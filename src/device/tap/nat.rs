//! What the host must do so that a guest's network reaches other networks. [`Masquerade`] gives the
//! guest's packets the host's address, and [`Forwarding`] lets the host forward them. Dropping
//! either undoes it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use netlink_bindings::consts;
use netlink_bindings::nftables::{
    CmpOps, MetaKeys, PayloadBase, PushExprListAttrs, Registers, TableFlags,
};
use netlink_bindings::utils::Pusher;

use super::link::{Refusal, Socket, is_interface_name};
use super::nft::{ip, transact};
use crate::error::{ConfigError, Error};

/// Network address translation for one network: its packets leave the host with the address of the
/// interface by which they leave. The rule is in an nftables table of its own, `vmring_TAP`.
///
/// Dropping this removes the table. The kernel also removes it when the process ends, in whatever
/// way. Until then no other process can change the table, and `nft flush ruleset` leaves it alone.
/// (Linux before 5.12 does not have such tables. There a killed process leaves its table behind,
/// and the next start for the same TAP replaces it.)
///
/// Connections that are translated at the time of the drop stay translated until they end.
#[derive(Debug)]
pub(crate) struct Masquerade {
    socket: Socket,
    table: String,
}

impl Masquerade {
    /// Starts to translate packets that come from `network`, go to another network, and do not
    /// leave by `tap` (or the bridge of that name), in the calling thread's network namespace.
    pub(crate) fn start(tap: &str, network: Ipv4Addr, prefix_len: u8) -> Result<Self, Error> {
        let rule = Rule::new(tap, network, prefix_len)?;
        match Self::start_as(tap, &rule, true) {
            // A kernel before 5.12 does not know the flag. If the error had another reason, the
            // second attempt fails with it too.
            Err(refusal) if refusal.is(libc::EOPNOTSUPP) || refusal.is(libc::EINVAL) => {
                Self::start_as(tap, &rule, false)
            }
            answer => answer,
        }
        .map_err(|refusal| {
            let missing = [libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT];
            let trying = if missing.into_iter().any(|errno| refusal.is(errno)) {
                "making an nftables table for NAT, for which the kernel needs nf_tables, \
                 nft_chain_nat and nft_masq"
            } else {
                "making an nftables table for NAT"
            };
            refusal.into_error(trying)
        })
    }

    /// Creates the table. If `owned`, the kernel removes it when the socket is closed.
    fn start_as(tap: &str, rule: &Rule, owned: bool) -> Result<Self, Refusal> {
        let mut socket = Socket::open(consts::NETLINK_NETFILTER)?;
        let table = format!("vmring_{tap}");
        let mut made = make_table(&mut socket, &table, rule, owned, false);
        // A process that was killed on an older kernel has left this table behind. It is replaced.
        if made.as_ref().is_err_and(|refusal| refusal.is(libc::EEXIST)) {
            made = make_table(&mut socket, &table, rule, owned, true);
        }
        made.map_err(|refusal| {
            // If the process lacks the privilege, the kernel refuses the first message, which
            // begins the batch. If the table belongs to another socket, it refuses the message that
            // names the table.
            if refusal.is(libc::EPERM) && refusal.message() > 0 {
                let text = format!(
                    "the table {table} belongs to another interface, which translates for {tap} \
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

/// Creates the table, its chain and its rule, or nothing on error. If `replace`, first removes the
/// table of that name.
fn make_table(
    socket: &mut Socket,
    table: &str,
    rule: &Rule,
    owned: bool,
    replace: bool,
) -> Result<(), Refusal> {
    let table = table.as_bytes();
    transact(socket, |batch| {
        if replace {
            batch.request().op_deltable_do(&ip()).encode().push_name_bytes(table);
        }
        batch
            .request()
            .set_create()
            .set_excl()
            .op_newtable_do(&ip())
            .encode()
            .push_name_bytes(table)
            .push_flags(if owned { TableFlags::Owner as u32 } else { 0 });
        batch
            .request()
            .set_create()
            .op_newchain_do(&ip())
            .encode()
            .push_table_bytes(table)
            .push_name(CHAIN)
            .push_type(c"nat")
            .nested_hook()
            .push_num(libc::NF_INET_POST_ROUTING as u32)
            .push_priority(SOURCE_NAT);
        rule.push(
            batch
                .request()
                .set_create()
                .set_append()
                .op_newrule_do(&ip())
                .encode()
                .push_table_bytes(table)
                .push_chain(CHAIN)
                .nested_expressions(),
        );
    })
}

impl Drop for Masquerade {
    fn drop(&mut self) {
        // Closing the socket is not enough: a child that another thread has just forked has a copy
        // of it until it executes its program.
        let table = self.table.as_bytes();
        let gone = transact(&mut self.socket, |batch| {
            batch.request().op_deltable_do(&ip()).encode().push_name_bytes(table);
        });
        // ENOENT: before Linux 5.12 any process may have removed the table.
        if let Err(refusal) = gone
            && !refusal.is(libc::ENOENT)
        {
            let error = refusal.into_error("removing the nftables table for NAT");
            tracing::warn!(table = self.table, %error, "NAT could not be switched off");
        }
    }
}

/// The name of the table's chain.
const CHAIN: &std::ffi::CStr = c"postrouting";

/// The chain's priority: nft's `priority srcnat` (`NF_IP_PRI_NAT_SRC`).
const SOURCE_NAT: i32 = 100;

/// The rule `ip saddr NETWORK ip daddr != NETWORK oifname != TAP counter masquerade`.
struct Rule {
    network: [u8; 4],
    mask: [u8; 4],
    tap: [u8; libc::IFNAMSIZ],
}

impl Rule {
    fn new(tap: &str, network: Ipv4Addr, prefix_len: u8) -> Result<Self, Error> {
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
        let mut name = [0; libc::IFNAMSIZ];
        name[..tap.len()].copy_from_slice(tap.as_bytes());
        Ok(Self {
            network: (network.to_bits() & mask).to_be_bytes(),
            mask: mask.to_be_bytes(),
            tap: name,
        })
    }

    fn push<Prev: Pusher>(&self, rule: PushExprListAttrs<Prev>) {
        // The offsets of the addresses in an IPv4 header, in bytes.
        const SOURCE: u32 = 12;
        const DESTINATION: u32 = 16;
        let rule = self.push_network(rule, SOURCE, CmpOps::Eq);
        // The host also has an address in the network, and may send to itself from there.
        let rule = self.push_network(rule, DESTINATION, CmpOps::Neq);
        let rule = rule
            .nested_elem()
            .nested_data_meta()
            .push_key(MetaKeys::Oifname as u32)
            .push_dreg(REGISTER)
            .end_nested()
            .end_nested();
        let rule = push_compare(rule, CmpOps::Neq, &self.tap);
        rule.nested_elem()
            .nested_data_counter()
            .end_nested()
            .end_nested()
            // A masq expression without attributes may choose any port.
            .nested_elem()
            .push_name(c"masq")
            .end_nested()
            .end_nested();
    }

    /// Adds a match on the address at `offset`: with `Eq` it must be in the network, with `Neq` it
    /// must not.
    fn push_network<Prev: Pusher>(
        &self,
        rule: PushExprListAttrs<Prev>,
        offset: u32,
        op: CmpOps,
    ) -> PushExprListAttrs<Prev> {
        let rule = rule
            .nested_elem()
            .nested_data_payload()
            .push_dreg(REGISTER)
            .push_base(PayloadBase::NetworkHeader as u32)
            .push_offset(offset)
            .push_len(4)
            .end_nested()
            .end_nested()
            .nested_elem()
            .nested_data_bitwise()
            .push_sreg(REGISTER)
            .push_dreg(REGISTER)
            .push_len(4)
            .nested_mask()
            .push_value(&self.mask)
            .end_nested()
            .nested_xor()
            .push_value(&[0; 4])
            .end_nested()
            .end_nested()
            .end_nested();
        push_compare(rule, op, &self.network)
    }
}

/// The only register that the rule uses.
const REGISTER: u32 = Registers::Reg1 as u32;

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

/// A holder of IPv4 forwarding (`net.ipv4.ip_forward`) in the network namespace of the thread that
/// started it. If forwarding was off, the first holder in this process switches it on, and the last
/// one to go switches it off again.
///
/// Whenever forwarding is switched on or off, the kernel resets settings of each interface that
/// differ between hosts and routers (`accept_redirects`, `conf.*.forwarding`). A process that is
/// killed leaves forwarding on.
#[derive(Debug)]
pub(crate) struct Forwarding {
    /// `None` after a stop.
    namespace: Option<NamespaceId>,
    /// Forwarding was off before the first holder of this namespace.
    changed: bool,
}

/// The device and inode numbers of a namespace's file, which identify the namespace.
type NamespaceId = (u64, u64);

/// The state that all holders in one namespace share.
#[derive(Debug)]
struct Forwarded {
    holders: usize,
    /// If forwarding was off before: the file to switch it off with, and the file's earlier
    /// content. A write to this file takes effect in the namespace in which it was opened,
    /// whichever thread writes.
    before: Option<(File, Vec<u8>)>,
    /// Keeps the namespace alive, so that its inode number is not reused.
    _namespace: File,
}

/// The namespaces in which this process has a holder.
static FORWARDED: Mutex<Option<HashMap<NamespaceId, Forwarded>>> = Mutex::new(None);

fn forwarded() -> MutexGuard<'static, Option<HashMap<NamespaceId, Forwarded>>> {
    // A static, so not a lock of `crate::sync`.
    FORWARDED.lock().unwrap_or_else(PoisonError::into_inner)
}

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

impl Forwarding {
    /// Switches forwarding on in the calling thread's network namespace, if it is off.
    pub(crate) fn start() -> Result<Self, Error> {
        let looking = "looking up this thread's network namespace";
        let namespace = File::open("/proc/thread-self/ns/net").map_err(Error::io(looking))?;
        let metadata = namespace.metadata().map_err(Error::io(looking))?;
        let id = (metadata.dev(), metadata.ino());

        let mut all = forwarded();
        let all = all.get_or_insert_default();
        let changed = match all.get_mut(&id) {
            Some(forwarded) => {
                forwarded.holders += 1;
                forwarded.before.is_some()
            }
            None => {
                let before = switch_on()?;
                let changed = before.is_some();
                all.insert(id, Forwarded { holders: 1, before, _namespace: namespace });
                changed
            }
        };
        Ok(Self { namespace: Some(id), changed })
    }

    /// Whether forwarding was off before this process switched it on. If so, it will be switched
    /// off again.
    pub(crate) fn changed(&self) -> bool {
        self.changed
    }

    /// Releases this holder. Returns an error if forwarding had to be switched off and could not
    /// be. A drop only logs that error.
    pub(crate) fn stop(mut self) -> Result<(), Error> {
        self.release()
    }

    fn release(&mut self) -> Result<(), Error> {
        let Some(id) = self.namespace.take() else { return Ok(()) };
        let mut all = forwarded();
        let all = all.get_or_insert_default();
        let forwarded = all.get_mut(&id).expect("a holder is counted until it is released");
        forwarded.holders -= 1;
        if forwarded.holders > 0 {
            return Ok(());
        }
        let forwarded = all.remove(&id).expect("it was just there");
        if let Some((file, before)) = forwarded.before {
            file.write_all_at(&before, 0)
                .map_err(Error::io("putting net.ipv4.ip_forward back to 0"))?;
            tracing::info!("IPv4 forwarding is off again, as it was");
        }
        Ok(())
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(%error, "IPv4 forwarding stays on");
        }
    }
}

/// Switches forwarding on in the calling thread's network namespace. Returns the file and its
/// earlier content, or `None` if forwarding was on already.
fn switch_on() -> Result<Option<(File, Vec<u8>)>, Error> {
    let before =
        std::fs::read(IP_FORWARD).map_err(Error::io("reading /proc/sys/net/ipv4/ip_forward"))?;
    if before.trim_ascii() != b"0" {
        return Ok(None);
    }
    let write = || {
        let file = OpenOptions::new().write(true).open(IP_FORWARD)?;
        file.write_all_at(b"1\n", 0)?;
        Ok(file)
    };
    let file = write().map_err(|source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::PermissionDenied {
                needs: format!(
                    "root and a writable /proc/sys to switch IPv4 forwarding on (or let root do \
                     it: sysctl -w net.ipv4.ip_forward=1): {source}"
                ),
            }
        }
        _ => Error::Io { what: "switching net.ipv4.ip_forward on", source },
    })?;
    tracing::info!("IPv4 forwarding is on now (net.ipv4.ip_forward); it was off");
    Ok(Some((file, before)))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::super::link::testing::{Namespace, run};
    use super::*;

    const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 0);

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
            let masquerade = Masquerade::start("tap0", Ipv4Addr::new(10, 9, 8, 77), 24).unwrap();
            let text = run("nft list table ip vmring_tap0");
            assert!(text.contains("flags owner"), "is this kernel older than 5.12? {text}");
            let hook = "type nat hook postrouting priority srcnat; policy accept;";
            assert!(text.contains(hook), "{text}");
            let rule = "ip saddr 10.9.8.0/24 ip daddr != 10.9.8.0/24 oifname != \"tap0\" \
                        counter packets 0 bytes 0 masquerade";
            assert!(text.contains(rule), "{text}");
            let rules = ruleset().iter().filter(|item| item["rule"].is_object()).count();
            assert_eq!((tables(), rules), (vec!["vmring_tap0".into()], 1));
            drop(masquerade);
            assert_eq!(tables(), [""; 0]);
        });
    }

    #[test]
    fn every_prefix_length_makes_a_rule() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            for (prefix_len, shown) in [(0, "0.0.0.0/0"), (20, "10.9.0.0/20"), (32, "10.9.8.0")] {
                let _masquerade = Masquerade::start("tap0", NETWORK, prefix_len).unwrap();
                let text = run("nft list table ip vmring_tap0");
                assert!(text.contains(&format!("ip saddr {shown} ")), "{text}");
            }
            let error = Masquerade::start("tap0", NETWORK, 33).unwrap_err();
            assert!(error.to_string().contains("at most 32, but it is 33"), "{error}");
            let error = Masquerade::start("no/name", NETWORK, 24).unwrap_err();
            assert!(error.to_string().contains("cannot be an interface's name"), "{error}");
        });
    }

    #[test]
    fn one_tap_is_masqueraded_once_and_others_beside_it() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            let first = Masquerade::start("tap0", NETWORK, 24).unwrap();
            let error = Masquerade::start("tap0", NETWORK, 24).unwrap_err().to_string();
            assert!(error.contains("stop that one first"), "{error}");
            let other = Masquerade::start("tap1", NETWORK, 24).unwrap();
            assert_eq!(tables(), ["vmring_tap0", "vmring_tap1"]);
            drop(first);
            assert_eq!(tables(), ["vmring_tap1"]);
            let _again = Masquerade::start("tap0", NETWORK, 24).unwrap();
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
            let rule = Rule::new("tap0", NETWORK, 24).unwrap();
            make_table(&mut socket, "vmring_tap0", &rule, true, false).unwrap();
            assert_eq!(tables(), ["vmring_tap0"]);
            drop(socket);
            // Tests that run at the same time start programs. Their forks hold the socket for a
            // moment.
            let deadline = Instant::now() + Duration::from_secs(5);
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
        let masquerade = namespace.run(|| {
            run("nft add table ip vmring_tap0");
            run("nft add chain ip vmring_tap0 left-behind");
            let rule = Rule::new("tap0", NETWORK, 24).unwrap();
            let masquerade = Masquerade::start_as("tap0", &rule, false).unwrap();
            let text = run("nft list table ip vmring_tap0");
            assert!(text.contains("masquerade") && !text.contains("owner"), "{text}");
            assert!(!text.contains("left-behind"), "{text}");
            masquerade
        });
        drop(masquerade);
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
            let error = Masquerade::start("tap0", NETWORK, 24).unwrap_err();
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

    fn forwards() -> bool {
        std::fs::read_to_string(IP_FORWARD).unwrap().trim() == "1"
    }

    #[test]
    fn forwarding_ends_with_its_last_holder() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        let second = namespace.run(|| {
            std::fs::write(IP_FORWARD, "0").unwrap();
            let first = Forwarding::start().unwrap();
            assert!(first.changed() && forwards());
            let second = Forwarding::start().unwrap();
            assert!(second.changed());
            first.stop().unwrap();
            assert!(forwards());
            second
        });
        // On a thread in another namespace.
        second.stop().unwrap();
        namespace.run(|| {
            assert!(!forwards());
            let third = Forwarding::start().unwrap();
            assert!(third.changed() && forwards());
            drop(third);
            assert!(!forwards());
        });
    }

    #[test]
    fn forwarding_that_was_on_stays_on() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            std::fs::write(IP_FORWARD, "1").unwrap();
            let forwarding = Forwarding::start().unwrap();
            assert!(!forwarding.changed());
            forwarding.stop().unwrap();
            assert!(forwards());
        });
    }

    #[test]
    fn each_namespace_forwards_for_itself() {
        let (Some(one), Some(two)) = (Namespace::new(&[]), Namespace::new(&[])) else { return };
        for namespace in [&one, &two] {
            namespace.run(|| std::fs::write(IP_FORWARD, "0").unwrap());
        }
        let first = one.run(|| Forwarding::start().unwrap());
        two.run(|| assert!(!forwards()));
        let second = two.run(|| Forwarding::start().unwrap());
        assert!(second.changed());
        drop(first);
        one.run(|| assert!(!forwards()));
        two.run(|| assert!(forwards()));
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

        let patience = Some(Duration::from_secs(5));
        let server = world.run(|| UdpSocket::bind((world_address, 7000)).unwrap());
        server.set_read_timeout(patience).unwrap();
        let client = guest.run(|| UdpSocket::bind("10.9.8.2:0").unwrap());
        client.set_read_timeout(patience).unwrap();
        let world_server = SocketAddrV4::new(world_address, 7000);

        let (masquerade, forwarding) = host.run(|| {
            (Masquerade::start("tap0", NETWORK, 24).unwrap(), Forwarding::start().unwrap())
        });
        client.send_to(b"ask", world_server).unwrap();
        let (packet, from) = receive(&server);
        assert_eq!((&packet[..], from.ip()), (&b"ask"[..], host_address.into()));
        server.send_to(b"answer", from).unwrap();
        let (packet, from) = receive(&client);
        assert_eq!((&packet[..], from), (&b"answer"[..], world_server.into()));
        guest.run(|| run("ping -c 1 -W 5 192.0.2.2"));

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
        drop(masquerade);
        let late = guest.run(|| UdpSocket::bind("10.9.8.2:0").unwrap());
        late.send_to(b"ask", world_server).unwrap();
        let (_, from) = receive(&server);
        assert_eq!(from.ip(), Ipv4Addr::new(10, 9, 8, 2));
        assert!(server.send_to(b"answer", from).is_err(), "the world has a way back");
        forwarding.stop().unwrap();
        host.run(|| assert!(!forwards()));
    }
}
