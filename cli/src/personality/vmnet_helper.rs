//! `vmnet-helper`: one guest over a datagram socket, on an interface of its own.
//!
//! It prints one line of JSON, vmnet's parameters, when the interface is up. Over a path the guest is the
//! one who sends first, and there is no other one. It ends when the guest goes, or by a signal.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser;
use serde_json::json;
use vmring::{Ipv4Range, Mode};

use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::report::print;
use crate::serve;
use crate::serve::connection::Ended;
use crate::serve::counts::{Counts, Moved};
use crate::serve::spec::{Kind, ListenSpec, Place};
use crate::serve::teller::{Event, NetworkFacts, Teller};
use crate::wire::WireKind;

use super::limits::VMNET_HELPER;
use super::log::Log;
use super::network::{Value, Wanted, has_vmnet, parameters};
use super::options::{address, check_length, path, uuid};

const NOTES: &str = "\
It takes the part of vmnet-helper (github.com/nirs/vmnet-helper). vmring is it
too when it is called by that name, as a link or a copy. On macOS the network is
vmnet. Elsewhere it is inside the process; VMRING_NETWORK=vmnet-sim is the
simulated vmnet, and VMRING_NETWORK=tap:NAME (Linux) a TAP.
Example:
  vmring vmnet-helper --socket /tmp/vm.sock >/tmp/vm.json
  vfkit ... --device virtio-net,unixSocketPath=/tmp/vm.sock,mac=ADDRESS
Exit code: 0 if a signal or its client ended it, 1 otherwise.";

/// Serves one virtual machine over a datagram socket, as vmnet-helper does
#[derive(Debug, Parser)]
#[command(
    name = "vmnet-helper",
    disable_version_flag = true,
    infer_long_args = true,
    args_override_self = true,
    after_help = NOTES,
    term_width = 80
)]
pub(super) struct Options {
    /// The inherited datagram socket of the client
    #[arg(short, long, value_name = "FD", allow_hyphen_values = true)]
    fd: Option<String>,
    /// Make a datagram socket, whose client is the one who sends first
    #[arg(short, long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    interface: InterfaceOptions,
    /// Print the interfaces that can be shared
    #[arg(long)]
    list_shared_interfaces: bool,
    /// Print the version
    #[arg(long)]
    version: bool,
}

/// The options that `vmnet-run` passes on.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct InterfaceOptions {
    /// The identity of the interface: the same one has the same MAC address
    #[arg(short, long, value_name = "UUID")]
    pub(super) interface_id: Option<String>,
    /// The network: shared, bridged or host [default: shared]
    #[arg(long, value_name = "MODE")]
    pub(super) operation_mode: Option<String>,
    /// The interface of the host, for the mode bridged
    #[arg(long, value_name = "NAME")]
    pub(super) shared_interface: Option<String>,
    /// The gateway's address; DHCP begins behind it
    #[arg(long, value_name = "ADDRESS")]
    pub(super) start_address: Option<String>,
    /// The last address of DHCP
    #[arg(long, value_name = "ADDRESS")]
    pub(super) end_address: Option<String>,
    /// The mask of the subnet
    #[arg(long, value_name = "MASK")]
    pub(super) subnet_mask: Option<String>,
    /// The client sends and takes TCP of up to 64 KiB at once, as krunkit with offloading=on
    #[arg(long)]
    pub(super) enable_tso: bool,
    /// The client leaves checksums to the helper
    #[arg(long)]
    pub(super) enable_checksum_offload: bool,
    /// Keep the client from the others
    #[arg(long)]
    pub(super) enable_isolation: bool,
    /// Is refused: there is no vmnet-broker
    #[arg(long, value_name = "NAME")]
    pub(super) network: Option<String>,
    /// Log the counters at this interval
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub(super) stats_interval: Option<String>,
    /// Log more
    #[arg(short, long)]
    pub(super) verbose: bool,
}

