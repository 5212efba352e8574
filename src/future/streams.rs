//! The front-end as a [`Stream`] of packets and a [`Sink`] for them. Feature `futures`.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::{FusedStream, Stream};
use futures_sink::Sink;
use vmring_core::Frame;

use crate::error::{CloseReason, Error, SubmitErrorKind};
use crate::future::AsyncRing;
use crate::future::write::{Bytes, Outgoing, Until};

impl AsyncRing {
    /// Returns a stream of the packets that arrive. There may be several streams and readers on a ring,
    /// and each packet goes to one of them.
    ///
    /// # Examples
    ///
    /// ```
    /// use futures_util::{SinkExt, StreamExt};
    /// use vmring::{AsyncRing, Direction, Interface, Loopback, block_on};
    ///
    /// let interface = Interface::builder().device(Loopback::new(1500)).start()?;
    /// let ring = AsyncRing::new(interface.ring(Direction::Both).build()?)?;
    /// block_on(async {
    ///     let mut sink = ring.packet_sink();
    ///     for number in 0..3_u8 {
    ///         let mut packet = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5 hello".to_vec();
    ///         packet.push(number);
    ///         sink.feed(packet).await?; // The ring sends while the next ones are made.
    ///     }
    ///     sink.flush().await?; // All three were taken by the device.
    ///
    ///     let mut packets = ring.packets();
    ///     for number in 0..3 {
    ///         let packet = packets.next().await.expect("the ring is open")?;
    ///         assert_eq!(packet[20], number);
    ///     }
    ///     ring.close().await?;
    ///     assert!(packets.next().await.is_none());
    ///     Ok::<(), vmring::Error>(())
    /// })?;
    /// # Ok::<(), vmring::Error>(())
    /// ```
    pub fn packets(&self) -> Packets {
        Packets {
            front: self.clone(),
            number: self.new_number(),
            out_of_frames: false,
            ended: false,
        }
    }

    /// Returns a sink for frames, which are sent without a copy. [`alloc`](Self::alloc) returns frames
    /// to fill, and frames that were read can be sent again.
    pub fn frame_sink(&self) -> FrameSink {
        FrameSink(Outgoing::new(self, None))
    }

    /// Returns a sink for packets as bytes, which are copied into frames.
    pub fn packet_sink<B: AsRef<[u8]>>(&self) -> PacketSink<B> {
        PacketSink(Outgoing::new(self, None))
    }
}

/// The packets that arrive on a ring, as a [`Stream`]. [`AsyncRing::packets`] returns it.
///
/// **End.** When the ring was closed, the stream ends after every packet that came was delivered. If
/// the ring closed because its device failed or panicked, one item says so before the end. A stream
/// that has ended stays ended ([`FusedStream`]).
///
/// **Errors.** A read that the device refused is one item with [`Error::Entry`], and the stream goes
/// on. On a ring that only writes, one item with [`Error::Submit`] comes before the end. If no frame is
/// left to read into, because the caller holds them all, one item with [`Error::OutOfFrames`] says so:
/// drop some frames, and the stream goes on. If it is asked again while there is still no frame, it
/// ends. It cannot wait for one, because a frame that is dropped wakes nobody, and the same error again
/// and again would keep an executor busy. [`AsyncRing::packets`] makes another stream then.
///
/// **Cancel safety.** A future on the next item, such as `StreamExt::next`, can be dropped at any time,
/// and so can the stream. No packet is lost: it goes to the next poll, or to another reader.
#[derive(Debug)]
pub struct Packets {
    front: AsyncRing,
    number: u64,
    /// The last item was that no frame is left.
    out_of_frames: bool,
    ended: bool,
}

impl Stream for Packets {
    type Item = Result<Frame, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.front.poll_read(self.number, cx).map(|item| {
            let out_of_frames = matches!(item, Err(Error::OutOfFrames));
            let told = std::mem::replace(&mut self.out_of_frames, out_of_frames);
            let (ended, silently) = match &item {
                Err(Error::Closed(reason)) => (true, *reason == CloseReason::Stopped),
                Err(Error::Submit(SubmitErrorKind::WrongDirection)) => (true, false),
                Err(Error::OutOfFrames) => (told, told),
                _ => (false, false),
            };
            self.ended = ended;
            (!silently).then_some(item)
        })
    }
}

impl FusedStream for Packets {
    fn is_terminated(&self) -> bool {
        self.ended
    }
}

impl Drop for Packets {
    fn drop(&mut self) {
        self.front.forget_waker(self.number);
    }
}

/// A [`Sink`] for frames, which are sent without a copy. [`AsyncRing::frame_sink`] returns it.
///
/// **Backpressure.** The sink is ready (`poll_ready`) when the ring has taken the packet before. So as
/// many packets are in flight as the ring has credits, and the sink itself holds at most one.
///
/// **Flush and close.** A flush is ready when the device has taken everything that this sink has sent.
/// To close a sink is to flush it. The ring stays open; [`AsyncRing::close`] closes that.
///
/// **Errors.** If the device refuses a packet, a later call of the sink returns [`Error::Entry`], once.
/// If the ring refuses one, the call that hands it over returns the error, and its frame returns to its
/// pool. After an error the sink goes on with the next packet. On a closed ring every packet is refused
/// with [`Error::Closed`].
///
/// **Cancel safety.** `SinkExt::feed`, `send` and `flush` can be dropped at any time. A packet whose
/// `feed` or `send` was dropped was either handed over, and is sent, or was not. If the sink is
/// dropped, the packet that it still holds is not sent, and those that the ring has are. Flush it first
/// to know.
#[derive(Debug)]
pub struct FrameSink(Outgoing<Frame>);

/// A [`Sink`] for packets as bytes, which are copied into frames. [`AsyncRing::packet_sink`] returns it.
///
/// It is as a [`FrameSink`] is, apart from one error: a call returns [`Error::OutOfFrames`] if there is
/// no frame for the packet, and no write is in flight that will bring one back. That packet is not
/// sent.
#[derive(Debug)]
pub struct PacketSink<B>(Outgoing<Bytes<B>>);

/// Nothing is pinned in a packet.
impl<B> Unpin for PacketSink<B> {}

/// Implements the methods of [`Sink`] for both sinks.
macro_rules! sink {
    ($item:ty, $packet:expr) => {
        type Error = Error;

        fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
            self.0.poll(Until::Submitted, cx)
        }

        /// # Panics
        ///
        /// If the sink was not ready.
        fn start_send(mut self: Pin<&mut Self>, item: $item) -> Result<(), Error> {
            self.0.send($packet(item))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
            self.0.poll(Until::Completed, cx)
        }

        fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
            self.poll_flush(cx)
        }
    };
}

impl Sink<Frame> for FrameSink {
    sink!(Frame, std::convert::identity);
}

impl<B: AsRef<[u8]>> Sink<B> for PacketSink<B> {
    sink!(B, Bytes);
}
