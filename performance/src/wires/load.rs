//! [`Load`]: what two clients send each other, and what it looks like on their wire.

use crate::net::ETHERNET;

/// The wires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// A length of 32 bits in front of each frame.
    Stream,
    /// A datagram is a frame.
    Datagram,
}

/// What goes from one client to the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) wire: Wire,
    /// The bytes of each frame.
    pub(super) frame: usize,
    /// Whether each frame has a virtio header in front, which asks for segmentation.
    pub(super) header: bool,
    /// How many frames are under way at most.
    pub(super) window: usize,
}

/// The bytes of a virtio header.
pub(super) const HEADER: usize = 12;
/// The length in front of a frame of a stream.
pub(super) const LENGTH: usize = 4;
/// The shortest announcement.
const SHORT: usize = 60;

/// The address of a client.
fn mac(client: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, 0xa + client as u8]
}

impl Load {
    /// The length of a payload as the wire has it.
    pub(super) fn payload_len(&self) -> usize {
        self.front_len() + self.frame
    }

    fn front_len(&self) -> usize {
        let length = if self.wire == Wire::Stream { LENGTH } else { 0 };
        length + if self.header { HEADER } else { 0 }
    }

    /// A frame from a client to the other one, which is packet `number`.
    pub(super) fn payload(&self, from: usize, number: usize) -> Vec<u8> {
        let mut frame = vec![0; self.frame];
        frame[..6].copy_from_slice(&mac(1 - from));
        frame[6..12].copy_from_slice(&mac(from));
        // An IPv4 header and a TCP header, as far as somebody may look at them: a switch that passes the
        // packet on as it is looks at no checksum.
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        let total = (self.frame - ETHERNET) as u16;
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        frame[22..24].copy_from_slice(&[64, 6]);
        frame[26..34].copy_from_slice(&[10, 9, 0, 1, 10, 9, 0, 2]);
        frame[46] = 0x50;
        let end = self.frame - 4;
        frame[end..].copy_from_slice(&(number as u32).to_be_bytes());
        // NEEDS_CSUM and TCPV4, whose headers end at 54, in segments of 1,460 bytes (virtio 1.2, 5.1.6).
        let mut header = [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        header[4..6].copy_from_slice(&1460_u16.to_le_bytes());
        self.framed(&header, &frame)
    }

    /// A frame to everybody, by which a switch learns where a client is.
    pub(super) fn announcement(&self, from: usize) -> Vec<u8> {
        let mut frame = [0; SHORT];
        frame[..6].copy_from_slice(&[0xff; 6]);
        frame[6..12].copy_from_slice(&mac(from));
        // An EtherType for experiments (IEEE 802, 9.2.3).
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        self.framed(&[0; HEADER], &frame)
    }

    fn framed(&self, header: &[u8; HEADER], frame: &[u8]) -> Vec<u8> {
        let header = if self.header { &header[..] } else { &[] };
        let length = ((header.len() + frame.len()) as u32).to_be_bytes();
        let length = if self.wire == Wire::Stream { &length[..] } else { &[] };
        [length, header, frame].concat()
    }
}
