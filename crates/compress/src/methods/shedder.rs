//! Leaves out, one after another, the parts without which perplexity is least (Mamba-Shedder:
//! Muñoz, Yuan & Jain 2025, arXiv 2501.17088): mixers and feed-forward parts, or the scans of
//! selective recurrences alone.
//!
//! ```text
//! S ← ∅;   repeat:  c* = argmin_{c ∉ S} perplexity(model without S ∪ {c});   S ← S ∪ {c*}
//! ```
//!
//! Every candidate is measured together with all that is gone already, `M − t` of them at step
//! `t`. A block of nothing but a mixer goes as a whole; of others the mixer and the feed-forward
//! part are candidates of their own, so that a hybrid's recurrences, attention and feed-forward
//! parts compete. Without its scan a recurrence passes on what its convolution gives.

use std::collections::BTreeSet;
use std::fmt;

use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;

use crate::data::{CalibrationData, Content};
use crate::edit::Edit;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::attention_cosine::{removed_of, weights_below};
use crate::methods::block_influence::removable;
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::quality::{Window, perplexity, predicts};
use crate::report::{Compressed, ModuleReport};
use crate::{Error, Requirements, Result};

/// Shedding of parts in the list of methods.
pub(crate) const MAMBA_SHEDDER: Method = Method {
    name: "mamba-shedder",
    summary: "Leaves out, greedily by perplexity, mixers and feed-forward parts",
    source: "Muñoz, Yuan & Jain 2025, arXiv 2501.17088",
    schedule: Schedule::Iterative,
    effect: Effect::Depth,
    observes: true,
    requirements: |model: &Model, _: &Settings| requirements(MAMBA_SHEDDER.name, model, parts),
    plan: |task, budget| plan(MAMBA_SHEDDER.name, task, budget, parts),
    apply: |task, plan| apply(MAMBA_SHEDDER.name, task, plan),
};

/// Shedding of scans in the list of methods.
pub(crate) const MAMBA_SHEDDER_SCAN: Method = Method {
    name: "mamba-shedder-scan",
    summary: "Leaves out, greedily by perplexity, the scans of selective recurrences",
    source: "Muñoz, Yuan & Jain 2025, arXiv 2501.17088",
    schedule: Schedule::Iterative,
    effect: Effect::Depth,
    observes: true,
    requirements: |model: &Model, _: &Settings| requirements(MAMBA_SHEDDER_SCAN.name, model, scans),
    plan: |task, budget| plan(MAMBA_SHEDDER_SCAN.name, task, budget, scans),
    apply: |task, plan| apply(MAMBA_SHEDDER_SCAN.name, task, plan),
};

/// A piece of a model that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shed {
    /// A block's mixer.
    Mixer(usize),
    /// A block's feed-forward part.
    Feedforward(usize),
    /// The recurrence of a block's mixer; convolution and gate stay.
    Scan(usize),
}

impl Shed {
    /// The mixers and feed-forward parts of a model, in order.
    pub fn parts(model: &Model) -> Vec<Self> {
        parts(&model.spec().expanded_blocks())
    }

    /// The scans of a model, in order.
    pub fn scans(model: &Model) -> Vec<Self> {
        scans(&model.spec().expanded_blocks())
    }

    fn block(self) -> usize {
        match self {
            Self::Mixer(block) | Self::Feedforward(block) | Self::Scan(block) => block,
        }
    }
}

impl fmt::Display for Shed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mixer(block) => write!(f, "blocks.{block}.attention"),
            Self::Feedforward(block) => write!(f, "blocks.{block}.feedforward"),
            Self::Scan(block) => write!(f, "blocks.{block}.attention.scan"),
        }
    }
}

/// Mixers and feed-forward parts, in order.
fn parts(blocks: &[BlockSpec]) -> Vec<Shed> {
    let of = |(index, block): (usize, &BlockSpec)| {
        let mixer = (block.attention != MixerSpec::Absent).then_some(Shed::Mixer(index));
        let feedforward = block
            .feedforward
            .is_some()
            .then_some(Shed::Feedforward(index));
        [mixer, feedforward].into_iter().flatten()
    };
    blocks.iter().enumerate().flat_map(of).collect()
}

