//! The entries of the queues: the submission entry ([`Sqe`]) and the completion entry ([`Cqe`]).
//!
//! Both are plain data with a fixed layout of 32 bytes, two to a 64-byte cache line. An entry names
//! a slot by region and index, never by a pointer, so it means the same in another address space.

use core::mem::{align_of, offset_of, size_of};
use static_assertions::{assert_impl_all, const_assert_eq};

/// What a submission asks for. A completion repeats the opcode of its submission.
///
/// An opcode is part of an entry; a [`Class`](crate::Class) is what credits are counted by,
/// and both cancel opcodes are of one class. The set is closed, because the opcode is part of an
/// entry's layout: code may match it without a wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Fill the frame with the next packet.
    Read = 0,
    /// Send the frame's packet.
    Write = 1,
    /// Cancel: complete every entry in flight whose `user_data` is `target`.
    Cancel = 2,
    /// Cancel: complete every entry in flight.
    CancelAll = 3,
}

/// How an entry ended. The set is closed, so code may match it without a wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It was done: a packet arrived, or the device took the packet.
    Done,
    /// It was cancelled, by a cancel entry, a restart or a close.
    Cancelled,
    /// The device panicked while the entry was in flight.
    DevicePanicked,
    /// The device dropped the entry without completing it.
    Abandoned,
    /// The device refused the entry, with the device's own status code.
    Refused(u32),
}

impl Outcome {
    #[inline]
    const fn encode(self) -> (u8, u32) {
        match self {
            Outcome::Done => (0, 0),
            Outcome::Cancelled => (1, 0),
            Outcome::DevicePanicked => (2, 0),
            Outcome::Abandoned => (3, 0),
            Outcome::Refused(code) => (4, code),
        }
    }

    #[inline]
    const fn decode(kind: u8, code: u32) -> Self {
        if kind == 0 { Outcome::Done } else { Self::decode_failure(kind, code) }
    }

    /// It is apart, so that an entry that is done costs one comparison.
    #[cold]
    const fn decode_failure(kind: u8, code: u32) -> Self {
        match kind {
            1 => Outcome::Cancelled,
            2 => Outcome::DevicePanicked,
            3 => Outcome::Abandoned,
            _ => Outcome::Refused(code),
        }
    }
}

/// Where a packet is in its region: a slot, and the bytes of the slot that the packet takes.
///
/// This is packed as two `u64`, not as four `u32`. With `u32` fields the compiler stores and
/// reloads at different widths, which defeats the processor's store forwarding and costs about
/// fifteen cycles each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct SlotRange {
    /// The slot, and in the upper half the packet's offset in it.
    start: u64,
    /// The packet's length, and in the upper half the [`OffloadState`].
    content: u64,
}

#[inline(always)]
const fn word(lower: u32, upper: u32) -> u64 {
    lower as u64 | (upper as u64) << 32
}

impl SlotRange {
    #[inline(always)]
    pub(crate) const fn new(slot: u32, offset: u32, len: u32, state: OffloadState) -> Self {
        Self { start: word(slot, offset), content: word(len, state.0) }
    }

    #[inline(always)]
    pub(crate) const fn slot(self) -> u32 {
        self.start as u32
    }

    #[inline(always)]
    pub(crate) const fn offset(self) -> u32 {
        (self.start >> 32) as u32
    }

    #[inline(always)]
    pub(crate) const fn len(self) -> u32 {
        self.content as u32
    }

    #[inline(always)]
    pub(crate) const fn offload_state(self) -> OffloadState {
        OffloadState((self.content >> 32) as u32)
    }

    /// Whether the state is [`OffloadState::ABSENT`] and the length is below `end`, which is at most 2^32.
    #[inline(always)]
    pub(crate) const fn is_bare_below(self, end: u64) -> bool {
        // Any other state makes the number larger.
        self.content < end
    }

