//! A Blocks runtime: the four functions and the two classes that compiled blocks refer to, on the
//! layout of Clang's "Block Implementation Specification".

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

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
        objects::alive(from, Kind::Block, "_Block_copy");
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
    objects::born(to, Kind::Block);
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
    // SAFETY: as the caller says. A block that is gone is told as far as its memory can still be
    // read; AddressSanitizer tells the rest.
    let flags = unsafe { (*block).flags.load(Ordering::Relaxed) };
    if flags & IS_GLOBAL != 0 || flags & NEEDS_FREE == 0 {
        return;
    }
    objects::alive(block, Kind::Block, "_Block_release");
    // SAFETY: it lives. AcqRel: the last release comes after the others' uses.
    let before = unsafe { (*block).flags.fetch_sub(1, Ordering::AcqRel) };
    if before & REFERENCES != 1 {
        return;
    }
    objects::died(block);
    // SAFETY: that was the last reference; the memory is of `_Block_copy`, of this layout.
    unsafe {
        if flags & HAS_COPY_DISPOSE != 0 {
            ((*(*block).descriptor).dispose)(block.cast());
        }
        dealloc(block.cast(), Block::layout(block));
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
pub(crate) struct Held {
    block: *mut Block,
    /// `None`: one that is never freed.
    life: Option<Life>,
    role: &'static str,
    copied: bool,
}

// SAFETY: a block is called and released from any thread, as vmnet does; its owner made it for that.
unsafe impl Send for Held {}
// SAFETY: as above.
unsafe impl Sync for Held {}

impl Held {
    /// # Safety
    ///
    /// `block` is a block, or nothing that lives, which is told.
    pub(crate) unsafe fn new(block: *const c_void, role: &'static str, copies: bool) -> Self {
        if block.is_null() {
            violation(&format!("{role}: a block is expected and it is null"));
        }
        let from = block.cast::<Block>();
        let known = |block: *mut Block| Some(objects::alive(block, Kind::Block, role));
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

    /// The function to call, with the block as its first argument.
    fn invoke(&self) -> *const c_void {
        if let Some(life) = self.life {
            life.check(self.role);
        }
        // SAFETY: it lives, as just seen.
        unsafe { (*self.block).invoke }
    }

    pub(crate) fn call_status(&self, status: u32) {
        let invoke = self.invoke();
        // SAFETY: a block of this place has this type (vmnet.h), and Rust's type of the declaration
        // said so.
        unsafe {
            let invoke: extern "C" fn(*mut Block, u32) = std::mem::transmute(invoke);
            invoke(self.block, status);
        }
    }

    pub(crate) fn call_status_object(&self, status: u32, object: *mut c_void) {
        let invoke = self.invoke();
        // SAFETY: as in `call_status`.
        unsafe {
            let invoke: extern "C" fn(*mut Block, u32, *mut c_void) = std::mem::transmute(invoke);
            invoke(self.block, status, object);
        }
    }

    pub(crate) fn call_object(&self, object: *mut c_void) {
        let invoke = self.invoke();
        // SAFETY: as in `call_status`.
        unsafe {
            let invoke: extern "C" fn(*mut Block, *mut c_void) = std::mem::transmute(invoke);
            invoke(self.block, object);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.copied {
            // SAFETY: our reference, from `_Block_copy`.
            unsafe { _Block_release(self.block.cast()) }
        }
    }
}
