//! Tasks that isolate one ability of a sequence model.

use rand::RngExt;
use rand::seq::SliceRandom;

use super::{Batch, IGNORE, Task};
use crate::{Error, Generator, Result};

/// Refuses a vocabulary with fewer than `least` ordinary symbols, or more than there are numbers of tokens.
fn check_symbols(
    name: &'static str,
    symbols: usize,
    least: usize,
    expected: &'static str,
) -> Result<()> {
    let expected = match symbols < least {
        true => expected,
        false if symbols >= IGNORE as usize - 1 => "below 4 294 967 294",
        false => return Ok(()),
    };
    Err(Error::Setting {
        name,
        found: symbols.to_string(),
        expected,
    })
}

fn too_short(what: &str, length: usize, needed: usize) -> Error {
    Error::TooShort {
        what: format!("a sequence for {what}"),
        found: length as u64,
        needed: needed as u64,
    }
}

/// A random word, a separator, and the word again, which is to be predicted:
/// `x₁ … xₙ | x₁ … xₙ₋₁` with `n = (length) / 2`; the separator predicts `x₁`.
#[derive(Clone, Copy, Debug)]
pub struct Copying {
    symbols: usize,
}

impl Copying {
    /// Copying of `symbols` symbols; the separator is one more token.
    pub fn new(symbols: usize) -> Result<Self> {
        check_symbols("data.symbols", symbols, 2, "at least 2")?;
        Ok(Self { symbols })
    }
}

impl Task for Copying {
    fn vocabulary(&self) -> usize {
        self.symbols + 1
    }

    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        if length < 2 {
            return Err(too_short("copying", length, 2));
        }
        let separator = self.symbols as u32;
        let word_length = length / 2;
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let word: Vec<u32> = (0..word_length)
                .map(|_| generator.random_range(0..separator))
                .collect();
            // An odd length has one separator more, at the end.
            let tokens = word
                .iter()
                .copied()
                .chain([separator])
                .chain(word.iter().copied());
            let tokens: Vec<u32> = tokens
                .chain(std::iter::repeat(separator))
                .take(length + 1)
                .collect();
            batch.inputs.extend_from_slice(&tokens[..length]);
            batch.targets.extend((0..length).map(|position| {
                let is_copy = (word_length..2 * word_length).contains(&position);
                if is_copy {
                    tokens[position + 1]
                } else {
                    IGNORE
                }
            }));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// Pairs of a key and a value, then keys again, each of which is to be answered with its value
/// (multi-query associative recall; Arora et al., *Zoology*, arXiv 2312.04927):
/// `k₁ v₁ k₂ v₂ … | k₂ v₂ k₁ v₁ …`, where only the values after the separator count.
#[derive(Clone, Copy, Debug)]
pub struct AssociativeRecall {
    keys: usize,
    values: usize,
}

impl AssociativeRecall {
    /// Recall over an alphabet of keys and one of values; the separator is one more token.
    pub fn new(keys: usize, values: usize) -> Result<Self> {
        check_symbols("data.keys", keys, 1, "at least 1")?;
        check_symbols("data.values", values, 2, "at least 2")?;
        Ok(Self { keys, values })
    }
}

impl Task for AssociativeRecall {
    fn vocabulary(&self) -> usize {
        self.keys + self.values + 1
    }

    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        if length < 5 {
            return Err(too_short("associative recall", length, 5));
        }
        let separator = (self.keys + self.values) as u32;
        // Half of the sequence states pairs, each with a key of its own.
        let pairs = ((length - 1) / 4).clamp(1, self.keys);
        let mut keys: Vec<u32> = (0..self.keys as u32).collect();
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            keys.shuffle(generator);
            let stated: Vec<(u32, u32)> = keys[..pairs]
                .iter()
                .map(|&key| {
                    let value = generator.random_range(0..self.values) as u32;
                    (key, self.keys as u32 + value)
                })
                .collect();
            let start = batch.inputs.len();
            batch
                .inputs
                .extend(stated.iter().flat_map(|&(k, v)| [k, v]));
            batch.inputs.push(separator);
            batch.targets.resize(batch.inputs.len(), IGNORE);
            let mut order: Vec<usize> = (0..pairs).collect();
            order.shuffle(generator);
            for &(key, value) in order.iter().cycle().map(|&pair| &stated[pair]) {
                if batch.inputs.len() + 2 > start + length {
                    break;
                }
                batch.inputs.extend([key, value]);
                batch.targets.extend([value, IGNORE]);
            }
            batch.inputs.resize(start + length, separator);
            batch.targets.resize(start + length, IGNORE);
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// A random pattern that comes back after unrelated tokens (Olsson et al., *In-context learning and
/// induction heads*, arXiv 2209.11895): in `… a b … a`, the answer is `b`.
///
/// The first half of a sequence holds different symbols in random order, the second half visits
/// random stretches of the first; a position counts when the symbol before its target has been seen
/// with a successor, which makes the target certain.
#[derive(Clone, Copy, Debug)]
pub struct Induction {
    symbols: usize,
}

impl Induction {
    /// Induction over `symbols` symbols: sequences of at most twice that length.
    pub fn new(symbols: usize) -> Result<Self> {
        check_symbols("data.symbols", symbols, 4, "at least 4")?;
        Ok(Self { symbols })
    }
}

impl Task for Induction {
    fn vocabulary(&self) -> usize {
        self.symbols
    }

    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        let half = length / 2;
        if length < 8 {
            return Err(too_short("induction", length, 8));
        }
        if half > self.symbols {
            return Err(Error::Setting {
                name: "length",
                found: length.to_string(),
                expected: "at most twice the number of symbols, which differ in the first half",
            });
        }
        let mut symbols: Vec<u32> = (0..self.symbols as u32).collect();
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            symbols.shuffle(generator);
            let start = batch.inputs.len();
            batch.inputs.extend_from_slice(&symbols[..half]);
            batch.targets.resize(start + half, IGNORE);
            while batch.inputs.len() < start + length {
                let stretch = generator.random_range(3..=half.min(8));
                let from = generator.random_range(0..=half - stretch);
                for offset in 0..stretch {
                    let within = offset + 1 < stretch;
                    batch.inputs.push(symbols[from + offset]);
                    batch.targets.push(if within {
                        symbols[from + offset + 1]
                    } else {
                        IGNORE
                    });
                }
            }
            batch.inputs.truncate(start + length);
            batch.targets.truncate(start + length);
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// Sums of two numbers of as many digits, the answer's lowest digit first (Song & Zhong, arXiv
/// 2310.04861, the probe of addition; Lee et al., arXiv 2307.03381, on the order of digits):
/// `a + b = reversed(c) ;`, one after another. Only the answers and the marks that end them count.
///
/// With carries, digits are uniform, the first ones of a number from 1. Without, each column of
/// digits is uniform among those whose sum is at most 9.
#[derive(Clone, Copy, Debug)]
pub struct Addition {
    least: usize,
    most: usize,
    carry: bool,
}

impl Addition {
    /// The token of the plus sign; those of digits are below.
    pub const PLUS: u32 = 10;
    /// The token of the equals sign.
    pub const EQUALS: u32 = 11;
    /// The token that ends an answer.
    pub const END: u32 = 12;