    /// Sets where the packet is in the slot: `len` bytes from `offset` on.
    #[inline(always)]
    pub(crate) fn set_window(&mut self, offset: u32, len: u32) {
        *self = Self::new(self.slot(), offset, len, self.offload_state());
    }

    #[inline(always)]
    pub(crate) fn set_len(&mut self, len: u32) {
        self.content = word(len, self.offload_state().0);
    }

    #[inline(always)]
    pub(crate) fn set_offload_state(&mut self, state: OffloadState) {
        self.content = word(self.len(), state.0);
    }
}

/// What the 12 bytes in front of a packet are.
///
/// A plain `u32`, not an enum, so that an `Option` of a frame or of an entry does not use its
/// niche.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct OffloadState(u32);

impl OffloadState {
    /// No offload header, only headroom.
    pub(crate) const ABSENT: Self = Self(0);
    /// The offload header with which the packet was received.
    pub(crate) const RECEIVED: Self = Self(1);
    /// The offload header with which the packet is to be sent.
    pub(crate) const TO_SEND: Self = Self(2);
    /// The slot holds no packet, but the list of the places where a guest has it.
    pub(crate) const GUEST: Self = Self(1 << 31);
    /// The same, and the packet's place may be in several pieces.
    pub(crate) const GUEST_IN_PIECES: Self = Self(1 << 31 | 1 << 30);

    /// Whether this is [`TO_SEND`](Self::TO_SEND), whose bit no other state has.
    #[inline(always)]
    pub(crate) fn is_to_send(self) -> bool {
        self.0 & Self::TO_SEND.0 != 0
    }

    /// Whether the slot holds the list of a guest's buffer.
    #[inline(always)]
    pub(crate) fn is_guest(self) -> bool {
        self.0 & Self::GUEST.0 != 0
    }

    /// Whether the slot holds the list of a guest's buffer that may be in several pieces, and so have
    /// further slots.
    #[inline(always)]
    pub(crate) fn is_in_pieces(self) -> bool {
        self.0 & Self::GUEST_IN_PIECES.0 == Self::GUEST_IN_PIECES.0
    }
}

/// The slot number in an entry that carries no frame.
const NO_SLOT: u32 = u32::MAX;
const NO_RANGE: SlotRange = SlotRange::new(NO_SLOT, 0, 0, OffloadState::ABSENT);

/// A submission queue entry. Lengths and offsets are in bytes, and `offset` counts from the slot's
/// start. A cancel has no slot; its `offset` and `len` are the high and the low half of its target.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Sqe {
    user_data: u64,
    range: SlotRange,
    region: u16,
    opcode: Opcode,
    reserved: u8,
    /// Some of [`SKIP_SUCCESS`] and [`GUEST`].
    flags: u32,
}

/// The flag of a write whose success has no completion, as `IOSQE_CQE_SKIP_SUCCESS` of io_uring. It is
/// the highest bit, so that a taker can put the flags beside a number of 31 bits by one instruction.
pub const SKIP_SUCCESS: u32 = 1 << 31;

/// The flag of an entry whose packet is in the memory of a guest. The entry's slot holds the list of
/// the segments.
pub const GUEST: u32 = 1 << 30;

/// A completion queue entry. Lengths and offsets are in bytes, and `offset` counts from the slot's
/// start. In a cancel's completion, `len` is the number of entries that matched.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Cqe {
    user_data: u64,
    range: SlotRange,
    region: u16,
    opcode: Opcode,
    outcome: u8,
    /// The device's own code, if it refused the entry. If the entry was done, [`more`](Self::more).
    code: u32,
}

const_assert_eq!(size_of::<Sqe>(), 32);
const_assert_eq!(align_of::<Sqe>(), 32);
const_assert_eq!(offset_of!(Sqe, user_data), 0);
const_assert_eq!(offset_of!(Sqe, range.start), 8);
const_assert_eq!(offset_of!(Sqe, range.content), 16);
const_assert_eq!(offset_of!(Sqe, region), 24);
const_assert_eq!(offset_of!(Sqe, opcode), 26);
const_assert_eq!(offset_of!(Sqe, reserved), 27);
const_assert_eq!(offset_of!(Sqe, flags), 28);

