//! [`GuestMemory`]: where the parts of a guest's memory are.

use crate::guest::region::{GuestMemoryError, GuestRegion, GuestSlice, REGIONS_MAX};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::iter::FusedIterator;
use static_assertions::assert_impl_all;

/// An address of a guest that is in none of its regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFault {
    /// The address.
    pub address: u64,
}

impl fmt::Display for GuestFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest has no memory at {:#x}", self.address)
    }
}

impl core::error::Error for GuestFault {}

assert_impl_all!(GuestMemory: Send, Sync, Clone);

/// The memory of a guest, as a table of regions that never changes. Cloning it is cheap, and a clone
/// keeps the mappings alive.
///
/// When the guest gets or loses a region, make a new table and replace the old one whole.
#[derive(Clone)]
pub struct GuestMemory {
    table: Arc<Table>,
}

struct Table {
    /// By their guest addresses.
    regions: Box<[GuestRegion]>,
    /// The indices of the regions, by their user addresses.
    by_user_address: Box<[u16]>,
}

impl GuestMemory {
    /// The memory that consists of these regions, in any order.
    ///
    /// # Errors
    ///
    /// [`GuestMemoryError`], if a region is empty, two of them overlap or they are too many.
    pub fn new(regions: impl IntoIterator<Item = GuestRegion>) -> Result<Self, GuestMemoryError> {
        let mut regions: Vec<GuestRegion> = regions.into_iter().collect();
        if regions.len() > REGIONS_MAX {
            return Err(GuestMemoryError::TooMany);
        }
        regions.sort_by_key(|region| region.guest_address);
        let mut by_user_address: Box<[u16]> = (0..regions.len() as u16).collect();
        by_user_address.sort_by_key(|i| regions[usize::from(*i)].user_address);
        check(regions.iter(), |region| region.guest_address)?;
        check(by_user_address.iter().map(|i| &regions[usize::from(*i)]), |region| {
            region.user_address
        })?;
        Ok(Self { table: Arc::new(Table { regions: regions.into(), by_user_address }) })
    }

    /// The regions, by their guest addresses.
    pub fn regions(&self) -> &[GuestRegion] {
        &self.table.regions
    }

    /// The `len` bytes from a guest's address on, if they are in one region.
    #[inline]
    pub fn slice(&self, guest_address: u64, len: u32) -> Option<GuestSlice<'_>> {
        let region = self.find(guest_address)?;
        let slice = region.slice(guest_address - region.guest_address, len);
        (slice.len() == len).then_some(slice)
    }

    /// The `len` bytes from an address of a vhost-user front end on, if they are in one region.
    pub fn slice_of_user(&self, user_address: u64, len: u32) -> Option<GuestSlice<'_>> {
        let region = self.find_of_user(user_address)?;
        let slice = region.slice(user_address - region.user_address, len);
        (slice.len() == len).then_some(slice)
    }

    /// A region that has just the `len` bytes from a guest's address on, if they are in one region
    /// of this memory. It keeps their mapping alive, so whoever accesses the same bytes for long
    /// looks them up once.
    pub fn part(&self, guest_address: u64, len: u64) -> Option<GuestRegion> {
        let region = self.find(guest_address)?;
        let offset = guest_address - region.guest_address;
        (len <= region.len - offset).then(|| region.cut(offset, len))
    }

    /// Like [`part`](Self::part), from an address of a vhost-user front end on.
    pub fn part_of_user(&self, user_address: u64, len: u64) -> Option<GuestRegion> {
        let region = self.find_of_user(user_address)?;
        let offset = user_address - region.user_address;
        (len <= region.len - offset).then(|| region.cut(offset, len))
    }

    /// The `len` bytes from a guest's address on, in one piece for each region that they are in. If
    /// an address is in no region, the last item is the fault.
    #[inline]
    pub fn slices(&self, guest_address: u64, len: u32) -> Slices<'_> {
        Slices { memory: self, address: guest_address, left: len }
    }

    /// Enters `len` bytes from a guest's address on into the dirty logs of their regions. Addresses
    /// in no region, or in a region without a log, are left out.
    pub fn mark_dirty(&self, guest_address: u64, len: u32) {
        for slice in self.slices(guest_address, len).flatten() {
            slice.mark_dirty(len);
        }
    }

    /// Whether a region has a dirty log.
    pub fn has_dirty_log(&self) -> bool {
        self.regions().iter().any(GuestRegion::has_dirty_log)
    }

    /// Whether the slice is of this table, and not of another one.
    #[inline]
    pub(super) fn owns(&self, slice: &GuestSlice<'_>) -> bool {
        let range = self.table.regions.as_ptr_range();
        slice.region().is_some_and(|region| range.contains(&core::ptr::from_ref(region)))
    }

    #[inline]
    fn find(&self, guest_address: u64) -> Option<&GuestRegion> {
        let regions = &*self.table.regions;
        let region = match regions {
            // The usual case costs no search.
            [only] => (only.guest_address <= guest_address).then_some(only)?,
            _ => {
                let behind =
                    regions.partition_point(|region| region.guest_address <= guest_address);
                &regions[behind.checked_sub(1)?]
            }
        };
        (guest_address - region.guest_address < region.len).then_some(region)
    }

    fn find_of_user(&self, user_address: u64) -> Option<&GuestRegion> {
        let Table { regions, by_user_address } = &*self.table;
        let behind = by_user_address
            .partition_point(|i| regions[usize::from(*i)].user_address <= user_address);
        let region = &regions[usize::from(*by_user_address.get(behind.checked_sub(1)?)?)];
        (user_address - region.user_address < region.len).then_some(region)
    }
}

/// Checks regions that are sorted by `start`.
fn check<'r>(
    regions: impl Iterator<Item = &'r GuestRegion>,
    start: impl Fn(&GuestRegion) -> u64,
) -> Result<(), GuestMemoryError> {
    let mut end = 0;
    for region in regions {
        let guest_address = region.guest_address;
        if region.len == 0 {
            return Err(GuestMemoryError::Empty { guest_address });
        }
        if start(region) < end {
            return Err(GuestMemoryError::Overlap { guest_address });
        }
        // The last address of all, 2^64 - 1, belongs to no region, so the end is a number too.
        let Some(behind) = start(region).checked_add(region.len) else {
            return Err(GuestMemoryError::Overflow { guest_address });
        };
        end = behind;
    }
    Ok(())
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions()).finish()
    }
}

/// The pieces of a range of a guest's memory; see [`GuestMemory::slices`].
#[derive(Clone, Debug)]
pub struct Slices<'m> {
    memory: &'m GuestMemory,
    address: u64,
    left: u32,
}

impl<'m> Iterator for Slices<'m> {
    type Item = Result<GuestSlice<'m>, GuestFault>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let Some(region) = self.memory.find(self.address) else {
            self.left = 0;
            return Some(Err(GuestFault { address: self.address }));
        };
        let slice = region.slice(self.address - region.guest_address, self.left);
        // `GuestMemory::new` saw that no region goes beyond 2^64.
        self.address += u64::from(slice.len());
        self.left -= slice.len();
        Some(Ok(slice))
    }
}

impl FusedIterator for Slices<'_> {}
