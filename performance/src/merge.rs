//! A TCP stream between an end without offload and a TAP with it. Towards the TAP the bridge merges
//! short packets, and from the TAP it cuts long ones.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, Layer, SyncDevice, VIRTIO_NET_HDR_LEN};

use crate::clock::Processor;
use crate::forward::{Bridge, LEFT, RIGHT, RIGHT_ADDRESS, Stream, Way, connect, transfer};
use crate::net::{ETHERNET, FULL_FRAME, Namespace, Offload, Tap, check, in_new_namespace, ip};
use crate::report::{Table, Want};
use crate::result::Result;

/// The contenders.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method<'a> {
    /// The `vmring` command at this path, with no offload at either end.
    Plain(&'a Path),
    /// The same, with offload at the right end, and the rest in software.
    Software(&'a Path),
    /// A relay over `tun-rs`, whose GRO and GSO work on a TUN. So the right end is one, and the relay
    /// takes off the Ethernet headers, and puts them on.
    TunRs,
}

impl Method<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Plain(_) => "vmring bridge --offload none",
            Self::Software(_) => "vmring bridge --offload software",
            Self::TunRs => "relay over tun-rs, GRO and GSO",
        }
    }
}

const WAYS: [(Way, &str); 2] =
    [(Way::LeftToRight, "towards the TAP"), (Way::RightToLeft, "from the TAP")];

/// Measures all contenders in turns, both ways.
pub(crate) fn run(rounds: u32, seconds: u32, program: &Path) -> Result<(Vec<Table>, Vec<Want>)> {
    let methods = [Method::Plain(program), Method::Software(program), Method::TunRs];
    let mut all: Vec<(Method<'_>, Way, &str, Vec<Stream>)> = WAYS
        .into_iter()
        .flat_map(|(way, label)| methods.map(move |method| (method, way, label, Vec::new())))
        .collect();
    for _ in 0..rounds {
        for (method, way, _, streams) in &mut all {
            let stream = in_new_namespace(|| measure(*method, *way, seconds));
            streams.push(stream.map_err(|error| format!("{}: {error}", method.name()))?);
        }
    }
    let mut table = Table::new(
        "tap-merge",
        format!("one TCP stream of {seconds} s between an end without offload and a TAP with it"),
        &["way", "contender"],
        &["Gbit/s", "bridge CPU s/GB", "system CPU s/GB"],
    );
    let mut wants = Vec::new();
    for (way, label) in WAYS {
        let mut medians = Vec::new();
        for (method, _, _, streams) in all.iter().filter(|row| row.1 == way) {
            let rate: Vec<f64> = streams.iter().map(|stream| stream.gbit_per_second).collect();
            let bridge: Vec<f64> = streams
                .iter()
                .filter_map(|stream| stream.bridge_cpu_seconds_per_gigabyte)
                .collect();
            let system: Vec<f64> =
                streams.iter().map(|stream| stream.system_cpu_seconds_per_gigabyte).collect();
            medians.push(table.row(&[label, method.name()], &[&rate, &bridge, &system]));
        }
        let [plain, ours, rival] = medians[..] else { return Err("a contender is missing".into()) };
        let name = methods[1].name();
        let what = |beside: usize| format!("{name}, {label}, / {}", methods[beside].name());
        match way {
            Way::LeftToRight => {
                wants.push(Want::at_least(what(0), ours / plain, 3.0));
                wants.push(Want::at_least(what(2), ours / rival, 1.2));
            }
            Way::RightToLeft => wants.push(Want::at_least(what(0), ours / plain, 2.0)),
        }
    }
    Ok((vec![table], wants))
}

/// One stream, measured from within the namespace of the bridge.
fn measure(method: Method<'_>, way: Way, seconds: u32) -> Result<Stream> {
    let ends = (Namespace::new()?, Namespace::new()?);
    let (program, offload) = match method {
        Method::Plain(program) => (program, &["--offload=none"][..]),
        Method::Software(program) => (program, &["--offload=software", "--plain=a"][..]),
        Method::TunRs => return measure_tun_rs(&ends, way, seconds),
    };
    // The engine that the command takes by itself.
    let bridge = Bridge::start(program, "plain", offload)?;
    connect(&ends)?;
    let before = bridge.processor_time()?;
    let transfer = transfer(&ends, Offload::Off, way, seconds)?;
    Ok(transfer.stream(Some(bridge.processor_time()?.saturating_sub(before))))
}

/// The addresses of the left end, and of what it takes for the right one.
const LEFT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
const RIGHT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x22];

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn measure_tun_rs(ends: &(Namespace, Namespace), way: Way, seconds: u32) -> Result<Stream> {
    let left = Tap::open(LEFT, Offload::Off)?;
    ip(&format!("link set {LEFT} address {}", text(LEFT_MAC)))?;
    let builder = DeviceBuilder::new().name(RIGHT).layer(Layer::L3).mtu(1500);
    let right = builder
        .with(|options| {
            options.offload(true);
        })
        .build_sync()?;
    right.set_nonblocking(true)?;
    connect(ends)?;
    // A TUN answers no ARP.
    let neighbour = format!("neigh add {RIGHT_ADDRESS} lladdr {} dev {LEFT}", text(RIGHT_MAC));
    ends.0.inside(|| ip(&neighbour))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let relay = scope.spawn(|| relay(&left, &right, &stop));
        let transfer = transfer(ends, Offload::Off, way, seconds);
        stop.store(true, Ordering::Relaxed);
        let bridge = relay.join().unwrap_or_else(|_| Err("the relay panicked".into()))?;
        Ok(transfer?.stream(Some(bridge)))
    })
}

