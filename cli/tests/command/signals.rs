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

    /// Waits until it has had a processor for this long.
    fn works_for(&self, time: Duration) {
        thread::sleep(time);
        // Elsewhere nothing tells simply how long that was.
        if cfg!(target_os = "linux") {
            let start = Instant::now();
            while self.worked() < time {
                assert!(start.elapsed() < LIMIT, "it has worked for {:?}", self.worked());
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// The processor time that it has used.
    fn worked(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        // Fields 14 and 15 of proc(5), in ticks. They come after the name, in parentheses.
        let stat = stat.expect("it runs");
        let fields: Vec<_> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        let ticks = [fields[11], fields[12]].map(|field| field.parse::<u64>().expect("a number"));
        // SAFETY: `sysconf` takes no pointers.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as u64;
        Duration::from_millis(ticks.iter().sum::<u64>() * 1000 / per_second)
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
        bench.works_for(Duration::from_secs(1));
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

/// The demo, ended by `signal` once its progress on stderr has the words `until`: the report and the
/// sentence on stderr.
fn ended_demo(signal: &str, until: &str, arguments: &[&str]) -> (Value, String) {
    let arguments = [&["demo", "--json"], arguments].concat();
    let mut demo = Started::new(&arguments);
    let mut said = String::new();
    while !said.contains(until) {
        let mut byte = [0];
        demo.child.stderr.as_mut().expect("piped").read_exact(&mut byte).expect("a word");
        said.push(byte[0].into());
    }
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    let output = demo.ended_by(signal);
    assert!(start.elapsed() < LIMIT / 4, "it took {:?}", start.elapsed());
    // Not every step has succeeded.
    assert_eq!(output.status.code(), Some(1), "{signal}: {}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!((&report["ok"], &report["interrupted"]), (&false.into(), &true.into()));
    let sentence = text(&output.stderr).lines().last().expect("a sentence").to_owned();
    let sentence = sentence.strip_prefix("vmring: ").expect("the command's sentence").to_owned();
    assert_eq!(report["failed"], sentence);
    (report, sentence)
}

#[test]
fn a_signal_ends_a_demo_with_its_report_and_the_whole_capture() {
    for signal in SIGNALS {
        let path = scratch(&format!("demo {signal}")).join("demo.pcapng");
        let capture = ["--bytes", "1T", "--capture", path.to_str().expect("UTF-8")];
        let (report, sentence) = ended_demo(signal, "sending", &capture);
        assert!(
            sentence.starts_with("a signal ended the demo while guest0 sent 1 TiB"),
            "{sentence}"
        );
        assert!(sentence.ends_with("had arrived"), "{sentence}");
        // What it found before the signal is there, and what it did not get to is not.
        assert_eq!(report["ping"]["sent"], report["ping"]["received"]);
        assert!(report["guests"][1]["ipv4"].is_string(), "{report}");
        assert!(report["guests"][1]["packets_read"].as_u64() > Some(50), "{report}");
        assert_eq!(report["transfer"], Value::Null);
        assert_eq!(report["capture"]["packets"], frames(&path).len());
    }
}

#[test]
fn a_signal_ends_a_demo_that_idles() {
    let start = Instant::now();
    let (report, sentence) = ended_demo("HUP", "both guests idle", &["--idle", "3600"]);
    assert!(start.elapsed() < LIMIT, "it idled on");
    assert_eq!(sentence, "a signal ended the demo while both guests idled");
    assert_eq!(report["idle"], Value::Null);
}

/// The kernel's end of the transfer waits in calls of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_signal_ends_a_demo_on_a_tap() {
    if !tap::is_possible() {
        return;
    }
    for signal in SIGNALS {
        let arguments = ["--device", "tap", "--bytes", "1T"];
        let (report, sentence) = ended_demo(signal, "sending", &arguments);
        assert!(sentence.contains("guest0 sent 1 TiB to kernel"), "{sentence}");
        assert_eq!(report["ping"]["sent"], report["ping"]["received"]);
    }
}

#[test]
fn an_interrupted_demo_says_so_to_people() {
    let mut demo = Started::new(&["demo", "--bytes", "1T"]);
    let mut line = [0; 80];
    demo.child.stderr.as_mut().expect("piped").read_exact(&mut line).expect("some words");
    let output = demo.ended_by("INT");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report = text(&output.stdout);
    for words in ["guest1", "192.168.64.", "Drops", "before its time"] {
        assert!(report.contains(words), "no {words} in {report}");
    }
}
