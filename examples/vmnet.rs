//! Apple's vmnet: starts a shared interface, asks the gateway for its address, says what comes, and
//! stops.
//!
//! It needs root, or from macOS 26 on a signature with the entitlement in `vmnet.entitlements`,
//! `com.apple.security.virtualization`; an ad-hoc signature is enough. `cargo build` strips signatures,
//! so sign after each build, and start the program itself: `cargo run` may put the unsigned one back.
//!
//! ```sh
//! cargo build --release --example vmnet
//! codesign --sign - --force --entitlements examples/vmnet.entitlements target/release/examples/vmnet
//! target/release/examples/vmnet
//! ```
//!
//! Up to macOS 15 the entitlement is `com.apple.vm.networking`, which Apple grants to developers; a
//! binary that has it from an ad-hoc signature is killed when it starts, so it is not in the file.
//! There, use `sudo`. (Nor is a comment: `codesign` reads entitlements with a parser of its own, which
//! has refused comments that other parsers take.)
//!
//! On other systems it runs on a simulated vmnet if it is built with `--features vmnet-sim`.

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
fn main() -> Outcome {
    use std::time::{Duration, Instant};

    use vmring::{Blocking, Direction, Error, Interface, Mode, Vmnet};

    let started = Interface::builder().mode(Mode::Shared).device(Vmnet::new()).start();
    let interface = match started {
        Err(error @ Error::PermissionDenied { .. }) => {
            // The text says what is missing on this macOS.
            eprintln!("{error}");
            std::process::exit(1);
        }
        started => started?,
    };
    println!("MAC {}", interface.mac());
    println!("MTU {}, packets up to {} bytes", interface.mtu(), interface.max_packet_size());

    let mut network = Blocking::new(interface.ring(Direction::Both).build()?)?;
    if let Some(range) = interface.info().ipv4 {
        // Who has the first address? Asked by nobody in particular (RFC 5227).
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

    // The ring before the interface; then the stop is at once, and says how it went.
    drop(network);
    interface.stop(Duration::from_secs(10))?;
    Ok(())
}

#[cfg(not(any(target_os = "macos", feature = "vmnet-sim")))]
fn main() -> Outcome {
    println!("vmnet needs macOS; a simulated one comes with --features vmnet-sim");
    Ok(())
}
