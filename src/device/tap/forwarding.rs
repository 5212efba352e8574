//! IPv4 forwarding (`net.ipv4.ip_forward`), which shared mode needs. It is one setting of the whole
//! network namespace, and other processes and the operator use it too. So it is switched on only if it
//! is off, and put back only by a process of ours that knows that nobody needs it:
//!
//! * Who needs it is known to the kernel: a table `vmring_TAP` that translates. It ends with its
//!   process, in whatever way that ends.
//! * That vmring has switched it on is known to the kernel, too: the table `vmring/ip_forward`. It
//!   stays when a process is killed. The last process that needs forwarding puts it back when it
//!   stops; after a kill, the next one that starts a network does.
//! * Whoever writes the setting meanwhile takes it over, also if he writes the value that it has: each
//!   process of ours sees the write (inotify(7)). Whoever deletes the table `vmring/ip_forward` takes it
//!   over as well. From then on vmring leaves the setting as it is.
//!
//! [`Nft::lock`] keeps two starts and stops apart.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use super::link::Refusal;
use super::nft::{BaseChain, FORWARDING, Nft};
use crate::error::Error;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// What `nft list ruleset` shows with the table, so that the operator knows what it is.
const COMMENT: &str = "vmring has set net.ipv4.ip_forward=1 and puts it back to 0; \
                       delete this table to keep it on";

/// IPv4 forwarding for one network, in the network namespace of the thread that started it.
#[derive(Debug)]
pub(crate) struct Forwarding {
    /// `None` after a stop.
    held: Option<Held>,
    changed: bool,
}

#[derive(Debug)]
struct Held {
    nft: Nft,
    /// A write to this file takes effect in the namespace in which it was opened, whichever thread
    /// writes.
    file: File,
    /// The handle of the table [`FORWARDING`] at the start, if it was there.
    mark: Option<u64>,
    watch: Option<Watch>,
}

impl Forwarding {
    /// Switches forwarding on, if it is off. The caller has made the table of its network and has the
    /// lock.
    pub(crate) fn start() -> Result<Self, Error> {
        let mut nft = Nft::open().map_err(|refusal| refusal.into_error(LOOKING))?;
        let mut file =
            File::open(IP_FORWARD).map_err(Error::io("opening /proc/sys/net/ipv4/ip_forward"))?;
        if is_off(&file).map_err(Error::io(READING))? {
            file = open_writable().map_err(not_switched_on)?;
            nft.mark(FORWARDING, COMMENT).map_err(|refusal| refusal.into_error(LOOKING))?;
            file.write_all_at(b"1\n", 0).map_err(not_switched_on)?;
            tracing::info!("IPv4 forwarding is on now (net.ipv4.ip_forward); it was off");
        } else if let Ok(writable) = open_writable() {
            file = writable;
        }
        // The watch begins after our own write.
        let watch = Watch::start().inspect_err(|error| {
            tracing::debug!(%error, "nobody else's write to ip_forward will be seen");
        });
        let mark = nft.table(FORWARDING).map_err(|refusal| refusal.into_error(LOOKING))?;
        let held = Held { nft, file, mark, watch: watch.ok() };
        Ok(Self { held: Some(held), changed: mark.is_some() })
    }

    /// Whether forwarding is on because vmring has switched it on. If so, vmring puts it back.
    pub(crate) fn changed(&self) -> bool {
        self.changed
    }

    /// Puts forwarding back, unless somebody needs it or has taken it over. The caller has removed the
    /// table of its network and has the lock. A drop does the same, and only logs an error.
    pub(crate) fn stop(mut self) -> Result<(), Error> {
        self.release()
    }

    fn release(&mut self) -> Result<(), Error> {
        let Some(mut held) = self.held.take() else { return Ok(()) };
        let putting = |refusal: Refusal| refusal.into_error("putting net.ipv4.ip_forward back");
        let Some(mark) = held.nft.table(FORWARDING).map_err(putting)? else { return Ok(()) };
        // If the table is another one, vmring has switched forwarding on since, and the process that
        // did has seen who has written after it.
        if Some(mark) == held.mark && held.watch.as_ref().is_some_and(Watch::has_seen_a_write) {
            tracing::info!("somebody has set net.ipv4.ip_forward: vmring leaves it as it is");
            return held.nft.delete(FORWARDING).map_err(putting);
        }
        if is_needed(&mut held.nft).map_err(putting)? {
            return Ok(());
        }
        put_back(&mut held.nft, &held.file)
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(%error, "IPv4 forwarding stays on");
        }
    }
}

const LOOKING: &str = "noting that vmring switches IPv4 forwarding on";
const READING: &str = "reading /proc/sys/net/ipv4/ip_forward";

