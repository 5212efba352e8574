//! A TCP stream between a guest in user-mode Linux and the world: over vhost-user and our translator, and
//! over a TAP of the kernel that forwards and masquerades.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmring_guest::{Guest, Nic};

use super::streams::Direction;
use super::way::{Process, masquerade};
use super::world::{SERVERS, World};
use crate::forward::{await_listener, busy};
use crate::guest_stream;
use crate::net::ip;
use crate::programs::{Measured, NO_VMRING, Programs, Rivals};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::served::Folder;

pub(super) const NAME: &str = "nat, user-mode Linux";

const TAP: &str = "guest0";
/// Longer than a start takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// What carries the guest's packets to the world.
#[derive(Clone, Copy)]
enum Method<'a> {
    Kernel,
    Serve(&'a Path),
    Passt(&'a Path),
}

impl Method<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel TAP, gro=1, nft masquerade",
            Self::Serve(_) => "vmring serve, vhost-user",
            Self::Passt(_) => "passt, vhost-user",
        }
    }

    /// The guest's address, and its router's.
    fn addresses(self) -> [&'static str; 2] {
        match self {
            Self::Kernel => ["10.99.0.2", "10.99.0.1"],
            Self::Serve(_) => ["192.168.64.2", "192.168.64.1"],
            // It takes the host's own.
            Self::Passt(_) => ["203.0.113.100", "203.0.113.254"],
        }
    }
}

/// A guest with its way out.
struct Running {
    guest: vmring_guest::Running,
    carrier: Option<Process>,
    _server: Process,
    world: World,
    _folder: Folder,
}

impl Running {
    fn start(method: Method<'_>, guest: &Guest) -> Result<Self> {
        let (world, folder) = (World::new()?, Folder::new()?);
        let mut iperf3 = Command::new("iperf3");
        iperf3.args(["--server", "--bind", &SERVERS[0].to_string()]);
        iperf3.stdin(Stdio::null()).stdout(Stdio::null());
        let server = world.outside.inside(|| {
            let server = Process::start(iperf3)?;
            await_listener()?;
            Ok(server)
        })?;
        let [socket, _] = folder.sockets();
        let command = match method {
            Method::Kernel => None,
            Method::Serve(program) => {
                let mut command = Command::new(program);
                command.args(["serve", "--network", "embedded:performance"]);
                command.arg("--listen").arg(format!("vhost-user:{}", socket.display()));
                Some(command)
            }
            Method::Passt(program) => {
                let mut command = Command::new(program);
                command.args(["--foreground", "--quiet", "--ipv4-only", "--vhost-user"]);
                command.args(["--no-map-gw", "--socket"]).arg(&socket);
                Some(command)
            }
        };
        let (guest, carrier) = world.host.inside(|| {
            let mut carrier = None;
            if let Some(mut command) = command {
                command.stdin(Stdio::null()).stdout(Stdio::null());
                let mut process = Process::start(command)?;
                process.wait_until("it does not listen", || socket.exists())?;
                carrier = Some(process);
            }
            let nic = match method {
                Method::Kernel => {
                    Nic::vector(format!("transport=tap,ifname={TAP},depth=128,gro=1"))
                }
                _ => Nic::vhost_user(&socket),
            };
            let guest = guest.clone().nic(nic).timeout(PATIENCE * 3).start();
            Ok((guest, carrier))
        })?;
        let mut running = Self { guest, carrier, _server: server, world, _folder: folder };
        running.set_up(method)?;
        Ok(running)
    }

    /// Gives the guest its address, and the host's end of a TAP its own.
    fn set_up(&mut self, method: Method<'_>) -> Result<()> {
        let [address, router] = method.addresses();
        let set_up = self.guest.run(&format!(
            "ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {router}"
        ));
        if set_up.status != 0 {
            let why = set_up.output.lines().next().unwrap_or_default();
            return Err(format!("the guest has no network: {why}").into());
        }
        let Method::Kernel = method else { return Ok(()) };
        self.world.host.inside(|| {
            let begin = Instant::now();
            while ip(&format!("link show {TAP}")).is_err() {
                if begin.elapsed() > PATIENCE {
                    return Err("user-mode Linux makes no TAP".into());
                }
                thread::sleep(Duration::from_millis(20));
            }
            ip(&format!("address add {router}/24 dev {TAP}"))?;
            ip(&format!("link set {TAP} up"))?;
            masquerade()
        })
    }

