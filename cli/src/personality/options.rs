//! What the helpers' command lines have in common: their errors, and the values of their options.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::limits::PATH_MAX;

/// The text of the help, if this is what was asked for.
pub(super) fn help_of(error: &clap::Error) -> Option<String> {
    (error.kind() == ErrorKind::DisplayHelp).then(|| error.render().to_string())
}

/// Why a command line is refused, in the words of vmnet-helper (`options.c`).
pub(super) fn refusal(error: &clap::Error) -> String {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let argument = text(ContextKind::InvalidArg).unwrap_or_default();
    // clap names an option with its value: `--fd <FD>`.
    let option = argument.split([' ', '=']).next().unwrap_or_default();
    let value = text(ContextKind::InvalidValue).unwrap_or_default();
    match error.kind() {
        ErrorKind::UnknownArgument => format!("Invalid option: {argument}"),
        ErrorKind::InvalidValue | ErrorKind::WrongNumberOfValues if value.is_empty() => {
            format!("Option {option} requires an argument")
        }
        ErrorKind::MissingRequiredArgument => format!("Missing argument: {argument}"),
        _ => {
            let text = error.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            first.strip_prefix("error: ").unwrap_or(first).to_owned()
        }
    }
}

/// A UUID in the form of uuid_parse(3), 8-4-4-4-12 hexadecimal digits.
pub(super) fn uuid(text: &str) -> Option<[u8; 16]> {
    let lengths = text.split('-').map(str::len);
    if !lengths.eq([8, 4, 4, 4, 12]) || !text.is_ascii() {
        return None;
    }
    let digits: String = text.split('-').collect();
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.as_bytes().chunks(2)) {
        // A sign is none of its digits.
        let pair =
            std::str::from_utf8(pair).ok().filter(|_| pair.iter().all(u8::is_ascii_hexdigit))?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(id)
}

/// A UUID as uuid_unparse(3) of macOS writes it.
pub(super) fn uuid_text(id: &[u8; 16]) -> String {
    let digits = id.map(|byte| format!("{byte:02X}")).concat();
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// An address of IPv4, or the original's sentence. `what` is the option.
pub(super) fn address(text: &str, what: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| format!("Invalid {what}: \"{text}\""))
}

/// The path of a socket as it is: one without a slash is in the current folder.
pub(super) fn path(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new(".").join(path),
        _ => path.to_owned(),
    }
}

/// Refuses a path that is too long for a socket.
pub(super) fn check_length(path: &Path) -> Result<(), String> {
    let len = path.as_os_str().len();
    if len > PATH_MAX {
        return Err(format!("Socket \"{}\" too long ({len} > {PATH_MAX})", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_five_groups_of_digits() {
        let text = "2835E074-9892-4A79-AFFB-7E41D2605678";
        let id = uuid(text).expect("a UUID");
        assert_eq!((id[0], id[6], id[15]), (0x28, 0x4a, 0x78));
        assert_eq!(uuid_text(&id), text);
        assert_eq!(uuid(&text.to_lowercase()), Some(id));
        for wrong in [
            "",
            "2835E07498924A79AFFB7E41D2605678",
            "{2835E074-9892-4A79-AFFB-7E41D2605678}",
            "2835E074-9892-4A79-AFFB-7E41D260567",
            "2835E074-9892-4A79-AFFB-7E41D260567G",
            "+835E074-9892-4A79-AFFB-7E41D2605678",
            "\u{e4}35E074-9892-4A79-AFFB-7E41D2605678",
        ] {
            assert_eq!(uuid(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_path_without_a_slash_is_here() {
        assert_eq!(path(Path::new("a.sock")), Path::new("./a.sock"));
        assert_eq!(path(Path::new("/run/a.sock")), Path::new("/run/a.sock"));
        assert_eq!(path(Path::new("run/a.sock")), Path::new("run/a.sock"));
    }
}
