//! The user that the server becomes (`--user`, `--group`), or the one who has called sudo(8).
//!
//! What takes privileges is done by the one who has started the server. Sockets and other files are made
//! as the user, who so may make them, and can remove them at the end.

use std::io;

use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, setegid, seteuid, setgid, setuid};

use super::teller::Event;
use crate::failure::Failure;
use crate::serve::kept::Kept;

/// A user and a group that the server becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    uid: Uid,
    gid: Gid,
    /// For sentences: who has said so.
    why: String,
}

/// Where the wish comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish<'a> {
    pub(super) user: Option<&'a str>,
    pub(super) group: Option<&'a str>,
    /// What sudo(8) says of its caller: `SUDO_UID` and `SUDO_GID`.
    pub(super) sudo: (Option<&'a str>, Option<&'a str>),
}

impl Identity {
    /// Returns the user that the server becomes. `None` if it stays the one that it is: nothing is asked
    /// for, or it is that user.
    pub(super) fn of(wish: Wish<'_>) -> Result<Option<Self>, Failure> {
        let (me, my_group) = (geteuid(), getegid());
        let Wish { user, group, sudo } = wish;
        let (uid, primary, why) = match (user, sudo) {
            (Some(name), _) => {
                let user = user_of(name)?;
                (user.0, user.1, format!("as --user {name}"))
            }
            (None, (Some(uid), gid)) if me.is_root() => {
                let number = |text: &str| text.parse().ok();
                // It is sudo's own to say. What is no number is not from sudo.
                let Some(uid) = number(uid).map(Uid::from_raw) else { return Ok(None) };
                let gid = gid.and_then(number).map(Gid::from_raw);
                let why = "as the caller of sudo; --user root stays root".to_owned();
                (uid, gid.or_else(|| group_of_user(uid)), why)
            }
            _ => (me, Some(my_group), "as --group says".to_owned()),
        };
        let gid = match group {
            Some(name) => group_of(name)?,
            None => primary.ok_or_else(|| {
                Failure::Usage(format!("user {uid} has no group; name one with --group"))
            })?,
        };
        if (uid, gid) == (me, my_group) {
            return Ok(None);
        }
        if !me.is_root() {
            return Err(Failure::Usage(
                "only root can become another user; start the server as that user, without --user and \
                 --group"
                    .to_owned(),
            ));
        }
        Ok(Some(Self { uid, gid, why }))
    }

    /// Does something as the user, and is who it was before afterwards. No other thread runs.
    pub(super) fn for_now<T>(
        identity: Option<&Self>,
        f: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Some(one) = identity else { return f() };
        let (me, my_group) = (geteuid(), getegid());
        // The group comes first, because only root may change it.
        setegid(one.gid)
            .and_then(|()| seteuid(one.uid))
            .map_err(|error| one.failed(error.into()))?;
        let done = f();
        seteuid(me).and_then(|()| setegid(my_group)).map_err(|error| one.failed(error.into()))?;
        done.map_err(|failure| match failure {
            Failure::Usage(sentence) => Failure::Usage(format!("{sentence} ({})", one.why)),
            Failure::Step(sentence) => Failure::Step(format!("{sentence} ({})", one.why)),
        })
    }

    /// Becomes the user for good, in no other group. No other thread runs. It keeps the
    /// capabilities for `kept` (Linux).
    pub(super) fn assume(&self, kept: Kept) -> Result<(), Failure> {
        self.become_user(kept).map_err(|error| self.failed(error))
    }

    /// What is said when the process has become the user.
    pub(super) fn event(&self) -> Event<'static> {
        Event::Became { uid: self.uid.as_raw(), gid: self.gid.as_raw() }
    }

    fn become_user(&self, kept: Kept) -> io::Result<()> {
        let group = self.gid.as_raw();
        keep::prepare(kept)?;
        // SAFETY: the pointer is to one number, which lives until the call returns.
        if unsafe { libc::setgroups(1, &group) } < 0 {
            return Err(io::Error::last_os_error());
        }
        setgid(self.gid)?;
        setuid(self.uid)?;
        keep::restrict(kept)
    }

    fn failed(&self, error: io::Error) -> Failure {
        Failure::Step(format!("the server cannot become user {} ({}): {error}", self.uid, self.why))
    }
}

fn user_of(name: &str) -> Result<(Uid, Option<Gid>), Failure> {
    if let Ok(number) = name.parse() {
        let uid = Uid::from_raw(number);
        return Ok((uid, group_of_user(uid)));
    }
    match User::from_name(name) {
        Ok(Some(user)) => Ok((user.uid, Some(user.gid))),
        Ok(None) => Err(Failure::Usage(format!(
            "there is no user '{name}'; --user takes a name that 'id' knows, or a number"
        ))),
        Err(error) => Err(Failure::Step(format!("the user '{name}' cannot be looked up: {error}"))),
    }
}

