//! A guest that runs, and the scripts that it is given.

#[cfg(target_os = "linux")]
use std::ffi::CString;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
#[cfg(target_os = "linux")]
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cpio::Archive;
use crate::process::{Folder, Process};
use crate::qmp::Qmp;
use crate::{Engine, Guest};

/// A guest that was started. It is killed when it is dropped.
#[derive(Debug)]
pub struct Running {
    engine: Engine,
    timeout: Duration,
    process: Process,
    stdin: ChildStdin,
    said: Arc<Said>,
    /// The scripts that were given to the guest.
    scripts: u32,
    /// How many times the guest has said that it is ready.
    boots: usize,
    qmp: Option<Qmp>,
}

/// How a script ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The script's exit status.
    pub status: u8,
    /// What the script wrote to its standard output and standard error. What runs in the
    /// background, and writes there too, is among it.
    pub output: String,
}

/// What a guest's `init.sh` puts in front of its own lines.
const MARK: char = '\u{1e}';

/// What came over a guest's terminal.
#[derive(Debug, Default)]
struct Said {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
}

impl Said {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    pub(crate) fn start(guest: Guest) -> Self {
        let folder = Folder::new();
        let archive = folder.join("initramfs");
        write_archive(&guest, &archive);
        let console = folder.join("console");
        // User-mode Linux writes it as its standard error, and QEMU by name.
        let stderr = File::create(&console).expect("a file in a new folder");
        let monitor = folder.join("monitor");
        let mut command = match guest.launcher.split_first() {
            None => Command::new(&guest.program),
            Some((launcher, words)) => {
                let mut command = Command::new(launcher);
                command.args(words).arg(&guest.program);
                command
            }
        };
        match guest.engine {
            Engine::Qemu => {
                command.args(qemu_arguments(&guest, &archive, &folder));
                command.stderr(File::create(folder.join("stderr")).expect("a file"));
            }
            Engine::Uml => {
                let memory = memory_folder(&guest, &folder.join(""));
                command.env("TMPDIR", memory).args(uml_arguments(&guest, &archive, &folder));
                command.stderr(stderr);
            }
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command, folder);
        let stdin = process.child().stdin.take().expect("piped");
        let mut stdout = process.child().stdout.take().expect("piped");
        let said = Arc::new(Said::default());
        thread::spawn({
            let said = said.clone();
            move || {
                let mut buffer = [0; 4096];
                // The thread ends with the guest.
                while let Ok(len @ 1..) = stdout.read(&mut buffer) {
                    said.lock().extend(&buffer[..len]);
                    said.more.notify_all();
                }
            }
        });
        let mut running = Self {
            engine: guest.engine,
            timeout: guest.timeout,
            process,
            stdin,
            said,
            scripts: 0,
            boots: 0,
            qmp: None,
        };
        if guest.engine == Engine::Qemu {
            running.qmp = Some(match Qmp::connect(&monitor) {
                Ok(qmp) => qmp,
                Err(error) => panic!("QEMU's monitor: {error}{}", running.last_words()),
            });
        }
        if !guest.is_incoming {
            running.wait_for_boot();
        }
        running
    }

    /// Runs a shell script in the guest, and waits for its end.
    ///
    /// # Panics
    ///
    /// Panics with the guest's last words if the script does not end in time, or the guest does.
    pub fn run(&mut self, script: &str) -> Outcome {
        let started = self.begin(script);
        self.finish(&started)
    }

    /// Runs a shell script in the guest, which has to succeed, and returns what it wrote.
    ///
    /// # Panics
    ///
    /// Panics with what the script wrote if its status is not 0, and like [`Running::run`].
    pub fn sh(&mut self, script: &str) -> String {
        let outcome = self.run(script);
        let Outcome { status, output } = &outcome;
        assert_eq!(*status, 0, "in the guest, `{script}` failed:\n{output}{}", self.last_words());
        outcome.output
    }

