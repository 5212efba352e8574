//! [`Controller`]: the control queue, for drivers of a transport inside the VMM.

use crate::net::running::{BURST, Context, RunningQueue, Turn, Verdict};
use crate::net::window::State;
use crate::queue::Chain;

/// The answers of a command (virtio 1.2, section 5.1.6.5).
const OK: u8 = 0;
const ERR: u8 = 1;

/// The most entries of both tables of MAC addresses together that a command may have. Linux sends what
/// an administrator has added, which is a few.
const MACS_MAX: u32 = 1024;
/// The most bytes of a command that matter: its class, its number and the two tables.
const COMMAND_MAX: usize = 2 + 8 + MACS_MAX as usize * 6;

/// A command that is well-formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// VIRTIO_NET_CTRL_RX, or VIRTIO_NET_CTRL_MAC_TABLE_SET: what the driver wants to receive.
    Filter,
    /// VIRTIO_NET_CTRL_MAC_ADDR_SET.
    SetMac([u8; 6]),
    /// VIRTIO_NET_CTRL_ANNOUNCE_ACK.
    AcknowledgeAnnouncement,
    /// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
    SetPairs(u16),
    /// VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
    SetOffloads(u64),
}

impl Command {
    /// The command in these bytes: its class, its number, and what belongs to it. `None` if it is not
    /// one of those that the device knows, or is too short.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (&[class, number], data) = bytes.split_first_chunk()?;
        Some(match (class, number) {
            (0, 0 | 1) => {
                data.first()?;
                Command::Filter
            }
            (1, 0) => {
                let rest = macs(data)?;
                macs(rest)?;
                Command::Filter
            }
            (1, 1) => Command::SetMac(*data.first_chunk()?),
            (3, 0) => Command::AcknowledgeAnnouncement,
            (4, 0) => Command::SetPairs(u16::from_le_bytes(*data.first_chunk()?)),
            (5, 0) => Command::SetOffloads(u64::from_le_bytes(*data.first_chunk()?)),
            _ => return None,
        })
    }
}

/// What is behind a table of MAC addresses. `None` if the table is not complete.
fn macs(bytes: &[u8]) -> Option<&[u8]> {
    let (entries, rest) = bytes.split_first_chunk()?;
    let entries = u32::from_le_bytes(*entries);
    if entries > MACS_MAX {
        return None;
    }
    rest.get(entries as usize * 6..)
}

/// The control queue.
#[derive(Debug, Default)]
pub(super) struct Controller {
    pub(super) running: Option<RunningQueue>,
    /// A command, as it was copied.
    bytes: Vec<u8>,
}

impl Controller {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn forget(&mut self) {
        self.bytes = Vec::new();
    }

    /// Takes commands, at most a burst of them, and carries each out. `carry_out` returns whether the
    /// driver may give the command. The driver gets the answers by [`answer`](Self::answer).
    pub(super) fn poll(
        &mut self,
        cx: Context<'_>,
        mut carry_out: impl FnMut(Command) -> bool,
    ) -> Turn {
        let Self { running, bytes } = self;
        let Some(running) = running else { return Turn::default() };
        let mut answered = Vec::new();
        let taken = running.take(cx, BURST, &mut |chain: Chain<'_>, number: u32| {
            copy(&chain, bytes);
            let good = Command::parse(bytes).is_some_and(&mut carry_out);
            match good {
                true => cx.counters.commands.add(1),
                false => cx.counters.commands_refused.add(1),
            }
            let len = write_answer(&chain, if good { OK } else { ERR });
            answered.push((number, len));
            Verdict::Posted
        });
        for (number, len) in answered {
            running.window.end(number.into(), State::Done(len));
        }
        Turn { moved: taken > 0, again: taken == BURST }
    }

    /// Gives the driver the answers of the commands that were carried out.
    pub(super) fn answer(&mut self, cx: Context<'_>) {
        if let Some(running) = &mut self.running {
            running.settle(cx);
        }
    }
}

/// Copies a command out once. What is longer than any command is left out.
fn copy(chain: &Chain<'_>, to: &mut Vec<u8>) {
    let len = usize::try_from(chain.readable_len()).map_or(COMMAND_MAX, |len| len.min(COMMAND_MAX));
    to.clear();
    to.resize(len, 0);
    let mut copied = 0;
    for segment in chain.readable() {
        copied += segment.copy_to(&mut to[copied..]);
    }
}

/// Writes the answer into the first byte that the device may write. Returns how many were written.
fn write_answer(chain: &Chain<'_>, answer: u8) -> u32 {
    match chain.writable().next() {
        Some(place) => {
            place.copy_from(&[answer]);
            place.mark_dirty(1);
            1
        }
        None => 0,
    }
}

/// A RARP packet with which a host tells everybody where its MAC address is (RFC 903, a request for its
/// own address), as `qemu_announce_self` sends it. It has the length of the shortest Ethernet frame,
/// without its check sequence.
pub(super) fn rarp(mac: [u8; 6]) -> [u8; 60] {
    let mut packet = [0; 60];
    let fields: [&[u8]; 9] = [
        &[0xff; 6],
        &mac,
        // RARP, for Ethernet and IPv4, with addresses of these lengths.
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4],
        // "Request reverse".
        &[0, 3],
        &mac,
        &[0; 4],
        &mac,
        &[0; 4],
        &[],
    ];
    let mut at = 0;
    for field in fields {
        packet[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_parsed_whole_or_not_at_all() {
        assert_eq!(Command::parse(&[4, 0, 3, 0]), Some(Command::SetPairs(3)));
        assert_eq!(Command::parse(&[4, 0, 3]), None);
        assert_eq!(Command::parse(&[4, 1, 3, 0]), None, "RSS is not offered");
        assert_eq!(Command::parse(&[3, 0]), Some(Command::AcknowledgeAnnouncement));
        assert_eq!(Command::parse(&[2, 0, 1, 0]), None, "VLAN filters are not offered");
        assert_eq!(Command::parse(&[0, 0, 1]), Some(Command::Filter));
        assert_eq!(Command::parse(&[0, 2, 1]), None, "CTRL_RX_EXTRA is not offered");
        assert_eq!(Command::parse(&[0, 0]), None);
        assert_eq!(
            Command::parse(&[1, 1, 2, 0, 0, 0, 0, 9]),
            Some(Command::SetMac([2, 0, 0, 0, 0, 9]))
        );
        assert_eq!(Command::parse(&[]), None);
    }

    #[test]
    fn tables_of_addresses_have_a_bound() {
        let table = |entries: u32| {
            let mut bytes = entries.to_le_bytes().to_vec();
            bytes.resize(4 + entries.min(2000) as usize * 6, 2);
            bytes
        };
        let command = |first, second| [vec![1, 0], table(first), table(second)].concat();
        assert_eq!(Command::parse(&command(2, 3)), Some(Command::Filter));
        assert_eq!(Command::parse(&command(0, MACS_MAX)), Some(Command::Filter));
        assert_eq!(Command::parse(&command(0, MACS_MAX + 1)), None);
        assert_eq!(Command::parse(&command(u32::MAX, 0)), None);
        let mut short = command(2, 3);
        short.pop();
        assert_eq!(Command::parse(&short), None);
    }
}