/// Puts forwarding back, if a process of ours was killed that had switched it on, and no other needs
/// it. The caller has the lock. This concerns the network namespace of the calling thread.
pub(crate) fn tidy(nft: &mut Nft) -> Result<(), Error> {
    let putting = |refusal: Refusal| refusal.into_error("putting net.ipv4.ip_forward back");
    if nft.table(FORWARDING).map_err(putting)?.is_none() || is_needed(nft).map_err(putting)? {
        return Ok(());
    }
    let file = open_writable().map_err(Error::io("putting net.ipv4.ip_forward back to 0"))?;
    put_back(nft, &file)
}

/// What the calling thread's network namespace says about forwarding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) on: bool,
    /// vmring has switched it on.
    pub(crate) ours: bool,
    /// A network needs it.
    pub(crate) needed: bool,
}

impl State {
    pub(crate) fn look(nft: &mut Nft, chains: &[BaseChain]) -> Result<Self, Error> {
        let file = File::open(IP_FORWARD).map_err(Error::io(READING))?;
        let ours = nft.table(FORWARDING).map_err(|refusal| refusal.into_error(READING))?;
        Ok(Self {
            on: !is_off(&file).map_err(Error::io(READING))?,
            ours: ours.is_some(),
            needed: chains.iter().any(BaseChain::needs_forwarding),
        })
    }
}

/// Whether a network of any process needs forwarding.
fn is_needed(nft: &mut Nft) -> Result<bool, Refusal> {
    Ok(nft.base_chains()?.iter().any(BaseChain::needs_forwarding))
}

/// Switches forwarding off, unless it is off, and removes the table that says that it was vmring.
fn put_back(nft: &mut Nft, file: &File) -> Result<(), Error> {
    const PUTTING: &str = "putting net.ipv4.ip_forward back to 0";
    if !is_off(file).map_err(Error::io(READING))? {
        file.write_all_at(b"0\n", 0).map_err(Error::io(PUTTING))?;
        tracing::info!("IPv4 forwarding is off again, as it was");
    }
    nft.delete(FORWARDING).map_err(|refusal| refusal.into_error(PUTTING))
}

fn is_off(file: &File) -> io::Result<bool> {
    let mut value = [0; 16];
    let len = file.read_at(&mut value, 0)?;
    Ok(value[..len].trim_ascii() == b"0")
}

fn open_writable() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(IP_FORWARD)
}

fn not_switched_on(source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::PermissionDenied {
                needs: format!(
                    "root and a writable /proc/sys to switch IPv4 forwarding on (or let root do \
                     it: sysctl -w net.ipv4.ip_forward=1): {source}"
                ),
            }
        }
        _ => Error::Io { what: "switching net.ipv4.ip_forward on", source },
    }
}

/// Sees writes to the setting. (A write of the value that the setting has changes nothing else by
/// which it could be seen.)
#[derive(Debug)]
struct Watch(OwnedFd);