/// Scans, in order.
fn scans(blocks: &[BlockSpec]) -> Vec<Shed> {
    let of = |(index, block): (usize, &BlockSpec)| has_scan(block).then_some(Shed::Scan(index));
    blocks.iter().enumerate().filter_map(of).collect()
}

fn has_scan(block: &BlockSpec) -> bool {
    matches!(&block.attention, MixerSpec::Mamba(mamba) if mamba.scan)
}

/// One step of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchStep {
    /// Perplexity without each candidate, and without all that went before.
    pub evaluated: Vec<(Shed, f64)>,
    /// The candidate that went.
    pub shed: Shed,
    /// The perplexity without it.
    pub perplexity: f64,
}

/// A search for what is needed least.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Search {
    /// What went, in order. The first steps do not depend on how many follow.
    pub steps: Vec<SearchStep>,
}

impl Search {
    /// Leaves out `steps` of `candidates` one after another, each time the one without which the
    /// perplexity on `data` is least; of equal ones the first. Padding is not scored.
    ///
    /// # Errors
    /// When there are fewer candidates than steps, nothing would be left, or the model is no causal
    /// language model.
    pub fn run(
        model: &Model,
        data: &CalibrationData,
        batch: usize,
        candidates: &[Shed],
        steps: usize,
    ) -> Result<Search> {
        if steps > candidates.len() {
            let expected = format!("at most {}, the number of candidates", candidates.len());
            return Err(Error::invalid("number of removals", steps, expected));
        }
        let windows = windows(data);
        let mut search = Search::default();
        let mut gone = BTreeSet::new();
        for _ in 0..steps {
            let mut evaluated = Vec::new();
            for candidate in candidates
                .iter()
                .filter(|candidate| !gone.contains(*candidate))
            {
                let mut without = gone.clone();
                without.insert(*candidate);
                let model = shedding(model, &without)?;
                evaluated.push((*candidate, perplexity(&model, &windows, batch)?.value));
            }
            let best = evaluated.iter().min_by(|a, b| a.1.total_cmp(&b.1)).copied();
            let Some((shed, perplexity)) = best else {
                break;
            };
            gone.insert(shed);
            search.steps.push(SearchStep {
                evaluated,
                shed,
                perplexity,
            });
        }
        Ok(search)
    }

    /// Models that were measured.
    pub fn evaluations(&self) -> usize {
        self.steps.iter().map(|step| step.evaluated.len()).sum()
    }

    /// What went.
    pub fn shed(&self) -> BTreeSet<Shed> {
        self.steps.iter().map(|step| step.shed).collect()
    }
}

/// Every example as a window of which all tokens but the first are scored.
fn windows(data: &CalibrationData) -> Vec<Window> {
    let window = |content: &Content| match content {
        Content::Tokens { ids, .. } => Some(Window {
            tokens: ids.clone(),
            context: 1,
        }),
        Content::Pixels(_) => None,
    };
    data.examples()
        .iter()
        .filter_map(|example| window(&example.content))
        .collect()
}

/// The model without these pieces.
fn shedding(model: &Model, gone: &BTreeSet<Shed>) -> Result<Model> {
    let mut edit = Edit::of(model);
    let mut empty = BTreeSet::new();
    for shed in gone {
        let index = shed.block();
        match shed {
            Shed::Mixer(_) => edit.remove_mixer(index)?,
            Shed::Feedforward(_) => edit.remove_feedforward(index)?,
            Shed::Scan(_) => remove_scan(&mut edit, index)?,
        }
        let block = edit.block(index)?;
        if block.attention == MixerSpec::Absent && block.feedforward.is_none() {
            empty.insert(index);
        }
    }
    edit.remove_blocks(&empty)?;
    edit.finish()
}

