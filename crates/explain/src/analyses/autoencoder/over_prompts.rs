//! Which features at a role of generated prompts the answer depends on.
//!
//! Each live feature at, say, the second mention of the subject is set to zero by itself, with the
//! autoencoder's error kept, and features are ranked by how much that changes the difference of
//! scores between the right answer and the wrong one, over all prompts (Kissane et al. 2024, arXiv
//! 2406.17759, on indirect object identification).

use super::ablation::{Against, Score, ablation_effects};
use crate::autoencoder::Autoencoder;
use crate::report::{Report, Table};
use crate::tasks::Prompt;
use crate::{Error, Question, Result};
use lapidary_model::Model;
use serde::Serialize;
use std::collections::BTreeMap;

/// What a feature does at a role, over prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RankedFeature {
    /// The feature.
    pub feature: usize,
    /// Prompts in which it is active there.
    pub prompts: usize,
    /// Its mean value where it is active.
    pub activation: f64,
    /// The change of the score difference without it, summed over prompts and divided by all of
    /// them: where it is not active, leaving it out changes nothing.
    pub effect: f64,
    /// The same over the prompts in which it is active.
    pub effect_where_active: f64,
}

/// Live features at a role, ranked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankedFeatures {
    /// The role.
    pub role: String,
    /// Prompts.
    pub prompts: usize,
    /// Mean score difference with nothing changed.
    pub clean: f64,
    /// Share of prompts whose right answer has the higher score.
    pub right: f64,
    /// Features, by the size of their effect, largest first.
    pub features: Vec<RankedFeature>,
}

/// Sets each feature that is live at `role` to zero, prompt by prompt.
///
/// # Errors
/// When there are no prompts, one lacks the role or is longer than the model, or the model is no
/// language model that writes the autoencoder's site.
pub fn rank_features(
    model: &Model,
    autoencoder: &Autoencoder,
    prompts: &[Prompt],
    role: &str,
) -> Result<RankedFeatures> {
    let mut found: BTreeMap<usize, RankedFeature> = BTreeMap::new();
    let (mut clean, mut right) = (0.0, 0);
    for prompt in prompts {
        let position = prompt.role(role).ok_or_else(|| {
            let known: Vec<&str> = prompt.roles.iter().map(|(role, _)| *role).collect();
            Error::invalid("role", role, format!("one of {}", known.join(", ")))
        })?;
        let example = prompt.example();
        let score = Score {
            class: example.target,
            foil: example.foil,
            position: None,
        };
        let input = prompt.input(model)?;
        let question = Question::new(model, &input);
        let effects = ablation_effects(&question, autoencoder, position, Against::Zero, score)?;
        clean += effects.clean;
        right += usize::from(effects.clean > 0.0);
        for effect in effects.effects {
            let sum = found.entry(effect.feature).or_insert(RankedFeature {
                feature: effect.feature,
                prompts: 0,
                activation: 0.0,
                effect: 0.0,
                effect_where_active: 0.0,
            });
            sum.prompts += 1;
            sum.activation += effect.activation;
            sum.effect += effect.effect;
        }
    }
    if prompts.is_empty() {
        return Err(Error::invalid("prompts", "none", "at least one"));
    }
    let count = prompts.len() as f64;
    let mut features: Vec<RankedFeature> = found
        .into_values()
        .map(|sum| RankedFeature {
            activation: sum.activation / sum.prompts as f64,
            effect: sum.effect / count,
            effect_where_active: sum.effect / sum.prompts as f64,
            ..sum
        })
        .collect();
    features.sort_by(|a, b| b.effect.abs().total_cmp(&a.effect.abs()));
    Ok(RankedFeatures {
        role: role.to_owned(),
        prompts: prompts.len(),
        clean: clean / count,
        right: right as f64 / count,
        features,
    })
}

impl RankedFeatures {
    /// The first `most` features, each with the head that has the largest share of it.
    pub fn report(&self, site: &str, shares: &[Vec<f64>], most: usize) -> Report {
        let mut table = Table::new(
            format!(
                "Features at {}, by what leaving each out changes",
                self.role
            ),
            &[
                "feature",
                "change of the score difference",
                "where active",
                "active in",
                "mean value",
                "head",
                "its share",
            ],
        );
        for of in self.features.iter().take(most) {
            let shares = shares.get(of.feature).map_or(&[][..], Vec::as_slice);
            let largest = (0..).zip(shares).max_by(|a, b| a.1.total_cmp(b.1));
            let (head, share) = largest.map_or((0_usize, 0.0), |(head, share)| (head, *share));
            table.push([
                of.feature.into(),
                of.effect.into(),
                of.effect_where_active.into(),
                of.prompts.into(),
                of.activation.into(),
                head.into(),
                share.into(),
            ]);
        }
        Report {
            title: format!("Features of {site} at {}", self.role),
            notes: vec![
                format!("{} prompts", self.prompts),
                format!(
                    "score of the right answer less that of the wrong one: {:.4} on average, above \
                     zero in {:.0} %",
                    self.clean,
                    100.0 * self.right
                ),
                format!(
                    "{} features live at {}, each set to zero by itself with the autoencoder's \
                     error kept; a change below zero says that the answer depends on it",
                    self.features.len(),
                    self.role
                ),
            ],
            tables: vec![table],
            ..Report::default()
        }
    }
}