impl Watch {
    fn start() -> io::Result<Self> {
        // SAFETY: inotify_init1(2) takes flags and no pointer.
        let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has just opened this descriptor, and nothing else owns it.
        let watch = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let path = c"/proc/sys/net/ipv4/ip_forward";
        debug_assert_eq!(path.to_bytes(), IP_FORWARD.as_bytes());
        // SAFETY: the path ends with a zero and lives through the call.
        match unsafe { libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_MODIFY) } {
            ..0 => Err(io::Error::last_os_error()),
            _ => Ok(watch),
        }
    }

    /// Whether there was a write since the start, or since the last call.
    fn has_seen_a_write(&self) -> bool {
        // An event of a watched file has no name, so it is the size of its header.
        let mut event = [0u8; 256];
        // SAFETY: the buffer lives through the call, and the length passed is its length.
        let read =
            unsafe { libc::read(self.0.as_raw_fd(), event.as_mut_ptr().cast(), event.len()) };
        read > 0
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::link::testing::{Namespace, run};
    use super::super::nat::{Network, Rules};
    use super::*;

    /// A network of a process of ours: its table, and forwarding. As `setup.rs` does it.
    struct Holder {
        rules: Option<Rules>,
        forwarding: Option<Forwarding>,
    }

    impl Holder {
        fn start(tap: &str) -> Self {
            let address = Ipv4Addr::new(10, 9, 8, 1);
            let rules = Rules::start(Network { tap, address, prefix_len: 24, shared: true });
            let rules = Some(rules.unwrap());
            Self { rules, forwarding: Some(Forwarding::start().unwrap()) }
        }

        fn changed(&self) -> bool {
            self.forwarding.as_ref().unwrap().changed()
        }

        fn stop(mut self) {
            self.rules = None;
            self.forwarding.take().unwrap().stop().unwrap();
        }

        /// Ends as by a kill: the kernel closes the descriptors, and nothing else is done.
        fn end_by_a_kill(mut self) {
            let held = self.forwarding.as_mut().unwrap().held.take();
            self.rules = None;
            drop(held);
        }
    }

    fn forwards() -> bool {
        std::fs::read_to_string(IP_FORWARD).unwrap().trim() == "1"
    }

    fn set(value: &str) {
        std::fs::write(IP_FORWARD, value).unwrap();
    }

    fn has_mark() -> bool {
        Nft::open().unwrap().table(FORWARDING).unwrap().is_some()
    }

    #[test]
    fn forwarding_ends_with_its_last_holder() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        let second = namespace.run(|| {
            set("0");
            let first = Holder::start("a");
            assert!(first.changed() && forwards() && has_mark());
            let second = Holder::start("b");
            assert!(second.changed());
            first.stop();
            assert!(forwards());
            second
        });
        // On a thread in another namespace.
        second.stop();
        namespace.run(|| {
            assert!(!forwards() && !has_mark());
            let third = Holder::start("c");
            assert!(third.changed() && forwards());
            drop(third);
            assert!(!forwards() && !has_mark());
        });
    }

    #[test]
    fn forwarding_that_was_on_stays_on() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            set("1");
            let holder = Holder::start("a");
            assert!(!holder.changed() && !has_mark());
            holder.stop();
            assert!(forwards());
        });
    }

    #[test]
    fn each_namespace_forwards_for_itself() {
        let (Some(one), Some(two)) = (Namespace::new(&[]), Namespace::new(&[])) else { return };
        for namespace in [&one, &two] {
            namespace.run(|| set("0"));
        }
        let first = one.run(|| Holder::start("a"));
        two.run(|| assert!(!forwards()));
        let second = two.run(|| Holder::start("a"));
        assert!(second.changed());
        drop(first);
        one.run(|| assert!(!forwards()));
        two.run(|| assert!(forwards()));
    }

    /// The operator's value is kept: another value, or the same one written again.
    #[test]
    fn a_value_that_somebody_sets_meanwhile_is_kept() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            for (theirs, on) in [("0", false), ("1", true)] {
                set("0");
                let (first, second) = (Holder::start("a"), Holder::start("b"));
                set(theirs);
                first.stop();
                assert_eq!(forwards(), on, "{theirs}");
                second.stop();
                assert_eq!((forwards(), has_mark()), (on, false), "{theirs}");
            }
            // A network starts after the write.
            set("0");
            let first = Holder::start("a");
            set("1");
            let late = Holder::start("b");
            first.stop();
            late.stop();
            assert!(forwards() && !has_mark());
        });
    }

    #[test]
    fn whoever_deletes_the_table_keeps_forwarding_on() {
        let Some(namespace) = Namespace::new(&["nft"]) else { return };
        namespace.run(|| {
            set("0");
            let holder = Holder::start("a");
            let text = run("nft list table inet vmring/ip_forward");
            assert!(text.contains("vmring has set net.ipv4.ip_forward=1"), "{text}");
            run("nft delete table inet vmring/ip_forward");
            holder.stop();
            assert!(forwards());
        });
    }

    /// The operator has switched forwarding off, and a network that starts afterwards switches it on
    /// again. Then it is vmring's again.
    #[test]
    fn a_network_that_starts_after_the_operator_switches_on_and_puts_back() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            set("0");
            let first = Holder::start("a");
            set("0");
            let late = Holder::start("b");
            assert!(forwards());
            first.stop();
            assert!(forwards(), "the other network needs it");
            late.stop();
            assert!(!forwards() && !has_mark());
        });
    }

    #[test]
    fn what_a_killed_process_has_left_on_is_put_back_by_the_next() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            set("0");
            Holder::start("a").end_by_a_kill();
            assert!(forwards() && has_mark(), "nobody is there to put it back");
            let next = Holder::start("b");
            assert!(next.changed());
            next.stop();
            assert!(!forwards() && !has_mark());

            Holder::start("a").end_by_a_kill();
            let living = Holder::start("b");
            Holder::start("c").end_by_a_kill();
            tidy(&mut Nft::open().unwrap()).unwrap();
            assert!(forwards(), "one needs it");
            living.end_by_a_kill();
            tidy(&mut Nft::open().unwrap()).unwrap();
            assert!(!forwards() && !has_mark());
        });
    }

    #[test]
    fn one_starts_at_a_time_and_the_kernel_ends_the_lock_of_the_dead() {
        let Some(namespace) = Namespace::new(&[]) else { return };
        namespace.run(|| {
            let mut first = Nft::open().unwrap();
            first.lock().unwrap();
            let (sender, receiver) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut second = Nft::open().unwrap();
                    second.lock().unwrap();
                    sender.send(()).unwrap();
                    // It is closed without an unlock.
                });
                let patience = std::time::Duration::from_millis(100);
                assert!(receiver.recv_timeout(patience).is_err(), "both have the lock");
                first.unlock();
                receiver
                    .recv_timeout(std::time::Duration::from_secs(60))
                    .expect("it gets the lock");
            });
            first.lock().unwrap();
            assert!(has_lock());
            first.unlock();
            assert!(!has_lock());
        });
    }

    fn has_lock() -> bool {
        Nft::open().unwrap().table("vmring/lock").unwrap().is_some()
    }
}
