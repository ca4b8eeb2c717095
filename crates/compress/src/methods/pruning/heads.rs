//! Takes whole heads out of attention, those whose weights matter least to the loss (after Michel
//! et al. 2019, arXiv 1905.10650, who measure a gate before each head).
//!
//! ```text
//! y = Σ_h softmax(scale · q_h k_hᵀ) v_h W_O[:, h] + b_O
//! ```
//!
//! so that a model without a head's rows of query, key and value and its columns of output writes what
//! it would with those columns zero. Query heads that read one group of keys and values go or stay
//! together. The score is the sum of `w² E[(∂L/∂w)²]` over all of that. Each block keeps a group, and may
//! keep another number of them than its neighbours.

use std::collections::BTreeSet;

use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, QueryKeyNorm};
use lapidary_parts::position::{KeptPairs, PositionSpec};

use super::hidden::{removed, uneven};
use super::saliency;
use super::settings::PruneSettings;
use crate::ahead::{Left, Refused};
use crate::edit::Edit;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::channels;
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, Error, Result};

/// Whole heads in the list of methods.
pub(crate) const PRUNE_HEADS: Method = Method {
    name: "prune-heads",
    summary: "Takes out the heads whose weights matter least to the loss",
    source: "Michel et al. 2019, arXiv 1905.10650",
    schedule: Schedule::OneShot,
    effect: Effect::Parts,
    observes: false,
    leaves: &[Left::UnevenHeads],
    refuses: |_| &[Refused::Factors("attention")],
    requirements,
    plan,
    apply,
    cut: None,
};

/// Attention of one block.
struct Attention {
    block: usize,
    spec: MultiHeadSpec,
    head_width: usize,
    value_width: usize,
}

impl Attention {
    fn path(&self, layer: &str) -> String {
        format!("{}.{layer}", channels::attention(self.block))
    }

    /// Query heads of a group.
    fn each(&self) -> usize {
        self.spec.heads / self.spec.groups().max(1)
    }

    /// The features of `groups`, of which each has `width` for each of its `heads`.
    fn features(groups: &[usize], heads: usize, width: usize) -> Vec<usize> {
        let size = heads * width;
        let of = |group: &usize| group * size..(group + 1) * size;
        groups.iter().flat_map(of).collect()
    }

