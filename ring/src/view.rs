//! [`PacketView`]: a window on a buffer, which is cut smaller without a copy and read without a
//! panic.
//!
//! This is the Cstruct model: a buffer, an offset and a length. Cutting a view gives another view
//! on the same bytes, whose [`offset`](PacketView::offset) still counts from the buffer's first
//! byte. Every position and length is checked, and an access outside the view gives `None`. So a
//! hostile packet can be taken apart without a panic. To read many fields of a header, pay for one
//! length check ([`PacketView::fields`]): after it no accessor can fail, and a wrong position does
//! not compile.
//!
//! ```
//! use vmring_core::view::{ETHERNET_HEADER_LEN, PacketView};
//!
//! # fn parse(slot: &[u8]) -> Option<()> {
//! // A slot of 128 bytes holds a packet of 60 bytes behind 32 bytes of headroom.
//! let packet = PacketView::new(slot, 32, 60)?;
//!
//! let ethernet = packet.ethernet()?; // the one length check
//! assert_eq!(ethernet.destination(), [0xff; 6]);
//! assert_eq!(ethernet.ethertype(), 0x0800);
//!
//! let ipv4 = packet.shift(ETHERNET_HEADER_LEN)?; // the same bytes, 14 further on
//! assert_eq!(ipv4.offset(), 46);
//! let fields = ipv4.fields::<20>()?; // again one check for all the reads below
//! assert_eq!(fields.be16::<2>(), 46); // total length
//! assert_eq!(fields.u8::<9>(), 17); // protocol: UDP
//!
//! let header_len = usize::from(fields.u8::<0>() & 0xf) * 4;
//! let (_, udp) = ipv4.split_at(header_len)?;
//! assert_eq!(udp.offset(), 66);
//! assert_eq!(udp.be16(2), Some(67)); // destination port, checked on its own
//! assert_eq!(udp.be16(usize::MAX), None);
//! # Some(())
//! # }
//! # let mut slot = [0; 128];
//! # slot[32..38].fill(0xff);
//! # slot[44..46].copy_from_slice(&[8, 0]);
//! # slot[46..49].copy_from_slice(&[0x45, 0, 0]);
//! # (slot[49], slot[55], slot[69]) = (46, 17, 67);
//! # parse(&slot).unwrap();
//! ```
//!
//! Protocols above Ethernet are left to a protocol library. For example, smoltcp's `wire` takes the
//! bytes of a view as they are.

use core::fmt;
use core::ops::Range;

/// Bytes in an Ethernet header: two addresses and the type.
pub const ETHERNET_HEADER_LEN: usize = 14;

/// A window of `len` bytes at `offset` in a buffer. See the [module](self) for an example.
///
/// It is generic over the bytes: a `PacketView<&[u8]>` is `Copy` and gives sub-views with the
/// buffer's own lifetime; a `PacketView<&mut [u8]>` can also write. The methods that cut
/// ([`sub`](Self::sub), [`shift`](Self::shift), [`truncate`](Self::truncate), `split_at`) consume
/// the view. To keep it, call them on [`as_view`](Self::as_view) or
/// [`as_view_mut`](Self::as_view_mut), or use [`narrow`](Self::narrow) to cut in place.
#[derive(Clone, Copy)]
pub struct PacketView<B> {
    buffer: B,
    /// Absolute offset of the buffer's first byte. It is 0, except in the right half of a split
    /// mutable view: that half has lost the bytes before it, but its offsets still count from where
    /// they began.
    base: u32,
    /// Absolute offset of the view's first byte; `base <= offset`.
    offset: u32,
    /// `offset + len` fits in 32 bits and is within the buffer.
    len: u32,
}

