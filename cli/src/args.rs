//! The command line.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use vmring::{ConfigError, Ipv4Range, Mode};

use crate::bridge::spec::{Offload, Spec, WhichEnd};
use crate::device::{DeviceName, VMNET};
use crate::dhcp::DhcpArgs;
use crate::failure::Failure;
use crate::nat::NatArgs;
use crate::serve::limits::{CONNECTIONS, CONNECTIONS_MAX, PAIRS_MAX};
use crate::serve::metrics::MetricsSpec;
use crate::serve::spec::{ConnectSpec, ListenSpec, MacRule, NetworkSettings, NetworkSpec};
use crate::size::Size;

/// Packet rings for virtual machine monitors.
///
/// Without a command, runs the demo: two guests, each a TCP/IP stack on a ring of its own, get
/// addresses by DHCP, ping each other, and move a gigabyte through a network inside this process.
/// The demo does not need root.
#[derive(Debug, Parser)]
#[command(
    name = "vmring",
    version,
    disable_help_subcommand = true,
    after_help = EXIT_CODES,
    // The help of a terminal of any width, and of a pipe.
    term_width = 80
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

const EXIT_CODES: &str =
    "Exit code: 0 if every step succeeded, 1 if one failed, 2 for invalid arguments.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Two guests get addresses, ping and move a gigabyte (the default)
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(DemoArgs),
    /// Joins two networks, or a network and a file
    #[command(after_help = BRIDGE_NOTES)]
    Bridge(BridgeArgs),
    /// Joins virtual machines to a network, over vhost-user and the wires of VMMs
    #[command(after_help = SERVE_NOTES)]
    Serve(Box<ServeArgs>),
    /// Runs a command in a network namespace of its own, whose only way out is a network of this process
    #[cfg(target_os = "linux")]
    #[command(after_help = RUN_NETNS_NOTES)]
    RunNetns(RunNetnsArgs),
    /// Measures how fast packets move on this machine: packets per second one way, and round trips
    #[command(after_help = BENCH_NOTES)]
    Bench(BenchArgs),
    /// Shows what this machine offers: devices, what each needs, and what it can do
    Info(InfoArgs),
    /// For people with a Mac: asks Apple's vmnet the questions that no document answers
    #[command(after_help = PROBE_NOTES)]
    Probe(ProbeArgs),
    /// Prints a completion script for a shell
    #[command(after_help = "Example:\n  vmring completions bash > \
                            ~/.local/share/bash-completion/completions/vmring")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Prints a manual page, or installs them all with the completions
    #[command(after_help = "Examples:\n  vmring man serve | man -l -\n  \
                            vmring man --install ~/.local\n  \
                            sudo vmring man --install /usr/local")]
    Man(ManArgs),
    /// The text of the help or of the version.
    #[command(skip)]
    Text(String),
}

const DEMO_EXAMPLES: &str = "\
Examples:
  vmring demo --bytes 64M --mtu 9000
  vmring demo --mode host --capture run.pcapng --bytes 1M
  vmring demo --idle 10 --json
  sudo vmring demo --device tap --engine plain

The guests ping the gateway and each other. The SHA-256 of the transfer is
checked at the far end. On the embedded network in shared mode a guest then
fetches something from a server on the host's side, at the gateway's address. On the tap device (Linux, root) the other guest is the
kernel, and the bytes go there and back. The command makes a network namespace
for this and removes it: the host's network does not change.
A signal (Ctrl-C, SIGTERM, SIGHUP) ends the demo with a report of what it found
so far; a second one ends it at once.
Exit code: 0 if every step succeeded, 1 if one failed or a signal came before
the last one, 2 for invalid arguments.";

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The network: host (the guests and the gateway) or shared (with a way out)
    #[arg(long, default_value = "shared", value_parser = MODES, hide_possible_values = true)]
    pub(crate) mode: Mode,
    /// The device that the guests are on
    #[arg(long, default_value = "embedded", value_name = "NAME", value_parser = DEMO_DEVICES)]
    pub(crate) device: DeviceName,
    /// Bytes to transfer, like 64M, 1GiB, 500MB [default: 1GiB, or none with --idle]
    #[arg(long, value_name = "SIZE")]
    pub(crate) bytes: Option<Size>,
    /// The largest IP packet in bytes, 1280 to 65521 [default: the device's, 1500]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// The gateway's address and the subnet, like 192.168.70.1/24 [default: the mode's]
    #[arg(long, value_name = "GATEWAY/BITS")]
    pub(crate) subnet: Option<Ipv4Range>,
    /// Which thread drives the rings
    #[arg(long, value_enum, default_value_t = DriveArg::Thread)]
    pub(crate) drive: DriveArg,
    /// Let the guests idle for this long, measure the processor time, then ping once more
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) idle: Option<u64>,
    /// Record every packet of both guests as pcapng, for Wireshark. A named pipe that Wireshark
    /// reads shows them live
    #[arg(long, value_name = "FILE")]
    pub(crate) capture: Option<PathBuf>,
    /// With --device embedded or tap: ask for checksum offload and TCP segmentation. Guests on the
    /// embedded network send each other packets of 64 KiB. On the tap device the guest accepts the
    /// kernel's large packets but sends none itself
    #[arg(long)]
    pub(crate) offload: bool,
    #[cfg(target_os = "linux")]
    #[command(flatten)]
    pub(crate) tap: TapArgs,
    #[command(flatten)]
    pub(crate) dhcp: DhcpArgs,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of the TAP device.
