//! Channels between heads: found in the weights, and turned up or off.
//!
//! (a) A model of two layers of attention learns to continue a random segment that came before.
//! One head tells each token what came before it, another looks for that; the components that
//! carry it are sought in the weights and taken out. (b) A model of three layers hears a list and
//! all of it but one again, and names what is left; what reads the list is steered, or the
//! components behind it are scaled, by what helps on training prompts.

mod list;
mod repeated;

use super::decoder::Recipe;
use super::{after_training, decoder};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::analyses::channels::{
    Channel, ChannelOptions, ComponentEdit, Composition, HeadId, Heads, channels, scale_components,
};
use lapidary_model::{Model, ModelSpec};
use lapidary_train::generator;
use list::Repair;
use repeated::Repeated;

struct Size {
    width: usize,
    heads: usize,
    symbols: usize,
    induction_steps: u64,
    list_width: usize,
    list_steps: u64,
    prompts: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                heads: 4,
                symbols: 64,
                induction_steps: 2,
                list_width: 32,
                list_steps: 2,
                prompts: 16,
            },
            Scale::Small => Self {
                width: 128,
                heads: 8,
                symbols: 64,
                induction_steps: 1500,
                list_width: 64,
                list_steps: 2000,
                prompts: 128,
            },
            Scale::Full => Self {
                width: 128,
                heads: 8,
                symbols: 64,
                induction_steps: 6000,
                list_width: 128,
                list_steps: 10_000,
                prompts: 512,
            },
        }
    }
}

/// A decoder without feed-forward parts.
fn attention_only(vocabulary: usize, width: usize, heads: usize, blocks: usize) -> ModelSpec {
    let mut spec = decoder::spec(vocabulary, width, blocks);
    for block in &mut spec.blocks {
        block.feedforward = None;
        if let lapidary_parts::attention::MixerSpec::MultiHead(attention) = &mut block.attention {
            attention.heads = heads;
        }
    }
    spec
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let spec = attention_only(size.symbols, size.width, size.heads, 2);
    let task = Repeated::new(size.symbols)?;
    let model = decoder::train(spec, Box::new(task), size.induction_steps, setting.seed)?;
    let induction = Induction::measure(&model, &task, size.prompts, setting.seed)?;

    let vocabulary = list::VOCABULARY;
    let spec = decoder::spec(vocabulary, size.list_width, 3);
    let task = Box::new(list::Lists);
    let recipe = Recipe {
        batch: 64,
        length: list::LENGTH,
        ..Recipe::default()
    };
    let lister = decoder::train_by(recipe, spec, task, size.list_steps, setting.seed)?;
    let repair = Repair::measure(&lister, size.prompts, setting.seed)?;

    let mut claims = induction.claims(setting.scale);
    claims.extend(repair.claims(setting.scale));
    Ok(Reproduction {
        setting: format!(
            "(a) 2 layers of attention, width {}, {} heads, {} steps on repeated segments; (b) 3 \
             blocks, width {}, {} steps on lists of 3 to 8 of {} nouns; one seed",
            size.width,
            size.heads,
            size.induction_steps,
            size.list_width,
            size.list_steps,
            list::NOUNS
        ),
        claims,
        plots: vec![induction.plot(), repair.plot()],
        ..Reproduction::default()
    })
}

/// What was found of the induction model.
struct Induction {
    previous: (HeadId, f64),
    induction: (HeadId, f64),
    /// Place of the first channel from the one to the other's keys among all scores, from 1.
    place: Option<usize>,
    /// Highest deviation of such a component.
    z: f64,
    accuracy: f64,
    without_channel: f64,
    /// Mean accuracy without one other component of the head.
    without_other: f64,
    /// Scores of the induction head's keys, highest first: of the previous-token head, of others.
    scores: [Vec<f64>; 2],
    writes_stand: bool,
}

