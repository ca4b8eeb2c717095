//! What an experiment is told and what it gives.

use std::path::PathBuf;

use crate::{Plot, Progress};
use serde::Serialize;

/// How much an experiment does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Seconds: it runs, and says nothing about the claims that need training.
    #[default]
    Smoke,
    /// Minutes on two cores.
    Small,
    /// As published.
    Full,
}

/// What an experiment is told.
#[derive(Clone, Debug, Default)]
pub struct Setting {
    /// How much to do.
    pub scale: Scale,
    /// Seed of everything random.
    pub seed: u64,
    /// Directory with data sets, for experiments that use one.
    pub data: Option<PathBuf>,
    /// Directory to keep trained models in, for experiments that offer theirs; not kept when
    /// absent.
    pub models: Option<PathBuf>,
    /// Who hears what the experiment is at.
    pub progress: Progress,
}

impl Setting {
    /// Says what the experiment is at.
    pub fn tell(&self, what: impl FnOnce() -> String) {
        self.progress.tell(what);
    }
}

/// Whether a claim holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It does.
    Holds,
    /// It does not.
    DoesNotHold,
    /// This scale cannot tell.
    NotMeasured,
}

impl Verdict {
    /// [`Verdict::Holds`] or [`Verdict::DoesNotHold`].
    pub fn of(holds: bool) -> Self {
        if holds {
            Self::Holds
        } else {
            Self::DoesNotHold
        }
    }
}

/// One claim beside its measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Claim {
    /// What is claimed.
    pub claim: String,
    /// The published figure, on the paper's data.
    pub published: String,
    /// The figure measured here.
    pub measured: String,
    /// Whether the claim holds here.
    pub verdict: Verdict,
    /// Why not, where that is known, or how the setting differs.
    pub note: String,
}

/// What an experiment found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Reproduction {
    /// The system.
    pub slug: String,
    /// Title of its paper.
    pub title: String,
    /// How much was done.
    pub scale: Scale,
    /// Seed of everything random.
    pub seed: u64,
    /// What the experiment ran on.
    pub setting: String,
    /// Each claim.
    pub claims: Vec<Claim>,
    /// Figures.
    pub plots: Vec<Plot>,
    /// How long it took.
    pub seconds: f64,
}
