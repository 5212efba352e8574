//! Compares `PacketView` with plain slices.

use core::cell::Cell;
use core::ops::Range;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use vmring_core::view::{Fields, FieldsMut, PacketView};

/// The default configuration. Failing cases are kept beside those of the other crates.
fn config() -> ProptestConfig {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../proptest-regressions/ring-view.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::default()
    }
}

/// Positions inside, just outside and far outside of a buffer of up to 300 bytes.
fn position() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 0..320usize,
        2 => (usize::MAX - 20)..=usize::MAX,
        1 => (u32::MAX as usize - 300)..=(u32::MAX as usize).saturating_add(300),
        1 => any::<usize>(),
    ]
}

fn position_u32() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0..320u32, 2 => (u32::MAX - 320)..=u32::MAX, 1 => any::<u32>()]
}

fn buffer() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..300)
}

/// A buffer, and where a view is in it.
fn placed() -> impl Strategy<Value = (Vec<u8>, Range<usize>)> {
    buffer().prop_flat_map(|buffer| {
        let len = buffer.len();
        (Just(buffer), 0..=len, 0..=len).prop_map(|(buffer, a, b)| (buffer, a.min(b)..a.max(b)))
    })
}

fn view<B: AsRef<[u8]>>(buffer: B, place: &Range<usize>) -> PacketView<B> {
    PacketView::new(buffer, place.start as u32, place.len() as u32).unwrap()
}

/// The model of every checked field: the `N` bytes at `at`, computed with 128-bit arithmetic.
fn model<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    (at as u128 + N as u128 <= bytes.len() as u128).then(|| bytes[at..at + N].try_into().unwrap())
}

#[derive(Clone, Copy, Debug)]
enum Cut {
    Sub(usize, usize),
    Shift(usize),
    Truncate(usize),
    Left(usize),
    Right(usize),
    Narrow(usize, usize),
}

fn cut() -> impl Strategy<Value = Cut> {
    // Small steps, so that a chain of cuts sometimes stays inside.
    let at = || prop_oneof![8 => 0..24usize, 1 => position()];
    let len = || prop_oneof![8 => 0..300usize, 1 => position()];
    prop_oneof![
        (at(), len()).prop_map(|(at, len)| Cut::Sub(at, len)),
        at().prop_map(Cut::Shift),
        len().prop_map(Cut::Truncate),
        len().prop_map(Cut::Left),
        at().prop_map(Cut::Right),
        (at(), len()).prop_map(|(at, len)| Cut::Narrow(at, len)),
    ]
}

impl Cut {
    /// What the cut leaves of `place`. `None` if the cut is refused.
    fn of_place(self, place: &Range<usize>) -> Option<Range<usize>> {
        let all = place.len();
        let (at, len) = match self {
            Cut::Sub(at, len) | Cut::Narrow(at, len) => (at, len),
            Cut::Truncate(len) | Cut::Left(len) => (0, len),
            Cut::Shift(at) | Cut::Right(at) => (at, all.checked_sub(at)?),
        };
        (at as u128 + len as u128 <= all as u128).then(|| place.start + at..place.start + at + len)
    }

    fn of_view(self, mut view: PacketView<&[u8]>) -> Option<PacketView<&[u8]>> {
        match self {
            Cut::Sub(at, len) => view.sub(at, len),
            Cut::Shift(n) => view.shift(n),
            Cut::Truncate(len) => view.truncate(len),
            Cut::Left(at) => Some(view.split_at(at)?.0),
            Cut::Right(at) => Some(view.split_at(at)?.1),
            Cut::Narrow(at, len) => view.narrow(at, len).map(|()| view),
        }
    }

