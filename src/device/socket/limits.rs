//! Limits and timeouts of the socket wires.

use std::time::Duration;

use vmring_core::offload;

/// The length of the number in front of each frame of a stream, in bytes: 32 bits, big-endian.
pub(super) const LENGTH_LEN: usize = 4;
/// The longest payload of a stream that is no mistake of the peer: what gvproxy takes. QEMU takes
/// 69,632 bytes, libkrun 65,562.
pub(super) const PAYLOAD_MAX: usize = 131_072;
/// The longest packet that is carried, in bytes: 64 KiB of IP, an Ethernet header and a VLAN tag.
pub(super) const IP_MAX: u32 = 65_535;
/// The smallest MTU: the one that each IPv4 host takes (RFC 791).
pub(super) const MTU_MIN: u32 = 68;

/// The size of the buffer that a stream is received into. It has space for the longest payload and as
/// much again.
pub(super) const RECEIVE_BUFFER: usize = 256 * 1024;
/// How many frames one call of a stream sends.
pub(super) const STREAM_FRAMES: usize = 64;
/// After how many bytes no more frames are added to one call of a stream. More would be offered to a
/// socket in vain, and put back.
pub(super) const STREAM_BYTES: usize = 256 * 1024;
/// How many messages one call sends or receives.
pub(super) const MESSAGES: usize = 64;
/// How many messages a call asks for after one that found none.
pub(super) const MESSAGES_MIN: usize = 4;
/// How many calls one poll makes to receive. A peer can send what is dropped as fast as it is received, and
/// must not hold up the other rings of a poller by that.
pub(super) const RECEIVES_PER_POLL: usize = 8;
/// How many reads and writes one poll takes.
pub(super) const BATCH: u32 = 256;

/// The largest number of segments of a guest's packet that are sent by one call: 64 KiB in pages of
/// 4 KiB, a header, and two pages that are not full.
pub(super) const WRITE_SEGMENTS_MAX: usize = 20;
/// The largest number of segments of a guest's buffer that a message is received into.
pub(super) const READ_SEGMENTS_MAX: usize = 20;
/// The largest number of pieces that one call takes (`IOV_MAX` of Linux and macOS).
pub(super) const PIECES_MAX: usize = 1024;

/// The buffers of a stream, in bytes. The system's own are 8 KiB on macOS.
pub(super) const STREAM_BUFFER: usize = 1024 * 1024;
/// How much a socket of messages sends ahead, in bytes: vfkit's value. On Linux it bounds what is under
/// way, on macOS the longest message.
pub(super) const MESSAGE_SEND_BUFFER: usize = 1024 * 1024;
/// How much waits to be received by a socket of messages, in bytes: vfkit's value.
pub(super) const MESSAGE_RECEIVE_BUFFER: usize = 4 * 1024 * 1024;
/// The same for messages of 64 KiB: vmnet-helper's value.
pub(super) const LARGE_RECEIVE_BUFFER: usize = 8 * 1024 * 1024;

/// How many connections wait to be accepted.
pub(super) const BACKLOG: i32 = 128;
/// How long a process that makes a socket waits for the lock of its folder. Another one that makes a socket
/// holds the lock for less than a millisecond.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// The time between two attempts to lock it.
pub(super) const LOCK_AGAIN: Duration = Duration::from_millis(10);
/// How many messages one look for a peer throws away, so that senders without an address do not hold up
/// the other rings of a poller.
pub(super) const UNNAMED_PER_POLL: u32 = 64;
/// How long a wire that listens waits after a connection could not be accepted, for example because the
/// limit of open files is reached.
pub(super) const ACCEPT_AGAIN: Duration = Duration::from_secs(5);
/// How long a wire that connects waits before it tries again, by default, and the shortest time between
/// two looks whether the peer of a datagram socket is still there.
pub(super) const RECONNECT: Duration = Duration::from_secs(1);

/// The length of the virtio header in front of each frame, in bytes.
pub(super) const HEADER_LEN: usize = offload::LEN;
