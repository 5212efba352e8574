//! [`UsedElements`]: the elements that the driver does not see yet.

use crate::queue::rings::{ELEMENT_LEN, Rings};

type Element = [u8; ELEMENT_LEN as usize];

/// The element of a chain (virtio 1.2, section 2.7.8).
#[inline]
fn element(head: u16, len: u32) -> Element {
    (u64::from(len) << 32 | u64::from(head)).to_le_bytes()
}

/// Elements of the used ring before they are copied to the guest, at the same places. The driver
/// polls the line of memory where the first elements are, so it is written once for a burst.
#[derive(Debug)]
pub(super) struct UsedElements {
    shadow: Box<[Element]>,
    /// The index of the first element that is not copied yet.
    first: u16,
    /// The number of elements that are not copied yet.
    count: u16,
    /// Whether the last element stands for a batch that the next chain may join.
    batch_is_open: bool,
}

impl UsedElements {
    pub(super) fn new(size: u16) -> Self {
        let shadow = vec![Element::default(); size.into()].into();
        Self { shadow, first: 0, count: 0, batch_is_open: false }
    }

    /// Adds the element of the chain at `head`, which is the used index `index`'s.
    ///
    /// If the chain may be skipped, the element of the next chain replaces this one: it is at the
    /// place of the batch's first chain and has the head of its last (virtio 1.2, section 2.7.9).
    #[inline(always)]
    pub(super) fn push(&mut self, rings: &Rings, index: u16, head: u16, len: u32, skippable: bool) {
        if !self.batch_is_open {
            self.begin_at(rings, index);
            self.count += 1;
        }
        let last = self.first.wrapping_add(self.count - 1);
        self.shadow[rings.slot(last)] = element(head, len);
        self.batch_is_open = skippable;
    }

    /// Adds the elements of chains that end one after the other, the first of which is the used index
    /// `index`'s: of each its head and its length. None of them may be skipped, no batch is open, and
    /// their places do not go beyond the ring's end.
    #[inline(always)]
    pub(super) fn push_run(
        &mut self,
        rings: &Rings,
        index: u16,
        chains: impl ExactSizeIterator<Item = (u16, u32)>,
    ) {
        debug_assert!(!self.batch_is_open);
        self.begin_at(rings, index);
        self.count += chains.len() as u16;
        let (slot, count) = (rings.slot(index), chains.len());
        for (place, (head, len)) in self.shadow[slot..slot + count].iter_mut().zip(chains) {
            *place = element(head, len);
        }
    }

    /// Makes the next element that of the used index `index`.
    #[inline]
    fn begin_at(&mut self, rings: &Rings, index: u16) {
        // The chains that a batch skipped left a gap.
        if self.first.wrapping_add(self.count) != index {
            self.copy_out(rings);
            self.first = index;
        }
    }

    /// Whether the next chain may join the batch of the last element.
    #[inline]
    pub(super) fn batch_is_open(&self) -> bool {
        self.batch_is_open
    }

    /// Copies everything to the guest, and ends the batch.
    pub(super) fn flush(&mut self, rings: &Rings) {
        self.copy_out(rings);
        self.batch_is_open = false;
    }

    #[inline(never)]
    fn copy_out(&mut self, rings: &Rings) {
        while self.count > 0 {
            let slot = rings.slot(self.first);
            let count = usize::from(self.count).min(self.shadow.len() - slot);
            rings.write_elements(self.first, &self.shadow[slot..slot + count]);
            self.first = self.first.wrapping_add(count as u16);
            self.count -= count as u16;
        }
    }
}
