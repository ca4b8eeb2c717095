//! One JSON object per line: `{"step":10,"loss":2.5,"rate":0.001}`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use lapidary_model::files::FileBeside;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A line longer than this is not one of ours.
const LONGEST_LINE: usize = 1 << 20;

/// An append-only log. Each record is one write, so that a reader sees whole lines.
pub struct JsonLines {
    file: File,
    path: PathBuf,
}

impl JsonLines {
    /// Opens a log for a run that starts at `step`, creating it if need be.
    ///
    /// Records of that step and later ones, and a line that was cut, are what a run that died left
    /// behind after its last saved state; they are removed, since they are going to be written again.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if path.exists() {
            keep_before(path, step)?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(Error::file("open", path))?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Appends a record: the step and named values. A value that is not finite is written as `null`,
    /// JSON having no other word for it.
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut record = Map::new();
        record.insert("step".into(), step.into());
        for &(name, value) in values {
            record.insert(name.into(), Value::from(value));
        }
        let mut line = Value::Object(record).to_string();
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .map_err(Error::file("write", &self.path))
    }

    /// Makes what was written durable, as it has to be before a state that comes after it.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(Error::file("write", &self.path))
    }
}

fn keep_before(path: &Path, step: u64) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::file("open", path))?);
    let mut kept = FileBeside::create(path)?;
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = std::io::Read::take(&mut reader, LONGEST_LINE as u64);
        limited
            .read_until(b'\n', &mut line)
            .map_err(Error::file("read", path))?;
        if line.last() != Some(&b'\n') {
            if line.len() == LONGEST_LINE {
                return Err(Error::format("log", path, "it has a line above 1 MiB"));
            }
            return Ok(kept.stage(|_| Ok(()))?.publish()?);
        }
        let record: Value = serde_json::from_slice(&line)
            .map_err(|error| Error::format("log", path, error.to_string()))?;
        let recorded = record.get("step").and_then(Value::as_u64);
        let recorded =
            recorded.ok_or_else(|| Error::format("log", path, "it has a line without a step"))?;
        if recorded < step {
            kept.write(&line)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_equals_one_that_was_never_interrupted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.jsonl");
        let record = |log: &mut JsonLines, step: u64| {
            log.write(step, &[("loss", 0.1 + step as f64), ("rate", 1e-3)])
                .unwrap();
        };
        let mut log = JsonLines::open(&path, 0).unwrap();
        (0..10).for_each(|step| record(&mut log, step));
        let whole = std::fs::read_to_string(&path).unwrap();
        assert!(whole.starts_with("{\"step\":0,\"loss\":0.1,\"rate\":0.001}\n"));

        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let mut log = JsonLines::open(&path, 6).unwrap();
        (6..10).for_each(|step| record(&mut log, step));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
    }

    #[test]
    fn values_that_are_not_finite_leave_valid_json() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.jsonl");
        let mut log = JsonLines::open(&path, 0).unwrap();
        log.write(1, &[("loss", f64::NAN)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1,\"loss\":null}\n");
    }

    #[test]
    fn a_file_that_is_no_log_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notes.txt");
        for notes in [
            "my notes\n",
            "{\"note\":1}\n",
            "{\"step\":\"first\"}\n",
            "[]\n",
        ] {
            std::fs::write(&path, notes).unwrap();
            assert!(JsonLines::open(&path, 1).is_err(), "{notes}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), notes);
        }
    }
}
