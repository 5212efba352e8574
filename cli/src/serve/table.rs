//! The table on a terminal: what each guest has moved in the last second.

use std::collections::BTreeMap;

use super::counts::Moved;
use super::limits::{LIVE_ROWS, TICK};
use crate::report::{Table, WIDTH, grouped, rate};

/// What the guests have moved until now.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// By the place of the socket, and the number of the guest there.
    pub(super) guests: BTreeMap<(usize, u64), Row>,
    /// Of all guests that have gone.
    pub(super) gone: Moved,
}

/// A guest.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// Its socket.
    pub(super) name: String,
    pub(super) guest: u64,
    pub(super) moved: Moved,
}

impl Rows {
    fn all(&self) -> Moved {
        self.guests.values().map(|row| row.moved).chain([self.gone]).sum()
    }
}

/// A line about all guests, which leaves space for two blanks in front of it, and a row for each guest
/// that moves most. None is wider than a terminal of 80 columns.
pub(super) fn live_table(before: &Rows, now: &Rows) -> String {
    let guests = now.guests.len();
    let (all_before, all) = (before.all(), now.all());
    let s = if guests == 1 { "" } else { "s" };
    let mut text = format!(
        "{guests} guest{s}: to {}, from {}, {} dropped",
        way(all_before.to, all.to),
        way(all_before.from, all.from),
        grouped(all.dropped)
    );
    if guests == 0 {
        return text;
    }
    let nothing = Moved::default();
    let mut rows: Vec<_> = now.guests.iter().collect();
    let before = |key| before.guests.get(key).map_or(nothing, |row| row.moved);
    let moves = |key, row: &Row| {
        let (then, now) = (before(key), row.moved);
        (now.to.1 + now.from.1).saturating_sub(then.to.1 + then.from.1)
    };
    // The busiest stay; they are in the order of their sockets.
    rows.sort_by_key(|(key, row)| std::cmp::Reverse(moves(key, row)));
    rows.truncate(LIVE_ROWS);
    rows.sort_by_key(|(key, _)| **key);
    let mut table = Table::new(&["guest", "to it", "from it", "dropped"]);
    for (key, row) in &rows {
        let (then, now) = (before(key), row.moved);
        table.row([
            name_of(row),
            way(then.to, now.to),
            way(then.from, now.from),
            grouped(now.dropped),
        ]);
    }
    text.push('\n');
    text.push_str(table.text().trim_end());
    if guests > rows.len() {
        text.push_str(&format!("\n  and {} more, which move less", guests - rows.len()));
    }
    text
}

fn way(before: (u64, u64), now: (u64, u64)) -> String {
    rate(now.0.saturating_sub(before.0), now.1.saturating_sub(before.1), TICK)
}

/// The end of the socket's name, which tells most, and the number of the guest there.
fn name_of(row: &Row) -> String {
    const LONGEST: usize = WIDTH - 62;
    let number = format!(" #{}", row.guest);
    let room = LONGEST.saturating_sub(number.len());
    let letters = row.name.chars().count();
    let name: String = match letters > room {
        true => ['…'].into_iter().chain(row.name.chars().skip(letters + 1 - room)).collect(),
        false => row.name.clone(),
    };
    name + &number
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(moved: &[Moved]) -> Rows {
        let name = "vhost-user:/run/user/1000/vmring/a-long-name-of-a-machine.sock".to_owned();
        let row = |(i, moved): (usize, &Moved)| {
            ((i / 3, i as u64 + 1), Row { name: name.clone(), guest: i as u64 + 1, moved: *moved })
        };
        Rows { guests: moved.iter().enumerate().map(row).collect(), gone: Moved::default() }
    }

    #[test]
    fn the_first_line_is_about_all_guests() {
        let before = Moved { to: (5, 500), ..Moved::default() };
        let now = Moved { to: (4_500_005, 5_625_000_500), from: (1234, 99_999), dropped: 7 };
        let table = live_table(&rows(&[before, before]), &rows(&[now, before]));
        let line = table.lines().next().expect("a line");
        assert!(line.len() <= WIDTH - 2);
        assert_eq!(
            line,
            "2 guests: to 4.5 Mpps 45.00 Gbit/s, from 1.2 kpps 0.00 Gbit/s, 7 dropped"
        );
        assert!(live_table(&rows(&[now]), &rows(&[now])).starts_with("1 guest: to 0 pps"));
        assert!(!live_table(&rows(&[now]), &Rows::default()).contains('\n'), "there is no guest");
    }

    #[test]
    fn the_table_fits_into_80_columns_and_shows_the_busiest() {
        let most = (990_000, 1_200_000_000);
        let moved = |i: u64| Moved { to: most, from: (i, i), dropped: 9_999 };
        let now: Vec<_> = (0..40).map(moved).collect();
        let table = live_table(&rows(&vec![Moved::default(); 40]), &rows(&now));
        for line in table.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        // A line about all, a heading, the guests, and a line about the others.
        assert_eq!(table.lines().count(), LIVE_ROWS + 3, "{table}");
        assert!(table.contains("and 28 more"), "{table}");
        assert!(table.contains("machine.sock #40") && !table.contains("#1 "), "{table}");
    }
}
