//! What is remembered of tokens that are seen as means: how far each is from the mean of its block.

use crate::{Error, Result};
use lapidary_kernels::{RowSums, RowTerm};
use lapidary_signal::Signal;

/// The tokens of every block as they were when the block was last refined, and the mean `c'_b` that it had
/// then: what stays is `δ_bt = c'_b − x'_bt`, so that a token is `x_bt = c_b − δ_bt = x'_bt + (c_b − c'_b)`
/// now. A layer writes a piece, in which its fine blocks are as tokens and all others as means; nothing is
/// copied, and pieces that no block has tokens in are let go.
#[derive(Clone, Debug)]
pub struct TokenStore {
    /// Tokens of a block.
    size: usize,
    pieces: Vec<Option<Piece>>,
    /// The piece that each block's tokens are in.
    place: Vec<usize>,
    /// The row of each token of each block in that piece; none where there is no token.
    rows: Vec<Option<u32>>,
    /// The row of each block's mean in the last piece, for blocks whose tokens are in another.
    moved: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Piece {
    /// `[rows, width]`.
    tokens: Signal,
    /// The mean of each block, and perhaps more behind them, `[rows, width]`.
    means: Signal,
}

/// One of the two signals of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Tokens,
    Means,
}

impl TokenStore {
    /// Blocks of `size` tokens each, which stand in `rows` of `tokens` `[rows, width]` one block behind the
    /// other, with their `means` `[blocks or more, width]`. Where there is no token there is no row.
    ///
    /// # Errors
    /// When `rows` are not those of whole blocks.
    pub fn new(tokens: Signal, means: Signal, rows: Vec<Option<u32>>, size: usize) -> Result<Self> {
        if size == 0 || !rows.len().is_multiple_of(size) {
            let expected = format!("a multiple of {size}, tokens of a block, above 0");
            return Err(Error::spec("rows of tokens", rows.len(), expected));
        }
        let blocks = rows.len() / size;
        Ok(Self {
            size,
            pieces: vec![Some(Piece { tokens, means })],
            place: vec![0; blocks],
            rows,
            moved: vec![0; blocks],
        })
    }

    /// The last means, as they were given.
    ///
    /// # Errors
    /// When the last piece is not held, as it always is.
    pub fn means(&self) -> Result<&Signal> {
        self.signal((self.last(), Part::Means))
    }

    /// The tokens of some blocks as they are now, `[blocks · size, width]`, in their order.
    ///
    /// # Errors
    /// When there is no such block, or none is asked for.
    pub fn read(&self, blocks: &[usize]) -> Result<Signal> {
        let mut reading = self.reading();
        for block in blocks {
            for token in 0..self.size {
                reading.token(*block, token)?;
            }
        }
        reading.done()
    }

    /// Rows to be read one by one.
    pub(super) fn reading(&self) -> Reading<'_> {
        Reading {
            store: self,
            sources: Vec::new(),
            sums: RowSums::new(),
        }
    }

    /// What a layer made of all blocks: in `tokens` `[rows, width]` stand those of each of the `fine` blocks,
    /// from a row on, and the mean of each of the others, `coarse`, in a row; `means` are those of all.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn write(
        &mut self,
        (tokens, means): (Signal, Signal),
        fine: &[(usize, u32)],
        coarse: &[(usize, u32)],
    ) -> Result<()> {
        for (block, _) in fine.iter().chain(coarse) {
            self.place(*block)?;
        }
        let piece = self.pieces.len();
        for (block, first) in fine {
            if let Some(place) = self.place.get_mut(*block) {
                *place = piece;
            }
            let own = self.rows.iter_mut().skip(block * self.size);
            for (slot, row) in own.take(self.size).zip(*first..) {
                *slot = Some(row);
            }
        }
        for (block, row) in coarse {
            if let Some(moved) = self.moved.get_mut(*block) {
                *moved = *row;
            }
        }
        self.pieces.push(Some(Piece { tokens, means }));
        for (index, held) in self.pieces.iter_mut().enumerate() {
            if index != piece && !self.place.contains(&index) {
                *held = None;
            }
        }
        Ok(())
    }

    /// Rows of tokens that are held, those of no block any more among them.
    pub fn rows(&self) -> usize {
        let held = self.pieces.iter().flatten();
        held.map(|piece| piece.tokens.dims().first().copied().unwrap_or(0))
            .sum()
    }

    fn last(&self) -> usize {
        self.pieces.len().saturating_sub(1)
    }

    fn place(&self, block: usize) -> Result<usize> {
        let expected = || format!("below {}", self.place.len());
        let place = self.place.get(block).copied();
        place.ok_or_else(|| Error::spec("block", block, expected()))
    }

    fn signal(&self, (piece, part): (usize, Part)) -> Result<&Signal> {
        let piece = self.pieces.get(piece).and_then(Option::as_ref);
        let piece = piece.ok_or_else(|| Error::spec("piece", "let go", "held"))?;
        Ok(match part {
            Part::Tokens => &piece.tokens,
            Part::Means => &piece.means,
        })
    }
}

