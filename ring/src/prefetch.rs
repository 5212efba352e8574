//! Asking for a cache line before it is needed.
//!
//! Reading an entry that another processor has written costs a transfer between caches. The work on
//! one entry fills the processor's window of a few hundred instructions, so without a prefetch each
//! transfer begins when the previous one has ended. Prefetched together, the transfers overlap.

/// Prefetches the cache line of `place` for reading. This is a hint, which affects only the time.
/// It does nothing on processors other than x86-64 and AArch64, and under Miri and loom.
#[inline(always)]
pub(crate) fn prefetch<T>(place: *const T) {
    #[cfg(all(target_arch = "x86_64", not(any(miri, loom))))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch accesses nothing and never faults, whatever the address (Intel SDM,
        // PREFETCHh).
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }
    #[cfg(all(target_arch = "aarch64", not(any(miri, loom))))]
    // SAFETY: a prefetch accesses nothing and never faults, whatever the address (Arm ARM, PRFM).
    unsafe {
        core::arch::asm!(
            "prfm pldl1keep, [{place}]",
            place = in(reg) place,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(any(miri, loom)))))]
    let _ = place;
}

/// Prefetches the cache lines of `len` bytes from `start` on, for writing: another processor has read
/// them, and its copies are to go. This is a hint, which affects only the time, so the bytes may be
/// anybody's. It does nothing on processors other than x86-64 and AArch64, and under Miri and loom.
#[inline(always)]
pub fn prefetch_for_writing(start: *const u8, len: usize) {
    let mut line = start;
    let end = start.wrapping_add(len);
    while line < end {
        prefetch_line_for_writing(line);
        line = line.wrapping_add(LINE);
    }
}

/// As [`prefetch_for_writing`], for the one cache line of `place`.
#[inline(always)]
pub fn prefetch_line_for_writing(place: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(any(miri, loom))))]
    // SAFETY: a prefetch accesses nothing and never faults, whatever the address (Intel SDM,
    // PREFETCHW). A processor that does not know it does nothing.
    unsafe {
        core::arch::asm!(
            "prefetchw [{place}]",
            place = in(reg) place,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(all(target_arch = "aarch64", not(any(miri, loom))))]
    // SAFETY: a prefetch accesses nothing and never faults, whatever the address (Arm ARM, PRFM).
    unsafe {
        core::arch::asm!(
            "prfm pstl1keep, [{place}]",
            place = in(reg) place,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(any(miri, loom)))))]
    let _ = place;
}

/// The bytes of a cache line.
pub(crate) const LINE: usize = 64;
