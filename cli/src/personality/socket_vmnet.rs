//! `socket_vmnet`: any number of guests over streams, on one interface with a switch in front.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

use clap::Parser;
use nix::unistd::{Gid, Group, getegid, geteuid};
use vmring::{Ipv4Range, Mode};

use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::serve;
use crate::serve::limits::CONNECTIONS_MAX;
use crate::serve::spec::{Kind, ListenSpec, Place};
use crate::serve::teller::{Event, Teller};
use crate::wire::WireKind;

use super::limits::{GROUP, SOCKET_VMNET};
use super::log::Log;
use super::network::{Value, Wanted, is_vmnet, number_of, parameters};
use super::options::{check_length, path, uuid};

const NOTES: &str = "\
It takes the part of socket_vmnet (github.com/lima-vm/socket_vmnet). vmring is it
too when it is called by that name, as a link or a copy. On macOS the network is
vmnet, which takes root. Elsewhere it is inside the process;
VMRING_NETWORK=vmnet-sim is the simulated vmnet, and VMRING_NETWORK=tap:NAME
(Linux) a TAP.
Example:
  sudo vmring socket_vmnet --vmnet-gateway=192.168.105.1 /var/run/socket_vmnet
  vmring socket_vmnet_client /var/run/socket_vmnet qemu-system-x86_64 ... \\
    -device virtio-net-pci,netdev=n -netdev socket,id=n,fd=3
Exit code: 0 if a signal ended it, 1 otherwise.";

/// Serves virtual machines over a stream socket, as socket_vmnet does
#[derive(Debug, Parser)]
#[command(
    name = "socket_vmnet",
    disable_version_flag = true,
    infer_long_args = true,
    args_override_self = true,
    after_help = NOTES,
    term_width = 80
)]
pub(super) struct Options {
    /// The group whose members may connect [default: staff]
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// The network: host, shared or bridged [default: shared]
    #[arg(long, value_name = "MODE")]
    vmnet_mode: Option<String>,
    /// The interface of the host, for the mode bridged
    #[arg(long, value_name = "INTERFACE")]
    vmnet_interface: Option<String>,
    /// The gateway's address; DHCP begins behind it
    #[arg(long, value_name = "IP")]
    vmnet_gateway: Option<String>,
    /// The last address of DHCP [default: the gateway's, with .254]
    #[arg(long, value_name = "IP")]
    vmnet_dhcp_end: Option<String>,
    /// The mask of the subnet [default: 255.255.255.0]
    #[arg(long, value_name = "MASK")]
    vmnet_mask: Option<String>,
    /// The identity of the interface [default: random]
    #[arg(long, value_name = "UUID")]
    vmnet_interface_id: Option<String>,
    /// The identity of an isolated network without DHCP, in the mode host (macOS)
    #[arg(long, value_name = "UUID")]
    vmnet_network_identifier: Option<String>,
    /// The IPv6 prefix of the mode shared (macOS)
    #[arg(long, value_name = "PREFIX")]
    vmnet_nat66_prefix: Option<String>,
    /// No DHCP server (macOS 26)
    #[arg(long)]
    vmnet_disable_dhcp: bool,
    /// Write the number of the process to this file
    #[arg(short, long, value_name = "PIDFILE")]
    pidfile: Option<PathBuf>,
    /// Print the version
    #[arg(short, long)]
    version: bool,
    /// The socket to make
    #[arg(value_name = "SOCKET", required_unless_present = "version")]
    socket: Option<PathBuf>,
}

pub(super) fn run(options: Options, log: Log) -> ExitCode {
    let log = log.verbose(std::env::var_os("DEBUG").is_some());
    if options.version {
        return log.printed(&format!("{SOCKET_VMNET}+vmring.{}", env!("CARGO_PKG_VERSION")));
    }
    let args = match asked(&options, log) {
        Ok(args) => args,
        Err(sentence) => return log.failed(&sentence),
    };
    if is_vmnet() && !geteuid().is_root() {
        log.warn("Running without root. This is very unlikely to work: See README.md");
    }
    let mode = args.1;
    log.info(&format!("Initializing vmnet.framework (mode {})", number_of(&mode)));
    let pidfile = options.pidfile.as_ref().map(|path| path.display().to_string());
    match serve::serve(&args.0, Rc::new(DaemonTeller { log, pidfile: pidfile.clone() })) {
        Ok(()) => {
            if let Some(pidfile) = pidfile {
                let id = std::process::id();
                log.info(&format!("Removed pidfile \"{pidfile}\" for process {id}"));
            }
            ExitCode::SUCCESS
        }
        Err(failure) => log.failed(&failure.to_string()),
    }
}