impl<B> fmt::Debug for PacketView<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketView")
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl<B> PacketView<B> {
    /// The number of bytes in the view.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the view has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the view begins, counted from the first byte of the original buffer: the one on which
    /// the view that all cuts began with was made.
    #[inline]
    pub fn offset(&self) -> usize {
        self.offset as usize
    }

    /// Cuts this view down to its `len` bytes at `at`. `None` if they are not all in the view; in
    /// this case the view stays as it was.
    #[inline]
    #[must_use = "a refused cut leaves the view as it was"]
    pub fn narrow(&mut self, at: usize, len: usize) -> Option<()> {
        if at.checked_add(len)? > self.len() {
            return None;
        }
        // Both casts and the sum are exact: `at` and `len` are at most `self.len`.
        self.offset += at as u32;
        self.len = len as u32;
        Some(())
    }

    /// The `len` bytes at `at`. `None` if they are not all in the view.
    #[inline]
    pub fn sub(mut self, at: usize, len: usize) -> Option<Self> {
        self.narrow(at, len)?;
        Some(self)
    }

    /// All but the first `n` bytes. `None` if the view has fewer than `n`.
    #[inline]
    pub fn shift(self, n: usize) -> Option<Self> {
        let len = self.len().checked_sub(n)?;
        self.sub(n, len)
    }

    /// The first `len` bytes. `None` if the view has fewer: a view never grows.
    #[inline]
    pub fn truncate(self, len: usize) -> Option<Self> {
        self.sub(0, len)
    }

    /// The view's place in `buffer`.
    #[inline]
    fn range(&self) -> Range<usize> {
        let start = (self.offset - self.base) as usize;
        start..start + self.len()
    }
}

impl<B: AsRef<[u8]>> PacketView<B> {
    /// A view of the `len` bytes at `offset` of `buffer`. `None` if they are not all in the buffer,
    /// or if their end does not fit in 32 bits.
    #[inline]
    pub fn new(buffer: B, offset: u32, len: u32) -> Option<Self> {
        let end = offset.checked_add(len)?;
        if usize::try_from(end).ok()? > buffer.as_ref().len() {
            return None;
        }
        Some(Self { buffer, base: 0, offset, len })
    }

    /// A view of all of `buffer`. `None` if its length does not fit in 32 bits.
    #[inline]
    pub fn whole(buffer: B) -> Option<Self> {
        let len = u32::try_from(buffer.as_ref().len()).ok()?;
        Some(Self { buffer, base: 0, offset: 0, len })
    }

    /// Borrows the view. For a view that is not `Copy`.
    #[inline]
    pub fn as_view(&self) -> PacketView<&[u8]> {
        let Self { base, offset, len, .. } = *self;
        PacketView { buffer: self.buffer.as_ref(), base, offset, len }
    }

    /// The view's bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        // The range was checked when the view was made. If an `AsRef` gives different bytes each
        // time, the result is an empty slice, not a panic.
        self.buffer.as_ref().get(self.range()).unwrap_or_default()
    }

    /// The `N` bytes at `at`.
    #[inline]
    pub fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.as_bytes().get(at..)?.first_chunk().copied()
    }

    /// The byte at `at`.
    #[inline]
    pub fn u8(&self, at: usize) -> Option<u8> {
        self.as_bytes().get(at).copied()
    }

    /// The big-endian 16-bit field at `at`.
    #[inline]
    pub fn be16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_be_bytes)
    }

    /// The big-endian 32-bit field at `at`.
    #[inline]
    pub fn be32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_be_bytes)
    }

    /// The big-endian 64-bit field at `at`.
    #[inline]
    pub fn be64(&self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_be_bytes)
    }

    /// The little-endian 16-bit field at `at`.
    #[inline]
    pub fn le16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    /// The little-endian 32-bit field at `at`.
    #[inline]
    pub fn le32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    /// The first `N` bytes, to be read without further checks. `None` if the view has fewer.
    #[inline]
    pub fn fields<const N: usize>(&self) -> Option<Fields<'_, N>> {
        Fields::prefix(self.as_bytes())
    }

    /// The Ethernet header at the view's start. `None` if the view is shorter than one.
    #[inline]
    pub fn ethernet(&self) -> Option<EthernetHeader<'_>> {
        Some(EthernetHeader(self.fields()?))
    }
}

