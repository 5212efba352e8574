//! The pcapng format (draft-ietf-opsawg-pcapng).
//!
//! A block that is not understood is skipped, whatever it holds: custom blocks, name resolution,
//! statistics, secrets. So is what a replay has no use for: timestamps, comments, names.

use std::io::Read;

use super::format::{
    BYTE_ORDER_MAGIC, END_OF_OPTIONS, ENHANCED_PACKET, EPB_FLAGS, ETHERNET, IF_FCSLEN,
    INTERFACE_DESCRIPTION, PACKET, SECTION_HEADER, SIMPLE_PACKET,
};
use super::record::{Input, Order, Record, Stop, Unfit, without_fcs};

/// The length of a block without a body, in bytes: its type, and twice its length.
const FRAME_LEN: u32 = 12;
/// How many interfaces of a section are remembered. Packets of others count as of no interface.
const INTERFACES_MAX: usize = 1 << 16;

/// A pcapng file that is being read.
#[derive(Debug)]
pub(super) struct PcapNg<R> {
    input: Input<R>,
    order: Order,
    /// The interfaces of the section.
    interfaces: Vec<Interface>,
    /// The link type of the first interface that is not Ethernet, if no interface is Ethernet.
    only_other_link: Option<u16>,
    any_ethernet: bool,
    buffer: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Interface {
    is_ethernet: bool,
    /// The most bytes that are recorded of a packet; 0 is no limit.
    snap_len: u32,
    /// The length of the frame check sequence behind each packet, in bytes.
    fcs_len: u8,
}

/// The lengths of a packet block, and its interface if the file describes it.
struct Fields {
    interface: Option<Interface>,
    captured: u32,
    original: u32,
}

impl<R: Read> PcapNg<R> {
    /// Reads the first section header.
    pub(super) fn open(input: Input<R>) -> Result<Self, Stop> {
        let mut this = Self {
            input,
            order: Order::Little,
            interfaces: Vec::new(),
            only_other_link: None,
            any_ethernet: false,
            buffer: Vec::new(),
        };
        let mut head = [0; 8];
        this.input.fill(&mut head)?;
        this.section(&head).map_err(|stop| stop.inside(false))?;
        Ok(this)
    }

    /// Returns the next packet.
    pub(super) fn next(&mut self) -> Result<Record<'_>, Stop> {
        loop {
            let mut head = [0; 8];
            self.input.fill(&mut head)?;
            let kind = self.order.u32(&head, 0);
            if kind == SECTION_HEADER {
                self.section(&head).map_err(|stop| stop.inside(false))?;
                continue;
            }
            let total = self.order.u32(&head, 4);
            let is_packet = matches!(kind, PACKET | SIMPLE_PACKET | ENHANCED_PACKET);
            let unfit = self.body(kind, total).map_err(|stop| stop.inside(is_packet))?;
            match unfit {
                Some(Ok(fcs_len)) => return Ok(without_fcs(&self.buffer, fcs_len.into())),
                Some(Err(unfit)) => return Ok(Record::Unfit(unfit)),
                None => {}
            }
        }
    }

    pub(super) fn at(&self) -> u64 {
        self.input.at()
    }

    /// If interfaces were described and none of them is Ethernet, the link type of one of them.
    pub(super) fn only_other_link(&self) -> Option<u16> {
        self.only_other_link.filter(|_| !self.any_ethernet)
    }

    /// Reads the rest of a section header, behind its type and length.
    fn section(&mut self, head: &[u8; 8]) -> Result<(), Stop> {
        let mut fields = [0; 16];
        self.input.fill(&mut fields[..4])?;
        let orders = [Order::Little, Order::Big].into_iter();
        let Some(order) = orders.into_iter().find(|o| o.u32(&fields, 0) == BYTE_ORDER_MAGIC) else {
            return Err(Stop::Damaged("a section header has no byte order".to_owned()));
        };
        self.order = order;
        let total = order.u32(head, 4);
        let Some(left) = body_len(total)?.checked_sub(fields.len() as u64) else {
            return Err(Stop::Damaged(format!("a section header has {total} bytes")));
        };
        self.input.fill(&mut fields[4..])?;
        let (major, minor) = (order.u16(&fields, 4), order.u16(&fields, 6));
        // A minor version is compatible; 1.2 has been written (section 4.1).
        if major != 1 {
            let clause = format!("a section has the version {major}.{minor}, and only 1 is known");
            return Err(Stop::Damaged(clause));
        }
        // The section's length is not needed, and in many files it is -1.
        self.interfaces.clear();
        self.end_of_block(total, left)
    }

    /// Reads a block behind its type and length. For a packet, returns the length of its frame
    /// check sequence, or why it cannot be replayed.
    fn body(&mut self, kind: u32, total: u32) -> Result<Option<Result<u8, Unfit>>, Stop> {
        let mut left = body_len(total)?;
        let outcome = match kind {
            INTERFACE_DESCRIPTION => {
                self.interface(&mut left)?;
                None
            }
            PACKET | SIMPLE_PACKET | ENHANCED_PACKET => Some(self.packet(kind, &mut left)?),
            _ => None,
        };
        self.end_of_block(total, left)?;
        Ok(outcome)
    }

    /// Skips the `left` bytes of a block's body, and reads its length once more.
    fn end_of_block(&mut self, total: u32, left: u64) -> Result<(), Stop> {
        self.input.skip(left)?;
        let mut again = [0; 4];
        self.input.fill(&mut again)?;
        let again = self.order.u32(&again, 0);
        if again == total {
            return Ok(());
        }
        let clause = format!("a block has {total} bytes at its beginning and {again} at its end");
        Err(Stop::Damaged(clause))
    }

