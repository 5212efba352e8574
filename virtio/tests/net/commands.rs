//! The control queue.

use vmring_virtio::net::{Features, QueueSetup};

use crate::driver::Driver;
use crate::net::basics::{one_buffer, pair};
use crate::net::guest::{Guest, Options, driver, interface, layout, poll_both};

struct Controlled {
    guest: Guest,
    control: Driver,
}

fn controlled(network: &str) -> Controlled {
    let mut options = Options::default();
    options.settings.control_queue = true;
    let mut guest = Guest::with(interface(network), &options);
    let accepted = guest.device.accepted_features();
    // Without MQ it is behind the only pair.
    assert_eq!((guest.device.control_index(), guest.device.queue_count()), (2, 3));
    let control = driver(&guest.memory, 2, 64, accepted, 0).with_arena(0x4070_0000);
    guest.device.start_queue(2, QueueSetup::new(layout(2, 64))).unwrap();
    Controlled { guest, control }
}

impl Controlled {
    /// Gives a command in descriptors of these lengths. Returns the used length and the answer.
    fn command(&mut self, bytes: &[u8], lens: &[u32]) -> (u32, u8) {
        let mut shape: Vec<_> = lens.iter().map(|len| (*len, false)).collect();
        shape.push((1, true));
        let head = self.control.post(&shape, None).unwrap();
        let buffers = self.control.buffers(head).to_vec();
        let mut written = 0;
        for buffer in buffers.iter().filter(|buffer| !buffer.writable) {
            let end = written + buffer.len as usize;
            self.control.write(buffer.address, &bytes[written..end]);
            written = end;
        }
        let answer = buffers.last().unwrap().address;
        self.control.write(answer, &[0xff]);
        self.control.expose();
        self.guest.poll();
        let returned = self.control.collect();
        assert_eq!(returned.len(), 1);
        (returned[0].len, self.control.read(answer, 1)[0])
    }
}

#[test]
fn commands_are_answered_with_one_byte() {
    let mut guest = controlled("commands");
    // RX modes and a table of addresses, in the descriptors of Linux: header, data, answer.
    assert_eq!(guest.command(&[0, 0, 1], &[2, 1]), (1, 0));
    assert_eq!(guest.command(&[0, 1, 0], &[2, 1]), (1, 0));
    let table = [&[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 5][..], &[0; 4]].concat();
    assert_eq!(guest.command(&table, &[2, 10, 4]), (1, 0));
    // A MAC address, which is in the configuration space then.
    assert_eq!(guest.command(&[1, 1, 2, 0, 0, 0, 0, 9], &[2, 6]), (1, 0));
    assert_eq!(guest.guest.mac(), [2, 0, 0, 0, 0, 9]);
    for group in [[1, 1, 3, 0, 0, 0, 0, 9], [1, 1, 0, 0, 0, 0, 0, 0]] {
        assert_eq!(guest.command(&group, &[8]), (1, 1));
    }
    // Unknown classes and commands, and what was not offered: VLAN, MQ, offloads.
    for bytes in
        [&[9, 9][..], &[0, 7, 1], &[2, 0, 1, 0], &[4, 0, 1, 0], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    {
        assert_eq!(guest.command(bytes, &[bytes.len() as u32]), (1, 1), "{bytes:?}");
    }
    // Commands that are cut short.
    for bytes in [&[0][..], &[1, 1, 2, 0], &[1, 0, 5, 0, 0, 0]] {
        assert_eq!(guest.command(bytes, &[bytes.len() as u32]), (1, 1), "{bytes:?}");
    }
    let stats = guest.guest.stats();
    assert_eq!((stats.commands, stats.commands_refused), (4, 10));
    // A reset brings the MAC address back.
    let interface_mac = guest.guest.device.interface().mac().into_array();
    assert!(guest.guest.device.reset().is_ready());
    assert_eq!(guest.guest.mac(), interface_mac);
}

#[test]
fn a_command_without_space_for_its_answer_is_returned_empty() {
    let mut guest = controlled("no answer");
    guest.control.post(&[(2, false)], None).unwrap();
    guest.control.expose();
    guest.guest.poll();
    let returned = guest.control.collect();
    assert_eq!((returned.len(), returned[0].len), (1, 0));
}

#[test]
fn a_guest_announces_itself_when_it_is_asked() {
    let mut guest = controlled("guest announces");
    let [_, mut other] = pair("guest announces");
    other.fill(&one_buffer(2048), 4);
    other.poll();
    guest.guest.device.request_announcement();
    assert_eq!(guest.guest.device.config().status, 3);
    assert_eq!(guest.guest.interrupts.config(), 1);
    poll_both(&mut guest.guest, &mut other);
    assert_eq!(other.received().len(), 0, "the guest does it itself");
    assert_eq!(guest.command(&[3, 0], &[2]), (1, 0));
    assert_eq!(guest.guest.device.config().status, 1);
}

#[test]
fn a_guest_without_the_feature_is_announced_by_the_device() {
    let mut options = Options { without: Features::GUEST_ANNOUNCE, ..Options::default() };
    options.settings.control_queue = true;
    let mut guest = Guest::with(interface("device announces"), &options);
    let [_, mut other] = pair("device announces");
    other.fill(&one_buffer(2048), 4);
    other.poll();
    guest.device.request_announcement();
    poll_both(&mut guest, &mut other);
    assert_eq!((other.received().len(), guest.device.config().status), (1, 1));
}
