//! Each rule is broken once in a process of its own, which must be aborted with the sentence. The
//! same thing done right must not be.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use block2::RcBlock;
use libc::{in_addr, iovec};
use vmnet_sim::{Rules, StartHandler, Value, World};

use crate::abi::{self, Pointer};
use crate::support::*;

/// A test: its name, the sentence, the misuse, the correct use.
macro_rules! rule {
    ($name:ident, $sentence:literal, $misuse:expr, $correct:expr) => {
        #[test]
        fn $name() {
            aborts(concat!("strict::", stringify!($name)), $sentence, $misuse, $correct);
        }
    };
}

/// A world in which vmnet takes no references: what is released early is used after its end.
fn bare() -> World {
    World::with(Rules::Strict, false)
}

/// Starts with arguments that a test wants to be checked.
fn start(description: Pointer, queue: *const c_void, handler: *const c_void) -> Pointer {
    // SAFETY: the simulator aborts if one of them is not what it should be.
    unsafe { abi::vmnet_start_interface(description, queue, handler) }
}

fn release_block(block: *const c_void) {
    // SAFETY: the simulator aborts if it is not a live block.
    unsafe { abi::_Block_release(block) }
}

fn release_queue(queue: *const c_void) {
    // SAFETY: the simulator aborts if it is not a live queue.
    unsafe { abi::dispatch_release(queue) }
}

fn release_object(object: Pointer) {
    // SAFETY: the simulator aborts if it is not a live object.
    unsafe { abi::xpc_release(object) }
}

fn release_cf(object: Pointer) {
    // SAFETY: the simulator aborts if it is not a live object.
    unsafe { abi::CFRelease(object) }
}

fn dictionary() -> Pointer {
    // SAFETY: no keys and no values.
    unsafe { abi::xpc_dictionary_create(ptr::null(), ptr::null(), 0) }
}

fn array() -> Pointer {
    // SAFETY: it has no arguments.
    unsafe { abi::vmnet_copy_shared_interface_list() }
}

fn configuration() -> Pointer {
    // SAFETY: the status may be null.
    unsafe { abi::vmnet_network_configuration_create(SHARED_MODE as u32, ptr::null_mut()) }
}

fn number_at(dictionary: Pointer, key: abi::Key) -> u64 {
    // SAFETY: the simulator aborts if it is not a live dictionary.
    unsafe { abi::xpc_dictionary_get_uint64(dictionary, key) }
}

fn read(handle: Pointer, packets: *mut c_void, mut count: c_int) -> u32 {
    // SAFETY: the simulator aborts if something is wrong with them.
    unsafe { abi::vmnet_read(handle, packets.cast(), &mut count) }
}

fn write(handle: Pointer, packets: *mut c_void, mut count: c_int) -> u32 {
    // SAFETY: as in `read`.
    unsafe { abi::vmnet_write(handle, packets.cast(), &mut count) }
}

/// An interface in a world of its own, and a packet for it to write.
fn interface() -> (World, Interface, Vec<u8>) {
    let (world, _, interface) = one(|_| ());
    let packet = frame(BROADCAST, interface.mac(), 1, 60);
    (world, interface, packet)
}

/// Writes a packet that `spoil` has changed.
fn write_spoilt(spoil: impl FnOnce(&mut Packets)) -> (u32, usize) {
    let (_world, interface, packet) = interface();
    let mut packets = Packets::of(&[packet.clone(), packet]);
    spoil(&mut packets);
    packets.write(interface.handle)
}

/// Reads twice with the same descriptors, after `reset` in between.
fn read_twice(reset: impl FnOnce(&mut Packets)) {
    let (world, _, a) = one(|_| ());
    let (_, b) = another(&world);
    b.send(&frame(a.mac(), b.mac(), 1, 60));
    let mut rooms = Packets::rooms(1, 1514);
    assert_eq!(rooms.read(a.handle), (SUCCESS, 1));
    reset(&mut rooms);
    assert_eq!(rooms.read(a.handle), (SUCCESS, 0));
}

// The layout of a descriptor. A program with a wrong layout has numbers where the pointers belong.

/// The fields in another order.
#[repr(C)]
struct Reordered {
    vm_pkt_iov: *mut iovec,
    vm_pkt_iovcnt: u32,
    vm_flags: u32,
    vm_pkt_size: usize,
}

/// The size where the iovecs should be.
#[repr(C)]
struct SizeSecond {
    vm_pkt_iov: *mut iovec,
    vm_pkt_size: usize,
    vm_pkt_iovcnt: u32,
    vm_flags: u32,
}

/// The size as a `u32`, followed by the count.
#[repr(C)]
struct SizeOf32 {
    vm_pkt_size: u32,
    vm_pkt_iovcnt: u32,
    vm_pkt_iov: *mut iovec,
    vm_flags: u32,
}

/// The size as a `u32`, and garbage in the rest of its place.
#[repr(C)]
struct SizeOf32Padded {
    vm_pkt_size: u32,
    padding: u32,
    vm_pkt_iov: *mut iovec,
    vm_pkt_iovcnt: u32,
    vm_flags: u32,
}

/// Eight bytes too long.
#[repr(C)]
struct TooLong {
    right: abi::Descriptor,
    reserved: u64,
}

/// Writes two packets with descriptors of this layout.
fn write_laid_out<T>(of: impl Fn(*mut iovec, usize) -> T) -> u32 {
    let (_world, interface, packet) = interface();
    let mut packets = Packets::of(&[packet.clone(), packet]);
    let mut all: Vec<T> = packets.iovecs.iter_mut().map(|iovec| of(iovec, iovec.iov_len)).collect();
    write(interface.handle, all.as_mut_ptr().cast(), 2)
}

fn write_laid_out_right() {
    let right = |vm_pkt_iov, vm_pkt_size| abi::Descriptor {
        vm_pkt_size,
        vm_pkt_iov,
        vm_pkt_iovcnt: 1,
        vm_flags: 0,
    };
    assert_eq!(write_laid_out(right), SUCCESS);
}

rule!(
    a_descriptors_fields_are_in_vmnets_order,
    "vmnet_write: packet 0: vm_pkt_iov is no pointer to iovecs (is the layout right?)",
    || {
        write_laid_out(|vm_pkt_iov, vm_pkt_size| Reordered {
            vm_pkt_iov,
            vm_pkt_iovcnt: 1,
            vm_flags: 0,
            vm_pkt_size,
        });
    },
    write_laid_out_right
);

rule!(
    a_descriptors_size_comes_first,
    "vmnet_write: packet 0: vm_pkt_iov is no pointer to iovecs (is the layout right?)",
    || {
        write_laid_out(|vm_pkt_iov, vm_pkt_size| SizeSecond {
            vm_pkt_iov,
            vm_pkt_size,
            vm_pkt_iovcnt: 1,
            vm_flags: 0,
        });
    },
    write_laid_out_right
);