    /// Begins to run a script. It has to be finished before the next one begins.
    pub fn begin(&mut self, script: &str) -> Script {
        self.scripts += 1;
        // User-mode Linux reads no more once 4,096 bytes wait at its terminal.
        let mut pieces = script.as_bytes().chunks(1024).peekable();
        let mut from = self.text().len();
        while let Some(piece) = pieces.next() {
            let is_last = pieces.peek().is_none();
            let word = if is_last { self.scripts.to_string() } else { "more".to_owned() };
            let code: String = piece.iter().map(|byte| format!("{byte:02x}")).collect();
            if let Err(error) = writeln!(self.stdin, "{word} {code}") {
                panic!("the guest does not read: {error}{}", self.last_words());
            }
            if !is_last {
                from = self.wait_for(&format!("{MARK}more\n"), from);
            }
        }
        Script { text: script.to_owned(), number: self.scripts, from }
    }

    /// Waits for the end of a script.
    ///
    /// # Panics
    ///
    /// Panics like [`Running::run`].
    pub fn finish(&mut self, script: &Script) -> Outcome {
        let end = format!("{MARK}end {} ", script.number);
        let what = format!("`{}` in the guest", script.text);
        let (output, status) = self.wait(&what, |text| {
            let (output, rest) = text.get(script.from..)?.split_once(&end)?;
            let (status, _) = rest.split_once('\n')?;
            Some((output.to_owned(), status.to_owned()))
        });
        let status = status.parse().unwrap_or_else(|_| panic!("no status: {status:?}"));
        Outcome { status, output }
    }

    /// Waits until the guest has written `text`, after the first `from` bytes of what it ever wrote:
    /// for scripts that go on. Returns the number of bytes to the end of it.
    ///
    /// # Panics
    ///
    /// Panics like [`Running::run`].
    pub fn wait_for(&mut self, text: &str, from: usize) -> usize {
        self.wait(&format!("{text:?} from the guest"), |said| {
            said.get(from..)?.find(text).map(|at| from + at + text.len())
        })
    }

