//! A started interface, from the start's handler to the stop's.

use std::mem::forget;
use std::net::Ipv4Addr;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{fmt, thread};

use block2::RcBlock;
use dispatch2::{DispatchQueue, DispatchRetained};
use macaddr::MacAddr6;
use vmring_core::sync::{AtomicBool, Ordering};

use super::availability::System;
use super::events::{Callback, Events, check, inside_event};
use super::ffi::{
    InterfaceRef, Object, SUCCESS, vmnet_end_address_key, vmnet_interface_id_key,
    vmnet_mac_address_key, vmnet_max_packet_size_key, vmnet_mtu_key, vmnet_start_address_key,
    vmnet_start_interface, vmnet_stop_interface, vmnet_subnet_mask_key,
};
use super::limits::{FAILED_START_GRACE, PACKET_MAX, PACKETS_PER_CALL, PACKETS_PER_CALL_MAX};
use super::network::VmnetNetwork;
use super::permission;
use super::xpc::{Borrowed, Dictionary};
use crate::config::Ipv4Range;
use crate::error::{Error, Status};
use crate::sys::lock;

/// What vmnet says of an interface when it has started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) mtu: Option<u64>,
    pub(crate) max_packet_size: Option<u64>,
    pub(crate) mac: Option<MacAddr6>,
    pub(crate) interface_id: Option<[u8; 16]>,
    pub(crate) ipv4: Option<Ipv4Range>,
    read_max_packets: Option<u64>,
    write_max_packets: Option<u64>,
}

impl Parameters {
    /// Copies everything out: the dictionary is vmnet's and lives only during the handler's call.
    fn read(from: Borrowed<'_>, system: &System) -> Self {
        // SAFETY: reads constants that vmnet exports.
        let (mtu, max, mac, id, range) = unsafe {
            (
                vmnet_mtu_key,
                vmnet_max_packet_size_key,
                vmnet_mac_address_key,
                vmnet_interface_id_key,
                [vmnet_start_address_key, vmnet_end_address_key, vmnet_subnet_mask_key],
            )
        };
        let address = |key| from.get_str(key)?.parse::<Ipv4Addr>().ok();
        let [start, end, mask] = range.map(address);
        let ipv4 = match (start, end, mask) {
            (Some(start), Some(end), Some(mask)) => Some(Ipv4Range { start, end, mask }),
            _ => None,
        };
        let keys = &system.keys;
        Self {
            mtu: from.get_u64(mtu),
            max_packet_size: from.get_u64(max),
            mac: from.get_str(mac).and_then(|text| text.parse().ok()),
            interface_id: from.get_uuid(id),
            ipv4,
            read_max_packets: keys.read_max_packets.and_then(|name| from.get_u64(name.key())),
            write_max_packets: keys.write_max_packets.and_then(|name| from.get_u64(name.key())),
        }
    }

    /// The sizes that nothing works without, as far as they can be true.
    pub(crate) fn sizes(&self) -> Option<(u32, u32)> {
        let max = self.max_packet_size.filter(|max| (14..=PACKET_MAX).contains(max))?;
        let mtu = self.mtu.filter(|mtu| *mtu <= max)?;
        Some((mtu as u32, max as u32))
    }

    /// Packets per read and per write.
    pub(crate) fn batches(&self) -> (u32, u32) {
        let limit = |max: Option<u64>| {
            max.map_or(PACKETS_PER_CALL, |max| max.min(PACKETS_PER_CALL_MAX) as u32)
        };
        (limit(self.read_max_packets), limit(self.write_max_packets))
    }
}

/// A started interface. Its queues share it; when the last owner drops it, it stops.
pub(crate) struct StartedInterface {
    /// `None` when it is stopped.
    running: Option<Running>,
    pub(crate) events: Arc<Events>,
    pub(crate) parameters: Parameters,
    /// Whether a ring reads: vmnet is not known to bear two.
    pub(crate) read_taken: AtomicBool,
    /// Held while a call writes: nor is it known to bear two of them.
    pub(crate) writing: Mutex<()>,
    stop_timeout: Duration,
}

struct Running {
    interface: InterfaceRef,
    /// Serial; vmnet calls the event block from it, and nobody else uses it.
    queue: DispatchRetained<DispatchQueue>,
    callback: Mutex<Option<Callback>>,
    /// Keeps the address reservation.
    _network: Option<VmnetNetwork>,
}