#[cfg(target_os = "linux")]
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TapArgs {
    /// With --device tap: how frames are moved [default: auto]
    #[arg(long, value_name = "NAME", value_parser = ENGINES)]
    pub(crate) engine: Option<vmring::TapEngine>,
}

const BRIDGE_NOTES: &str = "\
Ends:
  embedded:NETWORK[,GATEWAY/BITS]  a port of a network inside this process
  tap:NAME[,MODE[,GATEWAY/BITS]]   a TAP of the Linux kernel; with a mode (host,
                                   shared, bridged:BRIDGE) the host's end is set
                                   up too, on a subnet that the host does not
                                   use if none is given
  vmnet[:MODE[,OPTION...]]         Apple's vmnet; elsewhere vmnet-sim, the
                                   simulated one. The options are those of
                                   'vmring serve'
  qemu:PATH[,client][,vnet_hdr]    a wire to a VMM over a Unix socket, which is
                                   listened on, or connected to as a client;
                                   with vnet_hdr each frame has a virtio header.
                                   Also qemu-dgram, vfkit, krunkit, libkrun,
                                   socket_vmnet and bess (Linux); own=PATH is
                                   this side's socket of a datagram client
  pcap:FILE                        replays the Ethernet packets of a pcap or
                                   pcapng file, and counts what it cannot replay
  capture:FILE                     records the packets written to it as pcapng;
                                   a named pipe is watched live (mkfifo live;
                                   wireshark -k -i live)
Examples:
  vmring bridge pcap:run.pcapng embedded:lab --seconds 10
  vmring bridge embedded:lab capture:lab.pcapng --json
  vmring bridge tap:t0 embedded:lab --lease-file lab.leases
  vmring bridge qemu:/run/vm.sock tap:t0

The bridge ends by itself when neither end can deliver another packet, for
example when one file is replayed into another. A signal (Ctrl-C, SIGTERM,
SIGHUP) ends it with its report; a second one ends it at once.
Exit code: 0 if it was ended or ended by itself, 1 if an end failed, 2 for
invalid arguments.";

#[derive(Debug, Args)]
pub(crate) struct BridgeArgs {
    /// One end
    #[arg(value_name = "A", value_parser = ENDS, hide_possible_values = true)]
    pub(crate) a: Spec,
    /// The other
    #[arg(value_name = "B", value_parser = ENDS, hide_possible_values = true)]
    pub(crate) b: Spec,
    /// Checksums and segmentation: only what both ends do (common); or what each end can do, and
    /// the rest in software (software, or --offload alone); or none
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
          default_value_t = Offload::Common, default_missing_value = "software")]
    pub(crate) offload: Offload,
    /// With --offload software, do not merge the short packets of one end into large ones for an
    /// end that takes them
    #[arg(long)]
    pub(crate) no_merge: bool,
    /// The end that is to offload nothing, as if its device could not
    #[arg(long, value_enum, value_name = "END")]
    pub(crate) plain: Option<WhichEnd>,
    /// How frames are moved into and out of a TAP
    #[cfg(target_os = "linux")]
    #[arg(long, value_name = "ENGINE", default_value = "plain", value_parser = ENGINES)]
    pub(crate) engine: vmring::TapEngine,
    /// The largest IP packet of both ends in bytes [default: each end's own]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// Packets that may be in flight in each direction, rounded up to a power of two
    #[arg(long, value_name = "PACKETS", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) depth: u32,
    /// End after this long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: Option<u64>,
    #[command(flatten)]
    pub(crate) dhcp: DhcpArgs,
    #[command(flatten)]
    pub(crate) nat: NatArgs,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(target_os = "linux")]
