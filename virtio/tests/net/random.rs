//! Random guests: random features, chains and interfaces, with stops, pauses, resets and new memory
//! at any moment. Nothing is lost, nothing comes twice, and everything comes in order.

use std::sync::Arc;
use std::task::Poll;

use proptest::prelude::*;
use vmring::device::Capabilities;
use vmring::guest::{GuestMemory, GuestRegion};
use vmring_core::HeapBacking;
use vmring_virtio::net::{Features, QueueSetup};
use vmring_virtio::queue::QueueState;

use crate::net::guest::{Guest, HEADER, Options, driver};
use crate::net::wire::{Control, offloading, wire};
use crate::support::scaled;

/// Where a region may be that no queue is in.
const UNUSED: u64 = 1 << 40;

#[derive(Clone, Debug)]
enum Step {
    /// Sends packets of this length, split at these lengths.
    Send {
        from: usize,
        len: usize,
        split: Vec<u32>,
        count: usize,
        indirect: bool,
    },
    /// Posts buffers of these lengths.
    Post {
        to: usize,
        parts: Vec<u32>,
        count: usize,
        indirect: bool,
    },
    Poll(usize),
    /// Arms, as before a sleep.
    Arm(usize),
    Pause(usize),
    Resume(usize),
    /// Stops a queue, and starts it again when it has stopped.
    Restart(usize, u16),
    /// Sets new memory: the same regions, or one more or less than before.
    Memory(usize, bool),
    /// Resets the device. The driver begins again.
    Reset(usize),
    Enable(usize, u16, bool),
    Link(usize, bool),
    Hold(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0usize..2;
    let split = prop::collection::vec(prop_oneof![1u32..30, 1u32..2000], 1..6);
    // Without mergeable buffers each must have space for a packet, so the last part is large.
    let parts = prop::collection::vec(1u32..600, 0..4).prop_map(|mut parts| {
        parts.push(1600);
        parts
    });
    prop_oneof![
        6 => (who.clone(), 18usize..1515, split, 1usize..40, any::<bool>()).prop_map(
            |(from, len, split, count, indirect)| Step::Send { from, len, split, count, indirect }
        ),
        6 => (who.clone(), parts, 1usize..40, any::<bool>())
            .prop_map(|(to, parts, count, indirect)| Step::Post { to, parts, count, indirect }),
        8 => who.clone().prop_map(Step::Poll),
        2 => who.clone().prop_map(Step::Arm),
        1 => who.clone().prop_map(Step::Pause),
        2 => who.clone().prop_map(Step::Resume),
        2 => (who.clone(), 0u16..2).prop_map(|(who, queue)| Step::Restart(who, queue)),
        1 => (who.clone(), any::<bool>()).prop_map(|(who, other)| Step::Memory(who, other)),
        1 => who.clone().prop_map(Step::Reset),
        1 => (who.clone(), 0u16..2, any::<bool>())
            .prop_map(|(who, queue, on)| Step::Enable(who, queue, on)),
        1 => (who, any::<bool>()).prop_map(|(who, up)| Step::Link(who, up)),
        1 => any::<bool>().prop_map(Step::Hold),
    ]
}

/// The features that a driver does not accept.
fn without() -> impl Strategy<Value = Features> {
    any::<[bool; 5]>().prop_map(|[event, order, indirect, merging, undone]| {
        Features::NONE
            .with_if(event, Features::EVENT_IDX)
            .with_if(order, Features::IN_ORDER)
            .with_if(indirect, Features::INDIRECT_DESC)
            .with_if(merging, Features::MRG_RXBUF)
            .with_if(undone, Features::GUEST_OFFLOADS)
    })
}

/// Interfaces that differ in who copies what.
const INTERFACES: [fn(&mut Capabilities); 5] = [
    |_| {},
    |caps| (caps.read_segments, caps.write_segments) = (256, 256),
    |caps| (caps.read_segments, caps.write_segments) = (2, 2),
    |caps| {
        (caps.read_segments, caps.write_segments) = (256, 256);
        caps.merges_reads = true;
    },
    |caps| {
        offloading(caps);
        // `MRG_RXBUF` without merging: the device spreads packets itself.
        caps.merges_reads = false;
    },
];

struct World {
    guests: [Guest; 2],
    accepted: [Features; 2],
    control: Control,
    /// What was sent by each, in order, and how much of it was received by the other.
    sent: [Vec<Vec<u8>>; 2],
    /// Where in `sent` the last one that was received is, and how many were.
    matched: [usize; 2],
    received: [usize; 2],
    /// The packets of each that its device had not taken when it was reset.
    forgotten: [usize; 2],
    /// Queues that are being stopped.
    stopping: Vec<(usize, u16)>,
    /// The size of the queues, and where they begin.
    size: u16,
    base: u16,
}

impl World {
    fn poll(&mut self, who: usize) {
        self.guests[who].poll();
        let stopping = std::mem::take(&mut self.stopping);
        for (guest, queue) in stopping {
            self.stop(guest, queue);
        }
        self.collect();
    }

