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
    /// What each seed found, where several are joined; empty with one seed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

impl Claim {
    /// In how many seeds the claim holds, where several are joined.
    pub fn tally(&self) -> Option<Tally> {
        let of = |kept: fn(Verdict) -> bool| {
            let verdicts = self.findings.iter().map(|finding| finding.verdict);
            verdicts.filter(|verdict| kept(*verdict)).count()
        };
        (!self.findings.is_empty()).then(|| Tally {
            holds: of(|verdict| verdict == Verdict::Holds),
            measured: of(|verdict| verdict != Verdict::NotMeasured),
            seeds: self.findings.len(),
        })
    }
}

/// What one of several seeds found about a claim.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The seed.
    pub seed: u64,
    /// The figure measured with it.
    pub measured: String,
    /// Whether the claim holds with it.
    pub verdict: Verdict,
    /// The note that it gave.
    pub note: String,
}

/// In how many seeds a claim holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Seeds in which it does.
    pub holds: usize,
    /// Seeds that could tell.
    pub measured: usize,
    /// All seeds.
    pub seeds: usize,
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
    /// Seeds of everything random: one, or in ascending order those whose runs are joined.
    pub seeds: Vec<u64>,
    /// What the experiment ran on.
    pub setting: String,
    /// Each claim.
    pub claims: Vec<Claim>,
    /// Figures.
    pub plots: Vec<Plot>,
    /// How long it took.
    pub seconds: f64,
}

impl Reproduction {
    /// The seeds in words: `seed 0`, `seeds 0 to 2`.
    pub fn named_seeds(&self) -> String {
        named(&self.seeds)
    }
}

/// Ascending seeds in words.
pub(crate) fn named(seeds: &[u64]) -> String {
    let follow = |two: &[u64]| matches!(two, [a, b] if a.checked_add(1) == Some(*b));
    match seeds {
        [] => "no seed".to_owned(),
        [only] => format!("seed {only}"),
        [first, last] => format!("seeds {first} and {last}"),
        [first, .., last] if seeds.windows(2).all(follow) => format!("seeds {first} to {last}"),
        several => {
            let each: Vec<String> = several.iter().map(u64::to_string).collect();
            format!("seeds {}", each.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn seeds_are_named_by_their_ends_where_none_is_left_out() {
        assert_eq!(named(&[]), "no seed");
        assert_eq!(named(&[4]), "seed 4");
        assert_eq!(named(&[4, 5]), "seeds 4 and 5");
        assert_eq!(named(&[4, 9]), "seeds 4 and 9");
        assert_eq!(named(&[4, 5, 6]), "seeds 4 to 6");
        assert_eq!(named(&[4, 5, 7]), "seeds 4, 5, 7");
        let last = u64::MAX;
        assert_eq!(
            named(&[last - 2, last - 1, last]),
            format!("seeds {} to {last}", last - 2)
        );
    }
}
