//! [`Message`]: a message of a front end, from bytes to checked values.
//!
//! The layouts are those of "Message Specification". All numbers are in the machine's byte order.

use crate::vhost_user::error::Error;
use crate::vhost_user::request::Request;

/// The bytes of a header.
pub const HEADER_LEN: usize = 12;
/// The bytes of a configuration space that a message may have (`VHOST_USER_MAX_CONFIG_SIZE`).
pub const CONFIG_MAX: usize = 256;
/// The longest payload that is accepted: a configuration space with its header. The table of eight
/// regions is shorter.
pub const PAYLOAD_MAX: usize = CONFIG_HEADER_LEN + CONFIG_MAX;
/// The most descriptors that a message may have, and the most regions that one message may name.
pub const DESCRIPTORS_MAX: usize = 8;
/// The most entries of a split ring (virtio, "Split Virtqueues").
pub const RING_SIZE_MAX: u32 = 1 << 15;

const CONFIG_HEADER_LEN: usize = 12;
const REGION_LEN: usize = 32;
/// In the flags of a header: version 1.
pub(super) const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
/// In the number of a ring, this bit says that there is no descriptor.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked.
    pub request: Request,
    /// Whether the front end wants a reply, if `REPLY_ACK` was negotiated.
    pub need_reply: bool,
    /// The number of bytes of the payload, at most [`PAYLOAD_MAX`].
    pub size: u32,
}

impl Header {
    /// Reads a request's header.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownRequest`], [`Error::Flags`] or [`Error::Size`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, Error> {
        let mut fields = Fields(bytes);
        let (number, flags, size) = (fields.u32(), fields.u32(), fields.u32());
        let request = Request::from_number(number).ok_or(Error::UnknownRequest { number })?;
        if flags & !NEED_REPLY != VERSION {
            return Err(Error::Flags { request, flags });
        }
        if size as usize > PAYLOAD_MAX {
            return Err(Error::Size { request, size });
        }
        Ok(Self { request, need_reply: flags & NEED_REPLY != 0, size })
    }
}

/// A region, as a front end describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionDescription {
    /// Where it begins in the guest's memory.
    pub guest_address: u64,
    /// The number of bytes.
    pub size: u64,
    /// Where it begins in the front end's memory.
    pub user_address: u64,
    /// Where it begins in the memory of its descriptor.
    pub mmap_offset: u64,
}

/// The regions of SET_MEM_TABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionTable {
    regions: [RegionDescription; DESCRIPTORS_MAX],
    len: usize,
}

impl RegionTable {
    /// The regions, in the order of their descriptors.
    pub fn regions(&self) -> &[RegionDescription] {
        &self.regions[..self.len]
    }
}

/// Where the parts of a ring are, as addresses of the front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Whether writes to the used ring are entered into the dirty log (`VHOST_VRING_F_LOG`).
    pub logged: bool,
    /// The descriptor table.
    pub descriptors: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub available: u64,
    /// The guest's address under which writes to the used ring are logged.
    pub log: u64,
}

/// Bytes of a configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigBytes {
    /// Where they begin in the configuration space.
    pub offset: u32,
    /// The flags of the message.
    pub flags: u32,
    len: usize,
    bytes: [u8; CONFIG_MAX],
}

impl ConfigBytes {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The direction of a transfer of the device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDirection {
    /// The back end writes its state.
    Save,
    /// The back end reads its state.
    Load,
}

/// A message of a front end. Its sizes, its reserved bits and the number of its descriptors are
/// right; whether it is allowed now is a question for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // The names are those of the document; `index` is a ring.
#[allow(clippy::large_enum_variant)] // There is one message at a time, and no allocation for it.
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(RegionTable),
    /// Without `LOG_SHMFD` the numbers mean nothing, and a front end may send just one of them.
    SetLogBase {
        size: u64,
        offset: u64,
    },
    SetLogFd,
    /// A ring of 0 entries does not start.
    SetVringNum {
        index: u32,
        num: u16,
    },
    SetVringAddr {
        index: u32,
        addresses: RingAddresses,
    },
    SetVringBase {
        index: u32,
        base: u16,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
    },
    SetVringCall {
        index: u32,
    },
    SetVringErr {
        index: u32,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SendRarp {
        mac: [u8; 6],
    },
    NetSetMtu(u64),
    SetBackendReqFd,
    GetConfig(ConfigBytes),
    SetConfig(ConfigBytes),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionDescription),
    RemMemReg(RegionDescription),
    SetStatus(u8),
    GetStatus,
    /// The direction is `None` if it or the phase of the migration is unknown.
    SetDeviceStateFd(Option<StateDirection>),
    CheckDeviceState,
}