impl InterfaceOptions {
    /// The network that the options name, or the original's sentence.
    pub(super) fn wanted(&self) -> Result<Wanted, String> {
        let interface_id = match &self.interface_id {
            None => None,
            Some(text) => {
                let id = uuid(text).ok_or_else(|| format!("Invalid interface-id: \"{text}\""))?;
                // The original takes one of zeroes for none.
                Some(id).filter(|id| id != &[0; 16])
            }
        };
        let of = |text: &Option<String>, name: &str| {
            text.as_deref().map(|text| address(text, name)).transpose()
        };
        let start = of(&self.start_address, "--start-address")?;
        let end = of(&self.end_address, "--end-address")?;
        let mask = of(&self.subnet_mask, "--subnet-mask")?;
        if let Some(mode) = &self.operation_mode
            && !["shared", "host", "bridged"].contains(&&**mode)
        {
            return Err(format!("Invalid --operation-mode: \"{mode}\""));
        }
        if self.network.is_some() {
            let others = [
                ("--operation-mode", self.operation_mode.is_some()),
                ("--shared-interface", self.shared_interface.is_some()),
                ("--start-address", start.is_some()),
                ("--end-address", end.is_some()),
                ("--subnet-mask", mask.is_some()),
            ];
            return Err(match others.iter().find(|(_, given)| *given) {
                Some((name, _)) => {
                    format!("Conflicting arguments: --network cannot be used with {name}")
                }
                None => {
                    "--network needs vmnet-broker, which vmring does not speak to; leave it out"
                        .to_owned()
                }
            });
        }
        let mode = match (self.operation_mode.as_deref(), &self.shared_interface) {
            (Some("bridged"), None) => {
                return Err("Missing argument: shared-interface is required for \
                            operation-mode=bridged"
                    .to_owned());
            }
            (Some("bridged"), Some(_)) if self.enable_isolation => {
                return Err("Conflicting arguments: enable-isolation cannot be used with bridged \
                            mode"
                    .to_owned());
            }
            (Some("bridged"), Some(name)) => Mode::Bridged(name.clone()),
            (Some("host"), _) => Mode::Host,
            _ => Mode::Shared,
        };
        let range = match (start, end, mask) {
            // The outside network has them.
            _ if matches!(mode, Mode::Bridged(_)) => None,
            (None, None, None) => None,
            (Some(start), Some(end), Some(mask)) => Some(Ipv4Range { start, end, mask }),
            _ => {
                return Err("--start-address, --end-address, and --subnet-mask must be given \
                            together, or all omitted"
                    .to_owned());
            }
        };
        let isolated = self.enable_isolation;
        Ok(Wanted { mode, range, interface_id, isolated, ..Wanted::default() })
    }

    /// The options as arguments, which give the same options again.
    pub(super) fn arguments(&self) -> Vec<String> {
        let values = [
            ("--interface-id", &self.interface_id),
            ("--operation-mode", &self.operation_mode),
            ("--shared-interface", &self.shared_interface),
            ("--start-address", &self.start_address),
            ("--end-address", &self.end_address),
            ("--subnet-mask", &self.subnet_mask),
            ("--network", &self.network),
            ("--stats-interval", &self.stats_interval),
        ];
        let flags = [
            ("--enable-tso", self.enable_tso),
            ("--enable-checksum-offload", self.enable_checksum_offload),
            ("--enable-isolation", self.enable_isolation),
            ("--verbose", self.verbose),
        ];
        let values = values
            .into_iter()
            .filter_map(|(name, value)| value.as_ref().map(|value| format!("{name}={value}")));
        let flags = flags.into_iter().filter(|(_, given)| *given);
        values.chain(flags.map(|(name, _)| name.to_owned())).collect()
    }

    /// The interval of the counters, or the original's sentence.
    pub(super) fn interval(&self) -> Result<Option<Duration>, String> {
        let Some(text) = &self.stats_interval else { return Ok(None) };
        match text.parse::<i32>() {
            Ok(seconds) if seconds > 0 => {
                Ok(Some(Duration::from_secs(seconds.unsigned_abs().into())))
            }
            _ => Err(format!("Invalid --stats value '{text}': must be a positive integer")),
        }
    }
}

