//! The vmnet driver's own cost: a ring over a simulated vmnet whose calls cost nothing, compared
//! with loops that call the C ABI themselves.
//!
//! * `ring`: frames reaped and submitted again, a batch at a time; ownership, completions and
//!   counters included.
//! * `bare`: what every caller of the ABI has to do for a batch: set each descriptor, call, look at
//!   each length.
//! * `bare-single`: the same, one packet to a call, as Lwt_vmnet and QEMU write.
//!
//! Each runs with calls that cost nothing and with calls of 300 ns, about the cost of a system
//! call. On macOS there is no simulator, so nothing runs.

#[cfg(target_os = "macos")]
fn main() {}

#[cfg(not(target_os = "macos"))]
fn main() {
    imp::main();
}

#[cfg(not(target_os = "macos"))]
mod imp {
    use std::ffi::{c_char, c_int, c_void};
    use std::ptr;
    use std::sync::mpsc::sync_channel;
    use std::time::{Duration, Instant};

    use block2::{DynBlock, RcBlock};
    use criterion::measurement::WallTime;
    use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
    use dispatch2::DispatchQueue;
    use libc::iovec;
    use vmnet_sim::World;
    use vmring::{Direction, Drive, Interface, Ring, Vmnet};

    const BATCHES: [usize; 3] = [1, 32, 128];
    /// Bytes of a packet.
    const LEN: usize = 60;
    /// Bytes of a buffer.
    const ROOM: usize = 2048;
    const SUCCESS: u32 = 1000;

    #[repr(C)]
    struct Descriptor {
        vm_pkt_size: usize,
        vm_pkt_iov: *mut iovec,
        vm_pkt_iovcnt: u32,
        vm_flags: u32,
    }

    type Transfer = unsafe extern "C" fn(*mut c_void, *mut Descriptor, *mut c_int) -> u32;

    unsafe extern "C" {
        static vmnet_operation_mode_key: *const c_char;
        static vmnet_interface_id_key: *const c_char;

        fn vmnet_start_interface(
            description: *mut c_void,
            queue: &DispatchQueue,
            handler: &DynBlock<dyn Fn(u32, *mut c_void)>,
        ) -> *mut c_void;
        fn vmnet_stop_interface(
            interface: *mut c_void,
            queue: &DispatchQueue,
            handler: &DynBlock<dyn Fn(u32)>,
        ) -> u32;
        fn vmnet_read(interface: *mut c_void, packets: *mut Descriptor, count: *mut c_int) -> u32;
        fn vmnet_write(interface: *mut c_void, packets: *mut Descriptor, count: *mut c_int) -> u32;
        fn xpc_dictionary_create(
            keys: *const *const c_char,
            values: *const *mut c_void,
            count: usize,
        ) -> *mut c_void;
        fn xpc_dictionary_set_uint64(object: *mut c_void, key: *const c_char, value: u64);
        fn xpc_dictionary_set_uuid(object: *mut c_void, key: *const c_char, value: *const [u8; 16]);
        fn xpc_release(object: *mut c_void);
    }

    /// A world with an interface identity whose calls take `cost` and do nothing else.
    fn world(cost: Duration) -> (World, [u8; 16]) {
        let world = World::new();
        let id = world.interface_id();
        world.script(id, |script| {
            script.free_of_charge = Some(LEN);
            script.call_cost = cost;
        });
        (world, id)
    }

    /// An interface as a C program would have it.
    struct Bare {
        interface: *mut c_void,
        queue: dispatch2::DispatchRetained<DispatchQueue>,
        buffers: Vec<[u8; ROOM]>,
        iovecs: Vec<iovec>,
        descriptors: Vec<Descriptor>,
        _world: World,
    }

    impl Bare {
        fn start(cost: Duration, batch: usize) -> Self {
            let (world, id) = world(cost);
            let queue = DispatchQueue::new("bench", None);
            let (answer, answers) = sync_channel(1);
            let handler = RcBlock::new(move |status: u32, _: *mut c_void| {
                answer.send(status).expect("it is waited for");
            });
            // SAFETY: the description, the queue and the block live until the handler has run, and the
            // keys are constants.
            let interface = unsafe {
                let description = xpc_dictionary_create(ptr::null(), ptr::null(), 0);
                xpc_dictionary_set_uint64(description, vmnet_operation_mode_key, 1001);
                xpc_dictionary_set_uuid(description, vmnet_interface_id_key, &id);
                let interface = vmnet_start_interface(description, &queue, &handler);
                xpc_release(description);
                interface
            };
            assert_eq!(answers.recv(), Ok(SUCCESS));
            Self {
                interface,
                queue,
                buffers: vec![[0; ROOM]; batch],
                iovecs: (0..batch)
                    .map(|_| iovec { iov_base: ptr::null_mut(), iov_len: 0 })
                    .collect(),
                descriptors: (0..batch)
                    .map(|_| Descriptor {
                        vm_pkt_size: 0,
                        vm_pkt_iov: ptr::null_mut(),
                        vm_pkt_iovcnt: 0,
                        vm_flags: 0,
                    })
                    .collect(),
                _world: world,
            }
        }

