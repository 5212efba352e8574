//! The two ends of a bridge: how they are written on the command line, whether they can be joined,
//! and how they are started.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use vmring::device::Offloads;
use vmring::device::pcap::Replay;
use vmring::{Embedded, Error, Interface, InterfaceBuilder, Ipv4Range};

use super::limits::STOP_TIMEOUT;
use crate::device::{QUEUE, VMNET};
use crate::dhcp::DhcpArgs;
use crate::failure::Failure;
use crate::nat::NatArgs;
use crate::recording::{Recording, is_same_file, why};
#[cfg(target_os = "linux")]
use crate::tap::KernelDrops;
use crate::vmnet::VmnetSpec;
use crate::wire::{WireKind, WireSpec};

/// One end, as the command line of `vmring bridge` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Spec {
    /// A port of a network inside this process, with its addresses if they are given.
    Embedded { network: String, subnet: Option<Ipv4Range> },
    /// A TAP of the kernel. With a mode, the host's end is set up too.
    #[cfg(target_os = "linux")]
    Tap {
        name: String,
        mode: Option<vmring::Mode>,
        subnet: Option<Ipv4Range>,
        engine: vmring::TapEngine,
    },
    /// Apple's vmnet, or on other systems the simulated one.
    Vmnet(VmnetSpec),
    /// A wire to a VMM, over a socket.
    Wire(WireSpec),
    /// Reads the packets of a file.
    Pcap(PathBuf),
    /// Records the packets that are written.
    Capture(PathBuf),
}

/// What a network of an end is set to, as far as it is ours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NetworkArgs<'a> {
    pub(crate) dhcp: &'a DhcpArgs,
    pub(crate) nat: &'a NatArgs,
}

/// What the ends of a bridge do about checksums and segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Offload {
    Common,
    Software,
    None,
}

/// One of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WhichEnd {
    A,
    B,
}

/// What the bridge does itself for an end that does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InSoftware {
    Nothing,
    /// It completes checksums and cuts large packets.
    Cut,
    /// It also merges short packets for an end that cuts them.
    CutAndMerge,
}

impl FromStr for Spec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = match text.split_once(':') {
            Some((kind, rest)) => (kind, Some(rest).filter(|rest| !rest.is_empty())),
            None => (text, None),
        };
        let named = |what: &str, example: &str| {
            rest.map(str::to_owned).ok_or(format!("'{kind}' needs {what}, like {kind}:{example}"))
        };
        match kind {
            "embedded" => {
                let name = named("the name of a network", "lab")?;
                let (network, subnet) = match name.split_once(',') {
                    None => (name, None),
                    Some((name, subnet)) => {
                        let subnet = subnet.parse().map_err(|e: vmring::ConfigError| e.to_string());
                        (name.to_owned(), Some(subnet?))
                    }
                };
                Ok(Spec::Embedded { network, subnet })
            }
            #[cfg(target_os = "linux")]
            "tap" => {
                let name = named("a name", "tap0")?;
                let mut parts = name.splitn(3, ',');
                let name = parts.next().unwrap_or_default().to_owned();
                let wrong = |error: vmring::ConfigError| error.to_string();
                let mode = parts.next().map(str::parse).transpose().map_err(wrong)?;
                let subnet = parts.next().map(str::parse).transpose().map_err(wrong)?;
                if subnet.is_some() && matches!(mode, Some(vmring::Mode::Bridged(_))) {
                    return Err(format!(
                        "'{text}' has a subnet, but the network behind a bridge has its own; leave \
                         it out"
                    ));
                }
                Ok(Spec::Tap { name, mode, subnet, engine: vmring::TapEngine::Auto })
            }
            "pcap" => named("a file", "run.pcapng").map(|file| Spec::Pcap(file.into())),
            "capture" => named("a file", "run.pcapng").map(|file| Spec::Capture(file.into())),
            VMNET => match rest.map(VmnetSpec::parse) {
                None => Ok(Spec::Vmnet(VmnetSpec::default())),
                Some(spec) => spec.map(Spec::Vmnet),
            },
            _ if WireKind::of(kind).is_some() => text.parse().map(Spec::Wire),
            _ if kind == "vmnet" => {
                Err(format!("the vmnet device exists on macOS only; use {}", usable()))
            }
            _ => Err(format!("there is no end '{text}'; use {}", usable())),
        }
    }
}