    fn stop(&mut self, who: usize, index: u16) {
        if self.stopping.contains(&(who, index)) {
            return;
        }
        let guest = &mut self.guests[who];
        match guest.device.stop_queue(index) {
            Poll::Pending => self.stopping.push((who, index)),
            Poll::Ready(state) => {
                let state: QueueState = state.expect("it runs");
                let driver = if index == 0 { &guest.rx } else { &guest.tx };
                assert_eq!(state.next_available, state.next_used);
                assert_eq!(state.next_used, driver.used_index());
                let mut setup = QueueSetup::new(driver.layout());
                setup.state = state;
                guest.device.start_queue(index, setup).expect("it starts again");
            }
        }
    }

    /// Takes what has arrived, and sees that it comes in order.
    fn collect(&mut self) {
        for who in [0, 1] {
            let from = 1 - who;
            let merging = self.accepted[who].has(Features::MRG_RXBUF);
            let mut returned = self.guests[who].returned().into_iter();
            while let Some((len, mut packet)) = returned.next() {
                assert!(len as usize >= HEADER, "every buffer is large enough");
                let count = u16::from_le_bytes([packet[10], packet[11]]);
                assert!(count >= 1 && (merging || count == 1), "{count}");
                assert_eq!(packet[..10], [0; 10]);
                for _ in 1..count {
                    packet.extend(returned.next().expect("the parts come together").1);
                }
                packet.drain(..HEADER);
                let sent = &self.sent[from][self.matched[who]..];
                let place = sent.iter().position(|one| *one == packet);
                self.matched[who] += 1 + place.expect("it was sent, and not received before");
                self.received[who] += 1;
            }
            self.guests[who].tx.collect();
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Send { from, len, split, count, indirect } => {
                let to = self.guests[1 - from].mac();
                let indirect = self.indirect(from, indirect);
                for _ in 0..count {
                    let number = self.sent[from].len() as u32;
                    let packet = self.guests[from].frame_to(to, len, number);
                    if !self.guests[from].send_in(&packet, &split, indirect) {
                        break;
                    }
                    self.sent[from].push(packet);
                }
            }
            Step::Post { to, parts, count, indirect } => {
                let indirect = self.indirect(to, indirect);
                self.post(to, &parts, count, indirect);
            }
            Step::Poll(who) => self.poll(who),
            Step::Arm(who) => {
                let _ = self.guests[who].device.arm();
            }
            Step::Pause(who) => {
                if self.guests[who].device.pause().is_ready() {
                    for (_, state) in self.guests[who].device.queue_states() {
                        assert_eq!(state.next_available, state.next_used);
                    }
                }
            }
            Step::Resume(who) => self.guests[who].device.resume(),
            Step::Restart(who, queue) => self.stop(who, queue),
            Step::Memory(who, other) => {
                if other {
                    self.change_memory(who);
                }
                let memory = self.guests[who].memory.clone();
                let result = self.guests[who].device.set_memory(&memory);
                assert!(!matches!(result, Poll::Ready(Err(_))));
                if result.is_pending() {
                    // It is begun again until it is done, as a front end's message is.
                    self.control.hold(false);
                    let done = (0..10).any(|_| {
                        self.guests[who].poll();
                        self.guests[who].device.set_memory(&memory).is_ready()
                    });
                    assert!(done, "nothing holds it up");
                }
            }
            Step::Reset(who) => self.reset(who),
            Step::Enable(who, queue, on) => self.guests[who].device.enable_queue(queue, on),
            Step::Link(who, up) => self.guests[who].device.set_link(up),
            Step::Hold(on) => self.control.hold(on),
        }
    }