    fn of_view_mut(self, mut view: PacketView<&mut [u8]>) -> Option<PacketView<&mut [u8]>> {
        match self {
            Cut::Sub(at, len) => view.sub(at, len),
            Cut::Shift(n) => view.shift(n),
            Cut::Truncate(len) => view.truncate(len),
            Cut::Left(at) => Some(view.split_at_mut(at)?.0),
            Cut::Right(at) => Some(view.split_at_mut(at)?.1),
            Cut::Narrow(at, len) => view.narrow(at, len).map(|()| view),
        }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_view_is_made_exactly_if_it_lies_in_the_buffer(
        buffer in buffer(), offset in position_u32(), len in position_u32(),
    ) {
        let end = u64::from(offset) + u64::from(len);
        match PacketView::new(&buffer[..], offset, len) {
            Some(view) => {
                prop_assert!(end <= buffer.len() as u64);
                prop_assert_eq!(view.bytes(), &buffer[offset as usize..end as usize]);
                prop_assert_eq!(view.offset(), offset as usize);
                prop_assert_eq!(view.len(), len as usize);
                prop_assert_eq!(view.is_empty(), len == 0);
            }
            None => prop_assert!(end > buffer.len() as u64),
        }
    }

    #[test]
    fn a_whole_view_is_the_buffer(buffer in buffer()) {
        let view = PacketView::whole(&buffer[..]).unwrap();
        prop_assert_eq!((view.offset(), view.bytes()), (0, &buffer[..]));
    }

    #[test]
    fn getters_read_what_slices_read((buffer, place) in placed(), at in position()) {
        let (view, bytes) = (view(&buffer[..], &place), &buffer[place.clone()]);
        prop_assert_eq!(view.u8(at), bytes.get(at).copied());
        prop_assert_eq!(view.be16(at), model(bytes, at).map(u16::from_be_bytes));
        prop_assert_eq!(view.be32(at), model(bytes, at).map(u32::from_be_bytes));
        prop_assert_eq!(view.be64(at), model(bytes, at).map(u64::from_be_bytes));
        prop_assert_eq!(view.le16(at), model(bytes, at).map(u16::from_le_bytes));
        prop_assert_eq!(view.le32(at), model(bytes, at).map(u32::from_le_bytes));
        prop_assert_eq!(view.array::<0>(at), model(bytes, at));
        prop_assert_eq!(view.array::<6>(at), model(bytes, at));
        prop_assert_eq!(view.array::<40>(at), model(bytes, at));
    }

    /// A refused write changes nothing, and no write goes outside the view.
    #[test]
    fn setters_write_what_slices_write(
        (buffer, place) in placed(), at in position(), value: u64,
        bytes in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        type Set = (fn(&mut PacketView<&mut [u8]>, usize, u64) -> Option<()>, Vec<u8>);
        let setters: [Set; 6] = [
            (|view, at, value| view.set_u8(at, value as u8), vec![value as u8]),
            (|view, at, value| view.set_be16(at, value as u16), (value as u16).to_be_bytes().into()),
            (|view, at, value| view.set_be32(at, value as u32), (value as u32).to_be_bytes().into()),
            (|view, at, value| view.set_be64(at, value), value.to_be_bytes().into()),
            (|view, at, value| view.set_le16(at, value as u16), (value as u16).to_le_bytes().into()),
            (|view, at, value| view.set_le32(at, value as u32), (value as u32).to_le_bytes().into()),
        ];
        let check = |written: &[u8], done: Option<()>, left: &[u8]| {
            let fits = at as u128 + written.len() as u128 <= place.len() as u128;
            let mut expected = buffer.clone();
            if fits {
                expected[place.start + at..][..written.len()].copy_from_slice(written);
            }
            prop_assert_eq!(done.is_some(), fits);
            prop_assert_eq!(left, &expected[..]);
            Ok(())
        };
        for (set, written) in setters {
            let mut copy = buffer.clone();
            let done = set(&mut view(&mut copy[..], &place), at, value);
            check(&written, done, &copy)?;
        }
        let mut copy = buffer.clone();
        let done = view(&mut copy[..], &place).set_bytes(at, &bytes);
        check(&bytes, done, &copy)?;
    }

    #[test]
    fn offsets_stay_absolute_through_any_chain_of_cuts(
        (buffer, place) in placed(), cuts in proptest::collection::vec(cut(), 0..24),
    ) {
        let mut place = place;
        let mut view = view(&buffer[..], &place);
        for cut in cuts {
            let (next_place, next) = (cut.of_place(&place), cut.of_view(view));
            prop_assert_eq!(next_place.is_some(), next.is_some(), "{:?} of {:?}", cut, place);
            if let (Some(next_place), Some(next)) = (next_place, next) {
                (place, view) = (next_place, next);
            }
            prop_assert_eq!(view.offset(), place.start);
            prop_assert_eq!(view.bytes(), &buffer[place.clone()]);
        }
        // The bytes are those of the buffer, not a copy.
        prop_assert_eq!(view.bytes().as_ptr_range(), buffer[place].as_ptr_range());
    }

    #[test]
    fn mutable_views_write_at_the_absolute_offset_they_say(
        (buffer, place) in placed(), cuts in proptest::collection::vec(cut(), 0..24),
    ) {
        let mut written = buffer.clone();
        let mut place = place;
        let mut view = view(&mut written[..], &place);
        for cut in cuts {
            let next_place = cut.of_place(&place);
            // Try the cut on a borrow first, because a refused cut consumes the view.
            let accepted = cut.of_view_mut(view.as_view_mut()).is_some();
            prop_assert_eq!(next_place.is_some(), accepted, "{:?} of {:?}", cut, place);
            if let Some(next_place) = next_place {
                (place, view) = (next_place, cut.of_view_mut(view).unwrap());
            }
            prop_assert_eq!(view.offset(), place.start);
            prop_assert_eq!(view.as_bytes(), &buffer[place.clone()]);
        }
        let offset = view.offset();
        let bytes = view.bytes_mut();
        let len = bytes.len();
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        let mut expected = buffer;
        expected[offset..offset + len].iter_mut().for_each(|byte| *byte = !*byte);
        prop_assert_eq!(written, expected);
    }

    #[test]
    fn both_halves_of_a_mutable_split_count_from_the_same_origin(
        (buffer, place) in placed(), at in 0..320usize, again in 0..320usize,
    ) {
        let mut written = buffer.clone();
        if let Some((mut left, right)) = view(&mut written[..], &place).split_at_mut(at) {
            prop_assert_eq!(left.offset()..left.offset() + left.len(), place.start..place.start + at);
            prop_assert_eq!(right.offset()..right.offset() + right.len(), place.start + at..place.end);
            left.as_bytes_mut().fill(1);
            if let Some((mut middle, mut right)) = right.split_at_mut(again) {
                prop_assert_eq!(right.offset(), place.start + at + again);
                prop_assert_eq!(right.as_view().offset(), right.offset());
                middle.as_bytes_mut().fill(2);
                right.as_bytes_mut().fill(3);
                let right = right.freeze();
                prop_assert_eq!(right.offset(), place.start + at + again);
                let mut expected = buffer;
                expected[place.start..][..at].fill(1);
                expected[place.start + at..][..again].fill(2);
                expected[place.start + at + again..place.end].fill(3);
                prop_assert_eq!(written, expected);
            }
        } else {
            prop_assert!(at > place.len());
        }
    }

    #[test]
    fn fields_are_the_first_bytes_of_the_view((buffer, place) in placed()) {
        let view = view(&buffer[..], &place);
        match view.fields::<24>() {
            Some(fields) => {
                prop_assert_eq!(&fields.bytes()[..], &view.bytes()[..24]);
                prop_assert_eq!(Some(fields.u8::<0>()), view.u8(0));
                prop_assert_eq!(Some(fields.u8::<23>()), view.u8(23));
                prop_assert_eq!(Some(fields.be16::<3>()), view.be16(3));
                prop_assert_eq!(Some(fields.be16::<22>()), view.be16(22));
                prop_assert_eq!(Some(fields.be32::<20>()), view.be32(20));
                prop_assert_eq!(Some(fields.be64::<16>()), view.be64(16));
                prop_assert_eq!(Some(fields.le16::<22>()), view.le16(22));
                prop_assert_eq!(Some(fields.le32::<20>()), view.le32(20));
                prop_assert_eq!(Some(fields.array::<18, 6>()), view.array(18));
                prop_assert_eq!(fields.array::<24, 0>(), []);
            }
            None => prop_assert!(place.len() < 24),
        }
    }
}

/// Tests every edge of small buffers, because random positions may miss them.
#[test]
fn small_views_are_right_at_every_edge() {
    let bytes = [1, 2, 3, 4, 5, 6, 7, 8];
    for size in 0..=bytes.len() {
        for (offset, len) in (0..10).flat_map(|offset| (0..10).map(move |len| (offset, len))) {
            let view = PacketView::new(&bytes[..size], offset as u32, len as u32);
            assert!(view.is_none_or(|view| view.is_empty() == (len == 0)));
            assert_eq!(view.map(PacketView::bytes), bytes[..size].get(offset..offset + len));
            let whole = PacketView::whole(&bytes[..size]).unwrap();
            assert_eq!(whole.sub(offset, len).map(PacketView::bytes), view.map(PacketView::bytes));

            let mut copy = bytes;
            let mut whole = PacketView::whole(&mut copy[..size]).unwrap();
            assert_eq!(whole.set_bytes(offset, &[9; 10][..len]).is_some(), view.is_some());
            assert_eq!(copy != bytes, view.is_some() && len > 0);
        }
    }
}

#[test]
fn fields_are_written_where_they_are_read() {
    let mut bytes = [0; 32];
    let mut view = PacketView::new(&mut bytes[..], 4, 24).unwrap();
    let mut fields = view.fields_mut::<24>().unwrap();
    fields.set_u8::<23>(0xf0);
    fields.set_be16::<0>(0x0102);
    fields.set_be32::<2>(0x0304_0506);
    fields.set_be64::<6>(0x0708_090a_0b0c_0d0e);
    fields.set_le16::<14>(0x100f);
    fields.set_le32::<16>(0x1413_1211);
    fields.set_array::<20, 3>([0x15, 0x16, 0x17]);
    assert_eq!(fields.as_fields().le32::<16>(), 0x1413_1211);

    let mut expected = [0; 32];
    for (i, byte) in expected[4..27].iter_mut().enumerate() {
        *byte = i as u8 + 1;
    }
    expected[27] = 0xf0;
    // Bytes 15 and 16 of the header hold 0x0f and 0x10: little-endian.
    assert_eq!(bytes, expected);

    assert!(view_of(&mut bytes, 23).fields_mut::<24>().is_none());
    assert!(FieldsMut::<24>::prefix(&mut bytes[..23]).is_none());
    assert!(Fields::<24>::prefix(&bytes[..23]).is_none());
    assert!(Fields::<24>::prefix(&bytes[..24]).is_some());
}

fn view_of(bytes: &mut [u8], len: u32) -> PacketView<&mut [u8]> {
    PacketView::new(bytes, 0, len).unwrap()
}

/// Sub-views borrow the buffer, not the view that they were cut from. So this compiles.
#[test]
fn a_sub_view_outlives_its_parent() {
    let bytes = [1, 2, 3, 4];
    let tail = {
        let view = PacketView::whole(&bytes[..]).unwrap();
        let tail = view.shift(2).unwrap();
        assert_eq!(view.len(), 4, "the parent is a copy and still whole");
        tail
    };
    assert_eq!(tail.bytes(), [3, 4]);
}

#[test]
fn a_view_that_owns_its_buffer_is_cut_without_losing_it() {
    let mut view = PacketView::new(vec![1, 2, 3, 4, 5], 1, 4).unwrap();
    assert!(view.narrow(3, 2).is_none());
    assert!(view.narrow(usize::MAX, 2).is_none());
    assert_eq!(view.as_ref(), [2, 3, 4, 5], "a refused cut leaves the view as it was");
    view.narrow(1, 2).unwrap();
    assert_eq!((view.offset(), view.as_bytes()), (2, &[3, 4][..]));
    view.as_mut().fill(9);
    assert_eq!(view.as_view().shift(1).unwrap().offset(), 3);
    assert_eq!(view.as_view_mut().bytes_mut(), [9, 9]);
}

#[test]
fn an_ethernet_header_is_three_fields() {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 7]);
    frame[12..14].copy_from_slice(&[0x08, 0x06]);
    let view = PacketView::whole(&frame[..]).unwrap();
    let header = view.ethernet().unwrap();
    assert_eq!(header.destination(), [0xff; 6]);
    assert_eq!(header.source(), [2, 0, 0, 0, 0, 7]);
    assert_eq!(header.ethertype(), 0x0806);
    assert!(view.truncate(14).unwrap().ethernet().is_some());
    assert!(view.truncate(13).unwrap().ethernet().is_none());
}

