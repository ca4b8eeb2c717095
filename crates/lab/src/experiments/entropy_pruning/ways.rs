//! What is left when attention or blocks go, chosen in each way.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use super::{ESTIMATORS, FIRST, LAST};
use crate::experiments::depth::{BATCH, Size, Subject, draws};
use crate::experiments::mean;
use crate::{Error, Result};
use lapidary_compress::entropy::{EntropyChoice, Estimator};
use lapidary_compress::quality::{Window, perplexity};
use lapidary_compress::{Change, Compressed, Content, Search, Settings, Shed};
use lapidary_model::Model;
use lapidary_model::generation::{GenerationOptions, generate};

/// The angle as published, by which the first pieces and the last may go too.
pub(super) const ANY_ANGLE: &str = "angle, of any";
/// Most attention, and most blocks, that go.
const MOST_ATTENTION: usize = 6;
const MOST_BLOCKS: usize = 4;
/// Texts that are begun, the words that begin them and those that are written.
const TEXTS: usize = 16;
const BEGUN: usize = 8;
const WRITTEN: usize = 32;
/// Words of a run that counts as repeated when it was there before.
pub(super) const RUN: usize = 4;

/// How much was removed, and what is left.
#[derive(Clone, Copy)]
pub(super) struct Point {
    pub(super) removed: usize,
    pub(super) loss: f64,
    /// Share of most likely tokens that are the whole model's.
    pub(super) same: f64,
    /// Share of what it writes that it has written before.
    pub(super) repeats: f64,
}

/// The points of each way, by name.
pub(super) type Ways = Vec<(&'static str, Vec<Point>)>;

/// Beginnings of held-out texts that models go on with.
pub(super) struct Writer {
    prompts: Vec<Vec<u32>>,
}

impl Writer {
    pub(super) fn new(subject: &Subject) -> Result<Self> {
        let begun = |window: &Window| window.tokens.get(..BEGUN).map(<[u32]>::to_vec);
        let prompts: Vec<_> = subject.tests.iter().filter_map(begun).take(TEXTS).collect();
        match prompts.is_empty() {
            false => Ok(Self { prompts }),
            true => Err(Error::Experiment("there are no texts to begin".to_owned())),
        }
    }

    /// The mean share of runs of [`RUN`] words in what a model writes, always the most likely word, that
    /// stood earlier in it.
    pub(super) fn repeats(&self, model: &Model) -> Result<f64> {
        let options = GenerationOptions {
            new_tokens: WRITTEN,
            ..GenerationOptions::default()
        };
        let written = generate(model, &self.prompts, &options, |_, _| {
            ControlFlow::Continue(())
        })?;
        Ok(mean(written.iter().map(|text| repeated(text))))
    }
}

/// Share of the runs of a text that stood in it before.
fn repeated(text: &[u32]) -> f64 {
    let mut seen = BTreeSet::new();
    let runs = text.windows(RUN);
    mean(runs.map(|run| f64::from(u8::from(!seen.insert(run)))))
}

/// Choices of the experiment: by this estimator, and in whichever stage a block is.
pub(super) fn settings(estimator: Estimator) -> Settings {
    Settings {
        batch: BATCH / 4,
        entropy: EntropyChoice {
            estimator,
            first: FIRST,
            last: LAST,
            stages: false,
            ..EntropyChoice::default()
        },
        ..Settings::default()
    }
}

fn candidates(size: Size) -> Vec<usize> {
    (FIRST..size.blocks.saturating_sub(LAST)).collect()
}

/// How many of those that may go do at most: one stays, since without a choice every way is the same.
fn most(size: Size, wanted: usize) -> usize {
    let spare = candidates(size).len().saturating_sub(1);
    wanted.min(spare.max(1))
}

/// One kind of piece that goes, and what measures what is left.
struct Cutting<'a> {
    subject: &'a Subject,
    writer: &'a Writer,
    size: Size,
    /// The method whose plans name the pieces.
    method: &'static str,
    path: fn(usize) -> String,
    /// Most pieces that go.
    most: usize,
}