rule!(
    a_descriptors_count_comes_third,
    "vmnet_write: packet 0: vm_pkt_iovcnt is 0",
    || {
        write_laid_out(|vm_pkt_iov, vm_pkt_size| SizeOf32 {
            vm_pkt_size: vm_pkt_size as u32,
            vm_pkt_iovcnt: 1,
            vm_pkt_iov,
            vm_flags: 0,
        });
    },
    write_laid_out_right
);

rule!(
    a_descriptors_size_has_64_bits,
    "vmnet_write: packet 0: vm_pkt_size is 4294967356 and the iovecs have 60 bytes",
    || {
        write_laid_out(|vm_pkt_iov, vm_pkt_size| SizeOf32Padded {
            vm_pkt_size: vm_pkt_size as u32,
            padding: 1,
            vm_pkt_iov,
            vm_pkt_iovcnt: 1,
            vm_flags: 0,
        });
    },
    write_laid_out_right
);

rule!(
    a_descriptor_has_24_bytes,
    "vmnet_write: packet 1: vm_pkt_iov is no pointer to iovecs (is the layout right?)",
    || {
        write_laid_out(|vm_pkt_iov, vm_pkt_size| TooLong {
            right: abi::Descriptor { vm_pkt_size, vm_pkt_iov, vm_pkt_iovcnt: 1, vm_flags: 0 },
            reserved: 0,
        });
    },
    write_laid_out_right
);

