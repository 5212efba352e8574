//! What a signal does: the command ends with its report.

use std::os::unix::process::CommandExt;

use super::*;

/// A running command that can be sent signals.
struct Started {
    child: Child,
    arguments: Vec<String>,
}

impl Started {
    /// Starts `vmring`, and waits until it has said something on stderr, which it does once it
    /// handles signals and works.
    fn new(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
        // SAFETY: signal(2) is safe to call between fork and exec, and touches no memory.
        unsafe {
            command.pre_exec(|| {
                // The tests may run under nohup(1), whose children ignore SIGHUP.
                libc::signal(libc::SIGHUP, libc::SIG_DFL);
                Ok(())
            })
        };
        Self::of(command.args(arguments), arguments)
    }

    fn of(command: &mut Command, arguments: &[&str]) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let mut said = [0; 16];
        let stderr = child.stderr.as_mut().expect("piped");
        stderr.read_exact(&mut said).expect("it says something before it ends");
        Self { child, arguments: arguments.iter().map(ToString::to_string).collect() }
    }

    fn signal(&self, name: &str) {
        let arguments = [format!("-{name}"), self.child.id().to_string()];
        let kill = Command::new("kill").args(arguments).status();
        assert!(kill.expect("there is kill").success());
    }

    /// Sends the signal, and waits for the end.
    fn ended_by(self, name: &str) -> Output {
        self.signal(name);
        self.ended()
    }

    fn ended(self) -> Output {
        let arguments: Vec<_> = self.arguments.iter().map(String::as_str).collect();
        ended(self.child, &arguments)
    }
}

/// Ctrl-C, kill(1), and a terminal that closes.
const SIGNALS: [&str; 3] = ["INT", "TERM", "HUP"];

#[test]
fn a_signal_ends_a_bridge_with_its_report() {
    for signal in SIGNALS {
        let bridge = Started::new(&["bridge", "embedded:one", "embedded:two", "--json"]);
        let output = bridge.ended_by(signal);
        assert_eq!(output.status.code(), Some(0), "{signal}: {}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!((&report["ok"], &report["failed"]), (&true.into(), &Value::Null));
    }
}

#[test]
fn a_signal_ends_a_bench_with_the_figures_so_far() {
    for signal in SIGNALS {
        let bench = Started::new(&["bench", "--seconds", "3600"]);
        // Some of its first intervals pass, a tenth of a second each.
        thread::sleep(Duration::from_secs(1));
        let start = Instant::now();
        let output = bench.ended_by(signal);
        assert!(start.elapsed() < LIMIT / 4, "it took {:?}", start.elapsed());
        assert_eq!(output.status.code(), Some(0), "{signal}: {}", text(&output.stderr));
        let report = text(&output.stdout);
        for words in ["packets/s", "inline", "none was lost", "the figures so far"] {
            assert!(report.contains(words), "no {words} in {report}");
        }
        assert!(!report.contains("parked"), "it did not get there: {report}");
    }
}

/// nohup(1) starts a command with SIGHUP ignored, and so it stays.
#[test]
fn a_sighup_that_is_ignored_stays_ignored() {
    let arguments = ["bridge", "embedded:one", "embedded:two", "--json", "--seconds", "2"];
    let mut shell = Command::new("sh");
    let script = "trap '' HUP; exec \"$0\" \"$@\"";
    shell.args(["-c", script, env!("CARGO_BIN_EXE_vmring")]).args(arguments);
    let output = Started::of(&mut shell, &arguments).ended_by("HUP");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(report["seconds"].as_f64() >= Some(2.0), "it ended at the SIGHUP: {report}");
}
