//! Streams of a hostile peer, in pieces of any size, and messages of any length. What the parser finds
//! must not depend on the pieces, and must be what a plain reading of the rules finds.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmring::device::socket::framing::{
    Message, MessageRules, Piece, StreamParser, Unfit, VFKIT_MAGIC,
};

/// The rule of the wires, written again.
const LENGTH_MAX: usize = 131_072;

#[derive(Arbitrary, Debug)]
enum Part {
    /// A payload with its length. Long ones repeat a byte.
    Payload(u16, u8),
    Large(u32),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Input {
    max_packet_size: u16,
    header: bool,
    parts: Vec<Part>,
    /// How many bytes come at a time, over and over.
    pieces: Vec<u16>,
    messages: Vec<(u32, [u8; 4], bool)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Payload(Vec<u8>),
    Unfit(Unfit),
}

/// What a whole stream holds, whether it is over before its end, and whether it ends within a payload.
fn read(mut stream: &[u8], shortest: usize, longest: usize) -> (Vec<Found>, bool, bool) {
    let mut found = Vec::new();
    loop {
        if stream.len() < 4 {
            return (found, false, !stream.is_empty());
        }
        let len = u32::from_be_bytes(stream[..4].try_into().unwrap()) as usize;
        if len > LENGTH_MAX {
            return (found, true, true);
        }
        let rest = &stream[4..];
        let unfit = if len == 0 {
            None
        } else if len < shortest {
            Some(Unfit::Runt)
        } else if len > longest {
            Some(Unfit::TooBig)
        } else {
            None
        };
        if let Some(unfit) = unfit {
            found.push(Found::Unfit(unfit));
        }
        if rest.len() < len {
            return (found, false, true);
        }
        if unfit.is_none() && len > 0 {
            found.push(Found::Payload(rest[..len].to_vec()));
        }
        stream = &rest[len..];
    }
}

fuzz_target!(|input: Input| {
    let max = usize::from(input.max_packet_size).max(14);
    let header = if input.header { 12 } else { 0 };
    let (shortest, longest) = (header + 14, header + max);

    let mut stream = Vec::new();
    for part in input.parts.iter().take(64) {
        match part {
            Part::Payload(len, byte) => {
                stream.extend(u32::from(*len).to_be_bytes());
                stream.resize(stream.len() + usize::from(*len), *byte);
            }
            Part::Large(len) => stream.extend(len.to_be_bytes()),
            Part::Bytes(bytes) => stream.extend(bytes),
        }
    }
    let (expected, is_over, ends_within) = read(&stream, shortest, longest);

    let mut parser = StreamParser::new(max, header);
    let (mut found, mut failed) = (Vec::new(), false);
    let (mut at, mut end) = (0, 0);
    let mut pieces = input.pieces.iter().map(|piece| usize::from(*piece).max(1)).cycle();
    while end < stream.len() && !failed {
        end = (end + pieces.next().unwrap_or(usize::MAX)).min(stream.len());
        loop {
            let unused = &stream[at..end];
            let finds = parser.finds(unused);
            let Ok((used, piece)) = parser.next(unused) else {
                assert!(finds, "the end of a stream must be seen");
                assert!(parser.next(unused).is_err(), "a stream that is over stays so");
                failed = true;
                break;
            };
            assert!(used <= unused.len());
            assert_eq!(finds, piece != Piece::Incomplete);
            match piece {
                Piece::Incomplete => {
                    assert_eq!(used, 0);
                    break;
                }
                Piece::Nothing => assert!(used > 0),
                Piece::Payload(payload) => {
                    assert_eq!(used, 4 + payload.len());
                    found.push(Found::Payload(payload.to_vec()));
                }
                Piece::Unfit(unfit) => {
                    assert_eq!(used, 4);
                    found.push(Found::Unfit(unfit));
                }
            }
            at += used;
        }
        // No more than one payload waits.
        assert!(failed || end - at < 4 + longest);
    }
    assert_eq!(found, expected);
    assert_eq!(failed, is_over);
    if !failed {
        assert_eq!(parser.is_within_payload(&stream[at..]), ends_within);
    }

    let rules = MessageRules::new(max, header);
    for (len, front, cut) in input.messages {
        let len = len as usize % (2 * longest);
        let expected = match len {
            _ if cut => Message::Unfit(Unfit::TooBig),
            0 => Message::Empty,
            4 if front == VFKIT_MAGIC => Message::Magic,
            _ if len < shortest => Message::Unfit(Unfit::Runt),
            _ if len > longest => Message::Unfit(Unfit::TooBig),
            _ => Message::Payload,
        };
        assert_eq!(rules.judge(len, front, cut), expected);
    }
});