    /// All that the guest's scripts have written.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.said.lock()).into_owned()
    }

    /// The messages of the guest's kernel.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.process.folder().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Resets the machine as its reset button does, and waits until it has booted again. Only QEMU
    /// can do it.
    pub fn reset(&mut self) {
        self.qmp("system_reset", json!({}));
        self.wait_for_boot();
    }

    /// Shuts the guest down, and waits for its end.
    pub fn power_off(mut self) -> ExitStatus {
        self.begin("poweroff -f");
        let ended = self.process.wait(self.timeout);
        ended.unwrap_or_else(|| panic!("the guest does not power off{}", self.last_words()))
    }

    /// Runs a command of QEMU's machine protocol, and returns its answer.
    ///
    /// # Panics
    ///
    /// Panics if QEMU answers with an error, and for a guest that is not in QEMU.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let qmp = self.qmp.as_mut().expect("only QEMU has a monitor");
        match qmp.execute(command, arguments) {
            Ok(answer) => answer,
            Err(error) => panic!("QEMU's monitor: {error}{}", self.last_words()),
        }
    }

    /// Lets the guest write the same 4 MiB of its memory all the time, until it ends. A guest that is to
    /// [migrate](Self::migrate_to) does so: if there were nothing to copy again, it would have switched
    /// as soon as everything was copied once.
    pub fn keep_changing(&mut self) {
        self.sh("head -c 4194304 /dev/urandom >/tmp/changing.from
                 cat /tmp/changing.from >/tmp/changing
                 (while true; do
                    dd if=/tmp/changing.from of=/tmp/changing bs=65536 conv=notrunc
                    usleep 10000
                  done) </dev/null >/dev/null 2>&1 &");
    }

    /// Moves the guest to `other`, which waits for it, while it runs. Afterwards `other` runs the
    /// scripts that have begun, and this one stands still. The guest [keeps
    /// changing](Self::keep_changing).
    ///
    /// When `meanwhile` is called, all memory has been copied, and all that changed later but what has
    /// changed just now. The guest does not switch before it returns. So what a device writes meanwhile
    /// gets to `other` only if the device says that it has written it.
    ///
    /// # Panics
    ///
    /// Panics if the migration fails, does not end in time, or ends before `meanwhile` does.
    pub fn migrate_to(&mut self, other: &mut Running, meanwhile: impl FnOnce(&mut Self)) {
        let socket = other.process.folder().join("migration");
        // Less is copied in a tenth of a second, which is as long as QEMU sends at once, than the guest
        // changes in it. And the guest may not stand still for longer than a millisecond.
        self.qmp(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 32 << 20, "downtime-limit": 1 }),
        );
        self.qmp("migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
        let start = Instant::now();
        // What has changed is collected at the beginning, when everything was copied, and each time
        // that all of it was copied again. What changed while everything was copied was much.
        while self.migration(start)["ram"]["dirty-sync-count"].as_u64() < Some(5) {
            thread::sleep(Duration::from_millis(20));
        }
        // From now on next to nothing is copied.
        self.qmp("migrate-set-parameters", json!({ "max-bandwidth": 1 << 16 }));
        meanwhile(self);
        let state = self.migration(start);
        assert_eq!(state["status"], "active", "the guest has switched too early: {state}");
        let fast = json!({ "max-bandwidth": 1_u64 << 30, "downtime-limit": 10_000 });
        self.qmp("migrate-set-parameters", fast);
        while self.migration(start)["status"] != "completed" {
            thread::sleep(Duration::from_millis(20));
        }
        while other.qmp("query-status", json!({}))["status"] != "running" {
            assert!(start.elapsed() < self.timeout, "it does not run at its destination");
            thread::sleep(Duration::from_millis(5));
        }
        // What the guest has written goes on from where it was.
        (other.scripts, other.boots) = (self.scripts, self.boots);
        let mut bytes = self.said.lock().clone();
        let mut others = other.said.lock();
        bytes.append(&mut others);
        *others = bytes;
    }

    /// How far the migration that began at `start` is.
    fn migration(&mut self, start: Instant) -> Value {
        let state = self.qmp("query-migrate", json!({}));
        let failed = matches!(state["status"].as_str(), Some("failed" | "cancelled"));
        assert!(!failed, "the migration fails: {state}");
        assert!(start.elapsed() < self.timeout, "the migration does not end: {state}");
        state
    }

    fn wait_for_boot(&mut self) {
        self.boots += 1;
        let ready = format!("{MARK}ready\n");
        let boots = self.boots;
        self.wait("the boot of the guest", |text| {
            (text.matches(&ready).count() >= boots).then_some(())
        });
    }

    /// Waits until `f` finds something in what the guest has written.
    fn wait<T>(&mut self, what: &str, f: impl Fn(&str) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = f(&self.text()) {
                return found;
            }
            if let Some(status) = self.process.ended() {
                // What came last may just be on its way through the reader.
                thread::sleep(Duration::from_millis(100));
                if let Some(found) = f(&self.text()) {
                    return found;
                }
                panic!("the guest has ended ({status}) before {what}{}", self.last_words());
            }
            let panicked = self.console().contains("Kernel panic");
            assert!(!panicked, "a kernel panic before {what}{}", self.last_words());
            let late = start.elapsed() > self.timeout;
            assert!(!late, "nothing after {:?}: {what}{}", self.timeout, self.last_words());
            let bytes = self.said.lock();
            // Whatever is written wakes this thread; the rest is looked at now and then.
            let _ = self.said.more.wait_timeout(bytes, Duration::from_millis(50));
        }
    }

    /// The ends of all that the guest and its engine have written, for a panic.
    fn last_words(&self) -> String {
        let mut words = format!("\n-- {:?}", self.engine);
        let stderr = fs::read(self.process.folder().join("stderr")).unwrap_or_default();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        for (name, text) in
            [("stderr", stderr), ("console", self.console()), ("terminal", self.text())]
        {
            let lines: Vec<_> = text.lines().filter(|line| !line.contains("TCG doesn't")).collect();
            words += &format!("\n-- {name}:\n");
            for line in &lines[lines.len().saturating_sub(40)..] {
                words.extend(line.chars().take(200).chain(['\n']));
            }
        }
        words
    }
}

/// A script that a guest runs.
#[derive(Clone, Debug)]
pub struct Script {
    text: String,
    number: u32,
    /// Where what the guest wrote ended before the script began.
    from: usize,
}

