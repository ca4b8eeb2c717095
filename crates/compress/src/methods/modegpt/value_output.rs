//! Type III: nothing but mixing stands between values and the output, so that their product is
//! what counts.
//!
//! For a group with the value matrix `W_V` `[width, value_width]` whose heads write through `W_O`
//! `[value_width, width]`, side by side, and the second moment `C` of the inputs:
//!
//! ```text
//! C^{1/2} W_V = U₁ S₁ V₁ᵀ,   S₁ V₁ᵀ W_O = U₂ S₂ V₂ᵀ
//! W_V' = C^{-1/2} U₁ U₂_k = W_V V₁ S₁⁻¹ U₂_k,   W_O' = S₂_k V₂ᵀ_k
//! ```
//!
//! which leaves the least `Σ_heads E‖x W_V W_O − x W_V' W_O'‖² = Σ_{j>k} S₂_j²` of any pair of
//! rank `k` (Eckart and Young). The second form of `W_V'` never divides by `C`.

use lapidary_factor::{Matrix, square_root, thin_svd};

use crate::Result;

/// A singular value below this share of the largest is a direction that no value ever has.
const NEGLIGIBLE: f64 = 1e-13;

/// The narrower value and output matrices of a group.
pub(crate) struct Narrowed {
    /// `W_V'ᵀ`, `[features, width]`.
    pub(crate) value: Matrix,
    /// `W_O'ᵀ` of each head, `[width, features]`.
    pub(crate) outputs: Vec<Matrix>,
    /// `Σ_{j>k} S₂_j²`.
    #[cfg_attr(not(test), expect(dead_code, reason = "what tests hold the error to"))]
    pub(crate) discarded: f64,
}

/// `C^{1/2}`, which the groups of a layer share.
pub(crate) fn root(second_moment: &Matrix) -> Result<Matrix> {
    Ok(square_root(
        "second moment of attention's input",
        second_moment.as_ref(),
    )?)
}

/// Narrows a group to `features`: `value` is `W_Vᵀ` `[value_width, width]`, `outputs` are `W_Oᵀ`
/// of its heads, `[width, value_width]` each.
pub(crate) fn narrow(
    root: &Matrix,
    value: &Matrix,
    outputs: &[Matrix],
    features: usize,
) -> Result<Narrowed> {
    let first = thin_svd((root * value.transpose()).as_ref())?; // C^{1/2} W_V
    let rank = first.s.len();
    let scaled = Matrix::from_fn(rank, first.vt.ncols(), |k, j| first.s[k] * first.vt[(k, j)]);
    let width: usize = outputs.iter().map(|output| output.nrows()).sum();
    let mut beside = Matrix::zeros(first.vt.ncols(), width);
    let mut start = 0;
    for output in outputs {
        for row in 0..output.nrows() {
            for column in 0..output.ncols() {
                beside[(column, start + row)] = output[(row, column)];
            }
        }
        start += output.nrows();
    }
    let second = thin_svd((&scaled * &beside).as_ref())?;

    let largest = first.s.first().copied().unwrap_or(0.0);
    let inverse = |s: f64| {
        if s > NEGLIGIBLE * largest {
            1.0 / s
        } else {
            0.0
        }
    };
    let features = features.min(second.s.len());
    // S₁⁻¹ U₂_k, then V₁ on the left.
    let turned = Matrix::from_fn(rank, features, |i, k| {
        inverse(first.s[i]) * second.u[(i, k)]
    });
    let coordinates = first.vt.transpose() * &turned; // [value_width, features]
    let mut start = 0;
    let narrowed = outputs.iter().map(|output| {
        let from = start;
        start += output.nrows();
        Matrix::from_fn(output.nrows(), features, |row, k| {
            second.s[k] * second.vt[(k, from + row)]
        })
    });
    Ok(Narrowed {
        outputs: narrowed.collect(),
        value: coordinates.transpose() * value,
        discarded: second.discarded_energy(features),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::modegpt::testing::{energy, random, second_moment};
    use lapidary_factor::qr;

    const WIDTH: usize = 9;

    fn error(c: &Matrix, value: &Matrix, outputs: &[Matrix], other: &Narrowed) -> f64 {
        let pairs = outputs.iter().zip(&other.outputs);
        // (W_V W_O)ᵀ = W_Oᵀ W_Vᵀ
        pairs
            .map(|(output, narrow)| energy(&(output * value - narrow * &other.value), c))
            .sum()
    }

    #[test]
    fn the_error_is_the_discarded_energy_and_nothing_of_that_rank_does_better() {
        let c = second_moment(30, WIDTH, 1);
        let root = root(&c).unwrap();
        for heads in [1, 3] {
            let value = random(4, WIDTH, 2);
            let outputs: Vec<Matrix> = (0..heads).map(|h| random(WIDTH, 4, 3 + h)).collect();
            for features in 1..=4 {
                let narrowed = narrow(&root, &value, &outputs, features).unwrap();
                assert_eq!(narrowed.value.nrows(), features);
                let least = error(&c, &value, &outputs, &narrowed);
                let scale = 1e-11 * energy(&(&outputs[0] * &value), &c);
                assert!((least - narrowed.discarded).abs() < scale);
                if features == 4 {
                    assert!(least < scale);
                    continue;
                }
                // Any other subspace of values, with the outputs that fit it best.
                for seed in 0..20 {
                    let rotation = qr(random(4, features, 50 + seed).as_ref()).q;
                    let other = Narrowed {
                        value: rotation.transpose() * &value,
                        outputs: outputs.iter().map(|output| output * &rotation).collect(),
                        discarded: 0.0,
                    };
                    assert!(error(&c, &value, &outputs, &other) >= least - scale);
                }
            }
        }
    }

    #[test]
    fn a_group_is_not_cut_by_its_values_alone() {
        // The largest direction of the values is one that no head reads.
        let c = Matrix::identity(3, 3);
        let value = Matrix::from_fn(2, 3, |i, j| match (i, j) {
            (0, 0) => 10.0,
            (1, 1) => 1.0,
            _ => 0.0,
        });
        let output = Matrix::from_fn(3, 2, |_, j| j as f64);
        let outputs = [output];
        let narrowed = narrow(&root(&c).unwrap(), &value, &outputs, 1).unwrap();
        assert!(error(&c, &value, &outputs, &narrowed) < 1e-20);
    }

    #[test]
    fn inputs_that_never_vary_in_some_direction_do_no_harm() {
        let few = random(3, WIDTH, 8); // three tokens: C has rank 3
        let c = few.transpose() * &few;
        let (value, outputs) = (random(4, WIDTH, 9), [random(WIDTH, 4, 10)]);
        let narrowed = narrow(&root(&c).unwrap(), &value, &outputs, 3).unwrap();
        assert!(error(&c, &value, &outputs, &narrowed) < 1e-9);
        assert!(narrowed.value.norm_max() < 1e3);
    }
}
