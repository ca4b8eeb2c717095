//! FastFood (Le, Sarlós, Smola, Fastfood: Approximating Kernel Expansions in Loglinear Time, 2013):
//! as many frequencies as features, multiplied with a vector in `d log d` operations.
//!
//! ```text
//! V x = (1/√d) S H G Π H B x
//! ```
//!
//! `H` is the Walsh–Hadamard matrix, `Π` a permutation, `S`, `G` and `B` are diagonal. Drawn, `B` is
//! ±1, `G` standard normal, and `S` gives the rows of `V` the lengths of normal vectors, chi over
//! `‖G‖`; learned, they start normal with the variance `1 / d` and each head has its own.

use super::super::Heads;
use super::spectrum::{Learned, normal};
use crate::error::tensor;
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The diagonal matrices that are learned, each `[heads, d]`.
#[derive(Debug)]
pub(super) struct Fastfood {
    scaling: Option<Tensor>,
    gaussian: Option<Tensor>,
    signs: Option<Tensor>,
}

impl Fastfood {
    pub(super) fn new(
        learned: Learned,
        heads: &Heads,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let start = Init::Normal {
            deviation: 1.0 / (heads.head_width as f64).sqrt(),
        };
        let shape = [heads.heads, heads.head_width];
        let mut when = |learned: bool, name: &str| match learned {
            true => parameters.tensor(name, &shape, start).map(Some),
            false => Ok(None),
        };
        Ok(Self {
            scaling: when(learned != Learned::None, "scaling")?,
            gaussian: when(learned == Learned::All, "gaussian")?,
            signs: when(learned == Learned::All, "signs")?,
        })
    }

    /// `V x` for `x` `[batch, heads, length, d]`, with what is not learned drawn from a seed.
    pub(super) fn project(&self, x: &Tensor, seed: u64) -> Result<Tensor> {
        let width = tensor(x.dim(3))?;
        let drawn = Drawn::new(width, seed, x)?;
        // [1, heads or 1, 1, d]
        let diagonal = |learned: &Option<Tensor>, drawn: &Tensor| {
            let diagonal = learned.as_ref().unwrap_or(drawn);
            tensor(diagonal.reshape((1, (), 1, width)))
        };
        let times = |x: &Tensor, diagonal: Tensor| tensor(x.broadcast_mul(&diagonal));
        let mixed = hadamard(&times(x, diagonal(&self.signs, &drawn.signs)?)?)?;
        let permuted = tensor(tensor(mixed.contiguous())?.index_select(&drawn.permutation, 3))?;
        let spread = hadamard(&times(
            &permuted,
            diagonal(&self.gaussian, &drawn.gaussian)?,
        )?)?;
        let scaled = times(&spread, diagonal(&self.scaling, &drawn.scaling)?)?;
        tensor(scaled / (width as f64).sqrt())
    }
}

/// One draw of what FastFood is made of.
struct Drawn {
    signs: Tensor,
    permutation: Tensor,
    gaussian: Tensor,
    scaling: Tensor,
}

impl Drawn {
    fn new(width: usize, seed: u64, like: &Tensor) -> Result<Self> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let like_all = |values: Vec<f64>| {
            let values = tensor(Tensor::from_vec(values, (1, width), like.device()))?;
            tensor(values.to_dtype(like.dtype()))
        };
        let signs = (0..width).map(|_| if generator.random() { 1.0 } else { -1.0 });
        let signs = like_all(signs.collect())?;
        let mut permutation: Vec<u32> = (0..width as u32).collect();
        permutation.shuffle(&mut generator);
        let gaussian = normal(&[1, width], generator.random(), like)?;
        // The length of a normal vector, once for each row, over that of the row.
        let vectors = normal(&[width, width], generator.random(), like)?;
        let lengths = tensor(tensor(tensor(vectors.sqr())?.sum(1))?.sqrt())?;
        let length = tensor(tensor(tensor(gaussian.sqr())?.sum_all())?.sqrt())?;
        let scaling = tensor(lengths.broadcast_div(&length))?;
        Ok(Self {
            signs,
            permutation: tensor(Tensor::from_vec(permutation, width, like.device()))?,
            gaussian,
            scaling: tensor(scaling.reshape((1, width)))?,
        })
    }
}

/// `H x` along the last dimension of `x`, in `d log₂ d` additions, where `H_ij = (−1)^{bits of i & j}`.
///
/// # Errors
/// When that dimension is not a power of two.
pub fn hadamard(x: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    if !width.is_power_of_two() {
        let expected = "a power of two";
        return Err(Error::spec(
            "length of a Hadamard transform",
            width,
            expected,
        ));
    }
    let rows = x.elem_count() / width;
    let mut y = tensor(tensor(x.contiguous())?.reshape((rows, width)))?;
    let mut half = 1;
    while half < width {
        // Pairs that lie `half` apart become their sum and their difference.
        let pairs = tensor(y.reshape((rows, width / (2 * half), 2, half)))?;
        let (a, b) = (
            tensor(pairs.narrow(2, 0, 1))?,
            tensor(pairs.narrow(2, 1, 1))?,
        );
        let both = [tensor(&a + &b)?, tensor(&a - &b)?];
        y = tensor(tensor(Tensor::cat(&both, 2))?.reshape((rows, width)))?;
        half *= 2;
    }
    tensor(y.reshape(x.shape()))
}
