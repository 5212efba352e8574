//! Parsing through `PacketView`: one length check, then fields at constant positions.

use criterion::{Criterion, Throughput};
use std::hint::black_box;
use vmring::PacketView;

/// A packet with Ethernet, IPv4 and UDP headers and a little payload.
fn packet() -> Vec<u8> {
    let mut packet = vec![0; 60];
    packet[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
    packet[14] = 0x45;
    packet[23] = 17;
    packet[34..36].copy_from_slice(&67_u16.to_be_bytes());
    packet[36..38].copy_from_slice(&68_u16.to_be_bytes());
    packet
}

/// Checks the length at every access.
fn ports_by_getters(bytes: &[u8]) -> Option<(u16, u16)> {
    let view = PacketView::whole(bytes)?;
    if view.be16(12)? != 0x0800 || view.u8(23)? != 17 {
        return None;
    }
    let udp = view.shift(34)?;
    Some((udp.be16(0)?, udp.be16(2)?))
}

/// Checks the length once.
fn ports_by_fields(bytes: &[u8]) -> Option<(u16, u16)> {
    let view = PacketView::whole(bytes)?;
    let head = view.fields::<42>()?;
    (head.be16::<12>() == 0x0800 && head.u8::<23>() == 17)
        .then(|| (head.be16::<34>(), head.be16::<36>()))
}

fn views(c: &mut Criterion) {
    let packet = packet();
    assert_eq!(ports_by_getters(&packet), Some((67, 68)));
    assert_eq!(ports_by_fields(&packet), Some((67, 68)));
    let mut group = c.benchmark_group("views");
    group.throughput(Throughput::Elements(1));
    group.bench_function("getters", |b| b.iter(|| ports_by_getters(black_box(&packet))));
    group.bench_function("fields", |b| b.iter(|| ports_by_fields(black_box(&packet))));
    group.finish();
}

fn main() {
    let mut c = Criterion::default().configure_from_args();
    views(&mut c);
    c.final_summary();
}
