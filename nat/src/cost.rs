//! What the translator's calls cost, by a table of prices.
//!
//! A frame of one guest can cost a hundred times as much as another's: a SYN opens a socket, and an
//! acknowledgment is a look at a table. So the translator's time is shared out by cost and not by frames
//! ([`turns`](crate::turns)). The cost is counted and not measured, because a clock counts what other
//! threads do too, and takes a call of its own.
//!
//! One unit is about 100 ns on a machine of 2023. Only the ratios of the prices matter.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};

use crate::limits::{
    BYTES_PER_UNIT, COST_CALL, COST_DATAGRAM, COST_DATAGRAM_SOCKET, COST_FRAME, COST_HOST_LOOK,
    COST_STREAM_CALL, COST_TCP_SOCKET,
};
use crate::sockets::{
    Capabilities, ConnectOptions, DatagramError, Incoming, Outgoing, Route, SendSpace, SocketError,
    Sockets, Token,
};

/// Sockets, and what the calls on them have cost.
#[derive(Debug)]
pub(crate) struct Metered<S> {
    pub(crate) sockets: S,
    /// In units. It wraps after some thousand years.
    pub(crate) spent: u64,
}

/// What a frame of so many bytes for a guest costs.
pub(crate) fn frame(len: usize) -> u64 {
    COST_FRAME + bytes(len)
}

/// What it costs to copy so many bytes.
fn bytes(len: usize) -> u64 {
    len as u64 / BYTES_PER_UNIT
}

