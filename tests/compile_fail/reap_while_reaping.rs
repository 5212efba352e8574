//! E0499: there is one loop over completions at a time.

use vmring::CompletionQueue;

fn nested(cq: &mut CompletionQueue) {
    for done in cq.reap() {
        drop(done);
        drop(cq.reap());
    }
}

fn main() {
    let _ = nested;
}
