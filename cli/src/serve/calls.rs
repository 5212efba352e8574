//! The system calls of `vmring serve` after its set-up: each with the reason for it. The seccomp filter
//! is made of this table. A test traces a server through its life, and demands that the table has
//! every call that was made, and no other.
//!
//! This file uses nothing but `libc`, so that the test can include it.

/// What the server must be doing, for a call to be needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// It serves.
    Always,
    /// It serves, and something is not as where the test runs. Each such call says what.
    Elsewhere,
    /// It connects to front ends that listen.
    Client,
    /// It has wires.
    Wires,
    /// It shows counters on a terminal.
    Terminal,
    /// It remembers the leases of its DHCP server in a file.
    LeaseFile,
    /// It moves frames of a TAP.
    Tap,
    /// It moves frames of a TAP by io_uring.
    IoUring,
    /// It puts the host's end of a TAP back when it ends.
    HostsEnd,
    /// It moves frames of the simulated vmnet.
    Simulated,
    /// It translates for guests of an embedded network.
    Nat,
    /// It reads which resolvers the host has, for guests that ask for names.
    Resolvers,
}

/// Which arguments a call may have. The first argument has the number 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Only {
    /// All of them.
    Any,
    /// The argument has these bits of the mask.
    Bits { argument: u8, mask: u64, bits: u64 },
    /// The argument, of which the kernel looks at 32 bits, is one of these.
    OneOf { argument: u8, values: &'static [u32] },
    /// The first argument is this process.
    ThisProcess,
    /// It is not made, and fails with this error: whoever tries it has another way. If the call is in
    /// the table a second time and is needed, it is made.
    Refused(libc::c_int),
}

/// A system call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) number: libc::c_long,
    pub(crate) when: When,
    pub(crate) only: Only,
}

