//! The wires of virtual machine monitors, as the command line has them: `qemu:/run/vm.sock`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use vmring::Socket;
use vmring::device::socket::SocketKind;

/// Which VMM is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WireKind {
    /// QEMU's `-netdev stream`.
    Qemu,
    /// QEMU's `-netdev dgram`.
    QemuDgram,
    Vfkit,
    /// krunkit, and libkrun's unixgram.
    Krunkit,
    /// libkrun's unixstream.
    Libkrun,
    SocketVmnet,
    /// User-mode Linux and the BESS switch.
    #[cfg(target_os = "linux")]
    Bess,
}

impl WireKind {
    const ALL: &[(&str, WireKind)] = &[
        ("qemu", WireKind::Qemu),
        ("qemu-dgram", WireKind::QemuDgram),
        ("vfkit", WireKind::Vfkit),
        ("krunkit", WireKind::Krunkit),
        ("libkrun", WireKind::Libkrun),
        ("socket_vmnet", WireKind::SocketVmnet),
        #[cfg(target_os = "linux")]
        ("bess", WireKind::Bess),
    ];

    /// The wire of this name.
    pub(crate) fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(is, _)| *is == name).map(|(_, kind)| *kind)
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }

    pub(crate) fn socket_kind(self) -> SocketKind {
        match self {
            WireKind::Qemu | WireKind::Libkrun | WireKind::SocketVmnet => SocketKind::Stream,
            WireKind::QemuDgram | WireKind::Vfkit | WireKind::Krunkit => SocketKind::Datagram,
            #[cfg(target_os = "linux")]
            WireKind::Bess => SocketKind::Seqpacket,
        }
    }

    /// A driver without a place. With `client` this side is to connect.
    pub(crate) fn socket(self, client: bool) -> Socket {
        match self.socket_kind() {
            SocketKind::Datagram => {
                // They are the VMMs that announce themselves, and their helpers expect it.
                let announces = matches!(self, WireKind::Vfkit | WireKind::Krunkit);
                Socket::datagram().magic(client && announces)
            }
            #[cfg(target_os = "linux")]
            SocketKind::Seqpacket => Socket::seqpacket(),
            _ => Socket::stream(),
        }
    }

    pub(crate) fn is_datagram(self) -> bool {
        self.socket_kind() == SocketKind::Datagram
    }
}

/// A wire: `KIND:PATH`, and behind commas `client`, `own=PATH` and `vnet_hdr`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WireSpec {
    pub(crate) kind: WireKind,
    pub(crate) path: PathBuf,
    /// Whether the socket of the path is connected to, and not listened on.
    pub(crate) client: bool,
    /// The path of this side of a datagram socket that connects.
    pub(crate) own: Option<PathBuf>,
    /// Whether each frame has a virtio header in front.
    pub(crate) header: bool,
}

impl WireSpec {
    /// Reads what is behind the kind and its colon.
    pub(crate) fn parse(kind: WireKind, rest: Option<&str>) -> Result<Self, String> {
        let name = kind.name();
        let rest = rest.ok_or(format!("'{name}' needs a path, like {name}:/run/vm.sock"))?;
        let mut parts = rest.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(format!("'{name}' needs a path, like {name}:/run/vm.sock"));
        }
        let (mut client, mut own, mut header) = (false, None, false);
        for part in parts {
            match part.split_once('=') {
                None if part == "client" => client = true,
                None if part == "vnet_hdr" => header = true,
                Some(("own", path)) if !path.is_empty() && kind.is_datagram() => {
                    own = Some(PathBuf::from(path));
                }
                _ => {
                    let own = if kind.is_datagram() { ", own=PATH" } else { "" };
                    return Err(format!(
                        "'{part}' is no setting of a wire; use client{own} or vnet_hdr"
                    ));
                }
            }
        }
        if own.is_some() && !client {
            return Err("'own' is for a wire that connects: add client".to_owned());
        }
        Ok(Self { kind, path: path.into(), client, own, header })
    }

    /// A driver for this end of the wire.
    pub(crate) fn driver(&self) -> Socket {
        let socket = self.kind.socket(self.client).virtio_header(self.header);
        if !self.client {
            return socket.listen(&self.path);
        }
        let socket = socket.connect(&self.path);
        match &self.own {
            Some(own) => socket.own_path(own),
            None => socket,
        }
    }
}

impl FromStr for WireSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) =
            text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        let kind = WireKind::of(kind).ok_or_else(|| {
            let names: Vec<_> = WireKind::ALL.iter().map(|(name, _)| *name).collect();
            format!("there is no wire '{kind}'; use {}", names.join(", "))
        })?;
        Self::parse(kind, rest)
    }
}

impl fmt::Display for WireSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.name(), self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wire_is_a_kind_a_path_and_settings() {
        for (name, kind) in WireKind::ALL {
            let wire: WireSpec = format!("{name}:/run/a.sock").parse().unwrap();
            assert_eq!((wire.kind, wire.to_string()), (*kind, format!("{name}:/run/a.sock")));
            assert_eq!((wire.client, wire.own, wire.header), (false, None, false));
        }
        let wire: WireSpec = "krunkit:a,client,own=b,vnet_hdr".parse().unwrap();
        assert_eq!((wire.client, wire.own, wire.header), (true, Some("b".into()), true));
        for (text, said) in [
            ("qemu", "'qemu' needs a path"),
            ("qemu:", "'qemu' needs a path"),
            ("qemu:,client", "'qemu' needs a path"),
            ("qemu:a,own=b", "use client or vnet_hdr"),
            ("vfkit:a,own=b", "add client"),
            ("vfkit:a,x", "use client, own=PATH or vnet_hdr"),
            ("vfkit:a,own=", "use client, own=PATH or vnet_hdr"),
            ("quemu:a", "there is no wire 'quemu'; use qemu, qemu-dgram"),
        ] {
            let error = text.parse::<WireSpec>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