const RUN_NETNS_NOTES: &str = "\
Examples:
  vmring run-netns -- curl https://example.org
  vmring run-netns -- bash

No root is needed where users may make user namespaces. The command keeps its
user and its files; it has its own interfaces (lo and tap0), and may change
them, ping, capture, and listen on any port. What it sends leaves as this
process's own connections. The namespace ends with the command.
SIGTERM and SIGHUP are passed on to the command.
Exit code: the command's own, or 128 and the number of the signal that ended
it; 126 if it cannot be run, 127 if it is not there, 1 if a step before it
failed, 2 for invalid arguments.";

#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
pub(crate) struct RunNetnsArgs {
    /// The largest IP packet in bytes, 1280 to 65521 [default: 65520, or 1500 with --offload none]
    #[arg(long, value_name = "BYTES",
          value_parser = clap::value_parser!(u32).range(1280..=65_521))]
    mtu: Option<u32>,
    /// What the command's kernel leaves to the network: all checksums and segments, for which its packets
    /// have up to 64 KiB; or none, as a network card without offload
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = NetnsOffload::All)]
    pub(crate) offload: NetnsOffload,
    /// The gateway's address and the subnet [default: 192.168.64.1/24]
    #[arg(long, value_name = "GATEWAY/BITS")]
    pub(crate) subnet: Option<Ipv4Range>,
    #[command(flatten)]
    pub(crate) nat: NatArgs,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

#[cfg(target_os = "linux")]
impl RunNetnsArgs {
    /// The largest IP packet of the namespace, in bytes. What it carries ends at a socket of this process.
    /// The host's kernel cuts it for the networks behind.
    pub(crate) fn mtu(&self) -> u32 {
        self.mtu.unwrap_or(match self.offload {
            NetnsOffload::All => 65_520,
            NetnsOffload::None => 1500,
        })
    }
}

/// What the TAP of a network namespace leaves to the network.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetnsOffload {
    All,
    None,
}

const SERVE_NOTES: &str = "\
Networks:
  embedded:NAME[,GATEWAY/BITS]     inside this process, with a gateway and DHCP
  tap:NAME[,MODE[,GATEWAY/BITS]]   a switch with a TAP of the Linux kernel as its
                                   uplink; with a mode (host, shared,
                                   bridged:BRIDGE) the host's end is set up too
  vmnet[:MODE[,OPTION...]]         a switch with Apple's vmnet as its uplink;
                                   elsewhere vmnet-sim, the simulated one. With
                                   an option it is a network of its own (macOS
                                   26): network, subnet=GATEWAY/BITS,
                                   ipv6=PREFIX/BITS, external=INTERFACE,
                                   reserve=MAC=ADDRESS, dhcp=off, dns=off,
                                   nat=off, nat66=off, ra=off
Sockets:
  vhost-user:PATH[,OPTION...]      front ends connect; each is a port of its own
  vhost-user:NAME                  the same, in a private folder: vmring below
                                   $XDG_RUNTIME_DIR, /run/user/UID or (root) /run,
                                   or else vmring-UID in the temporary folder
  vhost-user:PATH,client           the front end listens; --connect is the same
  vhost-user:fd=NUMBER             an inherited socket
  vhost-user:fd=NAME               one that systemd passes, by FileDescriptorName=
  qemu:PATH, libkrun:PATH, socket_vmnet:PATH
                                   streams of frames: any number of guests connect
  qemu-dgram:PATH, vfkit:PATH, krunkit:PATH
                                   datagrams: one guest at a time; as a client,
                                   own=PATH is the socket of this side
  bess:PATH                        sequenced packets, of user-mode Linux (Linux)
                                   These have NAME, client and fd= too, and
                                   vnet_hdr: each frame has a virtio header
