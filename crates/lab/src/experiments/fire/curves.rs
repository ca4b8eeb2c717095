//! The biases that the heads of a trained decoder have learned, by distance.

use super::super::{mean, numbers};
use crate::error::engine;
use crate::{Claim, Plot, Result, Series, Verdict};
use lapidary_kernels::Device;
use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::parameters::Parameters;
use lapidary_parts::position::{Position, Span};
use std::collections::BTreeMap;

/// The bias of one head by distance, less that of distance 0, which softmax does not see.
pub(super) struct Curve {
    block: usize,
    head: usize,
    by_distance: Vec<f64>,
}

impl Curve {
    /// Mean of the farther half of distances less that of the nearer half: below 0 for a head that
    /// prefers what is near, above for one that prefers what is far.
    fn rise(&self) -> f64 {
        let (near, far) = self.by_distance.split_at(self.by_distance.len() / 2);
        mean(far.iter().copied()) - mean(near.iter().copied())
    }
}

/// The curves of every head that the last of `length` tokens has.
pub(super) fn of(model: &Model, length: usize) -> Result<Vec<Curve>> {
    let mut found = Vec::new();
    for (block, spec) in model.spec().expanded_blocks().iter().enumerate() {
        let MixerSpec::MultiHead(attention) = &spec.attention else {
            continue;
        };
        let heads = attention.heads;
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let mut parameters = model.parameters().clone();
        let root = Parameters::new(&mut parameters, &ranks, &mut linears);
        let own = root.at_root(format!("blocks.{block}.attention.position"));
        let head_width = model.spec().width / heads.max(1);
        let position = Position::new(&attention.position, (heads, heads), head_width, true, own)?;
        let last = Span {
            queries: 1,
            keys: length,
            offset: length.saturating_sub(1),
            draw: None,
        };
        let Some(bias) = position.bias(last, model.dtype(), &Device::Cpu)? else {
            continue;
        };
        let bias = bias.laid_out(1, length)?;
        for head in 0..heads {
            let mut by_distance = numbers(&engine(bias.narrow(1, head, 1))?)?;
            // The last key is the query's own.
            by_distance.reverse();
            let own = by_distance.first().copied().unwrap_or_default();
            by_distance.iter_mut().for_each(|bias| *bias -= own);
            found.push(Curve {
                block,
                head,
                by_distance,
            });
        }
    }
    Ok(found)
}

/// How many heads prefer what is near, and how many what is far.
fn kinds(curves: &[Curve]) -> [usize; 2] {
    let near = curves.iter().filter(|curve| curve.rise() < 0.0).count();
    let far = curves.iter().filter(|curve| curve.rise() > 0.0).count();
    [near, far]
}

/// Whether heads of both kinds occur.
pub(super) fn both_kinds(curves: &[Curve]) -> bool {
    kinds(curves).iter().all(|count| *count > 0)
}

/// That heads of both kinds occur.
pub(super) fn claim(curves: &[Curve], what: &str, verdict: Verdict) -> Claim {
    let [near, far] = kinds(curves);
    Claim::new(
        &format!("on {what}, some heads learn to prefer what is near and some what is far"),
        "both kinds of heads occur",
        format!(
            "the bias of the farther half of distances is lower in {near} heads and higher in {far}"
        ),
        verdict,
    )
}

/// All curves.
pub(super) fn plot(curves: Vec<Curve>, what: &str) -> Plot {
    let series = curves.into_iter().map(|curve| Series {
        name: format!("block {}, head {}", curve.block, curve.head),
        points: curve
            .by_distance
            .into_iter()
            .enumerate()
            .map(|(distance, bias)| (distance as f64, bias))
            .collect(),
    });
    Plot {
        title: format!("Biases that FIRE learned on {what}"),
        x: "distance".to_owned(),
        y: "bias, less that of distance 0".to_owned(),
        series: series.collect(),
    }
}
