//! [`Features`]: the feature bits of a network device, and which of them an interface can serve.

use core::ops::{BitAnd, BitOr};

use vmring::config::Offloads;
use vmring::device::Capabilities;

/// Feature bits of a virtio-net device (virtio 1.2, sections 5.1.3 and 6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

#[allow(missing_docs)] // The names are those of the specification, without `VIRTIO_NET_F_`.
impl Features {
    pub const CSUM: Self = Self::bit(0);
    pub const GUEST_CSUM: Self = Self::bit(1);
    pub const CTRL_GUEST_OFFLOADS: Self = Self::bit(2);
    pub const MTU: Self = Self::bit(3);
    pub const MAC: Self = Self::bit(5);
    pub const GUEST_TSO4: Self = Self::bit(7);
    pub const GUEST_TSO6: Self = Self::bit(8);
    pub const GUEST_ECN: Self = Self::bit(9);
    pub const GUEST_UFO: Self = Self::bit(10);
    pub const HOST_TSO4: Self = Self::bit(11);
    pub const HOST_TSO6: Self = Self::bit(12);
    pub const HOST_ECN: Self = Self::bit(13);
    pub const HOST_UFO: Self = Self::bit(14);
    pub const MRG_RXBUF: Self = Self::bit(15);
    pub const STATUS: Self = Self::bit(16);
    pub const CTRL_VQ: Self = Self::bit(17);
    pub const CTRL_RX: Self = Self::bit(18);
    pub const GUEST_ANNOUNCE: Self = Self::bit(21);
    pub const MQ: Self = Self::bit(22);
    pub const CTRL_MAC_ADDR: Self = Self::bit(23);
    pub const INDIRECT_DESC: Self = Self::bit(28);
    pub const EVENT_IDX: Self = Self::bit(29);
    pub const VERSION_1: Self = Self::bit(32);
    pub const IN_ORDER: Self = Self::bit(35);
    pub const RING_RESET: Self = Self::bit(40);
    pub const GUEST_USO4: Self = Self::bit(54);
    pub const GUEST_USO6: Self = Self::bit(55);
    pub const HOST_USO: Self = Self::bit(56);
}

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);

    /// What a driver may switch on and off while the device runs
    /// (`VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET`, section 5.1.6.5.6).
    pub const GUEST_OFFLOADS: Self = Self(
        Self::GUEST_CSUM.0
            | Self::GUEST_TSO4.0
            | Self::GUEST_TSO6.0
            | Self::GUEST_ECN.0
            | Self::GUEST_UFO.0
            | Self::GUEST_USO4.0
            | Self::GUEST_USO6.0,
    );

    /// What needs the control queue.
    pub const CONTROL: Self = Self(
        Self::CTRL_VQ.0 | Self::CTRL_RX.0 | Self::CTRL_MAC_ADDR.0 | Self::CTRL_GUEST_OFFLOADS.0,
    );

    const fn bit(bit: u32) -> Self {
        Self(1 << bit)
    }

    /// The features with these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other` are among these.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These without `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// These, and `other` if `condition` holds.
    #[must_use]
    pub const fn with_if(self, condition: bool, other: Self) -> Self {
        if condition { Self(self.0 | other.0) } else { self }
    }

    /// What an interface with these capabilities can serve, with a control queue or without.
    ///
    /// Without one, features that need it are not offered: Linux refuses a device that offers
    /// GUEST_ANNOUNCE alone, and user-mode Linux hands on what a back end offers. MQ is the exception,
    /// since somebody has asked for several pairs, and front ends with several have a control queue of
    /// their own.
    ///
    /// A guest may leave to the device only what the interface does. A packet *for* a guest may lack
    /// only what the guest has said that it can bear, and the device completes the rest in software.
    /// So these bits are offered wherever packets of the kind can arrive.
    pub(super) fn offered(caps: &Capabilities, pairs: u16, control: bool, mtu: bool) -> Self {
        let Offloads { checksum, tso4, tso6, uso, virtio_header, .. } = caps.offloads;
        let checksum = checksum && virtio_header;
        let (tso4, tso6, uso) = (tso4 && checksum, tso6 && checksum, uso && checksum);
        (Self::VERSION_1 | Self::IN_ORDER | Self::EVENT_IDX | Self::INDIRECT_DESC)
            .with_if(true, Self::MAC | Self::STATUS | Self::MRG_RXBUF)
            .with_if(mtu, Self::MTU)
            .with_if(checksum, Self::CSUM | Self::GUEST_CSUM)
            .with_if(tso4, Self::HOST_TSO4 | Self::GUEST_TSO4)
            .with_if(tso6, Self::HOST_TSO6 | Self::GUEST_TSO6)
            .with_if(tso4 || tso6, Self::HOST_ECN | Self::GUEST_ECN)
            .with_if(uso, Self::HOST_USO | Self::GUEST_USO4 | Self::GUEST_USO6)
            .with_if(pairs > 1, Self::MQ)
            .with_if(
                control,
                Self::CTRL_VQ | Self::CTRL_RX | Self::CTRL_MAC_ADDR | Self::GUEST_ANNOUNCE,
            )
            .with_if(control && checksum, Self::CTRL_GUEST_OFFLOADS)
    }

    /// These without features whose conditions are not among them (section 5.1.3.1). A driver must
    /// not accept such a set; QEMU forgives it, and so do we.
    pub(super) fn consistent(self) -> Self {
        let tso = |set: Self, four: Self, six: Self| set.has(four) || set.has(six);
        let mut set = self;
        if !set.has(Self::CSUM) {
            set = set.without(Self::HOST_TSO4 | Self::HOST_TSO6 | Self::HOST_UFO | Self::HOST_USO);
        }
        if !set.has(Self::GUEST_CSUM) {
            let needing = Self::GUEST_OFFLOADS.without(Self::GUEST_CSUM);
            set = set.without(needing);
        }
        if !tso(set, Self::HOST_TSO4, Self::HOST_TSO6) {
            set = set.without(Self::HOST_ECN);
        }
        if !tso(set, Self::GUEST_TSO4, Self::GUEST_TSO6) {
            set = set.without(Self::GUEST_ECN);
        }
        if !set.has(Self::CTRL_VQ) {
            // Over vhost-user the front end has the control queue, and pairs are switched with
            // SET_VRING_ENABLE. So MQ and GUEST_ANNOUNCE do not go with it.
            set = set.without(Self::CONTROL);
        }
        set
    }

    /// The work that a driver with these features leaves undone in packets that it sends.
    pub(super) fn left_by_driver(self) -> Offloads {
        let mut offloads = Offloads::default();
        offloads.virtio_header = true;
        offloads.checksum = self.has(Self::CSUM);
        offloads.tso4 = self.has(Self::HOST_TSO4);
        offloads.tso6 = self.has(Self::HOST_TSO6);
        offloads.uso = self.has(Self::HOST_USO);
        offloads
    }

    /// The work that a driver with these features accepts undone in packets that it receives.
    pub(super) fn accepted_by_driver(self) -> Offloads {
        let mut offloads = Offloads::default();
        offloads.virtio_header = true;
        offloads.checksum = self.has(Self::GUEST_CSUM);
        offloads.tso4 = self.has(Self::GUEST_TSO4);
        offloads.tso6 = self.has(Self::GUEST_TSO6);
        // One kind of header stands for both protocols.
        offloads.uso = self.has(Self::GUEST_USO4) && self.has(Self::GUEST_USO6);
        offloads
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Features {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}
