//! Images with most of their patches hidden, and how well those are drawn again (He et al., Masked
//! Autoencoders Are Scalable Vision Learners, 2021, arXiv 2111.06377).
//!
//! ```text
//! loss = Σ_hidden ‖x̂_i − x_i‖² / (hidden · pixels)
//! ```
//!
//! Visible patches have no part in it.

use lapidary_kernels::{Device, Tensor};
use rand::RngExt;

use crate::error::engine;
use crate::{Error, Generator, Result};

/// Added to a patch's variance where targets are normalised.
const LEAST: f64 = 1e-6;

/// Which patches of each image of a batch are seen, `[batch, patches]` in `u8`, 1 = seen: the first of a
/// random order of all, of which the share `hidden` is not. One patch at least is seen, and one is not.
///
/// # Errors
/// For a share that is not between 0 and 1, or fewer than two patches.
pub fn visible(
    batch: usize,
    patches: usize,
    hidden: f64,
    generator: &mut Generator,
) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&hidden) || patches < 2 {
        return Err(Error::Tensor {
            name: "visible patches".to_owned(),
            detail: format!(
                "the share {hidden} of {patches} patches cannot be hidden: it has to be between 0 and 1, of \
                 two patches at least"
            ),
        });
    }
    let seen = (((1.0 - hidden) * patches as f64) as usize).clamp(1, patches - 1);
    let mut all = Vec::with_capacity(batch * patches);
    for _ in 0..batch {
        let first = all.len();
        all.resize(first + patches, 0u8);
        // The first of a shuffled order (Fisher & Yates), without the rest of it.
        let mut order: Vec<usize> = (0..patches).collect();
        for place in 0..seen {
            order.swap(place, generator.random_range(place..patches));
            let chosen = order
                .get(place)
                .and_then(|patch| all.get_mut(first + patch));
            if let Some(chosen) = chosen {
                *chosen = 1;
            }
        }
    }
    engine(Tensor::from_vec(all, (batch, patches), &Device::Cpu))
}

/// The mean squared error of `pixels` `[batch, patches, pixels]` on those patches of `targets` that are
/// not `visible` `[batch, patches]`; targets less their patch's mean, over its deviation, where they are
/// `normalised`.
///
/// # Errors
/// For shapes that do not fit, or where nothing is hidden.
pub fn reconstruction_loss(
    pixels: &Tensor,
    targets: &Tensor,
    visible: &Tensor,
    normalised: bool,
) -> Result<Tensor> {
    let (batch, patches, each) = engine(pixels.dims3())?;
    let wrong = |name: &str, detail: String| Error::Tensor {
        name: name.to_owned(),
        detail,
    };
    if targets.dims() != pixels.dims() || visible.dims() != [batch, patches] {
        let detail = format!(
            "targets {:?} and visible patches {:?} have to be {:?} and {:?}",
            targets.dims(),
            visible.dims(),
            pixels.dims(),
            [batch, patches]
        );
        return Err(wrong("targets", detail));
    }
    let targets = match normalised {
        false => targets.clone(),
        true => {
            let centred = engine(targets.broadcast_sub(&engine(targets.mean_keepdim(2))?))?;
            // Over one less than the count, as the authors' program does.
            let squares = engine(engine(centred.sqr())?.sum_keepdim(2))?;
            let variance = engine(squares / each.saturating_sub(1).max(1) as f64)?;
            let deviation = engine(engine(variance + LEAST)?.sqrt())?;
            engine(centred.broadcast_div(&deviation))?
        }
    };
    let hidden = engine(engine(visible.to_dtype(pixels.dtype()))?.affine(-1.0, 1.0))?;
    let count = engine(hidden.sum_all())?;
    let none = engine(engine(count.to_dtype(lapidary_kernels::DType::F64))?.to_scalar::<f64>())?;
    if none == 0.0 {
        return Err(wrong(
            "visible patches",
            "one at least has to be hidden".to_owned(),
        ));
    }
    let errors = engine(engine(engine(pixels - targets)?.sqr())?.mean(2))?;
    let sum = engine(engine(errors * hidden)?.sum_all())?;
    engine(sum / count)
}
