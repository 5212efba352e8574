//! A TCP stream from one network namespace through a bridge to another.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::net::without_checksums;
use crate::net::{FULL_FRAME, Namespace, Offload, Tap, counters, in_new_namespace, ip};
use crate::relay;
use crate::report::{Table, Want};
use crate::result::Result;

/// The arguments for `vmring bridge`, apart from the offload. It makes both TAPs, which are then moved
/// to their namespaces, and carries packets until it is killed.
const BRIDGE: &str = "bridge tap:{left} tap:{right} --engine {engine}";

/// The contenders.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method<'a> {
    /// Two TAPs and the relay.
    Relay,
    /// The `vmring` command at this path, with this engine.
    Ours { program: &'a Path, engine: &'static str },
    /// No bridge at all: the most that the two ends can do.
    Veth,
}

impl Method<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Relay => "read(2)/write(2) relay",
            Self::Ours { engine: "io_uring", .. } => "vmring bridge, io_uring",
            Self::Ours { .. } => "vmring bridge, plain calls",
            Self::Veth => "veth pair, no bridge",
        }
    }
}

/// The result of one stream.
#[derive(Clone, Copy)]
pub(crate) struct Stream {
    pub(crate) gbit_per_second: f64,
    pub(crate) bridge_cpu_seconds_per_gigabyte: Option<f64>,
    pub(crate) system_cpu_seconds_per_gigabyte: f64,
}

/// Which way the bytes of a stream go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    LeftToRight,
    RightToLeft,
}

/// Longer than anything may take apart from the stream itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// The names of the interfaces, one in each of the outer namespaces.
pub(crate) const LEFT: &str = "left";
pub(crate) const RIGHT: &str = "right";
pub(crate) const RIGHT_ADDRESS: &str = "10.9.0.2";

/// Measures all contenders in turns, with and without offload. The `vmring` command takes part if
/// there is one.
pub(crate) fn run(
    rounds: u32,
    seconds: u32,
    program: Option<&Path>,
) -> Result<(Vec<Table>, Vec<Want>)> {
    let ours = program
        .into_iter()
        .flat_map(|program| ["io_uring", "plain"].map(|engine| Method::Ours { program, engine }));
    let methods: Vec<Method<'_>> =
        [Method::Relay].into_iter().chain(ours).chain([Method::Veth]).collect();
    let mut all: Vec<(Method<'_>, Offload, Vec<Stream>)> = [Offload::Off, Offload::On]
        .into_iter()
        .flat_map(|offload| methods.iter().map(move |method| (*method, offload, Vec::new())))
        .collect();
    for _ in 0..rounds {
        for (method, offload, streams) in &mut all {
            let stream = in_new_namespace(|| measure(*method, *offload, seconds));
            streams.push(stream.map_err(|error| format!("{}: {error}", method.name()))?);
        }
    }
    let mut table = Table::new(
        "tap-forward",
        format!("one TCP stream of {seconds} s through a bridge"),
        &["offload", "contender"],
        &["Gbit/s", "bridge CPU s/GB", "system CPU s/GB"],
    );
    let mut medians = Vec::new();
    for (method, offload, streams) in &all {
        let rate: Vec<f64> = streams.iter().map(|stream| stream.gbit_per_second).collect();
        let bridge: Vec<f64> =
            streams.iter().filter_map(|stream| stream.bridge_cpu_seconds_per_gigabyte).collect();
        let system: Vec<f64> =
            streams.iter().map(|stream| stream.system_cpu_seconds_per_gigabyte).collect();
        let on = *offload == Offload::On;
        let label = if on { "on" } else { "off" };
        let median = table.row(&[label, method.name()], &[&rate, &bridge, &system]);
        medians.push((method.name(), on, median));
    }
    let of = |name: &str, on: bool| {
        medians.iter().find(|(of, offload, _)| *of == name && *offload == on).map(|row| row.2)
    };
    let mut wants = Vec::new();
    for (on, rival, least) in [(false, Method::Relay, 1.3), (true, Method::Veth, 0.9)] {
        if let Some(rival_rate) = of(rival.name(), on) {
            for ours in ["vmring bridge, io_uring", "vmring bridge, plain calls"] {
                if let Some(rate) = of(ours, on) {
                    let offload = if on { "with" } else { "without" };
                    let what = format!("{ours}, {offload} offload, / {}", rival.name());
                    wants.push(Want::at_least(what, rate / rival_rate, least));
                }
            }
        }
    }
    Ok((vec![table], wants))
}

/// One stream, measured from within the namespace of the bridge.
fn measure(method: Method<'_>, offload: Offload, seconds: u32) -> Result<Stream> {
    let ends = (Namespace::new()?, Namespace::new()?);
    match method {
        Method::Relay => {
            let (left, right) = (Tap::open(LEFT, offload)?, Tap::open(RIGHT, offload)?);
            connect(&ends)?;
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                let relay = scope.spawn(|| relay::run(&left, &right, &stop));
                let transfer = transfer(&ends, offload, Way::LeftToRight, seconds);
                stop.store(true, Ordering::Relaxed);
                let bridge = relay.join().unwrap_or_else(|_| Err("the relay panicked".into()))?;
                Ok(transfer?.stream(Some(bridge)))
            })
        }
        Method::Ours { program, engine } => {
            let offloads = if offload == Offload::On { "common" } else { "none" };
            let bridge = Bridge::start(program, engine, &[&format!("--offload={offloads}")])?;
            connect(&ends)?;
            let before = bridge.processor_time()?;
            let transfer = transfer(&ends, offload, Way::LeftToRight, seconds)?;
            Ok(transfer.stream(Some(bridge.processor_time()?.saturating_sub(before))))
        }
        Method::Veth => {
            ip(&format!("link add {LEFT} type veth peer name {RIGHT}"))?;
            if offload == Offload::Off {
                without_checksums(LEFT)?;
                without_checksums(RIGHT)?;
            }
            connect(&ends)?;
            Ok(transfer(&ends, offload, Way::LeftToRight, seconds)?.stream(None))
        }
    }
}

