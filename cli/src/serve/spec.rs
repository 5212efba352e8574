//! Networks and sockets of a server, as the command line has them.

use std::fmt;
use std::num::NonZeroU64;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use vmring::MacAddr6;
use vmring::device::embedded::{PortLimits, Rate};

use crate::bridge::spec::Spec;
use crate::device::VMNET;
use crate::failure::Failure;
use crate::size::Size;

/// One `--network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkSpec(pub(super) Spec);

impl FromStr for NetworkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = text.split(':').next().unwrap_or_default();
        let tap = if cfg!(target_os = "linux") { ", tap:NAME" } else { "" };
        match kind {
            "embedded" | VMNET => text.parse().map(Self),
            #[cfg(target_os = "linux")]
            "tap" => text.parse().map(Self),
            _ if kind == "vmnet" => Err(format!(
                "the vmnet device exists on macOS only; use embedded:NAME{tap} or {VMNET}"
            )),
            _ => Err(format!(
                "'{text}' is no network of a server; use embedded:NAME{tap} or {VMNET}"
            )),
        }
    }
}

impl fmt::Display for NetworkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl NetworkSpec {
    /// Whether it leads to a network outside of this process, which takes privileges to start. The
    /// simulated vmnet is inside.
    pub(super) fn needs_privileges(&self) -> bool {
        !matches!(self.0, Spec::Embedded { .. }) && !self.is_simulated()
    }

    /// Whether it has a DHCP server of ours.
    pub(super) fn has_dhcp(&self) -> bool {
        self.0.has_dhcp()
    }

    /// What keeps the guests from what the network promises, as far as it is known.
    pub(super) fn obstacle(&self) -> Option<String> {
        self.0.obstacle()
    }

    pub(super) fn is_tap(&self) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.0, Spec::Tap { .. }) {
            return true;
        }
        false
    }

    pub(super) fn is_simulated(&self) -> bool {
        matches!(self.0, Spec::Vmnet(_)) && !cfg!(target_os = "macos")
    }

    /// Whether the host's end of a TAP is set up, and is put back at the end.
    pub(super) fn changes_host(&self) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.0, Spec::Tap { mode: Some(_), .. }) {
            return true;
        }
        false
    }
}

/// One `--listen`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListenSpec {
    pub(crate) place: Place,
    pub(crate) mac: Option<MacRule>,
    pub(crate) isolated: bool,
    pub(crate) limits: PortLimits,
    /// The pairs of a receive and a transmit queue.
    pub(crate) queues: Option<u16>,
    /// Whether the front end may read the configuration space.
    pub(crate) config: bool,
    pub(crate) demand_seals: bool,
    /// Whether the guest announces itself after a migration.
    pub(crate) announce: bool,
    /// Whether the guest may leave checksums and segments to others.
    pub(crate) offload: bool,
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
        match &self.place {
            Place::Server(path) => write!(f, "vhost-user:{}", path.display()),
            Place::Client(path) => write!(f, "vhost-user:{},client", path.display()),
            Place::Descriptor(fd) => write!(f, "vhost-user:fd={fd}"),
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
        let Some(rest) = text.strip_prefix("vhost-user:") else {
            return Err(format!(
                "there is no wire '{text}'; use vhost-user:PATH or vhost-user:fd=NUMBER"
            ));
        };
        let mut parts = parts(rest).into_iter();
        let place = parts.next().unwrap_or_default();
        let place = match place.strip_prefix("fd=") {
            Some(number) => match number.parse() {
                Ok(fd) if fd > 2 => Place::Descriptor(fd),
                _ => return Err(format!("an inherited descriptor is 3 or more, not '{number}'")),
            },
            None if place.is_empty() => {
                return Err("a socket needs a path, like vhost-user:/run/vm0.sock".to_owned());
            }
            None => Place::Server(place.into()),
        };
        let mut spec = Self::new(place);
        for option in parts {
            match option.split_once('=').unwrap_or((&option, "")) {
                ("client", "") => match spec.place {
                    Place::Server(path) => spec.place = Place::Client(path),
                    _ => return Err("a client needs a path, and one 'client'".to_owned()),
                },
                ("mac", mac) => spec.mac = Some(mac.parse()?),
                ("isolated", "") => spec.isolated = true,
                ("config", "") => spec.config = true,
                ("seals", "") => spec.demand_seals = true,
                ("announce", "") => spec.announce = true,
                ("offload", "on" | "off") => spec.offload = option == "offload=on",
                ("queues", number) => spec.queues = Some(queues(number)?),
                ("send", rate) => spec.limits.send.bytes = Some(bytes(rate)?),
                ("receive", rate) => spec.limits.receive.bytes = Some(bytes(rate)?),
                ("send-packets", rate) => spec.limits.send.packets = Some(packets(rate)?),
                ("receive-packets", rate) => spec.limits.receive.packets = Some(packets(rate)?),
                ("floods", rate) => spec.limits.flood = Some(packets(rate)?),
                _ => {
                    return Err(format!(
                        "there is no option '{option}' of a socket; use client, mac=ADDRESS, \
                         isolated, queues=NUMBER, config, seals, announce, offload=off or a limit (a \
                         comma in a path is written twice)"
                    ));
                }
            }
        }
        Ok(spec)
    }
}

