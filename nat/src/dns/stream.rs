//! DNS over TCP: what a guest sends to the gateway is looked at on its way to the resolver.
//!
//! The bytes go through unchanged, as those of any flow, so they cannot be answered here. What is not to
//! reach the resolver ends the connection before its question is complete: a name that is answered here,
//! a message that is no query, and a transfer of a zone, which a resolver may give to its own host only.

use crate::dns::message::{HEADER_LEN, QUESTION_MAX, Query, QueryError, Question, QuestionError};
use crate::dns::names::{Found, Names};
use crate::stats::Counter;

/// The length in front of each message (RFC 1035, 4.2.2).
const LENGTH: usize = 2;
/// The most bytes that are needed to know what a message asks.
const HEAD_MAX: usize = LENGTH + HEADER_LEN + QUESTION_MAX;

/// Where in its messages the stream of a guest is.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    /// The beginning of a message, up to its question.
    head: [u8; HEAD_MAX],
    len: usize,
    /// How many bytes of a message are behind what was looked at.
    rest: usize,
}

impl Stream {
    /// The beginning of a stream.
    pub(crate) fn new() -> Self {
        Self { head: [0; HEAD_MAX], len: 0, rest: 0 }
    }

    /// Looks at bytes. Those that were looked at before are in front of them.
    ///
    /// # Errors
    ///
    /// Why the connection is to end.
    pub(crate) fn look(&mut self, mut bytes: &[u8], names: &Names) -> Result<(), Counter> {
        while !bytes.is_empty() {
            let skipped = self.rest.min(bytes.len());
            self.rest -= skipped;
            bytes = &bytes[skipped..];
            // What is known of the message: its length, and then its question.
            let end = match self.length() {
                None => LENGTH,
                Some(len) => (LENGTH + len).min(HEAD_MAX),
            };
            let taken = (end - self.len).min(bytes.len());
            self.head[self.len..][..taken].copy_from_slice(&bytes[..taken]);
            self.len += taken;
            bytes = &bytes[taken..];
            let Some(len) = self.length() else { continue };
            if len < HEADER_LEN {
                return Err(Counter::DnsMalformed);
            }
            if self.len > LENGTH {
                let whole = self.len == (LENGTH + len).min(HEAD_MAX);
                if judge(&self.head[LENGTH..self.len], whole, names)? {
                    self.rest = LENGTH + len - self.len;
                    self.len = 0;
                }
            }
        }
        Ok(())
    }

    /// The length of the message that has begun.
    fn length(&self) -> Option<usize> {
        let known = self.len >= LENGTH;
        known.then(|| usize::from(u16::from_be_bytes([self.head[0], self.head[1]])))
    }
}

/// Whether what is known of a message is enough to let it pass. `whole` says that there is no more.
fn judge(message: &[u8], whole: bool, names: &Names) -> Result<bool, Counter> {
    if message.len() < HEADER_LEN {
        return Ok(false);
    }
    let query = match Query::parse(message) {
        Ok(query) => query,
        // There is more to come of its question.
        Err(QueryError::Format) if !whole && is_short(message) => return Ok(false),
        Err(QueryError::Opcode) => return Err(Counter::DnsStreamRefused),
        Err(QueryError::Format | QueryError::Silent) => return Err(Counter::DnsMalformed),
    };
    let is_local = || {
        let mut text = Question::text_memory();
        names.find(query.question.text(&mut text)) != Found::Elsewhere
    };
    if query.question.is_transfer() || is_local() {
        return Err(Counter::DnsStreamRefused);
    }
    Ok(true)
}

/// Whether a message of one question has only a part of it.
fn is_short(message: &[u8]) -> bool {
    message[4..6] == [0, 1] && Question::parse(&message[HEADER_LEN..]) == Err(QuestionError::Short)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dns::names::HOST_NAME;

    fn names() -> Names {
        let subnets = ["192.168.64.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()];
        let mut names = Names::new(subnets);
        names.set(HOST_NAME, &[[192, 168, 64, 254].into()]).unwrap();
        names
    }

    fn message(flags: u8, name: &str, kind: u16, behind: usize) -> Vec<u8> {
        let mut message = vec![1, 2, flags, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message.resize(message.len() + behind, 0xee);
        [&(message.len() as u16).to_be_bytes()[..], &message].concat()
    }

    /// Looks at a stream in pieces, and returns how many bytes passed before it was to end.
    fn passed(bytes: &[u8], step: usize) -> Result<usize, (usize, Counter)> {
        let (mut stream, names, mut passed) = (Stream::new(), names(), 0);
        for piece in bytes.chunks(step) {
            stream.look(piece, &names).map_err(|why| (passed, why))?;
            passed += piece.len();
        }
        Ok(passed)
    }

    /// Goal: queries pass in any pieces, and what is not to reach the resolver ends the stream before its
    /// question is complete.
    #[test]
    fn what_is_not_to_reach_the_resolver_never_does() {
        let good = [
            message(1, "example.com", 1, 0),
            message(0, "a.example.com", 28, 700),
            message(1, &vec!["a".repeat(63); 3].join("."), 16, 11),
        ]
        .concat();
        let bad = [
            (message(1, "Host.Internal", 1, 5), Counter::DnsStreamRefused),
            (message(1, "nobody.internal", 28, 0), Counter::DnsStreamRefused),
            (message(1, "9.64.168.192.in-addr.arpa", 12, 0), Counter::DnsStreamRefused),
            (message(0, "example.com", 252, 0), Counter::DnsStreamRefused),
            (message(0, "example.com", 251, 0), Counter::DnsStreamRefused),
            (vec![0, 11, 1, 2, 1, 0, 0, 1], Counter::DnsMalformed),
            (vec![0, 0], Counter::DnsMalformed),
            (message(1, "example.com", 1, 0)[..20].to_vec(), Counter::DnsMalformed),
        ];
        for step in [1, 2, 3, 17, 100, 10_000] {
            assert_eq!(passed(&good, step), Ok(good.len()));
            for (index, (message, counter)) in bad.iter().enumerate() {
                let mut message = message.clone();
                if index == 7 {
                    message[1] = 18;
                }
                let stream = [&good[..], &message, &good].concat();
                let (passed, why) = passed(&stream, step).unwrap_err();
                assert_eq!(why, *counter, "message {index}");
                // The last byte of the question has not passed.
                let behind = if index == 0 { 5 } else { 0 };
                assert!(passed < good.len() + message.len() - behind, "message {index}");
            }
            // Updates, notifications and answers.
            for flags in [5 << 3, 4 << 3, 0x80] {
                let stream = [&good[..], &message(flags, "example.com", 6, 0)].concat();
                assert!(passed(&stream, step).is_err(), "{flags:x}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Goal: it does not matter how a stream is cut into pieces, nor what is in it.
        #[test]
        fn pieces_make_no_difference(
            lens in prop::collection::vec((0usize..4, 0usize..40), 1..6),
            tail in prop::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..60),
            step in 1usize..30,
        ) {
            let words = ["example.com", "a.b", "host.internal.example", "x"];
            let mut stream = Vec::new();
            for (word, behind) in lens {
                stream.extend(message(1, words[word], 1, behind));
            }
            stream.extend(tail);
            let whole = passed(&stream, usize::MAX).map(drop).map_err(|(_, why)| why);
            let pieces = passed(&stream, step).map(drop).map_err(|(_, why)| why);
            prop_assert_eq!(whole, pieces);
        }
    }
}
