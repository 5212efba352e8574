//! Implementations of serde's traits for the types that `Lwt_vmnet` converts to S-expressions. The
//! form is that of OCaml's sexplib: `Host_mode`, `(Bridged_mode en0)`, `(Unknown 1009)`.
//! [`Status::Os`], which `Lwt_vmnet` does not have, is `(Os 5)`.
//!
//! A variant with an argument is serialized as a tuple variant of one element, because this is a
//! list in an S-expression. (In JSON it is `{"Unknown":[1009]}`.)

use std::fmt;
use std::marker::PhantomData;

use serde::de::{
    self, Deserialize, Deserializer, EnumAccess, IgnoredAny, SeqAccess, VariantAccess, Visitor,
};
use serde::ser::{Serialize, SerializeStruct, SerializeTupleVariant, Serializer};

use crate::config::{InterfaceInfo, Ipv4Range, Mode};
use crate::error::Status;

const MODES: &[&str] = &["Host_mode", "Shared_mode", "Bridged_mode"];

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Mode::Host => serializer.serialize_unit_variant("Mode", 0, MODES[0]),
            Mode::Shared => serializer.serialize_unit_variant("Mode", 1, MODES[1]),
            Mode::Bridged(name) => {
                let mut variant = serializer.serialize_tuple_variant("Mode", 2, MODES[2], 1)?;
                variant.serialize_field(name)?;
                variant.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_enum("Mode", MODES, VariantVisitor::<Mode>(PhantomData))
    }
}

/// The names of the statuses: first those without an argument, in the order of their codes from
/// 1001.
const STATUSES: &[&str] = &[
    "Failure",
    "Mem_failure",
    "Invalid_argument",
    "Setup_incomplete",
    "Invalid_access",
    "Packet_too_big",
    "Buffer_exhausted",
    "Too_many_packets",
    "Sharing_service_busy",
    "Not_authorized",
    "Unknown",
    "Os",
];
const UNKNOWN: u32 = 10;
const OS: u32 = 11;

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (i, argument) = match (*self, self.code()) {
            (Status::Unknown(code), _) => (UNKNOWN, Some(i64::from(code))),
            (Status::Os(errno), _) => (OS, Some(i64::from(errno))),
            (_, code) => (code.expect("every other status has a code") - 1001, None),
        };
        let name = STATUSES[i as usize];
        let Some(argument) = argument else {
            return serializer.serialize_unit_variant("Status", i, name);
        };
        let mut variant = serializer.serialize_tuple_variant("Status", i, name, 1)?;
        variant.serialize_field(&argument)?;
        variant.end()
    }
}

impl<'de> Deserialize<'de> for Status {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_enum("Status", STATUSES, VariantVisitor::<Status>(PhantomData))
    }
}

/// A name without quotes. Formats that distinguish symbols from strings have a symbol here.
struct Name(String);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl Visitor<'_> for NameVisitor {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Name, E> {
                Ok(Name(name.to_owned()))
            }
        }
        deserializer.deserialize_identifier(NameVisitor)
    }
}

/// The argument of a variant.
trait Argument: Sized {
    fn next<'de, S: SeqAccess<'de>>(seq: &mut S) -> Result<Option<Self>, S::Error>;
}

impl Argument for i64 {
    fn next<'de, S: SeqAccess<'de>>(seq: &mut S) -> Result<Option<Self>, S::Error> {
        seq.next_element()
    }
}

impl Argument for String {
    fn next<'de, S: SeqAccess<'de>>(seq: &mut S) -> Result<Option<Self>, S::Error> {
        // sexplib quotes a string only if it must, so a string can also be a name. A sequence of an
        // S-expression does not move past an element of another kind than was asked for. In a
        // format in which it does, the second call fails, and the first error is returned.
        seq.next_element::<String>().or_else(|error| {
            seq.next_element::<Name>().map(|name| name.map(|Name(name)| name)).map_err(|_| error)
        })
    }
}

/// An enum whose variants have at most one argument.
trait Variants: Sized {
    type Argument: Argument;
    const NAMES: &'static [&'static str];
    fn constant(name: &str) -> Option<Self>;
    fn with(name: &str, argument: Self::Argument) -> Option<Self>;
    fn takes_argument(name: &str) -> bool;
}

impl Variants for Mode {
    type Argument = String;
    const NAMES: &'static [&'static str] = MODES;

    fn constant(name: &str) -> Option<Self> {
        match name {
            "Host_mode" => Some(Mode::Host),
            "Shared_mode" => Some(Mode::Shared),
            _ => None,
        }
    }

    fn with(name: &str, argument: String) -> Option<Self> {
        Self::takes_argument(name).then_some(Mode::Bridged(argument))
    }

    fn takes_argument(name: &str) -> bool {
        name == "Bridged_mode"
    }
}

impl Variants for Status {
    type Argument = i64;
    const NAMES: &'static [&'static str] = STATUSES;

    fn constant(name: &str) -> Option<Self> {
        let i = STATUSES.iter().position(|known| *known == name)? as u32;
        Status::from_code(1001 + i).filter(|_| i < UNKNOWN)
    }

    fn with(name: &str, argument: i64) -> Option<Self> {
        match name {
            "Unknown" => argument.try_into().ok().map(Status::Unknown),
            "Os" => argument.try_into().ok().map(Status::Os),
            _ => None,
        }
    }

    fn takes_argument(name: &str) -> bool {
        matches!(name, "Unknown" | "Os")
    }
}

struct VariantVisitor<T>(PhantomData<T>);

impl<'de, T: Variants> Visitor<'de> for VariantVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "one of {}", T::NAMES.join(", "))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<T, A::Error> {
        let (Name(name), access) = data.variant::<Name>()?;
        let unknown = || de::Error::unknown_variant(&name, T::NAMES);
        if T::takes_argument(&name) {
            let argument = access.tuple_variant(1, ArgumentVisitor(PhantomData))?;
            return T::with(&name, argument).ok_or_else(unknown);
        }
        let value = T::constant(&name).ok_or_else(unknown)?;
        access.unit_variant()?;
        Ok(value)
    }
}

struct ArgumentVisitor<A>(PhantomData<A>);

impl<'de, A: Argument> Visitor<'de> for ArgumentVisitor<A> {
    type Value = A;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one argument")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<A, S::Error> {
        let argument = A::next(&mut seq)?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
        match seq.next_element::<IgnoredAny>()? {
            None => Ok(argument),
            Some(_) => Err(de::Error::invalid_length(2, &self)),
        }
    }
}

impl Serialize for Ipv4Range {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Ipv4Range", 3)?;
        fields.serialize_field("start", &self.start)?;
        fields.serialize_field("end", &self.end)?;
        fields.serialize_field("mask", &self.mask)?;
        fields.end()
    }
}

impl Serialize for InterfaceInfo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let id = self.interface_id.map(|byte| format!("{byte:02x}")).concat();
        let uuid = [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-");
        let mut fields = serializer.serialize_struct("InterfaceInfo", 7)?;
        fields.serialize_field("mode", &self.mode)?;
        fields.serialize_field("interface_id", &uuid)?;
        fields.serialize_field("mac", &self.mac.to_string())?;
        fields.serialize_field("mtu", &self.mtu)?;
        fields.serialize_field("max_packet_size", &self.max_packet_size)?;
        fields.serialize_field("ipv4", &self.ipv4)?;
        fields.serialize_field("nat66_prefix", &self.nat66_prefix)?;
        fields.end()
    }
}
