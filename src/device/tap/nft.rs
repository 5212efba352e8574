//! nf_tables over netlink: transactions, and what the tables and base chains of a network namespace
//! are. The names of vmring's own tables are here, because processes find each other by them.

use std::ffi::CStr;
use std::thread;
use std::time::Instant;

use netlink_bindings::nftables::{Chained, Nfgenmsg, Request, TableFlags};

use super::limits::{LOCK_PATIENCE, NFT_MESSAGES_MAX};
use super::link::{Refusal, Socket};
use crate::sys::after;

/// What the names of the tables of our networks begin with. The TAP's name follows.
pub(super) const PREFIX: &str = "vmring_";
/// The chain of such a table that translates addresses. A table that has it needs IPv4 forwarding.
pub(super) const TRANSLATION: &CStr = c"postrouting";
/// The table that is there while vmring has IPv4 forwarding switched on. No TAP's name has a `/`.
pub(super) const FORWARDING: &str = "vmring/ip_forward";
/// The table that is there while a process starts or stops a network.
const LOCK: &str = "vmring/lock";

/// The hook of the packets that the host forwards.
pub(super) const FORWARD: u32 = libc::NF_INET_FORWARD as u32;

/// Returns the header of messages for the family `inet`, which is IPv4 and IPv6.
pub(super) fn inet() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.nfgen_family = libc::NFPROTO_INET as u8;
    header
}

/// Sends the messages that `fill` adds as one transaction. The kernel carries out all of them or
/// none.
///
/// # Panics
///
/// Panics if there are more than [`NFT_MESSAGES_MAX`] messages, with the begin and the end of the
/// batch.
pub(super) fn transact(
    socket: &mut Socket,
    fill: impl FnOnce(&mut Chained<'static>),
) -> Result<(), Refusal> {
    let mut subsystem = Nfgenmsg::new();
    subsystem.set_res_id(libc::NFNL_SUBSYS_NFTABLES as u16);
    let first = socket.sequences(NFT_MESSAGES_MAX);
    let mut batch = Chained::new(first);
    batch.request().op_batch_begin_do(&subsystem);
    fill(&mut batch);
    batch.request().op_batch_end_do(&subsystem);
    let batch = batch.finalize();
    let count = netlink_bindings::traits::NetlinkChained::chain_len(&batch) as u32;
    assert!(count <= NFT_MESSAGES_MAX, "more messages than sequence numbers");
    // Answers arrive in order. Linux before 6.10 answers neither the begin nor the end of a batch,
    // so the last answer that is certain to arrive is that to the message before the end. The
    // kernel reports a failed commit as an error of the begin.
    let last = first.wrapping_add(count - 2);
    socket.exchange(batch.buf(), first, last, |_| ())
}

/// A chain at a hook of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BaseChain {
    /// The family of the table, such as `AF_INET` or `NFPROTO_INET`.
    pub(super) family: i32,
    pub(super) table: String,
    pub(super) name: String,
    pub(super) hook: u32,
    /// The chain drops what no rule of it accepts.
    pub(super) drops: bool,
}

impl BaseChain {
    /// Whether the chain belongs to a network of ours that needs IPv4 forwarding.
    pub(super) fn needs_forwarding(&self) -> bool {
        self.family == libc::NFPROTO_INET
            && self.table.starts_with(PREFIX)
            && TRANSLATION.to_bytes() == self.name.as_bytes()
    }
}

/// The nf_tables of one network namespace: the namespace of the thread that called
/// [`open`](Self::open), whichever thread uses it later.
#[derive(Debug)]
pub(super) struct Nft {
    socket: Socket,
    /// The table [`LOCK`] is this socket's.
    locked: bool,
}

impl Nft {
    pub(super) fn open() -> Result<Self, Refusal> {
        let socket = Socket::open(netlink_bindings::consts::NETLINK_NETFILTER)?;
        Ok(Self { socket, locked: false })
    }

    /// Returns the handle of the table of that name in the family `inet`. A table that is deleted and
    /// made again has another handle.
    pub(super) fn table(&mut self, name: &str) -> Result<Option<u64>, Refusal> {
        let mut handle = None;
        self.list(&Request::new().op_gettable_dump(&inet()), |payload| {
            let (header, table) =
                netlink_bindings::nftables::OpGettableDump::decode_request(payload);
            let same = table.get_name().is_ok_and(|other| other.to_bytes() == name.as_bytes());
            if same && i32::from(header.nfgen_family) == libc::NFPROTO_INET {
                handle = table.get_handle().ok();
            }
        })?;
        Ok(handle)
    }

