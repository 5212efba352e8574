//! Random work against a plain model: what a driver posts comes out as it was written, and comes back
//! once, in order, with its length; kicks and interrupts are those that the specification demands.

use proptest::prelude::*;
use vmring_core::guest::GuestFault;
use vmring_virtio::queue::{self, AddressSpace, ChainError, Queue, QueueFeatures, QueueState};

use crate::driver::{Buffer, Descriptor, Driver, INDIRECT, NEXT, Setup, shapes};
use crate::queue::{bytes_of, cut, fill, segments};

#[derive(Clone, Debug)]
enum Op {
    Post {
        readable: Vec<u32>,
        writable: Vec<u32>,
        indirect: Option<usize>,
    },
    PostShape(prop::sample::Index),
    PostBroken(Break),
    Expose,
    Fetch(u16),
    /// How many, and how much of each chain's room is written: so many 255ths.
    Pop(u16, u8),
    /// The same for single buffers. The last one is left in the queue if so.
    PopSingles(u16, u8, bool),
    Unpop(prop::sample::Index),
    Push(prop::sample::Index),
    /// The same, all at once.
    PushAll(prop::sample::Index),
    Flush,
    AskForInterrupt,
    Collect,
    /// The driver wants an interrupt at its next index plus this, or none (or any) if that is odd.
    Want(u16),
    EnableNotifications,
    DisableNotifications,
    /// Another queue goes on, after this one gave everything up or not.
    Succeed {
        orderly: bool,
    },
    SetMemory,
}

#[derive(Clone, Copy, Debug)]
enum Break {
    Empty,
    Fault,
    Cycle,
    IndirectWithNext,
}

fn op() -> impl Strategy<Value = Op> {
    let lens = |most| prop::collection::vec(1_u32..3000, 0..most);
    let chain = (lens(5), lens(5), prop::option::of(0_usize..4));
    let broken = prop_oneof![
        Just(Break::Empty),
        Just(Break::Fault),
        Just(Break::Cycle),
        Just(Break::IndirectWithNext),
    ];
    prop_oneof![
        8 => chain.prop_map(|(readable, writable, indirect)| {
            Op::Post { readable, writable, indirect }
        }),
        4 => any::<prop::sample::Index>().prop_map(Op::PostShape),
        2 => broken.prop_map(Op::PostBroken),
        8 => Just(Op::Expose),
        8 => (0_u16..40).prop_map(Op::Fetch),
        8 => (1_u16..40, any::<u8>()).prop_map(|(count, part)| Op::Pop(count, part)),
        8 => (1_u16..40, any::<u8>(), any::<bool>())
            .prop_map(|(count, part, leaves)| Op::PopSingles(count, part, leaves)),
        2 => any::<prop::sample::Index>().prop_map(Op::Unpop),
        5 => any::<prop::sample::Index>().prop_map(Op::Push),
        5 => any::<prop::sample::Index>().prop_map(Op::PushAll),
        6 => Just(Op::Flush),
        4 => Just(Op::AskForInterrupt),
        6 => Just(Op::Collect),
        3 => (0_u16..12).prop_map(Op::Want),
        3 => Just(Op::EnableNotifications),
        2 => Just(Op::DisableNotifications),
        1 => any::<bool>().prop_map(|orderly| Op::Succeed { orderly }),
        1 => Just(Op::SetMemory),
    ]
}

fn setup() -> impl Strategy<Value = Setup> {
    let arena = prop_oneof![Just(vec![0x8_0000]), Just(vec![5003; 100]), Just(vec![997; 400]),];
    let base = prop_oneof![Just(0), 65400_u16..=65535, any::<u16>()];
    (0_u32..7, base, any::<[bool; 4]>(), arena).prop_map(
        |(shift, base, [event_idx, indirect, in_order, front_end], arena)| Setup {
            features: QueueFeatures { event_idx, indirect, in_order },
            addresses: if front_end { AddressSpace::FrontEnd } else { AddressSpace::Guest },
            base,
            arena,
            ..Setup::of(1 << shift)
        },
    )
}