/// An address whose memory was unmapped.
fn nowhere() -> Pointer {
    let (access, kind) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the page is ours, and nobody uses it.
    unsafe {
        let page = libc::mmap(ptr::null_mut(), 1, access, kind, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        assert_eq!(libc::munmap(page, 1), 0);
        page
    }
}

rule!(
    the_iovecs_are_where_memory_is,
    "vmnet_write: packet 0: vm_pkt_iov is no pointer to iovecs (is the layout right?)",
    || {
        write_spoilt(|packets| packets.descriptors[0].vm_pkt_iov = nowhere().cast());
    },
    || assert_eq!(write_spoilt(|_| ()), (SUCCESS, 2))
);

rule!(
    an_iov_base_is_not_null,
    "vmnet_write: packet 1: an iov_base is null",
    || {
        write_spoilt(|packets| packets.iovecs[1].iov_base = ptr::null_mut());
    },
    || assert_eq!(write_spoilt(|_| ()), (SUCCESS, 2))
);

rule!(
    a_packet_has_an_iovec,
    "vmnet_write: packet 1: vm_pkt_iovcnt is 0",
    || {
        write_spoilt(|packets| packets.descriptors[1].vm_pkt_iovcnt = 0);
    },
    || assert_eq!(write_spoilt(|_| ()), (SUCCESS, 2))
);

rule!(
    a_packets_size_is_that_of_its_iovecs,
    "vmnet_write: packet 1: vm_pkt_size is 60 and the iovecs have 1514 bytes",
    || {
        write_spoilt(|packets| packets.iovecs[1].iov_len = 1514);
    },
    || assert_eq!(write_spoilt(|_| ()), (SUCCESS, 2))
);

rule!(
    iovecs_of_all_there_is_are_no_packet,
    "vmnet_write: packet 0: vm_pkt_size is 60 and the iovecs have 18446744073709551615 bytes",
    || {
        write_spoilt(|packets| {
            packets.iovecs[0].iov_len = usize::MAX;
            packets.descriptors[0].vm_pkt_iov = packets.iovecs.as_mut_ptr();
            packets.descriptors[0].vm_pkt_iovcnt = 2;
        });
    },
    || {
        let (_world, interface, packet) = interface();
        let mut packets = Packets::of(&[packet.clone(), packet]);
        packets.descriptors.truncate(1);
        packets.descriptors[0].vm_pkt_iovcnt = 2;
        packets.descriptors[0].vm_pkt_size = 120;
        assert_eq!(packets.write(interface.handle), (SUCCESS, 1));
    }
);

rule!(
    a_writes_flags_are_zero,
    "vmnet_write: packet 0: vm_flags is 0x1: it was not reset",
    || {
        write_spoilt(|packets| packets.descriptors[0].vm_flags = 1);
    },
    || assert_eq!(write_spoilt(|_| ()), (SUCCESS, 2))
);

// Before every read all fields have to be reset.

rule!(
    the_flags_are_reset_before_a_read,
    "vmnet_read: packet 0: vm_flags is 0x5a5a: it was not reset",
    || {
        read_twice(|rooms| {
            rooms.descriptors[0].vm_pkt_size = 1514;
            rooms.iovecs[0].iov_len = 1514;
        });
    },
    || read_twice(Packets::reset)
);

rule!(
    the_iovecs_length_is_reset_before_a_read,
    "vmnet_read: packet 0: vm_pkt_size is 1514 and the iovecs have 60 bytes",
    || {
        read_twice(|rooms| {
            rooms.descriptors[0].vm_pkt_size = 1514;
            rooms.descriptors[0].vm_flags = 0;
        });
    },
    || read_twice(Packets::reset)
);

rule!(
    the_size_is_reset_before_a_read,
    "vmnet_read: packet 0: vm_pkt_size is 60 and the iovecs have 1514 bytes",
    || {
        read_twice(|rooms| {
            rooms.iovecs[0].iov_len = 1514;
            rooms.descriptors[0].vm_flags = 0;
        });
    },
    || read_twice(Packets::reset)
);

rule!(
    both_lengths_are_reset_before_a_read,
    "vmnet_read: a buffer of 60 bytes for up to 1514",
    || read_twice(|rooms| rooms.descriptors[0].vm_flags = 0),
    || read_twice(Packets::reset)
);

rule!(
    a_reads_buffer_takes_the_largest_packet,
    "vmnet_read: a buffer of 1513 bytes for up to 1514",
    || {
        let (_world, interface, _) = interface();
        Packets::rooms(1, 1513).read(interface.handle);
    },
    || {
        let (_world, interface, _) = interface();
        assert_eq!(Packets::rooms(1, 1514).read(interface.handle), (SUCCESS, 0));
        assert_eq!(Packets::rooms(1, 4096).read(interface.handle), (SUCCESS, 0));
    }
);

/// A read where the limit of 65,550 does not include the header.
fn read_large(size: usize) {
    let world = World::new();
    let description = Description::shared(world.interface_id())
        .with("enable_tso", Value::Bool(true))
        .with("enable_virtio_header", Value::Bool(true));
    let interface = Start::of(&description).interface();
    assert_eq!(Packets::rooms(1, size).read(interface.handle), (SUCCESS, 0));
}

rule!(
    a_reads_buffer_takes_the_largest_packet_and_its_header,
    "vmnet_read: a buffer of 65550 bytes for up to 65562",
    || read_large(65_550),
    || read_large(65_562)
);

// Counts.

rule!(
    a_read_is_no_longer_than_allowed,
    "vmnet_read: 257 packets where 256 are allowed",
    || {
        let (_world, interface, _) = interface();
        interface.read(257);
    },
    || {
        let (_world, interface, _) = interface();
        assert_eq!(interface.read(256).0, SUCCESS);
    }
);

/// If the parameters have no limit, the one in the documents applies. A limit may also be a single
/// packet.
fn write_batch(limit: Option<u32>, n: usize) {
    let (_world, _, interface) = one(|script| script.write_max_packets = limit);
    let packet = frame(BROADCAST, interface.mac(), 1, 60);
    assert_eq!(interface.write(&vec![packet; n]), (SUCCESS, n));
}

rule!(
    a_write_is_no_longer_than_allowed,
    "vmnet_write: 201 packets where 200 are allowed",
    || write_batch(None, 201),
    || write_batch(None, 200)
);

rule!(
    a_write_of_one_packet_may_be_all_that_is_allowed,
    "vmnet_write: 2 packets where 1 are allowed",
    || write_batch(Some(1), 2),
    || write_batch(Some(1), 1)
);

rule!(
    a_read_asks_for_a_packet,
    "vmnet_read: a count of 0",
    || {
        let (_world, interface, _) = interface();
        read(interface.handle, Packets::rooms(1, 1514).descriptors.as_mut_ptr().cast(), 0);
    },
    || {
        let (_world, interface, _) = interface();
        assert_eq!(interface.read(1).0, SUCCESS);
    }
);

rule!(
    a_write_has_a_packet,
    "vmnet_write: a count of -1",
    || {
        let (_world, interface, packet) = interface();
        write(interface.handle, Packets::of(&[packet]).descriptors.as_mut_ptr().cast(), -1);
    },
    || {
        let (_world, interface, packet) = interface();
        interface.send(&packet);
    }
);

rule!(
    a_read_has_packets,
    "vmnet_read: the packets and their count are pointers, and one is null",
    || {
        let (_world, interface, _) = interface();
        read(interface.handle, ptr::null_mut(), 1);
    },
    || assert_eq!(interface().1.read(1).0, SUCCESS)
);

rule!(
    a_write_has_packets,
    "vmnet_write: the packets and their count are pointers, and one is null",
    || {
        let (_world, interface, _) = interface();
        write(interface.handle, ptr::null_mut(), 1);
    },
    || assert_eq!(write_spoilt(|_| ()), (SUCCESS, 2))
);

// Calls at the same time.

/// The cost of a call that a misuse is to meet. The process is aborted long before it has passed.
const MEETS: Duration = Duration::from_secs(30);
/// The cost of a call beside which everything is right, whether it has ended or not.
const BESIDE: Duration = Duration::from_secs(1);

/// Starts a call that takes this long. `body` runs during the call.
fn beside_a_call(cost: Duration, writes: bool, body: impl FnOnce(&World, &Interface)) {
    let (world, _, interface) = one(|script| script.call_cost = cost);
    let handle = interface.handle as usize;
    let (begins, begun) = channel();
    let call = thread::spawn(move || {
        let handle = handle as Pointer;
        begins.send(()).expect("the test waits");
        if writes {
            Packets::of(&[frame(BROADCAST, [2; 6], 1, 60)]).write(handle)
        } else {
            Packets::rooms(1, 1514).read(handle)
        }
    });
    begun.recv_timeout(LONG).expect("the thread begins");
    // The simulator does not tell that it is inside the call.
    thread::sleep(BESIDE / 2);
    body(&world, &interface);
    assert_eq!(call.join().expect("a call").0, SUCCESS);
}

rule!(
    one_thread_reads_at_a_time,
    "two calls of vmnet_read at once",
    || beside_a_call(MEETS, false, |_, interface| assert_eq!(interface.read(1).0, SUCCESS)),
    || {
        beside_a_call(BESIDE, true, |_, interface| assert_eq!(interface.read(1).0, SUCCESS));
        // One after the other, from two threads.
        let (_world, interface, _) = interface();
        let handle = interface.handle as usize;
        for _ in 0..2 {
            let read = move || Packets::rooms(1, 1514).read(handle as Pointer).0;
            assert_eq!(thread::spawn(read).join().expect("a reader"), SUCCESS);
        }
    }
);

rule!(
    one_thread_writes_at_a_time,
    "two calls of vmnet_write at once",
    || {
        beside_a_call(MEETS, true, |_, interface| {
            interface.send(&frame(BROADCAST, interface.mac(), 1, 60));
        });
    },
    || {
        beside_a_call(BESIDE, false, |_, interface| {
            interface.send(&frame(BROADCAST, interface.mac(), 1, 60));
        });
    }
);

rule!(
    a_stop_waits_for_reads_and_writes,
    "vmnet_stop_interface: a read or a write is under way",
    || {
        beside_a_call(MEETS, false, |_, interface| {
            interface.stop();
        });
    },
    || {
        let (_world, interface, _) = interface();
        let handle = interface.handle as usize;
        let read = move || Packets::rooms(1, 1514).read(handle as Pointer).0;
        assert_eq!(thread::spawn(read).join().expect("a reader"), SUCCESS);
        assert_eq!(interface.stop(), SUCCESS);
    }
);

// After the stop.

/// Does something before a stop, which is correct, or after it, which is the misuse.
fn around_a_stop(act: impl Fn(&Interface)) {
    let (_world, interface, _) = interface();
    act(&interface);
    assert_eq!(interface.stop(), SUCCESS);
    act(&interface);
}

rule!(
    nobody_reads_after_the_stop,
    "vmnet_read after the stop",
    || around_a_stop(|interface| assert_eq!(interface.read(1).0, SUCCESS)),
    || around_a_stop(|_| ())
);

rule!(
    nobody_writes_after_the_stop,
    "vmnet_write after the stop",
    || around_a_stop(|interface| interface.send(&frame(BROADCAST, interface.mac(), 1, 60))),
    || around_a_stop(|_| ())
);

rule!(
    nobody_sets_events_after_the_stop,
    "vmnet_interface_set_event_callback on an interface that does not run",
    || around_a_stop(Interface::quiet),
    || around_a_stop(|_| ())
);

rule!(
    nobody_sets_events_before_the_starts_handler,
    "vmnet_interface_set_event_callback on an interface that does not run",
    || {
        let world = World::new();
        let id = world.interface_id();
        world.script(id, |script| script.start.handler = StartHandler::Never);
        Interface::new(Start::of(&Description::shared(id)), Parameters::new()).listen();
    },
    || interface().1.listen()
);

rule!(
    an_interface_is_stopped_once,
    "vmnet_stop_interface: a second time",
    || {
        let (_world, interface, _) = interface();
        interface.stop();
        interface.stop();
    },
    || assert_eq!(interface().1.stop(), SUCCESS)
);

// Handles.

rule!(
    a_handle_is_not_null,
    "vmnet_read: the interface is null",
    || {
        read(ptr::null_mut(), Packets::rooms(1, 1514).descriptors.as_mut_ptr().cast(), 1);
    },
    || assert_eq!(interface().1.read(1).0, SUCCESS)
);

rule!(
    a_stopped_handle_is_not_null,
    "vmnet_stop_interface: the interface is null",
    || {
        let (handler, _answers) = status_block();
        let to = new_queue();
        // SAFETY: null is not an interface, which the simulator detects.
        unsafe { abi::vmnet_stop_interface(ptr::null_mut(), queue(&to), block(&handler)) };
    },
    || assert_eq!(interface().1.stop(), SUCCESS)
);

// Events.

rule!(
    there_is_one_event,
    "vmnet_interface_set_event_callback: there is one event, 1",
    || {
        interface().1.set_callback(2, ptr::null(), ptr::null());
    },
    || assert_eq!(interface().1.set_callback(1, ptr::null(), ptr::null()), SUCCESS)
);

rule!(
    a_queue_comes_with_a_block,
    "vmnet_interface_set_event_callback: both the queue and the block, or none of them",
    || {
        let (_world, interface, _) = interface();
        interface.set_callback(1, queue(&interface.queue), ptr::null());
    },
    || interface().1.listen()
);

rule!(
    a_block_comes_with_a_queue,
    "vmnet_interface_set_event_callback: both the queue and the block, or none of them",
    || {
        let callback = RcBlock::new(|_: u32, _: Pointer| ());
        interface().1.set_callback(1, ptr::null(), block(&callback));
    },
    || interface().1.listen()
);

// Stops.

rule!(
    the_callback_is_taken_off_before_the_stop,
    "vmnet_stop_interface: the event callback is still set",
    || {
        let (_world, interface, _) = interface();
        interface.listen();
        let (handler, _answers) = status_block();
        interface.stop_with(queue(&new_queue()), block(&handler));
    },
    || {
        let (_world, interface, _) = interface();
        interface.listen();
        interface.quiet();
        assert_eq!(interface.stop(), SUCCESS);
    }
);

/// Stops an interface from a job, either of the queue that the handler is to run on or of another.
fn stop_from_a_job(of_the_handlers_queue: bool) {
    let (_world, interface, _) = interface();
    let (to, other) = (new_queue(), new_queue());
    let (handler, answers) = status_block();
    let (handle, handler) = (interface.handle as usize, handler);
    let arguments = (queue(&to) as usize, block(&handler) as usize);
    let job = move || {
        let (queue, handler) = (arguments.0 as *const c_void, arguments.1 as *const c_void);
        // SAFETY: a handle; queue and block live until the handler has run.
        unsafe { abi::vmnet_stop_interface(handle as Pointer, queue, handler) };
    };
    if of_the_handlers_queue {
        to.exec_async(job)
    } else {
        other.exec_async(job)
    }
    assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
}

rule!(
    a_stop_is_not_called_from_the_queue_of_its_handler,
    "vmnet_stop_interface: from a job of the queue that the handler is to run on",
    || stop_from_a_job(true),
    || stop_from_a_job(false)
);

/// Unsets the callback and stops, inside the callback or after it.
fn stop_around_an_event(inside: bool) {
    let (world, _, a) = one(|_| ());
    let (_, b) = another(&world);
    let to = new_queue();
    let (handler, answers) = status_block();
    let (handle, arguments) = (a.handle as usize, (queue(&to) as usize, block(&handler) as usize));
    let stop = move || {
        let handle = handle as Pointer;
        // SAFETY: a handle; queue and block live until the handler has run.
        unsafe {
            abi::vmnet_interface_set_event_callback(handle, 1, ptr::null(), ptr::null());
            abi::vmnet_stop_interface(handle, arguments.0 as Pointer, arguments.1 as Pointer);
        }
    };
    let (fired, events) = channel();
    let callback = RcBlock::new(move |_: u32, _: Pointer| {
        if inside {
            stop();
        }
        let _ = fired.send(());
    });
    assert_eq!(a.set_callback(1, queue(&a.queue), block(&callback)), SUCCESS);
    b.send(&frame(a.mac(), b.mac(), 1, 60));
    events.recv_timeout(LONG).expect("an event");
    if !inside {
        // The event has reported, but may not have returned yet.
        let (over, end) = channel();
        a.queue.exec_async(move || {
            let _ = over.send(());
        });
        end.recv_timeout(LONG).expect("the queue goes on");
        stop();
    }
    assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
}

rule!(
    a_stop_is_not_called_from_an_event,
    "vmnet_stop_interface: from a job of the queue that its events come on",
    || stop_around_an_event(true),
    || stop_around_an_event(false)
);

/// Blocks a queue, for ever or for a moment, and has a handler run on it.
fn on_a_busy_queue(stops: bool, blocked: bool) {
    let world = World::new();
    let id = world.interface_id();
    let patience = if blocked { Duration::from_millis(300) } else { LONG };
    world.script(id, |script| script.patience = patience);
    let to = new_queue();
    let (free, gate) = channel::<()>();
    let busy = || {
        to.exec_async(move || {
            let _ = gate.recv();
        })
    };
    let begin = Instant::now();
    let release = move || {
        let wait = if blocked { LONG } else { Duration::from_millis(20) };
        thread::sleep(wait.saturating_sub(begin.elapsed()));
        drop(free);
    };
    if stops {
        let interface = Start::of(&Description::shared(id)).interface();
        busy();
        let (handler, answers) = status_block();
        assert_eq!(interface.stop_with(queue(&to), block(&handler)), SUCCESS);
        release();
        assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
    } else {
        busy();
        let description = Description::shared(id);
        let (handler, answers) = start_block();
        start(description.as_ptr(), queue(&to), block(&handler));
        release();
        assert_eq!(answers.recv_timeout(LONG).expect("the handler").0, SUCCESS);
    }
}

rule!(
    a_stops_handler_does_not_wait_on_a_blocked_queue,
    "the stop's handler waits on a queue that is blocked",
    || on_a_busy_queue(true, true),
    || on_a_busy_queue(true, false)
);

rule!(
    a_starts_handler_does_not_wait_on_a_blocked_queue,
    "the start's handler waits on a queue that is blocked",
    || on_a_busy_queue(false, true),
    || on_a_busy_queue(false, false)
);

// Arguments that are null or something else.

/// Starts with the arguments as `change` has changed them.
fn start_with(change: impl FnOnce(&mut [*const c_void; 3])) {
    let world = World::new();
    let description = Description::shared(world.interface_id());
    let to = new_queue();
    let (handler, answers) = start_block();
    let mut arguments = [description.as_ptr().cast_const(), queue(&to), block(&handler)];
    change(&mut arguments);
    start(arguments[0].cast_mut(), arguments[1], arguments[2]);
    assert_eq!(answers.recv_timeout(LONG).expect("the handler").0, SUCCESS);
}

rule!(
    a_start_has_a_handler,
    "the start's handler: a block is expected and it is null",
    || start_with(|arguments| arguments[2] = ptr::null()),
    || start_with(|_| ())
);

rule!(
    a_start_has_a_queue,
    "the start's queue: a dispatch queue is expected and it is null",
    || start_with(|arguments| arguments[1] = ptr::null()),
    || start_with(|_| ())
);

rule!(
    a_start_has_a_description,
    "the interface's description: an XPC object is expected and it is null",
    || start_with(|arguments| arguments[0] = ptr::null()),
    || start_with(|_| ())
);

rule!(
    a_queue_is_no_description,
    "the interface's description: an XPC object is expected and a dispatch queue was given",
    || start_with(|arguments| arguments[0] = arguments[1]),
    || start_with(|_| ())
);

rule!(
    an_array_is_no_description,
    "the interface's description: a dictionary is expected",
    || start_with(|arguments| arguments[0] = array()),
    || start_with(|_| ())
);

rule!(
    a_stop_has_a_handler,
    "the stop's handler: a block is expected and it is null",
    || {
        interface().1.stop_with(queue(&new_queue()), ptr::null());
    },
    || assert_eq!(interface().1.stop(), SUCCESS)
);

rule!(
    a_stop_has_a_queue,
    "the stop's queue: a dispatch queue is expected and it is null",
    || {
        let (handler, _answers) = status_block();
        interface().1.stop_with(ptr::null(), block(&handler));
    },
    || assert_eq!(interface().1.stop(), SUCCESS)
);

// What a description says.

/// Starts with one more entry in the description.
fn start_saying(key: abi::Key, value: Value) {
    let world = World::new();
    let description = Description::shared(world.interface_id());
    description.set(key, value);
    assert_eq!(Start::of(&description).status(), SUCCESS);
}

rule!(
    a_key_is_one_of_vmnets,
    "the interface's description: there is no key 'vmnet_mtuu' that goes in",
    || start_saying(c"vmnet_mtuu".as_ptr(), Value::U64(1500)),
    || start_saying(key("mtu"), Value::U64(1500))
);

// As in a published binding, whose "mtu" vmnet never saw.
rule!(
    a_keys_text_is_read_from_its_variable,
    "the interface's description: there is no key 'mtu' that goes in",
    || start_saying(c"mtu".as_ptr(), Value::U64(1500)),
    || start_saying(key("mtu"), Value::U64(1500))
);

// This is Apple's text as others have seen it.
rule!(
    a_keys_text_is_nowhere_promised,
    "the interface's description: there is no key 'vmnet_mtu' that goes in",
    || start_saying(c"vmnet_mtu".as_ptr(), Value::U64(1500)),
    || start_saying(key("mtu"), Value::U64(1500))
);

rule!(
    a_parameters_key_does_not_go_in,
    "the interface's description: there is no key 'sim.max_packet_size' that goes in",
    || start_saying(key("max_packet_size"), Value::U64(1514)),
    || start_saying(key("mtu"), Value::U64(1500))
);

rule!(
    a_number_is_a_number,
    "the interface's description: the value of 'mtu' is of the wrong type",
    || start_saying(key("mtu"), text("1500")),
    || start_saying(key("mtu"), Value::U64(1500))
);

rule!(
    a_yes_is_a_yes,
    "the interface's description: the value of 'enable_tso' is of the wrong type",
    || start_saying(key("enable_tso"), Value::U64(1)),
    || start_saying(key("enable_tso"), Value::Bool(true))
);

rule!(
    an_identity_is_a_uuid,
    "the interface's description: the value of 'interface_id' is of the wrong type",
    || start_saying(key("interface_id"), text("01234567-89ab-cdef-0123-456789abcdef")),
    || start_saying(key("interface_id"), Value::Uuid([3; 16]))
);

rule!(
    a_description_has_a_mode,
    "the interface's description: it has no operation mode",
    || {
        Start::of(&Description::empty());
    },
    || {
        let world = World::new();
        assert_eq!(Start::of(&Description::shared(world.interface_id())).status(), SUCCESS);
    }
);

/// Starts on this version of macOS with a key that came with 15.4.
fn start_with_a_header_on(macos: (u32, u32)) {
    let world = World::new();
    world.set_host(|host| host.macos = macos);
    let description = Description::shared(world.interface_id());
    let description = description.with("enable_virtio_header", Value::Bool(true));
    assert_eq!(Start::of(&description).status(), SUCCESS);
}

rule!(
    a_key_is_not_newer_than_the_system,
    "vmnet_enable_virtio_header_key: macOS 15.3 does not have it, 15.4 does",
    || start_with_a_header_on((15, 3)),
    || start_with_a_header_on((15, 4))
);

fn configure_on(macos: (u32, u32)) {
    let world = World::new();
    world.set_host(|host| host.macos = macos);
    world.enter(|| release_cf(configuration()));
}

rule!(
    a_function_is_not_newer_than_the_system,
    "vmnet_network_configuration_create: macOS 15.5 does not have it, 26.0 does",
    || configure_on((15, 5)),
    || configure_on((26, 0))
);

/// Calls a function that came with macOS 12.
fn forward_on(macos: (u32, u32), call: fn(Pointer, *const c_void) -> u32) {
    let world = World::new();
    world.set_host(|host| host.macos = macos);
    let interface = Start::of(&Description::shared(world.interface_id())).interface();
    let (handler, answers) = status_block();
    assert_eq!(call(interface.handle, block(&handler)), SUCCESS);
    answers.recv_timeout(LONG).expect("the handler");
}

fn add_rule(interface: Pointer, handler: *const c_void) -> u32 {
    let inner = [0_u8; 16];
    let inner = inner.as_ptr().cast();
    // SAFETY: a handle, an address, and a block that lives until it has been called.
    unsafe {
        abi::vmnet_interface_add_ip_port_forwarding_rule(interface, 6, 80, 2, inner, 80, handler)
    }
}

fn remove_rule(interface: Pointer, handler: *const c_void) -> u32 {
    // SAFETY: as in `add_rule`.
    unsafe { abi::vmnet_interface_remove_ip_port_forwarding_rule(interface, 6, 80, 2, handler) }
}

fn list_rules_on(macos: (u32, u32)) {
    let world = World::new();
    world.set_host(|host| host.macos = macos);
    let interface = Start::of(&Description::shared(world.interface_id())).interface();
    let (told, rules) = channel();
    let handler = RcBlock::new(move |rules: Pointer| {
        let _ = told.send(rules.is_null());
    });
    // SAFETY: a handle, and a block that lives until it has been called.
    unsafe {
        abi::vmnet_interface_get_ip_port_forwarding_rules(interface.handle, 2, block(&handler))
    };
    assert_eq!(rules.recv_timeout(LONG), Ok(true));
}

rule!(
    adding_a_rule_is_not_newer_than_the_system,
    "vmnet_interface_add_ip_port_forwarding_rule: macOS 11.6 does not have it, 12.0 does",
    || forward_on((11, 6), add_rule),
    || forward_on((12, 0), add_rule)
);

rule!(
    removing_a_rule_is_not_newer_than_the_system,
    "vmnet_interface_remove_ip_port_forwarding_rule: macOS 11.6 does not have it, 12.0 does",
    || forward_on((11, 6), remove_rule),
    || forward_on((12, 0), remove_rule)
);

rule!(
    listing_rules_is_not_newer_than_the_system,
    "vmnet_interface_get_ip_port_forwarding_rules: macOS 11.6 does not have it, 12.0 does",
    || list_rules_on((11, 6)),
    || list_rules_on((12, 0))
);

/// Passes an object that is not a serialized network. A macOS that has the function refuses it.
fn take_over_on(macos: (u32, u32)) {
    let world = World::new();
    world.set_host(|host| host.macos = macos);
    let nothing = Description::empty();
    let mut status = 0;
    // SAFETY: an XPC object, and a status that is valid for writing.
    let network = world.enter(|| unsafe {
        abi::vmnet_network_create_with_serialization(nothing.as_ptr(), &mut status)
    });
    assert!(network.is_null());
    assert_eq!(status, INVALID_ARGUMENT);
}

rule!(
    taking_over_a_network_is_not_newer_than_the_system,
    "vmnet_network_create_with_serialization: macOS 15.5 does not have it, 26.0 does",
    || take_over_on((15, 5)),
    || take_over_on((26, 0))
);

// Released too early: in a world where vmnet takes no references of its own.

/// How late a handler is in the tests of what is released too early.
const LATE: Duration = Duration::from_millis(300);

/// Starts with a late handler. `early` is released before it, or after it.
fn start_letting_go(early: impl Fn(&mut Option<ObjectBlock>, &mut Option<Queue>)) {
    let first = Instant::now();
    loop {
        let world = bare();
        let id = world.interface_id();
        world.script(id, |script| script.start.handler = StartHandler::After(LATE));
        let description = Description::shared(id);
        let (handler, answers) = start_block();
        let (mut handler, mut to) = (Some(handler), Some(new_queue()));
        let began = Instant::now();
        start(
            description.as_ptr(),
            to.as_deref().map_or(ptr::null(), queue),
            handler.as_ref().map_or(ptr::null(), block),
        );
        // vmnet has read it, so it may be released.
        drop(description);
        early(&mut handler, &mut to);
        if let (Some(_), Some(to)) = (&handler, &to) {
            assert_eq!(answers.recv_timeout(LONG).expect("the handler").0, SUCCESS);
            // Its block is used until the handler has returned.
            return drain(to);
        }
        wait_for_use(first, began);
    }
}

/// Waits until the simulator aborts the process, because something was released before the handler of a
/// call that began then. Returns if the handler may have run before the release.
fn wait_for_use(first: Instant, began: Instant) {
    if began.elapsed() < LATE {
        thread::sleep(LONG);
    }
    assert!(first.elapsed() < LONG, "nothing is released before its handler runs");
}

type Queue = dispatch2::DispatchRetained<dispatch2::DispatchQueue>;

rule!(
    a_starts_handler_lives_until_it_has_run,
    "the start's handler: it was released too early",
    // The channel is kept, so that only the block is gone.
    || start_letting_go(|handler, _| *handler = None),
    || start_letting_go(|_, _| ())
);

rule!(
    a_starts_queue_lives_until_the_handler_has_run,
    "the start's queue: it was released too early",
    || start_letting_go(|_, queue| *queue = None),
    || start_letting_go(|_, _| ())
);

/// Stops with a late handler.
fn stop_letting_go(early: impl Fn(&mut Option<StatusBlock>, &mut Option<Queue>)) {
    let first = Instant::now();
    loop {
        let world = bare();
        let id = world.interface_id();
        world.script(id, |script| script.stop.handler = Some(LATE));
        let interface = Start::of(&Description::shared(id)).interface();
        let (handler, answers) = status_block();
        let (mut handler, mut to) = (Some(handler), Some(new_queue()));
        let began = Instant::now();
        let status = interface.stop_with(
            to.as_deref().map_or(ptr::null(), queue),
            handler.as_ref().map_or(ptr::null(), block),
        );
        assert_eq!(status, SUCCESS);
        early(&mut handler, &mut to);
        if let (Some(_), Some(to)) = (&handler, &to) {
            assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
            return drain(to);
        }
        wait_for_use(first, began);
    }
}

rule!(
    a_stops_handler_lives_until_it_has_run,
    "the stop's handler: it was released too early",
    || stop_letting_go(|handler, _| *handler = None),
    || stop_letting_go(|_, _| ())
);

rule!(
    a_stops_queue_lives_until_the_handler_has_run,
    "the stop's queue: it was released too early",
    || stop_letting_go(|_, queue| *queue = None),
    || stop_letting_go(|_, _| ())
);

/// Releases a stop's handler after it has returned, or while it certainly has not: the handler
/// reports and then waits until it may return.
fn stop_letting_go_on_its_word(waits: bool) {
    let world = bare();
    let interface = Start::of(&Description::shared(world.interface_id())).interface();
    let to = new_queue();
    let (answer, answers) = channel();
    let (returning, may_return) = channel::<()>();
    let handler = RcBlock::new(move |status: u32| {
        let _ = answer.send(status);
        let _ = may_return.recv_timeout(LONG);
    });
    assert_eq!(interface.stop_with(queue(&to), block(&handler)), SUCCESS);
    assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
    if waits {
        returning.send(()).expect("a handler that waits");
        drain(&to);
    }
    drop(handler);
}

rule!(
    a_handler_lives_until_it_has_returned,
    "_Block_release: the last reference to a block that still runs",
    || stop_letting_go_on_its_word(false),
    || stop_letting_go_on_its_word(true)
);

/// Sets a callback, releases what `early` says, and then has a packet arrive.
fn listen_letting_go(early: impl FnOnce(&mut Option<ObjectBlock>, &mut Option<Queue>)) {
    let world = bare();
    let a = Start::of(&Description::shared(world.interface_id())).interface();
    let (_, b) = another(&world);
    let (fired, events) = channel();
    let callback = RcBlock::new(move |_: u32, _: Pointer| {
        let _ = fired.send(());
    });
    let (mut callback, mut to) = (Some(callback), Some(new_queue()));
    let status = a.set_callback(
        1,
        to.as_deref().map_or(ptr::null(), queue),
        callback.as_ref().map_or(ptr::null(), block),
    );
    assert_eq!(status, SUCCESS);
    early(&mut callback, &mut to);
    b.send(&frame(a.mac(), b.mac(), 1, 60));
    if callback.is_none() {
        thread::sleep(LONG);
    }
    events.recv_timeout(LONG).expect("an event");
    a.quiet();
    drain(to.as_deref().expect("a queue"));
    drop(callback);
    assert_eq!(a.stop(), SUCCESS);
}

rule!(
    an_event_callback_lives_until_it_is_taken_off,
    "the event callback: it was released too early",
    || listen_letting_go(|callback, _| *callback = None),
    || listen_letting_go(|_, _| ())
);

rule!(
    an_events_queue_lives_until_the_callback_is_taken_off,
    "the events' queue: it was released too early",
    || listen_letting_go(|_, queue| *queue = None),
    || listen_letting_go(|_, _| ())
);

/// Before a callback that was unset is released, a job has to be waited for on its queue, because
/// an event may be on its way.
fn release_a_callback(waits: bool) {
    let world = bare();
    let a = Start::of(&Description::shared(world.interface_id())).interface();
    let (_, b) = another(&world);
    let callback = RcBlock::new(|_: u32, _: Pointer| ());
    assert_eq!(a.set_callback(1, queue(&a.queue), block(&callback)), SUCCESS);
    let (go, gate) = channel::<()>();
    a.queue.exec_async(move || {
        let _ = gate.recv();
    });
    b.send(&frame(a.mac(), b.mac(), 1, 60));
    assert_eq!(a.set_callback(1, ptr::null(), ptr::null()), SUCCESS);
    if waits {
        drop(go);
        drain(&a.queue);
        drop(callback);
    } else {
        drop(callback);
        drop(go);
        drain(&a.queue);
    }
    assert_eq!(a.stop(), SUCCESS);
}

rule!(
    an_event_that_is_on_the_queue_still_comes,
    "the event callback: it was released too early",
    || release_a_callback(false),
    || release_a_callback(true)
);

// Released once too often, or used after the last release.

/// A block on the heap with one reference, which is ours to give up.
fn a_block() -> *const c_void {
    RcBlock::into_raw(RcBlock::new(|_: u32| ())).cast::<c_void>()
}

fn a_queue() -> *const c_void {
    // SAFETY: a C string, and no attributes.
    unsafe { abi::dispatch_queue_create(c"test".as_ptr(), ptr::null()) }
}

rule!(
    a_block_is_released_once,
    "_Block_release: a block is expected, and nothing lives there (any more)",
    || {
        let block = a_block();
        release_block(block);
        release_block(block);
    },
    || {
        let block = a_block();
        // SAFETY: the block is alive.
        assert_eq!(unsafe { abi::_Block_copy(block) }.cast_const(), block);
        release_block(block);
        release_block(block);
    }
);

rule!(
    a_released_block_is_not_copied,
    "_Block_copy: a block is expected, and nothing lives there (any more)",
    || {
        let block = a_block();
        release_block(block);
        // SAFETY: the block is not alive, which the simulator detects.
        unsafe { abi::_Block_copy(block) };
    },
    || release_block(a_block())
);

rule!(
    a_released_block_is_no_handler,
    "_Block_copy: a block is expected, and nothing lives there (any more)",
    || {
        start_with(|arguments| {
            arguments[2] = a_block();
            release_block(arguments[2]);
        });
    },
    || start_with(|_| ())
);

rule!(
    a_queue_is_released_once,
    "dispatch_release: a dispatch queue is expected, and nothing lives there (any more)",
    || {
        let queue = a_queue();
        release_queue(queue);
        release_queue(queue);
    },
    || {
        let queue = a_queue();
        // SAFETY: the queue is alive.
        unsafe { abi::dispatch_retain(queue) };
        release_queue(queue);
        release_queue(queue);
    }
);

rule!(
    a_released_queue_is_not_retained,
    "dispatch_retain: a dispatch queue is expected, and nothing lives there (any more)",
    || {
        let queue = a_queue();
        release_queue(queue);
        // SAFETY: the queue is not alive, which the simulator detects.
        unsafe { abi::dispatch_retain(queue) };
    },
    || release_queue(a_queue())
);

rule!(
    a_released_queue_takes_no_job,
    "dispatch_async_f: a dispatch queue is expected, and nothing lives there (any more)",
    || {
        let queue = new_queue();
        release_queue(super::support::queue(&queue));
        queue.exec_async(|| ());
        std::mem::forget(queue);
    },
    || drain(&new_queue())
);

rule!(
    vmnets_queues_are_serial,
    "dispatch_queue_create: vmnet's queues are to be serial, with no attributes",
    || {
        let attributes = 1_u64;
        // SAFETY: the attributes are invalid, which the simulator detects.
        unsafe {
            abi::dispatch_queue_create(c"test".as_ptr(), ptr::from_ref(&attributes).cast());
        }
    },
    || release_queue(a_queue())
);

rule!(
    an_object_is_released_once,
    "xpc_release: an XPC object is expected, and nothing lives there (any more)",
    || {
        let object = dictionary();
        release_object(object);
        release_object(object);
    },
    || release_object(dictionary())
);

rule!(
    a_released_object_is_not_written_to,
    "xpc_dictionary_set_uint64: an XPC object is expected, and nothing lives there (any more)",
    || {
        let description = Description::empty();
        release_object(description.as_ptr());
        description.set(key("mtu"), Value::U64(1500));
    },
    || Description::empty().set(key("mtu"), Value::U64(1500))
);

rule!(
    a_released_description_starts_nothing,
    "the interface's description: an XPC object is expected, and nothing lives there (any more)",
    || start_with(|arguments| release_object(arguments[0].cast_mut())),
    || start_with(|_| ())
);

/// Reads the parameters in the handler, or after it. They are borrowed for the handler's call.
fn read_parameters(late: bool) {
    let world = World::new();
    let (told, parameters) = channel();
    let handler = RcBlock::new(move |_: u32, parameters: Pointer| {
        let now = if late { 1500 } else { number_at(parameters, key("mtu")) };
        let _ = told.send((parameters as usize, now));
    });
    let description = Description::shared(world.interface_id());
    let to = new_queue();
    start(description.as_ptr(), queue(&to), block(&handler));
    let (parameters, now) = parameters.recv_timeout(LONG).expect("the handler");
    drain(&to);
    let number = if late { number_at(parameters as Pointer, key("mtu")) } else { now };
    assert_eq!(number, 1500);
}

rule!(
    parameters_are_the_handlers_only,
    "xpc_dictionary_get_uint64: an XPC object is expected, and nothing lives there (any more)",
    || read_parameters(true),
    || read_parameters(false)
);

// XPC objects of the wrong kind.

rule!(
    an_array_has_no_keys_to_get,
    "xpc_dictionary_get_uint64: the object is no dictionary",
    || {
        number_at(array(), key("mtu"));
    },
    || {
        let object = dictionary();
        assert_eq!(number_at(object, key("mtu")), 0);
        release_object(object);
    }
);

rule!(
    an_array_has_no_keys_to_set,
    "xpc_dictionary_set_bool: the object is no dictionary",
    || {
        // SAFETY: an array, which the simulator detects.
        unsafe { abi::xpc_dictionary_set_bool(array(), key("enable_tso"), true) }
    },
    || Description::empty().set(key("enable_tso"), Value::Bool(true))
);

rule!(
    a_dictionary_has_no_elements,
    "xpc_array_get_count: the object is no array",
    || {
        // SAFETY: a dictionary, which the simulator detects.
        unsafe { abi::xpc_array_get_count(dictionary()) };
    },
    || {
        // SAFETY: an array, and a reference that is ours.
        unsafe {
            let array = array();
            assert_eq!(abi::xpc_array_get_count(array), 2);
            abi::xpc_release(array);
        }
    }
);

rule!(
    a_text_is_within_its_array,
    "xpc_array_get_string: the index is beyond the end",
    || {
        // SAFETY: an array, and an index that the simulator checks.
        unsafe { abi::xpc_array_get_string(array(), 2) };
    },
    || {
        // SAFETY: an array.
        assert!(unsafe { !abi::xpc_array_get_string(array(), 1).is_null() });
    }
);

rule!(
    an_element_is_within_its_array,
    "xpc_array_get_value: the index is beyond the end",
    || {
        // SAFETY: an array, and an index that the simulator checks.
        unsafe { abi::xpc_array_get_value(array(), 2) };
    },
    || {
        // SAFETY: an array.
        assert!(unsafe { !abi::xpc_array_get_value(array(), 1).is_null() });
    }
);

rule!(
    a_dictionary_is_made_empty,
    "xpc_dictionary_create: only empty ones are simulated",
    || {
        // SAFETY: the simulator aborts before anything is read.
        unsafe { abi::xpc_dictionary_create(ptr::null(), ptr::null(), 1) };
    },
    || release_object(dictionary())
);

rule!(
    a_block_captures_no_block,
    "_Block_object_assign: a block that captures a block is not simulated",
    || {
        // SAFETY: the simulator aborts before anything is read.
        unsafe { abi::_Block_object_assign(ptr::null_mut(), ptr::null(), 7) }
    },
    || release_block(a_block())
);

rule!(
    a_block_disposes_of_no_block,
    "_Block_object_dispose: a block that captures a block is not simulated",
    || {
        // SAFETY: the simulator aborts before anything is read.
        unsafe { abi::_Block_object_dispose(ptr::null(), 7) }
    },
    || release_block(a_block())
);

// Network objects.

rule!(
    a_configuration_is_released_once,
    "CFRelease: nothing lives there (any more)",
    || {
        let object = configuration();
        release_cf(object);
        release_cf(object);
    },
    || release_cf(configuration())
);

rule!(nothing_is_released_by_null, "CFRelease: null", || release_cf(ptr::null_mut()), || {
    release_cf(configuration())
});

rule!(
    an_xpc_object_is_released_by_its_own_function,
    "CFRelease: an XPC object is no object of CoreFoundation's",
    || release_cf(dictionary()),
    || release_object(dictionary())
);

/// Makes a network and releases it and its configuration.
fn make_a_network(between: impl FnOnce(Pointer)) {
    let from = configuration();
    between(from);
    // SAFETY: a configuration, or one that was released, which the simulator detects; the status
    // may be null.
    let network = unsafe { abi::vmnet_network_create(from, ptr::null_mut()) };
    release_cf(network);
    release_cf(from);
}

rule!(
    a_released_configuration_makes_nothing,
    "vmnet_network_create: a network configuration is expected, and nothing lives there (any more)",
    || make_a_network(release_cf),
    || make_a_network(|_| ())
);

rule!(
    a_configuration_is_no_network,
    "vmnet_network_get_ipv4_subnet: a network object is expected and a network configuration was given",
    || {
        let mut address = in_addr { s_addr: 0 };
        let to = &raw mut address;
        // SAFETY: a configuration, which the simulator detects.
        unsafe { abi::vmnet_network_get_ipv4_subnet(configuration(), to, to) }
    },
    || make_a_network(|_| ())
);

rule!(
    a_released_network_starts_nothing,
    "vmnet_interface_start_with_network: a network object is expected, and nothing lives there (any more)",
    || {
        // SAFETY: a configuration; the status may be null.
        let network = unsafe { abi::vmnet_network_create(configuration(), ptr::null_mut()) };
        release_cf(network);
        Start::on(Some(network), &Description::empty());
    },
    || {
        // SAFETY: a configuration; the status may be null.
        let network = unsafe { abi::vmnet_network_create(configuration(), ptr::null_mut()) };
        let start = Start::on(Some(network), &Description::empty());
        release_cf(network);
        assert_eq!(start.interface().stop(), SUCCESS);
    }
);

// Forwarding.

fn forward(interface: &Interface, family: u8, handler: *const c_void) -> u32 {
    let inner = [0_u8; 16];
    // SAFETY: a handle, and space for an address of either family.
    unsafe {
        abi::vmnet_interface_add_ip_port_forwarding_rule(
            interface.handle,
            6,
            80,
            family,
            inner.as_ptr().cast(),
            80,
            handler,
        )
    }
}

rule!(
    ipv6_is_darwins_30_and_not_linuxs_10,
    "an unknown address family",
    || {
        let (handler, _answers) = status_block();
        forward(&interface().1, libc::AF_INET6 as u8, block(&handler));
    },
    || {
        let (handler, answers) = status_block();
        assert_eq!(forward(&interface().1, 30, block(&handler)), SUCCESS);
        assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
    }
);

rule!(
    the_newer_forwarding_has_a_handler,
    "the forwarding's handler: a block is expected and it is null",
    || {
        forward(&interface().1, 30, ptr::null());
    },
    || {
        let (handler, answers) = status_block();
        assert_eq!(forward(&interface().1, 2, block(&handler)), SUCCESS);
        assert_eq!(answers.recv_timeout(LONG), Ok(SUCCESS));
    }
);

rule!(
    only_rules_have_a_rules_details,
    "the details of what is no forwarding rule",
    || {
        let (mut protocol, mut port) = (0, 0);
        let mut inner = [0_u8; 16];
        let to = &raw mut port;
        // SAFETY: a dictionary, which the simulator detects before anything is written.
        unsafe {
            abi::vmnet_ip_port_forwarding_rule_get_details(
                dictionary(),
                &mut protocol,
                to,
                2,
                inner.as_mut_ptr().cast(),
                to,
            );
        }
    },
    || list_rules_on((26, 0))
);
