//! A Blocks runtime: the four functions and the two classes that compiled blocks refer to. The
//! layout is that of Clang's "Block Implementation Specification".

use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use crate::objects::{self, Kind, Life, violation};

/// A block, as the specification lays it out. The captured variables follow it.
#[repr(C)]
pub(crate) struct Block {
    isa: *const c_void,
    /// The low 16 bits count the references to a block on the heap.
    flags: AtomicI32,
    reserved: c_int,
    invoke: *const c_void,
    descriptor: *const Descriptor,
}

#[repr(C)]
struct Descriptor {
    reserved: c_ulong,
    size: c_ulong,
    /// Present only if the flag `HAS_COPY_DISPOSE` is set.
    copy: unsafe extern "C" fn(*mut c_void, *const c_void),
    dispose: unsafe extern "C" fn(*const c_void),
}

/// How long a block takes to return where vmnet holds no reference of its own. It is long enough to
/// catch a caller that releases the block as soon as the block has reported.
const LAST_STEPS: Duration = Duration::from_millis(2);

const REFERENCES: i32 = 0xffff;
const NEEDS_FREE: i32 = 1 << 24;
const HAS_COPY_DISPOSE: i32 = 1 << 25;
const IS_GLOBAL: i32 = 1 << 28;

/// A class. Only its address matters.
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
    /// `block` must point at a block.
    unsafe fn layout(block: *const Block) -> Layout {
        // SAFETY: guaranteed by the caller; the compiler made the descriptor.
        let size = unsafe { (*(*block).descriptor).size } as usize;
        Layout::from_size_align(size, 16).expect("a block's size")
    }
}

/// # Safety
///
/// `block` must be null or point at a block. If it is a heap block that has been released, the
/// simulator aborts as long as the block's memory is retired (see `RetiredMemory`).
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _Block_copy(block: *const c_void) -> *mut c_void {
    let from = block.cast::<Block>();
    if from.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: guaranteed by the caller.
    let flags = unsafe { (*from).flags.load(Ordering::Relaxed) };
    if flags & IS_GLOBAL != 0 {
        return from.cast_mut().cast();
    }
    if flags & NEEDS_FREE != 0 {
        objects::expect_live(from, Kind::Block, "_Block_copy");
        // SAFETY: `expect_live` has just found a live heap block here. Relaxed: the caller already
        // holds a reference, so nothing has to be ordered.
        unsafe { (*from).flags.fetch_add(1, Ordering::Relaxed) };
        return from.cast_mut().cast();
    }
    // SAFETY: this is a block on the stack, whose descriptor the compiler made.
    let layout = unsafe { Block::layout(from) };
    // SAFETY: the size of a block is not zero.
    let to = unsafe { alloc(layout) }.cast::<Block>();
    if to.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: both blocks have the size that the descriptor says and do not overlap. The fields
    // that are set belong to the new block, which nobody else knows yet.
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
/// `block` must be null or point at a block. If it is on the heap, the caller gives up one
/// reference to it. The simulator aborts if the block has already been released, as long as its
/// memory is retired.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn _Block_release(block: *const c_void) {
    let block = block.cast::<Block>().cast_mut();
    if block.is_null() {
        return;
    }
    // SAFETY: guaranteed by the caller. A block that was released can still be read as long as its
    // memory is retired, and `expect_live` below reports it. After that only AddressSanitizer can.
    let flags = unsafe { (*block).flags.load(Ordering::Relaxed) };
    if flags & IS_GLOBAL != 0 || flags & NEEDS_FREE == 0 {
        return;
    }
    objects::expect_live(block, Kind::Block, "_Block_release");
    // SAFETY: `expect_live` has just found the block. AcqRel: pairs with itself, so that the last
    // release happens after every other owner's uses.
    let before = unsafe { (*block).flags.fetch_sub(1, Ordering::AcqRel) };
    if before & REFERENCES != 1 {
        return;
    }
    if objects::is_running(block) {
        violation("_Block_release: the last reference to a block that still runs");
    }
    // The memory is freed some time after the block's end. Until then a use of the block is
    // reported reliably.
    let retired = objects::unregister(block);
    if flags & HAS_COPY_DISPOSE != 0 {
        // SAFETY: that was the last reference, and the memory is still allocated: `retired` holds
        // it.
        unsafe { ((*(*block).descriptor).dispose)(block.cast()) }
    }
    drop(retired);
}

/// The memory of a block that `_Block_copy` made.
struct Memory(*mut Block, Layout);

// SAFETY: `RetiredMemory` drops this after the block's end, when nobody uses the block any more.
// The thread does not matter.
unsafe impl Send for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `_Block_copy` allocated it with this layout. It is dropped once, after the
        // block's end.
        unsafe { dealloc(self.0.cast(), self.1) }
    }
}

/// Called only for blocks that capture blocks or objects. Blocks made by Rust do not.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn _Block_object_assign(_: *mut c_void, _: *const c_void, _: c_int) {
    violation("_Block_object_assign: a block that captures a block is not simulated");
}

/// See [`_Block_object_assign`].
#[unsafe(no_mangle)]
pub(crate) extern "C" fn _Block_object_dispose(_: *const c_void, _: c_int) {
    violation("_Block_object_dispose: a block that captures a block is not simulated");
}

/// A block that vmnet was given. vmnet is expected to take a reference of its own; but no document
/// promises that, so the simulator can also do without one.
pub(crate) struct GivenBlock {
    block: *mut Block,
    /// `None` for a block that is never freed.
    life: Option<Life>,
    role: &'static str,
    copied: bool,
}

// SAFETY: vmnet calls and releases blocks from any thread, so the giver must have made the block
// for that.
unsafe impl Send for GivenBlock {}
// SAFETY: as for `Send`; and a shared reference gives access to nothing but the block's function.
unsafe impl Sync for GivenBlock {}

impl GivenBlock {
    /// # Safety
    ///
    /// `block` must be null or point at a block. The simulator aborts if it is null, or if it is a
    /// heap block that has been released.
    pub(crate) unsafe fn new(block: *const c_void, role: &'static str, copies: bool) -> Self {
        if block.is_null() {
            violation(&format!("{role}: a block is expected and it is null"));
        }
        let from = block.cast::<Block>();
        let known = |block: *mut Block| Some(objects::expect_live(block, Kind::Block, role));
        if copies {
            // SAFETY: guaranteed by the caller.
            let copy = unsafe { _Block_copy(block) }.cast::<Block>();
            let global = ptr::eq(copy, from)
                // SAFETY: `_Block_copy` has just read it, and global blocks are never freed.
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

    /// Calls `call` with the block's function. The first argument of that function is the block.
    fn invoke(&self, call: impl FnOnce(*const c_void)) {
        if let Some(life) = self.life {
            life.check(self.role);
        }
        let borrowed = self.life.filter(|_| !self.copied).map(Life::mark_running);
        // SAFETY: `life.check` has just found it alive, or it is global and never freed.
        call(unsafe { (*self.block).invoke });
        if borrowed.is_some() {
            // The block has reported by now, but it has not returned.
            thread::sleep(LAST_STEPS);
        }
    }

    pub(crate) fn call_status(&self, status: u32) {
        // SAFETY: vmnet.h gives the block in this place this type, and the Rust declaration of the
        // function requires it.
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
            // SAFETY: this is the reference that `_Block_copy` took for us.
            unsafe { _Block_release(self.block.cast()) }
        }
    }
}
