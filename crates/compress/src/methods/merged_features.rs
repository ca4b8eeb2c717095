//! Similar hidden features of feed-forward parts merged into fewer by optimal transport: DOTResize (Verma,
//! Murray & Duh 2025, arXiv 2507.04517) for widths without a norm.
//!
//! With the entropic plan `P` `[hidden, kept]` between all features and those that others are merged into
//! (`slicing::Transport`), each kept feature is given a convex average of what the others are given, and the
//! layer after reads it back by the pseudo-inverse:
//!
//! ```text
//! T = kept · P                       its columns sum to 1
//! W_up' = W_up T,  b' = b T          W_down' = T⁺ W_down
//! ```
//!
//! in row vectors. What is lost is what the layer after reads otherwise, so that distances are those of
//! activations, after `f`: `‖h_i − h_j‖² = C_ii + C_jj − 2 C_ij` with `C` the second moment of the hidden
//! site, or another of [`Transport::distance`]. `f` acts on each feature alone, and where it rises,
//!
//! ```text
//! min_i f(z_i) ≤ f(Σ_i T_ik z_i) ≤ max_i f(z_i)
//! ```
//!
//! over the features that are merged into `k`: each activation moves by no more than the distance to the
//! farthest of those it is merged with, however far apart they are before `f`, and `f(z T) T⁺ W_down` is
//! `f(z) W_down` where those have the same activations. A gated part's activation is a product, `f(g) u`, and
//! products may be alike whose factors are not, which averages of factors are unlike. So there distances of
//! contents `u` count as much as those of activations, which together say what gates let pass; both are
//! merged by the same map. In the residual stream a map counts by its column space alone; here by its
//! entries.

use lapidary_factor::{Matrix, matrix_from_tensor, thin_svd};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::feedforward::FeedforwardSpec;

use super::channels::{self, Unit};
use super::slicing::{Stream, Transport};
use crate::ahead::Refused;
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::observe::observe;
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::{Error, Requirements, Result};

/// Merged hidden features in the list of methods.
pub(crate) const DOTRESIZE_HIDDEN: Method = Method {
    name: "dotresize-hidden",
    summary: "Merges similar feed-forward features by optimal transport, layer by layer (DOTResize)",
    source: "Verma, Murray & Duh 2025, arXiv 2507.04517",
    schedule: Schedule::LayerByLayer,
    effect: Effect::Parts,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Maps, Refused::Factors("feedforward")],
    requirements,
    plan,
    apply,
    cut: None,
};

/// A singular value below this share of the largest is a direction that the map has not.
const DEPENDENT: f64 = 1e-9;

fn requirements(model: &Model, _: &Settings) -> Result<Requirements> {
    let blocks = model.spec().expanded_blocks();
    let mut parts = 0;
    for (index, block) in blocks.iter().enumerate() {
        parts += usize::from(unit(index, block)?.is_some());
    }
    match parts {
        0 => Err(Error::invalid(
            "the model",
            "one without feed-forward parts",
            format!(
                "one with them for {}; svd and the other factorisations take these",
                DOTRESIZE_HIDDEN.name
            ),
        )),
        _ => Ok(Requirements::default()),
    }
}

