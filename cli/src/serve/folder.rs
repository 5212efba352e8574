//! The private folder: where a socket without a folder is.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

use crate::failure::Failure;

/// The path that is meant: a name without a slash is in the private folder of this user.
pub(super) fn place_of(path: &Path) -> Result<PathBuf, Failure> {
    if path.as_os_str().as_encoded_bytes().contains(&b'/') {
        return Ok(path.to_owned());
    }
    let folder =
        private(geteuid().as_raw(), std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from));
    make(&folder)?;
    Ok(folder.join(path))
}

/// The path, in the private folder, to which the peer at `path` answers. It is the same each time, so that a
/// server that is started again replaces the socket of one that was killed.
pub(super) fn answers_of(path: &Path) -> Result<PathBuf, Failure> {
    let hash = Sha256::digest(path.as_os_str().as_encoded_bytes());
    let digits: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    place_of(Path::new(&format!("answers-{digits}.sock")))
}

/// The private folder of a user: below `$XDG_RUNTIME_DIR`, if that is a folder of the user's; otherwise
/// `/run/vmring` for root, `/run/user/UID/vmring` where there is such a folder, and one of the user's own
/// in the folder for temporary files.
fn private(user: u32, runtime: Option<PathBuf>) -> PathBuf {
    const RUN: &str = if cfg!(target_os = "macos") { "/var/run" } else { "/run" };
    let of_user =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|it| it.is_dir() && it.uid() == user);
    let runtime = runtime.filter(|path| path.is_absolute()).filter(of_user);
    let folder = runtime.or_else(|| {
        let run = match user {
            0 => PathBuf::from(RUN),
            user => Path::new(RUN).join("user").join(user.to_string()),
        };
        Some(run).filter(of_user)
    });
    match folder {
        Some(folder) => folder.join("vmring"),
        None => std::env::temp_dir().join(format!("vmring-{user}")),
    }
}

/// Makes the folder, if it is not there. It is the user's own and no link, and nobody else has access.
fn make(folder: &Path) -> Result<(), Failure> {
    let failed = |why: String| {
        Failure::Usage(format!(
            "the private folder {} {why}; name the socket with a path, like ./vm0.sock",
            folder.display()
        ))
    };
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed(format!("cannot be made: {error}")));
        }
        _ => {}
    }
    let it = fs::symlink_metadata(folder).map_err(|error| failed(format!("is lost: {error}")))?;
    if !it.is_dir() || it.uid() != geteuid().as_raw() {
        return Err(failed("is somebody else's".to_owned()));
    }
    if it.mode() & 0o077 != 0 {
        return Err(failed(format!("has the mode {:o} and not 700", it.mode() & 0o777)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("vmring-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    #[test]
    fn a_path_stays_as_it_is() {
        for path in ["/run/a.sock", "./a.sock", "x/a.sock"] {
            assert_eq!(place_of(Path::new(path)).expect(path), Path::new(path));
        }
    }

    #[test]
    fn the_private_folder_is_the_users_own() {
        let (me, runtime) = (geteuid().as_raw(), scratch("runtime"));
        assert_eq!(private(me, Some(runtime.clone())), runtime.join("vmring"));
        // That of another user, or none, is not used.
        let other = private(me + 1, Some(runtime.clone()));
        assert!(other.ends_with(format!("vmring-{}", me + 1)), "{}", other.display());
        for none in [Some(PathBuf::from("relative")), Some("/nonexistent".into()), None] {
            let folder = private(me, none);
            assert!(folder.is_absolute() && !folder.starts_with(&runtime), "{}", folder.display());
        }
        fs::remove_dir_all(&runtime).expect("the folder");
    }

    #[test]
    fn a_folder_that_others_can_read_is_refused() {
        let folder = scratch("open folder").join("vmring");
        make(&folder).expect("it is made");
        make(&folder).expect("it is there");
        assert_eq!(fs::metadata(&folder).expect("it is there").mode() & 0o777, 0o700);
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o750)).expect("its mode");
        let refused = make(&folder).expect_err("others can read it").to_string();
        assert!(refused.contains("has the mode 750 and not 700; name the socket"), "{refused}");
        fs::remove_dir(&folder).expect("it is empty");
        std::os::unix::fs::symlink("/tmp", &folder).expect("a link");
        let refused = make(&folder).expect_err("it is a link").to_string();
        assert!(refused.contains("is somebody else's"), "{refused}");
        fs::remove_dir_all(folder.parent().expect("a folder")).expect("the folder");
    }
}
