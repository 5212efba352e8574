//! Confinement by the kernel of Linux.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::{fs, panic, ptr};

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::part::{Needs, Part};
use crate::serve::calls::{CALLS, Call, Only, When};

const TARGET: TargetArch =
    if cfg!(target_arch = "x86_64") { TargetArch::x86_64 } else { TargetArch::aarch64 };

fn part(outcome: Result<String, String>) -> Part {
    match outcome {
        Ok(state) => Part { complete: true, state },
        Err(why) => Part::off(&why),
    }
}

/// New privileges, capabilities, files and network.
pub(super) fn drop_privileges(needs: &Needs) -> [Part; 3] {
    // These are a thread's, and those of the threads that it starts.
    let others = other_threads();
    let mut parts =
        [no_new_privileges(), drop_capabilities(needs), restrict_files(needs)].map(part);
    if others > 0 {
        for part in &mut parts[1..] {
            part.complete = false;
            let s = if others == 1 { "" } else { "s" };
            part.state += &format!(", except for {others} thread{s} that the network began before");
        }
    }
    parts
}

fn no_new_privileges() -> Result<String, String> {
    // SAFETY: the call takes numbers only.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok("none can be gained".to_owned()),
        _ => Err(io::Error::last_os_error().to_string()),
    }
}

fn drop_capabilities(needs: &Needs) -> Result<String, String> {
    let (mut kept, mut reasons) = (CapsHashSet::new(), Vec::new());
    for (one, why) in needs.kept.capabilities() {
        if has(one)? {
            kept.insert(one);
            reasons.push(format!("{one} {why}"));
        }
    }
    // Only who may lower the bounding set can have more than its other sets. It limits what a program
    // that is executed gains, and `no_new_privs` does so too.
    if has(Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding).map_err(|error| error.to_string())?;
    }
    // A kernel without ambient capabilities has none to clear.
    let _ = caps::clear(None, CapSet::Ambient);
    let none = CapsHashSet::new();
    for (set, kept) in
        [(CapSet::Inheritable, &none), (CapSet::Effective, &kept), (CapSet::Permitted, &kept)]
    {
        caps::set(None, set, kept).map_err(|error| error.to_string())?;
    }
    Ok(match reasons.is_empty() {
        true => "none".to_owned(),
        false => format!("none but {}", reasons.join(", ")),
    })
}

fn has(capability: Capability) -> Result<bool, String> {
    caps::has_cap(None, CapSet::Effective, capability).map_err(|error| error.to_string())
}

fn restrict_files(needs: &Needs) -> Result<String, String> {
    let folders = needs.sockets.iter().map(|path| (path, BitFlags::from(AccessFs::RemoveFile)));
    let leases = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::ReadDir;
    let resolvers = needs.resolvers.iter().map(|path| (path, AccessFs::ReadFile.into()));
    let folders = folders.chain(needs.leases.iter().map(|path| (path, leases)));
    let folders: Vec<_> = folders.chain(resolvers).collect();
    let restricted = || -> Result<RulesetStatus, RulesetError> {
        let mut rules = Ruleset::default().handle_access(AccessFs::from_all(ABI::V5))?;
        if !needs.nat {
            rules = rules.handle_access(AccessNet::from_all(ABI::V4))?;
        }
        let mut rules = rules.scope(Scope::from_all(ABI::V6))?.create()?;
        for (folder, access) in &folders {
            // A folder that cannot be opened is not reached, and the socket's file is left over.
            if let Ok(folder) = PathFd::new(folder) {
                rules = rules.add_rule(PathBeneath::new(folder, *access))?;
            }
        }
        Ok(rules.restrict_self()?.ruleset)
    };
    let files = match (needs.sockets.is_empty(), needs.leases.is_some()) {
        (true, false) => "nothing can be reached",
        (false, false) => "only its sockets can be removed",
        (_, true) => "only the folder of the leases can be written, and its sockets removed",
    };
    let what = match needs.nat {
        true => format!("{files}; the network is reached for guests"),
        false => files.to_owned(),
    };
    match restricted().map_err(|error| error.to_string())? {
        RulesetStatus::NotEnforced => Err("the kernel has no Landlock".to_owned()),
        RulesetStatus::FullyEnforced => Ok(what),
        RulesetStatus::PartiallyEnforced => {
            Ok(format!("{what}, as far as this kernel's Landlock goes"))
        }
    }
}

