//! E0382: a completion that is looked at is taken at most once.

use vmring::Ring;

fn twice(ring: &mut Ring) {
    if let Some(next) = ring.peek() {
        drop(next.take());
        drop(next.take());
    }
}

fn main() {
    let _ = twice;
}
