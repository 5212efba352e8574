//! What the tests share: a watchdog, a child process for a misuse, and a small driver.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::env::{self, consts::ARCH};
use std::ffi::{CStr, CString, OsString, c_int, c_void};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use block2::{Block, RcBlock};
use dispatch2::{DispatchQueue, DispatchRetained};
use libc::iovec;
use vmnet_sim::{Script, Value, World};

use crate::abi::{self, Descriptor, Key, Pointer};

/// Far longer than any test needs on a slow and busy machine. A test that reaches it hangs.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// Long enough for everything that comes at once to have come.
pub(crate) const SOON: Duration = Duration::from_millis(60);

pub(crate) const SUCCESS: u32 = 1000;
pub(crate) const FAILURE: u32 = 1001;
pub(crate) const INVALID_ARGUMENT: u32 = 1003;
pub(crate) const SETUP_INCOMPLETE: u32 = 1004;
pub(crate) const PACKET_TOO_BIG: u32 = 1006;
pub(crate) const BUFFER_EXHAUSTED: u32 = 1007;
pub(crate) const TOO_MANY_PACKETS: u32 = 1008;

pub(crate) const HOST_MODE: u64 = 1000;
pub(crate) const SHARED_MODE: u64 = 1001;
pub(crate) const BRIDGED_MODE: u64 = 1002;

/// Runs `body` on a thread of its own, and fails if it does not end.
pub(crate) fn guarded(body: impl FnOnce() + Send + 'static) {
    let (ended, ending) = mpsc::sync_channel::<()>(1);
    let name = thread::current().name().unwrap_or("test").to_owned();
    let body = move || {
        body();
        drop(ended);
    };
    let thread = thread::Builder::new().name(name).spawn(body).expect("a thread");
    // The sender is dropped when the body returns, and when it panics.
    assert_ne!(ending.recv_timeout(LONG * 2), Err(RecvTimeoutError::Timeout), "it hangs");
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The environment variable with the test whose misuse a child process is to commit.
const MISUSE: &str = "VMNET_SIM_MISUSE";

/// Runs `misuse` in a process of its own, which must be aborted with `sentence`; then runs
/// `correct` here.
///
/// The process is this same program, which is told to run the one test. It comes here a second time
/// and commits the misuse.
pub(crate) fn aborts(
    test: &'static str,
    sentence: &str,
    misuse: impl FnOnce(),
    correct: impl FnOnce() + Send + 'static,
) {
    if env::var_os(MISUSE).is_some_and(|name| name == test) {
        misuse();
        // Threads of the simulator may still have to detect it.
        thread::sleep(Duration::from_secs(1));
        eprintln!("it was let pass");
        std::process::exit(0);
    }
    let mut command = myself();
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(MISUSE, test);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: between fork and exec there is only a system call.
    unsafe {
        command.pre_exec(|| {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // No core dump. If the call fails there is one.
            libc::setrlimit(libc::RLIMIT_CORE, &none);
            Ok(())
        });
    }
    let mut child = command.spawn().expect("this program once more");
    let mut pipe = child.stderr.take().expect("its standard error");
    let said = thread::spawn(move || {
        let mut said = String::new();
        pipe.read_to_string(&mut said).map(|_| said)
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if start.elapsed() > LONG {
            let _ = child.kill();
            panic!("the misuse hangs");
        }
        thread::sleep(Duration::from_millis(2));
    };
    let said = said.join().expect("a reader").expect("text");
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}: {said}");
    let sentence = format!("vmnet-sim: the caller broke a rule of vmnet: {sentence}");
    assert!(said.contains(&sentence), "expected '{sentence}', and it said: {said}");
    guarded(correct);
}

/// This program, under the emulator that cargo runs it with, if there is one.
fn myself() -> Command {
    let program = env::current_exe().expect("this program's path");
    let is_runner = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with(&format!("CARGO_TARGET_{}_", ARCH.to_uppercase()))
            && name.ends_with("_RUNNER")
    };
    let runner = env::vars_os().find(|(name, _)| is_runner(name));
    let Some((_, runner)) = runner else { return Command::new(program) };
    let runner = runner.into_string().expect("a runner's command line");
    let mut words = runner.split_whitespace();
    let mut command = Command::new(words.next().expect("a runner"));
    command.args(words).arg(program);
    command
}

