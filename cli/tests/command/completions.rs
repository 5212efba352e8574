//! What a shell completes.

use super::*;

/// What bash offers for the last of the words. `None`, with a note on stderr, if there is no bash.
fn completed(words: &[&str]) -> Option<Vec<String>> {
    use std::io::Write;

    let script = vmring(&["completions", "bash"]).stdout;
    let file = scratch("completions").join("vmring.bash");
    std::fs::write(&file, script).expect("a file");
    // What bash does at a tab: it calls the function with the command, the word and the one before.
    let bash = "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
                _vmring vmring \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; \
                printf '%s\\n' \"${COMPREPLY[@]}\"";
    let output = Command::new("bash").args(["-c", bash, "bash"]).arg(&file).args(words).output();
    let Ok(output) = output else {
        let _ = writeln!(std::io::stderr(), "skipped: completions: bash is not installed");
        return None;
    };
    assert!(output.status.success(), "{}", text(&output.stderr));
    // Bash shows what is offered twice, here for both ends of a bridge, once.
    let mut offered: Vec<String> = Vec::new();
    for line in text(&output.stdout).lines() {
        if !offered.iter().any(|other| other == line) {
            offered.push(line.to_owned());
        }
    }
    Some(offered)
}

#[test]
fn device_engine_and_mode_names_complete_in_a_shell() {
    let vmnet = if cfg!(target_os = "macos") { "vmnet" } else { "vmnet-sim" };
    let linux = cfg!(target_os = "linux");
    let mut rows = vec![
        (&["vmring", "demo", "--mode", ""][..], vec!["host", "shared"]),
        (&["vmring", "demo", "--device", "em"], vec!["embedded"]),
        (&["vmring", "demo", "--device", "v"], vec![vmnet]),
        (&["vmring", "bench", "--device", "lo"], vec!["loopback"]),
        (&["vmring", "demo", "--drive", ""], vec!["thread", "shared", "inline"]),
        (&["vmring", "bridge", "--offload", ""], vec!["common", "software", "none"]),
        (&["vmring", "bridge", "embedded:a", "ca"], vec!["capture:"]),
        (&["vmring", "bridge", "v"], vec![vmnet, "vfkit:"]),
        (&["vmring", "bridge", "embedded:a", "q"], vec!["qemu:", "qemu-dgram:"]),
        (&["vmring", "serve", "--network", "em"], vec!["embedded:"]),
        (&["vmring", "serve", "--mac", ""], vec!["any", "learn"]),
        (&["vmring", "completions", "b"], vec!["bash"]),
    ];
    if linux {
        rows.extend([
            (&["vmring", "demo", "--device", ""][..], vec!["embedded", "tap", vmnet]),
            (&["vmring", "bench", "--device", "t"], vec!["tap"]),
            (&["vmring", "demo", "--engine", ""], vec!["auto", "io_uring", "plain"]),
            (&["vmring", "bridge", "--engine", "io"], vec!["io_uring"]),
            (&["vmring", "bridge", "ta"], vec!["tap:"]),
        ]);
    }
    for (words, offered) in rows {
        let Some(completed) = completed(words) else { return };
        assert_eq!(completed, offered, "{words:?}");
    }
}

/// The other shells' scripts have the names, too.
#[test]
fn every_shells_script_has_the_names() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = vmring(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0), "{shell}");
        if matches!(shell, "bash" | "fish" | "zsh") {
            for name in ["embedded", "loopback", "shared"] {
                assert!(text(&output.stdout).contains(name), "no {name} for {shell}");
            }
        }
    }
}
