//! `diorama snapshot list`.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use clap::Args;
use comfy_table::{Cell, Color};
use diorama_api::{SnapshotList, SnapshotSummary};

use crate::failure::Failure;
use crate::output::{Output, lines, printable};
use crate::quantity::{bytes, short_id, timestamp};
use crate::session::Session;

/// List snapshots as a tree, with "you are here"
///
/// A snapshot stands below the one that its environment was taken to or from last. With `--environment`, only those of that
/// environment.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  diorama snapshot list
  diorama snapshot list -e pair
  diorama snapshot list --json | jq -r '.snapshots[].name'")]
pub struct Arguments {}

/// Lists them.
///
/// # Errors
/// When the agent cannot read its store.
pub async fn run(_arguments: Arguments, session: &Session<'_>) -> Result<u8, Failure> {
    let mut list = session.client().snapshots().await?;
    if let Some(name) = session.named() {
        list.snapshots.retain(|snapshot| snapshot.environment == name.as_ref());
        list.here.retain(|here| here.environment == name.as_ref());
    }
    session.output().result(&list, || text(&list, session.output()))?;
    for damaged in &list.damaged {
        session.output().warn(&format!("snapshot {} is damaged: {}", damaged.id, damaged.problem));
    }
    Ok(0)
}

fn text(list: &SnapshotList, output: &Output) -> String {
    if list.snapshots.is_empty() {
        return "no snapshots; take one with `diorama snapshot create`\n".to_owned();
    }
    let mut table = output.table();
    table.set_header(["SNAPSHOT", "ID", "ENVIRONMENT", "CREATED", "MACHINES", "STORED", ""]);
    for (index, row) in tree(&list.snapshots).into_iter().enumerate() {
        if row.is_root && index > 0 {
            table.add_row([""; 7]);
        }
        let snapshot = row.snapshot;
        let here: Vec<&str> = list
            .here
            .iter()
            .filter(|here| here.snapshot == snapshot.id)
            .map(|here| here.environment.as_str())
            .collect();
        let mark = if here.is_empty() { "○" } else { "●" };
        let name = Cell::new(format!("{}{mark} {}", row.branch, one_line(&snapshot.name)));
        let mut note = String::new();
        if !here.is_empty() {
            let _ = write!(note, "← you are here ({})", printable(&here.join(", ")));
        }
        if let Some(message) = &snapshot.message {
            let _ = write!(note, "{}{}", if note.is_empty() { "" } else { "  " }, one_line(message));
        }
        table.add_row([
            if here.is_empty() { name } else { name.fg(Color::Green) },
            Cell::new(printable(short_id(&snapshot.id))),
            Cell::new(printable(&snapshot.environment)),
            Cell::new(printable(&timestamp(&snapshot.created))),
            Cell::new(snapshot.machines),
            Cell::new(bytes(snapshot.stored_bytes)),
            Cell::new(note),
        ]);
    }
    lines(&table, "")
}

/// A table's row is one line, whatever a message holds.
fn one_line(text: &str) -> String {
    let mut lines = text.lines();
    let first = printable(lines.next().unwrap_or_default()).replace('\t', " ");
    if lines.next().is_some() { format!("{first} …") } else { first }
}

/// One line of the tree.
struct Row<'a> {
    /// What is drawn before the snapshot.
    branch: String,
    snapshot: &'a SnapshotSummary,
    is_root: bool,
}

/// The snapshots in the order in which they are drawn. An only child stands straight below its parent, so that a long
/// line of snapshots stays a line; several children branch off.
///
/// Every snapshot appears exactly once, also when its parent was deleted, or when damaged manifests form a ring.
fn tree(snapshots: &[SnapshotSummary]) -> Vec<Row<'_>> {
    let known: HashSet<&str> = snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
    let mut children: HashMap<&str, Vec<&SnapshotSummary>> = HashMap::new();
    let mut roots = Vec::new();
    for snapshot in snapshots {
        match snapshot.parent.as_deref().filter(|parent| known.contains(parent)) {
            Some(parent) => children.entry(parent).or_default().push(snapshot),
            None => roots.push(snapshot),
        }
    }
    let mut rows = Vec::new();
    let mut drawn = HashSet::new();
    // What no root leads to is in a ring: each ring is entered at its oldest.
    for root in roots.into_iter().chain(snapshots) {
        let mut waiting = vec![(root, String::new(), String::new(), true)];
        while let Some((snapshot, branch, below, is_root)) = waiting.pop() {
            if !drawn.insert(snapshot.id.as_str()) {
                continue;
            }
            rows.push(Row { branch, snapshot, is_root });
            let next: &[_] = children.get(snapshot.id.as_str()).map_or(&[], Vec::as_slice);
            if let [only] = next {
                waiting.push((only, below.clone(), below, false));
                continue;
            }
            // The last is pushed first: the stack gives the oldest child first.
            for (index, child) in next.iter().enumerate().rev() {
                let (at, under) = if index + 1 == next.len() { ("└─", "  ") } else { ("├─", "│ ") };
                waiting.push((child, format!("{below}{at}"), format!("{below}{under}"), false));
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(snapshots: &[(&str, Option<&str>)]) -> Vec<String> {
        let snapshots: Vec<SnapshotSummary> = snapshots
            .iter()
            .map(|(id, parent)| SnapshotSummary {
                id: (*id).to_owned(),
                name: (*id).to_owned(),
                environment: "pair".to_owned(),
                parent: parent.map(str::to_owned),
                created: String::new(),
                message: None,
                machines: 2,
                stored_bytes: 0,
                cached: false,
            })
            .collect();
        tree(&snapshots).iter().map(|row| format!("{}{}", row.branch, row.snapshot.id)).collect()
    }

    #[test]
    fn lines_stay_lines_and_forks_branch() {
        assert_eq!(drawn(&[("a", None), ("b", Some("a")), ("c", Some("b"))]), ["a", "b", "c"]);
        assert_eq!(
            drawn(&[
                ("a", None),
                ("b", Some("a")),
                ("c", Some("a")),
                ("b2", Some("b")),
                ("b3", Some("b2")),
                ("b4", Some("b2")),
                ("c2", Some("c")),
                ("z", None),
            ]),
            ["a", "├─b", "│ b2", "│ ├─b3", "│ └─b4", "└─c", "  c2", "z"]
        );
    }

    #[test]
    fn every_snapshot_is_drawn_once_whatever_its_parent() {
        assert_eq!(drawn(&[("b", Some("deleted"))]), ["b"]);
        assert_eq!(drawn(&[("a", Some("b")), ("b", Some("a")), ("c", Some("c"))]), ["a", "b", "c"]);
    }

    #[test]
    fn a_long_line_of_snapshots_is_no_deep_recursion() {
        let ids: Vec<String> = (0..20_000).map(|number| number.to_string()).collect();
        let chain: Vec<(&str, Option<&str>)> = ids
            .iter()
            .enumerate()
            .map(|(index, id)| (id.as_str(), index.checked_sub(1).map(|parent| ids[parent].as_str())))
            .collect();
        assert_eq!(drawn(&chain).len(), ids.len());
    }
}
