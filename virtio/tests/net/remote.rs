//! A guest whose device is behind vhost-user, in a thread of its own.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmring::{GuestMmap, Interface};
use vmring_core::guest::{GuestMemory, GuestRegion};
use vmring_virtio::net::{
    Ended, Features, FrontEndHandle, NetSettings, ServeError, StatsHandle, VhostUserNet,
    serve_connection,
};
use vmring_virtio::vhost_user::features::{LOG_ALL, PROTOCOL_FEATURES, ProtocolFeature};

use crate::driver::{ARENA, Driver};
use crate::frontend::*;
use crate::net::guest::{self, HEADER, readable};
use crate::support::LONG;

const USER: u64 = 0x7f00_0000_0000;
const RINGS: u64 = 0x1_0000;
const RINGS_LEN: u64 = 0x10_0000;
const ARENA_LEN: u64 = 0x80_0000;
pub(crate) const SIZE: u16 = 256;

type Served = (VhostUserNet, Result<Ended, ServeError>);

/// A thread that serves one front end.
pub(crate) struct Server {
    thread: Option<JoinHandle<Served>>,
    stop: Option<PipeWriter>,
    pub(crate) stats: StatsHandle,
    pub(crate) front_end: FrontEndHandle,
}

impl Server {
    /// Serves with a new device on an interface. Returns the front end's socket, too.
    pub(crate) fn new(interface: Interface) -> (Self, UnixStream) {
        let device = VhostUserNet::new(interface, NetSettings::default()).expect("a device");
        Self::with(device)
    }

    pub(crate) fn with(device: VhostUserNet) -> (Self, UnixStream) {
        Self::with_config(device, true)
    }

    /// Offers the configuration space, or not.
    pub(crate) fn with_config(device: VhostUserNet, config: bool) -> (Self, UnixStream) {
        let (own, socket) = UnixStream::pair().expect("a pair of sockets");
        let (stopped, stop) = pipe().expect("a pipe");
        let (stats, front_end) = (device.device().stats_handle(), device.front_end());
        let mut settings = device.session_settings();
        settings.config = config;
        let thread =
            std::thread::spawn(move || serve_connection(socket, device, settings, stopped.as_fd()));
        (Self { thread: Some(thread), stop: Some(stop), stats, front_end }, own)
    }

    /// Stops it. The front end may still be there.
    pub(crate) fn stop(mut self) -> Served {
        drop(self.stop.take());
        self.join()
    }

