//! What a mix is worth.

use lapidary_model::Model;
use serde::{Deserialize, Serialize};

use crate::quality::{agreement, likeness};
use crate::{CalibrationData, Objective, Result};

/// What mixes are compared by: the less the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// The mean loss of the model's task over the examples.
    Loss(Objective),
    /// Mean `KL(original ‖ mix)` of predictions, where data without labels asks a classifier.
    Divergence,
    /// `1 − cos` of last hidden vectors, of models without scores.
    Cosine,
}

impl Score {
    /// What fits a model and data.
    pub(super) fn of(model: &Model, data: &CalibrationData) -> Self {
        use lapidary_model::HeadSpec;
        let scored = match &model.spec().head {
            HeadSpec::LanguageModel { .. } => true,
            HeadSpec::Pooled { labels, .. } => labels.is_some(),
            HeadSpec::None | HeadSpec::Pixels => false,
        };
        match Objective::of(model, data) {
            Ok(objective @ (Objective::NextToken | Objective::TargetTokens | Objective::Label)) => {
                Self::Loss(objective)
            }
            _ if scored => Self::Divergence,
            _ => Self::Cosine,
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loss(_) => "loss in nats",
            Self::Divergence => "KL divergence from the original in nats",
            Self::Cosine => "1 − cosine to the original's last hidden vectors",
        }
    }

    pub(super) fn measure(
        self,
        original: &Model,
        mix: &Model,
        data: &CalibrationData,
        batch: usize,
    ) -> Result<f64> {
        match self {
            Self::Loss(objective) => objective.mean(mix, data, batch),
            Self::Divergence => Ok(agreement(original, mix, data, batch)?.divergence),
            Self::Cosine => Ok(1.0 - likeness(original, mix, data, batch)?.cosine),
        }
    }
}
