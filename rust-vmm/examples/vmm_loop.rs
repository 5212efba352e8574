//! The event loop of a small VMM with two guests, whose devices meet on an embedded network. The guests'
//! driver is in here too. Guests send to each other in turns, and what arrives is checked. Linux only,
//! because other systems have no eventfd.

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
use {
    std::{error::Error, os::fd::AsFd, sync::atomic::Ordering, time::Duration},
    vmring_rust_vmm::virtio_queue::{Queue, QueueT, desc::split::Descriptor},
    vmring_rust_vmm::vm_memory::{Bytes, GuestAddress as At, GuestAddressSpace},
    vmring_rust_vmm::vm_memory::{GuestMemoryAtomic, GuestMemoryMmap},
    vmring_rust_vmm::vmm_sys_util::{eventfd::EventFd, poll::PollContext},
    vmring_rust_vmm::vmring::{Embedded, Interface},
    vmring_rust_vmm::{ActiveQueue, VirtioNet, event_interrupt},
};

#[cfg(target_os = "linux")]
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    // The guests' driver makes the only buffer of a queue available once more.
    let post = |guest: &GuestMemoryMmap, base, number: u16, buffer: &[u8], flags| {
        guest.write_slice(buffer, At(base + 0x3000))?;
        guest.write_obj(Descriptor::new(base + 0x3000, buffer.len() as u32, flags, 0), At(base))?;
        guest.store(number + 1, At(base + 0x1002), Ordering::Release)
    };
    let (mut guests, events) = (Vec::new(), PollContext::<u32>::new()?);
    for _ in 0..2 {
        let interface = Interface::builder().device(Embedded::network("vmm loop")).start()?;
        let mut net = VirtioNet::new(interface, Default::default())?;
        let memory =
            GuestMemoryMmap::from_ranges(&[(At(0), 0x2_0000)]).map(GuestMemoryAtomic::new)?;
        let (kick, call, mut queues) = (EventFd::new(0)?, EventFd::new(0)?, Vec::new());
        for (index, base) in [(0, 0), (1, 0x1_0000)] {
            let mut queue = Queue::new(16)?;
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + 0x1000), None);
            queue.set_used_ring_address(Some(base + 0x2000), None);
            queue.set_ready(true);
            queues.push(ActiveQueue::try_from((index, queue, kick.try_clone()?))?);
        }
        net.activate(&memory, event_interrupt([(0, &call)], None)?, 1 << 32, queues)?;
        events.add(&net.device().as_fd(), 0)?;
        events.add(&call, 1)?;
        guests.push((net, memory, kick, call));
    }
    for (number, from, to) in (0..1000).flat_map(|number| [(number, 0, 1), (number, 1, 0)]) {
        // The header of virtio-net, that of Ethernet, and what tells the packets apart.
        let [to_mac, from_mac] = [to, from].map(|guest| [2, 0, 0, 0, 0, guest as u8]);
        let body = u16::to_le_bytes(number).repeat(500);
        let packet = [&[0; 12][..], &to_mac, &from_mac, &[0x88, 0xb5], &body].concat();
        post(&guests[to].1.memory(), 0, number, &[0; 1100], 2)?;
        post(&guests[from].1.memory(), 0x1_0000, number, &packet, 0)?;
        [to, from].iter().try_for_each(|guest| guests[*guest].2.write(1))?;
        while guests[to].3.read().is_err() {
            // A device that is armed has nothing to do now. It wakes the loop when it has.
            let devices = guests.iter_mut().map(|guest| guest.0.device_mut());
            let is_busy = devices.fold(false, |busy, net| busy | (net.poll().again || !net.arm()));
            let timeout = Duration::from_secs(if is_busy { 0 } else { 10 });
            assert!(events.wait_timeout(timeout)?.iter().next().is_some() || is_busy);
        }
        let mut arrived = vec![0; packet.len()];
        guests[to].1.memory().read_slice(&mut arrived, At(0x3000))?;
        assert_eq!(arrived[12..], packet[12..]);
    }
    println!("2000 packets have arrived as they were sent");
    Ok(())
}
