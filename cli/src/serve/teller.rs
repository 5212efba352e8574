//! [`Teller`]: says what happens in a server. `vmring serve` says it in its own words; a command that takes
//! the part of another helper says it in that helper's.

use std::fmt;
use std::net::Ipv6Addr;
use std::time::Duration;

use vmring::{Interface, Ipv4Range, MacAddr6};

use super::connection::Ended;
use super::counts::Counts;
use super::spec::ListenSpec;
use crate::failure::Failure;
use crate::progress::say;

/// Says what happens in a server. The main thread calls it.
pub(crate) trait Teller {
    /// Says that this has happened.
    ///
    /// # Errors
    ///
    /// [`Failure::Step`] ends the server. It is for what somebody waits for and cannot be told.
    fn tell(&self, event: &Event<'_>) -> Result<(), Failure>;

    /// Whether a report is printed to stdout, on a signal and at the end, and a table is shown on a
    /// terminal.
    fn reports(&self) -> bool;

    /// How often [`Event::Counted`] happens. `None` if it never does.
    fn interval(&self) -> Option<Duration> {
        None
    }
}

/// What happens in a server.
pub(crate) enum Event<'a> {
    /// The network has started. No guest can join yet.
    Started(&'a NetworkFacts),
    /// The process has become this user, and stays it.
    Became { uid: u32, gid: u32 },
    /// Guests can join.
    Ready(&'a Ready<'a>),
    /// A guest has connected, or has sent the first datagram.
    Joined { spec: &'a ListenSpec, guest: u64, unsaid: u64 },
    /// A guest that was connected, or could not be, is so no more.
    Left { spec: &'a ListenSpec, guest: u64, how: &'a Ended, unsaid: u64 },
    /// A connection could not be made or accepted.
    Refused { spec: &'a ListenSpec, error: &'a std::io::Error, unsaid: u64 },
    /// A thing to know about the server, in a few words.
    Note(&'a str),
    /// The time of the [interval](Teller::interval) is over. These are the counts of all guests so far.
    Counted(&'a Counts),
}

/// Where guests can join, and what does not hold there.
pub(crate) struct Ready<'a> {
    pub(crate) sockets: Vec<&'a ListenSpec>,
    pub(crate) notes: Vec<String>,
    pub(crate) network: &'a str,
    /// The time after which the server ends by itself.
    pub(crate) seconds: Option<u64>,
}

/// The properties of a started network.
#[derive(Clone, Debug)]
pub(crate) struct NetworkFacts {
    /// The MAC address that the first guest is to use.
    pub(crate) mac: MacAddr6,
    pub(crate) interface_id: [u8; 16],
    pub(crate) mtu: u32,
    pub(crate) max_packet_size: u32,
    pub(crate) ipv4: Option<Ipv4Range>,
    pub(crate) nat66_prefix: Option<Ipv6Addr>,
    pub(crate) read_batch: u32,
    pub(crate) write_batch: u32,
}

impl NetworkFacts {
    pub(super) fn of(interface: &Interface) -> Self {
        let (info, caps) = (interface.info(), interface.capabilities());
        Self {
            mac: info.mac,
            interface_id: info.interface_id,
            mtu: info.mtu,
            max_packet_size: info.max_packet_size,
            ipv4: info.ipv4,
            nat66_prefix: info.nat66_prefix,
            read_batch: caps.max_read_batch,
            write_batch: caps.max_write_batch,
        }
    }
}

/// The words of `vmring serve`, on stderr.
pub(super) struct Console;

impl Teller for Console {
    fn tell(&self, event: &Event<'_>) -> Result<(), Failure> {
        match event {
            Event::Started(_) | Event::Became { .. } | Event::Counted(_) => {}
            Event::Ready(ready) => {
                let Ready { sockets, notes, network, seconds } = ready;
                sockets.iter().for_each(|spec| say(&format!("  {spec}")));
                notes.iter().for_each(|note| say(&format!("  note: {note}")));
                let end = match seconds {
                    Some(seconds) => format!(" for {seconds} s"),
                    None => "; Ctrl-C ends it".to_owned(),
                };
                say(&format!("  guests can join {network}{end}"));
            }
            Event::Joined { .. } | Event::Left { .. } | Event::Refused { .. } | Event::Note(_) => {
                say(&format!("  {event}"));
            }
        }
        Ok(())
    }

    fn reports(&self) -> bool {
        true
    }
}

impl fmt::Display for Event<'_> {
    /// Writes what has happened to a guest or a socket. The other events have no words of their own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unsaid = match self {
            Event::Joined { spec, guest, unsaid } => {
                write!(f, "{spec}: guest {guest} is here")?;
                *unsaid
            }
            Event::Left { spec, guest, how, unsaid } => {
                write!(f, "{spec}: guest {guest} {how}")?;
                *unsaid
            }
            Event::Refused { spec, error, unsaid } => {
                write!(f, "{spec}: no connection: {error}")?;
                *unsaid
            }
            Event::Note(note) => return f.write_str(note),
            Event::Started(_) | Event::Became { .. } | Event::Ready(_) | Event::Counted(_) => 0,
        };
        if unsaid > 0 {
            write!(f, " ({unsaid} more were not said)")?;
        }
        Ok(())
    }
}
