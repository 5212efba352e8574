//! [`Request`]: the numbers and names of what a front end asks.

use core::fmt;

macro_rules! requests {
    ($($variant:ident = $number:literal $name:literal,)*) => {
        /// A request of a front end (section "Front-end message types"). The value is its `id`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        #[non_exhaustive]
        #[allow(missing_docs)] // The names are those of the document, without `VHOST_USER_`.
        pub enum Request { $($variant = $number,)* }

        impl Request {
            /// Every request of the document.
            pub const ALL: &'static [Request] = &[$(Request::$variant,)*];

            /// The request of this number, if there is one.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Request::$variant),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for Request {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Request::$variant => $name,)* })
            }
        }
    };
}

requests! {
    GetFeatures = 1 "GET_FEATURES",
    SetFeatures = 2 "SET_FEATURES",
    SetOwner = 3 "SET_OWNER",
    ResetOwner = 4 "RESET_OWNER",
    SetMemTable = 5 "SET_MEM_TABLE",
    SetLogBase = 6 "SET_LOG_BASE",
    SetLogFd = 7 "SET_LOG_FD",
    SetVringNum = 8 "SET_VRING_NUM",
    SetVringAddr = 9 "SET_VRING_ADDR",
    SetVringBase = 10 "SET_VRING_BASE",
    GetVringBase = 11 "GET_VRING_BASE",
    SetVringKick = 12 "SET_VRING_KICK",
    SetVringCall = 13 "SET_VRING_CALL",
    SetVringErr = 14 "SET_VRING_ERR",
    GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
    SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
    GetQueueNum = 17 "GET_QUEUE_NUM",
    SetVringEnable = 18 "SET_VRING_ENABLE",
    SendRarp = 19 "SEND_RARP",
    NetSetMtu = 20 "NET_SET_MTU",
    SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
    IotlbMsg = 22 "IOTLB_MSG",
    SetVringEndian = 23 "SET_VRING_ENDIAN",
    GetConfig = 24 "GET_CONFIG",
    SetConfig = 25 "SET_CONFIG",
    CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION",
    CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION",
    PostcopyAdvise = 28 "POSTCOPY_ADVISE",
    PostcopyListen = 29 "POSTCOPY_LISTEN",
    PostcopyEnd = 30 "POSTCOPY_END",
    GetInflightFd = 31 "GET_INFLIGHT_FD",
    SetInflightFd = 32 "SET_INFLIGHT_FD",
    GpuSetSocket = 33 "GPU_SET_SOCKET",
    ResetDevice = 34 "RESET_DEVICE",
    VringKick = 35 "VRING_KICK",
    GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
    AddMemReg = 37 "ADD_MEM_REG",
    RemMemReg = 38 "REM_MEM_REG",
    SetStatus = 39 "SET_STATUS",
    GetStatus = 40 "GET_STATUS",
    GetSharedObject = 41 "GET_SHARED_OBJECT",
    SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD",
    CheckDeviceState = 43 "CHECK_DEVICE_STATE",
    GetShmemConfig = 44 "GET_SHMEM_CONFIG",
}