/// The key with this name.
pub(crate) fn key(name: &str) -> Key {
    // SAFETY: constants of vmnet, which are set before the program runs.
    unsafe {
        match name {
            "operation_mode" => abi::vmnet_operation_mode_key,
            "interface_id" => abi::vmnet_interface_id_key,
            "mac_address" => abi::vmnet_mac_address_key,
            "allocate_mac_address" => abi::vmnet_allocate_mac_address_key,
            "mtu" => abi::vmnet_mtu_key,
            "max_packet_size" => abi::vmnet_max_packet_size_key,
            "start_address" => abi::vmnet_start_address_key,
            "end_address" => abi::vmnet_end_address_key,
            "subnet_mask" => abi::vmnet_subnet_mask_key,
            "shared_interface_name" => abi::vmnet_shared_interface_name_key,
            "nat66_prefix" => abi::vmnet_nat66_prefix_key,
            "network_identifier" => abi::vmnet_network_identifier_key,
            "host_ip_address" => abi::vmnet_host_ip_address_key,
            "host_subnet_mask" => abi::vmnet_host_subnet_mask_key,
            "enable_isolation" => abi::vmnet_enable_isolation_key,
            "enable_tso" => abi::vmnet_enable_tso_key,
            "enable_checksum_offload" => abi::vmnet_enable_checksum_offload_key,
            "enable_virtio_header" => abi::vmnet_enable_virtio_header_key,
            "read_max_packets" => abi::vmnet_read_max_packets_key,
            "write_max_packets" => abi::vmnet_write_max_packets_key,
            "estimated_packets_available" => abi::vmnet_estimated_packets_available_key,
            _ => panic!("a key that the tests do not know: {name}"),
        }
    }
}

pub(crate) fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

/// What a start is asked for.
pub(crate) struct Description(Pointer);

impl Description {
    pub(crate) fn empty() -> Self {
        // SAFETY: no keys and no values.
        Self(unsafe { abi::xpc_dictionary_create(ptr::null(), ptr::null(), 0) })
    }

    /// For an interface of this identity in shared mode.
    pub(crate) fn shared(id: [u8; 16]) -> Self {
        Self::empty().with("operation_mode", Value::U64(SHARED_MODE)).of(id)
    }

    pub(crate) fn of(self, id: [u8; 16]) -> Self {
        self.with("interface_id", Value::Uuid(id))
    }

    pub(crate) fn with(self, name: &str, value: Value) -> Self {
        self.set(key(name), value);
        self
    }

    pub(crate) fn set(&self, key: Key, value: Value) {
        // SAFETY: the dictionary is alive; key and value are of the types that the call requires.
        unsafe {
            match value {
                Value::U64(value) => abi::xpc_dictionary_set_uint64(self.0, key, value),
                Value::Bool(value) => abi::xpc_dictionary_set_bool(self.0, key, value),
                Value::Str(value) => {
                    let value = CString::new(value).expect("a text");
                    abi::xpc_dictionary_set_string(self.0, key, value.as_ptr());
                }
                Value::Uuid(value) => abi::xpc_dictionary_set_uuid(self.0, key, &value),
            }
        }
    }

    pub(crate) fn as_ptr(&self) -> Pointer {
        self.0
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: our reference.
        unsafe { abi::xpc_release(self.0) }
    }
}

/// The parameters that a start's handler gets, by the names of the keys.
pub(crate) type Parameters = BTreeMap<&'static str, Value>;

/// Copies a dictionary of vmnet's.
///
/// # Safety
///
/// `dictionary` must be alive.
unsafe fn copy_out(dictionary: Pointer) -> Parameters {
    let mut all = Parameters::new();
    // SAFETY: guaranteed by the caller, here and in the next two.
    let number = |name| unsafe { abi::xpc_dictionary_get_uint64(dictionary, key(name)) };
    for name in ["mtu", "max_packet_size", "read_max_packets", "write_max_packets"] {
        if number(name) != 0 {
            all.insert(name, Value::U64(number(name)));
        }
    }
    for name in ["mac_address", "start_address", "end_address", "subnet_mask", "nat66_prefix"] {
        // SAFETY: guaranteed by the caller; the text lives as long as the dictionary.
        unsafe {
            let value = abi::xpc_dictionary_get_string(dictionary, key(name));
            if !value.is_null() {
                all.insert(name, text(&CStr::from_ptr(value).to_string_lossy()));
            }
        }
    }
    // SAFETY: guaranteed by the caller; null, or the 16 bytes of a value in the dictionary.
    let id = unsafe { abi::xpc_dictionary_get_uuid(dictionary, key("interface_id")).as_ref() };
    if let Some(id) = id {
        all.insert("interface_id", Value::Uuid(*id));
    }
    all
}