Options of a socket: mac=ADDRESS (the guest has this address and no other),
mac=learn (the first one that it uses), isolated (the guest reaches the gateway
or the uplink, and no other guest), queues=NUMBER (pairs of queues, 1 to 16),
config (the front end may read the address and the MTU), seals (memory that can
shrink is refused), announce (the guest announces itself after a migration),
offload=off (checksums and segments are the guest's work: faster for one that
does not offload),
offload=implied (of vfkit, krunkit and qemu-dgram without vnet_hdr: checksums and
segments are the server's work, as with krunkit's offloading=on),
capture=FILE (its guests' packets are recorded), and limits: rate= for both ways,
send=, receive= in bytes per second; send-packets=, receive-packets=, floods= in
packets.
Examples:
  vmring serve --network embedded:lab --listen vhost-user:/tmp/vm0.sock
  qemu-system-x86_64 ... -object memory-backend-memfd,id=m,size=1G,share=on \
    -numa node,memdev=m -chardev socket,id=c,path=/tmp/vm0.sock,reconnect=1 \
    -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n,vectors=0
  sudo vmring serve --network tap:t0,bridged:br0 --listen vhost-user:a.sock \
    --listen vhost-user:b.sock,mac=52:54:00:12:34:56 --json
  vmring serve --network embedded:lab --listen qemu:/tmp/vm1.sock
  qemu-system-x86_64 ... -device virtio-net-pci,netdev=n \
    -netdev stream,id=n,addr.type=unix,addr.path=/tmp/vm1.sock

A front end may come, go and come again. The server may end and start again while
guests run, if their front ends connect again. On Linux the server confines
itself before the first connection: no privileges, no files, a short list of
system calls. Below sudo it becomes the caller as soon as the network is up; its
sockets are the caller's. A signal (Ctrl-C, SIGTERM, SIGHUP) ends it with its
report; a second one ends it at once. SIGUSR1 (and SIGINFO, Ctrl-T on macOS)
prints a report, and the server goes on.
Exit code: 0 if it was ended, 1 if the network failed, 2 for invalid arguments.";

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The network that the guests are on
    #[arg(long, value_name = "NETWORK", value_parser = NETWORKS, hide_possible_values = true,
          required_unless_present = "print_capabilities")]
    pub(crate) network: Option<NetworkSpec>,
    /// Where guests' VMMs connect; can be repeated
    #[arg(long, value_name = "SOCKET",
          required_unless_present_any = ["connect", "fd", "socket_path", "print_capabilities"])]
    pub(crate) listen: Vec<ListenSpec>,
    /// A socket at which a VMM listens, the same as --listen SOCKET,client; can be repeated
    #[arg(long, value_name = "SOCKET")]
    pub(crate) connect: Vec<ConnectSpec>,
    /// The same as --listen vhost-user:PATH, as QEMU's conventions for back ends have it
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: Option<PathBuf>,
    /// The same as --listen vhost-user:fd=NUMBER, likewise
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(3..))]
    pub(crate) fd: Option<i32>,
    /// Print what the back end can do as JSON, likewise
    #[arg(long)]
    pub(crate) print_capabilities: bool,
    /// Which source addresses a guest may use: any that nobody else has, or learn (the first one
    /// that it uses), unless its socket says something else
    #[arg(long, value_name = "WHICH", default_value = "any", value_parser = MACS)]
    pub(crate) mac: MacRule,
    /// Pairs of queues of a guest over vhost-user, 1 to 16, unless its socket says something else
    #[arg(long, value_name = "PAIRS", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=PAIRS_MAX as i64))]
    pub(crate) queues: u16,
    /// The largest IP packet in bytes [default: the network's own, 1500]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u32>,
    /// Guests that can be connected at once. Each socket has a place of its own, and the guests of all
    /// sockets share the others
    #[arg(long, value_name = "GUESTS", default_value_t = CONNECTIONS,
          value_parser = clap::value_parser!(u32).range(1..=CONNECTIONS_MAX as i64))]
    pub(crate) connections: u32,
    /// Start an interface of vmnet for each guest that connects, as vmnet-helper does, and stop it when the
    /// guest leaves: there is no switch in front, and no limits. Without this all guests share one
    #[arg(long)]
    pub(crate) per_client: bool,
    /// Refuse memory that a front end can make shorter. QEMU's memory-backend-memfd and crosvm seal
    /// theirs, and the server seals what allows it; the files of user-mode Linux, cloud-hypervisor and
    /// DPDK cannot be sealed
    #[arg(long)]
    pub(crate) demand_seals: bool,
    /// Let guests announce themselves after a migration. QEMU's can; user-mode Linux refuses a network
    /// card like that. Otherwise the server does it, when its front end asks for it
    #[arg(long)]
    pub(crate) guest_announce: bool,
    /// How frames are moved into and out of a TAP. With io_uring the list of system calls means less,
    /// because the kernel does more for the process that is not a system call
    #[cfg(target_os = "linux")]
    #[arg(long, value_name = "ENGINE", default_value = "plain", value_parser = ENGINES)]
    pub(crate) engine: vmring::TapEngine,
    /// Let the thread of each guest poll for ever, and never sleep: packets arrive sooner, and each guest
    /// takes a processor, also while nothing happens
    #[arg(long)]
    pub(crate) busy_poll: bool,
    /// Do not confine the server
    #[arg(long)]
    pub(crate) no_sandbox: bool,
    /// Become this user when the network is up, in its group and no other [default: below sudo its
    /// caller; root stays root]
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// The group of that user
    #[arg(long, value_name = "GROUP")]
    pub(crate) group: Option<String>,
    /// Write the number of the process to this file, and remove the file at the end
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Write READY=1 to this inherited descriptor when guests can join, and close it
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(3..))]
    pub(crate) ready_fd: Option<i32>,
    /// Show the counters to Prometheus, on a loopback address like 127.0.0.1:9464 or on unix:PATH
    #[arg(long, value_name = "WHERE")]
    pub(crate) metrics: Option<MetricsSpec>,
    /// End after this long
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: Option<u64>,
    #[command(flatten)]
    pub(crate) dhcp: DhcpArgs,
    #[command(flatten)]
    pub(crate) nat: NatArgs,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
    /// What a command that takes another helper's part adds.
    #[arg(skip)]
    pub(crate) settings: NetworkSettings,
}

