//! A started interface, from its start to the end of its stop.

use std::fmt;
use std::mem::forget;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use block2::RcBlock;
use dispatch2::{DispatchQueue, DispatchRetained};
use macaddr::MacAddr6;
use vmring_core::sync::{AtomicBool, Ordering};

use super::availability::System;
use super::events::{Callback, Events, check, inside_event};
use super::ffi::{
    InterfaceRef, Object, SUCCESS, vmnet_end_address_key, vmnet_interface_id_key,
    vmnet_mac_address_key, vmnet_max_packet_size_key, vmnet_mtu_key, vmnet_nat66_prefix_key,
    vmnet_start_address_key, vmnet_start_interface, vmnet_stop_interface, vmnet_subnet_mask_key,
};
use super::limits::{FAILED_START_GRACE, PACKET_MAX, PACKETS_PER_CALL, PACKETS_PER_CALL_MAX};
use super::network::VmnetNetwork;
use super::permission;
use super::xpc::{Borrowed, Dictionary};
use crate::config::Ipv4Range;
use crate::error::{Error, Status};
use crate::sync::Mutex;
use crate::sys::{lock, spawn_detached};

/// The properties that vmnet reports for an interface when it has started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) mtu: Option<u64>,
    pub(crate) max_packet_size: Option<u64>,
    pub(crate) mac: Option<MacAddr6>,
    pub(crate) interface_id: Option<[u8; 16]>,
    pub(crate) ipv4: Option<Ipv4Range>,
    pub(crate) nat66_prefix: Option<Ipv6Addr>,
    read_max_packets: Option<u64>,
    write_max_packets: Option<u64>,
}

impl Parameters {
    /// Copies the values out of vmnet's dictionary, which lives only during the handler's call.
    fn read(from: Borrowed<'_>, system: &System) -> Self {
        // SAFETY: vmnet.h declares each key as `extern const char * const`. They are initialized
        // when the program is loaded and never change, so reading them races with nothing.
        let (mtu, max, mac, id, range, nat66) = unsafe {
            (
                vmnet_mtu_key,
                vmnet_max_packet_size_key,
                vmnet_mac_address_key,
                vmnet_interface_id_key,
                [vmnet_start_address_key, vmnet_end_address_key, vmnet_subnet_mask_key],
                vmnet_nat66_prefix_key,
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
            nat66_prefix: from.get_str(nat66).and_then(|text| text.parse().ok()),
            read_max_packets: keys.read_max_packets.and_then(|name| from.get_u64(name.key())),
            write_max_packets: keys.write_max_packets.and_then(|name| from.get_u64(name.key())),
        }
    }

    /// Returns the MTU and the maximum packet size, in bytes; `None` if one of them is missing or
    /// impossible. No interface works without them.
    pub(crate) fn sizes(&self) -> Option<(u32, u32)> {
        let max = self.max_packet_size.filter(|max| (14..=PACKET_MAX).contains(max))?;
        let mtu = self.mtu.filter(|mtu| *mtu <= max)?;
        Some((mtu as u32, max as u32))
    }

    /// Returns the most packets per read and per write.
    pub(crate) fn batches(&self) -> (u32, u32) {
        let limit = |max: Option<u64>| {
            max.map_or(PACKETS_PER_CALL, |max| max.min(PACKETS_PER_CALL_MAX) as u32)
        };
        (limit(self.read_max_packets), limit(self.write_max_packets))
    }
}

/// A started interface. The device and its queues share it. When the last owner drops it, it stops.
///
/// Invariant: the interface runs as long as this value can be borrowed. Only two functions stop the
/// interface, and neither leaves anybody a borrow: [`stop`](Self::stop), which consumes the value,
/// and `drop`. So a call that borrows the value may use [`interface`](Self::interface).
pub(crate) struct StartedInterface {
    /// `None` only from the start of `stop` or `drop` on.
    running: Option<Running>,
    pub(crate) events: Arc<Events>,
    pub(crate) parameters: Parameters,
    /// Whether a queue has the right to read. Only one may, because it is not known whether vmnet
    /// allows two reads at a time.
    pub(crate) read_taken: AtomicBool,
    /// Held during a write call, because it is not known whether vmnet allows two writes at a time.
    pub(crate) writing: Mutex<()>,
    stop_timeout: Duration,
}

/// The parts of a started interface that only a stop may take.
struct Running {
    interface: InterfaceRef,
    /// The serial queue from which vmnet calls the start's handler and the event block. The driver
    /// itself only uses it to wait until they have returned.
    queue: DispatchRetained<DispatchQueue>,
    /// The event block; `None` until `listen` has set it.
    callback: Mutex<Option<Callback>>,
    /// Keeps the network's address reservation while the interface is on it.
    _network: Option<VmnetNetwork>,
}

// SAFETY: only the raw pointer `interface` keeps `Running` from being `Send`. Apple does not say
// from which threads vmnet's functions may be called (the row "from which threads may its functions
// be called?" of the open questions in ARCHITECTURE.md). We assume any thread, because hyperkit and
// vmnet-helper read on one thread and write on another.
unsafe impl Send for Running {}
// SAFETY: several threads may call vmnet's functions for one interface at a time; that a read, a
// write, an event and a forwarding call may overlap is the same open question and the same
// assumption. Two reads never overlap: `claim_reading` gives one queue the right to read, and one
// thread at a time drives a queue. Two writes never overlap: `Writes::write` holds `writing`.
// Only the probe, in its question about two readers, lets reads overlap on purpose. No call overlaps
// the stop, by the invariant of `StartedInterface`.
unsafe impl Sync for Running {}

impl fmt::Debug for StartedInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StartedInterface")
            .field("parameters", &self.parameters)
            .finish_non_exhaustive()
    }
}

