//! [`Chain`]: the buffers of one entry of the available ring, and the walk that finds them.

use crate::queue::rings::{DESCRIPTOR_LEN, Rings};
use core::fmt;
use core::iter::FusedIterator;
use vmring_core::guest::{GuestFault, GuestMemory, GuestRegion, GuestSlice};

/// How many descriptors a chain may have. A guest could make each entry cost 32,768 of them
/// otherwise. The virtio specification allows a device a reasonable limit (1.2, section 2.7.4.1);
/// QEMU has the same.
pub const DESCRIPTORS_MAX: usize = 1024;

/// The largest number of bytes of a chain (virtio 1.2, section 2.7.5.2).
const CHAIN_LEN_MAX: u64 = 1 << 32;

/// Flags of a descriptor (virtio 1.2, section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Why a chain is not one that the device can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// The entry of the available ring is no index of the descriptor table.
    HeadOutOfRange {
        /// The entry.
        head: u16,
    },
    /// `next` of a descriptor is no index of its table.
    NextOutOfRange {
        /// `next`.
        next: u16,
    },
    /// The chain goes on after as many descriptors as its table has.
    Cyclic,
    /// The chain has more than [`DESCRIPTORS_MAX`] descriptors.
    TooLong,
    /// The chain has more than 2^32 bytes.
    TooLarge,
    /// A descriptor has no bytes.
    EmptyDescriptor,
    /// A descriptor, or the indirect table, is not in the guest's memory.
    Fault(GuestFault),
    /// A device-readable descriptor follows a device-writable one.
    ReadableAfterWritable,
    /// There is an indirect table, but the driver has not accepted `VIRTIO_F_INDIRECT_DESC`.
    IndirectNotNegotiated,
    /// A descriptor refers to an indirect table and has a next descriptor too.
    IndirectWithNext,
    /// A descriptor of an indirect table refers to another.
    IndirectNested,
    /// The length of an indirect table is 0 or no multiple of 16.
    IndirectLength {
        /// The length, in bytes.
        len: u32,
    },
    /// The chain is valid, but has more segments than the queue has room for.
    TooManySegments {
        /// The number of segments.
        segments: usize,
    },
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChainError::HeadOutOfRange { head } => {
                write!(f, "the head {head} is behind the descriptor table")
            }
            ChainError::NextOutOfRange { next } => {
                write!(f, "the next descriptor, {next}, is behind its table")
            }
            ChainError::Cyclic => f.write_str("the chain comes back to itself"),
            ChainError::TooLong => {
                write!(f, "the chain has more than {DESCRIPTORS_MAX} descriptors")
            }
            ChainError::TooLarge => f.write_str("the chain has more than 2^32 bytes"),
            ChainError::EmptyDescriptor => f.write_str("a descriptor has no bytes"),
            ChainError::Fault(fault) => fault.fmt(f),
            ChainError::ReadableAfterWritable => {
                f.write_str("a device-readable descriptor follows a device-writable one")
            }
            ChainError::IndirectNotNegotiated => {
                f.write_str("an indirect table is used, but was not negotiated")
            }
            ChainError::IndirectWithNext => {
                f.write_str("a descriptor has an indirect table and a next descriptor")
            }
            ChainError::IndirectNested => {
                f.write_str("an indirect table refers to an indirect table")
            }
            ChainError::IndirectLength { len } => {
                write!(f, "an indirect table cannot have {len} bytes")
            }
            ChainError::TooManySegments { segments } => {
                write!(f, "the chain has {segments} segments, more than the queue has room for")
            }
        }
    }
}

impl core::error::Error for ChainError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            ChainError::Fault(fault) => Some(fault),
            _ => None,
        }
    }
}

/// A chain of buffers that the driver has made available: device-readable segments, and then
/// device-writable ones. A buffer that crosses regions of the guest's memory is several segments.
///
/// The addresses were copied out of the guest's memory once, and the copies were checked. The bytes
/// at these addresses are the guest's to change at any time.
#[derive(Clone, Copy)]
pub struct Chain<'q> {
    memory: &'q GuestMemory,
    /// The buffer of a [`Single`]. `segments` is empty then.
    single: Option<GuestSlice<'q>>,
    segments: &'q [Segment],
    shape: Shape,
}

