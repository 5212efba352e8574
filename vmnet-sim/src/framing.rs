//! How packets are written on the simulated wire: packets with a virtio header, and packets that
//! are too long for the wire.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use macaddr::MacAddr6;

use crate::limits::HEADER;
use crate::objects::lock;

/// Marks a frame that is followed by its virtio header. The header and this mark follow the frame,
/// if the header says anything.
pub(crate) const MARK: &[u8; 8] = b"vmnetsim";
/// Marks a frame that carries a ticket. The ticket and this mark follow the Ethernet header.
pub(crate) const LONG_MARK: &[u8; 8] = b"vmnetlng";

/// Frames that are too long for the simulated wire. A short frame goes over the wire instead: it
/// has the same addresses, so it takes the same way, and it carries a ticket for the long frame.
#[derive(Default)]
pub(crate) struct LongFrames(Mutex<HashMap<u64, Awaited>>);

struct Awaited {
    bytes: Vec<u8>,
    /// How many copies are still to be taken, as soon as that is known. Before that, minus the
    /// number of copies already taken.
    copies: i64,
    known: bool,
}

impl LongFrames {
    pub(crate) fn give(&self, bytes: Vec<u8>) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let ticket = NEXT.fetch_add(1, Ordering::Relaxed);
        lock(&self.0).insert(ticket, Awaited { bytes, copies: 0, known: false });
        ticket
    }

    pub(crate) fn expect(&self, ticket: u64, copies: u32) {
        self.change(ticket, |awaited| {
            awaited.copies += i64::from(copies);
            awaited.known = true;
        });
    }

    pub(crate) fn take(&self, ticket: u64) -> Vec<u8> {
        self.change(ticket, |awaited| {
            awaited.copies -= 1;
            awaited.bytes.clone()
        })
    }

    fn change<T>(&self, ticket: u64, change: impl FnOnce(&mut Awaited) -> T) -> T {
        let mut all = lock(&self.0);
        let awaited = all.get_mut(&ticket).expect("a ticket is good until all have come for it");
        let result = change(awaited);
        if awaited.known && awaited.copies == 0 {
            all.remove(&ticket);
        }
        result
    }
}

/// The ticket, if this frame is sent in place of a long one.
pub(crate) fn ticket(wire: &[u8]) -> Option<u64> {
    let rest = wire.strip_suffix(LONG_MARK)?;
    Some(u64::from_le_bytes(*rest.last_chunk()?))
}

/// Splits a frame of the simulated wire from its virtio header.
pub(crate) fn parts(wire: &[u8]) -> (&[u8], &[u8]) {
    match wire.strip_suffix(MARK) {
        Some(rest) => rest.split_at(rest.len() - HEADER),
        None => (wire, &[0; HEADER]),
    }
}

/// Whether this is the gateway's answer to a DHCP client, or its question who uses an address.
pub(crate) fn is_dhcp(frame: &[u8], gateway: MacAddr6) -> bool {
    let at = |from: usize, bytes: &[u8]| frame.get(from..from + bytes.len()) == Some(bytes);
    // Ethernet's source and type, IPv4's protocol, UDP's ports: the gateway's IPv4 headers have no
    // options.
    let is_reply = at(12, &[8, 0]) && at(23, &[17]) && at(34, &[0, 67, 0, 68]);
    // The gateway broadcasts nothing but its DHCP server's question whether an address is in use.
    let is_question = at(0, &[0xff; 6]) && at(12, &[8, 6]);
    at(6, gateway.as_bytes()) && (is_reply || is_question)
}
