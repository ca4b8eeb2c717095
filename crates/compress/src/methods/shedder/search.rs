//! The greedy search for what is needed least, at one granularity or at several.

use std::collections::BTreeSet;

use lapidary_model::Model;
use lapidary_parts::block::BlockSpec;

use super::pieces::{Cut, Shed, additive, channels_of, parts, scans};
use crate::data::{CalibrationData, Content};
use crate::quality::{Window, perplexity};
use crate::{Error, Result};

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

/// How much of a hybrid goes at each granularity, in the paper's order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Granularities {
    /// Mixers and feed-forward parts, of all kinds together.
    pub parts: usize,
    /// Then groups of hidden features of the feed-forward parts that are left.
    pub widths: usize,
    /// Then scans of the mixers that are left.
    pub scans: usize,
    /// Hidden features of a group; a tenth of each part's when absent.
    pub channel_group: Option<usize>,
}

impl Search {
    /// Leaves out `steps` of `candidates` one after another, each time the one without which the
    /// perplexity on `data` is least; of equal ones the first, and never one without which it is not a
    /// number. Padding is not scored.
    ///
    /// # Errors
    /// When there are fewer candidates than steps, nothing would be left, the model is no causal
    /// language model or none that pieces can be left out of ([`Shed::cut`]), or perplexity is a number
    /// without none of the candidates.
    pub fn run(
        model: &Model,
        data: &CalibrationData,
        batch: usize,
        candidates: &[Shed],
        steps: usize,
    ) -> Result<Search> {
        let mut search = Search::default();
        search.go_on(model, data, batch, candidates, steps)?;
        Ok(search)
    }

    /// Sheds a hybrid at three granularities one after another: parts, then widths, then scans. Every
    /// candidate is measured together with all that is gone already, at whatever granularity it went.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use lapidary_compress::{CalibrationData, Granularities, Search, Shed};
    /// # use lapidary_kernels::{DType, Device};
    /// # use lapidary_model::{Initialiser, Model};
    /// let hybrid = toml::from_str(r#"
    ///     width = 8
    ///     input = { kind = "tokens", vocabulary = 5, length = 4 }
    ///     head = { kind = "language-model" }
    ///     [[blocks]]
    ///     attention = { kind = "mamba2", head_width = 4, state = 2 }
    ///     [[blocks]]
    ///     attention = { kind = "multi-head", heads = 2, causal = true }
    ///     feedforward = { kind = "gated", hidden = 12 }
    ///     [[blocks]]
    ///     attention = { kind = "mamba2", head_width = 4, state = 2 }
    /// "#)?;
    /// let model = Model::new(hybrid, &mut Initialiser::new(0, DType::F32, Device::Cpu))?;
    /// let data = CalibrationData::windows([vec![0, 3, 1, 4], vec![2, 2, 0, 1]])?;
    /// let granularities = Granularities { widths: 2, scans: 1, ..Granularities::default() };
    /// let search = Search::in_order(&model, &data, 2, &granularities)?;
    /// assert!(matches!(search.steps[1].shed, Shed::Channels { block: 1, group: 1, .. }));
    /// assert!(matches!(search.steps[2].shed, Shed::Scan(0 | 2)));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Search::run`], for each granularity.
    pub fn in_order(
        model: &Model,
        data: &CalibrationData,
        batch: usize,
        granularities: &Granularities,
    ) -> Result<Search> {
        let blocks = model.spec().expanded_blocks();
        let channels = channels_of(&blocks, granularities.channel_group)?;
        let mut search = Search::default();
        for (candidates, steps) in [
            (parts(&blocks), granularities.parts),
            (channels, granularities.widths),
            (scans(&blocks), granularities.scans),
        ] {
            search.go_on(model, data, batch, &candidates, steps)?;
        }
        Ok(search)
    }

    /// Leaves out `steps` of `candidates` beside what is gone already.
    fn go_on(
        &mut self,
        model: &Model,
        data: &CalibrationData,
        batch: usize,
        candidates: &[Shed],
        steps: usize,
    ) -> Result<()> {
        additive(model)?;
        let blocks = model.spec().expanded_blocks();
        let windows = windows(data);
        let mut gone = self.shed();
        let most = most(&blocks, candidates, &gone);
        if steps > most {
            let expected = format!("at most {most}, as many of the candidates as can go");
            return Err(Error::invalid("number of removals", steps, expected));
        }
        for step in 0..steps {
            let mut evaluated = Vec::new();
            for candidate in candidates.iter().filter(|piece| piece.is_next(&gone)) {
                let mut without = gone.clone();
                without.insert(*candidate);
                let model = Cut::of(&blocks, &without).apply(model)?;
                evaluated.push((*candidate, perplexity(&model, &windows, batch)?.value));
            }
            if evaluated.is_empty() {
                // Scans have gone with their mixers.
                let expected = format!("at most {step}, after which no candidate is left");
                return Err(Error::invalid("number of removals", steps, expected));
            }
            let Some((shed, perplexity)) = least(&evaluated) else {
                let what = format!("perplexity without any of {} candidates", evaluated.len());
                return Err(Error::invalid(what, "not a number", "a number without one"));
            };
            gone.insert(shed);
            self.steps.push(SearchStep {
                evaluated,
                shed,
                perplexity,
            });
        }
        Ok(())
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

/// The candidate without which perplexity is least, of equal ones the first. What is not a number is
/// no perplexity, whatever its sign.
fn least(evaluated: &[(Shed, f64)]) -> Option<(Shed, f64)> {
    let numbers = evaluated.iter().filter(|(_, found)| !found.is_nan());
    numbers.min_by(|a, b| a.1.total_cmp(&b.1)).copied()
}

/// How many of the candidates can go at most, beside what is gone: those that are still there, but for
/// one where they are all the parts that are left.
fn most(blocks: &[BlockSpec], candidates: &[Shed], gone: &BTreeSet<Shed>) -> usize {
    let left: BTreeSet<Shed> = candidates
        .iter()
        .filter(|piece| piece.is_there(gone))
        .copied()
        .collect();
    let mut parts = parts(blocks).into_iter().filter(|part| part.is_there(gone));
    left.len() - usize::from(!left.is_empty() && parts.all(|part| left.contains(&part)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_is_never_least() {
        let of = |found: &[f64]| {
            let evaluated: Vec<(Shed, f64)> = found
                .iter()
                .enumerate()
                .map(|(block, found)| (Shed::Mixer(block), *found))
                .collect();
            least(&evaluated).map(|(shed, _)| shed.block())
        };
        // `∞ − ∞` has either sign, by processor.
        assert_eq!(of(&[-f64::NAN, 3.0, f64::NAN, 2.0, 2.0]), Some(3));
        assert_eq!(of(&[-f64::NAN, f64::INFINITY]), Some(1));
        assert_eq!(of(&[f64::NAN, -f64::NAN]), None);
    }
}
