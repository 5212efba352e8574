//! A VMM's event loop: `poll(2)` on the ring's descriptor, beside everything else that the VMM
//! waits for.
//!
//! `arm_after` asks for one signal per 32 packets, or 200 microseconds after the first packet. That
//! is where a VMM injects one interrupt for the whole batch.
//!
//! ```sh
//! cargo run --example event_loop
//! ```

use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use vmring::{Direction, Embedded, Interface, RingOp};

const PACKETS: u64 = 1000;

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let start = || Interface::builder().device(Embedded::network("event-loop")).start();
    let (guest, peer) = (start()?, start()?);
    let to = guest.mac().into_array();
    let sender = thread::spawn(move || send(&peer, to));

    let mut ring = guest.ring(Direction::Read).depth(256).build()?;
    let frames: Vec<_> = std::iter::from_fn(|| ring.alloc()).collect();
    ring.submit_reads(frames.into_iter().zip(0..))?;
    let fd = ring.completion_fd()?.as_raw_fd();

    let (mut packets, mut interrupts) = (0, 0);
    while packets < PACKETS {
        if ring.arm_after(32, Some(Duration::from_micros(200))) {
            // A VMM adds its other descriptors here.
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: the pointer is to one `pollfd`, exclusively borrowed. The ring keeps its
            // descriptor open.
            match unsafe { libc::poll(&mut poll, 1, 5000) } {
                0 => return Err("no packet within five seconds".into()),
                1 => {}
                _ => continue,
            }
        }
        let before = packets;
        let (mut sq, mut cq) = ring.split();
        for done in cq.reap() {
            let frame = done.take_packet()?;
            packets += 1;
            sq.submit_read(frame, done.user_data)?;
        }
        interrupts += u64::from(packets > before);
    }
    println!("{packets} packets, {interrupts} interrupts");
    sender.join().expect("the sender ends")
}

/// The other guest. It sends `PACKETS` frames and waits only until its own frames are free again.
fn send(
    interface: &Interface,
    to: [u8; 6],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut packet = [0; 60];
    packet[..6].copy_from_slice(&to);
    packet[6..12].copy_from_slice(&interface.mac().into_array());
    let mut ring = interface.ring(Direction::Write).depth(64).build()?;
    let mut sent = 0;
    while sent < PACKETS {
        while sent < PACKETS
            && let Some(mut frame) = ring.alloc()
        {
            frame.copy_from(&packet)?;
            ring.submit_write(frame, sent)?;
            sent += 1;
        }
        ring.wait(1, Some(Duration::from_secs(5)));
        assert!(ring.reap().all(|done| done.op == RingOp::Write && done.result.is_ok()));
    }
    ring.wait(64, Some(Duration::from_secs(5)));
    Ok(())
}
