//! [`EventFd`]s as kick and call descriptors. Linux only.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use vmring_virtio::Event;
use vmring_virtio::net::EventInterrupt;

/// The descriptor on which the guest kicks a queue, for [`ActiveQueue::kick`](crate::ActiveQueue::kick).
/// `event` stays the caller's; both are one object. Reads and writes of it do not wait from now on
/// (`O_NONBLOCK`).
///
/// # Errors
///
/// What the system says, or `InvalidInput` if `event` was made of something that is no eventfd.
pub fn kick_event(event: &EventFd) -> io::Result<Arc<Event>> {
    shared(Event::kick(duplicate(event)?)?)
}

/// The descriptor on which a device signals the guest, such as an `irqfd`. As with [`kick_event`],
/// `event` stays the caller's and does not wait from now on.
///
/// # Errors
///
/// As [`kick_event`].
pub fn call_event(event: &EventFd) -> io::Result<Arc<Event>> {
    shared(Event::new(duplicate(event)?)?)
}

/// An [`Interrupt`](vmring_virtio::net::Interrupt) that signals an eventfd for each queue, and one for
/// the configuration space.
///
/// # Errors
///
/// As [`kick_event`].
pub fn event_interrupt<'e>(
    queues: impl IntoIterator<Item = (u16, &'e EventFd)>,
    config: Option<&EventFd>,
) -> io::Result<Arc<EventInterrupt>> {
    let queues: Vec<_> = queues
        .into_iter()
        .map(|(index, event)| Ok((index, call_event(event)?)))
        .collect::<io::Result<_>>()?;
    let count = queues.iter().map(|(index, _)| index.saturating_add(1)).max().unwrap_or(0);
    let interrupt = EventInterrupt::new(count);
    for (index, event) in queues {
        interrupt.set_queue(index, Some(event));
    }
    interrupt.set_config(config.map(call_event).transpose()?);
    Ok(Arc::new(interrupt))
}

fn duplicate(event: &EventFd) -> io::Result<OwnedFd> {
    let duplicate = event.try_clone()?.into_raw_fd();
    // SAFETY: `into_raw_fd` gave the descriptor up, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

fn shared(event: Option<Event>) -> io::Result<Arc<Event>> {
    event.map(Arc::new).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
