//! What the bytes on a wire mean: the pure part of the socket wires, without a socket.
//!
//! A stream consists of payloads, each with its length in front: 32 bits, big-endian. It is the wire of
//! QEMU's `-netdev stream` and `-netdev socket`, of passt, of socket_vmnet and of libkrun's unixstream.
//! In a socket of messages each message is a payload.
//!
//! A payload is an Ethernet frame. On a wire with a virtio header it is a `virtio_net_hdr` of 12 bytes
//! (virtio 1.2, 5.1.6) and a frame behind it; the length of a stream counts both.

use std::fmt;

use vmring_core::view::ETHERNET_HEADER_LEN;

use super::limits::{LENGTH_LEN, PAYLOAD_MAX};

/// The four bytes by which vfkit, and a VMM that is told to do as vfkit does, announces itself on a
/// datagram socket. They are a datagram of their own.
pub const VFKIT_MAGIC: [u8; 4] = *b"VFKT";

/// Why a payload is not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unfit {
    /// It is shorter than an Ethernet header, or than the two headers.
    Runt,
    /// It is longer than the interface's longest packet.
    TooBig,
}

/// The length of a payload that is above the maximum of all wires. Nothing after it can be understood,
/// so the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LengthAboveMaximum {
    /// The length that was announced, in bytes.
    pub length: u32,
}

impl fmt::Display for LengthAboveMaximum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a length of {} bytes is above the maximum of {PAYLOAD_MAX}", self.length)
    }
}

impl std::error::Error for LengthAboveMaximum {}

/// What the next bytes of a stream are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A whole payload that is to be delivered.
    Payload(&'a [u8]),
    /// A payload that is not delivered begins here. It may have bytes that have not come yet.
    Unfit(Unfit),
    /// Bytes that mean nothing: the rest of a payload that is not delivered, or a length of 0. (A length
    /// of 0 is no frame, and QEMU 7.2 reads nothing any more after one. So none is ever sent.)
    Nothing,
    /// More bytes must come.
    Incomplete,
}

/// Finds the payloads in the bytes of a stream. It keeps no bytes: the caller keeps those that were not
/// used yet, and shows them again with more behind them.
#[derive(Clone, Debug)]
pub struct StreamParser {
    shortest: usize,
    longest: usize,
    /// How many bytes of a payload that is not delivered have not come yet.
    skip: usize,
}

impl StreamParser {
    /// Returns a parser for a wire whose frames have at most `max_packet_size` bytes, with `header`
    /// bytes in front of each (12 or 0).
    pub fn new(max_packet_size: usize, header: usize) -> Self {
        let (shortest, longest) = bounds(max_packet_size, header);
        Self { shortest, longest, skip: 0 }
    }

    /// Says what `bytes`, the oldest bytes that were not used yet, begin with, and how many of them that
    /// is. The next call begins behind those. A call that returns [`Piece::Incomplete`] uses none.
    ///
    /// # Errors
    ///
    /// [`LengthAboveMaximum`]: the stream is over. Each later call returns it again.
    #[inline]
    pub fn next<'a>(&mut self, bytes: &'a [u8]) -> Result<(usize, Piece<'a>), LengthAboveMaximum> {
        if self.skip > 0 {
            let used = self.skip.min(bytes.len());
            self.skip -= used;
            return Ok((used, if used > 0 { Piece::Nothing } else { Piece::Incomplete }));
        }
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_LEN>() else {
            return Ok((0, Piece::Incomplete));
        };
        let length = u32::from_be_bytes(*length);
        let len = length as usize;
        if len > PAYLOAD_MAX {
            return Err(LengthAboveMaximum { length });
        }
        if len == 0 {
            return Ok((LENGTH_LEN, Piece::Nothing));
        }
        if let Err(unfit) = check_len(len, self.shortest, self.longest) {
            self.skip = len;
            return Ok((LENGTH_LEN, Piece::Unfit(unfit)));
        }
        match rest.get(..len) {
            Some(payload) => Ok((LENGTH_LEN + len, Piece::Payload(payload))),
            None => Ok((0, Piece::Incomplete)),
        }
    }

    /// Whether [`next`](Self::next) would find something in these bytes.
    pub fn finds(&self, bytes: &[u8]) -> bool {
        !matches!(self.clone().next(bytes), Ok((_, Piece::Incomplete)))
    }

    /// Whether a stream that ends behind these unused bytes ends within a payload.
    pub fn is_within_payload(&self, unused: &[u8]) -> bool {
        self.skip > 0 || !unused.is_empty()
    }
}

/// What a message of a datagram socket is, by its length and its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A payload that is to be delivered.
    Payload,
    /// The announcement of a VMM, [`VFKIT_MAGIC`]. It may come at any time.
    Magic,
    /// An empty message. It means nothing on a datagram socket.
    Empty,
    /// A payload that is not delivered.
    Unfit(Unfit),
}

/// The lengths of payloads on a wire of messages.
#[derive(Clone, Copy, Debug)]
pub struct MessageRules {
    shortest: usize,
    longest: usize,
}

impl MessageRules {
    /// Returns the rules of a wire whose frames have at most `max_packet_size` bytes, with `header` bytes
    /// in front of each (12 or 0).
    pub fn new(max_packet_size: usize, header: usize) -> Self {
        let (shortest, longest) = bounds(max_packet_size, header);
        Self { shortest, longest }
    }