    /// Gbit/s, and the seconds of the carrier's processor time and of the whole machine's for each gigabyte.
    fn measure(&mut self, direction: Direction, seconds: u32) -> Result<[Option<f64>; 3]> {
        let own =
            |carrier: &Option<Process>| carrier.as_ref().map(Process::processor_time).transpose();
        let (own_before, all_before) = (own(&self.carrier)?, busy()?);
        let reverse = direction == Direction::In;
        let rate = guest_stream::run(&mut self.guest, &SERVERS[0].to_string(), reverse, seconds)?;
        let gigabytes = rate / 8.0 * f64::from(seconds);
        let a_gigabyte = |time: Duration| time.as_secs_f64() / gigabytes;
        let own = own_before.zip(own(&self.carrier)?).map(|(before, after)| after - before);
        let all = busy()?.saturating_sub(all_before);
        Ok([Some(rate), own.map(a_gigabyte), Some(a_gigabyte(all))])
    }
}

/// Does what a guest answers to. One that does not answer in time panics.
fn answered<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the guest does not answer in time".into()))
}

/// A guest and its way out, or why there is none, and the values of its figures.
type Contender<'a> = (Method<'a>, std::result::Result<Running, String>, [Vec<f64>; 3]);

pub(super) fn run(rounds: u32, programs: Programs<'_>, rivals: Rivals<'_>) -> Result<Measured> {
    let Some(vmring) = programs.vmring else { return Ok(Err(NO_VMRING.into())) };
    let guest = match Guest::uml().and_then(|guest| guest.program("iperf3")) {
        Ok(guest) => guest,
        Err(missing) => return Ok(Err(missing.to_string())),
    };
    let seconds = programs.stream_seconds;
    let methods = [Method::Kernel, Method::Serve(vmring)];
    let mut all: Vec<Contender<'_>> = methods
        .into_iter()
        .chain(rivals.passt.map(Method::Passt))
        .map(|method| {
            let state = answered(|| Running::start(method, &guest)).map_err(|e| e.to_string());
            (method, state, [const { Vec::new() }; 3])
        })
        .collect();
    let about =
        format!("one TCP stream of {seconds} s between a guest in user-mode Linux and the world");
    let figures = &["Gbit/s", "carrier CPU s/GB", "all CPU s/GB"];
    let mut table = Table::new(NAME, about, &["direction", "carried by"], figures);
    let mut wants = Vec::new();
    for direction in Direction::ALL {
        for _ in 0..rounds {
            for (method, state, values) in &mut all {
                let Ok(running) = state else { continue };
                match answered(|| running.measure(direction, seconds)) {
                    Ok(measured) => values
                        .iter_mut()
                        .zip(measured)
                        .for_each(|(values, figure)| values.extend(figure)),
                    Err(error) => {
                        values.iter_mut().for_each(Vec::clear);
                        *state = Err(error.to_string());
                    }
                }
                if let (Method::Serve(_), Err(why)) = (&*method, &*state) {
                    return Err(format!("{}: {why}", method.name()).into());
                }
            }
        }
        let mut medians = Vec::new();
        for (method, state, values) in &mut all {
            let name = match state {
                Ok(_) => method.name().to_owned(),
                Err(why) => format!("{}: {why}", method.name()),
            };
            let [rate, own, machine] = &*values;
            medians.push(table.row(&[direction.name(), &name], &[rate, own, machine]));
            values.iter_mut().for_each(Vec::clear);
        }
        let ratio = medians[1] / medians[0];
        if ratio.is_finite() {
            let what = format!("user-mode Linux, TCP {}: vmring / kernel TAP", direction.name());
            wants.push(Want::at_least(what, ratio, 0.8));
        }
    }
    Ok(Ok((table, wants)))
}
