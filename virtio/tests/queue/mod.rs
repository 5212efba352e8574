//! The device side of a split virtqueue, against the driver in `driver/`.

mod chains;
mod model;
mod notifications;
mod order;
mod parts;
#[cfg(unix)]
mod process;

use vmring_virtio::queue::{Chain, Queue};

use crate::driver::{Buffer, Driver};

/// Makes chains available whose one buffer is room for so many bytes. Returns their heads.
fn post_room(driver: &mut Driver, lens: impl IntoIterator<Item = u32>) -> Vec<u16> {
    let post = |len| driver.post(&[(len, true)], None).expect("there is room");
    let heads = lens.into_iter().map(post).collect();
    driver.expose();
    heads
}

/// Pops `count` chains, which are whole.
fn pop_whole(queue: &mut Queue, count: u16) {
    for _ in 0..count {
        queue.pop().expect("it is there").expect("it is whole");
    }
}

/// Fills the room of a chain, up to `len` bytes, with `byte`.
fn fill(chain: &Chain<'_>, byte: u8, len: u64) {
    let mut left = len;
    for segment in chain.writable() {
        let len = left.min(segment.len().into()) as usize;
        assert_eq!(segment.copy_from(&vec![byte; len]), len);
        left -= len as u64;
    }
    assert_eq!(left, 0, "the chain has less room");
}

/// The bytes that a chain gives for reading.
fn bytes_of(chain: &Chain<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in chain.readable() {
        let at = bytes.len();
        bytes.resize(at + segment.len() as usize, 0);
        assert_eq!(segment.copy_to(&mut bytes[at..]), segment.len() as usize);
    }
    bytes
}

/// What the segments of a chain must be: `buffers`, each cut where a region ends.
fn cut(driver: &Driver, buffers: &[Buffer]) -> Vec<(u64, u32, bool)> {
    let ends: Vec<u64> =
        driver.memory().regions().iter().map(|r| r.guest_address() + r.len()).collect();
    let mut segments = Vec::new();
    for &Buffer { address, len, writable } in buffers {
        let (mut at, end) = (address, address + u64::from(len));
        while at < end {
            let border = ends.iter().copied().find(|border| *border > at).expect("memory");
            let until = border.min(end);
            segments.push((at, (until - at) as u32, writable));
            at = until;
        }
    }
    segments
}

/// The segments of a chain.
fn segments(chain: &Chain<'_>) -> Vec<(u64, u32, bool)> {
    let readable = chain.readable().map(|s| (s.guest_address(), s.len(), false));
    let all: Vec<_> =
        readable.chain(chain.writable().map(|s| (s.guest_address(), s.len(), true))).collect();
    let len =
        |writable| -> u64 { all.iter().filter(|s| s.2 == writable).map(|s| u64::from(s.1)).sum() };
    assert_eq!((chain.readable_len(), chain.writable_len()), (len(false), len(true)));
    assert_eq!(chain.readable().len() + chain.writable().len(), all.len());
    all
}