impl<B: AsMut<[u8]>> PacketView<B> {
    /// Borrows the view for writing. For a view that is used again afterwards.
    #[inline]
    pub fn as_view_mut(&mut self) -> PacketView<&mut [u8]> {
        let Self { base, offset, len, .. } = *self;
        PacketView { buffer: self.buffer.as_mut(), base, offset, len }
    }

    /// The view's bytes, for writing.
    #[inline]
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        let range = self.range();
        // An empty slice, not a panic, if an `AsMut` gives different bytes each time.
        self.buffer.as_mut().get_mut(range).unwrap_or_default()
    }

    /// Writes `bytes` at `at`. If they do not all fit, writes nothing and returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_bytes(&mut self, at: usize, bytes: &[u8]) -> Option<()> {
        let rest = self.as_bytes_mut().get_mut(at..)?;
        rest.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(())
    }

    /// Writes the byte at `at`. If it is outside the view, writes nothing and returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_u8(&mut self, at: usize, value: u8) -> Option<()> {
        self.set_bytes(at, &[value])
    }

    /// Writes the big-endian 16-bit field at `at`. If it is not all in the view, writes nothing and
    /// returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_be16(&mut self, at: usize, value: u16) -> Option<()> {
        self.set_bytes(at, &value.to_be_bytes())
    }

    /// Writes the big-endian 32-bit field at `at`. If it is not all in the view, writes nothing and
    /// returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_be32(&mut self, at: usize, value: u32) -> Option<()> {
        self.set_bytes(at, &value.to_be_bytes())
    }

    /// Writes the big-endian 64-bit field at `at`. If it is not all in the view, writes nothing and
    /// returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_be64(&mut self, at: usize, value: u64) -> Option<()> {
        self.set_bytes(at, &value.to_be_bytes())
    }

    /// Writes the little-endian 16-bit field at `at`. If it is not all in the view, writes nothing
    /// and returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_le16(&mut self, at: usize, value: u16) -> Option<()> {
        self.set_bytes(at, &value.to_le_bytes())
    }

    /// Writes the little-endian 32-bit field at `at`. If it is not all in the view, writes nothing
    /// and returns `None`.
    #[inline]
    #[must_use = "`None` means that nothing was written"]
    pub fn set_le32(&mut self, at: usize, value: u32) -> Option<()> {
        self.set_bytes(at, &value.to_le_bytes())
    }

    /// The first `N` bytes, to be read and written without further checks. `None` if the view has
    /// fewer.
    #[inline]
    pub fn fields_mut<const N: usize>(&mut self) -> Option<FieldsMut<'_, N>> {
        FieldsMut::prefix(self.as_bytes_mut())
    }
}

impl<'a> PacketView<&'a [u8]> {
    /// The view's bytes, for as long as the buffer lives.
    #[inline]
    pub fn bytes(self) -> &'a [u8] {
        self.buffer.get(self.range()).unwrap_or_default()
    }

    /// The first `at` bytes and the rest. `None` if the view has fewer than `at`.
    #[inline]
    pub fn split_at(self, at: usize) -> Option<(Self, Self)> {
        Some((self.truncate(at)?, self.shift(at)?))
    }
}

impl<'a> PacketView<&'a mut [u8]> {
    /// The view's bytes, for as long as the buffer is borrowed.
    #[inline]
    pub fn bytes_mut(self) -> &'a mut [u8] {
        let range = self.range();
        self.buffer.get_mut(range).unwrap_or_default()
    }

    /// Makes the view read-only, for as long as the buffer is borrowed.
    #[inline]
    pub fn freeze(self) -> PacketView<&'a [u8]> {
        let Self { buffer, base, offset, len } = self;
        PacketView { buffer, base, offset, len }
    }

    /// The first `at` bytes and the rest, each of which can be written while the other is held.
    /// `None` if the view has fewer than `at`.
    #[inline]
    pub fn split_at_mut(self, at: usize) -> Option<(Self, Self)> {
        let rest = self.len().checked_sub(at)?;
        let (left, right) = self.buffer.split_at_mut_checked(self.range().start + at)?;
        // Exact: `at` and `rest` are at most `self.len`.
        let middle = self.offset + at as u32;
        Some((
            Self { buffer: left, base: self.base, offset: self.offset, len: at as u32 },
            Self { buffer: right, base: middle, offset: middle, len: rest as u32 },
        ))
    }
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for PacketView<B> {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl<B: AsMut<[u8]>> AsMut<[u8]> for PacketView<B> {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        self.as_bytes_mut()
    }
}

