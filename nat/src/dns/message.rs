//! DNS messages (RFC 1035, 4): as much of a query and of an answer as is needed to pass them on, and the
//! answers that the translator gives itself.
//!
//! A query has one question, whose name is written out: a compression pointer there has nothing to point
//! to. What is behind the question is not read, but for the OPT record of EDNS (RFC 6891, 6.1) of a query
//! that is answered here.

use core::net::IpAddr;

use crate::limits::DNS_ANSWER_MAX;

/// The bytes of a header (RFC 1035, 4.1.1).
pub(crate) const HEADER_LEN: usize = 12;
/// The most bytes of a name, with the length in front of each label and the root (RFC 1035, 2.3.4).
const NAME_MAX: usize = 255;
/// The most bytes of a question.
pub(crate) const QUESTION_MAX: usize = NAME_MAX + 4;
/// The most records of a query that are looked at for OPT. More than OPT and a signature is unusual.
const RECORDS: u16 = 8;
/// What is offered for messages over UDP (DNS Flag Day 2020). Answers of this crate are shorter.
const UDP_SIZE: u16 = 1232;

// Types (RFC 1035, 3.2.2 and 3.2.3; RFC 1995; RFC 3596; RFC 6891).
pub(crate) const A: u16 = 1;
const SOA: u16 = 6;
pub(crate) const PTR: u16 = 12;
pub(crate) const AAAA: u16 = 28;
const OPT: u16 = 41;
const IXFR: u16 = 251;
const AXFR: u16 = 252;
pub(crate) const ANY: u16 = 255;
// Classes.
const IN: u16 = 1;
const ANY_CLASS: u16 = 255;

// Response codes (RFC 1035, 4.1.1; RFC 6891, 9).
pub(crate) const NO_ERROR: u16 = 0;
pub(crate) const FORMAT_ERROR: u16 = 1;
pub(crate) const SERVER_FAILURE: u16 = 2;
pub(crate) const NAME_ERROR: u16 = 3;
pub(crate) const NOT_IMPLEMENTED: u16 = 4;
pub(crate) const REFUSED: u16 = 5;
const BAD_VERSION: u16 = 16;

// Bits of the second word of the header.
const QR: u16 = 1 << 15;
const OPCODE: u16 = 0xf << 11;
const AA: u16 = 1 << 10;
const RD: u16 = 1 << 8;
const RA: u16 = 1 << 7;
const CD: u16 = 1 << 4;
const RCODE: u16 = 0xf;
/// The bit of OPT that says that DNSSEC's records are welcome. It is copied (RFC 3225, 3).
const DO: u16 = 1 << 15;

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Why bytes are no question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuestionError {
    /// There are more to come.
    Short,
    /// A label is too long or a pointer, or the name is too long.
    Name,
}

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Question<'m> {
    /// The whole question. The name is in front of the last four bytes.
    pub(crate) bytes: &'m [u8],
    pub(crate) kind: u16,
    class: u16,
}

impl<'m> Question<'m> {
    /// Reads the question at the start of `bytes`.
    pub(crate) fn parse(bytes: &'m [u8]) -> Result<Self, QuestionError> {
        let mut at = 0;
        loop {
            let len = usize::from(*bytes.get(at).ok_or(QuestionError::Short)?);
            // Both upper bits say that it is a pointer. The other combinations are reserved.
            if len > 63 || at + len + 1 > NAME_MAX {
                return Err(QuestionError::Name);
            }
            at += len + 1;
            if len == 0 {
                break;
            }
        }
        match (word(bytes, at), word(bytes, at + 2)) {
            (Some(kind), Some(class)) => Ok(Self { bytes: &bytes[..at + 4], kind, class }),
            _ => Err(QuestionError::Short),
        }
    }

    /// Whether the class is that of the Internet, or any.
    pub(crate) fn is_internet(&self) -> bool {
        matches!(self.class, IN | ANY_CLASS)
    }

