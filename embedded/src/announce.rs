//! Router advertisements that nobody has asked for, to all ports of a network.

use vmring_core::sync::Ordering;

use crate::config::NetworkMode;
use crate::inbox::{Delivery, Refused};
use crate::limits::MAX_PORTS;
use crate::network::{Network, Route};
use crate::packet::{Packet, PacketBuffer};
use crate::policy::{Moment, Way};
use crate::receive_queue::Touched;
use crate::router::DISCOVERY_MAX;

impl<B: PacketBuffer> Network<B> {
    /// Sets whether guests use the gateway as their default router of IPv6, and tells all guests if that
    /// has changed. At first they do not.
    ///
    /// Call it with the answer to whether the host itself has a way to the world over IPv6, and again when
    /// the answer changes. It does nothing on a network without [IPv6](crate::NetworkConfig::ipv6), and on
    /// one in [host mode](NetworkMode::Host), which leads nowhere.
    pub fn set_ipv6_router(&self, is_router: bool) {
        let is_router = is_router && self.config().mode == NetworkMode::Shared;
        if self.gateway().is_some_and(|gateway| gateway.set_ipv6_router(is_router)) {
            self.advertise_ipv6();
        }
    }

    /// Sends a router advertisement to each port whose receiver is open, except the uplink. An
    /// owner with a timer can call it every 200 to 600 seconds (RFC 4861, 6.2.1). A port without a buffer misses it,
    /// which is counted. It does nothing on a network without [IPv6](crate::NetworkConfig::ipv6).
    pub fn advertise_ipv6(&self) {
        let mut frame = [0; DISCOVERY_MAX];
        let written = self.gateway().and_then(|gateway| gateway.router_advertisement(&mut frame));
        let Some(len) = written else { return };
        for index in 0..MAX_PORTS {
            // Acquire: pairs with the Release in `Network::set_open`; the port is ready.
            let is_open = self.open[index / 64].load(Ordering::Acquire) >> (index % 64) & 1 != 0;
            if is_open && !self.is_uplink(index) {
                self.announce(index, Packet::from(&frame[..len]));
            }
        }
    }

    /// Gives a port a frame of the gateway, and wakes its receiver.
    fn announce(&self, index: usize, frame: Packet<'_>) {
        let Some(state) = self.port_state(index) else { return };
        let (missed, route) = (&state.counters.missed, Route::Member(|network| &network.open));
        if state.policy.is_limited(Way::Receive)
            && !state.policy.admits(Way::Receive, 1, frame.len(), Moment::new(self.read_clock()))
        {
            missed.receive_limit.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Some((number, queue)) = state.queues.pick(|| frame.flow(self.flow_key)) else { return };
        match queue.deliver(queue.shape(), frame, || route.holds(self, index)) {
            Delivery::Direct | Delivery::Overflow => {
                let mut touched = Touched::default();
                touched.add(number);
                state.queues.ring(touched.take());
            }
            Delivery::Dropped(Refused::NoBuffer) => {
                missed.no_buffer.fetch_add(1, Ordering::Relaxed);
            }
            // The receiver closes at this moment.
            Delivery::Dropped(_) => {}
        }
    }
}
