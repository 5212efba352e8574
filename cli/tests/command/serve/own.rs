//! A server whose guests have an interface of vmnet each. The simulated vmnet stands in for Apple's.

#[cfg(target_os = "linux")]
use super::crowd::descriptors;
use super::wires::{Wire, at, exchange};
use super::*;

/// Goal: each guest, on a wire or over vhost-user, gets an interface when it connects, which ends with the
/// connection. The server is confined meanwhile, and never has more of them than it may.
#[test]
fn each_client_has_an_interface_of_its_own() {
    let folder = scratch("own interfaces");
    let [a, b] = ["a.sock", "b.sock"].map(|name| folder.join(name));
    let capture = folder.join("a.pcapng");
    let stream = format!("{},capture={}", at("qemu", &a), capture.display());
    let network = ["--network", "vmnet-sim:shared", "--per-client", "--connections", "3"];
    let server =
        Server::on(&[&network[..], &["--listen", &stream, "--listen", &listen(&b)]].concat());
    let mut one = Wire::stream(&a, mac(1));
    let mut two = Wire::stream(&a, mac(2));
    exchange(&mut one, &mut two, 0..20);
    let mut device = Guest::new(&b, mac(3));
    device.post(64);
    let there = packet(mac(3), mac(1), 1514, 1);
    // The simulated network learns where a guest is from what it sends.
    device.send(&packet(mac(3), [0xff; 6], 60, 0));
    device.send(&there);
    assert_eq!(one.receive(), there);
    let back = packet(mac(1), mac(3), 1514, 2);
    one.send(&back);
    assert_eq!(device.receive_ours(), back);
    // There are three, so a fourth waits until one leaves.
    let mut fourth = Wire::stream(&a, mac(4));
    let hello = packet(mac(4), mac(1), 60, 3);
    fourth.send(&hello);
    assert!(one.next(Duration::from_millis(100)).is_none(), "there are too many");
    drop(two);
    assert_eq!(one.receive(), hello);
    drop(fourth);
    #[cfg(target_os = "linux")]
    let mut before = None;
    // What is said in a second has a limit.
    thread::sleep(Duration::from_millis(1100));
    for number in 0..5 {
        let mut guest = Wire::stream(&a, mac(10 + number));
        exchange(&mut one, &mut guest, 0..2);
        drop(guest);
        server.until_said(&format!("guest {} has left", 4 + number));
        // It closes the last of them after it has said so.
        #[cfg(target_os = "linux")]
        {
            let start = Instant::now();
            let least = *before.get_or_insert(descriptors(&server));
            while descriptors(&server) > least {
                assert!(start.elapsed() < LIMIT, "{} descriptors are left", descriptors(&server));
                thread::sleep(Duration::from_millis(5));
            }
            before = Some(descriptors(&server).min(least));
        }
        thread::sleep(Duration::from_millis(600));
    }
    let report = server.report("TERM");
    for (_, part) in report["sandbox"].as_object().expect("the parts") {
        assert_eq!(part["complete"], true, "{report:#}");
    }
    assert_eq!(report["network"]["name"], "vmnet-sim:shared");
    assert_eq!(
        (&report["uplink"], &report["sockets"][0]["connections"]),
        (&Value::Null, &8.into())
    );
    assert!(capture.metadata().expect("it was written").len() > 60 * 1514, "it is recorded");
}

/// Goal: a network object of macOS 26 has the subnet that was asked for and no service that was turned off,
/// for all guests together and for interfaces of their own.
#[test]
fn a_network_of_its_own_is_as_it_was_asked_for() {
    let folder = scratch("own network");
    let path = folder.join("a.sock");
    let network = "vmnet-sim:host,subnet=192.168.77.1/24";
    for per_client in [&[][..], &["--per-client"]] {
        let listen = listen(&path);
        let arguments = [&["--network", network, "--listen", &listen][..], per_client].concat();
        let server = Server::on(&arguments);
        let mut guest = Guest::new(&path, mac(1));
        guest.post(64);
        let lease = guest.lease();
        assert_eq!(lease[..3], [192, 168, 77], "{lease:?}");
        drop(guest);
        let report = server.report("TERM");
        assert_eq!(report["network"]["name"], "vmnet-sim:host,network", "{report:#}");
    }
    for (network, said) in [
        ("vmnet-sim:bridged:en0,network", "is somebody else's"),
        ("vmnet-sim:shared,frob=1", "there is no option 'frob=1'"),
        ("vmnet-sim:shared,subnet=192.168.77.0/24", "is the subnet's own address"),
    ] {
        let message = refused(&["serve", "--network", network, "--listen", &listen(&path)]);
        assert!(message.contains(said), "{network}: {message}");
    }
}

#[test]
fn what_needs_a_switch_is_refused_to_a_guest_with_its_own_interface() {
    let path = scratch("own refused").join("a.sock");
    let socket = at("qemu", &path);
    let with = |network: &str, more: &str| {
        let listen = format!("{socket}{more}");
        refused(&["serve", "--network", network, "--per-client", "--listen", &listen])
    };
    for (network, more, said) in [
        ("embedded:lab", "", "embedded:lab is one network for all guests"),
        ("vmnet-sim", ",rate=8M", "a limit is kept by the switch"),
        ("vmnet-sim", ",floods=10", "a limit is kept by the switch"),
        ("vmnet-sim", ",mac=learn", "mac=learn is kept by the switch"),
        ("vmnet-sim:bridged:en0", ",isolated", "isolated on a bridged network"),
    ] {
        let message = with(network, more);
        assert!(message.contains(said), "{network}{more}: {message}");
        assert!(!is_socket(&path), "nothing is left");
    }
}