    /// Whether it asks for a whole zone, or for what has changed in it.
    pub(crate) fn is_transfer(&self) -> bool {
        matches!(self.kind, AXFR | IXFR)
    }

    /// The name in lower case, with a dot between labels and none at the end. A byte that no local name has
    /// is a question mark, so that a dot is between labels only.
    pub(crate) fn text<'t>(&self, text: &'t mut [u8; NAME_MAX]) -> &'t str {
        let name = &self.bytes[..self.bytes.len() - 4];
        let mut at = 0;
        while name[at] != 0 {
            let end = at + 1 + usize::from(name[at]);
            for index in at + 1..end {
                let byte = name[index].to_ascii_lowercase();
                let is_fine = byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
                text[index - 1] = if is_fine { byte } else { b'?' };
            }
            text[end - 1] = b'.';
            at = end;
        }
        core::str::from_utf8(&text[..at.saturating_sub(1)]).expect("its characters are ASCII")
    }

    /// Memory for [`text`](Self::text).
    pub(crate) const fn text_memory() -> [u8; NAME_MAX] {
        [0; NAME_MAX]
    }
}

/// Why a message is no query that can be passed on or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueryError {
    /// It is too short to be answered, or an answer itself. An answer to an answer could begin a loop.
    Silent,
    /// It has a form that no query has.
    Format,
    /// It is a message of another kind than a query, as an update or a notification is.
    Opcode,
}

/// What a query says of EDNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Edns {
    version: u8,
    dnssec: bool,
}

/// A query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query<'m> {
    message: &'m [u8],
    pub(crate) id: u16,
    pub(crate) question: Question<'m>,
}

impl<'m> Query<'m> {
    /// Reads a query up to its question.
    pub(crate) fn parse(message: &'m [u8]) -> Result<Self, QueryError> {
        let (Some(id), Some(flags), Some(questions)) =
            (word(message, 0), word(message, 2), word(message, 4))
        else {
            return Err(QueryError::Silent);
        };
        if message.len() < HEADER_LEN || flags & QR != 0 {
            return Err(QueryError::Silent);
        }
        if flags & OPCODE != 0 {
            return Err(QueryError::Opcode);
        }
        // RFC 9619: a query has one question.
        if questions != 1 {
            return Err(QueryError::Format);
        }
        let question = Question::parse(&message[HEADER_LEN..]).map_err(|_| QueryError::Format)?;
        Ok(Self { message, id, question })
    }

    /// What it says of EDNS. `Err` if what is behind the question cannot be read.
    fn edns(&self) -> Result<Option<Edns>, ()> {
        let message = self.message;
        let count = |at| word(message, at).ok_or(());
        let records = count(6)?.saturating_add(count(8)?).saturating_add(count(10)?);
        if records > RECORDS {
            return Err(());
        }
        let mut at = HEADER_LEN + self.question.bytes.len();
        let mut found = None;
        for _ in 0..records {
            let is_root = message.get(at) == Some(&0);
            // The owner's name ends with the root or with a pointer.
            loop {
                match *message.get(at).ok_or(())? {
                    0 => break at += 1,
                    1..=63 => at += 1 + usize::from(message[at]),
                    0xc0.. => break at += 2,
                    _ => return Err(()),
                }
            }
            let kind = count(at)?;
            let (high, flags, len) = (count(at + 4)?, count(at + 6)?, count(at + 8)?);
            if kind == OPT {
                // RFC 6891, 6.1.1: it belongs to the root, and there is one.
                if !is_root || found.is_some() {
                    return Err(());
                }
                found = Some(Edns { version: high as u8, dnssec: flags & DO != 0 });
            }
            at += 10 + usize::from(len);
            if at > message.len() {
                return Err(());
            }
        }
        Ok(found)
    }

