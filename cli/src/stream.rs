//! The data of a transfer: a stream of cheap pseudo-random bytes that both ends can generate.

use sha2::{Digest, Sha256};

/// An odd number with well-mixed bits: 2^64 divided by the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A stream of bytes that depend only on the seed and their position, however the stream is cut
/// into pieces.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    state: u64,
    /// The rest of the last word. Its lowest byte comes next.
    word: u64,
    left: usize,
}

impl Stream {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed, word: 0, left: 0 }
    }

    /// A Weyl sequence, folded so that the low bytes change as the high ones do. Its only merits
    /// are that it repeats only after 2^64 words, and that the processor computes several words at
    /// a time: the transfer is what is measured.
    #[inline]
    fn word_at(state: u64) -> u64 {
        state ^ (state >> 32)
    }

    #[inline]
    fn next_word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        Self::word_at(self.state)
    }

    /// Fills the buffer with the next bytes.
    pub(crate) fn fill(&mut self, mut buffer: &mut [u8]) {
        if self.left > 0 {
            let n = self.left.min(buffer.len());
            let (start, rest) = buffer.split_at_mut(n);
            self.take(start);
            buffer = rest;
        }
        let mut words = buffer.chunks_exact_mut(8);
        let mut state = self.state;
        for chunk in &mut words {
            state = state.wrapping_add(STEP);
            chunk.copy_from_slice(&Self::word_at(state).to_le_bytes());
        }
        self.state = state;
        let tail = words.into_remainder();
        if !tail.is_empty() {
            self.word = self.next_word();
            self.left = 8;
            self.take(tail);
        }
    }

    /// Whether the stream continues with these bytes.
    pub(crate) fn starts_with(&self, bytes: &[u8]) -> bool {
        let (mut stream, mut buffer) = (self.clone(), [0; 8]);
        let (start, bytes) = bytes.split_at(stream.left.min(bytes.len()));
        stream.take(&mut buffer[..start.len()]);
        if buffer[..start.len()] != *start {
            return false;
        }
        let mut words = bytes.chunks_exact(8);
        let (mut state, mut differs) = (stream.state, 0);
        // The loop has no early exit, so that the processor compares several words at a time.
        for chunk in &mut words {
            state = state.wrapping_add(STEP);
            let word = u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
            differs |= Self::word_at(state) ^ word;
        }
        if differs != 0 {
            return false;
        }
        stream.state = state;
        let tail = words.remainder();
        if !tail.is_empty() {
            stream.fill(&mut buffer[..tail.len()]);
        }
        buffer[..tail.len()] == *tail
    }

    fn take(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.word as u8;
            self.word >>= 8;
            self.left -= 1;
        }
    }

    /// The SHA-256 of the next `bytes` bytes. It takes seconds for a gigabyte, and ends early if
    /// `go_on` fails, which is asked every 64 KiB.
    pub(crate) fn digest<E>(
        mut self,
        bytes: u64,
        mut go_on: impl FnMut() -> Result<(), E>,
    ) -> Result<[u8; 32], E> {
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 64 * 1024];
        let mut left = bytes;
        while left > 0 {
            go_on()?;
            let n = left.min(buffer.len() as u64) as usize;
            self.fill(&mut buffer[..n]);
            hasher.update(&buffer[..n]);
            left -= n as u64;
        }
        Ok(hasher.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_does_not_depend_on_how_it_is_cut() {
        let mut whole = vec![0; 1000];
        Stream::new(7).fill(&mut whole);
        let mut stream = Stream::new(7);
        let mut pieces = vec![0; 1000];
        let (mut rest, mut size) = (&mut pieces[..], 0);
        while !rest.is_empty() {
            let (piece, more) = rest.split_at_mut(size.min(rest.len()));
            stream.fill(piece);
            rest = more;
            size = (size + 3) % 23;
        }
        assert_eq!(whole, pieces);
        let digest = |seed| Stream::new(seed).digest(1000, || Ok::<_, ()>(())).unwrap();
        assert_eq!(digest(7), <[u8; 32]>::from(Sha256::digest(&whole)));
        assert_ne!(digest(8), digest(7));
        assert_eq!(Stream::new(7).digest(1000, || Err("enough")), Err("enough"));
    }
    #[test]
    fn the_stream_knows_its_own_bytes_wherever_it_stands() {
        for at in [0, 1, 8, 13] {
            let mut stream = Stream::new(7);
            stream.fill(&mut vec![0; at]);
            for len in 0..40 {
                let mut bytes = vec![0; len];
                stream.clone().fill(&mut bytes);
                assert!(stream.starts_with(&bytes), "{len} bytes from {at}");
                for i in 0..len {
                    bytes[i] ^= 0x10;
                    assert!(!stream.starts_with(&bytes), "byte {i} of {len} from {at}");
                    bytes[i] ^= 0x10;
                }
            }
        }
    }
}