/// How long a start and a stop wait for vmnet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timeouts {
    pub(crate) start: Duration,
    pub(crate) stop: Duration,
}

impl StartedInterface {
    /// Starts an interface and waits for the handler.
    ///
    /// # Errors
    ///
    /// - [`Error::PermissionDenied`] or [`Error::Status`] if vmnet refuses.
    /// - [`Error::StartTimeout`] if the handler has not run in time. What vmnet may still use is
    ///   leaked.
    /// - [`Error::Answer`] if vmnet reports a success without usable sizes.
    pub(crate) fn start(
        description: &Dictionary,
        network: Option<&VmnetNetwork>,
        system: System,
        timeouts: Timeouts,
    ) -> Result<Self, Error> {
        Self::start_with(description, network, system, timeouts, |_| ())
    }

    /// Does the same as [`start`](Self::start), and calls `early` with the handle before it waits
    /// for the handler. Only the probe needs that.
    ///
    /// # Errors
    ///
    /// The same as for [`start`](Self::start).
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
            // SAFETY: vmnet.h gives the handler null or a dictionary. vmnet keeps its reference to
            // it during the handler's call, and `Borrowed` is dropped before that ends.
            let parameters = unsafe { Borrowed::from_raw(parameters) };
            let parameters = parameters.map(|from| Parameters::read(from, &system));
            // The send fails, and nothing happens, if vmnet calls a second time (the channel is
            // full or closed) or after the timeout (it is closed).
            let _ = answer.try_send((status, parameters));
        });
        let interface = match network {
            // SAFETY: the arguments have the types that vmnet.h declares, and the dictionary lives
            // through the call. This function keeps handler and queue until the handler has
            // returned, or leaks them.
            None => unsafe { vmnet_start_interface(description.as_raw(), &queue, &handler) },
            Some(network) => network.start(description, &queue, &handler),
        };
        if interface.is_null() {
            // No document promises that the handler is called after a null, so this wait is short.
            // None promises either that it is not called later, so without a call the handler is
            // leaked.
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
        // The answer is sent from inside the handler, which may still be running. If it does not
        // return in time, a reference to it is leaked, so that it is never freed.
        if answered.is_ok() && !drained(&queue, timeouts.start) {
            forget(handler.clone());
        }
        match answered {
            Ok((SUCCESS, Some(parameters))) if parameters.sizes().is_some() => {
                Ok(as_started(parameters))
            }
            Ok((SUCCESS, parameters)) => {
                // The interface runs, but nobody knows which packets it takes.
                tracing::error!(?parameters, "vmnet started an interface and did not describe it");
                as_started(Parameters::default()).stop()?;
                let what = "an interface without an MTU and a packet size";
                Err(Error::Answer { device: "vmnet", what })
            }
            Ok((status, _)) => {
                // The start failed, but there is a handle. Without a stop it would stay for ever.
                if let Err(error) = as_started(Parameters::default()).stop() {
                    tracing::warn!(%error, "an interface that failed to start did not stop");
                }
                let status = Status::from_code(status).unwrap_or(Status::Failure);
                Err(permission::error(status, &system))
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                // The handler may still run and use all of these.
                tracing::error!(
                    timeout = ?timeouts.start,
                    "vmnet did not answer a start; interface, queue and handler are leaked on purpose"
                );
                forget((handler, queue));
                Err(Error::StartTimeout(timeouts.start))
            }
        }
    }

    /// Returns the handle. It is valid as long as `self` is borrowed (the invariant of the type).
    pub(crate) fn interface(&self) -> InterfaceRef {
        self.running.as_ref().expect("it is stopped by its last owner only").interface
    }

    /// Turns events on, if they are off: from here on each one rings the wake that is set in
    /// `events`.
    ///
    /// # Errors
    ///
    /// vmnet's status.
    pub(crate) fn listen(&self) -> Result<(), Status> {
        let running = self.running.as_ref().expect("it is stopped by its last owner only");
        let mut callback = lock(&running.callback);
        if callback.is_none() {
            // SAFETY: the interface runs, because `self` is borrowed (the invariant of the type).
            *callback =
                Some(unsafe { Callback::set(running.interface, &running.queue, &self.events)? });
        }
        Ok(())
    }

    /// Stops the interface: turns events off, waits for the last one to end, calls vmnet's stop,
    /// and waits for its handler. Called from inside an event, it does this on another thread and
    /// returns at once.
    ///
    /// # Errors
    ///
    /// - [`Error::Status`] if vmnet refuses the stop or reports a failure.
    /// - [`Error::Timeout`] if an event callback or the stop does not end in time. What vmnet may
    ///   still use is leaked on purpose.
    /// - [`Error::Io`] if the other thread cannot be started.
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

