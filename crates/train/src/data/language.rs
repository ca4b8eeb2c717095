//! The small language as a task.

use rand::RngExt;

use super::{Batch, Task};
use crate::language::Corpus;
use crate::{Generator, Result};

/// Windows of a [`Corpus`] drawn at random from its 2⁶⁴: every position predicts the next word.
#[derive(Clone, Debug)]
pub struct LanguageTask {
    corpus: Corpus,
}

impl LanguageTask {
    /// A task over one side of the language's split.
    pub fn new(corpus: Corpus) -> Self {
        Self { corpus }
    }

    /// The corpus read.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }
}

impl Task for LanguageTask {
    fn vocabulary(&self) -> usize {
        self.corpus.language().vocabulary().size()
    }

    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let window = self.corpus.window(generator.random(), length + 1)?;
            batch.push_next_token(&window);
        }
        Ok(batch)
    }
}
