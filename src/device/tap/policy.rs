//! The host's own rules that drop what it forwards. No rule of another table can accept a packet that
//! such a chain drops, so vmring can only say so.

use std::ffi::c_int;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use super::nft::{BaseChain, FORWARD, PREFIX};

/// Returns the chains, of those given and of the older iptables, that drop the IPv4 packets which the
/// host forwards, unless a rule accepts them. This concerns the calling thread's network namespace.
pub(super) fn forward_drops(chains: &[BaseChain]) -> Vec<String> {
    let mut drops: Vec<_> = chains.iter().filter_map(dropping).collect();
    match legacy_drops() {
        Ok(true) => drops.push("iptables (legacy) filter FORWARD".to_owned()),
        Ok(false) => {}
        Err(error) => tracing::debug!(%error, "the tables of the older iptables are unknown"),
    }
    drops
}

fn dropping(chain: &BaseChain) -> Option<String> {
    let family = match chain.family {
        libc::NFPROTO_IPV4 => "ip",
        libc::NFPROTO_INET => "inet",
        _ => return None,
    };
    let ours = chain.table.starts_with(PREFIX);
    (chain.hook == FORWARD && chain.drops && !ours)
        .then(|| format!("{family} {} {}", chain.table, chain.name))
}

/// Whether the frames of bridges pass the same chains, as Docker sets it.
pub(super) fn bridges_too() -> bool {
    fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables")
        .is_ok_and(|text| text.trim() == "1")
}

/// Whether the chain FORWARD of the older iptables has the policy DROP. The question itself would make
/// the kernel create the table, so it is asked only if the table is there.
fn legacy_drops() -> io::Result<bool> {
    match fs::read_to_string("/proc/thread-self/net/ip_tables_names") {
        Ok(names) if names.lines().any(|name| name == "filter") => {}
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    // SAFETY: socket(2) takes three numbers and no pointer.
    let fd = unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has just opened this descriptor, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let info = ask(&socket, GET_INFO, INFO_LEN, 0)?;
    let size = word(&info, INFO_SIZE).unwrap_or(0) as usize;
    let entries = ask(&socket, GET_ENTRIES, ENTRIES_OFFSET + size, size as u32)?;
    Ok(policy(&info, &entries) == Some(DROPPED))
}

// These are from the kernel's `include/uapi/linux/netfilter_ipv4/ip_tables.h`: the numbers of the
// questions, and places in the answers, in bytes. The numbers in the answers have the processor's byte order.
const GET_INFO: c_int = 64;
const GET_ENTRIES: c_int = 65;
/// `struct ipt_getinfo`: a name of 32 bytes, the hooks, 5 starts, 5 policies, two counts.
const INFO_LEN: usize = 84;
const INFO_POLICIES: usize = 32 + 4 + 5 * 4;
const INFO_SIZE: usize = 80;
/// `struct ipt_get_entries`: a name of 32 bytes, the size, and the entries at a multiple of 8.
const ENTRIES_SIZE: usize = 32;
const ENTRIES_OFFSET: usize = 40;
/// `struct ipt_entry`: where the target begins. `struct xt_standard_target`: where the verdict is.
const TARGET_OFFSET: usize = 88;
const VERDICT: usize = 32;
/// A verdict is stored as its negative number minus 1, and `NF_DROP` is 0.
const DROPPED: i32 = -libc::NF_DROP - 1;

/// Asks the kernel about the table `filter`. The answer has `len` bytes.
fn ask(socket: &OwnedFd, question: c_int, len: usize, size: u32) -> io::Result<Vec<u8>> {
    let mut answer = vec![0u8; len];
    answer[..6].copy_from_slice(b"filter");
    answer[ENTRIES_SIZE..ENTRIES_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
    let mut answered = len as libc::socklen_t;
    // SAFETY: the buffer and its length live through the call, and the length is the buffer's.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            question,
            answer.as_mut_ptr().cast(),
            &mut answered,
        )
    };
    if result == 0 { Ok(answer) } else { Err(io::Error::last_os_error()) }
}

/// The verdict of the policy of FORWARD.
fn policy(info: &[u8], entries: &[u8]) -> Option<i32> {
    let at = word(info, INFO_POLICIES + FORWARD as usize * 4)? as usize;
    let entry = entries.get(ENTRIES_OFFSET..)?.get(at..)?;
    let target =
        entry.get(TARGET_OFFSET..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))?;
    word(entry.get(usize::from(target)..)?, VERDICT).map(u32::cast_signed)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::super::link::testing::{Namespace, run};
    use super::super::nft::Nft;
    use super::*;

    fn drops() -> Vec<String> {
        forward_drops(&Nft::open().unwrap().base_chains().unwrap())
    }

    #[test]
    fn a_policy_of_drop_is_found_at_the_hook_of_forwarding() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            assert_eq!(drops(), [""; 0]);
            for line in [
                "nft add table ip filter",
                "nft add chain ip filter INPUT {type filter hook input priority 0;policy drop;}",
                "nft add chain ip filter FORWARD {type filter hook forward priority 0;}",
                "nft add table ip6 filter",
                "nft add chain ip6 filter FORWARD {type filter hook forward priority 0;policy drop;}",
            ] {
                run(line);
            }
            assert_eq!(drops(), [""; 0]);
            run("nft add chain ip filter FORWARD {policy drop;}");
            run("nft add table inet fw");
            run("nft add chain inet fw pass {type filter hook forward priority 5;policy drop;}");
            assert_eq!(drops(), ["ip filter FORWARD", "inet fw pass"]);
        });
    }

    #[test]
    fn the_policy_of_the_older_iptables_is_found() {
        let Some(namespace) = Namespace::new(&["iptables-legacy"]) else { return };
        namespace.run(|| {
            run("iptables-legacy -A FORWARD -i lo -j ACCEPT");
            run("iptables-legacy -A OUTPUT -o lo -j DROP");
            assert_eq!(drops(), [""; 0]);
            run("iptables-legacy -P FORWARD DROP");
            assert_eq!(drops(), ["iptables (legacy) filter FORWARD"]);
        });
    }

    #[test]
    fn a_cut_answer_has_no_policy() {
        let mut info = vec![0; INFO_LEN];
        let mut entries = vec![0; ENTRIES_OFFSET + 152];
        entries[ENTRIES_OFFSET + TARGET_OFFSET] = 112;
        let verdict = ENTRIES_OFFSET + 112 + VERDICT;
        entries[verdict..verdict + 4].copy_from_slice(&DROPPED.to_ne_bytes());
        assert_eq!(policy(&info, &entries), Some(DROPPED));
        for len in 0..verdict + 4 {
            assert_eq!(policy(&info, &entries[..len]), None, "{len}");
        }
        info[INFO_POLICIES + FORWARD as usize * 4] = 200;
        assert_eq!(policy(&info, &entries), None);
    }
}
