//! Sockets of a server, as the command line has them. The network is in [`network`].

mod network;
#[cfg(test)]
mod tests;

use std::fmt;
use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::unistd::Gid;
use vmring::MacAddr6;
use vmring::device::Offloads;
use vmring::device::embedded::{PortLimits, Rate};

use super::limits::{PAIRS_MAX, SEATS_MAX};
use crate::failure::Failure;
use crate::size::Size;
use crate::wire::WireKind;

pub(crate) use network::{NetworkSettings, NetworkSpec};

/// What goes over a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    VhostUser,
    /// Frames.
    Wire(WireKind),
}

/// How a kind of socket is written, and what it may have. A socket of a new kind is one more row of
/// [`WIRES`].
struct Wire {
    kind: Kind,
    /// It begins like this, with a colon.
    name: &'static str,
    /// Whether this process may connect to a front end that listens.
    client: bool,
    /// Its own options. The others are for every kind.
    options: &'static [&'static str],
}

const WIRES: &[Wire] = &[
    Wire {
        kind: Kind::VhostUser,
        name: "vhost-user",
        client: true,
        options: &["queues", "config", "seals", "announce"],
    },
    Wire::of_frames(WireKind::Qemu, "qemu", CONNECTED),
    Wire::of_frames(WireKind::QemuDgram, "qemu-dgram", DATAGRAMS),
    Wire::of_frames(WireKind::Vfkit, "vfkit", DATAGRAMS),
    Wire::of_frames(WireKind::Krunkit, "krunkit", DATAGRAMS),
    Wire::of_frames(WireKind::Libkrun, "libkrun", CONNECTED),
    Wire::of_frames(WireKind::SocketVmnet, "socket_vmnet", CONNECTED),
    #[cfg(target_os = "linux")]
    Wire::of_frames(WireKind::Bess, "bess", CONNECTED),
];

/// The options of a wire of frames, with connections and with datagrams.
const CONNECTED: &[&str] = &["vnet_hdr"];
const DATAGRAMS: &[&str] = &["vnet_hdr", "own"];

impl Wire {
    const fn of_frames(
        kind: WireKind,
        name: &'static str,
        options: &'static [&'static str],
    ) -> Self {
        Self { kind: Kind::Wire(kind), name, client: true, options }
    }

    fn of(kind: Kind) -> &'static Self {
        WIRES.iter().find(|wire| wire.kind == kind).expect("each kind is a row")
    }

    /// Every way to write a socket, for sentences.
    fn ways() -> String {
        let names: Vec<_> = WIRES.iter().map(|Wire { name, .. }| format!("{name}:PATH")).collect();
        let paths = names.join(", ");
        format!("{paths}; or NAME (in a private folder), fd=NUMBER or fd=NAME in the PATH's place")
    }
}

/// One `--listen` or `--connect`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListenSpec {
    pub(crate) kind: Kind,
    pub(crate) place: Place,
    pub(crate) mac: Option<MacRule>,
    pub(crate) isolated: bool,
    pub(crate) limits: PortLimits,
    /// The file that records the packets of its guests.
    pub(crate) capture: Option<PathBuf>,
    /// The pairs of a receive and a transmit queue.
    pub(crate) queues: Option<u16>,
    /// Whether the front end may read the configuration space.
    pub(crate) config: bool,
    pub(crate) demand_seals: bool,
    /// Whether the guest announces itself after a migration.
    pub(crate) announce: bool,
    /// Whether the guest may leave checksums and segments to others.
    pub(crate) offload: bool,
    /// Whether they may do so without a header: what is left of a frame is found in the frame.
    pub(crate) implied: bool,
    /// Whether each frame of a wire has a virtio header in front.
    pub(crate) header: bool,
    /// The path of this side of a datagram socket that connects.
    pub(crate) own: Option<PathBuf>,
    /// Whether the one who sends first to a datagram socket is its only guest, and the last one.
    pub(crate) once: bool,
    /// The group whose members may connect, too.
    pub(crate) group: Option<Gid>,
}

/// Where the connections of a `--listen` come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Front ends connect to this path.
    Server(PathBuf),
    /// A front end listens at this path.
    Client(PathBuf),
    /// An inherited descriptor, of a socket that listens or is connected.
    Descriptor(RawFd),
    /// The same, by the name that a service manager has given it (`FileDescriptorName=`).
    Named(String),
}

/// Which source addresses a guest may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MacRule {
    /// Any that belongs to nobody else.
    Any,
    /// The first one that it uses.
    Learn,
    /// This one.
    Fixed(MacAddr6),
}

impl FromStr for MacRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "any" => Ok(MacRule::Any),
            "learn" => Ok(MacRule::Learn),
            _ => match text.parse::<MacAddr6>().ok().filter(MacAddr6::is_unicast) {
                Some(mac) => Ok(MacRule::Fixed(mac)),
                None => Err(format!(
                    "a guest's address is one like 52:54:00:12:34:56, learn or any, and not '{text}'"
                )),
            },
        }
    }
}