/// A chain that was posted.
struct Chain {
    head: u16,
    broken: Option<ChainError>,
    buffers: Vec<Buffer>,
    is_indirect: bool,
    /// How many bytes the device has written.
    written: u64,
}

impl Chain {
    /// Checks what was popped, and writes a part of its room, so many 255ths.
    fn serve(&mut self, driver: &Driver, popped: &queue::Chain<'_>, number: u8, part: u8) {
        assert_eq!(self.broken, None);
        assert_eq!(segments(popped), cut(driver, &self.buffers));
        assert!(bytes_of(popped).iter().all(|byte| *byte == number));
        self.written = popped.writable_len() * u64::from(part) / 255;
        fill(popped, !number, self.written);
    }
}

/// All counts are of chains since the beginning.
struct Model {
    driver: Driver,
    queue: Queue,
    features: QueueFeatures,
    base: u16,
    chains: Vec<Chain>,
    exposed: usize,
    fetched: usize,
    popped: usize,
    pushed: usize,
    published: usize,
    collected: usize,
    /// Up to where the device looked at the driver's wish, and whether it knows that.
    signalled: usize,
    signalled_is_known: bool,
    used_event: u16,
    no_interrupt: bool,
    /// Up to where the driver looked at the device's wish.
    kicked: usize,
    available_event: u16,
    wants_kicks: bool,
}

impl Model {
    fn new(setup: &Setup) -> Self {
        let driver = Driver::new(setup);
        Self {
            queue: driver.device(),
            driver,
            features: setup.features,
            base: setup.base,
            chains: Vec::new(),
            exposed: 0,
            fetched: 0,
            popped: 0,
            pushed: 0,
            published: 0,
            collected: 0,
            signalled: 0,
            signalled_is_known: false,
            used_event: 0,
            no_interrupt: false,
            kicked: 0,
            available_event: setup.base,
            wants_kicks: true,
        }
    }

    fn index(&self, count: usize) -> u16 {
        self.base.wrapping_add(count as u16)
    }

    /// Whether one of the indices from `old` to `new` is `event`.
    fn passed(&self, event: u16, old: usize, new: usize) -> bool {
        (old..new).any(|count| self.index(count) == event)
    }

    fn outstanding(&self) -> usize {
        self.chains[self.pushed..self.popped].iter().filter(|c| c.broken.is_none()).count()
    }

    /// Broken chains come back by themselves.
    fn return_broken(&mut self) {
        while self.pushed < self.popped && self.chains[self.pushed].broken.is_some() {
            self.pushed += 1;
        }
    }