const BENCH_NOTES: &str = "\
Examples:
  vmring bench
  vmring bench --device loopback --size 60 --batch 1
  vmring bench --device stream
  vmring bench --cpus 0,8 --plot figures.svg
  vmring bench --both 600
  sudo vmring bench --device tap --seconds 20 --json

Packets go from one interface to another on the same network. The loopback has
only one interface, which receives its own packets. With --device stream,
datagram or seqpacket (Linux) there is a socket pair of that type between the
two, as between a VMM and its helper. With --device tap (Linux,
root) there are two TAPs with a bridge of the kernel between them, in a network
namespace that the command makes and removes. With an option of the way out the
embedded network is in shared mode and has it: what it costs packets between
guests is the difference. Every packet is numbered, and checked where it arrives.
What two threads cost depends on how far apart their processors are. The command
keeps its threads on two, and says whether they are near or far: whether a cache
line goes to the other one and back in less than 250 ns. If a host moves them
during a run, what was measured in either place is a row of its own. The bare
loop is what is left of a network: two queues of numbers and a copy, on the same
two threads.
A signal (Ctrl-C, SIGTERM, SIGHUP) ends the run with
the figures so far; a second one ends it at once.
Exit code: 0 if every packet arrived as it was sent; 1 if one was corrupt or
arrived twice, or was lost on a device that loses none; 2 for invalid arguments.";

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// The device that the packets go over
    #[arg(long, default_value = "embedded", value_name = "NAME", value_parser = BENCH_DEVICES)]
    pub(crate) device: DeviceName,
    /// Bytes of a packet, at least 60 [default: 1514, or the device's maximum if that is less]
    #[arg(long, value_name = "BYTES")]
    pub(crate) size: Option<u32>,
    /// With --device embedded: checksums and segments are left to the device, and packets of up to
    /// 64 KiB pass. The default size is the longest then
    #[arg(long)]
    pub(crate) offload: bool,
    /// Packets submitted at once when they go one way
    #[arg(long, value_name = "PACKETS", default_value_t = 32,
          value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) batch: u32,
    /// How long the whole measurement takes
    #[arg(long, value_name = "SECONDS", default_value_t = 5,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// The two processors to use (Linux) [default: the first two that the command may use]
    #[arg(long, value_name = "A,B", value_parser = two_processors)]
    pub(crate) cpus: Option<[usize; 2]>,
    /// Go on until every row of two threads was measured near and far, at most so long for each. On a machine
    /// that does not move its processors only one of the two is seen
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) both: Option<u64>,
    /// Also draw the figures into this file, as SVG
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) nat: NatArgs,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

