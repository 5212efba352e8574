//! Tells "not allowed" from "failed". vmnet has codes for a missing privilege (1005 and 1010), but
//! does not seem to use them: in all published reports a start without the privilege fails with
//! 1001, and the creation of a network with 1002.

use super::availability::System;
use super::system::Macos;
use crate::error::{Error, Status};

/// Returns the error for `status`, with which a start or the creation of a network failed:
/// [`Error::PermissionDenied`] if the process is not root and the status can mean a missing
/// privilege, otherwise [`Error::Status`].
pub(crate) fn error(status: Status, system: &System) -> Error {
    let may_mean_denied = matches!(
        status,
        Status::Failure | Status::MemFailure | Status::InvalidAccess | Status::NotAuthorized
    );
    let Some(code) = status.code().filter(|_| may_mean_denied && !system.root) else {
        return status.into();
    };
    let macos = system.macos;
    // Up to macOS 15 only the restricted entitlement helps (Apple's documentation). From macOS 26
    // on an entitlement is enough that an ad-hoc signature can give; others have measured this on
    // 26.2, 26.5 and 26.6.2. com.apple.security.hypervisor alone was not enough there.
    let needs = if macos >= Macos(26, 0) {
        format!(
            "vmnet answered {code}, and on {macos} it needs root, or a binary signed (ad hoc is \
             enough) with the entitlement com.apple.security.virtualization"
        )
    } else {
        format!(
            "vmnet answered {code}, and on {macos} it needs root, or a binary that Apple lets have \
             the restricted entitlement com.apple.vm.networking"
        )
    };
    Error::PermissionDenied { needs }
}