macro_rules! calls {
    ($($(#[$attribute:meta])* $number:ident: $when:ident, $only:expr;)*) => {
        &[$($(#[$attribute])* Call {
            // Without its prefix `SYS_`.
            name: stringify!($number).split_at(4).1,
            number: libc::$number,
            when: When::$when,
            only: $only,
        }),*]
    };
}

/// The memory is not executable, whatever else it is.
const fn no_code(argument: u8) -> Only {
    Only::Bits { argument, mask: libc::PROT_EXEC as u64, bits: 0 }
}

/// The table.
pub(crate) const CALLS: &[Call] = calls! {
    // Kicks, interrupts, bells, signals, what is said and reported.
    SYS_read: Always, Only::Any;
    SYS_write: Always, Only::Any;
    // Bells, and the answers to front ends.
    SYS_recvfrom: Always, Only::Any;
    SYS_sendto: Always, Only::Any;
    // Front ends that connect, their messages with descriptors, and what these are.
    SYS_accept4: Always, Only::Any;
    SYS_recvmsg: Always, Only::Any;
    #[cfg(not(target_env = "musl"))]
    SYS_statx: Always, Only::Any;
    #[cfg(target_env = "musl")]
    SYS_fstat: Always, Only::Any;
    SYS_fcntl: Always, Only::OneOf {
        argument: 1,
        values: &[
            libc::F_GETFD as u32,
            libc::F_SETFD as u32,
            libc::F_GETFL as u32,
            libc::F_SETFL as u32,
            libc::F_GET_SEALS as u32,
            libc::F_ADD_SEALS as u32,
        ],
    };
    SYS_getsockopt: Always, Only::Any;
    SYS_getsockname: Always, Only::Any;
    SYS_ioctl: Always, Only::OneOf { argument: 1, values: &[libc::FIONBIO as u32] };
    SYS_close: Always, Only::Any;
    // Sleep, until there is work.
    #[cfg(target_arch = "x86_64")]
    SYS_poll: Always, Only::Any;
    #[cfg(target_arch = "aarch64")]
    SYS_ppoll: Always, Only::Any;
    SYS_epoll_create1: Always, Only::Any;
    SYS_epoll_ctl: Always, Only::Any;
    #[cfg(all(target_arch = "x86_64", not(target_env = "musl")))]
    SYS_epoll_wait: Always, Only::Any;
    #[cfg(any(target_arch = "aarch64", target_env = "musl"))]
    SYS_epoll_pwait: Always, Only::Any;
    SYS_eventfd2: Always, Only::Any;
    SYS_pipe2: Always, Only::Any;
    // A sleep that a stop and its end have interrupted (SIGSTOP, SIGCONT) goes on.
    SYS_restart_syscall: Always, Only::Any;
    // A thread that waits for another one may let it run first. Whether it does depends on which of them
    // is faster.
    SYS_sched_yield: Elsewhere, Only::Any;
    // The time is read without a call, but for clocks that the kernel does not map into processes.
    SYS_clock_gettime: Elsewhere, Only::Any;
    // An interrupt into a pipe that nobody reads must raise no SIGPIPE.
    SYS_rt_sigprocmask: Always, Only::Any;
    SYS_rt_sigpending: Always, Only::Any;
    SYS_rt_sigtimedwait: Always, Only::Any;
    // The memory of guests, of rings and of the allocator. None of it is ever executable.
    SYS_mmap: Always, no_code(2);
    SYS_munmap: Always, Only::Any;
    SYS_mprotect: Always, no_code(2);
    SYS_madvise: Always, Only::Any;
    SYS_brk: Always, Only::Any;
    // The allocator makes a very large block larger. Whether it does depends on blocks that were freed.
    SYS_mremap: Elsewhere, Only::Any;
    // The allocator of glibc looks up whether memory is overcommitted before it gives some back.
    #[cfg(not(target_env = "musl"))]
    SYS_openat: Always, Only::Refused(libc::EACCES);
    // Threads, one for each connection. No process can be made.
    SYS_clone: Always, Only::Bits {
        argument: 0,
        mask: libc::CLONE_THREAD as u64,
        bits: libc::CLONE_THREAD as u64,
    };
    // glibc uses `clone` where there is no `clone3`, whose flags a filter cannot see.
    #[cfg(not(target_env = "musl"))]
    SYS_clone3: Always, Only::Refused(libc::ENOSYS);
    #[cfg(not(target_env = "musl"))]
    SYS_set_robust_list: Always, Only::Any;
    #[cfg(not(target_env = "musl"))]
    SYS_rseq: Always, Only::Any;
    #[cfg(not(target_env = "musl"))]
    SYS_sched_getaffinity: Always, Only::Any;
    SYS_prctl: Always, Only::OneOf { argument: 0, values: &[libc::PR_SET_NAME as u32] };
    SYS_sigaltstack: Always, Only::Any;
    SYS_gettid: Always, Only::Any;
    SYS_futex: Always, Only::Any;
    SYS_exit: Always, Only::Any;
    // The keys of hash tables.
    SYS_getrandom: Always, Only::Any;
    // Signals: SIGTERM and its like, and SIGBUS, which ends the process if it is not about a guest.
    SYS_rt_sigreturn: Always, Only::Any;
    SYS_rt_sigaction: Always, Only::Any;
    #[cfg(not(target_env = "musl"))]
    SYS_getpid: Always, Only::Any;
    #[cfg(not(target_env = "musl"))]
    SYS_tgkill: Always, Only::ThisProcess;
    #[cfg(target_env = "musl")]
    SYS_tkill: Always, Only::Any;
    // Front ends that listen.
    SYS_socket: Client, Only::OneOf { argument: 0, values: &[libc::AF_UNIX as u32] };
    SYS_connect: Client, Only::Any;
    // Frames of wires, many in one call.
    SYS_sendmsg: Wires, Only::Any;
    SYS_recvmmsg: Wires, Only::Any;
    SYS_sendmmsg: Wires, Only::Any;
    SYS_setsockopt: Wires, Only::Any;
    SYS_getpeername: Wires, Only::Any;
    SYS_connect: Wires, Only::Any;
    #[cfg(all(target_arch = "x86_64", not(target_env = "musl")))]
    SYS_epoll_pwait: Wires, Only::Any;
    SYS_timerfd_settime: Wires, Only::Any;
    SYS_shutdown: Wires, Only::Any;
    // The name of this side's socket, where a peer answers to one.
    #[cfg(target_env = "musl")]
    SYS_getpid: Wires, Only::Any;
    // What is at the path of a peer.
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    SYS_stat: Wires, Only::Any;
    // The sockets of guests' flows, and a look at the host's own addresses.
    SYS_socket: Nat, Only::OneOf {
        argument: 0,
        values: &[libc::AF_INET as u32, libc::AF_INET6 as u32, libc::AF_NETLINK as u32],
    };
    SYS_bind: Nat, Only::Any;
    SYS_connect: Nat, Only::Any;
    // Such a socket says that it has an error, and has none. Then it may still be connecting.
    SYS_getpeername: Elsewhere, Only::Any;
    SYS_setsockopt: Nat, Only::Any;
    SYS_sendmsg: Nat, Only::Any;
    SYS_recvmmsg: Nat, Only::Any;
    SYS_sendmmsg: Nat, Only::Any;
    SYS_shutdown: Nat, Only::Any;
    // The translator starts with the first packet for outside. It looks what sockets can do here, and how
    // many there may be.
    SYS_prlimit64: Nat, Only::OneOf { argument: 1, values: &[libc::RLIMIT_NOFILE as _] };
    // The host's resolvers, from the file that names them.
    #[cfg(any(target_arch = "aarch64", not(target_env = "musl")))]
    SYS_openat: Resolvers, Only::Any;
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    SYS_open: Resolvers, Only::Any;
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    SYS_stat: Resolvers, Only::Any;
    // The width of the terminal, and whether it is one.
    SYS_ioctl: Terminal, Only::OneOf {
        argument: 1,
        values: &[libc::TIOCGWINSZ as u32, libc::TCGETS as u32],
    };
    // The file of leases, which is written anew when it has grown long. Landlock keeps these to its
    // folder.
    #[cfg(any(target_arch = "aarch64", not(target_env = "musl")))]
    SYS_openat: LeaseFile, Only::Any;
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    SYS_open: LeaseFile, Only::Any;
    SYS_flock: LeaseFile, Only::Any;
    SYS_fchmod: LeaseFile, Only::Any;
    SYS_fdatasync: LeaseFile, Only::Any;
    #[cfg(target_arch = "x86_64")]
    SYS_rename: LeaseFile, Only::Any;
    #[cfg(target_arch = "aarch64")]
    SYS_renameat: LeaseFile, Only::Any;
    // What the kernel has dropped for a full TAP, from its table.
    SYS_pread64: Tap, Only::Any;
    // The ring is made by the thread that drives it, which asks the TAP for the size of its queue.
    SYS_ioctl: IoUring, Only::OneOf { argument: 1, values: &[libc::TUNGETSNDBUF as u32] };
    SYS_io_uring_setup: IoUring, Only::Any;
    SYS_io_uring_register: IoUring, Only::Any;
    SYS_io_uring_enter: IoUring, Only::Any;
    // IPv4 forwarding is put back. The rules are taken down over a socket that is open.
    SYS_pwrite64: HostsEnd, Only::Any;
    // The simulated vmnet looks whether what it is given is memory.
    SYS_mincore: Simulated, Only::Any;
    // The report, and the files of the sockets, which are removed if they are still the server's own.
    SYS_getrusage: Always, Only::Any;
    #[cfg(all(target_arch = "x86_64", target_env = "musl"))]
    SYS_lstat: Always, Only::Any;
    #[cfg(all(target_arch = "aarch64", target_env = "musl"))]
    SYS_newfstatat: Always, Only::Any;
    #[cfg(target_arch = "x86_64")]
    SYS_unlink: Always, Only::Any;
    #[cfg(target_arch = "aarch64")]
    SYS_unlinkat: Always, Only::Any;
    SYS_exit_group: Always, Only::Any;
};
