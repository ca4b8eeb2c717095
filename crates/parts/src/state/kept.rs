//! Tokens of which only some are remembered.

use super::Buffers;
use crate::Result;
use lapidary_kernels::Tensor;

/// Rows of those tokens that later ones may still see, `[batch · heads, kept, width]` of each sort, and
/// now and then of others: they are forgotten when the buffers are full, so that at most as many are held
/// again as are needed.
#[derive(Debug)]
pub struct Kept {
    rows: Buffers,
    places: Vec<usize>,
    length: usize,
}

impl Kept {
    /// All of the first tokens.
    pub fn new(rows: &[&Tensor]) -> Result<Self> {
        let rows = Buffers::new(rows)?;
        let length = rows.len();
        Ok(Self {
            rows,
            places: (0..length).collect(),
            length,
        })
    }

    /// Appends tokens that follow.
    pub fn append(&mut self, rows: &[&Tensor]) -> Result<()> {
        let before = self.rows.len();
        self.rows.append(rows)?;
        let added = self.rows.len() - before;
        self.places.extend(self.length..self.length + added);
        self.length += added;
        Ok(())
    }

    /// Which tokens are held, rising.
    pub fn places(&self) -> &[usize] {
        &self.places
    }

    /// The rows of those tokens.
    pub fn rows(&self) -> &Buffers {
        &self.rows
    }

    /// Forgets the tokens that nobody needs.
    pub fn retain(&mut self, needed: impl Fn(usize) -> bool) -> Result<()> {
        let columns = self.places.iter().enumerate();
        let columns: Vec<usize> = columns
            .filter(|(_, place)| needed(**place))
            .map(|(column, _)| column)
            .collect();
        self.rows.retain(&columns)?;
        self.places.retain(|place| needed(*place));
        Ok(())
    }
}
