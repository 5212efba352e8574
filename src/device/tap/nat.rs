//! Shared mode's way out: address translation and IPv4 forwarding.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use netlink_bindings::nftables::{
    self, CmpOps, MetaKeys, Nfgenmsg, PayloadBase, Registers, TableFlags,
};
use netlink_socket2::{NetlinkSocket, ReplyError};

use super::link::refused;
use crate::error::Error;

const WHAT: &str = "translating addresses with nftables";
/// `NFNL_SUBSYS_NFTABLES`, for a batch's first and last message.
const SUBSYSTEM: u16 = 10;
/// `NF_INET_POST_ROUTING`.
const POSTROUTING: u32 = 4;
/// `NF_IP_PRI_NAT_SRC`.
const SOURCE_NAT: i32 = 100;
/// Where an IPv4 header has the source address.
const SOURCE_AT: u32 = 12;

/// Address translation for one network, while it lives: an nftables table of its own. The table is
/// owned by the socket in here, so the kernel removes it with the socket, also when the process is
/// killed (`NFT_TABLE_F_OWNER`, Linux 5.12).
pub(crate) struct Masquerade {
    socket: NetlinkSocket,
    table: CString,
    owned: bool,
}

impl fmt::Debug for Masquerade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masquerade").field("table", &self.table).finish_non_exhaustive()
    }
}

fn batch() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.set_res_id(SUBSYSTEM);
    header
}

fn ip() -> Nfgenmsg {
    Nfgenmsg { nfgen_family: libc::AF_INET as u8, ..Nfgenmsg::new() }
}

impl Masquerade {
    /// What comes from `network` and leaves by another interface than `tap` gets that interface's
    /// address.
    pub(crate) fn start(tap: &str, network: Ipv4Addr, prefix: u8) -> Result<Self, Error> {
        let table = CString::new(format!("vmring_{tap}")).map_err(|error| Error::Io {
            what: WHAT,
            source: io::Error::new(io::ErrorKind::InvalidInput, error),
        })?;
        let mut this = Self { socket: NetlinkSocket::new(), table, owned: true };
        match this.add(tap, network, prefix) {
            Err(error)
                if matches!(
                    error.as_io_error().raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EINVAL)
                ) =>
            {
                // An older kernel: the table is deleted in `drop`.
                this.owned = false;
                this.add(tap, network, prefix)
            }
            outcome => outcome,
        }
        .map_err(|error| {
            this.owned = true; // there is nothing to delete
            refused(WHAT, error)
        })?;
        tracing::info!(tap, %network, prefix, "address translation on");
        Ok(this)
    }

    fn add(&mut self, tap: &str, network: Ipv4Addr, prefix: u8) -> Result<(), ReplyError> {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0).to_be_bytes();
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(tap.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from;
        }
        let (table, chain, register) = (&*self.table, c"postrouting", Registers::Reg1 as u32);
        let flags = if self.owned { TableFlags::Owner as u32 } else { 0 };
        let mut all = nftables::Chained::new(self.socket.reserve_seq(16));
        all.request().op_batch_begin_do(&batch());
        let mut new = all.request().set_create().set_excl().op_newtable_do(&ip());
        new.encode().push_name(table).push_flags(flags);
        drop(new);
        let mut new = all.request().set_create().op_newchain_do(&ip());
        new.encode()
            .push_table(table)
            .push_name(chain)
            .nested_hook()
            .push_num(POSTROUTING)
            .push_priority(SOURCE_NAT)
            .end_nested()
            .push_type(c"nat");
        drop(new);
        let mut new = all.request().set_create().set_append().op_newrule_do(&ip());
        new.encode()
            .push_table(table)
            .push_chain(chain)
            .nested_expressions()
            // The source address...
            .nested_elem()
            .nested_data_payload()
            .push_dreg(register)
            .push_base(PayloadBase::NetworkHeader as u32)
            .push_offset(SOURCE_AT)
            .push_len(4)
            .end_nested()
            .end_nested()
            // ...but for the host's part of it...
            .nested_elem()
            .nested_data_bitwise()
            .push_sreg(register)
            .push_dreg(register)
            .push_len(4)
            .nested_mask()
            .push_value(&mask)
            .end_nested()
            .nested_xor()
            .push_value(&[0; 4])
            .end_nested()
            .end_nested()
            .end_nested()
            // ...is the network's.
            .nested_elem()
            .nested_data_cmp()
            .push_sreg(register)
            .push_op(CmpOps::Eq as u32)
            .nested_data()
            .push_value(&network.octets())
            .end_nested()
            .end_nested()
            .end_nested()
            // The interface by which it leaves is not the TAP.
            .nested_elem()
            .nested_data_meta()
            .push_dreg(register)
            .push_key(MetaKeys::Oifname as u32)
            .end_nested()
            .end_nested()
            .nested_elem()
            .nested_data_cmp()
            .push_sreg(register)
            .push_op(CmpOps::Neq as u32)
            .nested_data()
            .push_value(&name)
            .end_nested()
            .end_nested()
            .end_nested()
            .nested_elem()
            .push_name(c"masq")
            .end_nested()
            .end_nested();
        drop(new);
        all.request().op_batch_end_do(&batch());
        self.socket.request_chained(&all.finalize())?.recv_all()
    }

    fn delete(&mut self) -> Result<(), ReplyError> {
        let mut all = nftables::Chained::new(self.socket.reserve_seq(4));
        all.request().op_batch_begin_do(&batch());
        let mut gone = all.request().op_deltable_do(&ip());
        gone.encode().push_name(&self.table);
        drop(gone);
        all.request().op_batch_end_do(&batch());
        self.socket.request_chained(&all.finalize())?.recv_all()
    }
}

