//! Dropout whose mask is a function of seed and site: of entries (Srivastava et al., JMLR 15, 2014), of features
//! of a whole sequence, and of what a part adds to one (Huang et al., 2016, arXiv 1603.09382).

use crate::error::tensor;
use crate::{Context, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_signal::Signal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Zeroes each entry with `probability` and divides the rest by `1 − probability`; nothing when
/// evaluating.
///
/// # Errors
/// Those of the tensor engine.
pub fn dropout(
    x: &Signal,
    probability: f64,
    site: std::fmt::Arguments<'_>,
    cx: &Context<'_>,
) -> Result<Signal> {
    dropped(x, x.dims(), probability, site, cx)
}

/// Zeroes each feature of each sequence of `x` `[batch, length, width]`, in all of its tokens alike, with
/// `probability` and divides the rest by `1 − probability`; nothing when evaluating.
///
/// # Errors
/// Those of the tensor engine.
pub fn dropout_by_feature(
    x: &Signal,
    probability: f64,
    site: std::fmt::Arguments<'_>,
    cx: &Context<'_>,
) -> Result<Signal> {
    let (batch, _, width) = tensor(x.value().dims3())?;
    dropped(x, &[batch, 1, width], probability, site, cx)
}

/// Zeroes each row of `x` `[batch, length, width]` with `probability` and divides the rest by
/// `1 − probability`; nothing when evaluating.
pub(crate) fn drop_path(
    x: &Signal,
    probability: f64,
    site: std::fmt::Arguments<'_>,
    cx: &Context<'_>,
) -> Result<Signal> {
    let rows = x.dims().first().copied().unwrap_or(0);
    dropped(x, &[rows, 1, 1], probability, site, cx)
}

/// `x` times a random mask of some shape, which is broadcast.
fn dropped(
    x: &Signal,
    shape: &[usize],
    probability: f64,
    site: std::fmt::Arguments<'_>,
    cx: &Context<'_>,
) -> Result<Signal> {
    let Some(seed) = cx.dropout_seed.filter(|_| probability > 0.0) else {
        return Ok(x.clone());
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed_of_site(seed, &site.to_string()));
    let threshold = (probability * f64::from(u32::MAX)) as u32;
    let keep = 1.0 / (1.0 - probability);
    let mut entry = || match rng.random::<u32>() < threshold {
        true => 0.0,
        false => keep,
    };
    let entries = 0..shape.iter().product();
    let mask = match x.dtype() {
        DType::F64 => Tensor::from_vec(
            entries.map(|_| entry()).collect::<Vec<f64>>(),
            shape,
            x.device(),
        ),
        _ => Tensor::from_vec(
            entries.map(|_| entry() as f32).collect::<Vec<f32>>(),
            shape,
            x.device(),
        ),
    };
    let mask = tensor(tensor(mask)?.to_dtype(x.dtype()))?;
    Ok(x.multiply_constant(&mask)?)
}

/// FNV-1a, so that the masks of a run are the same whichever compiler built the program.
pub(crate) fn seed_of_site(seed: u64, site: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(site.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