/// What `--version` prints.
pub(super) fn version() -> String {
    format!("version: {VMNET_HELPER}+vmring.{}\ncommit: vmring", env!("CARGO_PKG_VERSION"))
}

pub(super) fn run(options: Options, log: Log) -> ExitCode {
    let log = log.verbose(options.interface.verbose);
    let usage = log.of(" ");
    if options.version {
        return log.printed(&version());
    }
    if options.list_shared_interfaces {
        return match has_vmnet() {
            Ok(true) => log.printed(&vmring::device::vmnet::shared_interfaces().join("\n")),
            Ok(false) => {
                usage.failed("Unable to list shared interfaces: this network has no vmnet")
            }
            Err(sentence) => usage.failed(&sentence),
        };
    }
    match asked(&options) {
        Ok(asked) => started(asked, log),
        Err(sentence) => usage.failed(&sentence),
    }
}

/// What is asked for.
struct Asked {
    args: ServeArgs,
    socket: Option<PathBuf>,
    interval: Option<Duration>,
    left_out: Vec<String>,
}

fn asked(options: &Options) -> Result<Asked, String> {
    let fd = options.fd.as_deref().map(descriptor).transpose()?;
    if let Some(socket) = &options.socket {
        check_length(socket)?;
    }
    let interval = options.interface.interval()?;
    let wanted = options.interface.wanted()?;
    let place = match (fd, &options.socket) {
        (None, None) => return Err("Missing argument: either \"fd\" or \"socket\" required".into()),
        (Some(_), Some(_)) => {
            return Err(
                "Conflicting arguments: \"fd\" and \"socket\" are mutually exclusive".into()
            );
        }
        (Some(fd), None) => Place::Descriptor(fd),
        (None, Some(socket)) => Place::Server(path(socket)),
    };
    let mut args = ServeArgs::new();
    let mut listen = ListenSpec::new(Kind::Wire(WireKind::Vfkit), place);
    if let Place::Server(socket) = &listen.place {
        listen.once = true;
        // It keeps a second helper, also an original one, from the socket of the first.
        let mut lock = socket.clone().into_os_string();
        lock.push(".lock");
        args.pid_file = Some(lock.into());
    }
    // Segments without checksums are more than a client asks for that asks for segments.
    listen.implied = options.interface.enable_tso || options.interface.enable_checksum_offload;
    let left_out = wanted.give(&mut args, &mut listen)?;
    args.listen = vec![listen];
    Ok(Asked { args, socket: options.socket.clone(), interval, left_out })
}

/// The number of a descriptor, or the original's sentence.
fn descriptor(text: &str) -> Result<RawFd, String> {
    // Its output is on 1 and 2.
    text.parse().ok().filter(|fd| *fd == 0 || *fd > 2).ok_or_else(|| format!("Invalid fd '{text}'"))
}