fn write_archive(guest: &Guest, path: &Path) {
    let mut bytes = fs::read(&guest.image.archive).expect("the image is there");
    let mut archive = Archive::new();
    for (path, contents) in &guest.files {
        archive.file(path, contents);
    }
    bytes.extend(archive.finish());
    fs::write(path, bytes).expect("a file in a new folder");
}

fn qemu_arguments(guest: &Guest, archive: &Path, folder: &Folder) -> Vec<OsString> {
    let path = |name| folder.join(name).display().to_string();
    let memory = guest.memory_mib;
    let mut arguments: Vec<OsString> = [
        "-nodefaults -no-user-config -display none -machine q35,memory-backend=ram",
        "-accel tcg -cpu qemu64 -smp 1 -serial chardev:console -serial chardev:agent",
        "-chardev stdio,id=agent,signal=off",
    ]
    .iter()
    .flat_map(|line| line.split(' '))
    .map(OsString::from)
    .collect();
    // Without no_timer_check Linux panics if an emulator on a busy machine has raised no interrupt of its
    // timer in time. Without init_on_alloc=0 Linux writes into each buffer before it is posted, and a
    // migration copies it for that reason alone.
    let parameters = "console=ttyS0 vmring.agent=ttyS1 mitigations=off nokaslr init_on_alloc=0 \
                      no_timer_check random.trust_cpu=on random.trust_bootloader=on net.ifnames=0 quiet";
    let more = [
        ("-object", format!("memory-backend-memfd,id=ram,size={memory}M,share=on")),
        ("-m", format!("{memory}M")),
        ("-chardev", format!("file,id=console,path={}", path("console"))),
        ("-qmp", format!("unix:{},server=on,wait=off", path("monitor"))),
        ("-kernel", guest.image.kernel.display().to_string()),
        ("-initrd", archive.display().to_string()),
        ("-append", parameters.to_owned()),
    ];
    for (option, value) in more {
        arguments.extend([option.into(), value.into()]);
    }
    if guest.is_incoming {
        arguments.extend(["-incoming".into(), format!("unix:{}", path("migration")).into()]);
    }
    for (number, nic) in guest.nics.iter().enumerate() {
        arguments.extend(nic.qemu_arguments(number).into_iter().map(OsString::from));
    }
    arguments
}

fn uml_arguments(guest: &Guest, archive: &Path, folder: &Folder) -> Vec<OsString> {
    let macs: Vec<_> = guest.nics.iter().map(|nic| nic.mac.as_str()).collect();
    let mut arguments = vec![
        format!("mem={}M", guest.memory_mib),
        format!("initrd={}", archive.display()),
        format!("uml_dir={}", folder.join("uml").display()),
        "umid=guest".to_owned(),
        // The kernel's messages go to standard error, and the scripts' terminal is tty1.
        "con=null con0=null,fd:2 con1=fd:0,fd:1 ssl=null console=tty0".to_owned(),
        format!("vmring.agent=tty1 vmring.macs={} random.trust_cpu=on quiet", macs.join(",")),
    ];
    arguments.extend(guest.nics.iter().enumerate().map(|(n, nic)| nic.uml_parameter(n)));
    arguments.iter().flat_map(|words| words.split(' ')).map(OsString::from).collect()
}

/// Where user-mode Linux keeps its memory, which it runs programs in: in memory if possible.
fn memory_folder(guest: &Guest, folder: &Path) -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    let is_fit = has_space_for_programs(&shared, u64::from(guest.memory_mib) << 21);
    if is_fit { shared } else { folder.to_owned() }
}

/// Whether a file system has so many bytes free and lets programs run. A container may forbid it.
#[cfg(target_os = "linux")]
fn has_space_for_programs(path: &Path, bytes: u64) -> bool {
    let path = CString::new(path.as_os_str().as_bytes()).expect("no 0 in it");
    // SAFETY: all zero is a valid statvfs, because it consists of numbers.
    let mut info: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a 0, and `info` has space for the answer.
    let is_known = unsafe { libc::statvfs(path.as_ptr(), &mut info) } == 0;
    is_known && info.f_bavail * info.f_frsize >= bytes && info.f_flag & libc::ST_NOEXEC == 0
}

#[cfg(not(target_os = "linux"))]
fn has_space_for_programs(_: &Path, _: u64) -> bool {
    false
}
