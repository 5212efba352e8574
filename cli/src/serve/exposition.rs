//! The counters in the text form of Prometheus (exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::counts::Counts;

/// What the text is made of.
pub(super) struct Figures {
    pub(super) network: String,
    pub(super) seconds: f64,
    /// Packets and bytes that the uplink has brought and taken.
    pub(super) uplink: Option<[(u64, u64); 2]>,
    /// What the gateway did and did not answer.
    pub(super) gateway: Vec<(&'static str, u64)>,
    pub(super) sockets: Vec<SocketFigures>,
}

pub(super) struct SocketFigures {
    pub(super) name: String,
    pub(super) connected: usize,
    pub(super) connections: u64,
    /// Of all its guests, those that have gone too.
    pub(super) counts: Counts,
    /// The guests that are connected.
    pub(super) guests: Vec<GuestFigures>,
}

pub(super) struct GuestFigures {
    /// The place of the guest at its socket. The next guest there gets it when this one has gone. So there
    /// are at most as many series as guests at once.
    pub(super) slot: usize,
    pub(super) guest: u64,
    pub(super) counts: Counts,
}

impl Figures {
    pub(super) fn text(&self) -> String {
        let mut text = Text::default();
        let network = [("network", &*self.network)];
        text.family("vmring_up_seconds", "gauge", "Time since the server has started.");
        text.sample("vmring_up_seconds", &network, self.seconds);
        text.family("vmring_guests", "gauge", "Guests that are connected.");
        for socket in &self.sockets {
            text.sample("vmring_guests", &[("socket", &socket.name)], socket.connected);
        }
        text.family("vmring_connections_total", "counter", "Connections since the start.");
        for socket in &self.sockets {
            text.sample(
                "vmring_connections_total",
                &[("socket", &socket.name)],
                socket.connections,
            );
        }
        type Of = fn(&Counts) -> &BTreeMap<&'static str, u64>;
        let device: Of = |counts| &counts.device;
        let drops: Of = |counts| &counts.drops;
        let port: Of = |counts| &counts.port;
        for (name, help, label, of) in [
            (
                "vmring_device_total",
                "The counters of the guests' network cards.",
                "counter",
                device,
            ),
            ("vmring_port_drops_total", "Packets that ports have dropped.", "reason", drops),
            ("vmring_port_total", "What else ports have counted.", "counter", port),
        ] {
            text.family(name, "counter", help);
            for socket in &self.sockets {
                for (counter, n) in of(&socket.counts) {
                    text.sample(name, &[("socket", &socket.name), (label, counter)], *n);
                }
            }
        }
        self.guests(&mut text);
        if let Some(ways) = self.uplink {
            for (name, help, of) in [
                ("vmring_uplink_packets_total", "Packets of the uplink.", 0),
                ("vmring_uplink_bytes_total", "Bytes of the uplink.", 1),
            ] {
                text.family(name, "counter", help);
                for (way, moved) in ["to guests", "from guests"].into_iter().zip(ways) {
                    let n = [moved.0, moved.1][of];
                    text.sample(name, &[("network", &self.network), ("way", way)], n);
                }
            }
        }
        if !self.gateway.is_empty() {
            text.family("vmring_gateway_total", "counter", "What the gateway has counted.");
            for (counter, n) in &self.gateway {
                text.sample("vmring_gateway_total", &[network[0], ("counter", counter)], n);
            }
        }
        text.0
    }

    /// The series of each guest that is connected, by its slot.
    fn guests(&self, text: &mut Text) {
        let guests = self.sockets.iter().flat_map(|socket| {
            socket.guests.iter().map(|guest| (&*socket.name, guest.slot.to_string(), guest))
        });
        let guests: Vec<_> = guests.collect();
        text.family("vmring_guest", "gauge", "The number of the guest in a slot of a socket.");
        for (socket, slot, guest) in &guests {
            text.sample("vmring_guest", &[("socket", socket), ("slot", slot)], guest.guest);
        }
        for (name, help, of) in [
            ("vmring_guest_packets_total", "Packets of the guest in a slot.", 0),
            ("vmring_guest_bytes_total", "Bytes of the guest in a slot.", 1),
        ] {
            text.family(name, "counter", help);
            for (socket, slot, guest) in &guests {
                let moved = guest.counts.moved();
                for (way, (packets, bytes)) in [("to guest", moved.to), ("from guest", moved.from)]
                {
                    let labels = [("socket", *socket), ("slot", slot), ("way", way)];
                    text.sample(name, &labels, [packets, bytes][of]);
                }
            }
        }
        let name = "vmring_guest_drops_total";
        text.family(name, "counter", "Packets to and from the guest in a slot that were dropped.");
        for (socket, slot, guest) in &guests {
            for (why, n) in guest.counts.drops() {
                text.sample(name, &[("socket", socket), ("slot", slot), ("reason", why)], n);
            }
        }
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if i == 0 { '{' } else { ',' });
            for letter in text.chars() {
                match letter {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    letter => self.0.push(letter),
                }
            }
            self.0.push('"');
        }
        let _ = writeln!(self.0, "}} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_that_of_the_format() {
        let counts = Counts {
            device: [("rx_packets", 3)].into(),
            drops: [("spoofed", 2)].into(),
            port: BTreeMap::new(),
        };
        let name = "vhost-user:/a\"b\\c\nd".to_owned();
        let of_guest = Counts { drops: [("spoofed", 1)].into(), ..counts.clone() };
        let guests = vec![GuestFigures { slot: 3, guest: 6, counts: of_guest }];
        let sockets = vec![SocketFigures { name, connected: 1, connections: 7, counts, guests }];
        let figures = Figures {
            network: "tap:t0".to_owned(),
            seconds: 1.5,
            uplink: Some([(1, 60), (2, 120)]),
            gateway: Vec::new(),
            sockets,
        };
        let text = figures.text();
        let socket = r#"socket="vhost-user:/a\"b\\c\nd""#;
        for line in [
            "# TYPE vmring_guests gauge".to_owned(),
            "vmring_up_seconds{network=\"tap:t0\"} 1.5".to_owned(),
            format!("vmring_guests{{{socket}}} 1"),
            format!("vmring_connections_total{{{socket}}} 7"),
            format!("vmring_device_total{{{socket},counter=\"rx_packets\"}} 3"),
            format!("vmring_port_drops_total{{{socket},reason=\"spoofed\"}} 2"),
            format!("vmring_guest{{{socket},slot=\"3\"}} 6"),
            format!("vmring_guest_packets_total{{{socket},slot=\"3\",way=\"to guest\"}} 3"),
            format!("vmring_guest_bytes_total{{{socket},slot=\"3\",way=\"from guest\"}} 0"),
            format!("vmring_guest_drops_total{{{socket},slot=\"3\",reason=\"spoofed\"}} 1"),
            "vmring_uplink_bytes_total{network=\"tap:t0\",way=\"from guests\"} 120".to_owned(),
        ] {
            assert!(text.lines().any(|own| own == line), "no {line} in:\n{text}");
        }
        assert!(!text.contains("vmring_gateway"), "there is no gateway");
        assert!(text.ends_with('\n'));
    }
}