impl Cutting<'_> {
    fn point(&self, removed: usize, cut: &Compressed) -> Result<Point> {
        Ok(Point {
            removed,
            loss: self.subject.loss(&cut.model)?,
            same: self.subject.same(&cut.model)?,
            repeats: self.writer.repeats(&cut.model)?,
        })
    }

    /// What is left without these.
    fn without(&self, chosen: &[usize]) -> Result<Compressed> {
        removing(self.subject, self.method, chosen, self.path)
    }

    /// As a method chooses.
    fn by(&self, method: &str, settings: &Settings) -> Result<Vec<Point>> {
        let each = (1..=self.most).map(|removed| {
            let blocks = self.size.blocks;
            let cut = self.subject.without(method, removed, blocks, settings)?;
            self.point(removed, &cut)
        });
        each.collect()
    }

    /// The first pieces of an order.
    fn ordered(&self, order: &[usize]) -> Result<Vec<Point>> {
        let each = (1..=self.most.min(order.len())).map(|removed| {
            let chosen: Vec<usize> = order.iter().take(removed).copied().collect();
            self.point(removed, &self.without(&chosen)?)
        });
        each.collect()
    }

    /// The pieces that may go, in the order in which a method that scores each once lets them go. The method
    /// knows of none that never go.
    fn order_of(&self, method: &str, settings: &Settings) -> Result<Vec<usize>> {
        let blocks = self.size.blocks;
        let mut order: Vec<usize> = Vec::new();
        for removed in 1..blocks {
            let cut = self.subject.without(method, removed, blocks, settings)?;
            let gone = cut.report.modules.iter();
            let gone = gone.filter(|module| module.change == Change::Remove);
            let gone: BTreeSet<&str> = gone.map(|module| module.path.as_str()).collect();
            let next = (0..blocks).filter(|block| gone.contains((self.path)(*block).as_str()));
            let next: Vec<usize> = next.filter(|block| !order.contains(block)).collect();
            order.extend(next);
        }
        let kept = (0..blocks).find(|block| !order.contains(block));
        order.extend(kept);
        let candidates = candidates(self.size);
        order.retain(|block| candidates.contains(block));
        Ok(order)
    }

    /// The mean over random choices.
    fn random(&self, seed: u64) -> Result<Vec<Point>> {
        let each = (1..=self.most).map(|removed| {
            let mut points = Vec::new();
            let candidates = candidates(self.size);
            for chosen in draws(&candidates, removed, self.size.draws, seed) {
                points.push(self.point(removed, &self.without(&chosen)?)?);
            }
            Ok(Point {
                removed,
                loss: mean(points.iter().map(|point| point.loss)),
                same: mean(points.iter().map(|point| point.same)),
                repeats: mean(points.iter().map(|point| point.repeats)),
            })
        });
        each.collect()
    }

    /// Every way but the greedy one: `entropy` and `angle` are the methods of these kinds of score.
    fn ways(&self, entropy: &str, angle: &str, greedy: &[usize], seed: u64) -> Result<Ways> {
        let mut ways = Vec::new();
        for (name, estimator) in ESTIMATORS {
            ways.push((name, self.by(entropy, &settings(estimator))?));
        }
        let [(_, neighbours), ..] = ESTIMATORS;
        let settings = settings(neighbours);
        let order = self.order_of(angle, &settings)?;
        ways.push(("angle", self.ordered(&order)?));
        ways.push((ANY_ANGLE, self.by(angle, &settings)?));
        ways.push(("greedy", self.ordered(greedy)?));
        let mut end = candidates(self.size);
        end.reverse();
        ways.push(("from the end", self.ordered(&end)?));
        ways.push(("random", self.random(seed)?));
        Ok(ways)
    }
}

/// What is left without these.
fn removing(
    subject: &Subject,
    method: &str,
    chosen: &[usize],
    path: fn(usize) -> String,
) -> Result<Compressed> {
    let mut plan = subject.empty_plan(method)?;
    let paths: Vec<String> = chosen.iter().map(|block| path(*block)).collect();
    for module in plan
        .modules
        .iter_mut()
        .filter(|module| paths.contains(&module.path))
    {
        module.change = Change::Remove;
    }
    subject.apply(&plan)
}

