//! `vmring run-netns`: runs a command in a network namespace of its own, whose only way out is an
//! embedded network of this process.
//!
//! The process forks before it has a thread. The child makes the namespace and a TAP in it, sends the
//! TAP's descriptor to the parent, gives the TAP its address, and becomes the command. The parent joins
//! the TAP to the network, and ends with the command.
//!
//! - [`inside`]: the child, until it becomes the command
//! - [`ipv6`]: how the TAP gets its IPv6
//! - [`link`]: the TAP and the loopback interface in the namespace
//! - [`resolver`]: the name server that the command finds
//! - [`settings`]: what the parent tells the child

mod inside;
mod ipv6;
mod link;
mod resolver;
mod settings;

use std::io::{IoSliceMut, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread::{self, JoinHandle};

use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use signal_hook::consts::{SIGHUP, SIGTERM};
use signal_hook::iterator::Signals;
use vmring::device::Offloads;
use vmring::{Embedded, Error, Interface, InterfaceBuilder, Mode, Tap};

use crate::args::{NetnsOffload, RunNetnsArgs};
use crate::bridge::forwarding::Bridge;
use crate::bridge::spec::{End, InSoftware, start_with_most};
use crate::device::QUEUE;
use crate::failure::Failure;
use crate::stop::Stop;

use settings::Settings;

/// Packets in flight in each direction.
const DEPTH: u32 = 256;
/// The files that this process has open at most, without those of the way out.
const FILES: u64 = 128;
/// What a shell adds to the number of the signal that ended a command.
const BY_SIGNAL: i32 = 128;

/// Runs the command, and returns its exit code.
pub(crate) fn run(args: &RunNetnsArgs) -> Result<ExitCode, Failure> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Failure::Step(format!("{what} failed: {error}"))
    };
    let (here, there) = UnixStream::pair().map_err(|e| failed("making a socket pair", &e))?;
    // SAFETY: this process has no other thread yet, so the child may do whatever the parent may.
    let child = match unsafe { fork() }.map_err(|e| failed("making a process", &e))? {
        ForkResult::Child => {
            drop(here);
            inside::become_the_command(there, args);
        }
        ForkResult::Parent { child } => child,
    };
    drop(there);
    // A terminal sends these to the command too, which decides what they mean.
    for one in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: no handler is installed: the signal is ignored.
        unsafe { signal(one, SigHandler::SigIgn) }.map_err(|e| failed("ignoring a signal", &e))?;
    }
    serve(here, child, args)
}

/// Serves the child until it has ended.
fn serve(socket: UnixStream, child: Pid, args: &RunNetnsArgs) -> Result<ExitCode, Failure> {
    let begun = Stop::new().and_then(|stop| {
        pass_on(child)?;
        let joined = receive_descriptor(&socket)?.map(|tap| join(&tap, args)).transpose()?;
        Ok((stop, joined))
    });
    let (stop, mut bridge) = match begun {
        Ok((stop, Some((bridge, settings)))) => {
            let told =
                serde_json::to_string(&settings).expect("it consists of numbers and addresses");
            // A child that has ended is found by the wait.
            let _ = writeln!(&socket, "{told}");
            (stop, bridge)
        }
        // It has said why it ends.
        Ok((_, None)) => return ended(wait(child)),
        Err(failure) => {
            // A child that waits for its settings ends without them.
            drop(socket);
            wait(child);
            return Err(failure);
        }
    };
    let waiter: JoinHandle<WaitStatus> = {
        let stop = stop.clone();
        thread::spawn(move || {
            let status = wait(child);
            stop.tell();
            status
        })
    };
    let moved = bridge.run(&stop, None, None, |_| {});
    if moved.is_err() && !waiter.is_finished() {
        // A command that has lost its network ends.
        let _ = kill(child, Signal::SIGTERM);
    }
    let status = waiter.join().expect("it only waits");
    moved.and(bridge.end()).and_then(|()| bridge.stop())?;
    ended(status)
}

/// Passes the signals that end this process on to the command.
fn pass_on(child: Pid) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGTERM, SIGHUP])
        .map_err(|error| Failure::Step(format!("signals cannot be waited for: {error}")))?;
    thread::spawn(move || {
        for number in signals.forever() {
            if let Ok(one) = Signal::try_from(number) {
                let _ = kill(child, one);
            }
        }
    });
    Ok(())
}

/// Joins the TAP to a network of its own.
fn join(tap: &OwnedFd, args: &RunNetnsArgs) -> Result<(Bridge, Settings), Failure> {
    let builder = |offloads| Interface::builder().offloads(offloads).mtu(args.mtu());
    let start = |name: &str, builder: InterfaceBuilder| {
        builder.start().map_err(Failure::starting).map(|interface| End::of(name, interface))
    };
    let wanted = match args.offload {
        NetnsOffload::All => Offloads::ALL,
        NetnsOffload::None => Offloads::default(),
    };
    let tap = start_with_most(wanted, |offloads| {
        let fd = tap.try_clone().map_err(|source| {
            Failure::starting(Error::Io { what: "duplicating a descriptor", source })
        })?;
        start("the TAP", builder(offloads).device(Tap::from_fd(fd)))
    })?;
    // The command has its limit from before.
    crate::system::allow_open_files(FILES + args.nat.descriptors());
    let driver = args.nat.embedded(Embedded::network("run-netns").overflow(QUEUE));
    let shared = builder(tap.offloads()).mode(Mode::Shared).device(driver);
    let shared = match args.subnet {
        Some(range) => shared.ipv4(range),
        None => shared,
    };
    let network = start("the network", shared)?;
    let info = network.interface.info();
    let range = info.ipv4.expect("an embedded network has addresses");
    let address = Ipv4Addr::from(u32::from(range.start) + 1);
    let (mask, gateway, prefix) = (range.mask, range.start, info.nat66_prefix);
    let settings = Settings { address, mask, gateway, prefix };
    let bridge = Bridge::new([tap, network], [InSoftware::Nothing; 2], [DEPTH; 2])
        .map_err(Failure::starting)?;
    Ok((bridge, settings))
}

/// The descriptor that the child sends, unless it ends before.
fn receive_descriptor(socket: &UnixStream) -> Result<Option<OwnedFd>, Failure> {
    let (mut byte, mut space) = ([0], nix::cmsg_space!([libc::c_int; 1]));
    let mut pieces = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => {}
            done => break done,
        }
    };
    let failed = |error| Failure::Step(format!("receiving the TAP failed: {error}"));
    let received = received.map_err(failed)?;
    for message in received.cmsgs().map_err(failed)? {
        if let ControlMessageOwned::ScmRights(fds) = message
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made the descriptor for this process, and nothing else owns it.
            return Ok(Some(unsafe { OwnedFd::from_raw_fd(*fd) }));
        }
    }
    Ok(None)
}

/// Waits until the child has ended.
fn wait(child: Pid) -> WaitStatus {
    loop {
        match waitpid(child, None) {
            Ok(status @ (WaitStatus::Exited(..) | WaitStatus::Signaled(..))) => return status,
            // It was stopped, or this call was interrupted.
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return WaitStatus::Exited(child, inside::CANNOT_RUN),
        }
    }
}

/// The exit code for a command that has ended so.
fn ended(status: WaitStatus) -> Result<ExitCode, Failure> {
    let code = match status {
        WaitStatus::Signaled(_, signal, _) => BY_SIGNAL + signal as i32,
        WaitStatus::Exited(_, code) => code,
        _ => unreachable!("the wait returns no other state"),
    };
    Ok(ExitCode::from(code as u8))
}
