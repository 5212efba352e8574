//! E0277: as for its halves.

use vmring::Ring;

fn share(ring: &Ring) {
    std::thread::scope(|scope| {
        scope.spawn(|| ring.in_flight());
    });
}

fn main() {
    let _ = share;
}
