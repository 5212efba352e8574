//! Numbers of vmnet.h: the statuses that calls return, and the modes of an interface.

pub(crate) const SUCCESS: u32 = 1000;
pub(crate) const FAILURE: u32 = 1001;
pub(crate) const INVALID_ARGUMENT: u32 = 1003;
pub(crate) const SETUP_INCOMPLETE: u32 = 1004;
pub(crate) const PACKET_TOO_BIG: u32 = 1006;
pub(crate) const TOO_MANY_PACKETS: u32 = 1008;

pub(crate) const HOST_MODE: u64 = 1000;
pub(crate) const SHARED_MODE: u64 = 1001;
pub(crate) const BRIDGED_MODE: u64 = 1002;