/// The threads of this process besides this one.
fn other_threads() -> usize {
    fs::read_dir("/proc/self/task").map_or(0, |tasks| tasks.count().saturating_sub(1))
}

/// System calls.
pub(super) fn restrict_calls(needs: &Needs) -> Part {
    part(install(needs))
}

fn install(needs: &Needs) -> Result<String, String> {
    let calls: Vec<_> = CALLS.iter().filter(|call| is_needed(call.when, needs)).collect();
    // The list comes last, because it has no call that adds a filter.
    let filters = refuse(&calls).into_iter().chain([allow(&calls)]);
    report_refused_calls().map_err(|error| error.to_string())?;
    // The default hook of a panic may look for files, to show a backtrace. Then a panic on one
    // connection would end the process.
    panic::set_hook(Box::new(|panic| {
        let _ = writeln!(io::stderr(), "vmring: {panic}");
    }));
    for filter in filters {
        seccompiler::apply_filter_all_threads(&filter?).map_err(|error| match error {
            seccompiler::Error::Seccomp(error)
                if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) =>
            {
                "the kernel has no seccomp filters".to_owned()
            }
            error => error.to_string(),
        })?;
    }
    let possible = calls.iter().filter(|call| !matches!(call.only, Only::Refused(_)));
    Ok(format!("{} are possible", possible.count()))
}

fn is_needed(when: When, needs: &Needs) -> bool {
    match when {
        When::Always | When::Elsewhere => true,
        When::Client => needs.client,
        When::Wires => needs.wires,
        When::Terminal => needs.terminal,
        When::LeaseFile => needs.leases.is_some(),
        When::Tap => needs.tap,
        When::IoUring => needs.io_uring,
        When::HostsEnd => needs.kept.hosts_end,
        When::Nat => needs.nat,
        When::Resolvers => needs.resolvers.is_some(),
        When::Simulated => needs.simulated,
    }
}

/// The filter that lets these calls pass, and reports any other.
fn allow(calls: &[&Call]) -> Result<BpfProgram, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut free = Vec::new();
    for call in calls {
        let of_call = rules.entry(call.number).or_default();
        let conditions = conditions(call.only)?;
        if conditions.is_empty() {
            // No rules: any arguments.
            free.push(call.number);
        }
        for condition in conditions {
            of_call.push(SeccompRule::new(vec![condition]).map_err(|error| error.to_string())?);
        }
    }
    for number in free {
        rules.insert(number, Vec::new());
    }
    filter(rules, SeccompAction::Trap, SeccompAction::Allow)
}

/// Of these conditions one must hold.
fn conditions(only: Only) -> Result<Vec<SeccompCondition>, String> {
    let is = |argument, value: u32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into())
    };
    let conditions = match only {
        // Another filter lets it fail.
        Only::Any | Only::Refused(_) => Ok(Vec::new()),
        Only::Bits { argument, mask, bits } => {
            let has = SeccompCmpOp::MaskedEq(mask);
            SeccompCondition::new(argument, SeccompCmpArgLen::Qword, has, bits).map(|one| vec![one])
        }
        Only::OneOf { argument, values } => {
            values.iter().map(|value| is(argument, *value)).collect()
        }
        Only::ThisProcess => is(0, std::process::id()).map(|one| vec![one]),
    };
    conditions.map_err(|error| error.to_string())
}

/// The filters that let calls fail, one for each error.
fn refuse(calls: &[&Call]) -> Vec<Result<BpfProgram, String>> {
    let mut errors: BTreeMap<libc::c_int, BTreeMap<i64, Vec<SeccompRule>>> = BTreeMap::new();
    for call in calls {
        let is_made =
            |other: &&Call| other.number == call.number && !matches!(other.only, Only::Refused(_));
        if let Only::Refused(error) = call.only
            && !calls.iter().any(is_made)
        {
            errors.entry(error).or_default().insert(call.number, Vec::new());
        }
    }
    errors
        .into_iter()
        .map(|(error, rules)| {
            filter(rules, SeccompAction::Allow, SeccompAction::Errno(error.unsigned_abs()))
        })
        .collect()
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, String> {
    let filter =
        SeccompFilter::new(rules, others, these, TARGET).map_err(|error| error.to_string())?;
    filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())
}

