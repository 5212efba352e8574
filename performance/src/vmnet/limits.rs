//! Sizes of packets and buffers, and how long a call may take.

use std::time::Duration;

use crate::common::NULL_LENGTH;

/// Bytes of a packet.
pub(crate) const LENGTH: usize = NULL_LENGTH;
/// Bytes of a buffer.
pub(crate) const BUFFER_LEN: usize = 2048;
/// Longer than anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
