//! The fields of one mapping, each known and given once.

use crate::document::{Key, Node};
use crate::problem::{Excerpt, Problems, listed, nearest};

/// The known fields that a mapping gives.
pub(super) struct Fields<'n>(Vec<(&'n Key, &'n Node)>);

impl<'n> Fields<'n> {
    /// Sorts out what is unknown or repeated; `what` has the fields `known`.
    pub fn read(what: &str, entries: &'n [(Key, Node)], known: &[&str], problems: &mut Problems) -> Self {
        let mut fields = Fields(Vec::new());
        for (key, node) in entries {
            if problems.is_full() {
                break;
            }
            if !known.contains(&key.text.as_str()) {
                let message = format!("{} is not a field of {what}", Excerpt(&key.text));
                let all = listed(known.iter().copied());
                let hint = match nearest(&key.text, known.iter().copied()) {
                    Some(word) => format!("did you mean `{word}`? The fields are {all}"),
                    None => format!("the fields are {all}"),
                };
                problems.push(key.at.problem(message, "unknown field").hint(hint));
            } else if let Some((first, _)) = fields.get(&key.text) {
                let message = format!("{} is given twice", Excerpt(&key.text));
                let hint = format!("the first is on line {}: remove one", first.at.line);
                problems.push(key.at.problem(message, "given again").hint(hint));
            } else {
                fields.0.push((key, node));
            }
        }
        fields
    }

    pub fn get(&self, name: &str) -> Option<(&'n Key, &'n Node)> {
        self.0.iter().find(|(key, _)| key.text == name).copied()
    }

    /// The value of a field.
    pub fn value(&self, name: &str) -> Option<&'n Node> {
        self.get(name).map(|(_, node)| node)
    }
}