fn two_processors(text: &str) -> Result<[usize; 2], String> {
    let wrong = || "it must be two numbers of processors, like 0,1".to_owned();
    let (a, b) = text.split_once(',').ok_or_else(wrong)?;
    match (a.parse(), b.parse()) {
        (Ok(a), Ok(b)) if a != b => Ok([a, b]),
        (Ok(_), Ok(_)) => Err("the two processors must be different".to_owned()),
        _ => Err(wrong()),
    }
}

const PROBE_NOTES: &str = "\
Example: sudo vmring probe > report.txt
The probe takes about ten seconds and starts a few interfaces of its own, in
shared mode. Please paste the report into an issue. The probe needs the
privileges that vmnet needs (see 'vmring info').";

#[derive(Debug, Args)]
pub(crate) struct ProbeArgs {
    /// Also ask what happens when the host sleeps: wait this long at the end, so that you can let
    /// the host sleep and wake it
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) sleep: Option<u64>,
    /// Ask the simulated vmnet instead. This tests the probe and nothing else
    #[cfg(not(target_os = "macos"))]
    #[arg(long)]
    pub(crate) simulated: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The command whose page is printed [default: vmring itself]
    #[arg(value_name = "COMMAND")]
    pub(crate) command: Option<String>,
    /// Write the pages of all commands, and the completions for bash, zsh and fish, below this folder
    #[arg(long, value_name = "PREFIX", conflicts_with = "command")]
    pub(crate) install: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which thread drives the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DriveArg {
    /// A poller thread per ring
    Thread,
    /// One poller thread for all rings
    Shared,
    /// Each guest's own thread
    Inline,
}

impl fmt::Display for DriveArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DriveArg::Thread => "thread",
            DriveArg::Shared => "shared",
            DriveArg::Inline => "inline",
        })
    }
}

/// Parses values of which some have a name. Shells complete the names, and help lists them.
#[derive(Clone)]
struct Named<T: 'static> {
    names: &'static [&'static str],
    parse: fn(&str) -> Result<T, String>,
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for Named<T> {
    type Value = T;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        let parse = self.parse;
        // A parser made of a function says which argument it is about.
        let parse = move |text: &str| parse(text);
        TypedValueParser::parse_ref(&parse, command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.names.iter().map(|name| PossibleValue::new(*name))))
    }
}

/// The modes whose names are whole; the other one is `bridged:INTERFACE`.
const MODES: Named<Mode> =
    Named { names: &["host", "shared"], parse: |text| text.parse().map_err(in_words) };

#[cfg(target_os = "linux")]
const ENGINES: Named<vmring::TapEngine> =
    Named { names: &["auto", "io_uring", "plain"], parse: |text| text.parse().map_err(in_words) };

fn in_words(error: ConfigError) -> String {
    error.to_string()
}

/// The devices that carry two guests who see each other, or a guest and the kernel.
const DEMO_DEVICES: Named<DeviceName> =
    Named { names: DEMO_NAMES, parse: |name| DeviceName::of(name, DEMO_NAMES) };
const DEMO_NAMES: &[&str] =
    if cfg!(target_os = "linux") { &["embedded", "tap", VMNET] } else { &["embedded", VMNET] };

const BENCH_DEVICES: Named<DeviceName> =
    Named { names: BENCH_NAMES, parse: |name| DeviceName::of(name, BENCH_NAMES) };
const BENCH_NAMES: &[&str] = if cfg!(target_os = "linux") {
    &["embedded", "loopback", "stream", "datagram", "seqpacket", "tap", VMNET]
} else {
    &["embedded", "loopback", "stream", "datagram", VMNET]
};

/// How the ends of a bridge begin.
const ENDS: Named<Spec> = Named { names: END_NAMES, parse: str::parse };
const END_NAMES: &[&str] = if cfg!(target_os = "linux") {
    &[
        "embedded:",
        "tap:",
        VMNET,
        "qemu:",
        "qemu-dgram:",
        "vfkit:",
        "krunkit:",
        "libkrun:",
        "socket_vmnet:",
        "bess:",
        "pcap:",
        "capture:",
    ]
} else {
    &[
        "embedded:",
        VMNET,
        "qemu:",
        "qemu-dgram:",
        "vfkit:",
        "krunkit:",
        "libkrun:",
        "socket_vmnet:",
        "pcap:",
        "capture:",
    ]
};