impl Message {
    /// Reads a payload. `descriptors` is how many came with the message.
    ///
    /// # Errors
    ///
    /// [`Error`], if the request is not served, or something in the message is not as the document
    /// says.
    pub fn parse(header: Header, payload: &[u8], descriptors: usize) -> Result<Self, Error> {
        let request = header.request;
        let size = |ok: bool| match ok {
            true => Ok(()),
            false => Err(Error::Size { request, size: payload.len() as u32 }),
        };
        let len = payload.len();
        let mut fields = Fields(payload);
        let mut takes = 0;
        let message = match request {
            Request::GetFeatures
            | Request::SetOwner
            | Request::ResetOwner
            | Request::SetLogFd
            | Request::GetProtocolFeatures
            | Request::GetQueueNum
            | Request::SetBackendReqFd
            | Request::ResetDevice
            | Request::GetMaxMemSlots
            | Request::GetStatus
            | Request::CheckDeviceState => {
                size(len == 0)?;
                match request {
                    Request::GetFeatures => Message::GetFeatures,
                    Request::SetOwner => Message::SetOwner,
                    Request::ResetOwner => Message::ResetOwner,
                    Request::SetLogFd => {
                        takes = 1;
                        Message::SetLogFd
                    }
                    Request::GetProtocolFeatures => Message::GetProtocolFeatures,
                    Request::GetQueueNum => Message::GetQueueNum,
                    Request::SetBackendReqFd => {
                        takes = 1;
                        Message::SetBackendReqFd
                    }
                    Request::ResetDevice => Message::ResetDevice,
                    Request::GetMaxMemSlots => Message::GetMaxMemSlots,
                    Request::GetStatus => Message::GetStatus,
                    _ => Message::CheckDeviceState,
                }
            }
            Request::SetFeatures => {
                size(len == 8)?;
                Message::SetFeatures(fields.u64())
            }
            Request::SetProtocolFeatures => {
                size(len == 8)?;
                Message::SetProtocolFeatures(fields.u64())
            }
            Request::SetMemTable => {
                size(len >= 8)?;
                let (count, _padding) = (fields.u32() as usize, fields.u32());
                if count == 0 || count > DESCRIPTORS_MAX {
                    return Err(Error::Regions { request, count, max: DESCRIPTORS_MAX });
                }
                // User-mode Linux sends space for two regions, whatever it uses of it.
                let space = len - 8;
                size(space.is_multiple_of(REGION_LEN) && space >= count * REGION_LEN)?;
                takes = count;
                let mut regions = [RegionDescription::default(); DESCRIPTORS_MAX];
                regions[..count].fill_with(|| fields.region());
                Message::SetMemTable(RegionTable { regions, len: count })
            }
            Request::SetLogBase => {
                // Without LOG_SHMFD the payload is one number in the document, and a log without a
                // descriptor in QEMU. The session demands the descriptor where it matters.
                size(len == 16 || (len == 8 && descriptors == 0))?;
                takes = descriptors.min(1);
                let log_size = fields.u64();
                let offset = if len == 16 { fields.u64() } else { 0 };
                Message::SetLogBase { size: log_size, offset }
            }
            Request::SetVringNum => {
                size(len == 8)?;
                let (index, num) = (fields.u32(), fields.u32());
                // DPDK's virtio-user sends 0 for rings that its driver has not set up.
                if num != 0 && (!num.is_power_of_two() || num > RING_SIZE_MAX) {
                    return Err(Error::RingSize { num });
                }
                Message::SetVringNum { index, num: num as u16 }
            }
            Request::SetVringAddr => {
                size(len == 40)?;
                let (index, flags) = (fields.u32(), fields.u32());
                if flags > 1 {
                    let value = flags.into();
                    return Err(Error::Reserved { request, field: "flags", value });
                }
                let addresses = RingAddresses {
                    logged: flags == 1,
                    descriptors: fields.u64(),
                    used: fields.u64(),
                    available: fields.u64(),
                    log: fields.u64(),
                };
                for (part, address, alignment) in [
                    ("descriptor table", addresses.descriptors, 16),
                    ("used ring", addresses.used, 4),
                    ("available ring", addresses.available, 2),
                ] {
                    if !address.is_multiple_of(alignment) {
                        return Err(Error::RingAlignment { part, address });
                    }
                }
                Message::SetVringAddr { index, addresses }
            }
            Request::SetVringBase => {
                size(len == 8)?;
                let (index, base) = (fields.u32(), fields.u32());
                let base = u16::try_from(base).map_err(|_| Error::RingBase { base })?;
                Message::SetVringBase { index, base }
            }
            Request::GetVringBase => {
                // The number is reserved, but not every front end clears it.
                size(len == 8)?;
                Message::GetVringBase { index: fields.u32() }
            }
            Request::SetVringKick | Request::SetVringCall | Request::SetVringErr => {
                size(len == 8)?;
                let value = fields.u64();
                if value & !(NO_DESCRIPTOR | 0xff) != 0 {
                    return Err(Error::Reserved { request, field: "ring", value });
                }
                takes = usize::from(value & NO_DESCRIPTOR == 0);
                let index = (value & 0xff) as u32;
                match request {
                    Request::SetVringKick => Message::SetVringKick { index },
                    Request::SetVringCall => Message::SetVringCall { index },
                    _ => Message::SetVringErr { index },
                }
            }
            Request::SetVringEnable => {
                size(len == 8)?;
                let (index, enable) = (fields.u32(), fields.u32());
                if enable > 1 {
                    let value = enable.into();
                    return Err(Error::Reserved { request, field: "state", value });
                }
                Message::SetVringEnable { index, enable: enable == 1 }
            }
            Request::SendRarp => {
                size(len == 8)?;
                let [a, b, c, d, e, f, _, _] = fields.take();
                Message::SendRarp { mac: [a, b, c, d, e, f] }
            }
            Request::NetSetMtu => {
                size(len == 8)?;
                Message::NetSetMtu(fields.u64())
            }
            Request::GetConfig | Request::SetConfig => {
                size(len >= CONFIG_HEADER_LEN)?;
                let (offset, count, flags) = (fields.u32(), fields.u32() as usize, fields.u32());
                // The header's check keeps this within CONFIG_MAX.
                size(len - CONFIG_HEADER_LEN == count)?;
                let mut bytes = [0; CONFIG_MAX];
                bytes[..count].copy_from_slice(fields.0);
                let config = ConfigBytes { offset, flags, len: count, bytes };
                match request {
                    Request::GetConfig => Message::GetConfig(config),
                    _ => Message::SetConfig(config),
                }
            }
            Request::AddMemReg | Request::RemMemReg => {
                size(len == 8 + REGION_LEN)?;
                let _padding = fields.u64();
                let region = fields.region();
                match request {
                    Request::AddMemReg => {
                        takes = 1;
                        Message::AddMemReg(region)
                    }
                    _ => {
                        // "For compatibility with existing incorrect implementations, the back-end
                        // MAY accept messages with one file descriptor."
                        takes = descriptors.min(1);
                        Message::RemMemReg(region)
                    }
                }
            }
            Request::SetStatus => {
                size(len == 8)?;
                let value = fields.u64();
                let status = u8::try_from(value);
                Message::SetStatus(status.map_err(|_| Error::Reserved {
                    request,
                    field: "status",
                    value,
                })?)
            }
            Request::SetDeviceStateFd => {
                size(len == 8)?;
                takes = 1;
                Message::SetDeviceStateFd(match (fields.u32(), fields.u32()) {
                    (0, 0) => Some(StateDirection::Save),
                    (1, 0) => Some(StateDirection::Load),
                    _ => None,
                })
            }
            Request::IotlbMsg
            | Request::SetVringEndian
            | Request::CreateCryptoSession
            | Request::CloseCryptoSession
            | Request::PostcopyAdvise
            | Request::PostcopyListen
            | Request::PostcopyEnd
            | Request::GetInflightFd
            | Request::SetInflightFd
            | Request::GpuSetSocket
            | Request::VringKick
            | Request::GetSharedObject
            | Request::GetShmemConfig => return Err(Error::NotOffered { request }),
        };
        match descriptors == takes {
            true => Ok(message),
            false => Err(Error::Descriptors { request, count: descriptors, takes }),
        }
    }
}

/// Reads numbers from bytes. The caller has checked that there are enough.
struct Fields<'b>(&'b [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (bytes, rest) = self.0.split_first_chunk().expect("the size was checked");
        self.0 = rest;
        *bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn region(&mut self) -> RegionDescription {
        RegionDescription {
            guest_address: self.u64(),
            size: self.u64(),
            user_address: self.u64(),
            mmap_offset: self.u64(),
        }
    }
}