impl Induction {
    fn measure(model: &Model, task: &Repeated, prompts: usize, seed: u64) -> Result<Self> {
        let sequences = task.sequences(prompts, decoder::LENGTH, seed)?;
        let heads = Heads::of(model)?;
        let previous =
            repeated::strongest(model, &sequences, 0, |_, position| position.checked_sub(1))?;
        let induction = repeated::strongest(model, &sequences, 1, |period, position| {
            (position + 1).checked_sub(period)
        })?;
        // Every component and reader, with nothing kept back.
        let all = ChannelOptions {
            threshold: f64::MIN,
            draws: 999,
        };
        let mut found = channels(&heads, &all, &mut generator(seed))?;
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        let carries = |channel: &Channel| {
            channel.writer == previous.0
                && channel.reader == induction.0
                && channel.composition == Composition::Key
        };
        let carrying: Vec<Channel> = found.iter().filter(|c| carries(c)).copied().collect();
        let z = carrying.iter().fold(f64::NEG_INFINITY, |m, c| m.max(c.z));
        let accuracy = repeated::accuracy(model, &sequences)?;
        let without = |components: &[usize]| -> Result<f64> {
            let edits: Vec<_> = components
                .iter()
                .map(|component| ComponentEdit {
                    head: previous.0,
                    component: *component,
                    factor: 0.0,
                })
                .collect();
            repeated::accuracy(&scale_components(model, &edits)?, &sequences)
        };
        let components: Vec<usize> = carrying.iter().map(|channel| channel.component).collect();
        let (channel, others) = components.split_at(components.len().min(2));
        let each = others.iter().map(|one| without(&[*one]));
        let each = each.collect::<Result<Vec<f64>>>()?;
        let reads = |channel: &&Channel| {
            channel.reader == induction.0 && channel.composition == Composition::Key
        };
        let of = |own: bool| {
            let each = found.iter().filter(reads);
            each.filter(|c| (c.writer == previous.0) == own)
                .map(|c| c.score)
                .collect()
        };
        // Taking out nothing is the model itself.
        let unchanged = repeated::accuracy(&scale_components(model, &[])?, &sequences)?;
        Ok(Self {
            previous,
            induction,
            place: found.iter().position(carries).map(|place| place + 1),
            z,
            accuracy,
            without_channel: without(channel)?,
            without_other: super::mean(each),
            scores: [of(true), of(false)],
            writes_stand: unchanged == accuracy
                && found.iter().all(|c| (0.0..=1.0 + 1e-9).contains(&c.score)),
        })
    }

    fn claims(&self, scale: Scale) -> Vec<Claim> {
        let percent = |share: f64| 100.0 * share;
        let place = self
            .place
            .map_or("none".to_owned(), |place| place.to_string());
        let (lost, other) = (
            percent(self.accuracy - self.without_channel),
            percent(self.accuracy - self.without_other),
        );
        vec![
            Claim::new(
                "composition scores lie between 0 and 1, and an edit of nothing changes nothing",
                "exact",
                "of every component and reader",
                Verdict::of(self.writes_stand),
            ),
            Claim::new(
                "(a) a component that the previous-token head writes for the induction head's keys \
                 is among the top 3 of all scores and stands out by 5 deviations",
                "found in GPT-2's weights, figures not given",
                format!(
                    "previous-token head {} (weight {:.2}), induction head {} (weight {:.2}): \
                     place {place}, z {:.1}",
                    self.previous.0, self.previous.1, self.induction.0, self.induction.1, self.z
                ),
                after_training(scale, self.place.is_some_and(|p| p <= 3) && self.z >= 5.0),
            ),
            Claim::new(
                "(a) without its two components that are read most, accuracy falls by at least 50 \
                 points; without one other component of the head, by at most 5",
                "one or two components carry most of a head's effect",
                format!(
                    "accuracy {:.0} %; it falls by {lost:.0} points, and by {other:.1}",
                    percent(self.accuracy)
                ),
                after_training(scale, lost >= 50.0 && other <= 5.0),
            )
            .noted(
                "64 unrelated symbols have no low-rank code, so that a head may spread what it \
                 moves over all of its components",
            ),
        ]
    }

    fn plot(&self) -> Plot {
        let [own, others] = &self.scores;
        let line = |name: String, scores: &[f64]| Series {
            name,
            points: (0..64)
                .zip(scores)
                .map(|(i, score)| (f64::from(i), *score))
                .collect(),
        };
        Plot {
            title: format!(
                "What the keys of the induction head {} read",
                self.induction.0
            ),
            x: "component, the most read first".to_owned(),
            y: "composition score".to_owned(),
            series: vec![
                line(
                    format!("of the previous-token head {}", self.previous.0),
                    own,
                ),
                line("of other heads".to_owned(), others),
            ],
        }
    }
}