/// The first `N` bytes of a packet, which are read without checks after one length check.
///
/// Positions are const generics, which the compiler compares with `N`. A field inside the `N` bytes
/// is read without a check:
///
/// ```
/// use vmring_core::view::{ETHERNET_HEADER_LEN, Fields};
///
/// let ethernet = Fields::<ETHERNET_HEADER_LEN>::prefix(&[0; 60]).unwrap();
/// assert_eq!(ethernet.be16::<12>(), 0);
/// ```
///
/// A field that reaches outside is an error of `cargo build`. (`cargo check` does not see it,
/// because the error arises when the call is instantiated.)
///
/// ```compile_fail,E0080
/// use vmring_core::view::{ETHERNET_HEADER_LEN, Fields};
///
/// let ethernet = Fields::<ETHERNET_HEADER_LEN>::prefix(&[0; 60]).unwrap();
/// assert_eq!(ethernet.be16::<13>(), 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields<'a, const N: usize>(&'a [u8; N]);

impl<'a, const N: usize> Fields<'a, N> {
    /// The fields of a header whose bytes are all there.
    #[inline]
    pub const fn new(bytes: &'a [u8; N]) -> Self {
        Self(bytes)
    }

    /// The first `N` of `bytes`. `None` if there are fewer. This is the one length check.
    #[inline]
    pub const fn prefix(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first_chunk() {
            Some(bytes) => Some(Self(bytes)),
            None => None,
        }
    }

    /// All `N` bytes.
    #[inline]
    pub const fn bytes(self) -> &'a [u8; N] {
        self.0
    }

    /// The `LEN` bytes at `AT`.
    #[inline]
    pub fn array<const AT: usize, const LEN: usize>(self) -> [u8; LEN] {
        const { assert!(AT <= N && LEN <= N - AT, "the field reaches outside the header") };
        core::array::from_fn(|i| self.0[AT + i])
    }

    /// The byte at `AT`.
    #[inline]
    pub fn u8<const AT: usize>(self) -> u8 {
        let [byte] = self.array::<AT, 1>();
        byte
    }

    /// The big-endian 16-bit field at `AT`.
    #[inline]
    pub fn be16<const AT: usize>(self) -> u16 {
        u16::from_be_bytes(self.array::<AT, 2>())
    }

    /// The big-endian 32-bit field at `AT`.
    #[inline]
    pub fn be32<const AT: usize>(self) -> u32 {
        u32::from_be_bytes(self.array::<AT, 4>())
    }

    /// The big-endian 64-bit field at `AT`.
    #[inline]
    pub fn be64<const AT: usize>(self) -> u64 {
        u64::from_be_bytes(self.array::<AT, 8>())
    }

    /// The little-endian 16-bit field at `AT`.
    #[inline]
    pub fn le16<const AT: usize>(self) -> u16 {
        u16::from_le_bytes(self.array::<AT, 2>())
    }

    /// The little-endian 32-bit field at `AT`.
    #[inline]
    pub fn le32<const AT: usize>(self) -> u32 {
        u32::from_le_bytes(self.array::<AT, 4>())
    }
}

