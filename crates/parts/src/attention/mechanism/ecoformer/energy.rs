//! What attention takes in multiplications and additions, and in energy on a chip.
//!
//! In 45 nm a multiplication of single-precision numbers takes 3.7 pJ and an addition 0.9 pJ. Multiplying
//! by a code is an addition.

use super::EcoformerSpec;
use serde::Serialize;

const PICOJOULES_OF_A_MULTIPLICATION: f64 = 3.7;
const PICOJOULES_OF_AN_ADDITION: f64 = 0.9;

/// Multiplications and additions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Multiplications and divisions.
    pub multiplications: u64,
    /// Additions and subtractions.
    pub additions: u64,
}

impl Tally {
    /// Energy in pJ.
    pub fn picojoules(self) -> f64 {
        PICOJOULES_OF_A_MULTIPLICATION * self.multiplications as f64
            + PICOJOULES_OF_AN_ADDITION * self.additions as f64
    }

    /// Softmax attention over as many `tokens` as queries, with `heads` heads of `width` features of keys and
    /// values.
    pub fn of_softmax(heads: usize, tokens: usize, width: usize) -> Self {
        let [heads, tokens, width] = [heads, tokens, width].map(|size| size as u64);
        let products = 2 * tokens * tokens * heads * width;
        Self {
            multiplications: products + heads * tokens * tokens,
            additions: products,
        }
    }
}

impl EcoformerSpec {
    /// The same of hashed attention:
    ///
    /// | | multiplications | additions |
    /// |---|---|---|
    /// | kernels of `m` anchors | `2 h n m` | `2 h n m d` |
    /// | hashing to `β` bits | `h n m β` | `h n m β` |
    /// | the sum of keys | | `h n β` |
    /// | normalisers | `h n β` | `h n β` |
    /// | the sum of codes times values | | `h n β d` |
    /// | reading it out | | `h n β d + h n d` |
    /// | dividing | `h n d` | |
    pub fn tally(&self, heads: usize, tokens: usize, width: usize) -> Tally {
        let [rows, width] = [heads * tokens, width].map(|size| size as u64);
        let [anchors, bits] = [self.anchors, self.bits].map(|size| size as u64);
        Tally {
            multiplications: rows * (2 * anchors + anchors * bits + bits + width),
            additions: rows
                * (2 * anchors * width + anchors * bits + 2 * bits + 2 * bits * width + width),
        }
    }
}
