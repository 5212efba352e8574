//! A TCP stream from a guest to whoever listens, or from there to the guest.

use vmring_guest::Running;

use crate::result::Result;

/// Gbit/s of one stream of `iperf3` to the server at `address`, or from it if `reverse`.
pub(crate) fn run(guest: &mut Running, address: &str, reverse: bool, seconds: u32) -> Result<f64> {
    let arrived = guest.run(&format!("ping -c 1 -W 5 {address}"));
    if arrived.status != 0 {
        return Err(format!("the guest does not reach {address}: {}", arrived.output).into());
    }
    let reverse = if reverse { "--reverse" } else { "" };
    let done = guest.run(&format!("iperf3 --client {address} --json --time {seconds} {reverse}"));
    let json = done.output.find('{').map_or("", |at| &done.output[at..]);
    let report: serde_json::Value = serde_json::from_str(json)
        .map_err(|error| format!("iperf3 in the guest: {error}: {}", done.output))?;
    report["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .map(|bits| bits / 1e9)
        .ok_or_else(|| format!("iperf3 in the guest: {}", report["error"]).into())
}
