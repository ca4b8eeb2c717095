//! Narrows what lies between neighbouring matrices, each pair of them by the decomposition that
//! suits what stands between the two (MoDeGPT: Lin et al. 2024, arXiv 2408.09632).
//!
//! | type | between the matrices | decomposition | in |
//! |---|---|---|---|
//! | I, up and down | a nonlinearity | Nyström | [`feedforward`] |
//! | II, query and key | a product over positions | CR | [`query_key`] |
//! | III, value and output | nothing | SVD | [`value_output`] |
//!
//! One pass over the data of the whole model finds every second moment, without gradients; each block
//! then loses a share by its influence ([`allocation`]). Nothing is added to the residual stream.
//!
//! Heads that each lose what they can best do without have shapes of their own. [`stock`] narrows them to
//! one that configs of published families can say.
//!
//! A bias of values adds `b_V W_O` to every token, as the weights of a query sum to one, and moves
//! to the output's bias; queries, keys and hidden features that go take theirs with them.

mod allocation;
mod feedforward;
#[cfg(test)]
mod golden;
mod query_key;
mod stock;
#[cfg(test)]
mod testing;
mod value_output;

use lapidary_factor::{Matrix, matrix_from_tensor};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;

use super::block_influence::{influences, similarity};
use super::channels::{self, Unit};
use crate::ahead::Refused;
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, Error, Result};
use serde::{Deserialize, Serialize};

/// MoDeGPT in the list of methods.
pub(crate) const MODEGPT: Method = Method {
    name: "modegpt",
    summary: "Narrows feed-forward parts and heads by the second moments between matrices (MoDeGPT)",
    source: "Lin et al. 2024, arXiv 2408.09632",
    schedule: Schedule::OneShot,
    effect: Effect::Parts,
    observes: false,
    leaves: &[],
    refuses: |settings| match settings.modegpt.heads {
        true => &[
            Refused::Gaps,
            Refused::Factors("attention"),
            Refused::Factors("feedforward"),
        ],
        false => &[Refused::Factors("feedforward")],
    },
    requirements,
    plan,
    apply,
    cut: None,
};

/// What [`Method`] `modegpt` can be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModegptSettings {
    /// `ε` of the allocation: small takes much from the blocks of least influence, infinity as
    /// much from each.
    pub smoothing: f64,
    /// The largest share that a block may lose.
    pub cap: f64,
    /// The ridge of the leverage scores, in units of the mean square of a hidden feature.
    pub ridge: f64,
    /// Whether heads become narrower too. Without, and with infinite smoothing, every feed-forward
    /// part has the same fewer features: a shape that configs of published families can say.
    pub heads: bool,
    /// Whether heads are narrowed to a shape that a published family's config can say, where one can: queries,
    /// keys and values as wide as each other and in every block, rotary pairs the same step apart
    /// everywhere, the base of the rotation made to fit and the scale in the queries. Every block loses as
    /// much, whatever the smoothing.
    pub stock: bool,
}

impl Default for ModegptSettings {
    fn default() -> Self {
        Self {
            smoothing: 0.1,
            cap: 0.8,
            ridge: 1.0,
            heads: true,
            stock: false,
        }
    }
}

fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
    let mut statistics = std::collections::BTreeSet::new();
    if settings.modegpt.heads && settings.modegpt.stock {
        stock::check(model)?;
    }
    for (index, block) in model.spec().expanded_blocks().iter().enumerate() {
        statistics.insert(similarity(index));
        if settings.modegpt.heads {
            heads(index, block)?;
            let path = channels::attention(index);
            statistics.insert(squares(format!("{path}.query")));
            statistics.insert(squares(format!("{path}.key")));
            statistics.insert(covariance(format!("{path}.in")));
        }
        let hidden = Unit::of(index, block);
        statistics.extend(hidden.iter().map(|unit| covariance(unit.hidden_site())));
    }
    Ok(Requirements { statistics })
}

fn squares(site: String) -> Statistic {
    Statistic::InputSquares { site }
}

fn covariance(site: String) -> Statistic {
    Statistic::Covariance { site }
}

