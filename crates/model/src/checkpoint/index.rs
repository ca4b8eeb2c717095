//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::Deserialize;

use super::CheckpointError;
use super::header::shortened;
use crate::Limits;
use crate::files::read_text;

/// A checked index: file names that stay inside the directory, and who should be where.
#[derive(Debug)]
pub(super) struct Index {
    /// The shards, in order of their names.
    pub files: Vec<String>,
    weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

/// Reads the index and checks its file names, before any of them is opened.
pub(super) fn read(path: &Path, limits: &Limits) -> Result<Index, CheckpointError> {
    let text = read_text(path, limits.text_file_bytes)?;
    parse(path, &text, limits)
}

fn parse(path: &Path, text: &str, limits: &Limits) -> Result<Index, CheckpointError> {
    let IndexFile { weight_map } = serde_json::from_str(text).map_err(|error| {
        wrong(
            path,
            error.to_string(),
            "an index is {\"weight_map\": {tensor: file}}",
        )
    })?;
    let files: BTreeSet<&String> = weight_map.values().collect();
    if files.is_empty() || files.len() > limits.shards {
        let found = format!("it names {} files", files.len());
        return Err(wrong(
            path,
            found,
            format!("1 to {} are read", limits.shards),
        ));
    }
    for file in &files {
        let mut components = Path::new(file).components();
        let plain = matches!(components.next(), Some(Component::Normal(_)));
        if !plain || components.next().is_some() || file.contains('\\') {
            let found = format!("it names the file `{}`", shortened(file, 80));
            return Err(wrong(path, found, "shards lie in the same directory"));
        }
    }
    let files = files.into_iter().cloned().collect();
    Ok(Index { files, weight_map })
}

impl Index {
    /// Each tensor is in the shard that the index says; `holds(shard, tensor)` knows.
    pub fn check(
        &self,
        path: &Path,
        holds: impl Fn(usize, &str) -> bool,
    ) -> Result<(), CheckpointError> {
        for (tensor, file) in &self.weight_map {
            let shard = self.files.binary_search(file).unwrap_or(usize::MAX);
            if !holds(shard, tensor) {
                let tensor = shortened(tensor, 80);
                let found = format!("it says that tensor `{tensor}` is in {file}");
                return Err(wrong(path, found, "that file does not hold it"));
            }
        }
        Ok(())
    }
}

fn wrong(path: &Path, found: String, expected: impl Into<String>) -> CheckpointError {
    CheckpointError::Index {
        path: path.to_path_buf(),
        found,
        expected: expected.into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        let path = Path::new("index.json");
        parse(path, text, &Limits::default())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn files_outside_are_refused() {
        for file in ["../secret", "/etc/passwd", "a/b", "..", "", "a\\\\b"] {
            let message = error(&format!(r#"{{"weight_map":{{"w":"{file}"}}}}"#));
            assert!(
                message.contains("shards lie in the same directory"),
                "{message}"
            );
        }
        assert!(error(r#"{"weight_map":{}}"#).contains("it names 0 files"));
        assert!(error("{}").contains("missing field `weight_map`"));
    }

    proptest! {
        #[test]
        fn any_text_never_panics(text in ".{0,100}") {
            let _ = parse(Path::new("x"), &text, &Limits::default());
        }
    }
}