/// Waits until everything that was put on a serial queue has run. Returns false after the timeout.
/// It is `dispatch_sync` with a timeout.
fn drained(queue: &DispatchQueue, timeout: Duration) -> bool {
    let (over, last) = sync_channel::<()>(1);
    queue.exec_async(move || drop(over));
    last.recv_timeout(timeout) != Err(RecvTimeoutError::Timeout)
}

impl Running {
    /// Stops the interface, on another thread if this one runs an event block.
    fn stop(self, timeout: Duration) -> Result<(), Error> {
        if !inside_event() {
            return self.stop_here(timeout);
        }
        // A waker called us from inside the event block. Waiting for that block here would never
        // end.
        let stop = move || {
            if let Err(error) = self.stop_here(timeout) {
                tracing::warn!(%error, "a vmnet interface did not stop cleanly");
            }
        };
        spawn_detached("vmring-stop", stop)
            .map_err(Error::io("starting the thread that stops the interface"))
    }

    /// Stops the interface on this thread.
    fn stop_here(self, timeout: Duration) -> Result<(), Error> {
        if lock(&self.callback).is_some() {
            // SAFETY: the interface runs: we own the `Running`, which only `StartedInterface::stop`
            // and `drop` take, and they call this once.
            if let Err(status) = unsafe { Callback::clear(self.interface) } {
                tracing::warn!(%status, "vmnet did not turn its events off");
            }
            // Turning events off does not wait for a call that is running.
            if !drained(&self.queue, timeout) {
                tracing::error!(
                    "an event callback does not end; the interface is leaked on purpose"
                );
                forget(self);
                return Err(Error::Timeout(timeout));
            }
        }
        // The handler gets a queue of its own, which no event callback can block.
        let queue = DispatchQueue::new("vmring.stop", None);
        let (answer, answers) = sync_channel(1);
        let handler = RcBlock::new(move |status: u32| {
            let _ = answer.try_send(status);
        });
        // SAFETY: the interface runs, and nobody else uses it: we own the `Running`, so no borrow
        // of its `StartedInterface` is left. This function keeps handler and queue until the
        // handler has returned, or leaks them.
        let accepted = check(unsafe { vmnet_stop_interface(self.interface, &queue, &handler) });
        if let Err(status) = accepted {
            // vmnet.h: the handler is called only after a success. The handle is not consumed.
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
    /// Claims the right to read, which one queue at a time may have. Returns false if another has
    /// it.
    pub(crate) fn claim_reading(&self) -> bool {
        // Acquire: pairs with the Release in `release_reading`. The queue that had the right before
        // has made its last read and cleared its wake before this one sets its own.
        !self.read_taken.swap(true, Ordering::Acquire)
    }

    /// Gives up the right to read. The caller has claimed it and does not read any more.
    pub(crate) fn release_reading(&self) {
        self.events.set_wake(None);
        // Release: pairs with the Acquire in `claim_reading`.
        self.read_taken.store(false, Ordering::Release);
    }
}