    /// The layers with the width of a group's part, and whether it lies at the input.
    fn layers(&self) -> [(&'static str, usize, bool); 4] {
        let each = self.each();
        [
            ("query", each * self.head_width, false),
            ("key", self.head_width, false),
            ("value", self.value_width, false),
            ("output", each * self.value_width, true),
        ]
    }

    /// The score of each group.
    fn scores(&self, edit: &Edit, calibration: &Calibration) -> Result<Vec<f64>> {
        let mut total = vec![0.0; self.spec.groups()];
        for (layer, size, inputs) in self.layers() {
            let found = saliency(edit, &self.path(layer), calibration)?;
            let features = match inputs {
                true => found.by_input(),
                false => found.by_output(),
            };
            let groups = features.chunks(size.max(1));
            let pairs = total.iter_mut().zip(groups);
            pairs.for_each(|(sum, group)| *sum += group.iter().sum::<f64>());
        }
        Ok(total)
    }

    /// Leaves these groups.
    fn keep(&self, edit: &mut Edit, groups: &[usize]) -> Result<()> {
        for (layer, size, inputs) in self.layers() {
            let features = Self::features(groups, 1, size);
            match inputs {
                true => channels::select_inputs(edit, &self.path(layer), &features)?,
                false => channels::select_outputs(edit, &self.path(layer), &features)?,
            }
        }
        let mut position = self.spec.position.clone();
        if let Some(rotary) = position.rotary_mut()
            && let Some(KeptPairs { groups: kept, .. }) = &mut rotary.kept
        {
            let left = groups.iter().filter_map(|group| kept.get(*group).cloned());
            *kept = left.collect();
        }
        match &position {
            PositionSpec::RelativeBuckets { .. } => {
                let heads = Self::features(groups, self.each(), 1);
                let name = self.path("position.buckets");
                let table = channels::select(&edit.get(&name)?, 1, &heads)?;
                edit.put(name, &table)?;
            }
            PositionSpec::KerpleLogarithmic | PositionSpec::KerplePower => {
                let heads = Self::features(groups, self.each(), 1);
                let name = self.path("position.coefficients");
                let both = channels::select(&edit.get(&name)?, 1, &heads)?;
                edit.put(name, &both)?;
            }
            // Fire is refused before.
            PositionSpec::None
            | PositionSpec::Rotary(_)
            | PositionSpec::Alibi
            | PositionSpec::Sandwich { .. }
            | PositionSpec::Fire(_) => {}
        }
        if let MixerSpec::MultiHead(spec) = &mut edit.block(self.block)?.attention {
            spec.heads = groups.len() * self.each();
            spec.groups = self.spec.groups.map(|_| groups.len());
            spec.head_width = Some(self.head_width);
            spec.value_width = Some(self.value_width).filter(|width| *width != self.head_width);
            spec.position = position;
        }
        Ok(())
    }
}

/// The attention of every block that has some.
fn attentions(model: &Model) -> Result<Vec<Attention>> {
    let width = model.spec().width;
    let mut found = Vec::new();
    for (block, spec) in model.spec().expanded_blocks().iter().enumerate() {
        let refuse = |what: &str, is: &str, expected: &str| {
            Err(Error::invalid(
                format!("the {what} of block {block}"),
                is,
                expected,
            ))
        };
        let spec = match &spec.attention {
            MixerSpec::MultiHead(spec) => spec,
            MixerSpec::Absent => continue,
            other => {
                return refuse(
                    "mixer",
                    other.kind(),
                    "multi-head attention for prune-heads; magnitude and first-order take others",
                );
            }
        };
        if let Some(peculiarity) = spec.peculiarity() {
            return refuse(
                "attention",
                peculiarity,
                "softmax with projections of its own for prune-heads; magnitude and first-order \
                 take others",
            );
        }
        if matches!(spec.position, PositionSpec::Alibi | PositionSpec::Fire(_)) {
            return refuse(
                "positions",
                spec.position.kind(),
                "others for prune-heads: what a head adds follows from how many there are",
            );
        }
        if matches!(
            spec.query_key_norm,
            Some(QueryKeyNorm {
                per_head: false,
                ..
            })
        ) {
            return refuse(
                "norm of queries and keys",
                "over all heads together",
                "over each head for prune-heads: fewer heads have another norm",
            );
        }
        found.push(Attention {
            block,
            head_width: spec.head_width(width),
            value_width: spec.value_width(width),
            spec: spec.clone(),
        });
    }
    match found.is_empty() {
        false => Ok(found),
        true => Err(Error::invalid(
            "the model",
            "one without attention",
            "one with it for prune-heads",
        )),
    }
}

/// Whether a share is sure to leave blocks with different numbers of heads, whatever their scores.
pub(crate) fn uneven_heads(model: &Model, keep: f64, settings: &PruneSettings) -> Result<bool> {
    let all = attentions(model)?;
    let groups: Vec<usize> = all.iter().map(|one| one.spec.groups()).collect();
    Ok(uneven(&groups, keep, settings))
}

fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
    settings.pruning.check()?;
    let mut statistics = BTreeSet::new();
    for attention in attentions(model)? {
        statistics.extend(attention.layers().map(|(layer, ..)| Statistic::Fisher {
            layer: attention.path(layer),
        }));
    }
    Ok(Requirements { statistics })
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let keep = budget.share(PRUNE_HEADS.name)?;
    let calibration = task.calibrated(PRUNE_HEADS.name)?;
    let all = attentions(task.model)?;
    let edit = Edit::of(task.model);
    let scores = all
        .iter()
        .map(|attention| attention.scores(&edit, calibration))
        .collect::<Result<Vec<_>>>()?;
    let removed = removed(&scores, keep, &task.settings().pruning);
    let width = task.model.spec().width;
    let modules = all.iter().zip(removed);
    let modules = modules.map(|(attention, removed)| ModulePlan {
        path: channels::attention(attention.block),
        input: width,
        output: width,
        change: match removed {
            0 => Change::Leave {
                reason: "none of its heads is to go".to_owned(),
            },
            _ => Change::FewerHeads {
                heads: attention.each() * (attention.spec.groups() - removed),
            },
        },
    });
    Ok(Plan {
        method: PRUNE_HEADS.name.to_owned(),
        modules: modules.collect(),
    })
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let calibration = task.calibrated(PRUNE_HEADS.name)?;
    let all = attentions(model)?;
    let mut edit = Edit::of(model);
    for planned in &plan.modules {
        let block = channels::block_of(model, planned, "attention")?;
        let attention = all.iter().find(|attention| attention.block == block);
        let Some((attention, groups)) = asked(planned, attention)? else {
            continue;
        };
        let scores = attention.scores(&edit, calibration)?;
        attention.keep(&mut edit, &channels::largest(&scores, groups))?;
    }
    let fewer = edit.finish()?;
    let report = |planned: &ModulePlan| {
        let weights = |model: &Model| channels::weights(model, &planned.path);
        ModuleReport::new(planned, weights(model), weights(&fewer))
    };
    let modules = plan.modules.iter().map(report).collect();
    Compressed::new(PRUNE_HEADS.name, task, fewer, modules)
}

/// The attention of a planned module and the groups that it keeps; none where it stays.
fn asked<'a>(
    planned: &ModulePlan,
    attention: Option<&'a Attention>,
) -> Result<Option<(&'a Attention, usize)>> {
    let Change::FewerHeads { heads } = planned.change else {
        return match planned.change {
            Change::Leave { .. } => Ok(None),
            ref other => Err(Error::invalid(
                format!("change of {}", planned.path),
                format!("{other:?}"),
                "leave or fewer-heads",
            )),
        };
    };
    let attention = attention
        .ok_or_else(|| Error::invalid("plan", &planned.path, "of blocks with attention"))?;
    let each = attention.each().max(1);
    match heads >= each && heads <= attention.spec.heads && heads.is_multiple_of(each) {
        true => Ok(Some((attention, heads / each))),
        false => Err(Error::invalid(
            format!("heads that {} keeps", planned.path),
            heads,
            format!(
                "a multiple of {each}, the heads of a group, between that and {}",
                attention.spec.heads
            ),
        )),
    }
}
