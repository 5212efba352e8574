//! Where frames for guests go.

use vmring_core::offload::{OffloadHeader, Offloads};

/// A guest's port on the network, by its number, which is less than
/// [`MAX_PORTS`](crate::limits::MAX_PORTS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port(pub u32);

/// What a port's guest takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The longest IP packet that is not to be cut, in bytes.
    pub mtu: u32,
    /// What is done on the way to the guest or by it. With `tso4` and `tso6`, TCP arrives in frames
    /// of up to 64 KiB. With `checksum`, checksums are left to the reader.
    pub offloads: Offloads,
    /// The longest frame, in bytes, without an offload header. It holds at least an IP packet of
    /// `mtu` bytes.
    pub longest: usize,
}

/// The port takes no frame now. Nothing of the frame was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Takes frames for guests.
pub trait Output {
    /// What the port's guest takes. It does not change while flows exist.
    fn link(&self, port: Port) -> Link;

    /// How many frames the port takes now. This is a hint: it keeps a translator from reading what
    /// it cannot deliver. [`send`](Self::send) decides.
    fn space(&self, port: Port) -> usize {
        let _ = port;
        usize::MAX
    }

    /// Gives a frame to a port. The frame begins with its Ethernet header. `header` says what is
    /// left to do: nothing, a checksum, or a checksum and segments, within the port's offloads.
    ///
    /// # Errors
    ///
    /// [`Full`] if the port takes none now. Whoever implements this calls
    /// [`Nat::on_space`](crate::Nat::on_space) when it does again.
    fn send(&mut self, port: Port, frame: &[u8], header: &OffloadHeader) -> Result<(), Full>;
}