        /// Makes one call for all buffers, each with `len` bytes of space or of packet. Returns the
        /// number of packets.
        #[inline]
        fn turn(&mut self, transfer: Transfer, len: usize) -> u64 {
            let all = self.buffers.iter_mut().zip(&mut self.iovecs).zip(&mut self.descriptors);
            for ((buffer, iovec), descriptor) in all {
                iovec.iov_base = buffer.as_mut_ptr().cast();
                iovec.iov_len = len;
                descriptor.vm_pkt_size = len;
                descriptor.vm_pkt_iov = iovec;
                descriptor.vm_pkt_iovcnt = 1;
                descriptor.vm_flags = 0;
            }
            let mut count = self.descriptors.len() as c_int;
            // SAFETY: the interface runs. `count` is the number of descriptors, and they point to
            // buffers that `self` owns.
            let status =
                unsafe { transfer(self.interface, self.descriptors.as_mut_ptr(), &mut count) };
            assert_eq!(status, SUCCESS);
            for descriptor in &self.descriptors[..count as usize] {
                assert_eq!(descriptor.vm_pkt_size, LEN);
            }
            count as u64
        }
    }

    impl Drop for Bare {
        fn drop(&mut self) {
            let (answer, answers) = sync_channel(1);
            let handler =
                RcBlock::new(move |status: u32| answer.send(status).expect("it is waited for"));
            // SAFETY: the interface runs, only `self` has it, and the queue and the block outlive
            // the handler.
            let status = unsafe { vmnet_stop_interface(self.interface, &self.queue, &handler) };
            assert_eq!((status, answers.recv()), (SUCCESS, Ok(SUCCESS)));
        }
    }

    /// Starts an interface and a ring with `batch` frames in flight.
    struct Ours {
        ring: Ring,
        _interface: Interface,
        _world: World,
    }

    impl Ours {
        fn start(cost: Duration, batch: usize, direction: Direction) -> Self {
            let (world, id) = world(cost);
            let builder = Interface::builder().device(Vmnet::new()).interface_id(id);
            let interface = builder.start().expect("the simulator starts it");
            let builder = interface.ring(direction).drive(Drive::Inline);
            let mut ring = builder.depth(256).prefault(true).build().expect("a ring");
            for i in 0..batch as u64 {
                let mut frame = ring.alloc().expect("a fresh ring");
                if direction == Direction::Read {
                    ring.submit_read(frame, i).expect("a fresh ring");
                } else {
                    frame.copy_from(&[0x5a; LEN]).expect("it fits");
                    ring.submit_write(frame, i).expect("a fresh ring");
                }
            }
            Self { ring, _interface: interface, _world: world }
        }

        /// Reaps all completions and submits their frames again.
        #[inline]
        fn turn(&mut self, direction: Direction) -> u64 {
            let (mut sq, mut cq) = self.ring.split();
            let frames = cq.reap().map(|done| {
                let frame = done.take_packet().expect("the simulator takes and gives");
                assert_eq!(frame.len(), LEN);
                (frame, done.user_data)
            });
            let submitted = if direction == Direction::Read {
                sq.submit_reads(frames)
            } else {
                sq.submit_writes(frames)
            };
            submitted.expect("their credits just came back") as u64
        }
    }

    fn bench(
        group: &mut BenchmarkGroup<'_, WallTime>,
        name: &str,
        batch: usize,
        mut turn: impl FnMut() -> u64,
    ) {
        group.bench_function(BenchmarkId::new(name, batch), |b| {
            b.iter_custom(|packets| {
                let start = Instant::now();
                let mut seen = 0;
                while seen < packets {
                    seen += turn();
                }
                start.elapsed().mul_f64(packets as f64 / seen as f64)
            });
        });
    }

    pub(super) fn main() {
        let mut c = Criterion::default()
            .measurement_time(Duration::from_secs(1))
            .warm_up_time(Duration::from_millis(300))
            .sample_size(50)
            .configure_from_args();
        for (name, cost) in [("free", Duration::ZERO), ("300ns", Duration::from_nanos(300))] {
            for (way, direction, transfer, len) in [
                ("read", Direction::Read, vmnet_read as Transfer, ROOM),
                ("write", Direction::Write, vmnet_write as Transfer, LEN),
            ] {
                let mut group = c.benchmark_group(format!("vmnet/{name}/{way}"));
                group.throughput(Throughput::Elements(1));
                for batch in BATCHES {
                    let mut ours = Ours::start(cost, batch, direction);
                    bench(&mut group, "ring", batch, || ours.turn(direction));
                    let mut bare = Bare::start(cost, batch);
                    bench(&mut group, "bare", batch, || bare.turn(transfer, len));
                }
                let mut single = Bare::start(cost, 1);
                bench(&mut group, "bare-single", 1, || single.turn(transfer, len));
                group.finish();
            }
        }
        c.final_summary();
    }
}