impl fmt::Display for ListenSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", Wire::of(self.kind).name)?;
        match &self.place {
            Place::Server(path) => write!(f, "{}", path.display()),
            Place::Client(path) => write!(f, "{},client", path.display()),
            Place::Descriptor(fd) => write!(f, "fd={fd}"),
            Place::Named(name) => write!(f, "fd={name}"),
        }
    }
}

/// Splits at commas. Two commas are one comma of a name, as QEMU has it.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match (letter, parts.last_mut()) {
            (',', Some(last)) if letters.next_if_eq(&',').is_some() => last.push(','),
            (',', _) => parts.push(String::new()),
            (letter, Some(last)) => last.push(letter),
            _ => {}
        }
    }
    parts
}

impl FromStr for ListenSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wire = WIRES.iter().find_map(|wire| {
            let rest = text.strip_prefix(wire.name)?.strip_prefix(':')?;
            Some((wire, rest))
        });
        let Some((wire, rest)) = wire else {
            return Err(format!("there is no wire '{text}'; use {}", Wire::ways()));
        };
        let mut parts = parts(rest).into_iter();
        let mut spec = Self::new(wire.kind, wire.place(&parts.next().unwrap_or_default())?);
        for option in parts {
            spec.set(wire, &option)?;
        }
        if spec.implied && spec.header {
            return Err("with vnet_hdr nothing is implied: leave offload=implied out".to_owned());
        }
        if spec.own.is_some() && !matches!(spec.place, Place::Client(_)) {
            return Err("'own' is for a socket that connects: add client".to_owned());
        }
        Ok(spec)
    }
}

impl Wire {
    fn place(&self, text: &str) -> Result<Place, String> {
        match text.strip_prefix("fd=") {
            Some(fd) if fd.bytes().all(|byte| byte.is_ascii_digit()) => match fd.parse() {
                Ok(fd) if fd > 2 => Ok(Place::Descriptor(fd)),
                _ => {
                    Err(format!("an inherited descriptor is 3 or more, or a name, and not '{fd}'"))
                }
            },
            Some(name) => Ok(Place::Named(name.to_owned())),
            None if text.is_empty() => {
                Err(format!("a socket needs a path, like {}:/run/vm0.sock", self.name))
            }
            None => Ok(Place::Server(text.into())),
        }
    }
}

/// The options of every socket, for sentences.
const OPTIONS: &str = "mac=ADDRESS, isolated, offload=off, capture=FILE, or a limit like rate=8M";

impl ListenSpec {
    /// Sets an option, as `name` or `name=value`.
    fn set(&mut self, wire: &Wire, option: &str) -> Result<(), String> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let is_own = WIRES.iter().any(|wire| wire.options.contains(&name));
        if is_own && !wire.options.contains(&name) {
            return Err(format!("a socket of {} has no option '{name}'", wire.name));
        }
        match (name, value) {
            ("client", "") => match &self.place {
                Place::Server(path) if wire.client => self.place = Place::Client(path.clone()),
                _ if !wire.client => {
                    return Err(format!("{} has no 'client'; the front end connects", wire.name));
                }
                _ => return Err("a client needs a path, and one 'client'".to_owned()),
            },
            ("mac", mac) => self.mac = Some(mac.parse()?),
            ("isolated", "") => self.isolated = true,
            ("config", "") => self.config = true,
            ("seals", "") => self.demand_seals = true,
            ("announce", "") => self.announce = true,
            ("offload", "on" | "off") => self.offload = value == "on",
            ("offload", "implied") if self.has_one_peer() => self.implied = true,
            ("offload", "implied") => {
                return Err(format!("offload=implied is for datagrams, and not for {}", wire.name));
            }
            ("vnet_hdr", "") => self.header = true,
            ("own", "") => return Err("own needs a path, like own=/run/vm0.own".into()),
            ("own", path) => self.own = Some(path.into()),
            ("queues", number) => self.queues = Some(queues(number)?),
            ("rate", rate) => {
                let rate = Some(bytes(rate)?);
                (self.limits.send.bytes, self.limits.receive.bytes) = (rate, rate);
            }
            ("send", rate) => self.limits.send.bytes = Some(bytes(rate)?),
            ("receive", rate) => self.limits.receive.bytes = Some(bytes(rate)?),
            ("send-packets", rate) => self.limits.send.packets = Some(packets(rate)?),
            ("receive-packets", rate) => self.limits.receive.packets = Some(packets(rate)?),
            ("floods", rate) => self.limits.flood = Some(packets(rate)?),
            ("capture", "") => return Err("a capture needs a file, like capture=vm0.pcapng".into()),
            ("capture", file) => self.capture = Some(file.into()),
            _ => {
                let own = wire.options.join(", ");
                let client = if wire.client { "client, " } else { "" };
                return Err(format!(
                    "there is no option '{option}' of a socket; use {client}{own}, {OPTIONS} (a \
                     comma in a path is written twice)"
                ));
            }
        }
        Ok(())
    }
}

fn queues(number: &str) -> Result<u16, String> {
    match number.parse() {
        Ok(pairs) if (1..=PAIRS_MAX).contains(&pairs) => Ok(pairs),
        _ => Err(format!("a guest has 1 to {PAIRS_MAX} pairs of queues, and not '{number}'")),
    }
}

