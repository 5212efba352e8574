//! What a person reads fits into a terminal of 80 columns.

use super::*;

fn fits(arguments: &[&str]) -> String {
    let output = vmring(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for line in text(&output.stdout).lines().chain(text(&output.stderr).lines()) {
        // The path of a checkout can be a word that no line holds.
        let one_word = !line.trim().contains(' ');
        assert!(line.chars().count() <= 80 || one_word, "{arguments:?}: {line}");
    }
    text(&output.stdout).to_owned()
}

#[test]
fn reports_fit_into_80_columns() {
    fits(&["info"]);
    fits(&["demo", "--bytes", "1M", "--drive", "shared", "--subnet", "192.168.100.201/24"]);
    fits(&["demo", "--bytes", "1M", "--offload"]);
    fits(&["bench", "--seconds", "1", "--offload"]);
    fits(&["bench", "--seconds", "1"]);
    if cfg!(not(target_os = "macos")) {
        fits(&["demo", "--device", "vmnet-sim", "--bytes", "1K"]);
    }
    #[cfg(target_os = "linux")]
    if tap::is_possible() {
        fits(&["demo", "--device", "tap", "--bytes", "1M", "--idle", "1", "--offload"]);
        fits(&["bench", "--device", "tap", "--seconds", "1"]);
    }
    // The paths of files have any length.
    let folder = scratch("a folder whose name is long enough to fill a line of a table by itself");
    let [from, to] = ["from.pcapng", "to.pcapng"].map(|name| folder.join(name));
    json(&["demo", "--json", "--bytes", "256K", "--mtu", "9000", "--capture", path(&from)]);
    let [pcap, capture] = [format!("pcap:{}", path(&from)), format!("capture:{}", path(&to))];
    let report = fits(&["bridge", &pcap, &capture]);
    for name in ["/from.pcapng  1500", "/to.pcapng  1500"] {
        assert!(report.contains(name), "the end of a name tells files apart: {report}");
    }
}

#[test]
fn help_fits_into_80_columns() {
    fits(&["--help"]);
    fits(&["-h"]);
    for command in ["demo", "bridge", "bench", "info", "probe", "completions"] {
        fits(&[command, "--help"]);
        fits(&[command, "-h"]);
    }
}