fn asked(options: &Options, log: Log) -> Result<(ServeArgs, Mode), String> {
    let mode = match (options.vmnet_mode.as_deref(), &options.vmnet_interface) {
        (None | Some("shared"), _) => Mode::Shared,
        (Some("host"), _) => Mode::Host,
        (Some("bridged"), Some(name)) => Mode::Bridged(name.clone()),
        (Some("bridged"), None) => {
            return Err("vmnet mode \"bridged\" require --vmnet-interface to be specified".into());
        }
        (Some(other), _) => return Err(format!("Unknown vmnet mode \"{other}\"")),
    };
    let id = |text: &Option<String>, what: &str| match text {
        None => Ok::<_, String>(None),
        Some(text) => {
            let id = uuid(text).ok_or_else(|| format!("Failed to parse {what}UUID \"{text}\""))?;
            Ok(Some(id).filter(|id| id != &[0; 16]))
        }
    };
    let interface_id = id(&options.vmnet_interface_id, "")?;
    let identifier = id(&options.vmnet_network_identifier, "network identifier ")?;
    if options.vmnet_disable_dhcp {
        let ignored = [
            ("--vmnet-dhcp-end", options.vmnet_dhcp_end.is_some()),
            ("--vmnet-interface-id", interface_id.is_some()),
            ("--vmnet-network-identifier", identifier.is_some()),
        ];
        for (name, _) in ignored.iter().filter(|(_, given)| *given) {
            log.warn(&format!("{name} is ignored with --vmnet-disable-dhcp"));
        }
    }
    let range = range(options, &mode, log)?;
    let nat66_prefix = match &options.vmnet_nat66_prefix {
        None => None,
        Some(text) => Some(
            text.parse::<Ipv6Addr>()
                .map_err(|_| format!("invalid IPv6 prefix \"{text}\" for --vmnet-nat66-prefix"))?,
        ),
    };
    let socket = options.socket.as_ref().ok_or("the socket is missing")?;
    check_length(socket)?;
    let mut args = ServeArgs::new();
    args.pid_file.clone_from(&options.pidfile);
    args.connections = CONNECTIONS_MAX;
    // It stays root, as the original does: its socket is in a folder of root's.
    args.user = geteuid().is_root().then(|| "root".to_owned());
    let mut listen =
        ListenSpec::new(Kind::Wire(WireKind::SocketVmnet), Place::Server(path(socket)));
    listen.group = group(options.socket_group.as_deref(), log)?;
    let wanted = Wanted {
        mode: mode.clone(),
        range,
        interface_id,
        identifier: identifier.filter(|_| !options.vmnet_disable_dhcp),
        nat66_prefix,
        without_dhcp: options.vmnet_disable_dhcp,
        isolated: false,
    };
    for text in wanted.give(&mut args, &mut listen)? {
        log.warn(&text);
    }
    args.listen = vec![listen];
    Ok((args, mode))
}

/// The addresses of the network.
fn range(options: &Options, mode: &Mode, log: Log) -> Result<Option<Ipv4Range>, String> {
    let Options { vmnet_gateway, vmnet_dhcp_end, vmnet_mask, .. } = options;
    let Some(gateway) = vmnet_gateway else {
        if *mode == Mode::Shared {
            log.warn(
                "--vmnet-gateway=IP should be explicitly specified to avoid conflicting with other \
                 applications",
            );
        }
        if vmnet_dhcp_end.is_some() {
            return Err("--vmnet-dhcp-end=IP requires --vmnet-gateway=IP".to_owned());
        }
        if vmnet_mask.is_some() {
            return Err("--vmnet-mask=MASK requires --vmnet-gateway=IP".to_owned());
        }
        return Ok(None);
    };
    if matches!(mode, Mode::Bridged(_)) {
        return Err("vmnet mode \"bridged\" conflicts with --vmnet-gateway".to_owned());
    }
    let parsed = |text: &str, name: &str| {
        let wrong = || format!("invalid address \"{text}\" was specified for {name}");
        text.parse::<Ipv4Addr>().map_err(|_| wrong())
    };
    let start = parsed(gateway, "--vmnet-gateway")?;
    let end = match vmnet_dhcp_end {
        Some(end) => parsed(end, "--vmnet-dhcp-end")?,
        None => (u32::from(start) & 0xffff_ff00 | 254).into(),
    };
    let mask = parsed(vmnet_mask.as_deref().unwrap_or("255.255.255.0"), "--vmnet-mask")?;
    Ok(Some(Ipv4Range { start, end, mask }))
}