fn group_of_user(uid: Uid) -> Option<Gid> {
    User::from_uid(uid).ok().flatten().map(|user| user.gid)
}

fn group_of(name: &str) -> Result<Gid, Failure> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(Failure::Usage(format!(
            "there is no group '{name}'; --group takes a name that 'getent group' knows, or a number"
        ))),
        Err(error) => {
            Err(Failure::Step(format!("the group '{name}' cannot be looked up: {error}")))
        }
    }
}

/// Capabilities that outlive the change of user.
#[cfg(target_os = "linux")]
mod keep {
    use std::io;

    use caps::{CapSet, CapsHashSet};

    use crate::serve::kept::Kept;

    /// No program that is executed gets a capability. Those of this process stay permitted over the change
    /// of user, if they are needed.
    pub(super) fn prepare(kept: Kept) -> io::Result<()> {
        // Without the right to do so the process has few capabilities, and the change of user takes them.
        let _ = caps::clear(None, CapSet::Bounding);
        if !kept.is_any() {
            return Ok(());
        }
        // SAFETY: the call takes numbers only.
        match unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Keeps those that are needed, if they were there.
    pub(super) fn restrict(kept: Kept) -> io::Result<()> {
        if !kept.is_any() {
            return Ok(());
        }
        let wrong = |error: caps::errors::CapsError| io::Error::other(error.to_string());
        let had = caps::read(None, CapSet::Permitted).map_err(wrong)?;
        let needed = kept.capabilities().map(|(one, _)| one);
        let kept: CapsHashSet = needed.filter(|one| had.contains(one)).collect();
        caps::set(None, CapSet::Effective, &kept).map_err(wrong)?;
        caps::set(None, CapSet::Permitted, &kept).map_err(wrong)
    }
}

/// Elsewhere there are none.
#[cfg(not(target_os = "linux"))]
mod keep {
    use std::io;

    use crate::serve::kept::Kept;

    pub(super) fn prepare(_: Kept) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn restrict(_: Kept) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Wish<'_> = Wish { user: None, group: None, sudo: (None, None) };

    fn sentence(wish: Wish<'_>) -> String {
        match Identity::of(wish) {
            Err(Failure::Usage(sentence)) => sentence,
            other => panic!("{wish:?}: {other:?}"),
        }
    }

    #[test]
    fn nobody_asked_is_nobody_else() {
        assert_eq!(Identity::of(NOTHING).unwrap(), None);
        let me = geteuid().to_string();
        let group = getegid().to_string();
        let wish = Wish { user: Some(&me), group: Some(&group), ..NOTHING };
        assert_eq!(Identity::of(wish).unwrap(), None);
        // What is no number is not from sudo.
        let wish = Wish { sudo: (Some("me"), None), ..NOTHING };
        assert_eq!(Identity::of(wish).unwrap(), None);
    }

    #[test]
    fn who_is_unknown_is_refused_in_a_sentence() {
        let user = Wish { user: Some("nobody-of-this-name"), ..NOTHING };
        assert!(sentence(user).contains("there is no user 'nobody-of-this-name'; --user takes"));
        let group = Wish { group: Some("no-such-group"), ..NOTHING };
        assert!(sentence(group).contains("there is no group 'no-such-group'; --group takes"));
    }

    #[test]
    fn root_becomes_who_is_asked_for_and_others_do_not() {
        let wish = Wish { user: Some("12345"), group: Some("23456"), ..NOTHING };
        let sudo = Wish { sudo: (Some("12345"), Some("23456")), ..NOTHING };
        if !geteuid().is_root() {
            assert!(sentence(wish).starts_with("only root can become another user"));
            assert_eq!(Identity::of(sudo).unwrap(), None);
            return;
        }
        for wish in [wish, sudo] {
            let identity = Identity::of(wish).unwrap().expect("another user");
            assert_eq!((identity.uid.as_raw(), identity.gid.as_raw()), (12345, 23456));
        }
        // An option is stronger than sudo, and root may stay.
        let both = Wish { sudo: sudo.sudo, ..wish };
        assert!(Identity::of(both).unwrap().expect("another user").why.contains("--user 12345"));
        let (me, group) = (geteuid().to_string(), getegid().to_string());
        let stays = Wish { user: Some(&me), group: Some(&group), sudo: sudo.sudo };
        assert_eq!(Identity::of(stays).unwrap(), None);
        assert!(sentence(Wish { user: Some("54321"), ..NOTHING }).contains("has no group"));
    }
}
