//! Telling "not allowed" from "failed". vmnet has a code for it and does not use it: what arrives
//! when the process lacks the privilege is 1001 from a start and 1002 from a network's creation.

use super::availability::System;
use super::system::Macos;
use crate::error::{Error, Status};

/// The error for `status`, which a start or a network's creation ended with.
pub(crate) fn error(status: Status, system: &System) -> Error {
    let may_mean_denied = matches!(
        status,
        Status::Failure | Status::MemFailure | Status::InvalidAccess | Status::NotAuthorized
    );
    let Some(code) = status.code().filter(|_| may_mean_denied && !system.root) else {
        return status.into();
    };
    let macos = system.macos;
    // As measured: up to macOS 15 the restricted entitlement, from 26 on also one that an ad-hoc
    // signature can give. com.apple.security.hypervisor is not enough.
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