impl<'q> Chain<'q> {
    /// What the device may read.
    pub fn readable(&self) -> Segments<'q> {
        let single = self.single.filter(|_| self.shape.readable > 0);
        let count = if self.single.is_some() { 0 } else { self.shape.readable };
        Segments { memory: self.memory, single, left: self.segments[..count].iter() }
    }

    /// What the device may write.
    pub fn writable(&self) -> Segments<'q> {
        let single = self.single.filter(|_| self.shape.readable == 0);
        let count = if self.single.is_some() { 0 } else { self.shape.readable };
        Segments { memory: self.memory, single, left: self.segments[count..].iter() }
    }

    /// All that the device may read, if it is in one segment.
    #[inline]
    pub(crate) fn only_readable(&self) -> Option<GuestSlice<'q>> {
        if self.shape.readable == 1 { self.readable().next() } else { None }
    }

    /// The number of bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.shape.readable_len
    }

    /// The number of bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.shape.writable_len
    }
}

/// A chain that is a single buffer in one region of the guest's memory, as most are.
/// [`Queue::pop_singles`](crate::queue::Queue::pop_singles) finds it without a walk.
#[derive(Clone, Copy, Debug)]
pub struct Single<'q> {
    memory: &'q GuestMemory,
    buffer: GuestSlice<'q>,
    is_writable: bool,
}

impl<'q> Single<'q> {
    #[inline(always)]
    pub(super) fn new(memory: &'q GuestMemory, buffer: GuestSlice<'q>, is_writable: bool) -> Self {
        Self { memory, buffer, is_writable }
    }

    /// The buffer, if the device may read it.
    #[inline(always)]
    pub fn readable(&self) -> Option<GuestSlice<'q>> {
        (!self.is_writable).then_some(self.buffer)
    }

    /// The buffer, if the device may write it.
    #[inline(always)]
    pub fn writable(&self) -> Option<GuestSlice<'q>> {
        self.is_writable.then_some(self.buffer)
    }

    /// The same as a chain. It is for code that serves chains of any shape.
    #[inline(always)]
    pub fn chain(&self) -> Chain<'q> {
        let bytes = u64::from(self.buffer.len());
        let shape = match self.is_writable {
            false => Shape { segments: 1, readable: 1, readable_len: bytes, writable_len: 0 },
            true => Shape { segments: 1, readable: 0, readable_len: 0, writable_len: bytes },
        };
        Chain { memory: self.memory, single: Some(self.buffer), segments: &[], shape }
    }
}

impl fmt::Debug for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("readable", &self.readable())
            .field("writable", &self.writable())
            .finish()
    }
}

/// The segments of a [`Chain`], in order.
#[derive(Clone)]
pub struct Segments<'q> {
    memory: &'q GuestMemory,
    /// The only one, if it was not walked.
    single: Option<GuestSlice<'q>>,
    left: core::slice::Iter<'q, Segment>,
}

impl<'q> Iterator for Segments<'q> {
    type Item = GuestSlice<'q>;

    #[inline]
    fn next(&mut self) -> Option<GuestSlice<'q>> {
        if let Some(single) = self.single.take() {
            return Some(single);
        }
        let Segment { region, offset, len } = *self.left.next()?;
        let region = &self.memory.regions()[usize::from(region)];
        Some(region.get(offset, len).expect("`Walker::split` saw that it is inside"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.left.len() + usize::from(self.single.is_some());
        (left, Some(left))
    }
}

impl ExactSizeIterator for Segments<'_> {}
impl FusedIterator for Segments<'_> {}

impl fmt::Debug for Segments<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.clone()).finish()
    }
}

/// Adjacent bytes of one region.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    offset: u64,
    len: u32,
    region: u16,
}

/// How the segments of a chain divide.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shape {
    /// The number of all segments. Those that have no room are counted too.
    segments: usize,
    /// The number of device-readable segments, which come first.
    readable: usize,
    readable_len: u64,
    writable_len: u64,
}

impl Shape {
    /// The number of bytes that the device may report as written.
    pub(super) fn used_len_max(&self) -> u32 {
        self.writable_len.try_into().unwrap_or(u32::MAX)
    }
}

/// Walks chains. It holds the segments of the last one.
#[derive(Debug)]
pub(super) struct Walker {
    segments: Box<[Segment]>,
    /// The region in which the last address was. A guest's buffers are usually in the same one.
    recent: usize,
}

