//! E0499: the choice among completions cannot take one itself.

use vmring::{CompletionInfo, Ring};

fn choose(mut ring: Ring) {
    let wanted = |_: &CompletionInfo| ring.peek().is_some();
    drop(ring.reap_if(wanted));
}

fn main() {
    let _ = choose;
}
