//! What the loads on the way out share: a host, the world outside, and what the process of the network has.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::world::World;
use crate::{MEMORY_SLACK, Sample};

/// Samples of a process, in two halves of a run. What it has in the second half is to be no more than what
/// it has in the first one.
#[derive(Default)]
pub(crate) struct Halves([Sample; 2]);

impl Halves {
    /// Takes samples until the end of a run, and says every ten seconds what is there.
    pub(crate) fn watch(
        &mut self,
        time: Duration,
        sample: impl Fn() -> Sample,
        mut say: impl FnMut() -> String,
    ) {
        let (start, mut said) = (Instant::now(), 0);
        while start.elapsed() < time {
            thread::sleep(Duration::from_millis(200).min(time));
            let now = sample();
            let half = usize::from(start.elapsed() > time / 2);
            self.0[half] = self.0[half].max(now);
            if start.elapsed().as_secs() >= said + 10 {
                said = start.elapsed().as_secs();
                println!("{said:4} s: {now}; {}", say());
            }
        }
    }

    /// Adds a sample to one half.
    pub(crate) fn add(&mut self, second: bool, sample: Sample) {
        let half = &mut self.0[usize::from(second)];
        *half = half.max(sample);
    }

    /// Whether the process has not grown from one half to the other.
    pub(crate) fn are_flat(&self) -> bool {
        let [first, second] = &self.0;
        println!("first half at most: {first}; second half: {second}");
        second.memory <= first.memory + MEMORY_SLACK && second.descriptors <= first.descriptors + 64
    }
}

/// Accepts connections at a port of these addresses outside, and serves each on a thread of its own. The
/// threads end with the process.
pub(crate) fn serve_outside(
    world: &World,
    addresses: &[String],
    port: u16,
    serve: impl Fn(TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
) {
    let serve = Arc::new(serve);
    for address in addresses {
        let at = format!("{address}:{port}");
        let listener = world.outside.run(move || TcpListener::bind(at).expect("its port"));
        let serve = serve.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let serve = serve.clone();
                // A client that goes away in the middle is no fault of the server's.
                thread::spawn(move || serve(stream?));
            }
        });
    }
}

/// Tells threads that they end.
#[derive(Clone, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn tell(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.0
    }

    pub(crate) fn is_told(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