// SAFETY: vmnet's functions may be called from any thread. That no two reads, and no two writes, are
// under way at a time is kept by `read_taken` and `writing`; that none is when the interface stops,
// by `Port` having one owner then.
unsafe impl Send for Running {}
// SAFETY: as above.
unsafe impl Sync for Running {}

impl fmt::Debug for StartedInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StartedInterface")
            .field("parameters", &self.parameters)
            .finish_non_exhaustive()
    }
}

/// How long to wait for vmnet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    pub(crate) start: Duration,
    pub(crate) stop: Duration,
}

impl StartedInterface {
    /// Starts an interface and waits for the handler.
    pub(crate) fn start(
        description: &Dictionary,
        network: Option<&VmnetNetwork>,
        system: System,
        timeouts: Timeouts,
    ) -> Result<Self, Error> {
        Self::start_with(description, network, system, timeouts, |_| ())
    }

    /// As [`start`](Self::start), and calls `early` with the handle before the handler has run.
    pub(crate) fn start_with(
        description: &Dictionary,
        network: Option<&VmnetNetwork>,
        system: System,
        timeouts: Timeouts,
        early: impl FnOnce(InterfaceRef),
    ) -> Result<Self, Error> {
        let queue = DispatchQueue::new("vmring.interface", None);
        let (answer, answers) = sync_channel(1);
        let handler = RcBlock::new(move |status: u32, parameters: Object| {
            // SAFETY: null, or a dictionary that lives during this call.
            let parameters = unsafe { Borrowed::from_raw(parameters) };
            let parameters = parameters.map(|from| Parameters::read(from, &system));
            // A second call finds the channel full or closed; one after the timeout finds it closed.
            let _ = answer.try_send((status, parameters));
        });
        let interface = match network {
            // SAFETY: the types are the declared ones, and the dictionary lives. Handler and queue
            // are ours until the handler has run, below.
            None => unsafe { vmnet_start_interface(description.as_raw(), &queue, &handler) },
            Some(network) => network.start(description, &queue, &handler),
        };
        if interface.is_null() {
            // Nobody promises that the handler is called, so this wait is short; nor that it is not
            // called later, so then it is kept.
            let status = answers.recv_timeout(FAILED_START_GRACE).map(|(status, _)| status);
            if status.is_err() || !drained(&queue, timeouts.start) {
                forget((handler, queue));
            }
            let status = status.ok().and_then(Status::from_code).unwrap_or(Status::Failure);
            return Err(permission::error(status, &system));
        }
        early(interface);
        let as_started = |parameters| Self {
            running: Some(Running {
                interface,
                queue: queue.clone(),
                callback: Mutex::new(None),
                _network: network.cloned(),
            }),
            events: Arc::default(),
            parameters,
            read_taken: AtomicBool::new(false),
            writing: Mutex::new(()),
            stop_timeout: timeouts.stop,
        };
        let answered = answers.recv_timeout(timeouts.start);
        // The answer comes from inside the handler: until that has returned it is not to be released.
        if answered.is_ok() && !drained(&queue, timeouts.start) {
            forget(handler.clone());
        }
        match answered {
            Ok((SUCCESS, Some(parameters))) if parameters.sizes().is_some() => {
                Ok(as_started(parameters))
            }
            Ok((SUCCESS, parameters)) => {
                // It runs, and we do not know what it takes.
                tracing::error!(?parameters, "vmnet started an interface and did not describe it");
                as_started(Parameters::default()).stop()?;
                let what = "an interface without an MTU and a packet size";
                Err(Error::Answer { device: "vmnet", what })
            }
            Ok((status, _)) => {
                // A failure, and a handle all the same: stopped, or it stays for ever.
                if let Err(error) = as_started(Parameters::default()).stop() {
                    tracing::warn!(%error, "an interface that failed to start did not stop");
                }
                let status = Status::from_code(status).unwrap_or(Status::Failure);
                Err(permission::error(status, &system))
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                // The handler may still come, and use all of this.
                tracing::error!(
                    timeout = ?timeouts.start,
                    "vmnet did not answer a start; interface, queue and handler are leaked on purpose"
                );
                forget((handler, queue));
                Err(Error::StartTimeout(timeouts.start))
            }
        }
    }

