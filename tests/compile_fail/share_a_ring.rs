//! E0277: a ring may move to another thread, but two threads cannot share it.

use vmring::Ring;

fn share(ring: &Ring) {
    std::thread::scope(|scope| {
        scope.spawn(|| ring.in_flight());
    });
}

fn main() {
    let _ = share;
}
