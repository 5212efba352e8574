//! A guest that writes into everything all the time, as another process does.

use std::collections::HashSet;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmring_core::guest::{GuestMapping, GuestMemory, GuestRegion};
use vmring_virtio::queue::{
    AddressSpace, Queue, QueueFeatures, QueueLayout, QueueState, SEGMENTS_MAX,
};

use crate::support::{Dice, guarded, scaled};

const LEN: usize = 0x8000;
const SIZE: u32 = 16;

/// Where the rings are. The descriptor table is at 0.
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;

/// Memory that a child process shares.
struct Shared(NonNull<u8>);

impl Shared {
    fn new() -> Self {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), LEN, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self(NonNull::new(start.cast()).expect("the kernel maps nothing at 0"))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: `new` mapped these bytes, and this value alone owns the mapping.
        unsafe { libc::munmap(self.0.as_ptr().cast(), LEN) };
    }
}

// SAFETY: the mapping belongs to no thread.
unsafe impl Send for Shared {}
// SAFETY: a shared value gives away the address and the length only.
unsafe impl Sync for Shared {}
// SAFETY: the bytes are mapped at a fixed address before `drop` unmaps them, and there is no reference
// to them.
unsafe impl GuestMapping for Shared {
    fn start(&self) -> NonNull<u8> {
        self.0
    }

    fn len(&self) -> usize {
        LEN
    }
}

/// A process that writes into the memory until it is dropped, or for two minutes.
struct Guest(libc::pid_t);

impl Guest {
    fn start(memory: &Shared) -> Self {
        let words = memory.0.cast::<AtomicU32>().as_ptr();
        // SAFETY: the child calls `alarm` only, which may be called after a fork, and allocates
        // nothing.
        let pid = unsafe { libc::fork() };
        assert_ne!(pid, -1, "{}", std::io::Error::last_os_error());
        if pid > 0 {
            return Self(pid);
        }
        // SAFETY: it has no memory of ours as an argument. Its signal ends the child, if the parent
        // was killed.
        unsafe { libc::alarm(120) };
        let mut dice = Dice::new(7);
        loop {
            // Mostly the queue itself.
            let reach = if dice.below(4) == 0 { LEN as u64 } else { 0x400 };
            let mut at = dice.below(reach / 4) * 4;
            // SAFETY: the word is in the mapping, which is aligned to a page. Both processes access
            // it at any time, as an atomic allows.
            let word = |at: u64| unsafe { &*words.add(at as usize / 4) };
            let size = u64::from(SIZE);
            let value = match at {
                _ if dice.below(16) == 0 => {
                    // An index that a driver may have reached, or nearly.
                    at = AVAILABLE;
                    let used = word(USED).load(Ordering::Relaxed) >> 16;
                    used.wrapping_add(dice.below(size + 2) as u32) << 16 | dice.below(2) as u32
                }
                AVAILABLE..USED => (dice.below(size + 2) << 16 | dice.below(size + 2)) as u32,
                _ if dice.below(32) == 0 => dice.below(1 << 32) as u32,
                // The four words of a descriptor: its address, length, flags and next.
                _ => match at / 4 % 4 {
                    0 => dice.below(LEN as u64) as u32 & !(dice.below(32) as u32),
                    1 => 0,
                    2 => dice.below(size) as u32 * 16,
                    _ => (dice.below(size + 2) << 16 | dice.below(8)) as u32,
                },
            };
            word(at).store(value.to_le(), Ordering::Relaxed);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: neither call has memory of ours as an argument, as the status is not asked for. The
        // child is ours and was not waited for, so the number is still its own.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn a_guest_that_writes_everywhere_gets_nowhere() {
    guarded("a queue in memory that another process writes", || {
        let shared = Arc::new(Shared::new());
        let _guest = Guest::start(&shared);
        // Two adjacent regions, and a hole behind them.
        let half = LEN as u64 / 2;
        let region = |at| GuestRegion::part(at, shared.clone(), at, half).expect("it is inside");
        let memory = GuestMemory::new([region(0), region(half)]).expect("two regions");
        let layout = QueueLayout {
            size: SIZE,
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
            addresses: AddressSpace::Guest,
            used_log: None,
        };
        let mut dice = Dice::new(3);
        let mut queue: Option<Queue> = None;
        let (mut whole, mut broken, mut restarts) = (0, 0, 0);
        let mut reasons = HashSet::new();
        let enough = scaled(50_000);
        while whole < enough || broken < enough || restarts < 20 || reasons.len() < 8 {
            let live = queue.get_or_insert_with(|| {
                // It goes on behind what the guest's used ring says, as after a restart.
                let used = memory.slice(USED + 2, 2).and_then(|bytes| bytes.read());
                let next = u16::from_le_bytes(used.expect("it is in memory"));
                let features = QueueFeatures {
                    event_idx: dice.below(2) == 0,
                    indirect: dice.below(4) != 0,
                    in_order: dice.below(2) == 0,
                };
                let state = QueueState { next_available: next, next_used: next };
                restarts += 1;
                Queue::new(memory.clone(), layout, features, state).expect("the layout is valid")
            });
            let Ok(count) = live.fetch(SIZE as u16) else {
                assert!(live.fetch(1).is_err() && live.pop().is_none());
                queue = None;
                std::thread::yield_now();
                continue;
            };
            assert!(u32::from(count) <= SIZE);
            if count == 0 {
                // The guest's driver goes on too, so that the test does not wait for the scheduler.
                let next = live.state().next_available.wrapping_add(SIZE as u16);
                let index = memory.slice(AVAILABLE + 2, 2).and_then(|bytes| bytes.atomic_u16(0));
                index.expect("it is aligned").store(next.to_le(), Ordering::Relaxed);
            }
            for _ in 0..count {
                let chain = match live.pop().expect("it was fetched") {
                    Ok(chain) => chain,
                    Err(error) => {
                        reasons.insert(std::mem::discriminant(&error));
                        broken += 1;
                        continue;
                    }
                };
                whole += 1;
                assert!(chain.readable().len() + chain.writable().len() <= SEGMENTS_MAX);
                let mut len = 0;
                for segment in chain.readable().chain(chain.writable()) {
                    let end = segment.guest_address() + u64::from(segment.len());
                    assert!(!segment.is_empty() && end <= LEN as u64);
                    len += u64::from(segment.len());
                }
                assert_eq!(len, chain.readable_len() + chain.writable_len());
                // The device writes where the guest lets it, which may be the queue itself.
                for segment in chain.writable() {
                    segment.copy_from(&[whole as u8; 9]);
                }
                if dice.below(4) == 0 {
                    live.push(0);
                }
            }
            if dice.below(4) == 0 {
                live.unpop(live.outstanding());
            }
            (0..live.outstanding()).for_each(|_| live.push(0));
            live.flush();
            let _ = live.needs_interrupt();
            let _ = live.enable_notifications();
        }
    });
}