    /// Adds a region that nothing uses, or takes it away again.
    fn change_memory(&mut self, who: usize) {
        let memory = &mut self.guests[who].memory;
        let unused = GuestRegion::new(UNUSED, Arc::new(HeapBacking::new(4096)));
        let regions = memory.regions().iter().cloned();
        let others = regions.filter(|region| region.guest_address() != UNUSED);
        let is_there = others.clone().count() < memory.regions().len();
        let all = others.chain((!is_there).then_some(unused)).collect::<Vec<_>>();
        *memory = GuestMemory::new(all).expect("the regions are apart");
    }

    fn reset(&mut self, who: usize) {
        self.control.hold(false);
        let done = (0..10).any(|_| {
            self.poll(who);
            self.guests[who].device.reset().is_ready()
        });
        assert!(done, "nothing holds it up");
        self.collect();
        self.stopping.retain(|(guest, _)| *guest != who);
        let guest = &mut self.guests[who];
        self.forgotten[who] += guest.tx.outstanding();
        guest.device.set_features(self.accepted[who]).expect("they were accepted before");
        assert!(matches!(guest.device.set_memory(&guest.memory), Poll::Ready(Ok(()))));
        let begin = |index| driver(&guest.memory, index, self.size, self.accepted[who], self.base);
        (guest.rx, guest.tx) = (begin(0), begin(1));
        guest.start(self.base);
    }

    fn indirect(&self, who: usize, wanted: bool) -> Option<usize> {
        (wanted && self.accepted[who].has(Features::INDIRECT_DESC)).then_some(0)
    }

    fn post(&mut self, to: usize, parts: &[u32], count: usize, indirect: Option<usize>) {
        let shape: Vec<_> = parts.iter().map(|len| (*len, true)).collect();
        let rx = &mut self.guests[to].rx;
        for _ in 0..count {
            if rx.post(&shape, indirect).is_none() {
                break;
            }
        }
        rx.expose();
    }

    /// Lets everything arrive.
    fn end(&mut self) {
        self.control.hold(false);
        for round in 0.. {
            for who in [0, 1] {
                let device = &mut self.guests[who].device;
                device.resume();
                device.set_link(true);
                device.enable_queue(0, true);
                device.enable_queue(1, true);
                self.post(who, &[1600], 64, None);
                self.poll(who);
                self.poll(1 - who);
            }
            let done = [0, 1].iter().all(|who| {
                let dropped = self.guests[1 - who].stats().tx_disabled as usize;
                let discarded = self.guests[*who].stats().rx_discarded as usize;
                let lost = dropped + discarded + self.forgotten[1 - who];
                self.received[*who] + lost >= self.sent[1 - who].len()
            });
            if done && round > 1 {
                break;
            }
            assert!(round < 100, "{:?} of {:?}", self.received, self.sent.each_ref().map(Vec::len));
        }
        for (who, guest) in self.guests.iter_mut().enumerate() {
            let stats = guest.stats();
            let bad = [stats.broken_chains, stats.rx_too_small, stats.rx_useless, stats.tx_errors];
            assert_eq!(bad, [0; 4]);
            assert_eq!(stats.rx_packets as usize, self.received[who]);
            assert!(guest.device.arm() || guest.device.arm(), "it sleeps in the end");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(scaled(200) as u32))]

    #[test]
    fn nothing_is_lost_and_everything_is_in_order(
        interface in 0..INTERFACES.len(),
        size in prop::sample::select(vec![8u16, 64, 256]),
        depth in prop::sample::select(vec![1u32, 4, 64, 256]),
        budget in prop::sample::select(vec![1u16, 7, 256]),
        base in prop::sample::select(vec![0u16, 0xfff0]),
        without in [without(), without()],
        reverses in any::<bool>(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let (interfaces, control) = wire(INTERFACES[interface]);
        if reverses {
            control.reverse();
        }
        let mut each = without.into_iter();
        let guests = interfaces.map(|interface| {
            let without = each.next().expect("two");
            let mut options = Options { size, base, without, ..Options::default() };
            (options.settings.depth, options.settings.budget) = (depth, budget);
            Guest::with(interface, &options)
        });
        let accepted = guests.each_ref().map(|guest| guest.device.accepted_features());
        let mut world = World {
            guests,
            accepted,
            control,
            sent: Default::default(),
            matched: [0; 2],
            received: [0; 2],
            forgotten: [0; 2],
            stopping: Vec::new(),
            size,
            base,
        };
        for step in steps {
            world.step(step);
        }
        world.end();
    }
}