    /// As much of it as an answer needs that is written later.
    pub(crate) fn keep(&self) -> KeptQuery {
        let mut kept = KeptQuery { bytes: [0; KEPT_MAX], len: 0 };
        let mut put = |bytes: &[u8]| {
            kept.bytes[kept.len..kept.len + bytes.len()].copy_from_slice(bytes);
            kept.len += bytes.len();
        };
        // The flags, and one question.
        put(&self.message[..6]);
        let edns = self.edns().ok().flatten();
        put(&[0, 0, 0, 0, 0, u8::from(edns.is_some())]);
        put(self.question.bytes);
        if let Some(edns) = edns {
            let [high, low] = if edns.dnssec { DO.to_be_bytes() } else { [0; 2] };
            put(&[0, 0, OPT as u8, 0, 0, 0, 0, high, low, 0, 0]);
        }
        kept
    }

    /// Writes an answer without a record, with this response code.
    pub(crate) fn refuse(&self, code: u16, out: &mut [u8; DNS_ANSWER_MAX]) -> usize {
        match Reply::new(self, code, false, out) {
            Ok(reply) => reply.finish(),
            Err(len) => len,
        }
    }
}

/// The most bytes of a [`KeptQuery`].
const KEPT_MAX: usize = HEADER_LEN + QUESTION_MAX + OPT_LEN;

/// A query with its header, its question and an OPT record if it had one, and nothing else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeptQuery {
    bytes: [u8; KEPT_MAX],
    len: usize,
}

impl KeptQuery {
    fn question(&self) -> &[u8] {
        let question = Question::parse(&self.bytes[HEADER_LEN..self.len]);
        question.map_or(&[], |question| question.bytes)
    }

    /// Whether it asks the same, without regard to case.
    pub(crate) fn asks(&self, question: &Question<'_>) -> bool {
        let own = self.question();
        if own.len() != question.bytes.len() {
            return false;
        }
        // The lengths of labels are no letters: they are less than 64.
        let (name, tail) = own.split_at(own.len() - 4);
        let (other, other_tail) = question.bytes.split_at(own.len() - 4);
        tail == other_tail && name.eq_ignore_ascii_case(other)
    }

    /// Writes an answer without a record, with this response code.
    pub(crate) fn refuse(&self, code: u16, out: &mut [u8; DNS_ANSWER_MAX]) -> usize {
        match Query::parse(&self.bytes[..self.len]) {
            Ok(query) => query.refuse(code, out),
            Err(_) => refuse_unread(&self.bytes, code, out),
        }
    }
}

/// Answers a message that is no query with a response code, if that can be done: without its question,
/// which may be what is wrong.
pub(crate) fn refuse_unread(message: &[u8], code: u16, out: &mut [u8; DNS_ANSWER_MAX]) -> usize {
    let flags = word(message, 2).unwrap_or(0);
    out[..HEADER_LEN].fill(0);
    out[..2].copy_from_slice(&message[..2]);
    out[2..4].copy_from_slice(&(QR | flags & (OPCODE | RD) | code).to_be_bytes());
    HEADER_LEN
}

/// An answer that the translator gives itself.
pub(crate) struct Reply<'q, 'o> {
    query: &'q Query<'q>,
    edns: Option<Edns>,
    out: &'o mut [u8; DNS_ANSWER_MAX],
    len: usize,
    answers: u16,
    authorities: u16,
}

