//! How small integers lie in bytes.

use crate::{Error, Result};

/// Weights that are unpacked at a time; groups are multiples of it.
pub(super) const BLOCK: usize = 32;

/// The sizes of integers that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    Four,
    Eight,
}

impl Bits {
    pub(super) fn new(bits: u32) -> Result<Self> {
        match bits {
            4 => Ok(Self::Four),
            8 => Ok(Self::Eight),
            other => Err(Error::argument("quantised matrix", "bits", other, "4 or 8")),
        }
    }

    pub(super) fn number(self) -> u32 {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
        }
    }

    /// Bytes of so many weights, a multiple of [`BLOCK`].
    #[inline(always)]
    pub(super) fn bytes(self, weights: usize) -> usize {
        match self {
            Self::Four => weights / 2,
            Self::Eight => weights,
        }
    }

    /// Weights in so many bytes.
    pub(super) fn weights(self, bytes: usize) -> usize {
        match self {
            Self::Four => 2 * bytes,
            Self::Eight => bytes,
        }
    }

    /// One block as numbers: the integers themselves, or, without `offset`, centred.
    #[inline(always)]
    pub(super) fn block(self, bytes: &[u8], offset: bool) -> [f32; BLOCK] {
        let mut q = [0.0; BLOCK];
        match self {
            Self::Four => {
                let centre = if offset { 0 } else { 8 };
                let (low, high) = q.split_at_mut(BLOCK / 2);
                for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
                    *low = (i32::from(byte & 15) - centre) as f32;
                    *high = (i32::from(byte >> 4) - centre) as f32;
                }
            }
            Self::Eight => {
                let centre = if offset { 0 } else { 128 };
                for (q, byte) in q.iter_mut().zip(bytes) {
                    *q = (i32::from(*byte) - centre) as f32;
                }
            }
        }
        q
    }

    /// Integers, one a byte, into bytes.
    pub(super) fn pack(self, codes: &[u8]) -> Vec<u8> {
        match self {
            Self::Eight => codes.to_vec(),
            Self::Four => {
                let (blocks, _) = codes.as_chunks::<BLOCK>();
                let halves = blocks.iter().map(|block| block.split_at(BLOCK / 2));
                halves
                    .flat_map(|(low, high)| low.iter().zip(high).map(|(low, high)| low | high << 4))
                    .collect()
            }
        }
    }

    /// Bytes into integers, one a byte.
    pub(super) fn unpack(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Eight => bytes.to_vec(),
            Self::Four => bytes
                .chunks_exact(BLOCK / 2)
                .flat_map(|block| {
                    let low = block.iter().map(|byte| byte & 15);
                    low.chain(block.iter().map(|byte| byte >> 4))
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packed_integers_come_back(codes in prop::collection::vec(0u8..16, 96)) {
            for bits in [Bits::Four, Bits::Eight] {
                let packed = bits.pack(&codes);
                prop_assert_eq!(packed.len(), bits.bytes(codes.len()));
                prop_assert_eq!(bits.weights(packed.len()), codes.len());
                prop_assert_eq!(&bits.unpack(&packed), &codes);
                let first = &packed[..bits.bytes(BLOCK)];
                for (q, code) in bits.block(first, true).iter().zip(&codes) {
                    prop_assert_eq!(*q, f32::from(*code));
                }
            }
        }
    }
}