/// The exit code of a process that made a call that is not in the list.
const REFUSED: libc::c_int = 1;

/// Installs the handler of SIGSYS, so that a call that is refused is named. The process ends: it is
/// either under somebody else's control, or the list is wrong.
fn report_refused_calls() -> io::Result<()> {
    // SAFETY: zero is valid for the mask, which is empty then, and for the other fields.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = refused as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the pointer is to an action that lives until the call returns, and its handler has the
    // signature that its flags say.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // `struct siginfo` of Linux, with the part that SIGSYS has: si_signo, si_errno, si_code and, at the
    // next multiple of eight, the address of the instruction, the number of the call, the architecture.
    // SAFETY: the kernel hands the handler a whole `siginfo_t`, which has 128 bytes.
    let number = unsafe { info.cast::<libc::c_int>().add(6).read() };
    let mut line = Line::new();
    line.add(b"vmring: the sandbox does not have the system call ");
    line.add_number(number.unsigned_abs());
    if let Some(call) = CALLS.iter().find(|call| call.number == i64::from(number)) {
        line.add(b" (");
        line.add(call.name.as_bytes());
        line.add(b" for something else)");
    }
    line.add(b"; please report this. --no-sandbox serves without the sandbox\n");
    // SAFETY: the pointer and the length are those of a live array. `_exit` takes a number only. Both
    // may be called in a handler.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(REFUSED)
    }
}

