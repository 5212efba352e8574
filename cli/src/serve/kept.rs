//! The privileges that the server keeps after its set-up.

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
// Elsewhere there are no capabilities to keep.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
pub(crate) struct Kept {
    /// It has changed the host's end of a TAP, and puts it back.
    pub(crate) hosts_end: bool,
    /// It listens on ports below 1024 for its guests.
    pub(crate) low_ports: bool,
}

impl Kept {
    /// Whether there are any.
    #[cfg(target_os = "linux")]
    pub(crate) fn is_any(self) -> bool {
        self.hosts_end || self.low_ports
    }

    /// The capabilities, each with the reason for it.
    #[cfg(target_os = "linux")]
    pub(crate) fn capabilities(self) -> impl Iterator<Item = (caps::Capability, &'static str)> {
        use caps::Capability;

        [
            (self.hosts_end, (Capability::CAP_NET_ADMIN, "to put the host's end of the TAP back")),
            (self.low_ports, (Capability::CAP_NET_BIND_SERVICE, "to forward ports below 1024")),
        ]
        .into_iter()
        .filter_map(|(is_kept, one)| is_kept.then_some(one))
    }
}
