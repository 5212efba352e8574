//! What the command line says of sockets.

use super::*;

fn spec(text: &str) -> ListenSpec {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn a_socket_is_written_with_its_options() {
    let plain = ListenSpec::new(Kind::VhostUser, Place::Server("/run/a.sock".into()));
    assert_eq!(spec("vhost-user:/run/a.sock"), plain);
    assert_eq!(spec("vhost-user:fd=3").place, Place::Descriptor(3));
    let all = spec(
        "vhost-user:a,,b:c,client,mac=52:54:00:00:00:01,isolated,queues=4,config,seals,announce,\
         offload=off,capture=a.pcapng,rate=4K,send=8M,receive=1K,send-packets=1000,receive-packets=1,floods=9",
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
            kind: Kind::VhostUser,
            place: Place::Client("a,b:c".into()),
            capture: Some("a.pcapng".into()),
            mac: Some(MacRule::Fixed(MacAddr6::new(0x52, 0x54, 0, 0, 0, 1))),
            isolated: true,
            limits,
            queues: Some(4),
            config: true,
            demand_seals: true,
            announce: true,
            offload: false,
            implied: false,
            header: false,
            own: None,
            once: false,
            group: None,
        }
    );
    assert_eq!(spec("vhost-user:a,mac=learn").mac, Some(MacRule::Learn));
    assert_eq!(spec("vhost-user:a,mac=any").mac, Some(MacRule::Any));
    assert_eq!(spec("vhost-user:fd=3").to_string(), "vhost-user:fd=3");
    assert_eq!(spec("vhost-user:fd=vm0").place, Place::Named("vm0".into()));
    assert_eq!(spec("vhost-user:fd=vm0,isolated").to_string(), "vhost-user:fd=vm0");
    let PortLimits { send, receive, .. } = spec("vhost-user:a,rate=1M").limits;
    assert_eq!((send.bytes, receive.bytes), (rate(1 << 20, 1 << 17), rate(1 << 20, 1 << 17)));
}

#[test]
fn what_is_no_socket_is_refused_in_a_sentence() {
    for (text, said) in [
        ("/run/a.sock", "there is no wire '/run/a.sock'"),
        ("quemu:/run/a.sock", "use vhost-user:PATH, qemu:PATH"),
        ("qemu:", "a socket needs a path, like qemu:/run/vm0.sock"),
        ("qemu:a,queues=2", "a socket of qemu has no option 'queues'"),
        ("qemu:a,own=b", "a socket of qemu has no option 'own'"),
        ("vfkit:a,own=b", "'own' is for a socket that connects: add client"),
        ("vfkit:a,client,own=", "own needs a path"),
        ("vhost-user:a,vnet_hdr", "a socket of vhost-user has no option 'vnet_hdr'"),
        ("qemu:a,frob", "use client, vnet_hdr, mac=ADDRESS"),
        ("vhost-user:", "needs a path"),
        ("vhost-user:,client", "needs a path"),
        ("vhost-user:fd=2", "is 3 or more, or a name, and not '2'"),
        ("vhost-user:fd=", "or a name, and not ''"),
        ("vhost-user:fd=99999999999", "and not '99999999999'"),
        ("vhost-user:a,capture=", "a capture needs a file"),
        ("vhost-user:a,rate=", "a size is a number of bytes"),
        ("vhost-user:fd=3,client", "a client needs a path"),
        ("vhost-user:a,client,client", "one 'client'"),
        ("vhost-user:a,mac=01:00:5e:00:00:01", "learn or any"),
        ("vhost-user:a,queues=0", "1 to 16 pairs of queues, and not '0'"),
        ("vhost-user:a,queues=17", "1 to 16 pairs of queues, and not '17'"),
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
        (["vhost-user:a,capture=x", "vhost-user:b,capture=x"], "the same capture 'x'"),
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

#[test]
fn a_wire_is_a_socket_with_the_options_of_a_port() {
    for wire in WIRES {
        let one = spec(&format!("{}:/run/a.sock,mac=learn,isolated,rate=4K", wire.name));
        assert_eq!((one.kind, one.isolated), (wire.kind, true));
        assert_eq!(one.to_string(), format!("{}:/run/a.sock", wire.name));
        if let Kind::Wire(kind) = wire.kind {
            assert_eq!((kind.name(), one.is_wire()), (wire.name, true));
            assert_eq!(one.most(64), if kind.is_datagram() { 1 } else { 64 });
        }
    }
    assert!(spec("vhost-user:a").may_offload());
    assert!(!spec("qemu:a").may_offload(), "a frame has no header");
    assert!(spec("qemu:a,vnet_hdr").may_offload());
    assert!(!spec("qemu:a,vnet_hdr,offload=off").may_offload());
    let one = spec("krunkit:a,client,own=b");
    assert_eq!(one.own_path(), Some(Path::new("b")));
    assert!(check(&[one, spec("qemu:b")]).is_err(), "they have the same path");
}

#[test]
fn to_connect_is_to_listen_as_a_client() {
    let connect = |text: &str| text.parse::<ConnectSpec>().map(|ConnectSpec(spec)| spec);
    assert_eq!(connect("qemu:a,,b"), Ok(spec("qemu:a,,b,client")));
    assert_eq!(connect("vfkit:a,own=b,mac=learn"), Ok(spec("vfkit:a,client,own=b,mac=learn")));
    assert_eq!(connect("vhost-user:a,client"), Ok(spec("vhost-user:a,client")));
    assert!(connect("qemu:fd=3").unwrap_err().contains("a client needs a path"));
}