/// How the networks of a server begin.
const NETWORKS: Named<NetworkSpec> = Named { names: NETWORK_NAMES, parse: str::parse };
const NETWORK_NAMES: &[&str] =
    if cfg!(target_os = "linux") { &["embedded:", "tap:", VMNET] } else { &["embedded:", VMNET] };

/// Which addresses guests may use, if it is the same for all.
const MACS: Named<MacRule> = Named {
    names: &["any", "learn"],
    parse: |text| match text.parse()? {
        MacRule::Fixed(_) => {
            Err("an address is for one guest, as in --listen vhost-user:PATH,mac=ADDRESS".into())
        }
        rule => Ok(rule),
    },
};

/// The whole command line. `others` are commands that are parsed elsewhere.
pub(crate) fn command(others: &[clap::Command]) -> clap::Command {
    Cli::command().subcommands(others)
}

impl ServeArgs {
    /// The defaults. There is neither a network nor a socket.
    pub(crate) fn new() -> Self {
        // It asks for nothing else.
        match parse(["vmring", "serve", "--print-capabilities"].map(OsString::from), &[]) {
            Ok(Command::Serve(args)) => Self { print_capabilities: false, ..*args },
            _ => unreachable!("it is a command line of 'vmring serve'"),
        }
    }
}

/// Returns the command to run, or one sentence that says what is wrong with the arguments. `others` are
/// commands that are parsed elsewhere; the help lists them.
pub(crate) fn parse(
    args: impl IntoIterator<Item = OsString>,
    others: &[clap::Command],
) -> Result<Command, Failure> {
    let args = with_offload_joined(args);
    let with_default = |cli: Cli| cli.command.map_or_else(default_command, Ok);
    let matches = command(others).try_get_matches_from(&args);
    matches
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(Box::new)
        .map_or_else(|error| refused(&error, &args), with_default)
}

/// Joins `--offload` and a value of it that follows, as if they were written with `=`.
///
/// The option may stand alone, and what follows it may be an end of the bridge. clap cannot tell the
/// two apart, but no end is written like a value: it has a colon, or is the name of a device.
fn with_offload_joined(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut joined: Vec<OsString> = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let has_command = joined.len() == 1 && arg == "run-netns";
        if arg == "--" || has_command {
            // What follows is a command of the user's.
            joined.push(arg);
            joined.extend(args);
            break;
        }
        let is_value = arg.to_str().is_some_and(|arg| Offload::from_str(arg, false).is_ok());
        match joined.last_mut() {
            Some(last) if is_value && last == "--offload" => {
                last.push("=");
                last.push(arg);
            }
            _ => joined.push(arg),
        }
    }
    joined
}

fn default_command() -> Result<Command, Failure> {
    parse(["vmring", "demo"].map(OsString::from), &[])
}

fn refused(error: &clap::Error, args: &[OsString]) -> Result<Command, Failure> {
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(Command::Text(text)),
        _ => {
            let name = args.get(1).and_then(|name| name.to_str());
            let of = name.filter(|name| Cli::command().find_subcommand(name).is_some());
            let help = of.map_or("vmring --help".to_owned(), |of| format!("vmring {of} --help"));
            Err(Failure::Usage(format!("{}; see '{help}'", one_line(&text))))
        }
    }
}