/// A block's attention, where the method is defined for it.
fn heads(index: usize, block: &BlockSpec) -> Result<&MultiHeadSpec> {
    let MixerSpec::MultiHead(spec) = &block.attention else {
        return Err(Error::invalid(
            format!("the mixer of block {index}"),
            block.attention.kind(),
            "multi-head attention for modegpt; block-influence and the factorisations take others",
        ));
    };
    if let Some(peculiarity) = spec.peculiarity() {
        return Err(Error::invalid(
            format!("the attention of block {index}"),
            peculiarity,
            "softmax with projections of its own for modegpt; the factorisations take others",
        ));
    }
    if spec.query_key_norm.is_some() {
        return Err(Error::invalid(
            format!("the attention of block {index}"),
            "one that normalises queries and keys",
            "one that does not for modegpt: fewer features have another norm; lorap and the \
             factorisations take it",
        ));
    }
    Ok(spec)
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = MODEGPT.name;
    let model = task.model;
    let mean = 1.0 - budget.share(name)?;
    let settings = task.settings().modegpt;
    let influences = influences(model, task.calibrated(name)?)?;
    let stock = settings.heads && settings.stock;
    let smoothing = match stock {
        true => f64::INFINITY,
        false => settings.smoothing,
    };
    let losses = allocation::losses(&influences, mean, smoothing, settings.cap)?;
    let mut modules = Vec::new();
    let blocks = model.spec().expanded_blocks();
    for ((index, block), loss) in blocks.iter().enumerate().zip(losses) {
        if settings.heads {
            modules.push(planned_attention(model, index, block, 1.0 - loss, stock)?);
        }
        let alike = smoothing.is_infinite();
        modules.extend(planned_feedforward(model, index, block, 1.0 - loss, alike));
    }
    Ok(Plan {
        method: name.to_owned(),
        modules,
    })
}

fn planned_attention(
    model: &Model,
    index: usize,
    block: &BlockSpec,
    share: f64,
    stock: bool,
) -> Result<ModulePlan> {
    let (spec, width) = (heads(index, block)?, model.spec().width);
    let (head_width, value_width) = (spec.head_width(width), spec.value_width(width));
    let query_key = query_key::nearest(spec, head_width, share);
    let value = match stock {
        true => query_key,
        false => (share * value_width as f64).round() as usize,
    };
    for (what, found) in [("queries and keys", query_key), ("values", value)] {
        if found == 0 {
            return Err(Error::invalid(
                format!("features that the {what} of block {index} would keep"),
                found,
                format!(
                    "at least 1: at {share:.3} of heads of {head_width} nothing is left; keep more"
                ),
            ));
        }
    }
    let change = match (query_key, value) == (head_width, value_width) {
        true => whole(),
        false => Change::NarrowHeads { query_key, value },
    };
    Ok(ModulePlan {
        path: channels::attention(index),
        input: width,
        output: width,
        change,
    })
}

fn planned_feedforward(
    model: &Model,
    index: usize,
    block: &BlockSpec,
    share: f64,
    alike: bool,
) -> Option<ModulePlan> {
    let hidden = channels::hidden(index, block)?;
    // A share that is a whole number of features but for rounding is that number.
    let features = ((share * hidden as f64 - 1e-9).ceil() as usize).clamp(1, hidden);
    // Only parts that are all narrowed alike make a model that other programs run.
    let features = match alike {
        true => channels::aligned(block, features, hidden),
        false => features,
    };
    let width = model.spec().width;
    Some(ModulePlan {
        path: channels::feedforward(index),
        input: width,
        output: width,
        change: match features == hidden {
            true => whole(),
            false => Change::Narrow { features },
        },
    })
}