fn usable() -> String {
    let tap = if cfg!(target_os = "linux") { "tap:NAME, " } else { "" };
    format!("embedded:NETWORK, {tap}{VMNET}, qemu:PATH or another wire, pcap:FILE or capture:FILE")
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Embedded { network, .. } => write!(f, "embedded:{network}"),
            #[cfg(target_os = "linux")]
            Spec::Tap { name, .. } => write!(f, "tap:{name}"),
            Spec::Vmnet(vmnet) => vmnet.fmt(f),
            Spec::Wire(wire) => wire.fmt(f),
            Spec::Pcap(file) => write!(f, "pcap:{}", file.display()),
            Spec::Capture(file) => write!(f, "capture:{}", file.display()),
        }
    }
}

/// Refuses two ends that cannot be joined.
pub(crate) fn check(a: &Spec, b: &Spec) -> Result<(), Failure> {
    let same_file = |a: &Path, b: &Path| a == b || is_same_file(a, b);
    let sentence = match (a, b) {
        (Spec::Embedded { network: one, .. }, Spec::Embedded { network: other, .. })
            if one == other =>
        {
            format!(
                "both ends are on the network '{one}', and every packet would go round for ever; \
                 name two networks"
            )
        }
        #[cfg(target_os = "linux")]
        (Spec::Tap { name: one, .. }, Spec::Tap { name: other, .. }) if one == other => {
            format!("both ends are the TAP '{one}'; name two")
        }
        (Spec::Vmnet(one), Spec::Vmnet(other)) if one.is_same(other) => format!(
            "both ends are on vmnet's {} network, and every packet would go round for ever; name \
             two modes, like {VMNET}:host {VMNET}:shared",
            one.mode
        ),
        (Spec::Wire(one), Spec::Wire(other)) if one.path == other.path => {
            format!("both ends are the socket '{}'; name two", one.path.display())
        }
        (Spec::Capture(_), Spec::Capture(_)) => {
            "nothing comes out of two captures; let one end be a network or pcap:FILE".to_owned()
        }
        (Spec::Pcap(from), Spec::Capture(to)) | (Spec::Capture(to), Spec::Pcap(from))
            if same_file(from, to) =>
        {
            format!(
                "the file '{}' would be overwritten while it is read; name another for the capture",
                to.display()
            )
        }
        _ => return Ok(()),
    };
    Err(Failure::Usage(sentence))
}

/// A started end.
#[derive(Debug)]
pub(crate) struct End {
    /// The end as the command line has it.
    pub(crate) name: String,
    pub(crate) interface: Interface,
    /// For a file that is replayed.
    pub(crate) replay: Option<Replay>,
    /// For a file that is recorded.
    pub(crate) recording: Option<Recording>,
    /// For a TAP.
    #[cfg(target_os = "linux")]
    kernel_drops: Option<KernelDrops>,
}

impl End {
    /// An end that is no file.
    pub(crate) fn of(name: &str, interface: Interface) -> Self {
        Self {
            name: name.to_owned(),
            #[cfg(target_os = "linux")]
            kernel_drops: interface.system_name().map(KernelDrops::of),
            interface,
            replay: None,
            recording: None,
        }
    }

    pub(crate) fn offloads(&self) -> Offloads {
        self.interface.capabilities().offloads
    }

    /// Packets for the guest that the kernel has dropped since the TAP was made: its queue was full,
    /// or nobody had opened it.
    pub(crate) fn dropped_by_kernel(&self) -> u64 {
        #[cfg(target_os = "linux")]
        if let Some(drops) = &self.kernel_drops {
            return drops.count();
        }
        0
    }

    /// Whether this end will deliver no more packets.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.recording.is_some() || self.replay.as_ref().is_some_and(|replay| replay.left() == 0)
    }
}

