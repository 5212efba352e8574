//! [`MemoryTable`]: the regions of the guest's memory, and the dirty log over them.

use std::fs::File;
use std::sync::Arc;

use vmring_core::guest::GuestMemory;

use crate::vhost_user::connection::Descriptors;
use crate::vhost_user::error::{Error, MapError};
use crate::vhost_user::mapping::{DirtyBitmap, Limits, Region};
use crate::vhost_user::message::{RegionDescription, RegionTable};
use crate::vhost_user::request::Request;

/// A table that never changes. Each request that changes the memory makes another one, and the
/// session replaces the old one when no ring runs.
#[derive(Clone)]
pub(super) struct MemoryTable {
    regions: Vec<Region>,
    log: Option<Arc<DirtyBitmap>>,
    guest: GuestMemory,
}

impl MemoryTable {
    pub(super) fn empty() -> Self {
        let guest = GuestMemory::new([]).expect("no region overlaps another");
        Self { regions: Vec::new(), log: None, guest }
    }

    fn new(
        request: Request,
        regions: Vec<Region>,
        log: Option<Arc<DirtyBitmap>>,
    ) -> Result<Self, Error> {
        let guest = GuestMemory::new(regions.iter().map(|region| region.part(log.clone())))
            .map_err(|source| Error::Memory { request, source })?;
        if let Some(log) = &log {
            for region in &regions {
                // `GuestMemory::new` has seen that no region is empty or exceeds 64 bits.
                let address = region.guest_address + (region.size - 1);
                if !log.covers(address) {
                    return Err(Error::LogTooShort { request, address });
                }
            }
        }
        Ok(Self { regions, log, guest })
    }

    /// The table that consists of these regions alone.
    pub(super) fn replace(
        &self,
        table: &RegionTable,
        descriptors: &mut Descriptors,
        limits: Limits<'_>,
    ) -> Result<Self, Error> {
        let request = Request::SetMemTable;
        let mut regions = Vec::with_capacity(table.regions().len());
        for (place, region) in table.regions().iter().enumerate() {
            let file = descriptors.take(place).into();
            map(request, &mut regions, region, file, limits)?;
        }
        Self::new(request, regions, self.log.clone())
    }

    /// The table with one more region.
    pub(super) fn add(
        &self,
        region: &RegionDescription,
        descriptors: &mut Descriptors,
        limits: Limits<'_>,
    ) -> Result<Self, Error> {
        let request = Request::AddMemReg;
        let count = self.regions.len() + 1;
        if count > limits.slots {
            return Err(Error::Regions { request, count, max: limits.slots });
        }
        let mut regions = self.regions.clone();
        map(request, &mut regions, region, descriptors.take(0).into(), limits)?;
        Self::new(request, regions, self.log.clone())
    }

    /// The table without a region.
    pub(super) fn remove(&self, region: &RegionDescription) -> Result<Self, Error> {
        let found = self.regions.iter().position(|own| {
            (own.guest_address, own.user_address, own.size)
                == (region.guest_address, region.user_address, region.size)
        });
        let unknown = Error::UnknownRegion { guest_address: region.guest_address };
        let mut regions = self.regions.clone();
        regions.remove(found.ok_or(unknown)?);
        Self::new(Request::RemMemReg, regions, self.log.clone())
    }

    /// The table with another dirty log, or with none.
    pub(super) fn log(
        &self,
        request: Request,
        log: Option<Arc<DirtyBitmap>>,
    ) -> Result<Self, Error> {
        Self::new(request, self.regions.clone(), log)
    }

    pub(super) fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// The dirty log that is in use.
    pub(super) fn dirty_log(&self) -> Option<&Arc<DirtyBitmap>> {
        self.log.as_ref()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// How many regions have files that the front end can shorten.
    pub(super) fn unsealed(&self) -> usize {
        self.regions.iter().filter(|region| !region.sealed).count()
    }
}

/// Maps one region, and adds it to the others.
fn map(
    request: Request,
    regions: &mut Vec<Region>,
    new: &RegionDescription,
    file: File,
    limits: Limits<'_>,
) -> Result<(), Error> {
    let failed = |source| Error::Map { request, source };
    let others: u64 = regions.iter().map(|region| region.size).sum();
    // Without a limit, one front end with a sparse file could use up the address space of all.
    if new.size > limits.bytes.saturating_sub(others) {
        return Err(failed(MapError::TooMuch { max: limits.bytes }));
    }
    let RegionDescription { guest_address, size, user_address, mmap_offset } = *new;
    let region = Region::map(&file, guest_address, user_address, size, mmap_offset, limits);
    regions.push(region.map_err(failed)?);
    Ok(())
}
