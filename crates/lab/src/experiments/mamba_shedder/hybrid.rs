//! A decoder of recurrences, attention and feed-forward parts, shed at three granularities.

use super::speed::{Speed, of_hybrid, speeds};
use super::{BATCH, Recurrence, Work, block, stack, trained};
use crate::experiments::depth::{Size, Subject, draws};
use crate::experiments::texts::Sides;
use crate::experiments::{after_training, mean};
use crate::{Claim, Result, Scale, Verdict};
use lapidary_compress::{Granularities, Search, Shed};
use lapidary_model::ModelSpec;
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_parts::feedforward::{FeedforwardSpec, GatedSpec};
use std::collections::BTreeSet;

/// A shed hybrid.
pub(super) struct Hybrid {
    /// Loss of the whole model.
    pub(super) whole: f64,
    /// Loss of what is left.
    greedy: f64,
    /// The same of as much chosen at random, the mean over draws.
    random: f64,
    search: Search,
    /// How many candidates there should have been at each step.
    expected: Vec<usize>,
    /// The first block with attention.
    attention: usize,
    /// Of the whole model and of what is left.
    speeds: [Speed; 2],
}

/// Mamba-2, every third block attention instead, every other one with a feed-forward part.
fn spec(vocabulary: usize, size: Size) -> ModelSpec {
    let mixer = |index: usize| match is_attention(index) {
        true => MixerSpec::MultiHead(MultiHeadSpec {
            causal: true,
            ..MultiHeadSpec::new((size.width / 16).max(1))
        }),
        false => Recurrence::Mamba2.mixer(),
    };
    let part = FeedforwardSpec::Gated(GatedSpec {
        hidden: 2 * size.width,
        activation: ActivationSpec::Silu,
        bias: false,
    });
    let one = |index: usize| BlockSpec {
        attention: mixer(index),
        feedforward: (index % 2 == 1).then(|| part.clone()),
        ..block(Recurrence::Mamba2)
    };
    ModelSpec {
        blocks: (0..size.blocks).map(one).collect(),
        ..stack(vocabulary, size, Recurrence::Mamba2)
    }
}

fn is_attention(index: usize) -> bool {
    index % 3 == 1
}

/// Trains a hybrid and sheds it: a third as many parts as there are blocks, two groups of features,
/// and as many scans as parts.
pub(super) fn run(text: Sides, work: &Work, seed: u64) -> Result<Hybrid> {
    let subject = trained(text, work.size, seed, spec)?;
    let granularities = Granularities {
        parts: work.size.blocks / 3,
        widths: 2,
        scans: work.size.blocks / 3,
        channel_group: None,
    };
    let (model, data) = (&subject.model, &subject.data);
    let search = Search::in_order(model, data, BATCH, &granularities)?;
    let loss =
        |pieces: &BTreeSet<Shed>| -> Result<f64> { subject.loss(&Shed::cut(model, pieces)?) };
    let mut random = Vec::new();
    for draw in 0..work.size.draws {
        random.push(loss(&drawn(
            &subject,
            &granularities,
            seed.wrapping_add(draw),
        )?)?);
    }
    let left = Shed::cut(model, &search.shed())?;
    Ok(Hybrid {
        whole: subject.loss(model)?,
        greedy: subject.loss(&left)?,
        random: mean(random),
        expected: candidates(&subject, &search),
        search,
        attention: (0..work.size.blocks)
            .find(|index| is_attention(*index))
            .unwrap_or(0),
        speeds: speeds(&subject, [model, &left], work.timing)?,
    })
}