/// Leaves out the recurrence of a block's mixer and what selects for it.
fn remove_scan(edit: &mut Edit, index: usize) -> Result<()> {
    match &mut edit.block(index)?.attention {
        MixerSpec::Mamba(mamba) => mamba.scan = false,
        // Its mixer may have gone altogether.
        MixerSpec::Absent => return Ok(()),
        other @ (MixerSpec::MultiHead(_) | MixerSpec::Wavelet(_)) => {
            let what = format!("mixer of block {index}");
            return Err(Error::invalid(
                what,
                other.kind(),
                "mamba, which has a scan",
            ));
        }
    }
    for name in ["selection", "step", "decay_log", "skip"] {
        edit.remove_parameters(&format!("blocks.{index}.attention.{name}"));
    }
    Ok(())
}

fn requirements(
    name: &str,
    model: &Model,
    candidates: fn(&[BlockSpec]) -> Vec<Shed>,
) -> Result<Requirements> {
    removable(model, name)?;
    if candidates(&model.spec().expanded_blocks()).is_empty() {
        return Err(Error::invalid(
            format!("pieces that {name} can leave out"),
            0,
            "at least 1: a model with selective recurrences; block-influence leaves out blocks of \
             others",
        ));
    }
    if !predicts(model) {
        return Err(Error::invalid(
            "the model",
            "not a causal language model",
            format!(
                "one for {name}, which goes by perplexity; block-influence leaves out blocks of others"
            ),
        ));
    }
    Ok(Requirements::default())
}

fn plan(
    name: &str,
    task: &Task<'_>,
    budget: &Budget,
    candidates: fn(&[BlockSpec]) -> Vec<Shed>,
) -> Result<Plan> {
    requirements(name, task.model, candidates)?;
    let candidates = candidates(&task.model.spec().expanded_blocks());
    let steps = removed_of(candidates.len(), name, budget)?;
    let batch = task.settings().batch;
    let gone = match steps {
        0 => BTreeSet::new(),
        _ => Search::run(task.model, task.observed(name)?, batch, &candidates, steps)?.shed(),
    };
    let width = task.model.spec().width;
    let modules = candidates.iter().map(|candidate| ModulePlan {
        path: candidate.to_string(),
        input: width,
        output: width,
        change: match gone.contains(candidate) {
            true => Change::Remove,
            false => Change::Leave {
                reason: "perplexity rises more without it".to_owned(),
            },
        },
    });
    Ok(Plan {
        method: name.to_owned(),
        modules: modules.collect(),
    })
}

/// A plan may mix parts and scans, whichever search made it.
fn apply(name: &str, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    removable(task.model, name)?;
    let blocks = task.model.spec().expanded_blocks();
    let mut known = parts(&blocks);
    known.extend(scans(&blocks));
    let width = task.model.spec().width;
    let mut gone = BTreeSet::new();
    let mut modules = Vec::new();
    for planned in &plan.modules {
        let piece = known.iter().find(|piece| planned.path == piece.to_string());
        let (Some(piece), true) = (piece, planned.input == width) else {
            return Err(Error::invalid(
                "plan",
                format!("for {} of width {}", planned.path, planned.input),
                "one that was made for this model",
            ));
        };
        let before = weights_of(task.model, *piece);
        let after = match &planned.change {
            Change::Remove => {
                gone.insert(*piece);
                0
            }
            Change::Leave { .. } => before,
            other => {
                return Err(Error::invalid(
                    format!("change of {} in a plan of {name}", planned.path),
                    format!("{other:?}"),
                    "remove or leave",
                ));
            }
        };
        modules.push(ModuleReport::new(planned, before, after));
    }
    Compressed::new(name, task, shedding(task.model, &gone)?, modules)
}

fn weights_of(model: &Model, piece: Shed) -> usize {
    match piece {
        Shed::Mixer(_) | Shed::Feedforward(_) => weights_below(model, &piece.to_string()),
        Shed::Scan(block) => ["selection", "step", "decay_log", "skip"]
            .iter()
            .map(|name| {
                let path = format!("blocks.{block}.attention.{name}");
                let own = model
                    .parameters()
                    .get(&path)
                    .map_or(0, |tensor| tensor.elem_count());
                own + weights_below(model, &path)
            })
            .sum(),
    }
}