fn len_of(parts: &[IoSlice<'_>]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

impl<S> Metered<S> {
    pub(crate) fn new(sockets: S) -> Self {
        Self { sockets, spent: 0 }
    }

    fn pay(&mut self, cost: u64) {
        self.spent = self.spent.wrapping_add(cost);
    }
}

/// A socket is paid for when it is opened, with its end. Dropping it makes no call here.
impl<S: Sockets> Sockets for Metered<S> {
    type Socket = S::Socket;

    fn capabilities(&self) -> Capabilities {
        self.sockets.capabilities()
    }

    fn host_addresses(&mut self) -> Result<Vec<IpAddr>, SocketError> {
        self.pay(COST_HOST_LOOK);
        self.sockets.host_addresses()
    }

    fn resolvers(&mut self) -> Result<Option<Vec<SocketAddr>>, SocketError> {
        self.pay(COST_HOST_LOOK);
        self.sockets.resolvers()
    }

    fn connect_tcp(
        &mut self,
        to: SocketAddr,
        options: &ConnectOptions,
        token: Token,
    ) -> Result<S::Socket, SocketError> {
        self.pay(COST_TCP_SOCKET);
        self.sockets.connect_tcp(to, options, token)
    }

    fn adopt_tcp(&mut self, socket: &S::Socket, token: Token) -> Result<(), SocketError> {
        self.pay(COST_TCP_SOCKET);
        self.sockets.adopt_tcp(socket, token)
    }

    fn take_error(&mut self, socket: &S::Socket) -> Result<(), SocketError> {
        self.pay(COST_CALL);
        self.sockets.take_error(socket)
    }

    fn set_peek_offset(&mut self, socket: &S::Socket, offset: u32) -> Result<(), SocketError> {
        self.pay(COST_CALL);
        self.sockets.set_peek_offset(socket, offset)
    }

    fn peek(
        &mut self,
        socket: &S::Socket,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError> {
        let peeked = self.sockets.peek(socket, into);
        self.pay(COST_CALL + bytes(*peeked.as_ref().unwrap_or(&0)));
        peeked
    }

    fn discard(&mut self, socket: &S::Socket, len: u32) -> Result<(), SocketError> {
        // It copies nothing, but the peer is sent its window.
        self.pay(COST_CALL);
        self.sockets.discard(socket, len)
    }

    fn receive(
        &mut self,
        socket: &S::Socket,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<usize, SocketError> {
        let received = self.sockets.receive(socket, into);
        self.pay(COST_CALL + bytes(*received.as_ref().unwrap_or(&0)));
        received
    }

    fn send(&mut self, socket: &S::Socket, from: &[IoSlice<'_>]) -> Result<usize, SocketError> {
        let sent = self.sockets.send(socket, from);
        self.pay(COST_STREAM_CALL + bytes(*sent.as_ref().unwrap_or(&0)));
        sent
    }

    fn shutdown(&mut self, socket: &S::Socket) -> Result<(), SocketError> {
        self.pay(COST_STREAM_CALL);
        self.sockets.shutdown(socket)
    }

    fn keep_alive(&mut self, socket: &S::Socket) {
        self.pay(4 * COST_CALL);
        self.sockets.keep_alive(socket);
    }

    fn reset(&mut self, socket: S::Socket) {
        self.pay(COST_CALL);
        self.sockets.reset(socket);
    }

    fn send_space(&mut self, socket: &S::Socket) -> Result<SendSpace, SocketError> {
        self.pay(COST_CALL);
        self.sockets.send_space(socket)
    }

    fn arm_writable(&mut self, socket: &S::Socket, token: Token) -> Result<(), SocketError> {
        self.pay(COST_CALL);
        self.sockets.arm_writable(socket, token)
    }

    fn local_address(&mut self, socket: &S::Socket) -> Result<SocketAddr, SocketError> {
        self.pay(COST_CALL);
        self.sockets.local_address(socket)
    }

    fn connect_udp(
        &mut self,
        port: u16,
        to: SocketAddr,
        token: Token,
    ) -> Result<S::Socket, SocketError> {
        self.pay(COST_DATAGRAM_SOCKET);
        self.sockets.connect_udp(port, to, token)
    }

    fn bind_udp(&mut self, at: SocketAddr, token: Token) -> Result<S::Socket, SocketError> {
        self.pay(COST_DATAGRAM_SOCKET);
        self.sockets.bind_udp(at, token)
    }

    fn connect_echo(&mut self, to: IpAddr, token: Token) -> Result<S::Socket, SocketError> {
        self.pay(COST_DATAGRAM_SOCKET);
        self.sockets.connect_echo(to, token)
    }

    fn set_datagram_buffers(&mut self, socket: &S::Socket, len: u32) {
        self.pay(2 * COST_CALL);
        self.sockets.set_datagram_buffers(socket, len);
    }

    fn set_ip_fields(&mut self, socket: &S::Socket, v4: bool, hop_limit: u8, dscp: u8) {
        self.pay(2 * COST_CALL);
        self.sockets.set_ip_fields(socket, v4, hop_limit, dscp);
    }

    fn send_datagrams(
        &mut self,
        socket: &S::Socket,
        route: Option<Route>,
        batch: &[Outgoing<'_>],
    ) -> Result<usize, SocketError> {
        let sent = self.sockets.send_datagrams(socket, route, batch);
        // A call that fails has sent its first message in vain.
        let sent_or_lost = sent.as_ref().map_or(1, |sent| (*sent).max(1));
        let len = batch.iter().take(sent_or_lost).map(|message| len_of(message.parts)).sum();
        self.pay(COST_CALL + COST_DATAGRAM * sent_or_lost as u64 + bytes(len));
        sent
    }

    fn receive_datagrams(
        &mut self,
        socket: &S::Socket,
        into: &mut [u8],
        stride: usize,
        found: &mut [Incoming],
    ) -> Result<usize, SocketError> {
        let received = self.sockets.receive_datagrams(socket, into, stride, found);
        let messages = &found[..received.as_ref().map_or(0, |count| (*count).min(found.len()))];
        let len = messages.iter().map(|message| message.len).sum();
        self.pay(COST_CALL + COST_CALL * messages.len() as u64 + bytes(len));
        received
    }

    fn take_datagram_error(
        &mut self,
        socket: &S::Socket,
        quoted: &mut [u8],
    ) -> Result<Option<DatagramError>, SocketError> {
        self.pay(COST_CALL);
        self.sockets.take_datagram_error(socket, quoted)
    }

    fn listen(
        &mut self,
        at: SocketAddr,
        backlog: u32,
        token: Token,
    ) -> Result<S::Socket, SocketError> {
        self.pay(COST_TCP_SOCKET);
        self.sockets.listen(at, backlog, token)
    }

    fn accept(&mut self, listener: &S::Socket) -> Result<(S::Socket, SocketAddr), SocketError> {
        self.pay(COST_CALL);
        self.sockets.accept(listener)
    }
}