    /// Reads the next bytes of a block of which `left` are left. Returns false if it has fewer.
    fn field(&mut self, left: &mut u64, field: &mut [u8]) -> Result<bool, Stop> {
        let Some(rest) = left.checked_sub(field.len() as u64) else { return Ok(false) };
        self.input.fill(field)?;
        *left = rest;
        Ok(true)
    }

    fn interface(&mut self, left: &mut u64) -> Result<(), Stop> {
        let mut fields = [0; 8];
        let is_whole = self.field(left, &mut fields)?;
        let link = self.order.u16(&fields, 0);
        let is_ethernet = is_whole && link == ETHERNET;
        let fcs_len = match self.option(left, IF_FCSLEN)? {
            // The draft says bits, and has the example 4. Wireshark and others write either.
            Some((bits, 1..)) if bits[0] >= 16 => bits[0] / 8,
            Some((octets, 1..)) => octets[0],
            _ => 0,
        };
        let interface = Interface { is_ethernet, snap_len: self.order.u32(&fields, 4), fcs_len };
        if self.interfaces.len() < INTERFACES_MAX {
            self.interfaces.push(interface);
        }
        self.any_ethernet |= is_ethernet;
        if is_whole && !is_ethernet {
            self.only_other_link.get_or_insert(link);
        }
        Ok(())
    }

    fn packet(&mut self, kind: u32, left: &mut u64) -> Result<Result<u8, Unfit>, Stop> {
        let Some(fields) = self.fields(kind, left)? else { return Ok(Err(Unfit::Malformed)) };
        let Fields { interface, captured, original } = fields;
        let Some(interface) = interface else { return Ok(Err(Unfit::NoInterface)) };
        if !interface.is_ethernet {
            return Ok(Err(Unfit::OtherLink));
        }
        let Some(rest) = left.checked_sub(captured.into()) else {
            return Ok(Err(Unfit::Malformed));
        };
        let read = self.input.packet(&mut self.buffer, captured, original)?;
        *left = rest;
        let padding = u64::from(captured.wrapping_neg() % 4).min(*left);
        self.input.skip(padding)?;
        *left -= padding;
        if let Err(unfit) = read {
            return Ok(Err(unfit));
        }
        if kind == SIMPLE_PACKET {
            return Ok(Ok(interface.fcs_len));
        }
        let flags = match self.option(left, EPB_FLAGS)? {
            Some((flags, 4)) => self.order.u32(&flags, 0),
            _ => 0,
        };
        // Bits 5 to 8 override the interface's length (section 4.3.1).
        let of_packet = (flags >> 5 & 0xf) as u8;
        Ok(Ok(if of_packet == 0 { interface.fcs_len } else { of_packet }))
    }

    /// Reads what a packet block has in front of the packet. Returns `None` if the block is too
    /// short for it.
    fn fields(&mut self, kind: u32, left: &mut u64) -> Result<Option<Fields>, Stop> {
        let interface = |id: usize| self.interfaces.get(id).copied();
        let order = self.order;
        if kind == SIMPLE_PACKET {
            let interface = interface(0);
            let mut fields = [0; 4];
            if !self.field(left, &mut fields)? {
                return Ok(None);
            }
            // Such a block has no captured length: it is the least of these (section 4.4). The rest
            // of the block is padding.
            let original = order.u32(&fields, 0);
            let snap_len = interface.map_or(0, |interface| interface.snap_len);
            let limit = if snap_len == 0 { original } else { snap_len.min(original) };
            let captured = u64::from(limit).min(*left) as u32;
            return Ok(Some(Fields { interface, captured, original }));
        }
        let mut fields = [0; 20];
        if !self.field(left, &mut fields)? {
            return Ok(None);
        }
        let id = match kind {
            PACKET => order.u16(&fields, 0).into(),
            _ => order.u32(&fields, 0) as usize,
        };
        let (captured, original) = (order.u32(&fields, 12), order.u32(&fields, 16));
        Ok(Some(Fields { interface: self.interfaces.get(id).copied(), captured, original }))
    }

    /// Reads options up to the one that is `wanted`. Returns the first bytes of its value and the
    /// value's length. The list ends with its end mark, with the block, or with an option that is
    /// longer than the block.
    fn option(&mut self, left: &mut u64, wanted: u16) -> Result<Option<([u8; 4], u16)>, Stop> {
        let mut head = [0; 4];
        while self.field(left, &mut head)? {
            let (code, len) = (self.order.u16(&head, 0), self.order.u16(&head, 2));
            let padded = u64::from(len).next_multiple_of(4);
            if code == END_OF_OPTIONS || padded > *left {
                break;
            }
            let mut value = [0; 4];
            if code == wanted && padded >= 4 {
                self.field(left, &mut value)?;
                return Ok(Some((value, len)));
            }
            self.input.skip(padded)?;
            *left -= padded;
        }
        Ok(None)
    }
}

/// The length of the body of a block with `total` bytes. A length that is no multiple of 4 is
/// rounded up, as Wireshark does, because the next block is aligned.
fn body_len(total: u32) -> Result<u64, Stop> {
    u64::from(total)
        .next_multiple_of(4)
        .checked_sub(FRAME_LEN.into())
        .ok_or_else(|| Stop::Damaged(format!("a block has {total} bytes, which is too few")))
}
