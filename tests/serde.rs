//! The S-expressions that OCaml's `Lwt_vmnet` prints and reads, and JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmring::{Interface, Ipv4Range, Loopback, Mode, Status};

const STATUSES: &[(Status, &str)] = &[
    (Status::Failure, "Failure"),
    (Status::MemFailure, "Mem_failure"),
    (Status::InvalidArgument, "Invalid_argument"),
    (Status::SetupIncomplete, "Setup_incomplete"),
    (Status::InvalidAccess, "Invalid_access"),
    (Status::PacketTooBig, "Packet_too_big"),
    (Status::BufferExhausted, "Buffer_exhausted"),
    (Status::TooManyPackets, "Too_many_packets"),
    (Status::SharingServiceBusy, "Sharing_service_busy"),
    (Status::NotAuthorized, "Not_authorized"),
    (Status::Unknown(1011), "(Unknown 1011)"),
];

fn modes() -> [(Mode, &'static str); 3] {
    [
        (Mode::Host, "Host_mode"),
        (Mode::Shared, "Shared_mode"),
        (Mode::Bridged("en0".to_owned()), r#"(Bridged_mode "en0")"#),
    ]
}

/// Prints a value and reads it back, as an S-expression and as JSON.
fn round_trip<T>(value: &T, sexp: &str)
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    assert_eq!(serde_lexpr::to_string(value).unwrap(), sexp);
    assert_eq!(&serde_lexpr::from_str::<T>(sexp).unwrap(), value);
    let json = serde_json::to_string(value).unwrap();
    assert_eq!(&serde_json::from_str::<T>(&json).unwrap(), value, "{json}");
}

#[test]
fn modes_print_and_read_as_in_ocaml() {
    for (mode, sexp) in modes() {
        round_trip(&mode, sexp);
    }
    round_trip(&Mode::Bridged("a b\"c".to_owned()), r#"(Bridged_mode "a b\"c")"#);
}

/// OCaml's sexplib quotes an atom only if it must.
#[test]
fn an_unquoted_name_is_read_too() {
    let mode: Mode = serde_lexpr::from_str("(Bridged_mode en0)").unwrap();
    assert_eq!(mode, Mode::Bridged("en0".to_owned()));
}

#[test]
fn statuses_print_and_read_as_in_ocaml() {
    for (status, sexp) in STATUSES {
        round_trip(status, sexp);
    }
    round_trip(&Status::Os(5), "(Os 5)");
    // The list has every constant of the enum, because the codes have no gap.
    let codes: Vec<_> = STATUSES.iter().map(|(status, _)| status.code().expect("a code")).collect();
    assert_eq!(codes, (1001..=1011).collect::<Vec<_>>());
}

/// `Lwt_vmnet` has no name for 1009 and prints the number. The number survives reading and
/// printing.
#[test]
fn a_number_that_has_a_name_by_now_is_still_read() {
    let status: Status = serde_lexpr::from_str("(Unknown 1009)").unwrap();
    assert_eq!(status, Status::Unknown(1009));
    assert_eq!(status.code(), Status::SharingServiceBusy.code());
}

#[test]
fn what_is_no_mode_or_status_is_an_error() {
    let no_modes =
        ["Unknown_mode", "host", "Bridged_mode", "(Bridged_mode)", "(Bridged_mode a b)", "7", ""];
    for text in no_modes {
        assert!(serde_lexpr::from_str::<Mode>(text).is_err(), "{text}");
    }
    for text in [
        "Success",
        "Unknown",
        "(Unknown x)",
        "(Unknown -1)",
        "(Unknown 1 2)",
        "(Os 99999999999)",
        "1001",
    ] {
        assert!(serde_lexpr::from_str::<Status>(text).is_err(), "{text}");
    }
    let error = serde_json::from_str::<Status>(r#""Succes""#).unwrap_err().to_string();
    assert!(error.contains("Succes") && error.contains("Mem_failure"), "{error}");
}

#[test]
fn json_is_what_the_doc_says() {
    assert_eq!(serde_json::to_string(&Status::Unknown(7)).unwrap(), r#"{"Unknown":[7]}"#);
    assert_eq!(serde_json::to_string(&Mode::Shared).unwrap(), r#""Shared_mode""#);
}

#[test]
fn an_interface_describes_itself() {
    let id = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
    let interface = Interface::builder()
        .device(Loopback::new(1500))
        .mode(Mode::Host)
        .interface_id(id)
        .mac([2, 0, 0, 0, 0, 0xfe].into())
        .ipv4("192.168.64.1/24".parse::<Ipv4Range>().unwrap())
        .start()
        .unwrap();
    let info = serde_json::to_value(interface.info()).unwrap();
    let expected = serde_json::json!({
        "mode": "Host_mode",
        "interface_id": "01234567-89ab-cdef-0123-456789abcdef",
        "mac": "02:00:00:00:00:FE",
        "mtu": 1500,
        "max_packet_size": 1514,
        "ipv4": { "start": "192.168.64.1", "end": "192.168.64.254", "mask": "255.255.255.0" },
        "nat66_prefix": null,
    });
    assert_eq!(info, expected);
    let sexp = serde_lexpr::to_string(&interface.info()).unwrap();
    for part in ["(mode . Host_mode)", "(mtu . 1500)", "(max_packet_size . 1514)"] {
        assert!(sexp.contains(part), "{part} in {sexp}");
    }
}