    /// Waits until it ends by itself.
    pub(crate) fn join(&mut self) -> Served {
        let thread = self.thread.take().expect("it is joined once");
        let began = Instant::now();
        while !thread.is_finished() {
            assert!(began.elapsed() < LONG, "the server does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().expect("the server does not panic")
    }
}

/// The events of a ring, as the front end has them.
pub(crate) struct Ring {
    pub(crate) driver: Driver,
    pub(crate) kick: PipeWriter,
    pub(crate) call: PipeReader,
    kick_end: PipeReader,
    call_end: PipeWriter,
}

pub(crate) struct Remote {
    pub(crate) frontend: Frontend,
    pub(crate) file: File,
    pub(crate) features: Features,
    pub(crate) rings: Vec<Ring>,
    pub(crate) mac: [u8; 6],
}

pub(crate) fn regions() -> [Region; 2] {
    let region = |guest_address, size, mmap_offset| Region {
        guest_address,
        size,
        user_address: USER + guest_address,
        mmap_offset,
    };
    [region(RINGS, RINGS_LEN, 0), region(ARENA, ARENA_LEN, RINGS_LEN)]
}

/// Returns the features, and the MAC address.
fn negotiate(frontend: &Frontend, without: Features) -> (Features, [u8; 6]) {
    let ask = |request| {
        frontend.send(&Sent::new(request, []));
        frontend.reply().number()
    };
    let offered = ask(GET_FEATURES);
    let protocol = ask(GET_PROTOCOL_FEATURES);
    frontend.send(&Sent::number(SET_PROTOCOL_FEATURES, protocol));
    assert_ne!(protocol & ProtocolFeature::Config.bit(), 0, "the configuration is offered");
    frontend.send(&Sent::config(GET_CONFIG, 0, 0, &[0; 12]));
    let mac = frontend.reply().payload[12..18].try_into().expect("six bytes");
    let bits = offered & !LOG_ALL & !without.bits();
    assert_ne!(bits & PROTOCOL_FEATURES, 0);
    frontend.send(&Sent::number(SET_FEATURES, bits));
    (Features::from_bits(bits & !PROTOCOL_FEATURES), mac)
}

impl Remote {
    /// Negotiates everything but `without`, and starts both rings.
    pub(crate) fn new(socket: UnixStream, without: Features) -> Self {
        let file = memory(RINGS_LEN + ARENA_LEN);
        let mut remote = Self::over(socket, file, without);
        for index in [0, 1] {
            remote.set_up(index, 0);
            remote.enable(index, true);
        }
        remote
    }

    /// Negotiates, and starts nothing.
    pub(crate) fn over(socket: UnixStream, file: File, without: Features) -> Self {
        Self::wide(socket, file, without, 2)
    }

    /// As [`over`](Self::over), with this many rings.
    pub(crate) fn wide(socket: UnixStream, file: File, without: Features, rings: u16) -> Self {
        let frontend = Frontend::on(socket);
        let regions_here = regions().map(|region| {
            let map = GuestMmap::file(&file, region.mmap_offset, region.size as usize);
            GuestRegion::new(region.guest_address, Arc::new(map.expect("a mapping")))
        });
        let memory = GuestMemory::new(regions_here).expect("regions");
        let (features, mac) = negotiate(&frontend, without);
        frontend.send(&Sent::table(&regions()).with(&file).with(&file));
        let rings = (0..rings)
            .map(|index| {
                let driver = guest::driver(&memory, index, SIZE, features, 0);
                // Two queues of one kind share an arena's half.
                let arena = ARENA + u64::from(index) * 0x10_0000;
                let driver = if index < 2 { driver } else { driver.with_arena(arena) };
                let ((kick_end, kick), (call, call_end)) = (pipe().unwrap(), pipe().unwrap());
                Ring { driver, kick, call, kick_end, call_end }
            })
            .collect();
        Self { frontend, file, features, rings, mac }
    }

    /// The same guest on a new connection, as QEMU reconnects: the rings go on behind what was used.
    pub(crate) fn reconnect(mut self, socket: UnixStream) -> Self {
        self.frontend = Frontend::on(socket);
        let (features, _) = negotiate(&self.frontend, Features::NONE);
        assert_eq!(features, self.features);
        self.frontend.send(&Sent::table(&regions()).with(&self.file).with(&self.file));
        for index in [0, 1] {
            let base = self.rings[index as usize].driver.used_index();
            self.set_up(index, base.into());
            self.enable(index, true);
        }
        self
    }

    pub(crate) fn set_up(&mut self, index: u32, base: u32) {
        let layout = guest::layout(index as u16, SIZE);
        let user = |address| USER + address;
        let addresses =
            [user(layout.descriptors), user(layout.used), user(layout.available), layout.used];
        let ring = &self.rings[index as usize];
        for message in [
            Sent::state(SET_VRING_NUM, index, SIZE.into()),
            Sent::state(SET_VRING_BASE, index, base),
            Sent::addresses(index, 0, addresses),
            Sent::number(SET_VRING_CALL, index.into()).with(&ring.call_end),
            Sent::number(SET_VRING_KICK, index.into()).with(&ring.kick_end),
        ] {
            self.frontend.send(&message);
        }
    }

    pub(crate) fn enable(&self, index: u32, enabled: bool) {
        self.frontend.send(&Sent::state(SET_VRING_ENABLE, index, enabled.into()));
    }

    /// Waits until everything that was sent is handled.
    pub(crate) fn sync(&self) {
        self.frontend.send(&Sent::new(GET_FEATURES, []));
        self.frontend.reply();
    }

    pub(crate) fn base(&self, index: u32) -> u16 {
        self.frontend.send(&Sent::state(GET_VRING_BASE, index, 0));
        let payload = self.frontend.reply().payload;
        u32::from_ne_bytes(payload[4..].try_into().expect("four bytes")) as u16
    }

    /// Kicks a ring if its device wants that.
    pub(crate) fn kick(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        if ring.driver.needs_kick() {
            ring.kick.write_all(&[1; 8]).expect("the kick");
        }
    }

    pub(crate) fn post(&mut self, lens: &[u32], count: usize) {
        let shape: Vec<_> = lens.iter().map(|len| (*len, true)).collect();
        for _ in 0..count {
            assert!(self.rings[0].driver.post(&shape, None).is_some(), "there is space");
        }
        self.rings[0].driver.expose();
        self.kick(0);
    }

    pub(crate) fn send(&mut self, packet: &[u8]) {
        let driver = &mut self.rings[1].driver;
        driver.collect();
        let shape = [(HEADER as u32, false), (packet.len() as u32, false)];
        let head = driver.post(&shape, None).expect("there is space");
        let buffers = driver.buffers(head).to_vec();
        driver.write(buffers[0].address, &[0; HEADER]);
        driver.write(buffers[1].address, packet);
        driver.expose();
        self.kick(1);
    }

    /// Waits for `count` packets, with the help of interrupts alone.
    pub(crate) fn receive(&mut self, count: usize) -> Vec<Vec<u8>> {
        let began = Instant::now();
        let mut packets = Vec::new();
        loop {
            let driver = &mut self.rings[0].driver;
            // The driver wants an interrupt for the next used chain, and looks once more.
            let used = driver.used_index();
            if self.features.has(Features::EVENT_IDX) {
                driver.set_used_event(used);
            }
            for one in driver.collect() {
                assert!(one.len as usize >= HEADER, "{one:?}");
                let mut bytes = Vec::new();
                for buffer in &one.buffers {
                    let left = one.len - bytes.len() as u32;
                    bytes.extend(driver.read(buffer.address, buffer.len.min(left)));
                }
                packets.push(bytes.split_off(HEADER));
            }
            if packets.len() >= count {
                return packets;
            }
            assert!(began.elapsed() < LONG, "{} of {count} packets have come", packets.len());
            if self.rings[0].driver.used_index() == used && readable(&self.rings[0].call, LONG) {
                let _ = self.rings[0].call.read(&mut [0; 512]);
            }
        }
    }
}