impl<'q, 'o> Reply<'q, 'o> {
    /// Begins an answer with this response code. `authoritative` says whether it is about a name that is
    /// answered for here.
    ///
    /// # Errors
    ///
    /// The length of another answer, which was written instead: the query cannot be read to its end, or
    /// has a version of EDNS that is not known.
    pub(crate) fn new(
        query: &'q Query<'q>,
        code: u16,
        authoritative: bool,
        out: &'o mut [u8; DNS_ANSWER_MAX],
    ) -> Result<Self, usize> {
        let Ok(edns) = query.edns() else {
            return Err(refuse_unread(query.message, FORMAT_ERROR, out));
        };
        let flags = word(query.message, 2).unwrap_or(0);
        let authority = if authoritative { AA } else { 0 };
        out[..HEADER_LEN].fill(0);
        out[..2].copy_from_slice(&query.id.to_be_bytes());
        let flags = QR | authority | RA | flags & (RD | CD) | code;
        out[2..4].copy_from_slice(&flags.to_be_bytes());
        out[4..6].copy_from_slice(&1u16.to_be_bytes());
        let len = HEADER_LEN + query.question.bytes.len();
        out[HEADER_LEN..len].copy_from_slice(query.question.bytes);
        let mut reply = Self { query, edns, out, len, answers: 0, authorities: 0 };
        if edns.is_some_and(|edns| edns.version > 0) {
            reply.set_code(BAD_VERSION & RCODE);
            return Err(reply.finish());
        }
        Ok(reply)
    }

    fn set_code(&mut self, code: u16) {
        self.out[3] = self.out[3] & !(RCODE as u8) | code as u8;
    }

    /// Adds bytes. An answer has space for whatever the limits allow: see the assertion below.
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    fn put_word(&mut self, word: u16) {
        self.put(&word.to_be_bytes());
    }

    /// A pointer to a place in the name of the question.
    fn put_pointer(&mut self, at: usize) {
        self.put_word(0xc000 | (HEADER_LEN + at) as u16);
    }

    /// The head of a record that must not be kept: what it says may change at any time.
    fn put_head(&mut self, at: usize, kind: u16, len: usize) {
        self.put_pointer(at);
        self.put_word(kind);
        self.put_word(IN);
        self.put(&[0; 4]);
        self.put_word(len as u16);
    }

    /// Adds an address of the name that is asked for.
    pub(crate) fn address(&mut self, address: IpAddr) {
        self.answers += 1;
        match address {
            IpAddr::V4(v4) => {
                self.put_head(0, A, 4);
                self.put(&v4.octets());
            }
            IpAddr::V6(v6) => {
                self.put_head(0, AAAA, 16);
                self.put(&v6.octets());
            }
        }
    }

    /// Adds a name that the name that is asked for points to.
    pub(crate) fn pointer(&mut self, name: &str) {
        self.answers += 1;
        self.put_head(0, PTR, name.len() + 2);
        for label in name.split('.') {
            self.put(&[label.len() as u8]);
            self.put(label.as_bytes());
        }
        self.put(&[0]);
    }

    /// Adds the record without which nobody believes that a name has nothing (RFC 2308, 3). The zone
    /// begins at this place of the name that is asked for.
    pub(crate) fn authority(&mut self, zone_at: usize) {
        // RFC 6303, 3.
        const CONTACT: &[u8] = b"\x06nobody\x07invalid\0";
        self.authorities += 1;
        self.put_head(zone_at, SOA, 2 + CONTACT.len() + 20);
        self.put_pointer(zone_at);
        self.put(CONTACT);
        for seconds in [1u32, 3600, 1200, 604_800, 0] {
            self.put(&seconds.to_be_bytes());
        }
    }

    /// Ends the answer, and returns its length.
    pub(crate) fn finish(mut self) -> usize {
        let mut additional = 0u16;
        if let Some(edns) = self.edns {
            additional = 1;
            self.put(&[0]);
            self.put_word(OPT);
            self.put_word(UDP_SIZE);
            let high = if edns.version > 0 { BAD_VERSION >> 4 } else { 0 };
            self.put(&[high as u8, 0]);
            self.put_word(if edns.dnssec { DO } else { 0 });
            self.put_word(0);
        }
        debug_assert_eq!(self.query.id.to_be_bytes(), self.out[..2]);
        self.out[6..8].copy_from_slice(&self.answers.to_be_bytes());
        self.out[8..10].copy_from_slice(&self.authorities.to_be_bytes());
        self.out[10..12].copy_from_slice(&additional.to_be_bytes());
        self.len
    }
}