/// A line that is put together without allocating.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 160], len: 0 }
    }

    fn add(&mut self, text: &[u8]) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number / divisor == 0 {
            divisor /= 10;
        }
        while divisor > 0 {
            self.add(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;
    use crate::serve::kept::Kept;

    #[test]
    fn a_line_is_put_together() {
        for number in [0, 7, 10, 257, 4_294_967_295] {
            let mut line = Line::new();
            line.add(b"a ");
            line.add_number(number);
            assert_eq!(line.bytes[..line.len], *format!("a {number}").as_bytes());
        }
        let mut line = Line::new();
        line.add(&[b'x'; 200]);
        assert_eq!(line.len, 160);
    }

    /// Goal: a call that is not in the list, or not with these arguments, is not made. It is named, and
    /// the process ends. Method: the test runs itself again.
    #[test]
    fn a_call_that_is_not_in_the_list_ends_the_process() {
        const CHILD: &str = "VMRING_TEST_CALL";
        let make = |call: &str| {
            let part = restrict_calls(&Needs::default());
            assert!(part.complete, "{}", part.state);
            let code = libc::PROT_READ | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: none of these touches the memory of this program: a number is asked for, memory is
            // mapped that nobody uses, a socket is made, a process ends at once.
            unsafe {
                match call {
                    "getppid" => drop(libc::getppid()),
                    "code" => drop(libc::mmap(ptr::null_mut(), 4096, code, flags, -1, 0)),
                    "socket" => drop(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)),
                    _ => {
                        if libc::fork() == 0 {
                            libc::_exit(0);
                        }
                    }
                }
            }
        };
        if let Ok(call) = std::env::var(CHILD) {
            return make(&call);
        }
        let (_, name) = module_path!().split_once("::").expect("the crate's name");
        let name = format!("{name}::a_call_that_is_not_in_the_list_ends_the_process");
        for (call, said) in [
            ("getppid", format!(" {};", libc::SYS_getppid)),
            ("code", format!(" {} (mmap for something else);", libc::SYS_mmap)),
            ("socket", format!(" {} (socket for something else);", libc::SYS_socket)),
            // Which call that is depends on the C library.
            ("fork", String::new()),
        ] {
            let output = std::process::Command::new(std::env::current_exe().expect("this program"))
                .args([&*name, "--exact", "--nocapture", "--test-threads=1"])
                .env(CHILD, call)
                .output()
                .expect("this program runs");
            let text = String::from_utf8_lossy(&output.stderr);
            if text.contains("the kernel has no seccomp filters") {
                return eprintln!("skipped: no seccomp here");
            }
            // Where the C library has blocked every signal, as in musl's `fork`, the kernel ends the
            // process itself.
            if call == "fork" && output.status.signal() == Some(libc::SIGSYS) {
                continue;
            }
            assert_eq!(output.status.code(), Some(REFUSED), "{call}: {text}");
            assert!(text.contains(&format!("does not have the system call{said}")), "{text}");
        }
    }

    /// Goal: without privileges, files can be removed from the folder of the sockets and written in that
    /// of the leases; no other file is reached, and no network. Method: the test runs itself again.
    #[test]
    fn files_and_the_network_are_out_of_reach() {
        const CHILD: &str = "VMRING_TEST_FILES";
        let (_, name) = module_path!().split_once("::").expect("the crate's name");
        let name = format!("{name}::files_and_the_network_are_out_of_reach");
        let Some(folder) = std::env::var_os(CHILD).map(std::path::PathBuf::from) else {
            let folder = std::env::temp_dir().join(format!("vmring-files-{}", std::process::id()));
            for name in ["sockets", "leases"] {
                fs::create_dir_all(folder.join(name)).expect("a folder");
            }
            fs::write(folder.join("sockets/file"), "x").expect("a file");
            let output = std::process::Command::new(std::env::current_exe().expect("this program"))
                .args([&*name, "--exact", "--nocapture", "--test-threads=1"])
                .env(CHILD, &folder)
                .output()
                .expect("this program runs");
            fs::remove_dir_all(&folder).expect("the folder");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            return eprint!("{}", if text.contains("skipped:") { &*text } else { "" });
        };
        let needs = Needs {
            sockets: vec![folder.join("sockets")],
            leases: Some(folder.join("leases")),
            ..Needs::default()
        };
        let parts = drop_privileges(&needs);
        if parts[2].state.contains("the kernel has no Landlock") {
            return eprintln!("skipped: {}", parts[2].state);
        }
        let denied = |result: io::Result<()>| {
            assert_eq!(result.expect_err("it is denied").kind(), io::ErrorKind::PermissionDenied);
        };
        denied(fs::read("/etc/passwd").map(drop));
        denied(fs::read(folder.join("sockets/file")).map(drop));
        denied(fs::write(folder.join("sockets/new"), "x"));
        fs::remove_file(folder.join("sockets/file")).expect("it is a socket's");
        fs::write(folder.join("leases/new"), "x").expect("the file of leases");
        fs::rename(folder.join("leases/new"), folder.join("leases/old")).expect("its new name");
        assert_eq!(fs::read(folder.join("leases/old")).expect("the leases"), b"x");
        // Kernels before 6.7 know no rule for the network.
        if !parts[2].state.contains("as far as this kernel's Landlock goes") {
            denied(std::net::TcpListener::bind("127.0.0.1:0").map(drop));
        }
        // The other threads of this test were there before.
        assert!(parts[0].complete && !parts[1].complete && !parts[2].complete, "{parts:?}");
        assert!(parts[1].state.contains("that the network began before"), "{parts:?}");
    }

    /// Every combination of needs gives a filter that the kernel's compiler of filters would take: no
    /// more than 4096 instructions, and no call twice.
    #[test]
    fn every_list_makes_a_filter() {
        for bits in 0..1024_u32 {
            let bit = |n: u32| bits & (1 << n) != 0;
            let needs = Needs {
                client: bit(0),
                terminal: bit(1),
                tap: bit(2),
                io_uring: bit(3),
                kept: Kept { hosts_end: bit(4), low_ports: false },
                nat: bit(8),
                resolvers: bit(9).then(|| "/".into()),
                simulated: bit(6),
                wires: bit(7),
                leases: bit(5).then(|| "/".into()),
                ..Needs::default()
            };
            let calls: Vec<_> = CALLS.iter().filter(|call| is_needed(call.when, &needs)).collect();
            let filter = allow(&calls).expect("a filter");
            assert!((calls.len()..=4096).contains(&filter.len()), "{}", filter.len());
            let refused = refuse(&calls);
            assert!(refused.iter().all(Result::is_ok), "{refused:?}");
        }
    }
}
