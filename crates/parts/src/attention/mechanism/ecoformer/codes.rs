//! Codes of ±1 as the bits of a word.

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};

/// Most bits of a code.
pub(super) const MAX_BITS: usize = 64;

/// Codes of up to 64 entries `±1`, a word each, whose inner products count bits:
/// `b_i · b_j = bits − 2 Hamming(b_i, b_j)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedCodes {
    words: Vec<u64>,
    bits: usize,
}

impl PackedCodes {
    /// The codes `[.., bits]`, in order; what is above zero is `+1`.
    ///
    /// # Errors
    /// For codes of no bits, or of more than 64.
    pub fn new(codes: &Tensor) -> Result<Self> {
        let bits = codes.dims().last().copied().unwrap_or(0);
        if !(1..=MAX_BITS).contains(&bits) {
            let expected = format!("between 1 and {MAX_BITS}");
            return Err(Error::spec("bits of a packed code", bits, expected));
        }
        let flat = tensor(tensor(codes.detach().to_dtype(DType::F64))?.flatten_all())?;
        let flat = tensor(flat.to_vec1::<f64>())?;
        let word = |code: &[f64]| {
            let set = code.iter().zip(0..).filter(|(entry, _)| **entry > 0.0);
            set.fold(0u64, |word, (_, place)| word | 1 << place)
        };
        Ok(Self {
            words: flat.chunks_exact(bits).map(word).collect(),
            bits,
        })
    }

    /// Number of codes.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The word of each code, its first entry the lowest bit.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// `b · c` for two words of these codes.
    pub fn product(&self, b: u64, c: u64) -> i64 {
        self.bits as i64 - 2 * i64::from((b ^ c).count_ones())
    }
}
