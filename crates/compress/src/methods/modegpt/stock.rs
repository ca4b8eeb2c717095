//! Heads of a shape that configs of published families can say.
//!
//! Such a config has one width for the queries, keys and values of all heads, `k`, scores scaled by `1/√k`,
//! and rotations by `θ^(−2 j / k)`. Heads of `w` features that were scaled by `s` and keep the pairs
//! `0, t, 2 t, …` turn by `θ^(−2 j t / w)`, so that exactly the same scores are had with
//!
//! ```text
//! θ' = θ^(t k / w)        (θ'^(−2 j / k) = θ^(−2 j t / w))
//! W_Q' = s √k W_Q         (1/√k q'ᵀk' = s qᵀk)
//! ```
//!
//! whatever the scaling of frequencies for longer texts, which is a function of each. Pairs chosen one by
//! one have no such base. The step `t` is the one whose pairs are worth most in all heads of the model.

use lapidary_model::{Model, ModelSpec};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_parts::position::{PositionSpec, RotarySpec};

use super::query_key::{Kept, by_pair, features_of, scores};
use super::{heads, planned_heads, squares};
use crate::edit::Edit;
use crate::error::engine;
use crate::methods::channels;
use crate::plan::Plan;
use crate::{Calibration, Error, Result};

/// What the heads of a model become.
pub(super) struct Shape {
    /// The step between the pairs that stay, where a rotation turns pairs.
    pub(super) step: Option<usize>,
}

/// Refuses heads that are not of one shape, or that no config describes as they are.
pub(super) fn check(model: &Model) -> Result<()> {
    let width = model.spec().width;
    let wrong = |index: usize, found: String, expected: &str| {
        let what = format!("the attention of block {index}");
        let expected = format!("{expected} for modegpt.stock; without it modegpt takes others");
        Err(Error::invalid(what, found, expected))
    };
    let mut first: Option<(usize, PositionSpec)> = None;
    for (index, block) in model.spec().expanded_blocks().iter().enumerate() {
        let spec = heads(index, block)?;
        let (head_width, value_width) = (spec.head_width(width), spec.value_width(width));
        if head_width != value_width {
            let found = format!("one with queries of {head_width} and values of {value_width}");
            return wrong(index, found, "one with both as wide as each other");
        }
        if let Some(rotary) = spec.position.rotary()
            && (rotary.kept.is_some() || rotary.rotated(head_width) != head_width)
        {
            let found = "one that turns a part of a head, or pairs that are left of wider ones";
            return wrong(index, found.to_owned(), "one that turns whole heads");
        }
        let own = (head_width, spec.position.clone());
        if *first.get_or_insert_with(|| own.clone()) != own {
            let found = format!("of another width or position than block 0's: {head_width}");
            return wrong(index, found, "one as the others");
        }
    }
    Ok(())
}

impl Shape {
    /// What a plan makes of all heads; nothing where it leaves them.
    ///
    /// # Errors
    /// When it gives them several widths.
    pub(super) fn of(
        model: &Model,
        plan: &Plan,
        calibration: &Calibration,
    ) -> Result<Option<Self>> {
        check(model)?;
        let modules = plan.modules.iter();
        let planned = modules.filter(|module| module.path.ends_with(".attention"));
        let mut widths = planned.map(planned_heads).collect::<Result<Vec<_>>>()?;
        widths.dedup();
        let features = match widths.as_slice() {
            [] | [None] => return Ok(None),
            [Some((query_key, value))] if query_key == value => *query_key,
            several => {
                return Err(Error::invalid(
                    "widths of queries and keys and of values in a plan of modegpt.stock",
                    format!("{several:?}"),
                    "one for both, the same in all blocks",
                ));
            }
        };
        let step = step(model, features, calibration)?;
        Ok(Some(Self { step }))
    }
}

/// The step whose pairs are worth most; of equal ones the smallest.
fn step(model: &Model, features: usize, calibration: &Calibration) -> Result<Option<usize>> {
    let width = model.spec().width;
    let kept = features / 2;
    let mut worth: Vec<f64> = Vec::new(); // of each pair, over all heads
    for (index, block) in model.spec().expanded_blocks().iter().enumerate() {
        let spec = heads(index, block)?;
        let Some(rotary) = spec.position.rotary() else {
            return Ok(None);
        };
        let path = channels::attention(index);
        let queries = calibration.vector(&squares(format!("{path}.query")))?;
        let keys = calibration.vector(&squares(format!("{path}.key")))?;
        let head_width = spec.head_width(width);
        worth.resize(head_width / 2, 0.0);
        for group in 0..spec.groups() {
            let squares = scores(spec, head_width, group, &queries, &keys);
            let own = by_pair(&squares, head_width, rotary.interleaved);
            for (worth, own) in worth.iter_mut().zip(own) {
                *worth += own;
            }
        }
    }
    if kept == 0 || kept > worth.len() || !features.is_multiple_of(2) {
        return Err(Error::invalid(
            "features of a narrower query and key",
            features,
            format!("an even number of at most {}", 2 * worth.len()),
        ));
    }
    let largest = (worth.len() - 1).checked_div(kept - 1).unwrap_or(1);
    let of_step = |step: usize| -> f64 { worth.iter().step_by(step).take(kept).sum() };
    let best = (1..=largest)
        .rev()
        .max_by(|a, b| of_step(*a).total_cmp(&of_step(*b)));
    Ok(best)
}