/// The longest OPT record of an answer.
const OPT_LEN: usize = 11;
// The longest answers fit into a message without EDNS (RFC 1035, 4.2.1): one with all addresses of a name,
// and one with a name.
static_assertions::const_assert!(
    HEADER_LEN + QUESTION_MAX + crate::limits::ADDRESSES_PER_NAME * 28 + OPT_LEN <= DNS_ANSWER_MAX
);
// The name of an address of IPv6 has 74 bytes.
static_assertions::const_assert!(HEADER_LEN + 74 + 4 + 12 + NAME_MAX + OPT_LEN <= DNS_ANSWER_MAX);

/// An answer of a resolver, as far as it is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer<'m> {
    pub(crate) id: u16,
    /// The response code.
    pub(crate) code: u16,
    /// The question, which only an error may lack.
    pub(crate) question: Option<Question<'m>>,
}

impl<'m> Answer<'m> {
    /// Reads an answer up to its question.
    pub(crate) fn parse(message: &'m [u8]) -> Option<Self> {
        let (id, flags, questions) = (word(message, 0)?, word(message, 2)?, word(message, 4)?);
        if message.len() < HEADER_LEN || flags & QR == 0 || flags & OPCODE != 0 {
            return None;
        }
        let code = flags & RCODE;
        let question = match questions {
            1 => Some(Question::parse(&message[HEADER_LEN..]).ok()?),
            0 if code == FORMAT_ERROR || means_failure(code) => None,
            _ => return None,
        };
        Some(Self { id, code, question })
    }
}

