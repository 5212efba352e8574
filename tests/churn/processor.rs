//! The processor time of one case's threads, which are known by the beginning of their name: other
//! tests run in the same process.

use std::time::Duration;

/// The time that the threads whose name begins with `prefix` have run so far. `None` where the
/// system does not say.
pub(crate) fn time_of(prefix: &str) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    for task in std::fs::read_dir("/proc/self/task").ok()?.flatten() {
        // A thread may end meanwhile.
        let Ok(name) = std::fs::read_to_string(task.path().join("comm")) else { continue };
        if !name.starts_with(prefix) {
            continue;
        }
        let Ok(times) = std::fs::read_to_string(task.path().join("schedstat")) else { continue };
        let nanos = times.split_whitespace().next()?.parse().ok()?;
        sum += Duration::from_nanos(nanos);
    }
    Some(sum)
}
