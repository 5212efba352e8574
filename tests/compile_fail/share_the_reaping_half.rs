//! E0277: as for the submitting half.

use vmring::CompletionQueue;

fn share(cq: &CompletionQueue) {
    std::thread::scope(|scope| {
        scope.spawn(|| cq.in_flight());
    });
}

fn main() {
    let _ = share;
}
