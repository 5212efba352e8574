//! [`NetConfig`]: the configuration space of a network device.

/// The part of `virtio_net_config` that a vhost-user back end knows (virtio, "Network Device",
/// "Device configuration layout").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// The MAC address of the guest.
    pub mac: [u8; 6],
    /// The link's status: bit 0 if it is up, bit 1 if the guest must announce itself.
    pub status: u16,
    /// The number of pairs of a receive and a transmit ring.
    pub max_virtqueue_pairs: u16,
    /// The MTU in bytes, without the Ethernet header.
    pub mtu: u16,
}

/// The bytes of the fields.
pub(crate) const NET_CONFIG_LEN: usize = 12;

impl NetConfig {
    /// The bytes of the configuration space, in the order of virtio 1: little-endian.
    pub fn bytes(self) -> [u8; NET_CONFIG_LEN] {
        let mut bytes = [0; NET_CONFIG_LEN];
        bytes[..6].copy_from_slice(&self.mac);
        let numbers = [self.status, self.max_virtqueue_pairs, self.mtu];
        for (to, number) in bytes[6..].chunks_exact_mut(2).zip(numbers) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }
}
