//! The columns of keys that a step meets, so that no others are gathered.

use super::sequences::At;

/// Columns of keys, rising, and where their rows are once they alone are there.
#[derive(Debug)]
pub(super) struct Met {
    columns: Vec<usize>,
    /// Rows of all columns, and columns.
    all: usize,
    keys: usize,
    sequences: usize,
}

impl Met {
    /// Those of `rows` of keys of `[batch, heads, _, keys]`, and the last `new` columns.
    pub(super) fn new(
        rows: impl Iterator<Item = usize>,
        [batch, heads, _, keys]: [usize; 4],
        new: usize,
    ) -> Self {
        let sequences = batch * heads;
        let all = sequences * keys;
        let mut columns: Vec<usize> = rows
            .filter(|row| *row < all)
            .map(|row| row % keys)
            .collect();
        columns.extend(keys.saturating_sub(new)..keys);
        columns.sort_unstable();
        columns.dedup();
        Self {
            columns,
            all,
            keys,
            sequences,
        }
    }

    /// The columns.
    pub(super) fn columns(&self) -> &[usize] {
        &self.columns
    }

    /// Moves a key to where its row is now. Rows behind those of keys stay as far behind them.
    pub(super) fn carry(&self, key: &mut At) {
        let width = self.columns.len();
        key.row = match key.row.checked_sub(self.all) {
            Some(behind) => self.sequences * width + behind,
            None => {
                let column = key.row % self.keys;
                let rank = self.columns.partition_point(|other| *other < column);
                key.row / self.keys * width + rank
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stay_those_of_their_sequences() {
        let met = Met::new([1, 8 + 5, 20].into_iter(), [1, 2, 3, 8], 2);
        assert_eq!(met.columns(), [1, 5, 6, 7]);
        let carried = |row| {
            let mut key = At { row, position: 0 };
            met.carry(&mut key);
            key.row
        };
        assert_eq!([1, 5, 7].map(carried), [0, 1, 3]);
        assert_eq!([9, 13, 14].map(carried), [4, 5, 6]);
        assert_eq!([16, 20].map(carried), [8, 12]);
    }
}