const_assert_eq!(size_of::<Cqe>(), 32);
const_assert_eq!(align_of::<Cqe>(), 32);
const_assert_eq!(offset_of!(Cqe, user_data), 0);
const_assert_eq!(offset_of!(Cqe, range.start), 8);
const_assert_eq!(offset_of!(Cqe, range.content), 16);
const_assert_eq!(offset_of!(Cqe, region), 24);
const_assert_eq!(offset_of!(Cqe, opcode), 26);
const_assert_eq!(offset_of!(Cqe, outcome), 27);
const_assert_eq!(offset_of!(Cqe, code), 28);
assert_impl_all!(Sqe: Copy, Send);
assert_impl_all!(Cqe: Copy, Send);

/// What a queue needs to know about its entries: whether an entry owns a slot, and which.
pub(crate) trait Entry: Copy {
    fn has_slot(&self) -> bool;
    /// The region and the range in it. Only meaningful if the entry [has a slot](Self::has_slot).
    fn slot(&self) -> (u16, SlotRange);
}

impl Sqe {
    #[inline]
    pub(crate) fn packet(opcode: Opcode, region: u16, range: SlotRange, user_data: u64) -> Self {
        Self { user_data, range, region, opcode, reserved: 0, flags: 0 }
    }

    /// Sets the flags: some of [`SKIP_SUCCESS`] and [`GUEST`].
    #[inline]
    pub(crate) fn with_flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    pub(crate) fn cancel(opcode: Opcode, target: u64, user_data: u64) -> Self {
        let (offset, len) = ((target >> 32) as u32, target as u32);
        Self::packet(
            opcode,
            0,
            SlotRange::new(NO_SLOT, offset, len, OffloadState::ABSENT),
            user_data,
        )
    }

    /// The number that the caller gave.
    #[inline]
    pub fn user_data(&self) -> u64 {
        self.user_data
    }

    /// What the entry asks for.
    #[inline]
    pub fn opcode(&self) -> Opcode {
        self.opcode
    }

    /// Some of [`SKIP_SUCCESS`] and [`GUEST`].
    #[inline(always)]
    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }

    /// Whether this is a read or a write, which has a slot, and not a cancel.
    #[inline(always)]
    pub(crate) fn is_packet(&self) -> bool {
        matches!(self.opcode, Opcode::Read | Opcode::Write)
    }

    /// Whether this asks for `opcode`, and has no flags but `flags`.
    #[inline(always)]
    pub(crate) fn is_plain(&self, opcode: Opcode, flags: u32) -> bool {
        self.opcode == opcode && self.flags & !flags == 0
    }

    /// The `user_data` of the entries to cancel. Only meaningful in a cancel.
    #[inline]
    pub fn target(&self) -> u64 {
        u64::from(self.range.offset()) << 32 | u64::from(self.range.len())
    }
}

impl Cqe {
    #[inline]
    pub(crate) fn packet(
        opcode: Opcode,
        region: u16,
        range: SlotRange,
        user_data: u64,
        outcome: Outcome,
    ) -> Self {
        let (outcome, code) = outcome.encode();
        Self { user_data, range, region, opcode, outcome, code }
    }

    /// The completion of a read or write that is done, with the same slot and the same packet. `opcode` is
    /// the entry's own, which the caller knows: a constant is written in fewer steps.
    #[inline(always)]
    pub(crate) fn of(opcode: Opcode, sqe: &Sqe) -> Self {
        debug_assert_eq!(opcode, sqe.opcode);
        Self::packet(opcode, sqe.region, sqe.range, sqe.user_data, Outcome::Done)
    }

    /// Sets the packet's length.
    #[inline(always)]
    pub(crate) fn with_len(mut self, len: u32) -> Self {
        self.range.set_len(len);
        self
    }