    fn post(&mut self, shape: &[(u32, bool)], indirect: Option<usize>, broken: Option<Break>) {
        if shape.is_empty() {
            return;
        }
        let indirect = indirect.filter(|direct| self.features.indirect && *direct < shape.len());
        let Some(head) = self.driver.post(shape, indirect) else { return };
        let byte = self.chains.len() as u8;
        let buffers = self.driver.buffers(head).to_vec();
        for buffer in buffers.iter().filter(|buffer| !buffer.writable) {
            self.driver.write(buffer.address, &vec![byte; buffer.len as usize]);
        }
        let broken = broken.map(|broken| {
            let Buffer { address, len, .. } = buffers[0];
            let (address, len, flags, error) = match broken {
                Break::Empty => (address, 0, 0, ChainError::EmptyDescriptor),
                Break::Fault => (8, 1, 0, ChainError::Fault(GuestFault { address: 8 })),
                Break::Cycle => (address, len, NEXT, ChainError::Cyclic),
                Break::IndirectWithNext if self.features.indirect => {
                    (address, 16, INDIRECT | NEXT, ChainError::IndirectWithNext)
                }
                Break::IndirectWithNext => {
                    (address, 16, INDIRECT, ChainError::IndirectNotNegotiated)
                }
            };
            self.driver.set_descriptor(head, Descriptor { address, len, flags, next: head });
            error
        });
        let is_indirect = indirect.is_some();
        self.chains.push(Chain { head, broken, buffers, is_indirect, written: 0 });
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Post { readable, writable, indirect } => {
                let readable = readable.iter().map(|len| (*len, false));
                let shape: Vec<_> =
                    readable.chain(writable.iter().map(|len| (*len, true))).collect();
                self.post(&shape, *indirect, None);
            }
            Op::PostShape(index) => {
                let all = shapes::all();
                let shape = index.get(&all);
                self.post(&shape.buffers, shape.indirect, None);
            }
            Op::PostBroken(broken) => self.post(&[(9, false)], None, Some(*broken)),
            Op::Expose => {
                self.driver.expose();
                self.exposed = self.chains.len();
                let wanted = match self.features.event_idx {
                    true => self.passed(self.available_event, self.kicked, self.exposed),
                    false => self.wants_kicks && self.exposed > self.kicked,
                };
                assert_eq!(self.driver.needs_kick(), wanted);
                self.kicked = self.exposed;
            }
            Op::Fetch(most) => {
                let most = usize::from(*most);
                if self.fetched == self.popped {
                    self.fetched += most.min(self.exposed - self.fetched);
                }
                let ready = most.min(self.fetched - self.popped);
                assert_eq!(self.queue.fetch(most as u16), Ok(ready as u16));
            }
            Op::Pop(count, part) => (0..*count).for_each(|_| self.pop(*part)),
            Op::PopSingles(count, part, leaves) => self.pop_singles(*count, *part, *leaves),
            Op::Unpop(index) => {
                let count = index.index(self.outstanding() + 1);
                self.queue.unpop(count as u16);
                let kept = self.outstanding() - count;
                while self.outstanding() > kept {
                    self.popped -= 1;
                }
            }
            Op::Push(index) => {
                for _ in 0..index.index(self.outstanding() + 1) {
                    self.queue.push(self.chains[self.pushed].written as u32);
                    self.pushed += 1;
                    self.return_broken();
                }
            }
            Op::PushAll(index) => {
                let count = index.index(self.outstanding() + 1);
                let popped = &self.chains[self.pushed..self.popped];
                let whole = popped.iter().filter(|chain| chain.broken.is_none());
                let lens: Vec<_> = whole.map(|chain| chain.written as u32).take(count).collect();
                self.queue.push_all(&lens);
                for _ in lens {
                    self.pushed += 1;
                    self.return_broken();
                }
            }
            Op::Flush => {
                self.queue.flush();
                self.published = self.pushed;
            }
            Op::AskForInterrupt => {
                let (old, new) = (self.signalled, self.published);
                let wanted = match self.features.event_idx {
                    _ if new == old => false,
                    true => !self.signalled_is_known || self.passed(self.used_event, old, new),
                    false => !self.no_interrupt,
                };
                assert_eq!(self.queue.needs_interrupt(), wanted);
                self.signalled_is_known |= new > old;
                self.signalled = new;
            }
            Op::Collect => self.collect(),
            Op::Want(ahead) => {
                self.used_event = self.index(self.collected).wrapping_add(*ahead);
                self.no_interrupt = ahead % 2 == 1;
                self.driver.set_used_event(self.used_event);
                self.driver.set_no_interrupt(self.no_interrupt && !self.features.event_idx);
            }
            Op::EnableNotifications => {
                self.available_event = self.index(self.fetched);
                self.wants_kicks = true;
                let more = self.exposed > self.popped;
                assert_eq!(self.queue.enable_notifications(), more);
            }
            Op::DisableNotifications => {
                self.queue.disable_notifications();
                self.wants_kicks = false;
            }
            Op::Succeed { orderly } => self.succeed(*orderly),
            Op::SetMemory => {
                self.queue.set_memory(self.driver.memory().clone()).expect("the rings are there");
            }
        }
        assert_eq!(usize::from(self.queue.outstanding()), self.outstanding());
        assert_eq!(self.driver.used_index(), self.index(self.published));
    }

    fn pop(&mut self, part: u8) {
        let Some(popped) = self.queue.pop() else {
            return assert_eq!(self.popped, self.fetched);
        };
        assert!(self.popped < self.fetched);
        let number = self.popped as u8;
        let expected = &mut self.chains[self.popped];
        match popped {
            Ok(chain) => expected.serve(&self.driver, &chain, number, part),
            Err(error) => assert_eq!(Some(error), expected.broken),
        }
        self.popped += 1;
        self.return_broken();
    }

    fn pop_singles(&mut self, most: u16, part: u8, leaves_last: bool) {
        let Self { queue, driver, chains, .. } = self;
        let (mut popped, mut has_left) = (self.popped, false);
        let count = queue.pop_singles(most, |single| {
            assert!(popped < self.fetched && !has_left);
            has_left = leaves_last && popped + 1 == self.fetched;
            if !has_left {
                let chain = single.chain();
                assert_eq!(single.readable().is_some(), chain.readable_len() > 0);
                assert_eq!(single.writable().is_some(), chain.writable_len() > 0);
                chains[popped].serve(driver, &chain, popped as u8, part);
                popped += 1;
            }
            !has_left
        });
        assert_eq!(popped - self.popped, usize::from(count));
        // It may end early, but it begins if it can.
        if count == 0 && !has_left && self.popped < self.fetched {
            let next = &chains[popped];
            let is_single = next.broken.is_none() && cut(driver, &next.buffers).len() == 1;
            assert!(!is_single || next.is_indirect);
        }
        self.popped = popped;
    }

    fn collect(&mut self) {
        for (n, returned) in self.driver.collect().into_iter().enumerate() {
            let number = self.collected + n;
            let chain = &self.chains[number];
            let len = if chain.broken.is_some() { 0 } else { chain.written };
            assert_eq!((returned.head, u64::from(returned.len)), (chain.head, len));
            let writable = chain.buffers.iter().filter(|buffer| buffer.writable);
            let got: Vec<u8> = writable.flat_map(|b| self.driver.read(b.address, b.len)).collect();
            // The driver's next chain may have the same memory, but none was posted yet.
            assert!(got[..len as usize].iter().all(|byte| *byte == !(number as u8)));
        }
        self.collected = self.published;
    }

    fn succeed(&mut self, orderly: bool) {
        if orderly {
            self.queue.unpop(self.queue.outstanding());
            self.queue.flush();
            (self.popped, self.published) = (self.pushed, self.pushed);
        }
        let state = self.queue.state();
        let (next_available, next_used) = (self.index(self.popped), self.index(self.published));
        assert_eq!(state, QueueState { next_available, next_used });
        self.queue = self.driver.device_at(state).expect("it is the driver's");
        for count in [&mut self.fetched, &mut self.popped, &mut self.pushed, &mut self.signalled] {
            *count = self.published;
        }
        self.signalled_is_known = false;
        self.wants_kicks = true;
        self.available_event = self.index(self.published);
    }

    /// Everything that was posted comes back.
    fn end(mut self) {
        self.run(&Op::Expose);
        while self.collected < self.chains.len() {
            self.run(&Op::Fetch(7));
            self.run(&Op::Pop(7, 200));
            while self.outstanding() > 0 {
                self.queue.push(self.chains[self.pushed].written as u32);
                self.pushed += 1;
                self.return_broken();
            }
            self.run(&Op::Flush);
            self.run(&Op::AskForInterrupt);
            self.run(&Op::Collect);
        }
        assert!(!self.queue.enable_notifications());
        assert_eq!(self.driver.free(), usize::from(self.queue.layout().size as u16));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4000, ..ProptestConfig::default() })]
    #[test]
    fn a_queue_keeps_its_contracts(
        setup in setup(),
        ops in prop::collection::vec(op(), 0..150),
    ) {
        let mut model = Model::new(&setup);
        for op in &ops {
            model.run(op);
        }
        model.end();
    }
}
