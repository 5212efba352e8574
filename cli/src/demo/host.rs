//! A server on the host's side, which a guest reaches by its network's way out.

use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread;

use super::limits::CHUNK;
use crate::stream::Stream;

/// A port of the host's loopback address. The network leads guests to it, at the gateway's address.
#[derive(Clone, Debug)]
pub(crate) struct HostServer {
    listener: Arc<TcpListener>,
    port: u16,
}

impl HostServer {
    pub(crate) fn listen() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        Ok(Self { listener: Arc::new(listener), port })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Sends `bytes` of the stream to the next client, on a thread of its own. A client that goes away
    /// before has its own reason, which it says.
    pub(crate) fn serve(&self, mut stream: Stream, bytes: u64) -> io::Result<()> {
        let listener = self.listener.clone();
        let serve = move || {
            let (mut client, _) = listener.accept()?;
            let (mut left, mut buffer) = (bytes, vec![0; CHUNK]);
            while left > 0 {
                let n = left.min(CHUNK as u64) as usize;
                stream.fill(&mut buffer[..n]);
                client.write_all(&buffer[..n])?;
                left -= n as u64;
            }
            Ok::<_, io::Error>(())
        };
        thread::Builder::new().name("host".to_owned()).spawn(serve).map(drop)
    }
}