    /// Says that the rest of the packet is in the `more` next completions. The entry must be done.
    #[inline]
    pub(crate) fn with_more(self, more: u16) -> Self {
        Self { code: more.into(), ..self }
    }

    pub(crate) fn cancel(opcode: Opcode, matched: u32, user_data: u64) -> Self {
        Self::without_slot(opcode, matched, user_data, Outcome::Done)
    }

    pub(crate) fn without_slot(opcode: Opcode, len: u32, user_data: u64, outcome: Outcome) -> Self {
        let mut range = NO_RANGE;
        range.set_len(len);
        Self::packet(opcode, 0, range, user_data, outcome)
    }

    /// The number that the caller gave.
    #[inline]
    pub fn user_data(&self) -> u64 {
        self.user_data
    }

    /// What the submission asked for.
    #[inline]
    pub fn opcode(&self) -> Opcode {
        self.opcode
    }

    /// How the entry ended.
    #[inline]
    pub fn outcome(&self) -> Outcome {
        Outcome::decode(self.outcome, self.code)
    }

    /// How many of the next completions have the rest of this packet. 0 if none has.
    #[inline]
    pub fn more(&self) -> u16 {
        if self.outcome == 0 { self.code as u16 } else { 0 }
    }

    /// The packet's length in bytes. For a cancel, the number of entries that matched.
    #[inline]
    pub fn len(&self) -> u32 {
        self.range.len()
    }

    /// Whether `len` is 0.
    pub fn is_empty(&self) -> bool {
        self.range.len() == 0
    }
}

/// Implements [`Entry`], in the same way for both entries.
macro_rules! entry {
    ($entry:ident) => {
        impl Entry for $entry {
            #[inline(always)]
            fn has_slot(&self) -> bool {
                self.range.slot() != NO_SLOT
            }

            #[inline(always)]
            fn slot(&self) -> (u16, SlotRange) {
                (self.region, self.range)
            }
        }
    };
}
entry!(Sqe);
entry!(Cqe);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_survive_the_entry() {
        for outcome in [
            Outcome::Done,
            Outcome::Cancelled,
            Outcome::DevicePanicked,
            Outcome::Abandoned,
            Outcome::Refused(0),
            Outcome::Refused(1007),
            Outcome::Refused(u32::MAX),
        ] {
            let cqe = Cqe::packet(Opcode::Read, 0, NO_RANGE, 7, outcome);
            assert_eq!((cqe.outcome(), cqe.more()), (outcome, 0));
        }
        let cqe = Cqe::packet(Opcode::Read, 0, NO_RANGE, 7, Outcome::Done).with_more(u16::MAX);
        assert_eq!((cqe.outcome(), cqe.more()), (Outcome::Done, u16::MAX));
    }

    #[test]
    fn a_completion_is_empty_if_its_packet_has_no_bytes() {
        for len in [0, 1] {
            let cqe = Cqe::cancel(Opcode::Cancel, len, 7);
            assert_eq!((cqe.len(), cqe.is_empty()), (len, len == 0));
        }
    }

    #[test]
    fn an_entry_without_a_slot_has_no_place() {
        let cancel = Sqe::cancel(Opcode::Cancel, 3 << 40 | 5, 4);
        assert_eq!((cancel.has_slot(), cancel.target()), (false, 3 << 40 | 5));
        let state = OffloadState::TO_SEND;
        let range = SlotRange::new(8, 7, 6, state);
        let packet = Sqe::packet(Opcode::Write, 9, range, 5);
        assert_eq!((packet.has_slot(), packet.slot()), (true, (9, range)));
        assert_eq!((cancel.flags(), packet.flags()), (0, 0));
        let silent = packet.with_flags(SKIP_SUCCESS);
        assert_eq!(silent.flags(), SKIP_SUCCESS);
        assert_eq!((silent.opcode(), silent.slot()), (Opcode::Write, (9, range)));
    }
}
