//! E0277: a half may move to another thread, but two threads cannot share it.

use vmring::CompletionQueue;

fn share(cq: &CompletionQueue) {
    std::thread::scope(|scope| {
        scope.spawn(|| cq.in_flight());
    });
}

fn main() {
    let _ = share;
}
