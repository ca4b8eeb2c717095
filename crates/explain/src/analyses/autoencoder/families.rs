//! Feature families by direct feature attribution.

use super::activity::{Activity, Event};
use crate::autoencoder::{Attention, Autoencoder};
use crate::error::engine;
use crate::{Question, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model};
use serde::Serialize;
use std::collections::BTreeMap;

/// A source at most this many tokens back is near.
const NEAR: usize = 3;
/// Share of attribution, or of examples, from which a feature belongs to a family.
const MAJORITY: f64 = 0.5;

/// What a feature reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// The token that followed an earlier copy of the current one, where the model predicts it.
    Induction,
    /// The current token and those just before it.
    ShortRange,
    /// Tokens further back.
    LongRange,
}

impl Family {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Induction => "induction",
            Self::ShortRange => "short-range",
            Self::LongRange => "long-range",
        }
    }
}

/// What a feature's strongest examples have in common.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FeatureFamily {
    /// The feature.
    pub feature: usize,
    /// How often it was active.
    pub events: usize,
    /// Share of the positive attribution from at most three tokens back, mean over the strongest
    /// examples.
    pub near: f64,
    /// Distance of the sources in tokens, weighted by positive attribution.
    pub distance: f64,
    /// Share of the strongest examples whose largest source followed an earlier copy of the
    /// current token and is what the model predicts.
    pub induction: f64,
    /// `P(proxy | active in the top decile)`, the proxy being
    /// [`Activity::repeats`].
    pub specificity: f64,
    /// Events in the top decile.
    pub top_events: usize,
    /// `P(active | proxy)`.
    pub sensitivity: f64,
    /// The family.
    pub family: Family,
}

/// Families of `features` that were active, from their `examples` strongest events each.
///
/// # Errors
/// When the autoencoder does not read the heads of an attention layer.
pub fn feature_families(
    model: &Model,
    autoencoder: &Autoencoder,
    activity: &Activity,
    features: &[usize],
    examples: usize,
) -> Result<Vec<FeatureFamily>> {
    let found = examine(model, autoencoder, activity, features, examples)?;
    let repeats: Vec<Vec<bool>> = activity
        .windows()
        .iter()
        .enumerate()
        .map(|(window, tokens)| {
            let each = 0..tokens.len();
            each.map(|position| activity.repeats(window, position))
                .collect()
        })
        .collect();
    let is_repeat = |event: &Event| {
        let of_window = repeats.get(event.window);
        of_window.and_then(|all| all.get(event.position)).copied() == Some(true)
    };
    let repeated = repeats.iter().flatten().filter(|repeat| **repeat).count();
    let mut families = Vec::new();
    for feature in features {
        let (events, Some(examples)) = (activity.events(*feature), found.get(feature)) else {
            continue;
        };
        let top = events.len().div_ceil(10);
        let share = |count: usize, of: usize| count as f64 / of.max(1) as f64;
        let in_top = events
            .iter()
            .take(top)
            .filter(|event| is_repeat(event))
            .count();
        let in_all = events.iter().filter(|event| is_repeat(event)).count();
        let mean = |of: fn(&Example) -> f64| {
            examples.iter().map(of).sum::<f64>() / examples.len().max(1) as f64
        };
        let (near, induction) = (mean(|one| one.near), mean(|one| one.induction));
        families.push(FeatureFamily {
            feature: *feature,
            events: events.len(),
            near,
            distance: mean(|one| one.distance),
            induction,
            specificity: share(in_top, top),
            top_events: top,
            sensitivity: share(in_all, repeated),
            family: if induction >= MAJORITY {
                Family::Induction
            } else if near >= MAJORITY {
                Family::ShortRange
            } else {
                Family::LongRange
            },
        });
    }
    Ok(families)
}

/// What one example reads.
struct Example {
    near: f64,
    distance: f64,
    induction: f64,
}

/// Attribution of each feature's strongest events, a window at a time, so that each window is run
/// once.
fn examine(
    model: &Model,
    autoencoder: &Autoencoder,
    activity: &Activity,
    features: &[usize],
    examples: usize,
) -> Result<BTreeMap<usize, Vec<Example>>> {
    let mut by_window: BTreeMap<usize, Vec<(usize, Event)>> = BTreeMap::new();
    for feature in features {
        for event in activity.events(*feature).iter().take(examples) {
            let of_window = by_window.entry(event.window).or_default();
            of_window.push((*feature, *event));
        }
    }
    let mut found: BTreeMap<usize, Vec<Example>> = BTreeMap::new();
    for (window, events) in by_window {
        let Some(tokens) = activity.windows().get(window) else {
            continue;
        };
        let attention = attention_on(model, autoencoder, tokens)?;
        for (feature, event) in events {
            let sources = attention
                .attribute(autoencoder, feature, event.position)?
                .by_source();
            let example = example(activity, &event, &sources);
            found.entry(feature).or_default().push(example);
        }
    }
    Ok(found)
}

/// The attention of one window.
pub(super) fn attention_on(
    model: &Model,
    autoencoder: &Autoencoder,
    tokens: &[u32],
) -> Result<Attention> {
    let shape = (1, tokens.len());
    let ids = engine(Tensor::from_slice(tokens, shape, &model.device()))?;
    Attention::new(&Question::new(model, &Input::tokens(ids)), autoencoder)
}

fn example(activity: &Activity, event: &Event, sources: &[f64]) -> Example {
    let positive = || {
        let each = sources.iter().enumerate();
        each.map(|(source, score)| (source, score.max(0.0)))
    };
    let total: f64 = positive().map(|(_, score)| score).sum();
    let total = if total > 0.0 { total } else { 1.0 };
    let distance = |source: usize| event.position.abs_diff(source);
    let near: f64 = positive()
        .filter(|(source, _)| distance(*source) <= NEAR)
        .map(|(_, score)| score)
        .sum();
    let weighted: f64 = positive()
        .map(|(source, score)| score * distance(source) as f64)
        .sum();
    let largest = positive().max_by(|a, b| a.1.total_cmp(&b.1));
    let follows_a_copy = largest.is_some_and(|(source, _)| {
        let token = |position| activity.token(event.window, position);
        source > 0
            && source <= event.position
            && token(source - 1) == token(event.position)
            && token(source).is_some()
            && token(source) == activity.prediction(event.window, event.position)
    });
    Example {
        near: near / total,
        distance: weighted / total,
        induction: f64::from(u8::from(follows_a_copy)),
    }
}
