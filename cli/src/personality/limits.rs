//! Constants of the helpers.

/// The command line and the behaviour that are followed are those of these releases, and of what their
/// repositories had after them in August 2026.
pub(super) const VMNET_HELPER: &str = "v0.12.0";
pub(super) const SOCKET_VMNET: &str = "v1.2.2";

/// vmnet.h: `operating_modes_t`.
pub(super) const HOST_MODE: u32 = 1000;
pub(super) const SHARED_MODE: u32 = 1001;
pub(super) const BRIDGED_MODE: u32 = 1002;

/// The longest path of a socket in bytes, without its end.
pub(super) const PATH_MAX: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

/// The descriptor of the helper that `vmnet-run` starts, and that of the command (`run.c`).
pub(super) const HELPER_FD: i32 = 3;
pub(super) const COMMAND_FD: i32 = 4;
/// The descriptor of the command that `socket_vmnet_client` becomes: what its users write into their
/// command lines.
pub(super) const CLIENT_FD: i32 = 3;

/// The buffers of the sockets that `vmnet-run` makes, in bytes (`common.h`): for sending, for receiving, and
/// for receiving packets of 64 KiB.
pub(super) const SEND_BUFFER: usize = 65 * 1024;
pub(super) const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;
pub(super) const LARGE_RECEIVE_BUFFER: usize = 8 * 1024 * 1024;

/// The group whose members may connect to `socket_vmnet`, if no other one is named (`cli.c`).
pub(super) const GROUP: &str = "staff";

/// The names of the helpers.
pub(super) const NAMES: [&str; 4] =
    ["vmnet-helper", "vmnet-run", "socket_vmnet", "socket_vmnet_client"];
