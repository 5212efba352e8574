//! [`UsedElements`]: the elements that the driver does not see yet.

use crate::queue::rings::{ELEMENT_LEN, Rings};

type Element = [u8; ELEMENT_LEN as usize];

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
            // The chains that a batch skipped left a gap.
            if self.first.wrapping_add(self.count) != index {
                self.copy_out(rings);
                self.first = index;
            }
            self.count += 1;
        }
        let last = self.first.wrapping_add(self.count - 1);
        let element = &mut self.shadow[rings.slot(last)];
        *element = (u64::from(len) << 32 | u64::from(head)).to_le_bytes();
        self.batch_is_open = skippable;
    }

    /// Copies everything to the guest, and ends the batch.
    pub(super) fn flush(&mut self, rings: &Rings) {
        self.copy_out(rings);
        self.batch_is_open = false;
    }

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