fn attention_path(block: usize) -> String {
    format!("blocks.{block}.attention")
}

pub(super) fn attention(subject: &Subject, writer: &Writer, size: Size, seed: u64) -> Result<Ways> {
    let cutting = Cutting {
        subject,
        writer,
        size,
        method: "entropy-attention",
        path: attention_path,
        most: most(size, MOST_ATTENTION),
    };
    let mixers: Vec<Shed> = candidates(size).into_iter().map(Shed::Mixer).collect();
    let search = Search::run(&subject.model, &subject.data, BATCH, &mixers, cutting.most)?;
    let greedy = search.steps.iter().filter_map(|step| match step.shed {
        Shed::Mixer(block) => Some(block),
        Shed::Feedforward(_) | Shed::Channels { .. } | Shed::Scan(_) => None,
    });
    let greedy: Vec<usize> = greedy.collect();
    cutting.ways("entropy-attention", "attention-cosine", &greedy, seed)
}

pub(super) fn blocks(subject: &Subject, writer: &Writer, size: Size, seed: u64) -> Result<Ways> {
    let cutting = Cutting {
        subject,
        writer,
        size,
        method: "entropy-blocks",
        path: |block| format!("blocks.{block}"),
        most: most(size, MOST_BLOCKS),
    };
    let greedy = greedy_blocks(&cutting)?;
    cutting.ways("entropy-blocks", "block-influence", &greedy, seed)
}

/// Blocks one after another, each time the one without which the text to calibrate on is least surprising.
fn greedy_blocks(cutting: &Cutting<'_>) -> Result<Vec<usize>> {
    let text: Vec<Window> = cutting
        .subject
        .data
        .examples()
        .iter()
        .filter_map(|example| match &example.content {
            Content::Tokens { ids, .. } => Some(Window {
                tokens: ids.clone(),
                context: 1,
            }),
            Content::Pixels(_) => None,
        })
        .collect();
    let mut gone: Vec<usize> = Vec::new();
    for _ in 0..cutting.most {
        let mut best: Option<(usize, f64)> = None;
        let left = candidates(cutting.size).into_iter();
        for block in left.filter(|block| !gone.contains(block)) {
            let chosen: Vec<usize> = gone.iter().copied().chain([block]).collect();
            let found = perplexity(&cutting.without(&chosen)?.model, &text, BATCH)?.value;
            if best.is_none_or(|(_, least)| found < least) {
                best = Some((block, found));
            }
        }
        gone.extend(best.map(|(block, _)| block));
    }
    Ok(gone)
}

/// Largest difference of loss between attention left out and its output set to zero.
pub(super) fn zeroed(subject: &Subject, size: Size) -> Result<f64> {
    let mut largest: f64 = 0.0;
    for block in candidates(size) {
        let cut = removing(subject, "entropy-attention", &[block], attention_path)?;
        let dense = lapidary_compress::export_dense(&cut.model)?;
        let apart = subject.loss(&cut.model)? - subject.loss(&dense)?;
        largest = largest.max(apart.abs());
    }
    Ok(largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scale;

    #[test]
    fn what_goes_leaves_a_choice() {
        for size in [Scale::Small, Scale::Full].map(Size::of) {
            for wanted in [MOST_ATTENTION, MOST_BLOCKS] {
                let choices = 1..candidates(size).len();
                assert!(choices.contains(&most(size, wanted)), "{choices:?}");
            }
        }
        assert_eq!(most(Size::of(Scale::Smoke), MOST_ATTENTION), 1);
    }

    #[test]
    fn runs_count_from_their_second_time_on() {
        // Seven runs, of which 1 2 3 4, at the end, was there.
        assert!((repeated(&[1, 2, 3, 4, 5, 6, 1, 2, 3, 4]) - 1.0 / 7.0).abs() < 1e-12);
        assert_eq!(repeated(&[7; 8]), 0.8);
        assert_eq!(repeated(&[1, 2, 3]), 0.0);
    }
}
