//! Windows over a token file, in order or shuffled.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Batch, Task, TokenFile};
use crate::{Error, Generator, Result};

/// In which order windows are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// One after the other, from the beginning again after the last.
    Sequential,
    /// Each once per epoch, in an order that depends on the seed and the epoch.
    Shuffled {
        /// The seed of the order.
        seed: u64,
    },
}

/// Splits `count` tokens into training and validation: the last `fraction` is for validation.
pub fn split(count: u64, fraction: f64) -> Result<(Range<u64>, Range<u64>)> {
    if !(0.0..1.0).contains(&fraction) {
        return Err(Error::Setting {
            name: "validation fraction",
            found: fraction.to_string(),
            expected: "at least 0 and below 1",
        });
    }
    let boundary = count - (count as f64 * fraction) as u64;
    Ok((0..boundary, boundary..count))
}

/// Disjoint windows over a range of a token file. Each predicts the next token at every position,
/// so a window of `length` reads `length + 1` tokens and shares its last one with the next window.
/// Tokens left over at the end of the range are not read.
///
/// The position is the number of windows read so far; the order is a function of it, so that no
/// list of windows is kept and resuming is a seek.
#[derive(Clone, Debug)]
pub struct Windows {
    tokens: Arc<TokenFile>,
    range: Range<u64>,
    order: Order,
    position: u64,
}

impl Windows {
    /// Windows over `range` of a file.
    pub fn new(tokens: Arc<TokenFile>, range: Range<u64>, order: Order) -> Result<Self> {
        if range.end > tokens.len() || range.start > range.end {
            return Err(Error::TooShort {
                what: "the token file".into(),
                found: tokens.len(),
                needed: range.end.max(range.start),
            });
        }
        Ok(Self {
            tokens,
            range,
            order,
            position: 0,
        })
    }

    /// How many windows of `length` an epoch has.
    pub fn count(&self, length: usize) -> u64 {
        let tokens = self.range.end - self.range.start;
        tokens.saturating_sub(1) / (length as u64).max(1)
    }

    /// The window read at a position: `length + 1` tokens.
    pub fn window(&self, position: u64, length: usize) -> Result<Vec<u32>> {
        let count = self.count(length);
        if count == 0 || length == 0 {
            return Err(Error::TooShort {
                what: "the data".into(),
                found: self.range.end - self.range.start,
                needed: length as u64 + 1,
            });
        }
        let (epoch, place) = (position / count, position % count);
        let index = match self.order {
            Order::Sequential => place,
            Order::Shuffled { seed } => Permutation::new(count, seed, epoch).of(place),
        };
        self.tokens
            .read(self.range.start + index * length as u64, length + 1)
    }
}

impl Task for Windows {
    fn vocabulary(&self) -> usize {
        self.tokens.vocabulary() as usize
    }

    fn batch(&mut self, _: &mut Generator, rows: usize, length: usize) -> Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            batch.push_next_token(&self.window(self.position, length)?);
            self.position += 1;
        }
        Ok(batch)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn seek(&mut self, position: u64) {
        self.position = position;
    }
}

/// A pseudo-random permutation of `0 .. count` that takes no memory: a Feistel network on the next
/// even power of two, walked until the result is in range.
struct Permutation {
    count: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    fn new(count: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        let first = mix(seed ^ mix(epoch));
        Self {
            count,
            half_bits: bits.div_ceil(2).max(1),
            keys: [1, 2, 3, 4].map(|round| mix(first ^ round)),
        }
    }

    fn of(&self, index: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            value = left << self.half_bits | right;
            if value < self.count {
                return value;
            }
        }
    }
}

/// A bijection of 64-bit words that spreads every bit over all of them (the finaliser of SplitMix64;
/// Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::super::TokenWriter;
    use super::*;
    use crate::generator;

    fn file(count: u32) -> (tempfile::TempDir, Arc<TokenFile>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        let mut writer = TokenWriter::create(&path, 100_000).unwrap();
        writer.write(&(0..count).collect::<Vec<_>>()).unwrap();
        writer.finish().unwrap();
        (directory, Arc::new(TokenFile::open(&path).unwrap()))
    }

    #[test]
    fn a_permutation_visits_everything_once_and_epochs_differ() {
        for count in [1, 2, 3, 5, 16, 17, 100, 1000] {
            let mut seen: Vec<u64> = (0..count)
                .map(|i| Permutation::new(count, 7, 0).of(i))
                .collect();
            let order = seen.clone();
            seen.sort_unstable();
            assert_eq!(seen, (0..count).collect::<Vec<_>>());
            if count >= 100 {
                let next: Vec<u64> = (0..count)
                    .map(|i| Permutation::new(count, 7, 1).of(i))
                    .collect();
                assert_ne!(order, next);
                let fixed = order.iter().zip(0..).filter(|&(&a, b)| a == b).count();
                assert!(fixed < 10, "{fixed} of {count} stayed in place");
            }
        }
    }

    #[test]
    fn windows_predict_the_next_token_and_stay_in_their_range() {
        let (_directory, tokens) = file(103);
        let (training, validation) = split(tokens.len(), 0.2).unwrap();
        assert_eq!((training.clone(), validation.clone()), (0..83, 83..103));
        for (range, order) in [
            (training, Order::Shuffled { seed: 3 }),
            (validation, Order::Sequential),
        ] {
            let mut windows = Windows::new(tokens.clone(), range.clone(), order).unwrap();
            let count = windows.count(8) as usize;
            let batch = windows.batch(&mut generator(0), count, 8).unwrap();
            assert_eq!((batch.rows, batch.length), (count, 8));
            let mut read = batch.inputs.clone();
            read.sort_unstable();
            let expected: Vec<u32> = (range.start as u32..).take(count * 8).collect();
            assert_eq!(read, expected);
            let next: Vec<u32> = batch.inputs.iter().map(|t| t + 1).collect();
            assert_eq!(batch.targets, next);
            assert!(batch.targets.iter().all(|&t| range.contains(&u64::from(t))));
        }
    }

    #[test]
    fn seeking_resumes_exactly() {
        let (_directory, tokens) = file(500);
        let order = Order::Shuffled { seed: 11 };
        let mut windows = Windows::new(tokens.clone(), 0..500, order).unwrap();
        let unused = &mut generator(0);
        windows.batch(unused, 100, 16).unwrap();
        let mut resumed = Windows::new(tokens, 0..500, order).unwrap();
        resumed.seek(windows.position());
        assert_eq!(
            windows.batch(unused, 50, 16).unwrap(),
            resumed.batch(unused, 50, 16).unwrap()
        );
    }

    #[test]
    fn too_little_data_and_impossible_splits_are_refused() {
        let (_directory, tokens) = file(8);
        let mut windows = Windows::new(tokens.clone(), 0..8, Order::Sequential).unwrap();
        assert!(windows.batch(&mut generator(0), 1, 7).is_ok());
        assert!(matches!(
            windows.batch(&mut generator(0), 1, 8),
            Err(Error::TooShort {
                found: 8,
                needed: 9,
                ..
            })
        ));
        assert!(windows.batch(&mut generator(0), 1, 0).is_err());
        assert!(Windows::new(tokens, 0..9, Order::Sequential).is_err());
        assert!(split(10, 1.0).is_err());
        assert!(split(10, f64::NAN).is_err());
        assert_eq!(split(10, 0.0).unwrap(), (0..10, 10..10));
    }
}
