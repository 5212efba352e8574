//! The handle to a network's way out.

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Weak};

use vmring_embedded::Network;
use vmring_nat::{Counter, ForwardInfo, ForwardRule, Guest, Protocol};

use super::translator::{Translator, add, counters_of, remove, report, translator_of};
use super::worker::NatReport;
use crate::config::{self, PortForward};
use crate::device::slot::PostedSlot;
use crate::error::{ConfigError, Error};
use crate::sync::Mutex;
use crate::sys::lock;

/// Changes the port forwards of a network, and shows what its translator does, from any thread.
///
/// Pass it to [`Embedded::nat_control`](super::super::Embedded::nat_control). It belongs to the network
/// of the interface that was started with it last, and keeps nothing of it alive. A clone is a second
/// handle to the same network. Each call waits for the translator's threads, for a few seconds at most.
#[derive(Clone, Debug, Default)]
pub struct NatControl(Arc<Mutex<Weak<Network<PostedSlot>>>>);

impl NatControl {
    /// Makes this the handle of a network.
    pub(crate) fn attach(&self, network: &Arc<Network<PostedSlot>>) {
        *lock(&self.0) = Arc::downgrade(network);
    }

    fn network(&self) -> Result<(Arc<Network<PostedSlot>>, Arc<Translator>), Error> {
        let network = lock(&self.0).upgrade();
        let found = network.and_then(|network| {
            let translator = translator_of(&network)?;
            Some((network, translator))
        });
        found.ok_or_else(|| {
            let sentence = "no network with network address translation belongs to this handle: start \
                            an interface with it first";
            ConfigError::Invalid(sentence.to_owned()).into()
        })
    }

    /// Starts the translator's threads now instead of with the first packet for outside. A process that
    /// gives up privileges, or the call that starts threads, does so before.
    ///
    /// # Errors
    ///
    /// If the handle has no network, or the system refuses a thread or a descriptor.
    pub fn start(&self) -> Result<(), Error> {
        let (network, _) = self.network()?;
        network.start_router().map_err(Error::io("starting the translator"))
    }

    /// Forwards ports of the host to a guest: all of the rule or none. Returns where the first is listened
    /// at. This starts the translator.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] with the kind of the system's error if it refuses the port: in use, a privileged port,
    /// an address that the host does not have. [`Error::Config`] if the rule makes no sense on this network.
    pub fn add_forward(&self, rule: &ForwardRule) -> Result<SocketAddr, Error> {
        let (network, translator) = self.network()?;
        add(&translator, &network, rule)
    }

    /// Removes the forward of one port at an address of the host, and returns whether there was one.
    /// Connections of TCP that have come through it stay open, unless `cut` is set. Flows of UDP end.
    ///
    /// # Errors
    ///
    /// If the handle has no network, or the translator does not answer.
    pub fn remove_forward(
        &self,
        protocol: Protocol,
        at: SocketAddr,
        cut: bool,
    ) -> Result<bool, Error> {
        remove(&self.network()?.1, protocol, at, cut)
    }

    /// Returns what the translator does now: all of its threads together. If it has not started, everything is
    /// empty.
    ///
    /// # Errors
    ///
    /// If the handle has no network, or the translator does not answer.
    pub fn report(&self) -> Result<NatReport, Error> {
        report(&self.network()?.1)
    }
}

/// Adds a forward as vmnet does: from a port of the host, here at its loopback address. Returns `None` if
/// the network has no translator, as the two below.
pub(crate) fn add_port_forward(
    network: &Arc<Network<PostedSlot>>,
    rule: &PortForward,
) -> Option<Result<(), Error>> {
    let translator = translator_of(network)?;
    let guest = Guest::Address(rule.internal_address);
    let protocol = protocol_of(rule.protocol);
    let rule = ForwardRule::new(protocol, rule.external_port, guest, rule.internal_port);
    Some(add(&translator, network, &rule).map(drop))
}

/// Removes the forwards of a port of the host, at whichever address.
pub(crate) fn remove_port_forward(
    network: &Arc<Network<PostedSlot>>,
    protocol: config::Protocol,
    port: u16,
) -> Option<Result<(), Error>> {
    let translator = translator_of(network)?;
    let remove_all = || {
        let forwards = report(&translator)?.forwards;
        let of_port =
            |info: &&ForwardInfo| info.protocol == protocol_of(protocol) && info.at.port() == port;
        let mut removed = false;
        for info in forwards.iter().filter(of_port) {
            removed |= remove(&translator, info.protocol, info.at, false)?;
        }
        match removed {
            true => Ok(()),
            false => {
                let sentence = format!("no {} port {port} is forwarded", protocol_of(protocol));
                Err(ConfigError::Invalid(sentence).into())
            }
        }
    };
    Some(remove_all())
}

/// The forwards to guests that are known by their addresses.
pub(crate) fn port_forwards(
    network: &Arc<Network<PostedSlot>>,
) -> Option<Result<Vec<PortForward>, Error>> {
    let translator = translator_of(network)?;
    let forward = |info: ForwardInfo| {
        let Guest::Address(internal_address) = info.guest else { return None };
        let protocol = match info.protocol {
            Protocol::Tcp => config::Protocol::Tcp,
            Protocol::Udp => config::Protocol::Udp,
            _ => return None,
        };
        let (external_port, internal_port) = (info.at.port(), info.guest_port);
        Some(PortForward { protocol, external_port, internal_address, internal_port })
    };
    Some(
        report(&translator).map(|report| report.forwards.into_iter().filter_map(forward).collect()),
    )
}

fn protocol_of(protocol: config::Protocol) -> Protocol {
    match protocol {
        config::Protocol::Tcp => Protocol::Tcp,
        config::Protocol::Udp => Protocol::Udp,
    }
}

/// The translator's counters by name. There are none while its thread does not run.
pub(crate) fn counters(network: &Network<PostedSlot>) -> Vec<(&'static str, u64)> {
    let Some(translator) = translator_of(network) else { return Vec::new() };
    // A translator that does not answer has no counters to show.
    let Ok(Some(counters)) = counters_of(&translator) else { return Vec::new() };
    let names = Counter::ALL.iter().zip(NAMES.iter());
    names.map(|(counter, name)| (name.as_str(), counters[*counter])).collect()
}

/// The name of each counter, in words.
static NAMES: LazyLock<Vec<String>> =
    LazyLock::new(|| Counter::ALL.iter().map(|counter| name_of(&format!("{counter:?}"))).collect());

/// The words of a counter's identifier, such as "NAT TCP opened" of `TcpOpened`.
fn name_of(identifier: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for letter in identifier.chars() {
        if letter.is_uppercase() || words.is_empty() {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut() {
            word.extend(letter.to_lowercase());
        }
    }
    for word in &mut words {
        if matches!(&**word, "tcp" | "udp" | "ip" | "icmp" | "dns") {
            *word = word.to_uppercase();
        }
    }
    format!("NAT {}", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_a_name_of_its_own() {
        assert_eq!(name_of("TcpOpened"), "NAT TCP opened");
        assert_eq!(name_of("NotIp"), "NAT not IP");
        let mut names = NAMES.clone();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Counter::ALL.len());
    }
}