/// The dense or gated part of a block that has one.
fn unit(index: usize, block: &BlockSpec) -> Result<Option<Unit>> {
    match &block.feedforward {
        None => Ok(None),
        Some(FeedforwardSpec::Dense(_) | FeedforwardSpec::Gated(_)) => {
            Ok(Unit::of(index, block).pop())
        }
        Some(other) => {
            let instead = match other {
                FeedforwardSpec::Mixture(_) => "modegpt and channel-magnitude take others",
                _ => "svd and the other factorisations take others",
            };
            Err(Error::invalid(
                format!("the feed-forward part of block {index}"),
                other.kind(),
                format!("dense or gated for {}; {instead}", DOTRESIZE_HIDDEN.name),
            ))
        }
    }
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let share = budget.share(DOTRESIZE_HIDDEN.name)?;
    requirements(task.model, &task.settings())?;
    let width = task.model.spec().width;
    let mut modules = Vec::new();
    for (index, block) in task.model.spec().expanded_blocks().iter().enumerate() {
        let Some(unit) = unit(index, block)? else {
            continue;
        };
        let features = ((share * unit.hidden as f64).round() as usize).clamp(1, unit.hidden);
        modules.push(ModulePlan {
            path: channels::feedforward(index),
            input: width,
            output: width,
            change: match features == unit.hidden {
                true => Change::Leave {
                    reason: "all of it is kept".to_owned(),
                },
                false => Change::Narrow { features },
            },
        });
    }
    Ok(Plan {
        method: DOTRESIZE_HIDDEN.name.to_owned(),
        modules,
    })
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let blocks = model.spec().expanded_blocks();
    let mut edit = Edit::of(model);
    let mut notes = Vec::with_capacity(plan.modules.len());
    for planned in &plan.modules {
        let index = channels::block_of(model, planned, "feedforward")?;
        let unit = blocks.get(index).map(|block| unit(index, block));
        let unit = unit.transpose()?.flatten();
        let hidden = unit.as_ref().map_or(0, |unit| unit.hidden);
        let features = channels::planned_features(planned, hidden)?;
        notes.push(match (unit, features) {
            (Some(unit), Some(features)) => {
                let note = merge(task, &mut edit, index, &unit, features)?;
                channels::set_hidden(&mut edit, index, features)?;
                Some(note)
            }
            _ => None,
        });
    }
    let merged = edit.finish()?;
    let reports = plan.modules.iter().zip(notes).map(|(planned, note)| {
        let weights = |model: &Model| channels::weights(model, &planned.path);
        let report = ModuleReport::new(planned, weights(model), weights(&merged));
        ModuleReport {
            note: note.or(report.note),
            ..report
        }
    });
    let reports = reports.collect();
    Compressed::new(DOTRESIZE_HIDDEN.name, task, merged, reports)
}

/// Merges the hidden features of one part into `features`, and says how.
fn merge(
    task: &Task<'_>,
    edit: &mut Edit,
    index: usize,
    unit: &Unit,
    features: usize,
) -> Result<String> {
    let transport = task.settings().slicing.transport;
    let activations = activations(task, edit, index, unit, &transport)?;
    let found = transport.plan(&activations, features)?;
    let map = averages(&found.plan);
    for writer in unit.writers() {
        let name = format!("{writer}.weight");
        let weight = matrix_from_tensor("layer before hidden features", &edit.get(&name)?)?;
        edit.put_matrix(name, &(map.transpose() * &weight))?;
        let name = format!("{writer}.bias");
        if let Some(bias) = edit.find(&name)? {
            let column = matrix_from_tensor("bias", &engine(bias.unsqueeze(1))?)?;
            let averaged = map.transpose() * &column;
            let averaged: Vec<f64> = (0..features).map(|k| averaged[(k, 0)]).collect();
            let averaged = engine(Tensor::from_vec(averaged, features, bias.device()))?;
            edit.put(name, &averaged)?;
        }
    }
    let (inverse, rank, condition) = pseudo_inverse(&map)?;
    let name = format!("{}.weight", unit.reader());
    let weight = matrix_from_tensor("layer after hidden features", &edit.get(&name)?)?;
    edit.put_matrix(name, &(&weight * inverse.transpose()))?;
    Ok(format!(
        "map of rank {rank} of {features}, condition {condition:.1e}; marginals met to {:.0e} after {} \
         iterations",
        found.error, found.iterations
    ))
}

/// `T = kept · P` for the plan `P` `[hidden, kept]`: its columns sum to 1.
fn averages(plan: &Matrix) -> Matrix {
    let kept = plan.ncols();
    Matrix::from_fn(plan.nrows(), kept, |i, k| kept as f64 * plan[(i, k)])
}