/// Whether a resolver that answers so has not looked for the name.
pub(crate) fn means_failure(code: u16) -> bool {
    matches!(code, SERVER_FAILURE | NOT_IMPLEMENTED | REFUSED)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(name: &[u8], kind: u16, extra: &[u8], additional: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, additional as u8];
        message.extend(name);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message.extend(extra);
        message
    }

    /// Goal: a name is compared without its case, and one that no local name can be equal to is known.
    #[test]
    fn a_name_is_read_in_lower_case() {
        let message = query(b"\x04HoSt\x08internal\0", A, &[], 0);
        let query = Query::parse(&message).unwrap();
        assert_eq!(query.id, 0xabcd);
        let mut text = Question::text_memory();
        assert_eq!(query.question.text(&mut text), "host.internal");
        for name in [&b"\x04ho.t\x01A\0"[..], b"\x04ho\0t\x01a\0", b"\x04ho\xfft\x01a\0"] {
            let message = self::query(name, A, &[], 0);
            assert_eq!(Query::parse(&message).unwrap().question.text(&mut text), "ho?t.a");
        }
        let root = self::query(b"\0", A, &[], 0);
        assert_eq!(Query::parse(&root).unwrap().question.text(&mut text), "");
    }

    /// Goal: what is no query is known as such, by what is wrong with it.
    #[test]
    fn what_is_no_query_is_refused() {
        let good = query(b"\x01a\0", A, &[], 0);
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut message = good.clone();
            change(&mut message);
            Query::parse(&message).map(drop)
        };
        assert_eq!(with(&|_| {}), Ok(()));
        assert_eq!(with(&|m| m.truncate(11)), Err(QueryError::Silent));
        assert_eq!(with(&|m| m[2] |= 0x80), Err(QueryError::Silent));
        assert_eq!(with(&|m| m[2] |= 5 << 3), Err(QueryError::Opcode));
        for questions in [0, 2, 255] {
            assert_eq!(with(&|m| m[5] = questions), Err(QueryError::Format));
        }
        // These are a pointer, a reserved kind of label, an end that is missing, and a name of 256 bytes.
        assert_eq!(with(&|m| m[12] = 0xc0), Err(QueryError::Format));
        assert_eq!(with(&|m| m[12] = 0x40), Err(QueryError::Format));
        for len in 12..good.len() {
            assert_eq!(with(&|m| m.truncate(len)), Err(QueryError::Format));
        }
        let label = |len: u8| [&[len][..], &vec![b'a'; len.into()]].concat();
        let longest = [label(63), label(63), label(63), label(61), vec![0]].concat();
        assert_eq!(longest.len(), 255);
        let whole = query(&longest, A, &[], 0);
        assert_eq!(Query::parse(&whole).unwrap().question.bytes.len(), QUESTION_MAX);
        let longer = [label(63), label(63), label(63), label(62), vec![0]].concat();
        assert_eq!(Query::parse(&query(&longer, A, &[], 0)).unwrap_err(), QueryError::Format);
    }

    /// Goal: an answer to a query with OPT has one (RFC 6891, 6.1.1), with DO as in the query, and a
    /// version that is not known is said to be so (6.1.3).
    #[test]
    fn an_answer_has_opt_if_its_query_has() {
        let opt = |version: u8, flags: u8| [0, 0, 41, 16, 0, 0, version, flags, 0, 0, 0];
        let answer = |extra: &[u8], additional| {
            let message = query(b"\x01a\0", A, extra, additional);
            let query = Query::parse(&message).unwrap();
            let mut out = [0; DNS_ANSWER_MAX];
            let len = query.refuse(REFUSED, &mut out);
            out[..len].to_vec()
        };
        let head = [0xab, 0xcd, 0x81, 0x85, 0, 1, 0, 0, 0, 0, 0];
        let plain = answer(&[], 0);
        assert_eq!(plain, [&head[..], &[0], b"\x01a\0\0\x01\0\x01"].concat());
        let tail = |high, flags| [0, 0, 41, 4, 208, high, 0, flags, 0, 0, 0];
        let both = answer(&opt(0, 0x80), 1);
        assert_eq!(both[..12], [&head[..], &[1]].concat());
        assert_eq!(both[19..], tail(0, 0x80));
        let old = answer(&opt(1, 0), 1);
        assert_eq!((old[3] & 15, &old[19..]), (0, &tail(1, 0)[..]));
        // OPT may be behind another record. It may not be there twice, have an owner, or be cut short, and
        // there may not be too many records.
        let other = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 2, 9, 9];
        assert_eq!(answer(&[&other[..], &opt(0, 0)].concat(), 2)[19..], tail(0, 0));
        for (extra, count) in [
            ([opt(0, 0), opt(0, 0)].concat(), 2),
            ([&[1, b'x'], &opt(0, 0)[..]].concat(), 1),
            (opt(0, 0)[..10].to_vec(), 1),
            ([&opt(0, 0)[..10], &[1]].concat(), 1),
            (vec![0; 100], 9),
        ] {
            let answer = answer(&extra, count);
            assert_eq!((answer.len(), answer[3] & 15), (12, 1), "{extra:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// Goal: no message makes a reader panic, what is read is inside of the message, and an answer
        /// fits.
        #[test]
        fn any_bytes_can_be_read(
            mut message in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..400),
            usual in any::<bool>(),
        ) {
            if usual && message.len() > 6 {
                message[2..6].copy_from_slice(&[1, 0, 0, 1]);
            }
            let _ = Answer::parse(&message);
            let mut out = [0; DNS_ANSWER_MAX];
            if let Ok(query) = Query::parse(&message) {
                prop_assert!(HEADER_LEN + query.question.bytes.len() <= message.len());
                let _ = query.question.text(&mut Question::text_memory());
                if let Ok(mut reply) = Reply::new(&query, NO_ERROR, true, &mut out) {
                    for _ in 0..crate::limits::ADDRESSES_PER_NAME {
                        reply.address(core::net::Ipv6Addr::LOCALHOST.into());
                    }
                    prop_assert!(reply.finish() <= DNS_ANSWER_MAX);
                }
                if let Ok(mut reply) = Reply::new(&query, NAME_ERROR, true, &mut out) {
                    reply.authority(0);
                    prop_assert!(reply.finish() <= DNS_ANSWER_MAX);
                }
            }
        }
    }
}
