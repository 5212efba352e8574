//! A Blocks runtime: the four functions and the two classes that compiled blocks refer to, on the
//! layout of Clang's "Block Implementation Specification".

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use crate::objects::{self, Kind, Life, violation};

/// A block, as the specification lays it out; what it captured follows.
#[repr(C)]
pub(crate) struct Block {
    isa: *const c_void,
    /// The low 16 bits count references to a block on the heap.
    flags: AtomicI32,
    reserved: c_int,
    invoke: *const c_void,
    descriptor: *const Descriptor,
}

#[repr(C)]
struct Descriptor {
    reserved: c_ulong,
    size: c_ulong,
    /// There if `HAS_COPY_DISPOSE`.
    copy: unsafe extern "C" fn(*mut c_void, *const c_void),
    dispose: unsafe extern "C" fn(*const c_void),
}

/// How long a block takes to return, where nobody has a reference but who gave it: long enough that
/// one who lets go as soon as he hears from it is found out.
const LAST_STEPS: Duration = Duration::from_millis(2);

const REFERENCES: i32 = 0xffff;
const NEEDS_FREE: i32 = 1 << 24;
const HAS_COPY_DISPOSE: i32 = 1 << 25;
const IS_GLOBAL: i32 = 1 << 28;

/// A class: only its address is of interest.
#[repr(C)]
pub(crate) struct Class([usize; 32]);

#[unsafe(no_mangle)]
pub(crate) static _NSConcreteStackBlock: Class = Class([0; 32]);
#[unsafe(no_mangle)]
pub(crate) static _NSConcreteGlobalBlock: Class = Class([0; 32]);
static MALLOC_BLOCK: Class = Class([0; 32]);

impl Block {
    /// # Safety
    ///
    /// `block` points at a block.
    unsafe fn layout(block: *const Block) -> Layout {
        // SAFETY: as the caller says; the compiler made the descriptor.
        let size = unsafe { (*(*block).descriptor).size } as usize;
        Layout::from_size_align(size, 16).expect("a block's size")
    }
}

/// # Safety
///
/// `block` is null or a block.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _Block_copy(block: *const c_void) -> *mut c_void {
    let from = block.cast::<Block>();
    if from.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: as the caller says.
    let flags = unsafe { (*from).flags.load(Ordering::Relaxed) };
    if flags & IS_GLOBAL != 0 {
        return from.cast_mut().cast();
    }
    if flags & NEEDS_FREE != 0 {
        objects::expect_live(from, Kind::Block, "_Block_copy");
        // SAFETY: alive, as just seen, so it is a block of the heap. Relaxed: who copies has a
        // reference already.
        unsafe { (*from).flags.fetch_add(1, Ordering::Relaxed) };
        return from.cast_mut().cast();
    }
    // SAFETY: a block of the stack.
    let layout = unsafe { Block::layout(from) };
    // SAFETY: the size of a block is not zero.
    let to = unsafe { alloc(layout) }.cast::<Block>();
    if to.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: both have the descriptor's size and are apart; the fields set are the new block's own.
    unsafe {
        ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), layout.size());
        (*to).isa = (&raw const MALLOC_BLOCK).cast();
        (*to).flags = AtomicI32::new(flags & !REFERENCES | NEEDS_FREE | 1);
        if flags & HAS_COPY_DISPOSE != 0 {
            ((*(*to).descriptor).copy)(to.cast(), from.cast());
        }
    }
    objects::register(to, Kind::Block, Box::new(Memory(to, layout)));
    to.cast()
}

/// # Safety
///
/// `block` is null or a block, and the caller has a reference to give up if it is on the heap.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _Block_release(block: *const c_void) {
    let block = block.cast::<Block>().cast_mut();
    if block.is_null() {
        return;
    }
    // SAFETY: as the caller says. One that is gone can still be read for some time, and is told below;
    // later AddressSanitizer tells.
    let flags = unsafe { (*block).flags.load(Ordering::Relaxed) };
    if flags & IS_GLOBAL != 0 || flags & NEEDS_FREE == 0 {
        return;
    }
    objects::expect_live(block, Kind::Block, "_Block_release");
    // SAFETY: it lives. AcqRel: the last release comes after the others' uses.
    let before = unsafe { (*block).flags.fetch_sub(1, Ordering::AcqRel) };
    if before & REFERENCES != 1 {
        return;
    }
    if objects::is_running(block) {
        violation("_Block_release: the last reference to a block that still runs");
    }
    // Freed some time after its end: what is done with it until then is told for certain.
    let retired = objects::unregister(block);
    if flags & HAS_COPY_DISPOSE != 0 {
        // SAFETY: that was the last reference, and the memory is still there.
        unsafe { ((*(*block).descriptor).dispose)(block.cast()) }
    }
    drop(retired);
}