/// Rows of a store one after the other, which are read in one pass.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    store: &'a TokenStore,
    sources: Vec<(usize, Part)>,
    sums: RowSums,
}

impl Reading<'_> {
    fn term(&mut self, from: (usize, Part), row: usize, weight: f64) -> RowTerm {
        let known = self.sources.iter().position(|source| *source == from);
        let source = known.unwrap_or(self.sources.len());
        if known.is_none() {
            self.sources.push(from);
        }
        RowTerm {
            source,
            row: row as u32,
            weight,
        }
    }

    /// A token of a block: `x' + (c − c')`, or zeros moved so where there is none.
    pub(super) fn token(&mut self, block: usize, token: usize) -> Result<()> {
        let (store, last) = (self.store, self.store.last());
        let place = store.place(block)?;
        let row = store.rows.get(block * store.size + token).copied();
        let mut terms = Vec::with_capacity(3);
        if let Some(row) = row.flatten() {
            terms.push(self.term((place, Part::Tokens), row as usize, 1.0));
        }
        // The mean that a block was refined to is the one it still has when nothing came after.
        if place != last {
            let moved = store.moved.get(block).copied().unwrap_or(0);
            terms.push(self.term((last, Part::Tokens), moved as usize, 1.0));
            terms.push(self.term((place, Part::Means), block, -1.0));
        }
        self.sums.push(terms);
        Ok(())
    }

    /// The mean of a block.
    pub(super) fn mean(&mut self, block: usize) -> Result<()> {
        let (store, last) = (self.store, self.store.last());
        let moved = store.moved.get(block).copied().unwrap_or(0);
        let term = match store.place(block)? == last {
            true => self.term((last, Part::Means), block, 1.0),
            false => self.term((last, Part::Tokens), moved as usize, 1.0),
        };
        self.sums.push([term]);
        Ok(())
    }

    /// A row of what was written last, as it is.
    pub(super) fn row(&mut self, row: u32) {
        let term = self.term((self.store.last(), Part::Tokens), row as usize, 1.0);
        self.sums.push([term]);
    }

    /// All of them, `[rows, width]`.
    pub(super) fn done(self) -> Result<Signal> {
        if self.sums.is_empty() {
            return Err(Error::spec("rows to read", 0, "at least 1"));
        }
        let mut sources = Vec::with_capacity(self.sources.len());
        for source in self.sources {
            sources.push(self.store.signal(source)?);
        }
        if sources.is_empty() {
            // Places without tokens alone.
            sources.push(self.store.signal((self.store.last(), Part::Tokens))?);
        }
        Ok(Signal::summed_rows(&sources, self.sums)?)
    }
}

/// The means of all blocks and behind them some rows of `tokens` `[rows, width]`: each mean is that of the
/// rows in a list, and zeros where there are none.
pub(super) fn means_and_rows(
    tokens: &Signal,
    means: impl IntoIterator<Item = Vec<u32>>,
    rows: impl IntoIterator<Item = u32>,
) -> Result<Signal> {
    let term = |row: u32, weight: f64| RowTerm {
        source: 0,
        row,
        weight,
    };
    let mut sums = RowSums::new();
    for list in means {
        let share = 1.0 / list.len().max(1) as f64;
        sums.push(list.into_iter().map(|row| term(row, share)));
    }
    for row in rows {
        sums.push([term(row, 1.0)]);
    }
    Ok(Signal::summed_rows(&[tokens], sums)?)
}
