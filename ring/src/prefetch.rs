//! Asking for a cache line before it is needed.
//!
//! An entry that another processor has written costs a transfer between caches when it is read. The
//! work on one entry is long enough to fill the processor's window of a few hundred instructions, so
//! without help one such transfer begins when the one before is over. Asked for together they overlap.

/// Asks for the cache line of `place` for reading. A hint: it changes nothing but time, and does
/// nothing where it is not known how.
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