/// `void (^)(vmnet_return_t, xpc_object_t)`.
pub(crate) type ObjectBlock = RcBlock<dyn Fn(u32, Pointer)>;
/// `void (^)(vmnet_return_t)`.
pub(crate) type StatusBlock = RcBlock<dyn Fn(u32)>;

/// A block as an argument.
pub(crate) fn block<F: ?Sized>(of: &RcBlock<F>) -> *const c_void {
    let pointer: *mut Block<F> = RcBlock::as_ptr(of);
    pointer.cast::<c_void>()
}

/// A queue as an argument.
pub(crate) fn queue(of: &DispatchQueue) -> *const c_void {
    ptr::from_ref(of).cast()
}

pub(crate) fn new_queue() -> DispatchRetained<DispatchQueue> {
    DispatchQueue::new("test", None)
}

/// Waits until the jobs that are on the queue now are done.
pub(crate) fn drain(queue: &DispatchQueue) {
    let (done, waiting) = channel::<()>();
    queue.exec_async(move || drop(done));
    assert_eq!(waiting.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected), "a blocked queue");
}

/// A block that reports what it was called with.
pub(crate) fn status_block() -> (StatusBlock, Receiver<u32>) {
    let (answer, answers) = channel();
    let handler = RcBlock::new(move |status: u32| {
        let _ = answer.send(status);
    });
    (handler, answers)
}

/// Like [`status_block`], with a copy of the dictionary.
pub(crate) fn start_block() -> (ObjectBlock, Receiver<(u32, Option<Parameters>)>) {
    let (answer, answers) = channel();
    let handler = RcBlock::new(move |status: u32, parameters: Pointer| {
        // SAFETY: it is not null, so it is a dictionary that lives during this call.
        let parameters = (!parameters.is_null()).then(|| unsafe { copy_out(parameters) });
        let _ = answer.send((status, parameters));
    });
    (handler, answers)
}

/// A start in progress.
pub(crate) struct Start {
    pub(crate) handle: Pointer,
    pub(crate) queue: DispatchRetained<DispatchQueue>,
    _handler: ObjectBlock,
    answers: Receiver<(u32, Option<Parameters>)>,
}

impl Start {
    pub(crate) fn of(description: &Description) -> Self {
        Self::on(None, description)
    }

    /// Starts on a network object, if one is given.
    pub(crate) fn on(network: Option<Pointer>, description: &Description) -> Self {
        let to = new_queue();
        let (handler, answers) = start_block();
        let (what, queue, block) = (description.as_ptr(), queue(&to), block(&handler));
        // SAFETY: all arguments live until the handler has run.
        let handle = unsafe {
            match network {
                Some(network) => {
                    abi::vmnet_interface_start_with_network(network, what, queue, block)
                }
                None => abi::vmnet_start_interface(what, queue, block),
            }
        };
        Self { handle, queue: to, _handler: handler, answers }
    }

    /// What the handler is called with next.
    pub(crate) fn answer(&self) -> (u32, Option<Parameters>) {
        let answer = self.answers.recv_timeout(LONG).expect("the start's handler");
        // It has reported, but may still run.
        drain(&self.queue);
        answer
    }

    /// What the handler is called with within this time.
    pub(crate) fn answer_within(&self, time: Duration) -> Option<(u32, Option<Parameters>)> {
        self.answers.recv_timeout(time).ok()
    }

    pub(crate) fn status(&self) -> u32 {
        self.answer().0
    }

    /// The interface. The start must have succeeded.
    pub(crate) fn interface(self) -> Interface {
        let (status, parameters) = self.answer();
        assert_eq!(status, SUCCESS);
        let parameters = parameters.unwrap_or_default();
        Interface::new(self, parameters)
    }
}