    /// Says what a message of `len` bytes is. `front` has its first four bytes, if it has as many. If
    /// `cut`, the system has left bytes out that did not fit.
    #[inline]
    pub fn judge(&self, len: usize, front: [u8; 4], cut: bool) -> Message {
        if cut {
            return Message::Unfit(Unfit::TooBig);
        }
        match check_len(len, self.shortest, self.longest) {
            Ok(()) => Message::Payload,
            Err(_) if len == 0 => Message::Empty,
            Err(_) if len == VFKIT_MAGIC.len() && front == VFKIT_MAGIC => Message::Magic,
            Err(unfit) => Message::Unfit(unfit),
        }
    }
}

fn bounds(max_packet_size: usize, header: usize) -> (usize, usize) {
    (header + ETHERNET_HEADER_LEN, header + max_packet_size)
}

#[inline]
fn check_len(len: usize, shortest: usize, longest: usize) -> Result<(), Unfit> {
    if len < shortest {
        Err(Unfit::Runt)
    } else if len > longest {
        Err(Unfit::TooBig)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(payload: &[u8]) -> Vec<u8> {
        [&(payload.len() as u32).to_be_bytes()[..], payload].concat()
    }

    /// What a parser finds in `stream`, which comes in pieces of `at_a_time` bytes.
    fn parse(stream: &[u8], at_a_time: usize) -> Result<Vec<Vec<u8>>, LengthAboveMaximum> {
        let mut parser = StreamParser::new(100, 0);
        let (mut found, mut unused) = (Vec::new(), Vec::new());
        for piece in stream.chunks(at_a_time) {
            unused.extend_from_slice(piece);
            loop {
                let (used, what) = parser.next(&unused)?;
                match what {
                    Piece::Payload(payload) => found.push(payload.to_vec()),
                    Piece::Unfit(unfit) => found.push(format!("{unfit:?}").into_bytes()),
                    Piece::Nothing => {}
                    Piece::Incomplete => {
                        assert_eq!(used, 0);
                        break;
                    }
                }
                unused.drain(..used);
            }
        }
        Ok(found)
    }

    #[test]
    fn payloads_are_found_whatever_the_pieces() {
        let stream = [
            framed(&[7; 14]),
            framed(&[]),
            framed(&[8; 13]),
            framed(&[9; 100]),
            framed(&[1; 101]),
            framed(&[2; 60]),
        ];
        let expected: [&[u8]; 5] = [&[7; 14], b"Runt", &[9; 100], b"TooBig", &[2; 60]];
        for at_a_time in 1..400 {
            assert_eq!(parse(&stream.concat(), at_a_time).unwrap(), expected, "{at_a_time}");
        }
    }

    #[test]
    fn a_length_above_the_maximum_is_an_error_for_ever() {
        let stream = [framed(&[7; 14]), (PAYLOAD_MAX as u32 + 1).to_be_bytes().to_vec()].concat();
        let error = parse(&stream, 1).unwrap_err();
        assert_eq!(error.length, PAYLOAD_MAX as u32 + 1);
        let mut parser = StreamParser::new(100, 0);
        for _ in 0..2 {
            assert_eq!(parser.next(&[0xff; 4]), Err(LengthAboveMaximum { length: u32::MAX }));
        }
        assert!(parser.next(&(PAYLOAD_MAX as u32).to_be_bytes()).is_ok());
    }

    #[test]
    fn it_knows_an_end_within_a_payload() {
        let mut parser = StreamParser::new(100, 0);
        assert!(!parser.is_within_payload(&[]));
        assert!(parser.is_within_payload(&[0]));
        assert!(parser.next(&framed(&[0; 200])[..50]).is_ok());
        assert!(parser.is_within_payload(&[]));
        assert!(!parser.finds(&[]) && parser.finds(&[0]));
        assert_eq!(parser.next(&[0; 300]), Ok((200, Piece::Nothing)));
        assert!(!parser.is_within_payload(&[]));
    }

    #[test]
    fn a_message_is_what_its_length_says_and_the_magic_is_none() {
        let rules = MessageRules::new(1518, 0);
        let judge = |len, front: &[u8; 4]| rules.judge(len, *front, false);
        assert_eq!(judge(4, b"VFKT"), Message::Magic);
        assert_eq!(judge(4, b"VFKt"), Message::Unfit(Unfit::Runt));
        assert_eq!(judge(5, b"VFKT"), Message::Unfit(Unfit::Runt));
        assert_eq!(judge(60, b"VFKT"), Message::Payload);
        assert_eq!(judge(0, b"VFKT"), Message::Empty);
        assert_eq!(judge(13, &[0; 4]), Message::Unfit(Unfit::Runt));
        assert_eq!([14, 1518].map(|len| judge(len, &[0; 4])), [Message::Payload; 2]);
        assert_eq!(judge(1519, &[0; 4]), Message::Unfit(Unfit::TooBig));
        assert_eq!(rules.judge(100, [0; 4], true), Message::Unfit(Unfit::TooBig));
        let rules = MessageRules::new(1518, 12);
        assert_eq!(rules.judge(25, [0; 4], false), Message::Unfit(Unfit::Runt));
        assert_eq!([26, 1530].map(|len| rules.judge(len, [0; 4], false)), [Message::Payload; 2]);
    }
}
