//! The file that remembers the leases of a server.
//!
//! Each lease that is given or ended becomes a line at the end of the file. A thread of the file's
//! own writes it: who sends packets only notes the lease in memory. The notes are bounded, because
//! there is one for each address at most. The first note starts the thread, which so has the privileges
//! of whoever serves clients, and not those of whoever opened the file. When the file has grown to several times the number of
//! leases it is written anew beside itself, and takes its own name in one step. So the file is
//! whole after the process was killed, but for a last line that may be cut, which is not read.
//!
//! A line has the client's MAC address, its IPv4 address, and the end of the lease in seconds since
//! 1970. The end is 0 if the client gave the address back.

use core::mem;
use core::net::Ipv4Addr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use macaddr::MacAddr6;

use crate::limits::{
    LEASE_FILE_END, LEASE_FILE_LINES, LEASE_FILE_MAX, LEASE_FILE_PATIENCE, LEASE_FILE_RETRY,
};

/// What a lease file begins with.
const MARK: &str = "# vmring leases, version 1";
/// The first line of a lease file.
const HEADING: &str = "# vmring leases, version 1: MAC address, IPv4 address, end of the lease in \
                       seconds since 1970\n";

/// The error when a lease file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseFileError {
    /// The system refused an operation on the file.
    #[error("the lease file '{}' cannot be {what}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: "opened", for example.
        what: &'static str,
        /// What the system said.
        error: String,
    },
    /// The path names something that exists and is not a lease file.
    #[error("'{}' is not a lease file; name a new file, or one that vmring has written", path.display())]
    Foreign {
        /// The path.
        path: PathBuf,
    },
    /// Another network uses the file.
    #[error("the lease file '{}' is in use by another network; name one for each", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// One lease, as the file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    mac: MacAddr6,
    /// The end of the lease in seconds since 1970. It is 0 if there is none.
    end: u64,
}

/// A lease in the file: the number of its line, its address, and the rest.
type Line = (usize, Ipv4Addr, Record);

/// What is to be written.
struct Notes {
    records: BTreeMap<Ipv4Addr, Record>,
    /// The network has ended.
    closed: bool,
    /// What the thread writes with, until it runs. The sender is dropped when the thread ends.
    writer: Option<(Writer, Sender<()>)>,
    /// The thread was started.
    started: bool,
}

/// Where a server notes its leases for the thread that writes them.
pub(super) struct Journal {
    notes: Mutex<Notes>,
    noted: Condvar,
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a client has an address for this long from now on. Zero ends the lease. The first
    /// note starts the thread that writes.
    pub(super) fn note(self: &Arc<Self>, address: Ipv4Addr, mac: MacAddr6, remaining: Duration) {
        let end = if remaining.is_zero() { 0 } else { seconds_now() + remaining.as_secs() };
        let mut notes = self.lock();
        notes.records.insert(address, Record { mac, end });
        let starts = !mem::replace(&mut notes.started, true);
        drop(notes);
        match starts {
            true => self.start(),
            false => self.noted.notify_one(),
        }
    }

    fn start(self: &Arc<Self>) {
        let journal = self.clone();
        let body = move || {
            let writer = journal.lock().writer.take();
            if let Some((writer, end)) = writer {
                writer.run(&journal, end);
            }
        };
        if let Err(error) = thread::Builder::new().name("vmring-leases".to_owned()).spawn(body) {
            tracing::warn!(%error, "no thread writes leases; the next lease tries to start one");
            self.lock().started = false;
        }
    }

    /// The network has ended: the thread writes what is noted and ends. If there is no thread, this
    /// call writes it.
    fn close(&self) {
        let mut notes = self.lock();
        notes.closed = true;
        let writer = if notes.started { None } else { notes.writer.take() };
        let records = mem::take(&mut notes.records);
        if let Some((mut writer, _end)) = writer {
            drop(notes);
            if !records.is_empty() {
                writer.write(&records);
            }
        } else {
            notes.records = records;
            drop(notes);
            self.noted.notify_one();
        }
    }

