//! The archive that a kernel unpacks as its first file system: cpio in the format "newc", as the
//! kernel's `Documentation/driver-api/early-userspace/buffer-format.rst` has it.

/// An archive that is being written. What is added twice has the later contents.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: Vec<String>,
}

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a folder, and those above it. `path` has no slash at its beginning.
    pub(crate) fn folder(&mut self, path: &str) {
        if path.is_empty() || self.folders.iter().any(|folder| folder == path) {
            return;
        }
        self.folder(parent(path));
        self.folders.push(path.to_owned());
        self.entry(path, FOLDER, (0, 0), &[]);
    }

    /// Adds a file that can be run, and the folders above it.
    pub(crate) fn file(&mut self, path: &str, contents: &[u8]) {
        self.folder(parent(path));
        self.entry(path, PROGRAM, (0, 0), contents);
    }

    /// Adds a symbolic link, and the folders above it.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.folder(parent(path));
        self.entry(path, LINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device, and the folders above it.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.folder(parent(path));
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// The whole archive. The kernel accepts several of them in a row.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(contents.len()).expect("less than 4 GiB");
        let path_len = path.len() as u32 + 1;
        // In order: inode, mode, user, group, links, time of change, length, the device of the file
        // system, the device itself, length of the path, checksum.
        let (major, minor) = device;
        let fields = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, major, minor, path_len, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(contents);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_bytes_of_the_format() {
        let mut archive = Archive::new();
        archive.file("a/b", b"hello");
        let bytes = archive.finish();
        let folder = "07070100000001000041ed000000000000000000000001000000000000000000000000000000\
                      0000000000000000000000000200000000a\0";
        let file = "07070100000002000081ed000000000000000000000001000000000000000500000000000000\
                    0000000000000000000000000400000000a/b\0\0\0hello\0\0\0";
        let trailer = "0707010000000300000000000000000000000000000001000000000000000000000000000000\
                       0000000000000000000000000b00000000TRAILER!!!\0\0\0\0";
        assert_eq!(String::from_utf8(bytes).expect("ASCII"), [folder, file, trailer].concat());
    }
}