    /// Returns the base chains of all families.
    pub(super) fn base_chains(&mut self) -> Result<Vec<BaseChain>, Refusal> {
        let mut chains = Vec::new();
        self.list(&Request::new().op_getchain_dump(&Nfgenmsg::new()), |payload| {
            let (header, chain) =
                netlink_bindings::nftables::OpGetchainDump::decode_request(payload);
            let Ok(hook) = chain.get_hook().and_then(|hook| hook.get_num()) else { return };
            let text = |text: &CStr| text.to_string_lossy().into_owned();
            chains.push(BaseChain {
                family: header.nfgen_family.into(),
                table: chain.get_table().map(text).unwrap_or_default(),
                name: chain.get_name().map(text).unwrap_or_default(),
                hook,
                drops: chain.get_policy() == Ok(libc::NF_DROP as u32),
            });
        })?;
        Ok(chains)
    }

    /// Sends the request of a list. Repeats it if the list changes while the kernel sends it; in that
    /// case `each` has seen some entries twice.
    fn list(
        &mut self,
        request: &impl netlink_bindings::traits::NetlinkRequest,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Refusal> {
        let mut tries = 10;
        loop {
            match self.socket.request(request, &mut each) {
                Err(refusal) if refusal.is(libc::EINTR) && tries > 0 => tries -= 1,
                answer => return answer,
            }
        }
    }

    /// Makes an empty table in the family `inet` that stays until it is deleted, whatever becomes of
    /// this process. `comment` is shown with it. A table of that name is replaced.
    pub(super) fn mark(&mut self, name: &str, comment: &str) -> Result<(), Refusal> {
        // This is an attribute as libnftnl writes it: the type of a comment, the length, the text and
        // a zero.
        const COMMENT: u8 = 0;
        let mut data = vec![COMMENT, comment.len() as u8 + 1];
        data.extend(comment.bytes().chain([0]));
        let replace = self.table(name)?.is_some();
        transact(&mut self.socket, |batch| {
            if replace {
                batch.request().op_deltable_do(&inet()).encode().push_name_bytes(name.as_bytes());
            }
            let new = batch.request().set_create().set_excl().op_newtable_do(&inet());
            new.into_encoder().push_name_bytes(name.as_bytes()).push_userdata(&data);
        })
    }

    /// Deletes a table of the family `inet`, if it is there.
    pub(super) fn delete(&mut self, name: &str) -> Result<(), Refusal> {
        let gone = transact(&mut self.socket, |batch| {
            batch.request().op_deltable_do(&inet()).encode().push_name_bytes(name.as_bytes());
        });
        match gone {
            Err(refusal) if refusal.is(libc::ENOENT) => Ok(()),
            answer => answer,
        }
    }

    /// Waits until no other process starts or stops a network in this namespace, and keeps others from
    /// it until [`unlock`](Self::unlock). The kernel ends it with the process. Has no effect if this
    /// socket has the lock already.
    ///
    /// Linux before 5.12 cannot end it with the process, so there is no lock there. After
    /// [`LOCK_PATIENCE`] this goes on without the lock: the process that has it hangs.
    pub(super) fn lock(&mut self) -> Result<(), Refusal> {
        let deadline = after(LOCK_PATIENCE);
        while !self.locked {
            let taken = transact(&mut self.socket, |batch| {
                let new = batch.request().set_create().set_excl().op_newtable_do(&inet());
                let new = new.into_encoder().push_name_bytes(LOCK.as_bytes());
                new.push_flags(TableFlags::Owner as u32);
            });
            match taken {
                Ok(()) => self.locked = true,
                Err(refusal) if refusal.is(libc::EOPNOTSUPP) || refusal.is(libc::EINVAL) => {
                    return Ok(());
                }
                // If the process lacks the privilege, the kernel refuses the first message, which
                // begins the batch.
                Err(refusal) if refusal.belongs_to_another() || refusal.is(libc::EEXIST) => {
                    if Instant::now() >= deadline {
                        tracing::warn!(
                            "another process has had vmring's lock for {LOCK_PATIENCE:?}"
                        );
                        return Ok(());
                    }
                    thread::sleep(std::time::Duration::from_millis(2));
                }
                Err(refusal) => return Err(refusal),
            }
        }
        Ok(())
    }

    /// Ends the lock, if this socket has it.
    pub(super) fn unlock(&mut self) {
        if std::mem::take(&mut self.locked)
            && let Err(refusal) = self.delete(LOCK)
        {
            let error = refusal.into_error("removing vmring's lock");
            tracing::warn!(%error, "other processes wait for vmring's lock until this one ends");
        }
    }
}