fn whole() -> Change {
    Change::Leave {
        reason: "its share of the loss is less than one feature".to_owned(),
    }
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let calibration = task.calibrated(MODEGPT.name)?;
    let settings = task.settings().modegpt;
    let stock = match settings.heads && settings.stock {
        true => stock::Shape::of(model, plan, calibration)?,
        false => None,
    };
    let blocks = model.spec().expanded_blocks();
    let mut edit = Edit::of(model);
    for planned in &plan.modules {
        if planned.path.ends_with(".attention") {
            let index = channels::block_of(model, planned, "attention")?;
            if let Some(block) = blocks.get(index)
                && let Some((query_key, value)) = planned_heads(planned)?
            {
                let spec = heads(index, block)?;
                narrow_scores(
                    &mut edit,
                    index,
                    spec,
                    query_key,
                    stock.as_ref(),
                    calibration,
                )?;
                narrow_values(&mut edit, index, spec, value, calibration)?;
                if stock.is_some() {
                    stock::take_in_scale(&mut edit, index, spec)?;
                }
            }
            continue;
        }
        let index = channels::block_of(model, planned, "feedforward")?;
        let units = blocks.get(index).map(|block| Unit::of(index, block));
        let units = units.unwrap_or_default();
        let hidden = units.first().map_or(0, |unit| unit.hidden);
        if let Some(features) = channels::planned_features(planned, hidden)? {
            for unit in &units {
                narrow_hidden(&mut edit, unit, features, settings.ridge, calibration)?;
            }
            channels::set_hidden(&mut edit, index, features)?;
        }
    }
    let narrowed = edit.finish()?;
    let report = |planned: &ModulePlan| {
        let weights = |model: &Model| channels::weights(model, &planned.path);
        ModuleReport::new(planned, weights(model), weights(&narrowed))
    };
    let modules = plan.modules.iter().map(report).collect();
    let obstacle = stock::obstacle(model.spec(), narrowed.spec());
    let mut compressed = Compressed::new(MODEGPT.name, task, narrowed, modules)?;
    let note = |reason: String| format!("heads that only a Lapidary directory holds: {reason}");
    compressed.report.notes.extend(obstacle.map(note));
    Ok(compressed)
}

fn planned_heads(planned: &ModulePlan) -> Result<Option<(usize, usize)>> {
    match planned.change {
        Change::Leave { .. } => Ok(None),
        Change::NarrowHeads { query_key, value } => Ok(Some((query_key, value))),
        ref other => Err(Error::invalid(
            format!("change of {} in a plan of {}", planned.path, MODEGPT.name),
            format!("{other:?}"),
            "leave or narrow-heads",
        )),
    }
}

/// Type I, of one part or expert.
fn narrow_hidden(
    edit: &mut Edit,
    unit: &Unit,
    features: usize,
    ridge: f64,
    calibration: &Calibration,
) -> Result<()> {
    // Wide as they are, each step makes its own: at no time is there a second one.
    let moment = || {
        let statistic = covariance(unit.hidden_site());
        calibration.matrix("second moment of hidden features", &statistic)
    };
    let kept = feedforward::by_leverage(moment()?, ridge, features)?;
    let reader = format!("{}.weight", unit.reader());
    let down = matrix_from_tensor("feed-forward output", &edit.get(&reader)?)?;
    let refitted = feedforward::refitted(&down, moment()?, &kept)?;
    unit.keep(edit, &kept)?;
    edit.put_matrix(reader, &refitted)
}

/// Type II.
fn narrow_scores(
    edit: &mut Edit,
    index: usize,
    spec: &MultiHeadSpec,
    features: usize,
    stock: Option<&stock::Shape>,
    calibration: &Calibration,
) -> Result<()> {
    let width = edit.spec.width;
    let head_width = spec.head_width(width);
    if features == head_width {
        return Ok(());
    }
    let path = |name: &str| format!("{}.{name}", channels::attention(index));
    let queries = calibration.vector(&squares(path("query")))?;
    let keys = calibration.vector(&squares(path("key")))?;
    let step = stock.and_then(|shape| shape.step);
    let kept = match spec.position.rotary().zip(step) {
        Some((rotary, step)) => stock::kept(spec, rotary, head_width, features, step),
        None => query_key::choose(spec, head_width, features, &queries, &keys)?,
    };
    let each = spec.heads / spec.groups().max(1);
    let of_heads = |heads: usize, heads_of_a_group: usize| -> Vec<usize> {
        let of_head = |head: usize| {
            let own = kept.features.get(head / heads_of_a_group.max(1));
            let own = own.map(Vec::as_slice).unwrap_or_default();
            own.iter().map(move |feature| head * head_width + feature)
        };
        (0..heads).flat_map(of_head).collect()
    };
    channels::select_outputs(edit, &path("query"), &of_heads(spec.heads, each))?;
    channels::select_outputs(edit, &path("key"), &of_heads(spec.groups(), 1))?;
    if let MixerSpec::MultiHead(attention) = &mut edit.block(index)?.attention {
        attention.scale = Some(spec.scale(width));
        attention.head_width = Some(features);
        // Values are as wide as before, whatever they were measured by.
        attention.value_width = Some(spec.value_width(width));
        attention.position = kept.position;
    }
    Ok(())
}

