//! Two contracts about the API as a whole: it is safe Rust, and it can be used from anywhere.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use vmring::{CloseReason, Direction, Drive, EntryError, Interface, RingControl};

use crate::support::{LONG, guarded, loopback, post, reap_n};

/// The Rust files below a directory.
fn sources(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the sources are there") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all.push(path);
        }
    }
}

/// Goal: code that uses vmring needs no `unsafe`. The exceptions adopt what only the caller can
/// vouch for: the caller's own memory, and an object of the system.
#[test]
fn safe_api() {
    let allowed = [
        ("backing.rs", "pub unsafe trait Backing"),
        ("region.rs", "pub unsafe trait GuestMapping"),
        ("network.rs", "pub unsafe fn from_xpc_object"),
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "ring/src", "embedded/src", "virtio/src", "rust-vmm/src"] {
        sources(&root.join(folder), &mut files);
    }
    assert!(files.len() > 20, "{files:?}");
    let mut found = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).expect("a source is text");
        for line in text.lines().map(str::trim_start) {
            let public = line.starts_with("pub unsafe ") || line.starts_with("pub const unsafe ");
            if public {
                let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                found.push((name.to_owned(), line.to_owned()));
            }
        }
    }
    for (file, line) in &found {
        let known = allowed.iter().any(|(name, start)| file == name && line.starts_with(start));
        assert!(known, "{file} has an unsafe item that users can reach: {line}");
    }
    assert_eq!(found.len(), allowed.len(), "an exception is gone: {found:?}");
}

fn from_any_thread<T: Send + Sync>(_: &T) {}

/// Goal: another thread can wake, restart and stop a ring while the ring's owner sleeps in `wait`.
/// The control handle stops one ring; the interface restarts all of its rings.
#[test]
fn from_anywhere() {
    guarded(|| {
        let interface: Interface = loopback();
        let mut ring = interface.ring(Direction::Both).drive(Drive::Thread).build().unwrap();
        let control: RingControl = ring.control();
        from_any_thread(&control);
        from_any_thread(&interface);
        post(&mut ring, 1);
        let soon = Duration::from_millis(30);
        let other = |action: &(dyn Fn() + Sync), ring: &mut vmring::Ring| {
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(soon);
                    action();
                });
                let start = Instant::now();
                let ready = ring.wait(1, Some(LONG));
                assert!(start.elapsed() < LONG, "nothing woke it");
                ready
            })
        };
        assert_eq!(other(&|| control.wake(), &mut ring), 0, "woken, and nothing has completed");

        assert_eq!(other(&|| interface.restart(LONG).unwrap(), &mut ring), 1);
        assert_eq!(reap_n(&mut ring, 1)[0].result, Err(EntryError::Cancelled));
        assert_eq!(control.closed(), None);

        post(&mut ring, 2);
        assert_eq!(other(&|| control.stop(), &mut ring), 1);
        assert_eq!(reap_n(&mut ring, 1)[0].result, Err(EntryError::Cancelled));
        assert_eq!(control.closed(), Some(CloseReason::Stopped));
    });
}
