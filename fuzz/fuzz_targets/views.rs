//! `PacketView` against a plain model: a slice and a range. Each operation on a view gives the
//! result that the slice gives, or refuses if the slice would panic. It never reaches outside the
//! view.
//!
//! The virtio-net header, too: any 12 bytes are refused or parsed, a parsed header survives being
//! written, and a validated header points into the packet.
#![no_main]

use arbitrary::Arbitrary;
use core::ops::Range;
use libfuzzer_sys::fuzz_target;
use vmring_core::PacketView;
use vmring_core::offload::{self, Checksum, Gso, OffloadError, OffloadHeader};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    buffer: &'a [u8],
    offset: Number,
    len: Number,
    steps: Vec<Step<'a>>,
    header: [u8; offload::LEN],
    packet_len: Number,
    trims: [u16; 2],
}

/// A position or length, mostly near the start or end of the packet, sometimes arbitrary.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Number {
    Small(u8),
    FromEnd(u8),
    Any(usize),
}

impl Number {
    fn near(self, end: usize) -> usize {
        match self {
            Number::Small(n) => n.into(),
            Number::FromEnd(n) => end.saturating_add(1).saturating_sub(n.into()),
            Number::Any(n) => n,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Narrow { at: Number, len: Number },
    Sub { at: Number, len: Number },
    Shift { by: Number },
    Truncate { len: Number },
    Split { at: Number, keep_left: bool },
    Write { at: Number, bytes: &'a [u8] },
    Set { at: Number, value: u64, width: u8 },
}

fuzz_target!(|input: Input| {
    read(&input);
    write(&input);
    offload_header(&input);
});

/// Cuts the model like the view. `None` if the model does not have that many bytes.
fn cut(model: &Range<usize>, at: usize, len: usize) -> Option<Range<usize>> {
    let end = at.checked_add(len)?;
    (end <= model.len()).then(|| model.start + at..model.start + end)
}

fn first(input: &Input) -> (u32, u32, Option<Range<usize>>) {
    let end = input.buffer.len();
    let (offset, len) = (input.offset.near(end) as u32, input.len.near(end) as u32);
    (offset, len, cut(&(0..end), offset as usize, len as usize))
}

fn check<B: AsRef<[u8]>>(view: &PacketView<B>, buffer: &[u8], model: &Range<usize>) {
    let bytes = &buffer[model.clone()];
    assert_eq!(view.as_bytes(), bytes);
    assert_eq!((view.offset(), view.len()), (model.start, model.len()));
    assert_eq!(view.is_empty(), model.is_empty());
    let positions = [0, 1, 7, 12, bytes.len().wrapping_sub(2), bytes.len(), usize::MAX];
    for at in positions {
        let field = |width| at.checked_add(width).and_then(|end| bytes.get(at..end));
        assert_eq!(view.u8(at), field(1).map(|b| b[0]));
        assert_eq!(view.be16(at), field(2).map(|b| u16::from_be_bytes(b.try_into().unwrap())));
        assert_eq!(view.le16(at), field(2).map(|b| u16::from_le_bytes(b.try_into().unwrap())));
        assert_eq!(view.be32(at), field(4).map(|b| u32::from_be_bytes(b.try_into().unwrap())));
        assert_eq!(view.le32(at), field(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())));
        assert_eq!(view.be64(at), field(8).map(|b| u64::from_be_bytes(b.try_into().unwrap())));
    }
    match (view.ethernet(), bytes.get(..14)) {
        (Some(header), Some(bytes)) => {
            assert_eq!(header.destination(), bytes[..6]);
            assert_eq!(header.source(), bytes[6..12]);
            assert_eq!(header.ethertype().to_be_bytes(), bytes[12..]);
        }
        (header, bytes) => assert!(header.is_none() && bytes.is_none()),
    }
}

fn read(input: &Input) {
    let buffer = input.buffer;
    let (offset, len, model) = first(input);
    let view = PacketView::new(buffer, offset, len);
    assert_eq!(view.is_some(), model.is_some());
    let (Some(mut view), Some(mut model)) = (view, model) else { return };
    for step in &input.steps {
        let end = view.len();
        let (next, expected) = match *step {
            Step::Narrow { at, len } => {
                let (at, len) = (at.near(end), len.near(end));
                let mut next = view;
                let done = next.narrow(at, len);
                assert!(done.is_some() || next.as_bytes() == view.as_bytes());
                (done.map(|()| next), cut(&model, at, len))
            }
            Step::Sub { at, len } => {
                let (at, len) = (at.near(end), len.near(end));
                (view.sub(at, len), cut(&model, at, len))
            }
            Step::Shift { by } => {
                let by = by.near(end);
                let rest = end.checked_sub(by);
                (view.shift(by), rest.and_then(|rest| cut(&model, by, rest)))
            }
            Step::Truncate { len } => {
                let len = len.near(end);
                (view.truncate(len), cut(&model, 0, len))
            }
            Step::Split { at, keep_left } => {
                let at = at.near(end);
                let next = view.split_at(at).map(|(left, right)| {
                    assert_eq!([left.bytes(), right.bytes()].concat(), view.bytes());
                    if keep_left { left } else { right }
                });
                let rest = end.checked_sub(at);
                let expected = match keep_left {
                    true => cut(&model, 0, at),
                    false => rest.and_then(|rest| cut(&model, at, rest)),
                };
                (next, expected)
            }
            Step::Write { .. } | Step::Set { .. } => continue,
        };
        assert_eq!(next.is_some(), expected.is_some(), "{step:?}");
        if let (Some(next), Some(expected)) = (next, expected) {
            (view, model) = (next, expected);
        }
        check(&view, buffer, &model);
    }
}

fn write(input: &Input) {
    let mut buffer = input.buffer.to_vec();
    let mut shadow = buffer.clone();
    let (offset, len, model) = first(input);
    let view = PacketView::new(buffer.as_mut_slice(), offset, len);
    assert_eq!(view.is_some(), model.is_some());
    let (Some(mut view), Some(mut model)) = (view, model) else { return };
    for step in &input.steps {
        let end = view.len();
        match *step {
            Step::Split { at, keep_left } => {
                let at = at.near(end);
                if at <= end {
                    let (left, right) = view.split_at_mut(at).expect("it is within");
                    (view, model) = match keep_left {
                        true => (left, model.start..model.start + at),
                        false => (right, model.start + at..model.end),
                    };
                } else {
                    assert!(view.as_view_mut().split_at_mut(at).is_none());
                }
            }
            Step::Narrow { at, len } | Step::Sub { at, len } => {
                let (at, len) = (at.near(end), len.near(end));
                let expected = cut(&model, at, len);
                assert_eq!(view.narrow(at, len).is_some(), expected.is_some());
                model = expected.unwrap_or(model);
            }
            Step::Shift { by } => {
                let by = by.near(end);
                assert_eq!(view.as_view_mut().shift(by).is_some(), by <= end);
            }
            Step::Truncate { len } => {
                let len = len.near(end);
                assert_eq!(view.as_view_mut().truncate(len).is_some(), len <= end);
            }
            Step::Write { at, bytes } => {
                let at = at.near(end);
                let expected = cut(&model, at, bytes.len());
                assert_eq!(view.set_bytes(at, bytes).is_some(), expected.is_some());
                if let Some(range) = expected {
                    shadow[range].copy_from_slice(bytes);
                }
            }
            Step::Set { at, value, width } => {
                let at = at.near(end);
                let be = value.to_be_bytes();
                let le = value.to_le_bytes();
                let (done, bytes) = match width % 7 {
                    0 => (view.set_u8(at, value as u8), &be[7..]),
                    1 => (view.set_be16(at, value as u16), &be[6..]),
                    2 => (view.set_be32(at, value as u32), &be[4..]),
                    3 => (view.set_be64(at, value), &be[..]),
                    4 => (view.set_le16(at, value as u16), &le[..2]),
                    5 => (view.set_le32(at, value as u32), &le[..4]),
                    _ => match view.fields_mut::<14>() {
                        Some(mut fields) => {
                            fields.set_be16::<12>(value as u16);
                            assert_eq!(fields.as_fields().be16::<12>(), value as u16);
                            shadow[model.start + 12..][..2].copy_from_slice(&be[6..]);
                            continue;
                        }
                        None => {
                            assert!(model.len() < 14);
                            continue;
                        }
                    },
                };
                let expected = cut(&model, at, bytes.len());
                assert_eq!(done.is_some(), expected.is_some(), "{step:?}");
                if let Some(range) = expected {
                    shadow[range].copy_from_slice(bytes);
                }
            }
        }
        check(&view, &shadow, &model);
    }
    // Bytes outside the view at the time of a write are unchanged.
    assert_eq!(buffer, shadow);
}

fn offload_header(input: &Input) {
    let strict = OffloadHeader::parse(&input.header);
    let header = match (OffloadHeader::parse_ignoring_reserved(&input.header), strict) {
        (Ok(header), Ok(strict)) => {
            assert_eq!(header, strict);
            header
        }
        (Ok(header), Err(OffloadError::ReservedFlags { flags })) => {
            assert_eq!(flags & !input.header[0], 0);
            header
        }
        (Err(_), Err(error)) => {
            assert!(!error.to_string().is_empty());
            return;
        }
        (lenient, strict) => panic!("{lenient:?}, but {strict:?}"),
    };
    let mut bytes = [0xaa; offload::LEN];
    header.write(&mut bytes);
    assert_eq!(OffloadHeader::parse(&bytes), Ok(header));
    offload::set_num_buffers(&mut bytes, 1);
    assert_eq!(OffloadHeader::parse(&bytes), Ok(header.for_guest()));
    assert_ne!(header.for_sending().checksum, Checksum::DataValid);

    let len = input.packet_len.near(header.header_len.into());
    if header.validate(len).is_ok() {
        assert!(header.validate(len.saturating_add(1)).is_ok());
        assert!(usize::from(header.header_len) <= len);
        let partial = match header.checksum {
            Checksum::Partial { start, offset } => {
                assert!(start >= 14 && usize::from(start) + usize::from(offset) + 2 <= len);
                true
            }
            _ => false,
        };
        assert!(header.gso == Gso::None || partial && header.segment_size != 0);
    }

    let [first, second] = input.trims.map(usize::from);
    let Ok(trimmed) = header.trim_front(first) else { return };
    if let (Checksum::Partial { start: before, .. }, Checksum::Partial { start: after, .. }) =
        (header.checksum, trimmed.checksum)
    {
        assert_eq!(usize::from(after) + first, before.into());
    }
    let (twice, at_once) = (trimmed.trim_front(second), header.trim_front(first + second));
    assert_eq!(twice.ok(), at_once.ok());
}