/// A safe `AsRef` may lie: this one gives fewer bytes at each call. The view is then empty, and
/// nothing panics.
#[test]
fn a_buffer_that_shrinks_gives_an_empty_view() {
    struct Shrinking([u8; 64], Cell<usize>);

    impl AsRef<[u8]> for Shrinking {
        fn as_ref(&self) -> &[u8] {
            let len = self.1.get();
            self.1.set(len / 2);
            &self.0[..len]
        }
    }

    impl AsMut<[u8]> for Shrinking {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut []
        }
    }

    let mut view = PacketView::new(Shrinking([7; 64], Cell::new(64)), 8, 24).unwrap();
    assert_eq!(view.u8(0), Some(7), "32 bytes are left, the view ends at 32");
    assert_eq!(view.as_bytes(), []);
    assert_eq!(view.be16(0), None);
    assert!(view.fields::<1>().is_none());
    assert_eq!(view.as_view().shift(24).unwrap().bytes(), []);
    assert_eq!(view.as_view().split_at(12).unwrap().1.bytes(), []);
    assert_eq!(view.set_u8(0, 1), None);
    assert!(view.as_view_mut().split_at_mut(12).is_none());
    assert_eq!(view.as_view_mut().bytes_mut(), []);
}

#[test]
fn a_view_shows_its_place_not_its_bytes() {
    let view = PacketView::new([0; 64], 16, 32).unwrap();
    assert_eq!(format!("{view:?}"), "PacketView { offset: 16, len: 32, .. }");
}