/// `features` of each head, the pairs `step` apart.
pub(super) fn kept(
    spec: &MultiHeadSpec,
    rotary: &RotarySpec,
    head_width: usize,
    features: usize,
    step: usize,
) -> Kept {
    let pairs: Vec<usize> = (0..features / 2).map(|j| j * step).collect();
    let own = features_of(&pairs, head_width, rotary.interleaved);
    let share = (step * features) as f64 / head_width as f64;
    let mut position = spec.position.clone();
    if let Some(narrow) = position.rotary_mut() {
        narrow.theta = rotary.theta.powf(share);
        narrow.width = None;
    }
    Kept {
        features: vec![own; spec.groups()],
        position,
    }
}

/// Multiplies the queries of narrowed heads by what the scale was over what it is by itself.
pub(super) fn take_in_scale(edit: &mut Edit, index: usize, before: &MultiHeadSpec) -> Result<()> {
    let width = edit.spec.width;
    let factor = match &mut edit.block(index)?.attention {
        MixerSpec::MultiHead(attention) => {
            attention.scale = None;
            before.scale(width) / attention.scale(width)
        }
        _ => return Ok(()),
    };
    for part in ["weight", "bias"] {
        let name = format!("{}.query.{part}", channels::attention(index));
        if let Some(own) = edit.find(&name)? {
            edit.put(name, &engine(own.affine(factor, 0.0))?)?;
        }
    }
    Ok(())
}

/// Why no config of a published family says the heads of a model that was narrowed, if none does.
pub(super) fn obstacle(before: &ModelSpec, after: &ModelSpec) -> Option<String> {
    let multi_head = |block: &BlockSpec| match &block.attention {
        MixerSpec::MultiHead(spec) => Some(spec.clone()),
        _ => None,
    };
    let of = |spec: &ModelSpec| -> Vec<MultiHeadSpec> {
        spec.expanded_blocks()
            .iter()
            .filter_map(multi_head)
            .collect()
    };
    let (width, whole, narrow) = (after.width, of(before), of(after));
    if whole == narrow {
        return None;
    }
    let first = narrow.first()?.head_width(width);
    for (index, (before, after)) in whole.iter().zip(&narrow).enumerate() {
        let (head_width, value_width) = (after.head_width(width), after.value_width(width));
        if head_width != value_width {
            return Some(format!(
                "in block {index} queries and keys have {head_width} features and values {value_width}, \
                 where a config has one width"
            ));
        }
        if head_width != first {
            return Some(format!(
                "heads have {first} features in one block and {head_width} in another"
            ));
        }
        match after.position.rotary() {
            None => {
                let reason = "configs have a width of heads where positions are rotary only";
                return Some(reason.to_owned());
            }
            Some(rotary) if rotary.kept.is_some() => {
                let reason =
                    "rotary pairs that were chosen one by one turn as no base has them turn";
                return Some(reason.to_owned());
            }
            Some(_) => {}
        }
        if after.scale(width) != 1.0 / (head_width as f64).sqrt() {
            let reason = "scores keep the scale of wider heads";
            return Some(reason.to_owned());
        }
        let output_bias = |spec: &MultiHeadSpec| spec.output_bias.unwrap_or(spec.bias);
        if output_bias(after) && !output_bias(before) {
            let reason = "the biases of values became one of the output, which had none";
            return Some(reason.to_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_of_narrower_heads_turns_pairs_as_they_turned() {
        let spec = MultiHeadSpec {
            groups: Some(2),
            position: PositionSpec::Rotary(RotarySpec {
                theta: 500.0,
                ..RotarySpec::default()
            }),
            ..MultiHeadSpec::new(4)
        };
        let rotary = spec.position.rotary().unwrap();
        for (head_width, features, step) in [(16, 8, 1), (16, 8, 2), (16, 6, 3), (12, 2, 5)] {
            let kept = kept(&spec, rotary, head_width, features, step);
            let narrow = kept.position.rotary().unwrap();
            let half = features / 2;
            for (j, feature) in kept.features[1].iter().take(half).enumerate() {
                assert_eq!(*feature, j * step);
                assert_eq!(kept.features[1][half + j], j * step + head_width / 2);
                let before = 500f64.powf(-2.0 * *feature as f64 / head_width as f64);
                let after = narrow.theta.powf(-2.0 * j as f64 / features as f64);
                assert!((after / before - 1.0).abs() < 1e-12);
            }
        }
        // Where every other pair goes, the base stays.
        let same = kept(&spec, rotary, 16, 8, 2).position;
        assert!((same.rotary().unwrap().theta - 500.0).abs() < 1e-9);
    }
}
