//! Guests whose buffers are the entries of rings: over vhost-user, with DPDK's virtio-user as the front
//! end, beside DPDK's own back end; and in this process.
//!
//! The front end has one processor, and the back end the other. `dpdk-testpmd` is the front end of two
//! guests: it gives what it receives at one port to the other port, so each frame goes round for ever.

mod backends;
mod forwarding;
mod long;
mod notified;
mod ovs;
mod stream;
mod testpmd;

use crate::plan::{Part, Plan};
use crate::programs::{Programs, Step, run_tables};

pub(crate) fn run(plan: Plan, programs: Programs<'_>) -> Part {
    let steps: [Step<'_>; 5] = [
        (forwarding::FORWARDING, &|| forwarding::run(plan, programs.vmring)),
        (forwarding::BUSY, &|| forwarding::run_busy(plan)),
        (long::NAME, &|| long::run(plan).map(Ok)),
        (stream::NAME, &|| stream::run(plan, programs)),
        (notified::NAME, &|| notified::run(plan, programs.vmring)),
    ];
    run_tables(&steps, programs.only)
}
