//! What training draws anew in a pass, so that one can say beforehand whether passes that draw nothing are other ones.

use std::ops::BitOr;

/// What a pass with a draw does otherwise than one without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draws {
    /// Whether anything: subsets of keys, random features, rotations of hashes, positions, blocks to explore.
    pub any: bool,
    /// Whether it leaves out keys, fewer of them the further it is with annealing.
    pub keys: bool,
}

impl Draws {
    /// Something, if so.
    pub fn anything(any: bool) -> Self {
        Self { any, keys: false }
    }
}

impl BitOr for Draws {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            any: self.any || other.any,
            keys: self.keys || other.keys,
        }
    }
}

impl FromIterator<Draws> for Draws {
    fn from_iter<I: IntoIterator<Item = Draws>>(each: I) -> Self {
        each.into_iter().fold(Self::default(), BitOr::bitor)
    }
}