/// The group whose members may connect. Where there is no group `staff`, or this user cannot give it a
/// socket, nobody needs it: the socket is the user's alone then.
fn group(name: Option<&str>, log: Log) -> Result<Option<Gid>, String> {
    let wanted = name.unwrap_or(GROUP);
    let found = match Group::from_name(wanted) {
        Ok(found) => found.map(|group| group.gid),
        Err(error) => return Err(format!("getgrnam: {error}")),
    };
    let may_give = |gid: &Gid| geteuid().is_root() || is_member(*gid);
    match (found, name) {
        (None, Some(name)) => Err(format!("unknown group name \"{name}\"")),
        (Some(gid), Some(_)) => Ok(Some(gid)),
        (found, None) => {
            let gid = found.filter(may_give);
            if gid.is_none() {
                log.warn(&format!(
                    "the socket is not shared with the group \"{wanted}\", which does not exist here or \
                     is none of this user's"
                ));
            }
            Ok(gid)
        }
    }
}

/// Whether this user is in the group.
fn is_member(gid: Gid) -> bool {
    // nix has no getgroups(2) for macOS, where users have `staff` as their own group.
    #[cfg(not(target_os = "macos"))]
    if nix::unistd::getgroups().is_ok_and(|groups| groups.contains(&gid)) {
        return true;
    }
    getegid() == gid
}

/// The words of socket_vmnet.
struct DaemonTeller {
    log: Log,
    pidfile: Option<String>,
}

impl Teller for DaemonTeller {
    fn tell(&self, event: &Event<'_>) -> Result<(), Failure> {
        let Self { log, pidfile } = self;
        match event {
            Event::Started(facts) => {
                for (name, value) in parameters(facts) {
                    match value {
                        Value::Number(number) => log.info(&format!("* {name}: {number}")),
                        Value::Text(text) => log.info(&format!("* {name}: {text}")),
                    }
                }
                if let Some(pidfile) = pidfile {
                    let id = std::process::id();
                    log.info(&format!("Created pidfile \"{pidfile}\" for process {id}"));
                }
            }
            Event::Ready(ready) => ready.notes.iter().for_each(|note| log.warn(note)),
            Event::Joined { guest, .. } => {
                log.info(&format!("Accepted a connection (guest {guest})"));
            }
            Event::Left { guest, how, .. } => {
                log.info(&format!("Closing a connection (guest {guest}): it {how}"));
            }
            Event::Refused { .. } => log.error(&event.to_string()),
            Event::Became { .. } | Event::Note(_) | Event::Counted(_) => {}
        }
        Ok(())
    }

    fn reports(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(line: &str) -> Result<(ServeArgs, Mode), String> {
        let words = line.split(' ').filter(|word| !word.is_empty());
        let options = Options::try_parse_from(["socket_vmnet"].into_iter().chain(words));
        asked(&options.expect("clap takes it"), Log::DAEMON)
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_the_original() {
        for (line, said) in [
            ("--vmnet-mode=nat s", "Unknown vmnet mode \"nat\""),
            ("--vmnet-mode=bridged s", "require --vmnet-interface"),
            ("--vmnet-interface-id=x s", "Failed to parse UUID \"x\""),
            ("--vmnet-network-identifier=x s", "Failed to parse network identifier UUID \"x\""),
            ("--vmnet-dhcp-end=10.0.0.9 s", "--vmnet-dhcp-end=IP requires --vmnet-gateway=IP"),
            ("--vmnet-mask=255.0.0.0 s", "--vmnet-mask=MASK requires --vmnet-gateway=IP"),
            ("--vmnet-gateway=x s", "invalid address \"x\" was specified for --vmnet-gateway"),
            (
                "--vmnet-mode=bridged --vmnet-interface=en0 --vmnet-gateway=10.0.0.1 s",
                "vmnet mode \"bridged\" conflicts with --vmnet-gateway",
            ),
            ("--vmnet-nat66-prefix=x s", "invalid IPv6 prefix \"x\""),
            ("--socket-group=no-such-group s", "unknown group name \"no-such-group\""),
        ] {
            let sentence = outcome(line).err().unwrap_or_default();
            assert!(sentence.contains(said), "{line}: {sentence}");
        }
    }

    #[test]
    fn a_gateway_has_the_defaults_of_the_original() {
        let options = |line: &str| {
            Options::try_parse_from(["socket_vmnet"].into_iter().chain(line.split(' '))).unwrap()
        };
        let of = |line| range(&options(line), &Mode::Shared, Log::DAEMON).unwrap().unwrap();
        let Ipv4Range { start, end, mask } = of("--vmnet-gateway=192.168.105.1 s");
        assert_eq!(
            [start, end, mask].map(|one| one.to_string()),
            ["192.168.105.1", "192.168.105.254", "255.255.255.0"]
        );
        let line = "--vmnet-gateway=10.1.0.1 --vmnet-dhcp-end=10.1.9.9 --vmnet-mask=255.255.0.0 s";
        let Ipv4Range { end, mask, .. } = of(line);
        assert_eq!([end, mask].map(|one| one.to_string()), ["10.1.9.9", "255.255.0.0"]);
    }
}
