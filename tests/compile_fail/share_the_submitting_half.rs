//! E0277: a half may move to another thread, but two threads cannot share it.

use vmring::SubmissionQueue;

fn share(sq: &SubmissionQueue) {
    std::thread::scope(|scope| {
        scope.spawn(|| drop(sq.alloc()));
    });
}

fn main() {
    let _ = share;
}
