//! E0277: a half may move to another thread; it is not for two at a time.

use vmring::SubmissionQueue;

fn share(sq: &SubmissionQueue) {
    std::thread::scope(|scope| {
        scope.spawn(|| drop(sq.alloc()));
    });
}

fn main() {
    let _ = share;
}
