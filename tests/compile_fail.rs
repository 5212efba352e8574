//! What must not compile. For each misuse there is a program in `tests/compile_fail`, and its first
//! line says which error it gets. Only the error's code is compared, because the text differs
//! between versions of the compiler.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const DIR: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/compile-fail");
/// Far longer than checking all dependencies takes.
const LONG: Duration = Duration::from_secs(900);

/// What the first line of a program says: the code of an error, or that it compiles.
fn expectation(source: &str) -> Option<String> {
    let line = source.lines().next()?.strip_prefix("//! ")?;
    let (code, _) = line.split_once(':').or_else(|| line.split_once(' '))?;
    Some(code.to_owned())
}

/// Writes a crate with one program per case. Returns what is expected of each.
fn write_crate(dir: &Path) -> BTreeMap<String, String> {
    let mut manifest = format!(
        "[package]\nname = \"compile-fail\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
         publish = false\n[workspace]\n[dependencies]\nvmring = {{ path = {ROOT:?} }}\n"
    );
    let mut expected = BTreeMap::new();
    for case in fs::read_dir(Path::new(ROOT).join("tests/compile_fail")).expect("the cases") {
        let path = case.expect("a case").path();
        let name = path.file_stem().expect("a file").to_str().expect("a name").to_owned();
        let source = fs::read_to_string(&path).expect("a readable case");
        let expectation = expectation(&source).unwrap_or_else(|| panic!("{name}: its first line"));
        manifest += &format!("[[bin]]\nname = {name:?}\npath = {path:?}\n");
        expected.insert(name, expectation);
    }
    fs::create_dir_all(dir).expect("a place to write to");
    fs::write(dir.join("Cargo.toml"), manifest).expect("the manifest");
    // Use the versions of this Cargo.lock, so that nothing is downloaded.
    fs::copy(Path::new(ROOT).join("Cargo.lock"), dir.join("Cargo.lock")).expect("the lock file");
    expected
}

/// Checks every program. Returns cargo's messages.
fn check(dir: &Path) -> String {
    let (out, err) = (dir.join("messages"), dir.join("errors"));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let mut child = Command::new(cargo)
        .args(["check", "--offline", "--bins", "--keep-going", "--message-format=json"])
        .arg("--target-dir")
        .arg(dir.join("target"))
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(File::create(&out).expect("a file"))
        .stderr(File::create(&err).expect("a file"))
        .spawn()
        .expect("cargo, which has built this test");
    let start = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        if start.elapsed() > LONG {
            let _ = child.kill();
            panic!("`cargo check` hangs in {}:\n{}", dir.display(), read(&err));
        }
        thread::sleep(Duration::from_millis(20));
    }
    let messages = read(&out);
    let ended = messages.lines().any(|line| line.contains("\"build-finished\""));
    assert!(ended, "`cargo check` could not begin:\n{}", read(&err));
    messages
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).expect("what cargo wrote")
}

#[test]
fn misuse_does_not_compile() {
    if let Some(why) = std::env::var_os("VMRING_SKIP_TRYBUILD") {
        eprintln!("SKIPPED: misuse_does_not_compile, because VMRING_SKIP_TRYBUILD is {why:?}");
        return;
    }
    let expected = write_crate(Path::new(DIR));
    let mut got: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut texts, mut compiled) = (String::new(), BTreeSet::new());
    for line in check(Path::new(DIR)).lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
        let name = line["target"]["name"].as_str().unwrap_or_default().to_owned();
        let message = &line["message"];
        if line["reason"] == "compiler-artifact" {
            compiled.insert(name);
        } else if message["level"] == "error" {
            texts += message["rendered"].as_str().unwrap_or_default();
            if let Some(code) = message["code"]["code"].as_str() {
                got.entry(name).or_default().insert(code.to_owned());
            }
        }
    }
    assert!(compiled.contains("vmring"), "the library itself was not checked:\n{texts}");
    assert!(expected.len() > 10, "where are the cases?");
    for (name, expectation) in &expected {
        let codes: Vec<_> = got.remove(name).into_iter().flatten().collect();
        if expectation == "Compiles" {
            assert!(compiled.contains(name), "{name} must compile:\n{texts}");
        } else {
            assert_eq!(codes, [expectation.as_str()], "{name}:\n{texts}");
        }
    }
    assert!(got.is_empty(), "errors elsewhere: {got:?}\n{texts}");
}