impl Spec {
    /// Sets the engine, if this is a TAP.
    #[cfg(target_os = "linux")]
    pub(crate) fn driven_by(mut self, by: vmring::TapEngine) -> Self {
        if let Spec::Tap { engine, .. } = &mut self {
            *engine = by;
        }
        self
    }

    /// Whether the device may have offloads, so that asking for them is worthwhile. It is not worthwhile
    /// on the embedded network of this process, where nobody but the gateway is.
    fn may_offload(&self) -> bool {
        match self {
            #[cfg(target_os = "linux")]
            Spec::Tap { .. } => true,
            Spec::Vmnet(_) => true,
            Spec::Wire(wire) => wire.header,
            Spec::Embedded { .. } | Spec::Pcap(_) | Spec::Capture(_) => false,
        }
    }

    /// What keeps the guest behind this end from what its mode promises, as far as it is known.
    pub(crate) fn obstacle(&self) -> Option<String> {
        match self {
            #[cfg(target_os = "linux")]
            Spec::Tap { name, mode: Some(mode), .. } => {
                vmring::Tap::forwarding().ok()?.obstacle(name, mode)
            }
            _ => None,
        }
    }

    /// Whether the end is an embedded network.
    pub(crate) fn is_embedded(&self) -> bool {
        matches!(self, Spec::Embedded { .. })
    }

    /// Whether the end has a DHCP server of ours.
    pub(crate) fn has_dhcp(&self) -> bool {
        match self {
            Spec::Embedded { .. } => true,
            #[cfg(target_os = "linux")]
            Spec::Tap { mode, .. } => {
                matches!(mode, Some(vmring::Mode::Host | vmring::Mode::Shared))
            }
            Spec::Vmnet(_) | Spec::Wire(_) | Spec::Pcap(_) | Spec::Capture(_) => false,
        }
    }

    pub(crate) fn start(
        &self,
        offloads: Offloads,
        mtu: Option<u32>,
        settings: NetworkArgs<'_>,
    ) -> Result<End, Failure> {
        let builder = || {
            let builder = Interface::builder().offloads(offloads);
            match mtu {
                Some(mtu) => builder.mtu(mtu),
                None => builder,
            }
        };
        let started = |builder: InterfaceBuilder| builder.start().map_err(|e| self.failure(e));
        let name = self.to_string();
        match self {
            Spec::Embedded { network, subnet } => {
                let builder = match subnet {
                    Some(range) => builder().ipv4(*range),
                    None => builder(),
                };
                let driver = Embedded::network(network).overflow(QUEUE);
                let driver = settings.nat.embedded(settings.dhcp.embedded(driver));
                let interface = started(builder.device(driver))?;
                Ok(End::of(&name, interface))
            }
            #[cfg(target_os = "linux")]
            Spec::Tap { name: tap, mode, subnet, engine } => {
                // Without a mode the administrator sets up the host's end.
                let driver = vmring::Tap::named(tap).configure(mode.is_some()).engine(*engine);
                let driver = settings.dhcp.tap(driver);
                let builder = match mode {
                    Some(mode) => builder().mode(mode.clone()),
                    None => builder(),
                };
                let builder = match subnet {
                    Some(range) => builder.ipv4(*range),
                    None => builder,
                };
                let interface = started(builder.device(driver))?;
                Ok(End::of(&name, interface))
            }
            Spec::Vmnet(vmnet) => {
                // The interface keeps the network while it runs.
                let network = vmnet.create(mtu).map_err(|error| self.failure(error))?;
                let builder = Interface::builder().offloads(offloads);
                let (builder, driver) = vmnet.place(network.as_ref(), mtu, builder);
                let interface = started(builder.device(driver))?;
                Ok(End::of(&name, interface))
            }
            Spec::Wire(wire) => {
                let interface = started(builder().device(wire.driver()))?;
                Ok(End::of(&name, interface))
            }
            Spec::Pcap(file) => {
                let replay = Replay::open(file).map_err(|error| {
                    let (file, why) = (file.display(), why(error));
                    Failure::Usage(format!("the file '{file}' cannot be replayed: {why}"))
                })?;
                let interface = started(builder().device(replay.clone()))?;
                Ok(End { replay: Some(replay), ..End::of(&name, interface) })
            }
            Spec::Capture(file) => {
                let recording = Recording::create(file)?;
                let driver = recording.capture.wrap("bridge", Replay::nothing());
                match started(builder().device(driver)) {
                    Ok(interface) => {
                        Ok(End { recording: Some(recording), ..End::of(&name, interface) })
                    }
                    Err(failure) => {
                        recording.discard();
                        Err(failure)
                    }
                }
            }
        }
    }