/// Moves the two interfaces to their namespaces and gives them addresses.
pub(crate) fn connect(ends: &(Namespace, Namespace)) -> Result<()> {
    for (end, name, address) in [(&ends.0, LEFT, "10.9.0.1"), (&ends.1, RIGHT, RIGHT_ADDRESS)] {
        end.adopt(name)?;
        end.inside(|| {
            ip(&format!("address add {address}/24 dev {name}"))?;
            ip(&format!("link set {name} up"))
        })?;
    }
    Ok(())
}

/// The bytes that went through, and the time that it took on all processors.
pub(crate) struct Transfer {
    bytes: f64,
    seconds: f64,
    busy: Duration,
}

impl Transfer {
    pub(crate) fn stream(&self, bridge: Option<Duration>) -> Stream {
        let a_gigabyte = |time: Duration| time.as_secs_f64() / (self.bytes / 1e9);
        Stream {
            gbit_per_second: self.bytes * 8.0 / 1e9 / self.seconds,
            bridge_cpu_seconds_per_gigabyte: bridge.map(a_gigabyte),
            system_cpu_seconds_per_gigabyte: a_gigabyte(self.busy),
        }
    }
}

/// A child process that does not outlive its measurement.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have ended by itself. Then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A `vmring bridge` between two TAPs in the calling thread's namespace.
pub(crate) struct Bridge(Process);