impl Drop for Masquerade {
    fn drop(&mut self) {
        if !self.owned
            && let Err(error) = self.delete()
        {
            tracing::warn!(table = ?self.table, %error, "an nftables table stays");
        }
    }
}

/// IPv4 forwarding in one network namespace, while somebody holds it: on from the first holder of this
/// process on, and after the last one as it was.
#[derive(Debug)]
pub(crate) struct Forwarding {
    /// Of the network namespace.
    namespace: u64,
}

#[derive(Debug)]
struct Held {
    holders: usize,
    /// The setting. Opened at the start, it stays that of its namespace, whoever writes.
    setting: File,
    was_on: bool,
}

static FORWARDING: Mutex<Option<HashMap<u64, Held>>> = Mutex::new(None);

impl Forwarding {
    /// In the network namespace of this thread.
    pub(crate) fn start() -> Result<Self, Error> {
        let what = "turning IPv4 forwarding on (net.ipv4.ip_forward)";
        let namespace = fs::metadata("/proc/thread-self/ns/net").map_err(Error::io(what))?.ino();
        let mut all = FORWARDING.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.get_or_insert_default();
        if let Some(held) = all.get_mut(&namespace) {
            held.holders += 1;
            return Ok(Self { namespace });
        }
        let path = "/proc/sys/net/ipv4/ip_forward";
        let was_on = fs::read_to_string(path).map_err(Error::io(what))?.trim() != "0";
        let mut options = OpenOptions::new();
        options.read(true).write(!was_on);
        let mut setting = options.open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => Error::PermissionDenied {
                needs: "the right to write net.ipv4.ip_forward for shared mode: run as root, or \
                        turn it on beforehand (sysctl net.ipv4.ip_forward=1)"
                    .to_owned(),
            },
            _ => Error::Io { what, source },
        })?;
        if !was_on {
            setting.write_all(b"1").map_err(Error::io(what))?;
            tracing::info!("IPv4 forwarding on");
        }
        all.insert(namespace, Held { holders: 1, setting, was_on });
        Ok(Self { namespace })
    }

    /// Lets go.
    pub(crate) fn stop(self) -> Result<(), Error> {
        let namespace = self.namespace;
        std::mem::forget(self);
        release(namespace).map_err(Error::io("putting IPv4 forwarding back"))
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        if let Err(error) = release(self.namespace) {
            tracing::warn!(%error, "IPv4 forwarding stays on");
        }
    }
}

fn release(namespace: u64) -> io::Result<()> {
    let mut all = FORWARDING.lock().unwrap_or_else(PoisonError::into_inner);
    let all = all.get_or_insert_default();
    let Some(held) = all.get_mut(&namespace) else { return Ok(()) };
    held.holders -= 1;
    if held.holders > 0 {
        return Ok(());
    }
    let Some(mut held) = all.remove(&namespace) else { return Ok(()) };
    if held.was_on {
        return Ok(());
    }
    held.setting.seek(SeekFrom::Start(0))?;
    let mut now = String::new();
    held.setting.read_to_string(&mut now)?;
    if now.trim() == "0" {
        // Somebody else has turned it off meanwhile.
        return Ok(());
    }
    held.setting.seek(SeekFrom::Start(0))?;
    held.setting.write_all(b"0")?;
    tracing::info!("IPv4 forwarding off again");
    Ok(())
}