    fn failure(&self, error: Error) -> Failure {
        match Failure::starting(error) {
            Failure::Usage(sentence) => Failure::Usage(format!("{self}: {sentence}")),
            Failure::Step(sentence) => Failure::Step(format!("{self}: {sentence}")),
        }
    }
}

/// Starts an end with as many of the `wanted` offloads as it grants.
pub(crate) fn start_with_most(
    wanted: Offloads,
    mut start: impl FnMut(Offloads) -> Result<End, Failure>,
) -> Result<End, Failure> {
    let none = Offloads::default();
    let (mut tcp, mut checksum) = (Offloads::ALL, none);
    tcp.uso = false;
    (checksum.checksum, checksum.virtio_header) = (true, true);
    let mut tried = none;
    for step in [Offloads::ALL, tcp, checksum] {
        let offloads = step & wanted;
        if offloads == none || offloads == tried {
            continue;
        }
        tried = offloads;
        match start(offloads) {
            // It does not have these offloads. With fewer it may start, or report what is really
            // wrong.
            Err(Failure::Usage(_)) => {}
            started => return started,
        }
    }
    start(none)
}

/// Restarts an end that has more offloads than both have in common. If an end cannot have exactly
/// the common ones, both start without offloads.
pub(crate) fn start_alike(
    mut ends: [End; 2],
    mut start: impl FnMut(usize, Offloads) -> Result<End, Failure>,
) -> Result<[End; 2], Failure> {
    let none = Offloads::default();
    let mut common = ends[0].offloads() & ends[1].offloads();
    if !common.virtio_header {
        // Without the header nothing says which work is left undone.
        common = none;
    }
    for common in [common, none] {
        for (i, end) in ends.iter_mut().enumerate() {
            if end.offloads() == common {
                continue;
            }
            // The old interface is stopped first, because a system may allow only one.
            end.interface.stop(STOP_TIMEOUT).map_err(Failure::starting)?;
            *end = match start(i, common) {
                Err(Failure::Usage(_)) if common != none => start(i, none)?,
                started => started?,
            };
        }
        if ends[0].offloads() == ends[1].offloads() {
            break;
        }
    }
    Ok(ends)
}

/// Starts both ends so that a packet from one can go into the other. Either each end offloads what
/// it can and the rest is done in software, or both ends offload the same (or nothing). The end `plain`
/// offloads nothing.
pub(crate) fn start(
    specs: [&Spec; 2],
    offload: Offload,
    plain: Option<WhichEnd>,
    mtu: Option<u32>,
    settings: NetworkArgs<'_>,
) -> Result<[End; 2], Failure> {
    // A capture is started last, so that its file is only touched if all else has started.
    let order = if matches!(specs[0], Spec::Capture(_)) { [1, 0] } else { [0, 1] };
    let software = offload == Offload::Software;
    let is_plain = |i: usize| plain == Some([WhichEnd::A, WhichEnd::B][i]);
    let may_offload = |i: usize| specs[i].may_offload() && !is_plain(i);
    let wanted = |i: usize| match may_offload(i) {
        true if software || offload == Offload::Common && may_offload(1 - i) => Offloads::ALL,
        _ => Offloads::default(),
    };
    let start =
        |i: usize| start_with_most(wanted(i), |offloads| specs[i].start(offloads, mtu, settings));
    let (one, other) = (start(order[0])?, start(order[1])?);
    let ends = if order == [0, 1] { [one, other] } else { [other, one] };
    if software {
        return Ok(ends);
    }
    start_alike(ends, |i, offloads| specs[i].start(offloads, mtu, settings))
}
