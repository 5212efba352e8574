//! E0499: a borrowed half keeps the whole ring.

use vmring::Ring;

fn both(ring: &mut Ring) {
    let (sq, _cq) = ring.split();
    ring.close().unwrap();
    drop(sq);
}

fn main() {
    let _ = both;
}