fn started(asked: Asked, log: Log) -> ExitCode {
    let Asked { args, socket, interval, left_out } = asked;
    let system = if cfg!(target_os = "macos") { "macOS" } else { "Linux" };
    let version = env!("CARGO_PKG_VERSION");
    log.info(&format!("running vmnet-helper {VMNET_HELPER}+vmring.{version} on {system}"));
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    log.info(&format!("running as uid: {uid} gid: {gid}"));
    left_out.iter().for_each(|text| log.warn(text));
    let teller = Rc::new(HelperTeller { log, socket, interval, failed: Cell::new(false) });
    let outcome = serve::serve(&args, teller.clone());
    match outcome {
        Err(failure) => log.failed(&failure.to_string()),
        Ok(()) => {
            log.info("stopped vmnet interface");
            if teller.failed.get() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
    }
}

/// The words of vmnet-helper.
struct HelperTeller {
    log: Log,
    socket: Option<PathBuf>,
    interval: Option<Duration>,
    /// Whether the guest was cut off.
    failed: Cell<bool>,
}

impl HelperTeller {
    fn running(&self) {
        for text in ["started host forwarding", "started vm forwarding", "running"] {
            self.log.info(text);
        }
        if let Some(interval) = self.interval {
            self.log.info(&format!("reporting stats every {} seconds", interval.as_secs()));
        }
    }
}

impl Teller for HelperTeller {
    fn tell(&self, event: &Event<'_>) -> Result<(), Failure> {
        let Self { log, socket, .. } = self;
        let quoted = || socket.as_ref().map(|path| format!("\"{}\"", path.display()));
        match event {
            Event::Started(facts) => {
                print(&line_of(facts))?;
                log.info("started vmnet interface");
            }
            Event::Became { uid, gid } => {
                log.info(&format!("dropped privileges to uid: {uid} gid: {gid}"));
            }
            Event::Ready(ready) => {
                ready.notes.iter().for_each(|note| log.warn(note));
                match quoted() {
                    Some(socket) => log.info(&format!("waiting for client on {socket}")),
                    None => self.running(),
                }
            }
            Event::Joined { .. } => {
                // The client of a descriptor is there from the start.
                if let Some(socket) = quoted() {
                    log.info(&format!("serving client on {socket}"));
                    self.running();
                }
            }
            Event::Left { how: Ended::Left | Ended::LeftWithin, .. } => {
                log.of(" [vm->host] ").info("socket was closed by peer");
            }
            Event::Left { how: Ended::Stopped, .. } => log.of(" [vm->host] ").info("stopped"),
            Event::Left { how, .. } => {
                self.failed.set(true);
                log.error(&format!("the client {how}"));
            }
            Event::Refused { .. } => {
                self.failed.set(true);
                log.error(&event.to_string());
            }
            Event::Note(note) => log.debug(note),
            Event::Counted(counts) => log.of(" [stats] ").info(&stats(counts, SystemTime::now())),
        }
        Ok(())
    }

    fn reports(&self) -> bool {
        false
    }

    fn interval(&self) -> Option<Duration> {
        self.interval
    }
}

/// The interface as one line of JSON, in vmnet's names.
fn line_of(facts: &NetworkFacts) -> String {
    let value = |value| match value {
        Value::Number(number) => json!(number),
        Value::Text(text) => json!(text),
    };
    let all: BTreeMap<_, _> =
        parameters(facts).into_iter().map(|(key, one)| (key, value(one))).collect();
    json!(all).to_string()
}

/// The counters as the original logs them. `host` is what came from the network, and `vm` what came from
/// the client. The calls of the system are not counted, so there are none of either kind.
fn stats(counts: &Counts, now: SystemTime) -> String {
    let Moved { to, from, .. } = counts.moved();
    let (to_drops, from_drops): (Vec<_>, Vec<_>) =
        counts.drops().partition(|(why, _)| why.starts_with("rx_") || *why == "no buffer posted");
    let way = |(packets, bytes): (u64, u64), drops: &[(&str, u64)]| {
        let drops: u64 = drops.iter().map(|(_, n)| n).sum();
        format!(
            "{{\"packets\": {packets}, \"bytes\": {bytes}, \"drops\": {drops}, \"fast\": 0, \"slow\": 0}}"
        )
    };
    format!(
        "{{\"time\": \"{}\", \"host\": {}, \"vm\": {}}}",
        timestamp(now),
        way(to, &to_drops),
        way(from, &from_drops)
    )
}

/// The time in the form of ISO 8601, in UTC: a confined process does not find the time zone.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // The civil calendar from days since 1970, in eras of 400 years that begin in March
    // (https://howardhinnant.github.io/date_algorithms.html#civil_from_days).
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{millis:03}+00:00")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(line: &str) -> String {
        let words = line.split(' ').filter(|word| !word.is_empty());
        let options = Options::try_parse_from(["vmnet-helper"].into_iter().chain(words));
        match asked(&options.expect("clap takes it")) {
            Ok(_) => "taken".to_owned(),
            Err(sentence) => sentence,
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_the_original() {
        for (line, said) in [
            ("", "Missing argument: either \"fd\" or \"socket\" required"),
            ("--fd 3 --socket s", "Conflicting arguments: \"fd\" and \"socket\" are mutually"),
            ("--fd x", "Invalid fd 'x'"),
            ("--fd=", "Invalid fd ''"),
            ("--fd -1", "Invalid fd '-1'"),
            ("--fd 1", "Invalid fd '1'"),
            ("--fd 3 -i x", "Invalid interface-id: \"x\""),
            ("--fd 3 --operation-mode nat", "Invalid --operation-mode: \"nat\""),
            ("--fd 3 --start-address x", "Invalid --start-address: \"x\""),
            ("--fd 3 --start-address 10.0.0.1", "must be given together, or all omitted"),
            ("--fd 3 --operation-mode bridged", "shared-interface is required"),
            (
                "--fd 3 --operation-mode bridged --shared-interface en0 --enable-isolation",
                "enable-isolation cannot be used with bridged mode",
            ),
            ("--fd 3 --network n --operation-mode host", "cannot be used with --operation-mode"),
            ("--fd 3 --network n --subnet-mask 255.0.0.0", "cannot be used with --subnet-mask"),
            ("--fd 3 --network n", "needs vmnet-broker"),
            ("--fd 3 --stats-interval 0", "Invalid --stats value '0'"),
            ("--fd 3 --stats-interval -1", "Invalid --stats value '-1'"),
        ] {
            let sentence = sentence(line);
            assert!(sentence.contains(said), "{line}: {sentence}");
        }
        let long = "s".repeat(super::super::limits::PATH_MAX + 1);
        assert!(sentence(&format!("--socket {long}")).contains("too long"));
        for line in [
            "--fd 3",
            "-f3 -v",
            // The last one counts, as with getopt_long(3), and the beginning of a name is enough.
            "--fd 1 --fd 3 --enable-iso",
            "--socket s --operation-mode host --enable-tso --enable-checksum-offload",
            "--fd 3 --interface-id 2835E074-9892-4A79-AFFB-7E41D2605678 --stats-interval 1",
            "--fd 3 --start-address 10.0.0.1 --end-address 10.0.0.9 --subnet-mask 255.255.255.0",
        ] {
            assert_eq!(sentence(line), "taken", "{line}");
        }
    }

    #[test]
    fn options_are_passed_on_whole() {
        let words = [
            "vmnet-helper",
            "--interface-id=a",
            "--operation-mode=b",
            "--shared-interface=c",
            "--start-address=d",
            "--end-address=e",
            "--subnet-mask=f",
            "--network=g",
            "--stats-interval=h",
            "--enable-tso",
            "--enable-checksum-offload",
            "--enable-isolation",
            "--verbose",
        ];
        let options = Options::try_parse_from(words).expect("clap takes it");
        assert_eq!(options.interface.arguments(), words[1..]);
        // There is none that the list does not have.
        let command = <Options as clap::CommandFactory>::command();
        let own = ["fd", "socket", "list_shared_interfaces", "version"];
        let passed = command.get_arguments().filter(|one| !own.contains(&one.get_id().as_str()));
        assert_eq!(passed.count(), words.len() - 1);
    }

    #[test]
    fn a_time_is_written_in_full() {
        let at = |millis| timestamp(UNIX_EPOCH + Duration::from_millis(millis));
        assert_eq!(at(0), "1970-01-01T00:00:00.000+00:00");
        assert_eq!(at(951_782_400_000 - 1), "2000-02-28T23:59:59.999+00:00");
        assert_eq!(at(951_782_400_000), "2000-02-29T00:00:00.000+00:00");
        assert_eq!(at(1_735_689_599_500), "2024-12-31T23:59:59.500+00:00");
        assert_eq!(at(4_107_542_400_000), "2100-03-01T00:00:00.000+00:00");
    }
}