impl Bridge {
    /// Starts it with these arguments for the offload.
    pub(crate) fn start(program: &Path, engine: &str, offload: &[&str]) -> Result<Self> {
        let arguments = BRIDGE.split(' ').map(|argument| {
            argument.replace("{left}", LEFT).replace("{right}", RIGHT).replace("{engine}", engine)
        });
        let child = Command::new(program)
            .args(arguments)
            .args(offload)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{} does not start: {error}", program.display()))?;
        let mut bridge = Process(child);
        let deadline = Instant::now() + PATIENCE;
        while counters(LEFT).is_err() || counters(RIGHT).is_err() {
            if let Some(status) = bridge.0.try_wait()? {
                let mut said = String::new();
                if let Some(pipe) = &mut bridge.0.stderr {
                    pipe.read_to_string(&mut said)?;
                }
                return Err(format!("{} ended: {status}: {said}", program.display()).into());
            }
            if Instant::now() > deadline {
                return Err(format!("{} makes no TAPs", program.display()).into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        // The bridge brings the TAPs up where they are. Then they are moved.
        thread::sleep(Duration::from_millis(200));
        Ok(Self(bridge))
    }

    /// The processor time of all its threads so far.
    pub(crate) fn processor_time(&self) -> Result<Duration> {
        let line = fs::read_to_string(format!("/proc/{}/stat", self.0.0.id()))?;
        // The second field is a name in brackets, which may contain anything. The 14th and the 15th
        // field are the times of the program itself and of the kernel on its behalf.
        let fields = line.rsplit_once(')').ok_or("/proc/PID/stat has no name")?.1;
        let mut fields = fields.split_whitespace().skip(11).map(str::parse::<u64>);
        let (Some(user), Some(system)) = (fields.next(), fields.next()) else {
            return Err("/proc/PID/stat has too few fields".into());
        };
        Ok(ticks(user? + system?))
    }
}

/// iperf3 between the ends. `offload` is that of the left one.
pub(crate) fn transfer(
    ends: &(Namespace, Namespace),
    offload: Offload,
    way: Way,
    seconds: u32,
) -> Result<Transfer> {
    let server = ends.1.inside(|| {
        let server = Command::new("iperf3")
            .args(["--server", "--one-off"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("iperf3 does not start: {error}"))?;
        let server = Process(server);
        await_listener()?;
        Ok(server)
    })?;
    let (before, output, after) = ends.0.inside(|| {
        let before = busy()?;
        let mut client = Command::new("iperf3");
        client.args(["--client", RIGHT_ADDRESS, "--json", "--time", &seconds.to_string()]);
        if way == Way::RightToLeft {
            client.arg("--reverse");
        }
        let output = output_in_time(client, PATIENCE + Duration::from_secs(seconds.into()))?;
        let after = busy()?;
        let counted = counters(LEFT)?;
        let average = counted.sent_bytes / counted.sent.max(1);
        if (average > FULL_FRAME as u64) != (offload == Offload::On) {
            return Err(format!("packets had {average} bytes on average").into());
        }
        Ok((before, output, after))
    })?;
    drop(server);
    let result: serde_json::Value = serde_json::from_slice(&output)?;
    if let Some(error) = result["error"].as_str() {
        return Err(format!("iperf3: {error}").into());
    }
    let received = &result["end"]["sum_received"];
    let (Some(bytes), Some(seconds)) = (received["bytes"].as_f64(), received["seconds"].as_f64())
    else {
        return Err("iperf3 does not say what was received".into());
    };
    if bytes == 0.0 {
        return Err("nothing was received".into());
    }
    Ok(Transfer { bytes, seconds, busy: after.saturating_sub(before) })
}

/// The output of a program, if it ends within the limit.
fn output_in_time(mut command: Command, limit: Duration) -> Result<Vec<u8>> {
    let mut process = Process(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    let mut pipe = process.0.stdout.take().ok_or("its output is not a pipe")?;
    thread::scope(|scope| {
        // The output is read meanwhile, because a pipe does not hold everything.
        let reading = scope.spawn(move || {
            let mut output = Vec::new();
            pipe.read_to_end(&mut output).map(|_| output)
        });
        let deadline = Instant::now() + limit;
        while process.0.try_wait()?.is_none() {
            if Instant::now() > deadline {
                // This ends the reading, too.
                process.0.kill()?;
                return Err(format!("{command:?} does not end").into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(reading.join().map_err(|_| "the reading thread panicked")??)
    })
}

/// Waits until the calling thread's namespace has a listening socket.
pub(crate) fn await_listener() -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        // The fourth column is the state, and 0A means listening. iperf3 listens on IPv6 for both.
        for table in ["tcp", "tcp6"] {
            let table = fs::read_to_string(format!("/proc/thread-self/net/{table}"));
            let table = table.unwrap_or_default();
            if table.lines().any(|line| line.split_whitespace().nth(3) == Some("0A")) {
                return Ok(());
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err("iperf3 does not listen".into())
}

/// How long all processors together have been busy.
pub(crate) fn busy() -> Result<Duration> {
    let table = fs::read_to_string("/proc/stat")?;
    let fields: Vec<u64> = table
        .lines()
        .next()
        .into_iter()
        .flat_map(|line| line.split_whitespace().skip(1))
        .filter_map(|field| field.parse().ok())
        .collect();
    let [user, nice, system, _idle, _waiting, interrupts, soft_interrupts, ..] = fields[..] else {
        return Err(format!("/proc/stat has {} columns", fields.len()).into());
    };
    Ok(ticks(user + nice + system + interrupts + soft_interrupts))
}

/// Converts the kernel's hundredths of a second.
fn ticks(count: u64) -> Duration {
    Duration::from_millis(count * 10)
}
