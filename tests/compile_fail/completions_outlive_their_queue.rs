//! E0505: the iterator over completions borrows the queue.

use vmring::CompletionQueue;

fn outlive(mut cq: CompletionQueue) {
    let completions = cq.reap();
    drop(cq);
    for done in completions {
        drop(done);
    }
}

fn main() {
    let _ = outlive;
}
