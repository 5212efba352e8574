//! Settings: what is refused, and with which reason.

use vmring::{
    ConfigError, Direction, Drive, Embedded, Error, Interface, Ipv4Range, Loopback, Mode, Poller,
    PoolBuilder, Ring,
};

use crate::support::{inline, loopback, unique};

#[test]
fn sizes_that_cannot_be_are_refused_with_the_reason() {
    let interface = loopback();
    let ring = || inline(&interface, Direction::Both);
    let config = |result: Result<Ring, Error>| match result {
        Err(Error::Config(error)) => error,
        other => panic!("{other:?}"),
    };
    for (what, zero, large) in [
        ("read depth", ring().read_depth(0), ring().read_depth(1 << 31)),
        ("write depth", ring().write_depth(0), ring().write_depth(1 << 29)),
        ("cancel depth", ring().cancel_depth(0), ring().cancel_depth(1 << 31)),
        ("SQ depth", ring().sq_depth(0), ring().sq_depth(1 << 30)),
    ] {
        assert_eq!(config(zero.build()), ConfigError::Zero { what });
        let error = config(large.build());
        assert!(matches!(error, ConfigError::TooLarge { what: w, .. } if w == what), "{error}");
    }
    let small = PoolBuilder::new(4, 60).build().unwrap();
    let error = config(ring().pool(&small).build());
    let (capacity, needed) = (small.capacity() as usize, 1514);
    assert_eq!(error, ConfigError::PoolTooSmall { capacity, needed });
    assert_eq!(config(ring().frames(0).build()), ConfigError::Zero { what: "number of frames" });
    let error = ring().frames(1 << 30).headroom(1 << 30).build().unwrap_err();
    assert!(matches!(error, Error::Memory { .. }), "{error}");
    // The largest depth works. A larger one is refused before any memory is requested.
    let max = 1 << 16;
    for what in ["read depth", "write depth", "cancel depth", "SQ depth"] {
        let with = |depth| match what {
            "read depth" => ring().read_depth(depth),
            "write depth" => ring().write_depth(depth),
            "cancel depth" => ring().cancel_depth(depth),
            _ => ring().sq_depth(depth),
        };
        with(max as u32).frames(4).build().unwrap();
        for depth in [1 << 17, 1 << 28] {
            let value = u64::from(depth);
            assert_eq!(
                config(with(depth).frames(4).build()),
                ConfigError::TooLarge { what, value, max }
            );
        }
    }
    // A small pool is enough for writing.
    inline(&interface, Direction::Write).pool(&small).build().unwrap();
    // None of the refused builders has kept the interface's only reading ring.
    ring().build().unwrap();

    for mtu in [0, 65_522] {
        let start = Interface::builder().device(Loopback::new(mtu)).start();
        assert!(matches!(start, Err(Error::Config(ConfigError::Invalid(_)))), "{start:?}");
    }
}

/// Goal: a depth is rounded up to a power of two, as io_uring rounds its entries. Method: the credits
/// and the SQ's cells are counted.
#[test]
fn depths_are_rounded_up() {
    let interface = loopback();
    for (asked, depth) in [(1, 1), (3, 4), (4, 4), (48, 64), ((1 << 15) + 1, 1 << 16)] {
        let mut ring = inline(&interface, Direction::Both)
            .read_depth(asked)
            .write_depth(asked)
            .frames(4)
            .build()
            .unwrap();
        let (mut sq, _) = ring.split();
        assert_eq!((sq.read_credits(), sq.write_credits()), (depth, depth), "{asked}");
    }
    let mut ring = inline(&interface, Direction::Write).depth(8).sq_depth(3).build().unwrap();
    let frames: Vec<_> = std::iter::from_fn(|| ring.alloc()).collect();
    let accepted = ring.submit_writes(frames.into_iter().zip(0..)).unwrap();
    assert_eq!(accepted, 4, "an SQ of 3 entries has 4");
    let mut ring = inline(&interface, Direction::Write).cancel_depth(3).build().unwrap();
    assert!((0..4).all(|number| ring.cancel(1, number).is_ok()));
    assert!(ring.cancel(1, 4).is_err(), "3 cancels are 4");
}

/// Goal: a setting that the ring does not have is refused, and not ignored.
#[test]
fn settings_that_do_not_apply_are_refused() {
    let interface = loopback();
    let poller = Poller::start().unwrap();
    let pool = PoolBuilder::new(4, 1514).build().unwrap();
    let ring = |direction| interface.ring(direction).depth(4);
    let shared = || ring(Direction::Both).drive(Drive::Shared(&poller));
    let inline = || ring(Direction::Both).drive(Drive::Inline);
    let given = || inline().pool(&pool);
    for (setting, builder) in [
        ("processor", shared().cpu(0)),
        ("processor", inline().cpu(0)),
        ("thread name", shared().thread_name("mine")),
        ("thread name", inline().thread_name("mine")),
        ("read depth", ring(Direction::Write).read_depth(4)),
        ("write depth", ring(Direction::Read).write_depth(4)),
        ("number of frames", given().frames(4)),
        ("headroom", given().headroom(64)),
        ("prefault", given().prefault(true)),
    ] {
        match builder.build() {
            Err(Error::Config(ConfigError::NotApplicable { what, .. })) => {
                assert_eq!(what, setting);
            }
            other => panic!("{setting}: {other:?}"),
        }
    }
    // What it has is taken.
    drop(ring(Direction::Both).thread_name("mine").build().unwrap());
    drop(given().build().unwrap());
}

#[test]
fn modes_and_ranges_are_parsed_or_refused_in_a_sentence() {
    for (text, mode) in [
        ("host", Mode::Host),
        ("shared", Mode::Shared),
        ("bridged:en0", Mode::Bridged("en0".to_owned())),
    ] {
        assert_eq!(text.parse(), Ok(mode.clone()));
        assert_eq!(mode.to_string(), text);
    }
    assert_eq!(Mode::default(), Mode::Shared);
    for text in ["", "Host", "bridged", "bridged:", "nat"] {
        let error = text.parse::<Mode>().unwrap_err().to_string();
        assert!(error.ends_with(&format!(", not '{text}'")), "{error}");
    }
    let range: Ipv4Range = "192.168.64.1/24".parse().unwrap();
    assert_eq!(range.start.octets(), [192, 168, 64, 1]);
    assert_eq!(
        (range.end.octets(), range.mask.octets()),
        ([192, 168, 64, 254], [255, 255, 255, 0])
    );
    for text in ["", "192.168.64.1", "192.168.64.1/33", "192.168.64/24", "192.168.64.1/-1", "x/24"]
    {
        let error = text.parse::<Ipv4Range>().unwrap_err().to_string();
        assert!(error.ends_with(&format!(", not '{text}'")), "{error}");
    }
    // Extreme values are valid numbers.
    assert_eq!("10.0.0.1/0".parse::<Ipv4Range>().unwrap().mask.octets(), [0; 4]);
    assert_eq!("10.0.0.1/32".parse::<Ipv4Range>().unwrap().mask.octets(), [255; 4]);
    // An impossible network is refused at start.
    for range in ["10.0.0.1/32", "8.8.8.1/24"] {
        let builder = Interface::builder().device(Embedded::network(unique("impossible")));
        let start = builder.ipv4(range.parse().unwrap()).start();
        assert!(matches!(start, Err(Error::Config(_))), "{range}: {start:?}");
    }
}