    /// The handle, for the calls of a queue.
    pub(crate) fn interface(&self) -> InterfaceRef {
        self.running.as_ref().expect("it is stopped by its last owner only").interface
    }

    /// From here on an event rings what `events` has as its wake.
    pub(crate) fn listen(&self) -> Result<(), Status> {
        let running = self.running.as_ref().expect("it is stopped by its last owner only");
        let mut callback = lock(&running.callback);
        if callback.is_none() {
            // SAFETY: it runs as long as we exist.
            *callback =
                Some(unsafe { Callback::set(running.interface, &running.queue, &self.events)? });
        }
        Ok(())
    }

    /// Ends the interface: events off, the last of them over, vmnet's own stop, its handler awaited.
    ///
    /// # Errors
    ///
    /// What vmnet says; [`Error::Timeout`] if something did not end, and is leaked on purpose.
    pub(crate) fn stop(mut self) -> Result<(), Error> {
        let running = self.running.take().expect("it is stopped once");
        running.stop(self.stop_timeout)
    }
}

impl Drop for StartedInterface {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else { return };
        if let Err(error) = running.stop(self.stop_timeout) {
            tracing::warn!(%error, "a vmnet interface did not stop cleanly");
        }
    }
}

/// Waits until what is on a queue, which is serial, has run. With a timeout, which dispatch_sync has
/// not.
fn drained(queue: &DispatchQueue, timeout: Duration) -> bool {
    let (over, last) = sync_channel::<()>(1);
    queue.exec_async(move || drop(over));
    last.recv_timeout(timeout) != Err(RecvTimeoutError::Timeout)
}

impl Running {
    fn stop(self, timeout: Duration) -> Result<(), Error> {
        if !inside_event() {
            return self.stop_here(timeout);
        }
        // Called from the event block, by a waker: to wait here would be to wait for ourselves.
        let stopping = thread::Builder::new().name("vmring-stop".to_owned());
        let stopping = stopping.spawn(move || {
            if let Err(error) = self.stop_here(timeout) {
                tracing::warn!(%error, "a vmnet interface did not stop cleanly");
            }
        });
        stopping.map(drop).map_err(Error::io("starting the thread that stops the interface"))
    }

    fn stop_here(self, timeout: Duration) -> Result<(), Error> {
        if lock(&self.callback).is_some() {
            // SAFETY: the interface runs: this is its one stop.
            if let Err(status) = unsafe { Callback::clear(self.interface) } {
                tracing::warn!(%status, "vmnet did not turn its events off");
            }
            // That does not wait for a call under way.
            if !drained(&self.queue, timeout) {
                tracing::error!(
                    "an event callback does not end; the interface is leaked on purpose"
                );
                forget(self);
                return Err(Error::Timeout(timeout));
            }
        }
        // A queue of its own for the handler, that nothing can block.
        let queue = DispatchQueue::new("vmring.stop", None);
        let (answer, answers) = sync_channel(1);
        let handler = RcBlock::new(move |status: u32| {
            let _ = answer.try_send(status);
        });
        // SAFETY: the interface runs and nobody uses it any more: `self` was the last owner's. Handler
        // and queue are ours until the handler has run.
        let accepted = check(unsafe { vmnet_stop_interface(self.interface, &queue, &handler) });
        if let Err(status) = accepted {
            // No handler comes, and the handle is not consumed.
            tracing::error!(%status, "vmnet refused a stop; the interface is leaked on purpose");
            forget(self);
            return Err(status.into());
        }
        match answers.recv_timeout(timeout) {
            Ok(status) => {
                if !drained(&queue, timeout) {
                    forget((handler, queue));
                }
                Ok(check(status)?)
            }
            Err(_) => {
                tracing::error!("vmnet did not answer a stop; the interface is leaked on purpose");
                forget((self, handler, queue));
                Err(Error::Timeout(timeout))
            }
        }
    }
}

impl StartedInterface {
    /// Claims the one reading end.
    pub(crate) fn claim_reading(&self) -> bool {
        !self.read_taken.swap(true, Ordering::Acquire)
    }

    /// Gives it back.
    pub(crate) fn release_reading(&self) {
        self.events.set_wake(None);
        self.read_taken.store(false, Ordering::Release);
    }
}