/// [`Fields`] that can also be written. Here too, a field that reaches outside does not compile.
///
/// ```
/// use vmring_core::view::{ETHERNET_HEADER_LEN, PacketView};
///
/// let mut slot = [0; 64];
/// let mut packet = PacketView::new(&mut slot[..], 16, 32).unwrap();
/// let mut ethernet = packet.fields_mut::<ETHERNET_HEADER_LEN>().unwrap();
/// ethernet.set_array::<0, 6>([0xff; 6]);
/// ethernet.set_be16::<12>(0x0806);
/// assert_eq!(packet.be16(12), Some(0x0806));
/// ```
///
/// ```compile_fail,E0080
/// use vmring_core::view::{ETHERNET_HEADER_LEN, PacketView};
///
/// let mut packet = PacketView::whole([0; 64]).unwrap();
/// packet.fields_mut::<ETHERNET_HEADER_LEN>().unwrap().set_be16::<13>(0x0806);
/// ```
#[derive(Debug, PartialEq, Eq)]
pub struct FieldsMut<'a, const N: usize>(&'a mut [u8; N]);

impl<'a, const N: usize> FieldsMut<'a, N> {
    /// The fields of a header whose bytes are all there.
    #[inline]
    pub const fn new(bytes: &'a mut [u8; N]) -> Self {
        Self(bytes)
    }

    /// The first `N` of `bytes`. `None` if there are fewer. This is the one length check.
    #[inline]
    pub const fn prefix(bytes: &'a mut [u8]) -> Option<Self> {
        match bytes.first_chunk_mut() {
            Some(bytes) => Some(Self(bytes)),
            None => None,
        }
    }

    /// Borrows the fields for reading.
    #[inline]
    pub const fn as_fields(&self) -> Fields<'_, N> {
        Fields(self.0)
    }

    /// Writes the `LEN` bytes at `AT`.
    #[inline]
    pub fn set_array<const AT: usize, const LEN: usize>(&mut self, value: [u8; LEN]) {
        const { assert!(AT <= N && LEN <= N - AT, "the field reaches outside the header") };
        for (i, byte) in value.into_iter().enumerate() {
            self.0[AT + i] = byte;
        }
    }

    /// Writes the byte at `AT`.
    #[inline]
    pub fn set_u8<const AT: usize>(&mut self, value: u8) {
        self.set_array::<AT, 1>([value]);
    }

    /// Writes the big-endian 16-bit field at `AT`.
    #[inline]
    pub fn set_be16<const AT: usize>(&mut self, value: u16) {
        self.set_array::<AT, 2>(value.to_be_bytes());
    }

    /// Writes the big-endian 32-bit field at `AT`.
    #[inline]
    pub fn set_be32<const AT: usize>(&mut self, value: u32) {
        self.set_array::<AT, 4>(value.to_be_bytes());
    }

    /// Writes the big-endian 64-bit field at `AT`.
    #[inline]
    pub fn set_be64<const AT: usize>(&mut self, value: u64) {
        self.set_array::<AT, 8>(value.to_be_bytes());
    }

    /// Writes the little-endian 16-bit field at `AT`.
    #[inline]
    pub fn set_le16<const AT: usize>(&mut self, value: u16) {
        self.set_array::<AT, 2>(value.to_le_bytes());
    }

    /// Writes the little-endian 32-bit field at `AT`.
    #[inline]
    pub fn set_le32<const AT: usize>(&mut self, value: u32) {
        self.set_array::<AT, 4>(value.to_le_bytes());
    }
}

/// The 14 bytes that every Ethernet frame begins with. [`PacketView::ethernet`] returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EthernetHeader<'a>(Fields<'a, ETHERNET_HEADER_LEN>);

impl EthernetHeader<'_> {
    /// The address of the receiver.
    #[inline]
    pub fn destination(self) -> [u8; 6] {
        self.0.array::<0, 6>()
    }

    /// The address of the sender.
    #[inline]
    pub fn source(self) -> [u8; 6] {
        self.0.array::<6, 6>()
    }

    /// The type of what follows the header: 0x0800 for IPv4, 0x86dd for IPv6, 0x0806 for ARP,
    /// 0x8100 for a VLAN tag.
    #[inline]
    pub fn ethertype(self) -> u16 {
        self.0.be16::<12>()
    }
}
