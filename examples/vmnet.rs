//! Apple's vmnet: starts a shared interface, sends an ARP request for the gateway's address, prints
//! what arrives, and stops.
//!
//! It needs root. From macOS 26 on, a signature with the entitlement in `vmnet.entitlements`,
//! `com.apple.security.virtualization`, is enough, even an ad-hoc one. `cargo build` strips
//! signatures, so sign after each build. Start the program itself, because `cargo run` may rebuild
//! it without the signature.
//!
//! ```sh
//! cargo build --release --example vmnet
//! codesign --sign - --force --entitlements examples/vmnet.entitlements target/release/examples/vmnet
//! target/release/examples/vmnet
//! ```
//!
//! Up to macOS 15 the entitlement is `com.apple.vm.networking`, which Apple grants to developers.
//! macOS kills a binary that has it from an ad-hoc signature, so it is not in the file; use `sudo`
//! there. (The file has no comment, because `codesign` reads entitlements with a parser of its own,
//! which has refused comments that other parsers accept.)
//!
//! On other systems it runs on a simulated vmnet if it is built with `--features vmnet-sim`.

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
fn main() -> Outcome {
    use std::time::{Duration, Instant};

    use vmring::{BlockingRing, Direction, Error, Interface, Mode, Vmnet};

    let started = Interface::builder().mode(Mode::Shared).device(Vmnet::new()).start();
    let interface = match started {
        Err(error @ Error::PermissionDenied { .. }) => {
            // The message says what is missing on this macOS.
            eprintln!("{error}");
            std::process::exit(1);
        }
        started => started?,
    };
    println!("MAC {}", interface.mac());
    println!("MTU {}, packets up to {} bytes", interface.mtu(), interface.max_packet_size());

    let mut network = BlockingRing::new(interface.ring(Direction::Both).build()?)?;
    if let Some(range) = interface.info().ipv4 {
        // An ARP probe (RFC 5227): it asks for the first address and has no sender address.
        let mac = interface.mac().into_array();
        let mut request =
            [&[0xff; 6][..], &mac, b"\x08\x06\0\x01\x08\0\x06\x04\0\x01", &mac].concat();
        request.extend([0; 10]);
        request.extend(range.start.octets());
        network.write(&request)?;
    }
    let end = Instant::now() + Duration::from_secs(5);
    let mut packets = 0;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        let Some(packet) = network.read_timeout(left)? else { break };
        packets += 1;
        if let Some(header) = packet.view().ethernet() {
            let from = vmring::MacAddr6::from(header.source());
            println!("{} bytes from {from}, type {:#06x}", packet.len(), header.ethertype());
        }
    }
    println!("{packets} packets in five seconds");

    // Drop the ring before the interface. The stop is then immediate and returns its result.
    drop(network);
    interface.stop(Duration::from_secs(10))?;
    Ok(())
}

#[cfg(not(any(target_os = "macos", feature = "vmnet-sim")))]
fn main() -> Outcome {
    println!("vmnet needs macOS; a simulated one comes with --features vmnet-sim");
    Ok(())
}
