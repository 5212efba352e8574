//! E0499: a completion that is looked at is not taken by somebody else meanwhile.

use vmring::CompletionQueue;

fn under(cq: &mut CompletionQueue) {
    if let Some(next) = cq.peek() {
        drop(cq.reap());
        drop(next.take());
    }
}

fn main() {
    let _ = under;
}
