//! The handler, on files that lose their pages. Every test here runs in one process with the others,
//! whose accesses must not be harmed.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::OnceLock;
use std::thread;

use super::*;

/// The tests that take places take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The process has one handler.
fn places() -> &'static Places {
    static INSTALLED: OnceLock<&Places> = OnceLock::new();
    INSTALLED.get_or_init(|| Places::install(3).expect("it is installed"))
}

/// Some pages of a file, which another process could shorten.
struct Pages {
    file: File,
    start: *mut u8,
    len: usize,
}

impl Pages {
    fn new(pages: usize) -> Self {
        let path = std::env::temp_dir().join(format!(
            "vmring-pages-{}-{:?}-{pages}",
            std::process::id(),
            thread::current().id()
        ));
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.expect("a file in the folder for temporary files");
        std::fs::remove_file(&path).expect("the file's name");
        let len = pages * places().page;
        file.set_len(len as u64).expect("the length of the file");
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: the system chooses the address.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, access, kind, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { file, start: start.cast(), len }
    }

    fn read(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: the byte is in the mapping.
        unsafe { self.start.add(at).read_volatile() }
    }

    fn write(&self, at: usize, byte: u8) {
        assert!(at < self.len);
        // SAFETY: the byte is in the mapping.
        unsafe { self.start.add(at).write_volatile(byte) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping of `new`, or what the handler has put there.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.len) }, 0);
    }
}

fn rings(seat: &Seat) -> bool {
    let mut poll = libc::pollfd { fd: seat.bell().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    crate::system::poll(std::slice::from_mut(&mut poll), 0);
    poll.revents != 0
}

/// Goal: whoever accesses a lost page goes on, the front end that lost it is told of, and no other.
#[test]
fn a_lost_page_is_replaced_and_its_connection_told() {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let _turn = turn();
    let (one, other) = (places().take().expect("a place"), places().take().expect("a place"));
    let (pages, others) = (Pages::new(4), Pages::new(5));
    let (observer, observer_of_other) = (one.observer(), other.observer());
    assert!(observer.mapped(pages.start.addr(), pages.len));
    assert!(observer_of_other.mapped(others.start.addr(), others.len));
    pages.write(0, 7);
    others.write(0, 8);
    assert!(!one.has_shrunk() && !rings(&one));
    pages.file.set_len(pages.len as u64 / 2).expect("it is shortened");
    pages.write(pages.len - 1, 9);
    assert_eq!((pages.read(pages.len - 1), others.read(0)), (9, 8));
    assert!(one.has_shrunk() && rings(&one));
    assert!(!other.has_shrunk() && !rings(&other));
    // The whole mapping is private zeroes now, so that the front end changes nothing there any more.
    assert_eq!(pages.read(0), 0);

    // Its addresses are somebody else's when it has gone, and its place too.
    observer.unmapped(pages.start.addr(), pages.len);
    drop(one);
    let next = places().take().expect("a place");
    assert!(!next.has_shrunk() && !rings(&next));
    others.file.set_len(0).expect("it is shortened");
    assert_eq!(others.read(3), 0);
    assert!(other.has_shrunk() && rings(&other) && !next.has_shrunk());
}

/// Goal: a mapping that outlives its connection does not end the one that has its place now.
#[test]
fn a_late_access_ends_no_other_connection() {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let _turn = turn();
    let pages = Pages::new(2);
    let late = {
        let seat = places().take().expect("a place");
        let observer = seat.observer();
        assert!(observer.mapped(pages.start.addr(), pages.len));
        observer
    };
    let seats: Vec<_> = std::iter::from_fn(|| places().take()).collect();
    pages.file.set_len(0).expect("it is shortened");
    assert_eq!(pages.read(1), 0);
    assert!(seats.iter().all(|seat| !seat.has_shrunk() && !rings(seat)));
    late.unmapped(pages.start.addr(), pages.len);
}

/// Goal: the number of a connection's mappings is limited, and what is unmapped makes room.
#[test]
fn a_connection_has_so_many_mappings() {
    if std::env::var_os(CHILD).is_some() {
        return;
    }
    let places = Places::new(1).expect("places");
    let seat = places.take().expect("a place");
    let observer = seat.observer();
    for n in 1..=MAPPINGS_PER_CONNECTION {
        assert!(observer.mapped(n << 20, 4096), "{n}");
    }
    assert!(!observer.mapped(1 << 50, 4096));
    observer.unmapped(7 << 20, 4096);
    assert!(observer.mapped(1 << 50, 4096));
    assert!(!observer.mapped(1 << 51, 4096));
    assert!(places.take().is_none());
}

const CHILD: &str = "VMRING_TEST_SIGBUS";

/// Goal: a SIGBUS that is not about a front end's memory ends the process, whether it is a fault or
/// was sent. Method: the test runs itself again.
#[test]
fn any_other_sigbus_ends_the_process() {
    let name = "serve::sigbus::tests::any_other_sigbus_ends_the_process";
    match std::env::var(CHILD).as_deref() {
        Ok("fault") => {
            let (pages, known) = (Pages::new(1), Pages::new(2));
            let seat = places().take().expect("a place");
            assert!(seat.observer().mapped(known.start.addr(), known.len));
            pages.file.set_len(0).expect("it is shortened");
            pages.read(0);
        }
        Ok("sent") => {
            places();
            // SAFETY: the call takes a number only.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        _ => {
            for how in ["fault", "sent"] {
                let output = Command::new(std::env::current_exe().expect("this program"))
                    .args([name, "--exact", "--test-threads=1"])
                    .env(CHILD, how)
                    .output()
                    .expect("this program runs");
                let text = String::from_utf8_lossy(&output.stdout);
                assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{how}: {text}");
            }
            return;
        }
    }
    panic!("it goes on");
}