/// A limit in bytes per second. An eighth of a second's may pass at once, but at least 64 KiB.
fn bytes(text: &str) -> Result<Rate, String> {
    let Size(bytes) = text.parse()?;
    Ok(rate(bytes, 64 * 1024))
}

/// A limit in packets per second. An eighth of a second's may pass at once, but at least 64.
fn packets(text: &str) -> Result<Rate, String> {
    match text.parse() {
        Ok(packets) if packets > 0 => Ok(rate(packets, 64)),
        _ => Err(format!("a limit is 1 or more packets per second, and not '{text}'")),
    }
}

fn rate(per_second: u64, least: u64) -> Rate {
    let at_least = |n: u64, least: u64| NonZeroU64::new(n.max(least)).expect("it is not 0");
    Rate { per_second: at_least(per_second, 1), burst: at_least(per_second / 8, least) }
}

impl ListenSpec {
    pub(crate) fn new(kind: Kind, place: Place) -> Self {
        Self {
            kind,
            place,
            capture: None,
            mac: None,
            isolated: false,
            limits: PortLimits::default(),
            queues: None,
            config: false,
            demand_seals: false,
            announce: false,
            offload: true,
            implied: false,
            header: false,
            own: None,
            once: false,
            group: None,
        }
    }

    /// The path of the socket that this process makes, if it makes one.
    pub(crate) fn own_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Server(path) => Some(path),
            _ => self.own.as_deref(),
        }
    }

    /// Whether its guests are on a wire of frames.
    pub(crate) fn is_wire(&self) -> bool {
        matches!(self.kind, Kind::Wire(_))
    }

    /// Whether its guests may leave checksums and segments to others. A frame without a header cannot say
    /// what is left, unless it is found in the frame.
    pub(crate) fn may_offload(&self) -> bool {
        self.offload && (self.header || self.implied || !self.is_wire())
    }

    /// The work that its guests may leave to others.
    pub(crate) fn offloads(&self) -> Offloads {
        let mut offloads = if self.may_offload() { Offloads::ALL } else { Offloads::default() };
        // Nothing in a frame says how a large datagram is to be cut.
        offloads.uso &= !self.implied;
        offloads
    }

    /// How many guests can be connected at once. Two guests cannot have one address.
    pub(crate) fn most(&self, all: usize) -> usize {
        match (&self.place, self.mac) {
            (Place::Client(_), _) | (_, Some(MacRule::Fixed(_))) => 1,
            _ if self.has_one_peer() => 1,
            _ => all,
        }
    }

    /// Whether it is a datagram socket, which has one peer at a time and no connections.
    pub(crate) fn has_one_peer(&self) -> bool {
        matches!(self.kind, Kind::Wire(kind) if kind.is_datagram())
    }
}

/// One `--connect`: the same as a `--listen` with `client`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectSpec(pub(crate) ListenSpec);

impl FromStr for ConnectSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = parts(text).into_iter();
        // The client comes first, because other options need it.
        let place = parts.next().unwrap_or_default();
        let options: Vec<_> = parts.filter(|option| option != "client").collect();
        let whole = [place, "client".to_owned()].into_iter().chain(options);
        let doubled: Vec<_> = whole.map(|part| part.replace(',', ",,")).collect();
        doubled.join(",").parse().map(Self)
    }
}

/// Refuses more sockets than there are places for guests: each socket has one of its own.
pub(crate) fn check_number(listens: &[ListenSpec], connections: u32) -> Result<(), Failure> {
    let over_vhost_user = listens.iter().filter(|spec| !spec.is_wire()).count();
    if over_vhost_user > SEATS_MAX as usize {
        return Err(Failure::Usage(format!(
            "there are {over_vhost_user} sockets of vhost-user, and a server has at most {SEATS_MAX}"
        )));
    }
    if listens.len() > connections as usize {
        return Err(Failure::Usage(format!(
            "each of the {} sockets has a place for a guest, and --connections {connections} is fewer",
            listens.len()
        )));
    }
    Ok(())
}

/// Refuses two that need the same.
pub(crate) fn check(listens: &[ListenSpec]) -> Result<(), Failure> {
    for (i, one) in listens.iter().enumerate() {
        for other in &listens[..i] {
            let is_same = |a: Option<&Path>, b: Option<&Path>| a.is_some() && a == b;
            if one.place == other.place || is_same(one.own_path(), other.own_path()) {
                return Err(Failure::Usage(format!("'{one}' is there twice; name two sockets")));
            }
            if let (Some(file), true) = (&one.capture, one.capture == other.capture) {
                return Err(Failure::Usage(format!(
                    "'{one}' and '{other}' have the same capture '{}'; name a file for each",
                    file.display()
                )));
            }
            if let (Some(MacRule::Fixed(mac)), true) = (one.mac, one.mac == other.mac) {
                return Err(Failure::Usage(format!(
                    "'{one}' and '{other}' have the same address {mac}; give each guest its own"
                )));
            }
        }
    }
    Ok(())
}
