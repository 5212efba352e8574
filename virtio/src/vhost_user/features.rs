//! The feature bits that the protocol itself uses, and those that it negotiates.

use core::fmt;

/// The front end may switch the dirty log on (`VHOST_F_LOG_ALL`, section "Migration").
pub const LOG_ALL: u64 = 1 << 26;
/// Protocol features are negotiated (`VHOST_USER_F_PROTOCOL_FEATURES`, section "Communication").
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Virtio features that this back end never offers, whatever the device says: the control queue
/// (`VIRTIO_NET_F_CTRL_VQ`), which the front ends serve themselves, packed rings
/// (`VIRTIO_F_RING_PACKED`), and addresses behind an IOMMU (`VIRTIO_F_ACCESS_PLATFORM`).
pub const NEVER_OFFERED: u64 = (1 << 17) | (1 << 33) | (1 << 34);

/// `VIRTIO_NET_F_MTU`. Its value is in the configuration space. QEMU, which has a space of its own, asks
/// for this bit before it tells a guest an MTU; user-mode Linux hands the bit on, and a number that
/// nobody has written. So it is offered to a front end that can read the space, or has negotiated the
/// protocol feature MTU. QEMU asks for the features again after that.
pub(super) const NET_F_MTU: u64 = 1 << 3;

/// A protocol feature (section "Protocol features"). The value is the number of its bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
#[allow(missing_docs)] // The names are those of the document, without `VHOST_USER_PROTOCOL_F_`.
pub enum ProtocolFeature {
    Mq = 0,
    LogShmfd = 1,
    Rarp = 2,
    ReplyAck = 3,
    Mtu = 4,
    BackendReq = 5,
    Config = 9,
    ResetDevice = 13,
    ConfigureMemSlots = 15,
    Status = 16,
    DeviceState = 19,
}

impl ProtocolFeature {
    /// Every protocol feature that this back end knows.
    pub const ALL: [ProtocolFeature; 11] = [
        ProtocolFeature::Mq,
        ProtocolFeature::LogShmfd,
        ProtocolFeature::Rarp,
        ProtocolFeature::ReplyAck,
        ProtocolFeature::Mtu,
        ProtocolFeature::BackendReq,
        ProtocolFeature::Config,
        ProtocolFeature::ResetDevice,
        ProtocolFeature::ConfigureMemSlots,
        ProtocolFeature::Status,
        ProtocolFeature::DeviceState,
    ];

    /// The feature's bit.
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }
}

impl fmt::Display for ProtocolFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProtocolFeature::Mq => "MQ",
            ProtocolFeature::LogShmfd => "LOG_SHMFD",
            ProtocolFeature::Rarp => "RARP",
            ProtocolFeature::ReplyAck => "REPLY_ACK",
            ProtocolFeature::Mtu => "MTU",
            ProtocolFeature::BackendReq => "BACKEND_REQ",
            ProtocolFeature::Config => "CONFIG",
            ProtocolFeature::ResetDevice => "RESET_DEVICE",
            ProtocolFeature::ConfigureMemSlots => "CONFIGURE_MEM_SLOTS",
            ProtocolFeature::Status => "STATUS",
            ProtocolFeature::DeviceState => "DEVICE_STATE",
        })
    }
}