    /// Waits for notes and takes them. Returns whether the network has ended, too.
    fn take(&self, timeout: Option<Duration>) -> (BTreeMap<Ipv4Addr, Record>, bool) {
        let mut notes = self.lock();
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        while notes.records.is_empty() && !notes.closed {
            notes = match deadline {
                None => self.noted.wait(notes).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let waited = self.noted.wait_timeout(notes, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        (mem::take(&mut notes.records), notes.closed)
    }
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The lease file of a running server, from
/// [`DhcpServer::open_lease_file`](super::DhcpServer::open_lease_file). Dropping it writes what is
/// noted, for up to five seconds.
#[derive(Debug)]
pub struct LeaseFile {
    journal: Arc<Journal>,
    /// Its other end is dropped when the thread ends.
    ended: Mutex<Receiver<()>>,
}

impl core::fmt::Debug for Journal {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Journal").finish_non_exhaustive()
    }
}

impl LeaseFile {
    /// Opens the file, or makes it, and passes the leases that it has to `restore`, the newest
    /// first, each with the time that is left of it. `restore` returns whether the lease is taken.
    pub(super) fn open(
        path: &Path,
        mut restore: impl FnMut(MacAddr6, Ipv4Addr, Duration) -> bool,
    ) -> Result<Self, LeaseFileError> {
        let (mut writer, mut records) = Writer::open(path)?;
        // The newest lease of a client counts.
        records.sort_by_key(|(line, ..)| core::cmp::Reverse(*line));
        let today = seconds_now();
        for (_, address, record) in records {
            let remaining =
                Duration::from_secs(record.end.saturating_sub(today).min(u64::from(u32::MAX)));
            if record.end > 0 && restore(record.mac, address, remaining) {
                writer.remember(address, record);
            }
        }
        writer.shrink();
        let (end, ended) = channel();
        let writer = Some((writer, end));
        let notes = Notes { records: BTreeMap::new(), closed: false, writer, started: false };
        let journal = Arc::new(Journal { notes: Mutex::new(notes), noted: Condvar::new() });
        Ok(Self { journal, ended: Mutex::new(ended) })
    }
}

impl LeaseFile {
    /// Where the server notes its leases.
    pub(super) fn journal(&self) -> Arc<Journal> {
        self.journal.clone()
    }
}

impl Drop for LeaseFile {
    fn drop(&mut self) {
        self.journal.close();
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The thread sends nothing. It ends, or a file system that hangs keeps it.
        let _ = ended.recv_timeout(LEASE_FILE_END);
    }
}

fn failed(path: &Path, what: &'static str, error: &io::Error) -> LeaseFileError {
    LeaseFileError::Io { path: path.to_owned(), what, error: error.to_string() }
}

/// The thread's end: the open file, and what it says.
struct Writer {
    path: PathBuf,
    file: File,
    /// The leases that the file has.
    records: BTreeMap<Ipv4Addr, Record>,
    /// The address of each client among them.
    clients: BTreeMap<MacAddr6, Ipv4Addr>,
    lines: usize,
    /// The file is written anew when it has more lines than this.
    most: usize,
    /// The last line is cut, so that the next must begin with a line's end.
    cut: bool,
}

impl Writer {
    /// Opens the file and reads its lines, each with its number.
    fn open(path: &Path) -> Result<(Self, Vec<Line>), LeaseFileError> {
        // A look before opening: opening a device or a FIFO can do something, or wait.
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(LeaseFileError::Foreign { path: path.to_owned() });
        }
        let mut file = open_locked(path)?;
        let mut bytes = Vec::new();
        Read::by_ref(&mut file)
            .take(LEASE_FILE_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| failed(path, "read", &error))?;
        let is_ours = bytes.is_empty() || bytes.starts_with(MARK.as_bytes());
        // What was cut while it was made has a part of the heading.
        let is_begun = HEADING.as_bytes().starts_with(&bytes);
        if !(is_ours || is_begun) || bytes.len() as u64 > LEASE_FILE_MAX {
            return Err(LeaseFileError::Foreign { path: path.to_owned() });
        }
        let mut writer = Self {
            path: path.to_owned(),
            file,
            records: BTreeMap::new(),
            clients: BTreeMap::new(),
            lines: 0,
            most: LEASE_FILE_LINES,
            cut: false,
        };
        if is_begun && bytes.len() < HEADING.len() {
            writer
                .file
                .set_len(0)
                .and_then(|()| writer.file.write_all(HEADING.as_bytes()))
                .map_err(|error| failed(path, "written", &error))?;
            return Ok((writer, Vec::new()));
        }
        writer.cut = bytes.last() != Some(&b'\n');
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let text = String::from_utf8_lossy(&bytes[..whole]);
        let mut newest = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            writer.lines += 1;
            if let Some((address, record)) = parse(line) {
                newest.insert(address, (number, record));
            } else if !line.is_empty() && !line.starts_with('#') {
                tracing::warn!(number = number + 1, file = %path.display(), "no lease: {line}");
            }
        }
        let records = newest.into_iter().map(|(address, (line, record))| (line, address, record));
        let records = records.collect();
        Ok((writer, records))
    }

    /// Writes what is noted until the network ends.
    fn run(mut self, journal: &Journal, end: Sender<()>) {
        let mut unwritten = BTreeMap::new();
        loop {
            let retry = (!unwritten.is_empty()).then_some(LEASE_FILE_RETRY);
            let (notes, closed) = journal.take(retry);
            unwritten.extend(notes);
            if !unwritten.is_empty() && self.write(&unwritten) {
                unwritten.clear();
            }
            if closed {
                break;
            }
        }
        drop(self);
        drop(end);
    }

    /// Adds lines to the file, and writes it anew if it has grown too long. Returns whether the lines
    /// were added.
    fn write(&mut self, records: &BTreeMap<Ipv4Addr, Record>) -> bool {
        let added = self.append(records);
        if let Err(error) = &added {
            tracing::warn!(%error, file = %self.path.display(), "leases were not written");
        }
        self.shrink();
        added.is_ok()
    }

    /// Adds lines to the end of the file.
    fn append(&mut self, records: &BTreeMap<Ipv4Addr, Record>) -> io::Result<()> {
        let mut text = String::new();
        if self.cut {
            text.push('\n');
        }
        records.iter().for_each(|(address, record)| write_line(&mut text, *address, *record));
        let written = self.file.write_all(text.as_bytes());
        // If this failed, a part may have been written.
        self.cut = written.is_err();
        written?;
        self.lines += records.len();
        for (&address, &record) in records {
            self.remember(address, record);
        }
        Ok(())
    }

    /// Notes what the file says of an address now. A client has one lease.
    fn remember(&mut self, address: Ipv4Addr, record: Record) {
        if let Some(old) = self.records.remove(&address) {
            self.clients.remove(&old.mac);
        }
        if record.end == 0 {
            return;
        }
        if let Some(old) = self.clients.insert(record.mac, address) {
            self.records.remove(&old);
        }
        self.records.insert(address, record);
    }

    /// Writes the file anew if it has grown too long.
    fn shrink(&mut self) {
        if self.lines <= self.most.max(4 * self.records.len()) {
            return;
        }
        match self.rewrite() {
            Ok(()) => self.most = LEASE_FILE_LINES,
            Err(error) => {
                // The old file is as good, only longer.
                tracing::warn!(%error, file = %self.path.display(), "the lease file stays long");
                self.most = 2 * self.lines;
            }
        }
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let beside = self.path.with_file_name(name);
        let mut text = HEADING.to_owned();
        self.records.iter().for_each(|(&at, &record)| write_line(&mut text, at, record));
        // What is there was left by a process that was killed.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().append(true).create_new(true).open(&beside)?;
        let moved = file
            .write_all(text.as_bytes())
            .and_then(|()| file.set_permissions(self.file.metadata()?.permissions()))
            .and_then(|()| file.sync_data())
            .and_then(|()| if try_lock(&file)? { Ok(()) } else { Err(in_use()) })
            .and_then(|()| fs::rename(&beside, &self.path));
        if let Err(error) = moved {
            let _ = fs::remove_file(&beside);
            return Err(error);
        }
        self.lines = self.records.len() + 1;
        self.cut = false;
        self.file = file;
        Ok(())
    }
}

fn in_use() -> io::Error {
    io::Error::other("it is in use")
}

fn write_line(text: &mut String, address: Ipv4Addr, record: Record) {
    use core::fmt::Write;
    // Writing to a string does not fail.
    let _ = writeln!(text, "{} {address} {}", record.mac, record.end);
}

fn parse(line: &str) -> Option<(Ipv4Addr, Record)> {
    let mut words = line.split_ascii_whitespace();
    let mac = words.next()?.parse().ok()?;
    let address = words.next()?.parse().ok()?;
    let end = words.next()?.parse().ok()?;
    words.next().is_none().then_some((address, Record { mac, end }))
}

/// Opens the file for this network alone. Its lock ends with its last descriptor.
fn open_locked(path: &Path) -> Result<File, LeaseFileError> {
    let deadline = Instant::now() + LEASE_FILE_PATIENCE;
    loop {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(|error| failed(path, "opened", &error))?;
        let locked = try_lock(&file).map_err(|error| failed(path, "locked", &error))?;
        // The last owner of the lock may have replaced the file meanwhile.
        if locked && is_still(&file, path) {
            return Ok(file);
        }
        if Instant::now() >= deadline {
            return Err(LeaseFileError::InUse { path: path.to_owned() });
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Takes the lock of a file. Returns false if another open file has it.
#[cfg(unix)]
fn try_lock(file: &File) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    // SAFETY: flock(2) takes two numbers and no pointer, and the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(false),
        // A file system that has no locks.
        io::ErrorKind::Unsupported => Ok(true),
        _ => Err(error),
    }
}

/// Elsewhere nothing keeps two networks from one file.
#[cfg(not(unix))]
fn try_lock(_: &File) -> io::Result<bool> {
    Ok(true)
}

/// Whether the path still names the open file.
#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |found: fs::Metadata| (found.dev(), found.ino());
    file.metadata().map(of).ok() == fs::metadata(path).map(of).ok()
}

#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> bool {
    true
}
