//! What a training step reads, and what makes it.

use lapidary_kernels::{Device, Tensor};

use crate::{Generator, Result};

/// The target of a position that does not count in the loss.
pub const IGNORE: u32 = u32::MAX;

/// Sequences and what is to be predicted at each of their positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Sequences.
    pub rows: usize,
    /// Tokens of each.
    pub length: usize,
    /// `rows · length` tokens, row after row.
    pub inputs: Vec<u32>,
    /// For each of them the token to predict there, or [`IGNORE`].
    pub targets: Vec<u32>,
}

impl Batch {
    /// An empty batch to which rows of `length` are appended.
    pub fn with_capacity(rows: usize, length: usize) -> Self {
        Self {
            rows: 0,
            length,
            inputs: Vec::with_capacity(rows * length),
            targets: Vec::with_capacity(rows * length),
        }
    }

    /// Appends `length + 1` tokens as a row in which each position predicts the next.
    pub(super) fn push_next_token(&mut self, tokens: &[u32]) {
        self.inputs.extend_from_slice(&tokens[..self.length]);
        self.targets.extend_from_slice(&tokens[1..=self.length]);
        self.rows += 1;
    }

    /// How many positions count in the loss.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE).count()
    }

    /// Inputs `[rows, length]` and targets `[rows, length]`, both `u32`.
    pub fn tensors(&self, device: &Device) -> lapidary_kernels::Result<(Tensor, Tensor)> {
        let shape = (self.rows, self.length);
        Ok((
            Tensor::from_slice(&self.inputs, shape, device)?,
            Tensor::from_slice(&self.targets, shape, device)?,
        ))
    }
}

/// Something that makes batches.
///
/// A task is a function of its settings, the generator and its position: with these three restored,
/// it goes on exactly where it was.
pub trait Task {
    /// Tokens are below this.
    fn vocabulary(&self) -> usize;

    /// The next `rows` sequences of `length` tokens.
    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch>;

    /// How far it has read; zero for a task that only draws from the generator.
    fn position(&self) -> u64 {
        0
    }

    /// Goes to a position that [`Task::position`] returned.
    fn seek(&mut self, _position: u64) {}
}