/// The activations that the layer after reads, once the blocks before are cut; their distances in a gated part
/// with those of contents.
fn activations(
    task: &Task<'_>,
    edit: &Edit,
    index: usize,
    unit: &Unit,
    transport: &Transport,
) -> Result<Stream> {
    let data = task.observed(DOTRESIZE_HIDDEN.name)?;
    let content = match unit.content() {
        None => None,
        Some(writer) => {
            let weight = edit.get(&format!("{writer}.weight"))?;
            let transposed = engine(engine(weight.t())?.contiguous())?; // [width, hidden]
            Some((transposed, edit.find(&format!("{writer}.bias"))?))
        }
    };
    let (hidden, input) = (unit.hidden_site(), unit.input_site());
    let sites = [hidden.clone(), input.clone()];
    let (mut read, mut contents) = (Vec::new(), Vec::new());
    let so_far = edit.through(index)?;
    observe(&so_far, data, task.settings().batch, &sites, |seen| {
        read.push(engine(seen.rows(&hidden)?.to_dtype(DType::F64))?);
        if let Some((weight, bias)) = &content {
            let x = engine(seen.rows(&input)?.to_dtype(DType::F64))?;
            let product = engine(x.matmul(weight))?;
            contents.push(match bias {
                Some(bias) => engine(product.broadcast_add(bias))?,
                None => product,
            });
        }
        Ok(())
    })?;
    let read = Stream::of(&read, Some(transport.distance))?;
    if content.is_none() {
        return Ok(read);
    }
    // Which features are kept goes by what is read alone: the content of a gate that is shut is not.
    let contents = Stream::of(&contents, Some(transport.distance))?;
    let covariance = read.covariance.clone();
    let both = Stream::mean(&[read, contents])?;
    Ok(Stream { covariance, ..both })
}

/// `T⁺` `[kept, hidden]` of `T` `[hidden, kept]`, its rank and its condition.
fn pseudo_inverse(map: &Matrix) -> Result<(Matrix, usize, f64)> {
    let svd = thin_svd(map.as_ref())?;
    let largest = svd.s.first().copied().unwrap_or(0.0);
    let rank = svd.s.iter().filter(|s| **s > DEPENDENT * largest).count();
    let least = rank.checked_sub(1).and_then(|last| svd.s.get(last));
    let condition = least.map_or(f64::INFINITY, |least| largest / least);
    // V S⁻¹ Uᵀ
    let turned = Matrix::from_fn(map.ncols(), rank, |k, s| svd.vt[(s, k)] / svd.s[s]);
    let left = Matrix::from_fn(rank, map.nrows(), |s, i| svd.u[(i, s)]);
    Ok((turned * left, rank, condition))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    #[test]
    fn averages_meet_the_marginals_of_their_plan() {
        let (tokens, hidden, kept) = (40, 7, 3);
        let activations: Vec<f64> = (0..tokens * hidden)
            .map(|at| ((at * at) as f64 * 0.37).sin().max(0.0))
            .collect();
        let rows = Tensor::from_vec(activations, (tokens, hidden), &Device::Cpu).unwrap();
        let transport = Transport {
            temperature: 0.5,
            ..Transport::default()
        };
        let stream = Stream::of(&[rows], Some(transport.distance)).unwrap();
        let found = transport.plan(&stream, kept).unwrap();
        assert!(found.error < 1e-6, "{}", found.error);
        let map = averages(&found.plan);
        for k in 0..kept {
            let sum: f64 = (0..hidden).map(|i| map[(i, k)]).sum();
            assert!((sum - 1.0).abs() < 2e-6, "{sum}");
        }
        for i in 0..hidden {
            let sum: f64 = (0..kept).map(|k| map[(i, k)]).sum();
            assert!(
                (sum * hidden as f64 / kept as f64 - 1.0).abs() < 2e-6,
                "{sum}"
            );
        }
    }

    #[test]
    fn the_inverse_undoes_what_the_map_does_and_knows_its_rank() {
        let map = Matrix::from_fn(7, 3, |i, k| {
            f64::from(u8::from(i % 3 == k)) / (i + 1) as f64
        });
        let (inverse, rank, condition) = pseudo_inverse(&map).unwrap();
        assert_eq!(rank, 3);
        assert!((1.0..10.0).contains(&condition), "{condition}");
        let product = &inverse * &map;
        assert!((product - Matrix::identity(3, 3)).norm_max() < 1e-12);
        // Two columns that are one: T T⁺ T = T all the same.
        let twice = Matrix::from_fn(7, 3, |i, k| map[(i, k.min(1))]);
        let (inverse, rank, _) = pseudo_inverse(&twice).unwrap();
        assert_eq!(rank, 2);
        assert!((&twice * &inverse * &twice - &twice).norm_max() < 1e-12);
    }
}
