//! A TCP stream between a guest in user-mode Linux and the host's kernel: over `vmring serve` and a TAP,
//! and over a TAP that user-mode Linux opens itself.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmring_guest::{Guest, Nic};

use crate::guest_stream;
use crate::net::{in_new_namespace, ip};
use crate::plan::Plan;
use crate::programs::{Measured, Programs};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::{Half, take_turns};
use crate::served::{Folder, Served};

pub(super) const NAME: &str = "vhost, stream";

const TAP: &str = "guest0";
const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
const PATIENCE: Duration = Duration::from_secs(10);

/// The program that carries the guest's frames to the TAP.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method<'a> {
    Kernel,
    Serve(&'a Path),
}

impl Method<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel TAP, gro=1",
            Self::Serve(_) => "vmring serve --network tap",
        }
    }
}

pub(super) fn run(plan: Plan, programs: Programs<'_>) -> Result<Measured> {
    let Some(vmring) = programs.vmring else { return Ok(Err(crate::programs::NO_VMRING.into())) };
    if let Some(why) = crate::programs::no_tap() {
        return Ok(Err(why.into()));
    }
    let guest = match Guest::uml().and_then(|guest| guest.program("iperf3")) {
        Ok(guest) => guest,
        Err(missing) => return Ok(Err(missing.to_string())),
    };
    let seconds = programs.stream_seconds;
    let mut all: Vec<_> = [false, true]
        .into_iter()
        .flat_map(|reverse| [Method::Kernel, Method::Serve(vmring)].map(|method| (reverse, method)))
        .collect();
    let halves: Vec<Half<1>> = take_turns(plan, &mut all, |(reverse, method)| {
        let rate = in_new_namespace(|| measure(*method, guest.clone(), *reverse, seconds));
        Ok(Some([rate.map_err(|error| format!("{}: {error}", method.name()))?]))
    })?;
    let mut table = Table::new(
        NAME,
        format!("one TCP stream of {seconds} s between a guest in user-mode Linux and the host"),
        &["direction", "carried by"],
        &["Gbit/s"],
    );
    let (mut wants, mut rival) = (Vec::new(), f64::NAN);
    for half in &halves {
        half.begin(&mut table);
        for ((reverse, method), [rates]) in all.iter().zip(&half.values) {
            let direction = if *reverse { "host to guest" } else { "guest to host" };
            let median = table.row(&[direction, method.name()], &[rates]);
            match method {
                Method::Kernel => rival = median,
                Method::Serve(_) => {
                    let name = format!("TCP, {direction}: vmring serve / kernel TAP");
                    wants.extend(half.wants([Want::at_least(name, median / rival, 0.9)]));
                }
            }
        }
    }
    Ok(Ok((table, wants)))
}

/// The host's side of the stream. It ends with its value.
struct Server(Child);

impl Server {
    fn start() -> Result<Self> {
        let mut command = Command::new("iperf3");
        command.args(["--server", "--bind", HOST]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(command.spawn()?);
        crate::forward::await_listener()?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gbit/s of one stream, in the calling thread's namespace.
fn measure(method: Method<'_>, guest: Guest, reverse: bool, seconds: u32) -> Result<f64> {
    let folder = Folder::new()?;
    let (nic, server) = match method {
        Method::Kernel => {
            (Nic::vector(format!("transport=tap,ifname={TAP},depth=128,gro=1")), None)
        }
        Method::Serve(program) => {
            let [socket, _] = folder.sockets();
            let listens = [format!("vhost-user:{}", socket.display())];
            let network = format!("tap:{TAP}");
            let arguments = ["serve", "--network", &network];
            let server = Served::start_with(program, &arguments, &listens, &folder)?;
            (Nic::vhost_user(socket), Some(server))
        }
    };
    let mut guest = guest.nic(nic).timeout(PATIENCE * 6).start();
    guest.sh(&format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"));
    let begin = Instant::now();
    while !Path::new(&format!("/proc/thread-self/net/dev_snmp6/{TAP}")).exists()
        && ip(&format!("link show {TAP}")).is_err()
    {
        if begin.elapsed() > PATIENCE {
            return Err("nobody makes the TAP".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    ip(&format!("address add {HOST}/24 dev {TAP}"))?;
    ip(&format!("link set {TAP} up"))?;
    let _iperf = Server::start()?;
    let rate = guest_stream::run(&mut guest, HOST, reverse, seconds);
    drop((guest, server));
    rate
}