    /// Sums of numbers of `least` to `most` digits, each number of digits equally likely.
    pub fn new(least: usize, most: usize, carry: bool) -> Result<Self> {
        if least == 0 || least > most || most > 1000 {
            return Err(Error::Setting {
                name: "digits",
                found: format!("{least} to {most}"),
                expected: "from at least 1 to at most 1000",
            });
        }
        Ok(Self { least, most, carry })
    }

    /// One column: a digit of each number.
    fn column(&self, first: bool, generator: &mut Generator) -> (u32, u32) {
        let least = u32::from(first);
        loop {
            let digits = (
                generator.random_range(least..10),
                generator.random_range(least..10),
            );
            if self.carry || digits.0 + digits.1 <= 9 {
                return digits;
            }
        }
    }

    /// The tokens of one problem, and where its answer starts.
    pub fn problem(&self, generator: &mut Generator) -> (Vec<u32>, usize) {
        let count = generator.random_range(self.least..=self.most);
        let columns: Vec<(u32, u32)> = (0..count)
            .map(|place| self.column(place == 0, generator))
            .collect();
        let mut tokens: Vec<u32> = columns.iter().map(|column| column.0).collect();
        tokens.push(Self::PLUS);
        tokens.extend(columns.iter().map(|column| column.1));
        tokens.push(Self::EQUALS);
        let start = tokens.len();
        let mut carried = 0;
        for (a, b) in columns.iter().rev() {
            let sum = a + b + carried;
            tokens.push(sum % 10);
            carried = sum / 10;
        }
        if carried > 0 {
            tokens.push(carried);
        }
        tokens.push(Self::END);
        (tokens, start)
    }
}

impl Task for Addition {
    fn vocabulary(&self) -> usize {
        Self::END as usize + 1
    }

    fn batch(&mut self, generator: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        let needed = 3 * self.most + 4;
        if length < needed {
            return Err(too_short("addition", length, needed));
        }
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let (mut tokens, mut counts) = (Vec::new(), Vec::new());
            while tokens.len() <= length {
                let (problem, start) = self.problem(generator);
                counts.extend((0..problem.len()).map(|place| place >= start));
                tokens.extend(problem);
            }
            batch.inputs.extend(tokens.iter().take(length));
            let next = tokens.iter().zip(counts).skip(1).take(length);
            let target = |(token, counts): (&u32, bool)| if counts { *token } else { IGNORE };
            batch.targets.extend(next.map(target));
            batch.rows += 1;
        }
        Ok(batch)
    }
}