/// Type III.
fn narrow_values(
    edit: &mut Edit,
    index: usize,
    spec: &MultiHeadSpec,
    features: usize,
    calibration: &Calibration,
) -> Result<()> {
    let value_width = spec.value_width(edit.spec.width);
    if features == 0 || features > value_width {
        return Err(Error::invalid(
            "features of a narrower value",
            features,
            format!("between 1 and {value_width}"),
        ));
    }
    if features == value_width {
        return Ok(());
    }
    let path = channels::attention(index);
    move_value_bias(edit, index, spec)?;
    let value = matrix_from_tensor("values", &edit.get(&format!("{path}.value.weight"))?)?;
    let output = matrix_from_tensor("output", &edit.get(&format!("{path}.output.weight"))?)?;
    let statistic = covariance(format!("{path}.in"));
    let moment = calibration.matrix("second moment of attention's input", &statistic)?;
    let root = value_output::root(&moment)?;
    let each = spec.heads / spec.groups().max(1);
    let width = output.nrows();
    let mut narrow_value = Matrix::zeros(spec.groups() * features, width);
    let mut narrow_output = Matrix::zeros(width, spec.heads * features);
    for group in 0..spec.groups() {
        let own = value.as_ref().subrows(group * value_width, value_width);
        let outputs: Vec<Matrix> = (group * each..(group + 1) * each)
            .map(|head| {
                output
                    .as_ref()
                    .subcols(head * value_width, value_width)
                    .to_owned()
            })
            .collect();
        let narrowed = value_output::narrow(&root, &own.to_owned(), &outputs, features)?;
        let mut rows = narrow_value
            .as_mut()
            .subrows_mut(group * features, features);
        rows.copy_from(&narrowed.value);
        for (head, columns) in (group * each..).zip(&narrowed.outputs) {
            let mut own = narrow_output
                .as_mut()
                .subcols_mut(head * features, features);
            own.copy_from(columns);
        }
    }
    edit.put_matrix(format!("{path}.value.weight"), &narrow_value)?;
    edit.put_matrix(format!("{path}.output.weight"), &narrow_output)?;
    if spec.bias {
        let device = edit.get(&format!("{path}.value.weight"))?.device().clone();
        let none = engine(Tensor::zeros(spec.groups() * features, DType::F64, &device))?;
        edit.put(format!("{path}.value.bias"), &none)?;
    }
    if let MixerSpec::MultiHead(attention) = &mut edit.block(index)?.attention {
        attention.head_width.get_or_insert(value_width);
        attention.value_width = Some(features);
        attention.scale.get_or_insert(spec.scale(width));
    }
    Ok(())
}

/// Adds `Σ_heads b_V W_O` to the output's bias, which is made where there is none.
fn move_value_bias(edit: &mut Edit, index: usize, spec: &MultiHeadSpec) -> Result<()> {
    let path = channels::attention(index);
    let Some(bias) = edit.find(&format!("{path}.value.bias"))? else {
        return Ok(());
    };
    let output = edit.get(&format!("{path}.output.weight"))?;
    let (width, inner) = engine(output.dims2())?;
    // [groups · value_width] -> [heads · value_width], head h reading its group
    let groups = spec.groups();
    let value_width = engine(bias.dim(0))? / groups.max(1);
    let by_group = engine(bias.reshape((groups, 1, value_width)))?;
    let shape = (groups, spec.heads / groups.max(1), value_width);
    let by_head = engine(engine(by_group.broadcast_as(shape))?.reshape((inner, 1)))?;
    let mut total = engine(engine(output.matmul(&by_head))?.reshape(width))?;
    let name = format!("{path}.output.bias");
    if let Some(bias) = edit.find(&name)? {
        total = engine(total + bias)?;
    }
    edit.put(name, &total)?;
    if let MixerSpec::MultiHead(attention) = &mut edit.block(index)?.attention {
        attention.output_bias = Some(true);
    }
    Ok(())
}