/// How often the relay checks whether it should stop, while nothing arrives.
const LOOK_MS: libc::c_int = 20;

/// Where an IP packet begins in a buffer for `send_multiple`: behind the space for its header, and
/// behind an Ethernet header.
const PACKET_AT: usize = VIRTIO_NET_HDR_LEN + ETHERNET;

/// Carries packets in both directions until `stop`. Returns the processor time that it took.
fn relay(left: &Tap, right: &SyncDevice, stop: &AtomicBool) -> Result<Duration> {
    let processor = Processor::of_this_thread()?;
    let mut short: Vec<Vec<u8>> =
        (0..IDEAL_BATCH_SIZE).map(|_| Vec::with_capacity(PACKET_AT + 65_535)).collect();
    let mut table = GROTable::default();
    let mut long = vec![0; VIRTIO_NET_HDR_LEN + 65_535];
    let mut cut = vec![vec![0; FULL_FRAME]; IDEAL_BATCH_SIZE];
    for frame in &mut cut {
        frame[..6].copy_from_slice(&LEFT_MAC);
        frame[6..12].copy_from_slice(&RIGHT_MAC);
        frame[12..14].copy_from_slice(&[8, 0]);
    }
    let mut sizes = vec![0; IDEAL_BATCH_SIZE];
    let mut entries = [left.as_raw_fd(), right.as_raw_fd()].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: poll reads and writes two entries, which outlive the call.
        check(unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, LOOK_MS) })?;
        if entries[0].revents != 0 {
            let count = read_batch(left, &mut short)?;
            lost(right.send_multiple(&mut table, &mut short[..count], PACKET_AT))?;
        }
        if entries[1].revents != 0 {
            for _ in 0..IDEAL_BATCH_SIZE {
                match right.recv_multiple(&mut long, &mut cut, &mut sizes, ETHERNET) {
                    Ok(count) => {
                        for (frame, len) in cut.iter().zip(&sizes).take(count) {
                            lost(write(left, &frame[..ETHERNET + len]))?;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    Ok(processor.time())
}

/// Reads IPv4 packets, as many as there are and as there are buffers for. Returns their number.
fn read_batch(from: &Tap, buffers: &mut [Vec<u8>]) -> Result<usize> {
    let mut count = 0;
    while count < buffers.len() {
        let buffer = &mut buffers[count];
        buffer.resize(VIRTIO_NET_HDR_LEN + FULL_FRAME, 0);
        let space = &mut buffer[VIRTIO_NET_HDR_LEN..];
        // SAFETY: the space is that long and outlives the call.
        let len = unsafe { libc::read(from.as_raw_fd(), space.as_mut_ptr().cast(), space.len()) };
        let Ok(len) = usize::try_from(len) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock {
                break;
            }
            return Err(error.into());
        };
        if space[..len].get(12..14) == Some(&[8, 0]) {
            buffer.truncate(VIRTIO_NET_HDR_LEN + len);
            count += 1;
        }
    }
    Ok(count)
}

fn write(to: &Tap, frame: &[u8]) -> io::Result<usize> {
    // SAFETY: the frame is that long and outlives the call.
    let written = unsafe { libc::write(to.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// A network may lose packets. This one does so while its other end is not up (yet).
fn lost(written: io::Result<usize>) -> io::Result<()> {
    match written {
        Err(error)
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::EIO)) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}