/// clap's message in one line, without its heading and its usage. Its tips become further clauses.
fn one_line(text: &str) -> String {
    let told = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let mut sentence = String::new();
    for line in told {
        let (joint, line) = match line.strip_prefix("tip: ") {
            Some(tip) => ("; ", tip),
            None => (" ", line),
        };
        if !sentence.is_empty() {
            sentence.push_str(joint);
        }
        sentence.push_str(line);
    }
    let sentence = sentence.strip_prefix("error: ").unwrap_or(&sentence);
    // What the standard library says of a number does not say what to write instead.
    sentence
        .replace("invalid digit found in string", "it must be a whole number")
        .replace("cannot parse integer from empty string", "it must be a whole number")
        .replace("number too large to fit in target type", "the number is too large")
        .replace("..=", " to ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, Failure> {
        parse(line.split_whitespace().map(OsString::from), &[])
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_is_the_demo_with_its_defaults() {
        let Command::Demo(args) = parsed("vmring").unwrap() else { panic!("not the demo") };
        assert_eq!(args.mode, Mode::Shared);
        assert_eq!(args.device, DeviceName::Embedded);
        assert_eq!((args.bytes, args.idle, args.json), (None, None, false));
    }

    #[test]
    fn an_offload_is_written_with_a_blank_with_an_equals_sign_or_alone() {
        for (line, offload) in [
            ("vmring bridge embedded:a embedded:b", Offload::Common),
            ("vmring bridge embedded:a embedded:b --offload", Offload::Software),
            ("vmring bridge --offload embedded:a embedded:b", Offload::Software),
            ("vmring bridge --offload software embedded:a embedded:b", Offload::Software),
            ("vmring bridge embedded:a --offload none embedded:b", Offload::None),
            ("vmring bridge embedded:a embedded:b --offload common", Offload::Common),
            ("vmring bridge embedded:a embedded:b --offload=software", Offload::Software),
            ("vmring bridge --offload=none embedded:a embedded:b --json", Offload::None),
        ] {
            let Ok(Command::Bridge(args)) = parsed(line) else { panic!("{line} is refused") };
            assert_eq!(args.offload, offload, "{line}");
            assert_eq!([args.a.to_string(), args.b.to_string()], ["embedded:a", "embedded:b"]);
        }
        // On a TAP of the demo it has no value.
        let failure = parsed("vmring demo --offload software").unwrap_err().to_string();
        assert!(failure.contains("'software' for '--offload'"), "{failure}");
        let failure = parsed("vmring bridge embedded:a embedded:b --offload hard").unwrap_err();
        assert!(failure.to_string().contains("'hard'"), "{failure}");
    }

    #[test]
    fn the_help_that_is_named_is_that_of_the_command() {
        for (line, help) in [
            ("vmring demo --fast", "'vmring demo --help'"),
            ("vmring bridge", "'vmring bridge --help'"),
            ("vmring --fast", "'vmring --help'"),
            ("vmring frob", "'vmring --help'"),
        ] {
            let sentence = parsed(line).unwrap_err().to_string();
            assert!(sentence.ends_with(&format!("; see {help}")), "{sentence}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (line, said) in [
            ("vmring demo --fast", "unexpected argument '--fast'"),
            (
                "vmring demo --mtuu 3",
                "unexpected argument '--mtuu' found; a similar argument exists: '--mtu'; see",
            ),
            ("vmring frob", "unrecognized subcommand 'frob'"),
            ("vmring demo --mode nat", "the mode must be host, shared or bridged:INTERFACE"),
            ("vmring demo --bytes lots", "a size is a number of bytes"),
            ("vmring demo --subnet 1.2.3.4", "a subnet must be GATEWAY/BITS"),
            ("vmring demo --drive sideways", "[possible values: thread, shared, inline]"),
            ("vmring demo --idle 0", "0 is not in 1 to 86400"),
            ("vmring probe --sleep 0", "0 is not in 1 to 86400"),
            ("vmring bridge embedded:a embedded:b --mtu x", "'--mtu <BYTES>': it must be a whole"),
            ("vmring bench --size 1e3", "'--size <BYTES>': it must be a whole number"),
            ("vmring bench --size=", "it must be a whole number"),
            ("vmring bench --size 99999999999", "99999999999 is not in 0 to 4294967295"),
            ("vmring bench --size 99999999999999999999", "the number is too large"),
            ("vmring demo --lease-time 9", "9 is not in 10 to 4294967295"),
            ("vmring demo --dhcp-range 1.2.3.4", "a range must be FIRST-LAST"),
            ("vmring demo --reserve 1.2.3.4", "a reservation must be MAC=ADDRESS"),
            ("vmring completions", "required arguments were not provided: <SHELL>"),
        ] {
            let Err(failure) = parsed(line) else { panic!("{line} was taken") };
            assert_eq!(failure.exit_code(), 2);
            let sentence = failure.to_string();
            assert!(sentence.contains(said), "{line}: {sentence}");
            assert!(!sentence.contains('\n') && !sentence.contains("tip:"), "{sentence}");
        }
    }
}