/// An interface in a world of its own, with this script.
pub(crate) fn one(change: impl FnOnce(&mut Script)) -> (World, [u8; 16], Interface) {
    let world = World::new();
    let id = world.interface_id();
    world.script(id, change);
    let interface = Start::of(&Description::shared(id)).interface();
    (world, id, interface)
}

/// Another interface in the same world, with which it exchanges frames.
pub(crate) fn another(world: &World) -> ([u8; 16], Interface) {
    let id = world.interface_id();
    (id, Start::of(&Description::shared(id)).interface())
}

/// A started interface.
pub(crate) struct Interface {
    pub(crate) handle: Pointer,
    pub(crate) queue: DispatchRetained<DispatchQueue>,
    pub(crate) parameters: Parameters,
    callback: RefCell<Option<ObjectBlock>>,
    /// The estimates of all events so far; 0 if there was none.
    pub(crate) events: Arc<Mutex<Vec<u64>>>,
}

impl Interface {
    pub(crate) fn new(start: Start, parameters: Parameters) -> Self {
        Self {
            handle: start.handle,
            queue: start.queue,
            parameters,
            callback: RefCell::default(),
            events: Arc::default(),
        }
    }

    pub(crate) fn number(&self, name: &str) -> u64 {
        match self.parameters.get(name) {
            Some(Value::U64(number)) => *number,
            other => panic!("{name}: {other:?}"),
        }
    }

    pub(crate) fn text(&self, name: &str) -> &str {
        match self.parameters.get(name) {
            Some(Value::Str(text)) => text,
            other => panic!("{name}: {other:?}"),
        }
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        let mut bytes = self.text("mac_address").split(':');
        std::array::from_fn(|_| {
            u8::from_str_radix(bytes.next().expect("six bytes"), 16).expect("hexadecimal")
        })
    }

    /// The longest packet, without a header.
    pub(crate) fn max(&self) -> usize {
        self.number("max_packet_size") as usize
    }

    /// Sets an event callback that records the estimates.
    pub(crate) fn listen(&self) {
        let events = self.events.clone();
        let callback = RcBlock::new(move |mask: u32, event: Pointer| {
            assert_eq!(mask, 1);
            let name = key("estimated_packets_available");
            // SAFETY: an event's dictionary, which lives during this call.
            let estimate = unsafe { abi::xpc_dictionary_get_uint64(event, name) };
            events.lock().expect("no panic").push(estimate);
        });
        assert_eq!(self.set_callback(1, queue(&self.queue), block(&callback)), SUCCESS);
        *self.callback.borrow_mut() = Some(callback);
    }

    pub(crate) fn set_callback(
        &self,
        mask: u32,
        queue: *const c_void,
        block: *const c_void,
    ) -> u32 {
        // SAFETY: a handle; queue and block are what a test wants to be checked.
        unsafe { abi::vmnet_interface_set_event_callback(self.handle, mask, queue, block) }
    }

    /// Unsets the callback, and waits for the last call of it.
    pub(crate) fn quiet(&self) {
        assert_eq!(self.set_callback(1, ptr::null(), ptr::null()), SUCCESS);
        drain(&self.queue);
        *self.callback.borrow_mut() = None;
    }

    /// The number of events so far, including those that are on the queue.
    pub(crate) fn event_count(&self) -> usize {
        drain(&self.queue);
        self.events.lock().expect("no panic").len()
    }

