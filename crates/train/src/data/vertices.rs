//! Vertices of a graph as one sequence, some of which are to be named from the classes of others.
//!
//! The graph itself is the geometry of the model's attention
//! (`mechanism = { kind = "topological", graph = … }`), whose vertices are the tokens in order.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Batch, IGNORE, Task};
use crate::{Error, Generator, Result};

/// Largest file of vertices.
const FILE_BYTES: u64 = 256 << 20;
const WHAT: &str = "file of vertices";

/// What is known of the vertices of a graph, as a file has it (JSON).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerticesFile {
    /// The token of each vertex.
    pub tokens: Vec<u32>,
    /// The token that names its class, which the model is to give there; none where it is not known.
    pub classes: Vec<Option<u32>>,
    /// Whether it is held out: not trained on, and asked about in validation.
    pub held_out: Vec<bool>,
}

/// The vertices of a graph: the same sequence every time, in training with the classes of those that are not
/// held out, in validation with those of the others.
///
/// ```
/// use lapidary_train::data::{IGNORE, Vertices, VerticesFile};
///
/// # fn main() -> lapidary_train::Result<()> {
/// let vertices = Vertices::new(VerticesFile {
///     tokens: vec![0, 1, 1],
///     classes: vec![Some(2), Some(3), None],
///     held_out: vec![false, true, false],
/// })?;
/// assert_eq!(vertices.sequence().targets, [2, IGNORE, IGNORE]);
/// assert_eq!(vertices.asked()?.sequence().targets, [IGNORE, 3, IGNORE]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vertices {
    file: VerticesFile,
    asked: bool,
}

impl Vertices {
    /// Vertices to be trained on.
    ///
    /// # Errors
    /// When the lists differ in length, or no class of a vertex that is not held out is known.
    pub fn new(file: VerticesFile) -> Result<Self> {
        let count = file.tokens.len();
        if count == 0 || file.classes.len() != count || file.held_out.len() != count {
            return Err(Error::Setting {
                name: "numbers of tokens, classes and held_out",
                found: format!("{count}, {}, {}", file.classes.len(), file.held_out.len()),
                expected: "equal, and at least 1",
            });
        }
        Self { file, asked: false }.with_classes()
    }

    /// Vertices of a file, to be trained on.
    ///
    /// # Errors
    /// As [`Vertices::new`], and when the file cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let text = lapidary_model::files::read_text(path, FILE_BYTES)?;
        let file = serde_json::from_str(&text)
            .map_err(|error| Error::format(WHAT, path, error.to_string()))?;
        Self::new(file)
    }

    /// The same, asked for what is held out.
    ///
    /// # Errors
    /// When no class of those is known.
    pub fn asked(&self) -> Result<Self> {
        let file = self.file.clone();
        Self { file, asked: true }.with_classes()
    }

    /// All vertices, with the classes that count.
    pub fn sequence(&self) -> Batch {
        let targets = self.file.classes.iter().zip(&self.file.held_out);
        Batch {
            rows: 1,
            length: self.file.tokens.len(),
            inputs: self.file.tokens.clone(),
            targets: targets
                .map(|(class, held_out)| {
                    class.filter(|_| *held_out == self.asked).unwrap_or(IGNORE)
                })
                .collect(),
        }
    }

    /// Itself, where some classes count.
    fn with_classes(self) -> Result<Self> {
        match self.sequence().counted() {
            0 => Err(Error::Setting {
                name: "classes",
                found: "none known".into(),
                expected: "known of a vertex at least that is held out, and of one that is not",
            }),
            _ => Ok(self),
        }
    }
}

impl Task for Vertices {
    fn vocabulary(&self) -> usize {
        let tokens = self.file.tokens.iter();
        let all = tokens.chain(self.file.classes.iter().flatten());
        all.max().map_or(0, |most| *most as usize + 1)
    }

    /// The sequence so many times.
    fn batch(&mut self, _: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        let one = self.sequence();
        if length != one.length {
            return Err(Error::Setting {
                name: "length",
                found: format!("{length}, for {} vertices", one.length),
                expected: "as many tokens as there are vertices",
            });
        }
        Ok(Batch {
            rows,
            length,
            inputs: one.inputs.repeat(rows),
            targets: one.targets.repeat(rows),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator;

    fn file() -> VerticesFile {
        VerticesFile {
            tokens: vec![4, 0, 1, 0],
            classes: vec![Some(5), None, Some(6), Some(7)],
            held_out: vec![false, true, true, false],
        }
    }

    #[test]
    fn training_and_validation_ask_for_different_vertices() {
        let mut training = Vertices::new(file()).unwrap();
        let mut validation = training.asked().unwrap();
        assert_eq!(training.vocabulary(), 8);
        let mut random = generator(0);
        let batch = training.batch(&mut random, 2, 4).unwrap();
        assert_eq!(batch.inputs, [4, 0, 1, 0, 4, 0, 1, 0]);
        assert_eq!(batch.targets[..4], [5, IGNORE, IGNORE, 7]);
        assert_eq!(batch.targets[4..], batch.targets[..4]);
        let batch = validation.batch(&mut random, 1, 4).unwrap();
        assert_eq!(batch.targets, [IGNORE, IGNORE, 6, IGNORE]);
        let said = training.batch(&mut random, 1, 3).unwrap_err().to_string();
        assert!(said.contains("length is 3, for 4 vertices"), "{said}");
    }

    #[test]
    fn a_file_comes_back_and_what_does_not_fit_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vertices.json");
        std::fs::write(&path, serde_json::to_string(&file()).unwrap()).unwrap();
        assert_eq!(
            Vertices::open(&path).unwrap(),
            Vertices::new(file()).unwrap()
        );
        std::fs::write(&path, "{").unwrap();
        let said = Vertices::open(&path).unwrap_err().to_string();
        assert!(said.contains("not a valid file of vertices"), "{said}");
        let short = VerticesFile {
            held_out: vec![false],
            ..file()
        };
        assert!(Vertices::new(short).is_err());
        let unknown = VerticesFile {
            classes: vec![None; 4],
            ..file()
        };
        assert!(Vertices::new(unknown).is_err());
        let all = VerticesFile {
            held_out: vec![false; 4],
            ..file()
        };
        assert!(Vertices::new(all).unwrap().asked().is_err());
    }
}
