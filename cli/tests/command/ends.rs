//! The ends of a bridge: which are refused, and with which exit code.

use super::*;

#[test]
fn a_name_that_no_interface_can_have_is_refused_before_anything_starts() {
    if cfg!(not(target_os = "linux")) {
        return;
    }
    let capture = scratch("names").join("new.pcapng");
    let capture = format!("capture:{}", capture.display());
    for name in ["a-name-too-long-for-linux", "x/y", "..", "a b", "x%d"] {
        let end = format!("tap:{name}");
        for arguments in [["bridge", &end, &capture], ["bridge", &capture, &end]] {
            let message = refused(&arguments);
            assert!(message.contains(&format!("'{name}'")), "{message}");
            assert!(message.contains("1 to 15 bytes"), "{message}");
        }
    }
    assert!(!Path::new(&capture["capture:".len()..]).exists());
}

/// What exists on the machine under the names that the command line has.
#[cfg(target_os = "linux")]
#[test]
fn an_interface_that_is_no_tap_and_a_missing_bridge_are_usage_errors() {
    use std::os::unix::process::CommandExt;

    if !tap::is_possible() {
        return;
    }
    for (end, words) in [
        ("tap:lo", ["'lo' is an interface of this host, but no TAP", "choose another name"]),
        ("tap:vmr0,bridged:nowhere", ["no bridge 'nowhere'", "ip link add br0 type bridge"]),
        ("tap:vmr0,bridged:lo", ["no bridge 'lo'", "name one that is there"]),
    ] {
        let arguments = ["bridge", end, "embedded:other"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
        // SAFETY: unshare(2) is a system call with a plain number, which touches no memory. The
        // child gets a network namespace of its own.
        unsafe {
            command.pre_exec(|| match libc::unshare(libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        let command = command.args(arguments).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let output = ended(child.expect("the command starts"), &arguments);
        let message = refusal(&output, &arguments);
        for words in words {
            assert!(message.contains(words), "no {words} in {message}");
        }
    }
}