/// As much as is shed, chosen at random at each granularity among what the one before left.
fn drawn(subject: &Subject, granularities: &Granularities, seed: u64) -> Result<BTreeSet<Shed>> {
    let mut gone = BTreeSet::new();
    let channels = Shed::channels(&subject.model, granularities.channel_group)?;
    let stages = [
        (Shed::parts(&subject.model), granularities.parts),
        (channels, granularities.widths),
        (Shed::scans(&subject.model), granularities.scans),
    ];
    for (candidates, steps) in stages {
        for step in 0..steps {
            let left: Vec<Shed> = candidates
                .iter()
                .copied()
                .filter(|piece| piece.is_next(&gone))
                .collect();
            let places: Vec<usize> = (0..left.len()).collect();
            let seed = seed.wrapping_mul(31).wrapping_add(step as u64);
            let chosen = draws(&places, 1, 1, seed).concat();
            gone.extend(chosen.iter().filter_map(|place| left.get(*place)).copied());
        }
    }
    Ok(gone)
}

/// How many candidates each step of a search has, by what had gone before it.
fn candidates(subject: &Subject, search: &Search) -> Vec<usize> {
    let blocks = subject.model.spec().expanded_blocks();
    let feedforwards = blocks.iter().filter(|block| block.feedforward.is_some());
    let recurrent = |block: &&BlockSpec| matches!(block.attention, MixerSpec::Mamba2(_));
    let (feedforwards, scans) = (
        feedforwards.count(),
        blocks.iter().filter(recurrent).count(),
    );
    let is_scanned = |block: usize| blocks.get(block).as_ref().is_some_and(recurrent);
    let mut gone: Vec<Shed> = Vec::new();
    let mut expected = Vec::new();
    for step in &search.steps {
        let lost = |is: &dyn Fn(&Shed) -> bool| gone.iter().filter(|piece| is(piece)).count();
        expected.push(match step.shed {
            Shed::Mixer(_) | Shed::Feedforward(_) => blocks.len() + feedforwards - gone.len(),
            Shed::Channels { .. } => {
                feedforwards - lost(&|piece| matches!(piece, Shed::Feedforward(_)))
            }
            Shed::Scan(_) => {
                scans
                    - lost(&|piece| match *piece {
                        Shed::Mixer(block) => is_scanned(block),
                        Shed::Scan(_) => true,
                        Shed::Feedforward(_) | Shed::Channels { .. } => false,
                    })
            }
        });
        gone.push(step.shed);
    }
    expected
}

impl Hybrid {
    pub(super) fn claims(&self, scale: Scale) -> Vec<Claim> {
        let steps = &self.search.steps;
        let order: Vec<String> = steps.iter().map(|step| step.shed.to_string()).collect();
        let found: Vec<usize> = steps.iter().map(|step| step.evaluated.len()).collect();
        let rise = |loss: f64| loss - self.whole;
        let attention = Shed::Mixer(self.attention);
        vec![
            Claim::new(
                "a hybrid goes by parts, widths and scans, each measured without all that is gone",
                "Zamba2-2.7B: 3 or 8 parts, 20 groups of 1024 features, 18 scans",
                format!(
                    "{found:?} candidates of {:?}; shed in order: {}",
                    self.expected,
                    order.join(", ")
                ),
                Verdict::of(found == self.expected),
            ),
            Claim::new(
                "greed costs at most half of what chance does, shedding a hybrid",
                "estimate; Zamba2-2.7B at 10 % keeps 65.9, at 15 % 61.3 of accuracy",
                format!(
                    "rise in nats: greedy {:+.4}, random {:+.4}",
                    rise(self.greedy),
                    rise(self.random)
                ),
                after_training(scale, rise(self.greedy) <= 0.5 * rise(self.random)),
            ),
            Claim::new(
                "in a hybrid the attention is not the first to go",
                "Zamba2 and Hymba shed all kinds of parts",
                format!(
                    "block {} is attention; first: {}",
                    self.attention,
                    order.first().map_or("none", String::as_str)
                ),
                after_training(
                    scale,
                    steps.first().is_some_and(|step| step.shed != attention),
                ),
            )
            .noted("an expectation of ours: every third block alone has attention"),
            of_hybrid(scale, self.speeds),
        ]
    }
}