    /// Waits for an event after the first `n`.
    pub(crate) fn event_after(&self, n: usize) {
        let start = Instant::now();
        while self.event_count() <= n {
            assert!(start.elapsed() < LONG, "no event comes");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Stops the interface correctly. Returns the status that the handler got.
    pub(crate) fn stop(&self) -> u32 {
        if self.callback.borrow().is_some() {
            self.quiet();
        }
        let to = new_queue();
        let (handler, answers) = status_block();
        assert_eq!(self.stop_with(queue(&to), block(&handler)), SUCCESS);
        let status = answers.recv_timeout(LONG).expect("the stop's handler");
        drain(&to);
        status
    }

    pub(crate) fn stop_with(&self, queue: *const c_void, handler: *const c_void) -> u32 {
        // SAFETY: a handle; queue and block are what a test wants to be checked.
        unsafe { abi::vmnet_stop_interface(self.handle, queue, handler) }
    }

    /// Writes these packets, each in one iovec. Returns the status and the count.
    pub(crate) fn write(&self, packets: &[Vec<u8>]) -> (u32, usize) {
        Packets::of(packets).write(self.handle)
    }

    /// Writes one packet, which must succeed.
    pub(crate) fn send(&self, packet: &[u8]) {
        assert_eq!(self.write(&[packet.to_vec()]), (SUCCESS, 1));
    }

    /// Reads up to `n` packets. Returns the status and the packets.
    pub(crate) fn read(&self, n: usize) -> (u32, Vec<Vec<u8>>) {
        let mut rooms = Packets::rooms(n, self.max() + 12);
        let (status, count) = rooms.read(self.handle);
        let got = if status == SUCCESS { count } else { 0 };
        (status, (0..got).map(|i| rooms.packet(i).to_vec()).collect())
    }

    /// Reads the packets that are there.
    pub(crate) fn receive(&self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let (status, got) = self.read(32);
            assert_eq!(status, SUCCESS);
            if got.is_empty() {
                return all;
            }
            all.extend(got);
        }
    }
}

/// Descriptors of one iovec each.
pub(crate) struct Packets {
    pub(crate) descriptors: Vec<Descriptor>,
    pub(crate) iovecs: Vec<iovec>,
    buffers: Vec<Vec<u8>>,
}

impl Packets {
    /// Packets to be written.
    pub(crate) fn of(packets: &[Vec<u8>]) -> Self {
        let mut buffers = packets.to_vec();
        let iovec =
            |buffer: &mut Vec<u8>| iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 0 };
        let iovecs: Vec<iovec> = buffers.iter_mut().map(iovec).collect();
        let empty = Descriptor {
            vm_pkt_size: 0,
            vm_pkt_iov: ptr::null_mut(),
            vm_pkt_iovcnt: 1,
            vm_flags: 0,
        };
        let mut all = Self { descriptors: vec![empty; buffers.len()], iovecs, buffers };
        all.reset();
        all
    }

    /// Buffers for `n` packets of up to `size` bytes.
    pub(crate) fn rooms(n: usize, size: usize) -> Self {
        Self::of(&vec![vec![0; size]; n])
    }

    /// Resets them to what they were before the first call.
    pub(crate) fn reset(&mut self) {
        for (i, buffer) in self.buffers.iter().enumerate() {
            self.iovecs[i].iov_len = buffer.len();
            let packet = &mut self.descriptors[i];
            packet.vm_pkt_size = buffer.len();
            packet.vm_pkt_iov = &mut self.iovecs[i];
            packet.vm_flags = 0;
        }
    }

    pub(crate) fn packet(&self, i: usize) -> &[u8] {
        &self.buffers[i][..self.descriptors[i].vm_pkt_size]
    }

    pub(crate) fn read(&mut self, handle: Pointer) -> (u32, usize) {
        let mut count = self.descriptors.len() as c_int;
        // SAFETY: a handle, and descriptors of our own buffers; the simulator checks them.
        let status = unsafe { abi::vmnet_read(handle, self.descriptors.as_mut_ptr(), &mut count) };
        (status, count as usize)
    }

    pub(crate) fn write(&mut self, handle: Pointer) -> (u32, usize) {
        let mut count = self.descriptors.len() as c_int;
        // SAFETY: as in `read`.
        let status = unsafe { abi::vmnet_write(handle, self.descriptors.as_mut_ptr(), &mut count) };
        (status, count as usize)
    }
}

/// The broadcast address.
pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// An Ethernet frame of this length, with a number in it.
pub(crate) fn frame(to: [u8; 6], from: [u8; 6], number: u64, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xb5], &number.to_be_bytes()].concat();
    let tail = (frame.len()..len.max(frame.len())).map(|i| (i as u64 ^ number) as u8);
    frame.extend(tail);
    frame
}

/// The number in a frame.
pub(crate) fn number(frame: &[u8]) -> u64 {
    u64::from_be_bytes(frame[14..22].try_into().expect("eight bytes"))
}