fn queues(number: &str) -> Result<u16, String> {
    match number.parse() {
        Ok(pairs) if (1..=128).contains(&pairs) => Ok(pairs),
        _ => Err(format!("a guest has 1 to 128 pairs of queues, and not '{number}'")),
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
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            mac: None,
            isolated: false,
            limits: PortLimits::default(),
            queues: None,
            config: false,
            demand_seals: false,
            announce: false,
            offload: true,
        }
    }

    /// The path of the socket, if this process makes it.
    pub(crate) fn own_path(&self) -> Option<&Path> {
        match &self.place {
            Place::Server(path) => Some(path),
            _ => None,
        }
    }

    /// How many guests can be connected at once. Two guests cannot have one address.
    pub(crate) fn most(&self, all: usize) -> usize {
        match (&self.place, self.mac) {
            (Place::Server(_) | Place::Descriptor(_), Some(MacRule::Fixed(_))) => 1,
            (Place::Client(_), _) => 1,
            _ => all,
        }
    }
}

/// Refuses two that need the same.
pub(crate) fn check(listens: &[ListenSpec]) -> Result<(), Failure> {
    for (i, one) in listens.iter().enumerate() {
        for other in &listens[..i] {
            if one.place == other.place {
                return Err(Failure::Usage(format!("'{one}' is there twice; name two sockets")));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ListenSpec {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_socket_is_written_with_its_options() {
        let plain = ListenSpec::new(Place::Server("/run/a.sock".into()));
        assert_eq!(spec("vhost-user:/run/a.sock"), plain);
        assert_eq!(spec("vhost-user:fd=3").place, Place::Descriptor(3));
        let all = spec(
            "vhost-user:a,,b:c,client,mac=52:54:00:00:00:01,isolated,queues=4,config,seals,announce,\
             offload=off,send=8M,receive=1K,send-packets=1000,receive-packets=1,floods=9",
        );
        let rate = |per_second, burst| {
            let number = |n| NonZeroU64::new(n).expect("it is not 0");
            Some(Rate { per_second: number(per_second), burst: number(burst) })
        };
        let mut limits = PortLimits::default();
        limits.send.bytes = rate(8 << 20, 1 << 20);
        limits.receive.bytes = rate(1024, 65_536);
        limits.send.packets = rate(1000, 125);
        limits.receive.packets = rate(1, 64);
        limits.flood = rate(9, 64);
        assert_eq!(
            all,
            ListenSpec {
                place: Place::Client("a,b:c".into()),
                mac: Some(MacRule::Fixed(MacAddr6::new(0x52, 0x54, 0, 0, 0, 1))),
                isolated: true,
                limits,
                queues: Some(4),
                config: true,
                demand_seals: true,
                announce: true,
                offload: false,
            }
        );
        assert_eq!(spec("vhost-user:a,mac=learn").mac, Some(MacRule::Learn));
        assert_eq!(spec("vhost-user:a,mac=any").mac, Some(MacRule::Any));
        assert_eq!(spec("vhost-user:fd=3").to_string(), "vhost-user:fd=3");
    }

    #[test]
    fn what_is_no_socket_is_refused_in_a_sentence() {
        for (text, said) in [
            ("/run/a.sock", "there is no wire '/run/a.sock'"),
            ("qemu:/run/a.sock", "use vhost-user:PATH"),
            ("vhost-user:", "needs a path"),
            ("vhost-user:,client", "needs a path"),
            ("vhost-user:fd=2", "is 3 or more, not '2'"),
            ("vhost-user:fd=x", "not 'x'"),
            ("vhost-user:fd=3,client", "a client needs a path"),
            ("vhost-user:a,client,client", "one 'client'"),
            ("vhost-user:a,mac=01:00:5e:00:00:01", "learn or any"),
            ("vhost-user:a,queues=0", "1 to 128 pairs"),
            ("vhost-user:a,queues=129", "1 to 128 pairs"),
            ("vhost-user:a,isolated=yes", "no option 'isolated=yes'"),
            ("vhost-user:a,offload=some", "no option 'offload=some'"),
            ("vhost-user:a,frob", "no option 'frob'"),
            ("vhost-user:a,send=fast", "a size is a number of bytes"),
            ("vhost-user:a,floods=0", "1 or more packets per second, and not '0'"),
            ("vhost-user:a,b", "written twice"),
        ] {
            let sentence = text.parse::<ListenSpec>().unwrap_err();
            assert!(sentence.contains(said), "{text}: {sentence}");
        }
    }

    #[test]
    fn two_guests_have_two_sockets_and_two_addresses() {
        let check = |list: &[&str]| check(&list.iter().map(|text| spec(text)).collect::<Vec<_>>());
        assert!(check(&["vhost-user:a", "vhost-user:b", "vhost-user:fd=3"]).is_ok());
        assert!(check(&["vhost-user:a,mac=learn", "vhost-user:b,mac=learn"]).is_ok());
        for (list, said) in [
            (["vhost-user:a", "vhost-user:a,isolated"], "'vhost-user:a' is there twice"),
            (["vhost-user:fd=3", "vhost-user:fd=3"], "twice"),
            (
                ["vhost-user:a,mac=52:54:00:00:00:01", "vhost-user:b,mac=52:54:00:00:00:01"],
                "the same address 52:54:00:00:00:01",
            ),
        ] {
            let failure = check(&list).unwrap_err();
            assert!(failure.to_string().contains(said), "{failure}");
            assert_eq!(failure.exit_code(), 2);
        }
    }

    #[test]
    fn an_address_is_for_one_guest_at_a_time() {
        for (text, most) in [
            ("vhost-user:a", 64),
            ("vhost-user:a,mac=learn", 64),
            ("vhost-user:a,mac=52:54:00:00:00:01", 1),
            ("vhost-user:a,client", 1),
        ] {
            assert_eq!(spec(text).most(64), most, "{text}");
        }
    }
}