/// A descriptor, as it was copied.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn parse(bytes: [u8; DESCRIPTOR_LEN as usize]) -> Self {
        let fields = u128::from_le_bytes(bytes);
        Self {
            address: fields as u64,
            len: (fields >> 64) as u32,
            flags: (fields >> 96) as u16,
            next: (fields >> 112) as u16,
        }
    }

    fn is(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Where in a region an address is. `None` if it is not in it.
#[inline]
fn offset_in(region: &GuestRegion, address: u64) -> Option<u64> {
    address.checked_sub(region.guest_address()).filter(|offset| *offset < region.len())
}

impl Walker {
    pub(super) fn new(segments_max: usize) -> Self {
        Self { segments: vec![Segment::default(); segments_max].into(), recent: 0 }
    }

    /// The chain that was walked last.
    pub(super) fn chain<'q>(&'q self, memory: &'q GuestMemory, shape: Shape) -> Chain<'q> {
        Chain { memory, single: None, segments: &self.segments[..shape.segments], shape }
    }

    /// Looks at the chains at these heads, as long as they are single buffers in one region, as most are.
    /// Each descriptor is copied once. Says of each where it is, and how many bytes of it the device may
    /// write: all, or none if it is to read them.
    ///
    /// The first bytes of what the device will read are in the cache of the driver's processor. They are
    /// asked for here, for all chains together. Asked for when they are needed, they would arrive one
    /// chain after the other.
    #[inline(never)]
    pub(super) fn look<'m>(
        &mut self,
        memory: &'m GuestMemory,
        rings: &Rings,
        heads: &[[u8; 2]],
        found: &mut [Option<GuestSlice<'m>>],
        len_max: &mut [u32],
    ) {
        let mut recent = memory.regions().get(self.recent);
        for ((head, found), len_max) in heads.iter().zip(found).zip(len_max) {
            let Some(bytes) = rings.descriptor(u16::from_le_bytes(*head)) else { break };
            let Descriptor { address, len, flags, .. } = Descriptor::parse(bytes);
            if flags & (NEXT | INDIRECT) != 0 || len == 0 {
                break;
            }
            let buffer = recent.and_then(|region| region.at(address, len));
            let buffer = buffer.or_else(|| {
                recent = self.search(memory, address).ok().map(|(_, region, _)| region);
                recent?.at(address, len)
            });
            let Some(buffer) = buffer else { break };
            *found = Some(buffer);
            *len_max = if flags & WRITE != 0 { len } else { 0 };
            if *len_max == 0 {
                buffer.prefetch_head();
            }
        }
    }

    /// Follows the chain at `head` and checks it as far as it goes. Each descriptor is copied once,
    /// because the guest may change it between two looks.
    #[inline(never)]
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemory,
        rings: &Rings,
        head: u16,
        indirect: bool,
    ) -> Result<Shape, ChainError> {
        let mut shape = Shape::default();
        // The indirect table, when the walk is in it.
        let mut table = None;
        let mut table_len = u32::from(rings.size());
        let mut visited_in_table = 0;
        let mut visited = 0;
        let mut index = head;
        if u32::from(head) >= table_len {
            return Err(ChainError::HeadOutOfRange { head });
        }
        loop {
            if visited_in_table == table_len {
                return Err(ChainError::Cyclic);
            }
            if visited == DESCRIPTORS_MAX {
                return Err(ChainError::TooLong);
            }
            let descriptor = match table {
                None => {
                    let bytes = rings.descriptor(index);
                    Descriptor::parse(bytes.expect("the index is less than the size"))
                }
                Some(table) => Descriptor::parse(self.indirect_descriptor(memory, table, index)?),
            };
            visited_in_table += 1;
            if descriptor.is(INDIRECT) {
                let Descriptor { address, len, .. } = descriptor;
                // Its WRITE flag means nothing (virtio 1.2, section 2.7.5.3.2).
                if !indirect {
                    return Err(ChainError::IndirectNotNegotiated);
                } else if table.is_some() {
                    return Err(ChainError::IndirectNested);
                } else if descriptor.is(NEXT) {
                    return Err(ChainError::IndirectWithNext);
                } else if len == 0 || !len.is_multiple_of(DESCRIPTOR_LEN) {
                    return Err(ChainError::IndirectLength { len });
                }
                (table, table_len) = (Some(address), len / DESCRIPTOR_LEN);
                (visited_in_table, index) = (0, 0);
                continue;
            }
            self.add(memory, descriptor, &mut shape)?;
            visited += 1;
            if !descriptor.is(NEXT) {
                break;
            }
            index = descriptor.next;
            if u32::from(index) >= table_len {
                return Err(ChainError::NextOutOfRange { next: index });
            }
        }
        if shape.segments > self.segments.len() {
            return Err(ChainError::TooManySegments { segments: shape.segments });
        }
        Ok(shape)
    }

    /// Adds the buffer of a descriptor.
    fn add(
        &mut self,
        memory: &GuestMemory,
        descriptor: Descriptor,
        shape: &mut Shape,
    ) -> Result<(), ChainError> {
        let len = u64::from(descriptor.len);
        if len == 0 {
            return Err(ChainError::EmptyDescriptor);
        }
        if descriptor.is(WRITE) {
            shape.writable_len += len;
        } else if shape.writable_len > 0 {
            return Err(ChainError::ReadableAfterWritable);
        } else {
            shape.readable_len += len;
        }
        if shape.readable_len + shape.writable_len > CHAIN_LEN_MAX {
            return Err(ChainError::TooLarge);
        }
        self.split(memory, descriptor, shape)?;
        if !descriptor.is(WRITE) {
            shape.readable = shape.segments;
        }
        Ok(())
    }

    /// Adds a segment for each region that the descriptor's buffer is in.
    fn split(
        &mut self,
        memory: &GuestMemory,
        descriptor: Descriptor,
        shape: &mut Shape,
    ) -> Result<(), ChainError> {
        let Descriptor { mut address, mut len, .. } = descriptor;
        while len > 0 {
            let (number, region, offset) = self.locate(memory, address)?;
            let inside = region.len() - offset;
            let piece = u64::from(len).min(inside) as u32;
            if let Some(segment) = self.segments.get_mut(shape.segments) {
                // There are at most `REGIONS_MAX` regions, which is less than 2^16.
                *segment = Segment { offset, len: piece, region: number as u16 };
            }
            shape.segments += 1;
            len -= piece;
            // No region goes beyond 2^64 (`GuestMemory::new`).
            address += u64::from(piece);
        }
        Ok(())
    }

    /// The region in which an address is, with its number, and where in it.
    #[inline]
    fn locate<'m>(
        &mut self,
        memory: &'m GuestMemory,
        address: u64,
    ) -> Result<(usize, &'m GuestRegion, u64), ChainError> {
        if let Some(region) = memory.regions().get(self.recent)
            && let Some(offset) = offset_in(region, address)
        {
            return Ok((self.recent, region, offset));
        }
        self.search(memory, address)
    }

    /// As [`locate`](Self::locate), for an address that is in another region than the last one.
    #[inline(never)]
    fn search<'m>(
        &mut self,
        memory: &'m GuestMemory,
        address: u64,
    ) -> Result<(usize, &'m GuestRegion, u64), ChainError> {
        let regions = memory.regions();
        let behind = regions.partition_point(|region| region.guest_address() <= address);
        let found = behind.checked_sub(1).and_then(|number| {
            let region = &regions[number];
            Some((number, region, offset_in(region, address)?))
        });
        let found = found.ok_or(ChainError::Fault(GuestFault { address }))?;
        self.recent = found.0;
        Ok(found)
    }

    /// A descriptor of the indirect table at `table`. It is not aligned, and may be in two regions.
    fn indirect_descriptor(
        &mut self,
        memory: &GuestMemory,
        table: u64,
        index: u16,
    ) -> Result<[u8; DESCRIPTOR_LEN as usize], ChainError> {
        let fault = |address| ChainError::Fault(GuestFault { address });
        let at = u64::from(index) * u64::from(DESCRIPTOR_LEN);
        let address = table.checked_add(at).ok_or(fault(table))?;
        let (_, region, offset) = self.locate(memory, address)?;
        if let Some(bytes) = region.get(offset, DESCRIPTOR_LEN) {
            return Ok(bytes.read().expect("it has this length"));
        }
        let mut bytes = [0; DESCRIPTOR_LEN as usize];
        let mut copied = 0;
        for piece in memory.slices(address, DESCRIPTOR_LEN) {
            copied += piece.map_err(ChainError::Fault)?.copy_to(&mut bytes[copied..]);
        }
        Ok(bytes)
    }
}