/// A block's memory, from `_Block_copy`.
struct Memory(*mut Block, Layout);

// SAFETY: nobody uses it any more when it is dropped, on whichever thread.
unsafe impl Send for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: of this layout, and dropped once, after the block's end.
        unsafe { dealloc(self.0.cast(), self.1) }
    }
}

/// Only for blocks that capture blocks or objects, which Rust's do not.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn _Block_object_assign(_: *mut c_void, _: *const c_void, _: c_int) {
    violation("_Block_object_assign: a block that captures a block is not simulated");
}

/// As [`_Block_object_assign`].
#[unsafe(no_mangle)]
pub(crate) extern "C" fn _Block_object_dispose(_: *const c_void, _: c_int) {
    violation("_Block_object_dispose: a block that captures a block is not simulated");
}

/// A block that vmnet was given: with a reference of its own, as vmnet is expected to take, or
/// without one, since that is nowhere promised.
pub(crate) struct GivenBlock {
    block: *mut Block,
    /// `None`: one that is never freed.
    life: Option<Life>,
    role: &'static str,
    copied: bool,
}

// SAFETY: a block is called and released from any thread, as vmnet does; its owner made it for that.
unsafe impl Send for GivenBlock {}
// SAFETY: as above.
unsafe impl Sync for GivenBlock {}

impl GivenBlock {
    /// # Safety
    ///
    /// `block` is a block, or nothing that lives, which is told.
    pub(crate) unsafe fn new(block: *const c_void, role: &'static str, copies: bool) -> Self {
        if block.is_null() {
            violation(&format!("{role}: a block is expected and it is null"));
        }
        let from = block.cast::<Block>();
        let known = |block: *mut Block| Some(objects::expect_live(block, Kind::Block, role));
        if copies {
            // SAFETY: as the caller says.
            let copy = unsafe { _Block_copy(block) }.cast::<Block>();
            let global = ptr::eq(copy, from)
                // SAFETY: it was a block a moment ago, and global ones never go.
                && unsafe { (*copy).flags.load(Ordering::Relaxed) } & IS_GLOBAL != 0;
            let life = if global { None } else { known(copy) };
            return Self { block: copy, life, role, copied: true };
        }
        let life = known(from.cast_mut());
        Self { block: from.cast_mut(), life, role, copied: false }
    }

    pub(crate) fn life(&self) -> Option<Life> {
        self.life
    }

    /// Calls `call` with the function to call, whose first argument is the block.
    fn invoke(&self, call: impl FnOnce(*const c_void)) {
        if let Some(life) = self.life {
            life.check(self.role);
        }
        let borrowed = self.life.filter(|_| !self.copied).map(Life::mark_running);
        // SAFETY: it lives, as just seen.
        call(unsafe { (*self.block).invoke });
        if borrowed.is_some() {
            // What it said has been heard by now; but it has not returned.
            thread::sleep(LAST_STEPS);
        }
    }

    pub(crate) fn call_status(&self, status: u32) {
        // SAFETY: a block of this place has this type (vmnet.h), and Rust's type of the declaration
        // said so.
        self.invoke(|invoke| unsafe {
            let invoke: extern "C" fn(*mut Block, u32) = std::mem::transmute(invoke);
            invoke(self.block, status);
        });
    }

    pub(crate) fn call_status_object(&self, status: u32, object: *mut c_void) {
        // SAFETY: as in `call_status`.
        self.invoke(|invoke| unsafe {
            let invoke: extern "C" fn(*mut Block, u32, *mut c_void) = std::mem::transmute(invoke);
            invoke(self.block, status, object);
        });
    }

    pub(crate) fn call_object(&self, object: *mut c_void) {
        // SAFETY: as in `call_status`.
        self.invoke(|invoke| unsafe {
            let invoke: extern "C" fn(*mut Block, *mut c_void) = std::mem::transmute(invoke);
            invoke(self.block, object);
        });
    }
}

impl Drop for GivenBlock {
    fn drop(&mut self) {
        if self.copied {
            // SAFETY: our reference, from `_Block_copy`.
            unsafe { _Block_release(self.block.cast()) }
        }
    }
}
