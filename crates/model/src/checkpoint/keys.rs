//! Which tensors a model misses in a checkpoint, and which it doesn't know.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::CheckpointError;

/// The difference between the names that a model needs and those that a checkpoint has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyReport {
    path: PathBuf,
    /// Needed and not there.
    pub missing: Vec<String>,
    /// There and not needed.
    pub surplus: Vec<String>,
}

/// How many names a message lists before it only counts.
const LISTED: usize = 4;

impl KeyReport {
    /// Compares two sets of names.
    pub fn new<'a>(
        path: PathBuf,
        needed: impl IntoIterator<Item = &'a str>,
        found: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let needed: BTreeSet<&str> = needed.into_iter().collect();
        let found: BTreeSet<&str> = found.into_iter().collect();
        let difference = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| {
            a.difference(b).map(|name| name.to_string()).collect()
        };
        Self {
            path,
            missing: difference(&needed, &found),
            surplus: difference(&found, &needed),
        }
    }

    /// Whether both sets are the same.
    pub fn is_exact(&self) -> bool {
        self.missing.is_empty() && self.surplus.is_empty()
    }

    /// An error when a needed tensor is missing. Surplus ones are allowed: a checkpoint may carry
    /// a head or a buffer that the model at hand has no use for.
    pub fn require_all(&self) -> Result<(), CheckpointError> {
        self.require(!self.missing.is_empty())
    }

    /// An error when the two sets differ.
    pub fn require_exact(&self) -> Result<(), CheckpointError> {
        self.require(!self.is_exact())
    }

    fn require(&self, wrong: bool) -> Result<(), CheckpointError> {
        if !wrong {
            return Ok(());
        }
        let mut found = Vec::new();
        if !self.missing.is_empty() {
            let names = listed(&self.missing, |name| self.with_neighbour(name));
            found.push(format!("it lacks {} tensors: {names}", self.missing.len()));
        }
        if !self.surplus.is_empty() {
            let names = listed(&self.surplus, |name| format!("`{name}`"));
            found.push(format!(
                "it has {} unknown ones: {names}",
                self.surplus.len()
            ));
        }
        Err(CheckpointError::Keys {
            path: self.path.clone(),
            found: found.join(", and "),
            expected: "every tensor that the model has must be there under its name".to_string(),
        })
    }

    fn with_neighbour(&self, name: &str) -> String {
        match nearest(name, self.surplus.iter().map(String::as_str)) {
            Some(near) => format!("`{name}` (there is `{near}`)"),
            None => format!("`{name}`"),
        }
    }
}

fn listed(names: &[String], show: impl Fn(&str) -> String) -> String {
    let mut shown: Vec<String> = names.iter().take(LISTED).map(|name| show(name)).collect();
    if names.len() > LISTED {
        shown.push(format!("{} more", names.len() - LISTED));
    }
    shown.join(", ")
}

/// How many names are compared, and how long they may be: similarity takes quadratic time.
const COMPARED: usize = 10_000;
const COMPARED_BYTES: usize = 200;
const SIMILAR: f64 = 0.8;

/// The name that was probably meant: the same with another prefix, or else the most similar.
pub(super) fn nearest<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    if name.len() > COMPARED_BYTES {
        return None;
    }
    let candidates = candidates
        .take(COMPARED)
        .filter(|other| other.len() <= COMPARED_BYTES);
    candidates
        .map(|other| (similarity(name, other), other))
        .filter(|&(similarity, _)| similarity >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, other)| other)
}

fn similarity(a: &str, b: &str) -> f64 {
    let is_tail = |long: &str, short: &str| {
        long.strip_suffix(short)
            .is_some_and(|prefix| prefix.ends_with('.'))
    };
    if is_tail(a, b) || is_tail(b, a) {
        return 1.0;
    }
    strsim::normalized_levenshtein(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(needed: &[&str], found: &[&str]) -> KeyReport {
        KeyReport::new("m".into(), needed.iter().copied(), found.iter().copied())
    }

    #[test]
    fn equal_sets_pass() {
        assert!(report(&["a", "b"], &["b", "a"]).require_exact().is_ok());
    }

    #[test]
    fn missing_names_come_with_their_neighbours() {
        let report = report(
            &["transformer.h.0.attn.weight", "ln_f.weight", "wte"],
            &["h.0.attn.weight", "ln_f.weigth", "unrelated"],
        );
        assert_eq!(
            report.require_all().unwrap_err().to_string(),
            "m does not fit the model: it lacks 3 tensors: `ln_f.weight` (there is `ln_f.weigth`), \
             `transformer.h.0.attn.weight` (there is `h.0.attn.weight`), `wte`, and it has 3 unknown \
             ones: `h.0.attn.weight`, `ln_f.weigth`, `unrelated`, but every tensor that the model has \
             must be there under its name"
        );
    }

    #[test]
    fn surplus_is_an_error_only_when_exactness_is_asked() {
        let report = report(&["a"], &["a", "b1", "b2", "b3", "b4", "b5"]);
        assert!(report.require_all().is_ok());
        let message = report.require_exact().unwrap_err().to_string();
        assert!(
            message.contains("5 unknown ones: `b1`, `b2`, `b3`, `b4`, 1 more"),
            "{message}"
        );
    }
}
