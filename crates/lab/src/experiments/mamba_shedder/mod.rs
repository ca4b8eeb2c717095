//! Selective recurrences shed block by block and scan by scan, and a hybrid at three granularities.
//!
//! The paper sheds blocks of published Mamba-1 models, scans of Mamba-2 ones, and parts, widths and
//! scans of hybrids. Here small stacks of both mixers, and one of Mamba-2 with attention and
//! feed-forward parts in it, learn a text; how fast they are whole and shed is timed. A
//! stack that learned to recall shows what a convolution alone cannot do.

mod hybrid;
mod recall;
mod speed;

use self::speed::{Speeds, Timing, speeds};
use super::decoder::{self, Recipe};
use super::depth::{BATCH, Size, Subject, draws};
use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::{Search, Shed};
use lapidary_model::{AbsolutePosition, InputSpec, Model, ModelSpec};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::recurrent::{Mamba2Spec, MambaSpec};
use std::collections::BTreeSet;

/// Numbers that a channel remembers.
const STATE: usize = 8;

/// The same in Mamba-2, and the channels of its heads.
const STATE_OF_HEADS: usize = 16;
const HEAD_WIDTH: usize = 16;

/// How much is trained and shed.
struct Work {
    size: Size,
    /// Steps of training on recall.
    recall: u64,
    timing: Timing,
}

impl Work {
    fn of(scale: Scale) -> Self {
        let size = Size::of(scale);
        let (size, recall) = match scale {
            Scale::Smoke => (size, 3),
            Scale::Small => {
                let smaller = Size {
                    blocks: 6,
                    width: 48,
                    steps: 120,
                    calibration: 24,
                    tests: 32,
                    ..size
                };
                (smaller, 200)
            }
            Scale::Full => (size, 4000),
        };
        Self {
            size,
            recall,
            timing: Timing::of(scale),
        }
    }
}

/// Which mixer a stack is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Recurrence {
    Mamba,
    Mamba2,
}

impl Recurrence {
    fn name(self) -> &'static str {
        match self {
            Self::Mamba => "Mamba-1",
            Self::Mamba2 => "Mamba-2",
        }
    }

    fn mixer(self) -> MixerSpec {
        match self {
            Self::Mamba => MixerSpec::Mamba(MambaSpec {
                state: STATE,
                ..MambaSpec::default()
            }),
            Self::Mamba2 => MixerSpec::Mamba2(Mamba2Spec {
                head_width: HEAD_WIDTH,
                state: STATE_OF_HEADS,
                ..Mamba2Spec::default()
            }),
        }
    }
}

/// A block of a recurrence and nothing else.
fn block(recurrence: Recurrence) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        wiring: Wiring::PreNorm,
        norm: NormSpec::Rms { epsilon: 1e-6 },
        attention: recurrence.mixer(),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: None,
        dropout: 0.0,
    }
}

/// A stack of selective recurrences.
fn stack(vocabulary: usize, size: Size, recurrence: Recurrence) -> ModelSpec {
    let mut spec = decoder::spec(vocabulary, size.width, 1);
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        tokens.position = AbsolutePosition::None;
    }
    spec.blocks = vec![block(recurrence); size.blocks];
    spec
}

/// A model that learned a text.
fn trained(
    text: Sides,
    size: Size,
    seed: u64,
    spec: impl FnOnce(usize, Size) -> ModelSpec,
) -> Result<Subject> {
    let spec = spec(text.training.vocabulary(), size);
    let task = text.training.task();
    let model = decoder::train_by(Recipe::default(), spec, task, size.steps, seed)?;
    Subject::reading(model, text, size, seed)
}

/// What is shed of a stack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block,
    Scan,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Block => "blocks",
            Self::Scan => "scans",
        }
    }

    fn of(self, block: usize) -> Shed {
        match self {
            Self::Block => Shed::Mixer(block),
            Self::Scan => Shed::Scan(block),
        }
    }
}

/// Losses after each removal of one kind.
struct Curves {
    kind: Kind,
    greedy: Vec<f64>,
    /// Means over the draws.
    random: Vec<f64>,
    last: Vec<f64>,
    /// What greed took, in order.
    order: Vec<usize>,
    /// Models measured, and how many the method should measure.
    evaluations: (usize, usize),
    /// Parameters left after the last removal, as a share.
    kept: f64,
}

/// What is left of a stack without one kind of some blocks.
fn without(subject: &Subject, kind: Kind, chosen: &[usize]) -> Result<Model> {
    let pieces: BTreeSet<Shed> = chosen.iter().map(|block| kind.of(*block)).collect();
    Ok(Shed::cut(&subject.model, &pieces)?)
}

fn curves(subject: &Subject, work: &Work, kind: Kind, seed: u64) -> Result<Curves> {
    let blocks = work.size.blocks;
    let most = blocks / 2;
    let candidates: Vec<Shed> = (0..blocks).map(|block| kind.of(block)).collect();
    let search = Search::run(&subject.model, &subject.data, BATCH, &candidates, most)?;
    let order: Vec<usize> = search.steps.iter().map(|step| step.shed.block()).collect();
    let losses = |choose: &dyn Fn(usize) -> Vec<Vec<usize>>| -> Result<Vec<f64>> {
        let mut losses = Vec::new();
        for count in 1..=most {
            let mut each = Vec::new();
            for chosen in choose(count) {
                each.push(subject.loss(&without(subject, kind, &chosen)?)?);
            }
            losses.push(mean(each));
        }
        Ok(losses)
    };
    let all: Vec<usize> = (0..blocks).collect();
    let left = without(subject, kind, &order)?.parameter_count() as f64;
    Ok(Curves {
        kind,
        greedy: losses(&|count| vec![order.iter().take(count).copied().collect()])?,
        random: losses(&|count| draws(&all, count, work.size.draws, seed))?,
        last: losses(&|count| vec![(blocks - count..blocks).collect()])?,
        evaluations: (
            search.evaluations(),
            (0..most).map(|step| blocks - step).sum(),
        ),
        kept: left / subject.model.parameter_count() as f64,
        order,
    })
}

/// A trained stack, and what is lost when it is shed.
struct Stack {
    recurrence: Recurrence,
    /// Loss of the whole model.
    whole: f64,
    blocks: Curves,
    scans: Curves,
    speeds: Speeds,
}

impl Stack {
    fn run(recurrence: Recurrence, text: &Sides, work: &Work, setting: &Setting) -> Result<Self> {
        let name = recurrence.name();
        setting.tell(|| format!("a stack of {name} to be cut"));
        let spec = |vocabulary, size| stack(vocabulary, size, recurrence);
        let subject = trained(text.clone(), work.size, setting.seed, spec)?;
        setting.tell(|| format!("{name} without blocks and without scans"));
        let blocks = curves(&subject, work, Kind::Block, setting.seed)?;
        let scans = curves(&subject, work, Kind::Scan, setting.seed)?;
        let no_blocks = without(&subject, Kind::Block, &blocks.order)?;
        let no_scans = without(&subject, Kind::Scan, &scans.order)?;
        let models = [&subject.model, &no_blocks, &no_scans];
        let [whole, of_blocks, of_scans] = speeds(&subject, models, work.timing)?;
        Ok(Self {
            recurrence,
            whole: subject.loss(&subject.model)?,
            blocks,
            scans,
            speeds: Speeds {
                whole,
                blocks: of_blocks,
                scans: of_scans,
            },
        })
    }

    fn rise(&self, losses: &[f64]) -> f64 {
        losses.last().map_or(f64::NAN, |loss| loss - self.whole)
    }

    fn rises(&self, curves: &Curves) -> String {
        format!(
            "rise in nats after {}: greedy {:+.4}, random {:+.4}, last {:+.4}; order {:?}; {:.0} % \
             of the parameters left",
            curves.greedy.len(),
            self.rise(&curves.greedy),
            self.rise(&curves.random),
            self.rise(&curves.last),
            curves.order,
            100.0 * curves.kept
        )
    }

    /// That greed does better than chance with one kind.
    fn greed(&self, scale: Scale, curves: &Curves, published: &str) -> Claim {
        let (name, what) = (self.recurrence.name(), curves.kind.name());
        Claim::new(
            &format!("greed costs at most half of what chance does, shedding {what} of {name}"),
            published,
            self.rises(curves),
            after_training(
                scale,
                self.rise(&curves.greedy) <= 0.5 * self.rise(&curves.random),
            ),
        )
    }

    /// What scans cost beside blocks.
    fn scans_beside_blocks(&self, scale: Scale) -> Claim {
        let (scans, blocks) = (&self.scans, &self.blocks);
        Claim::new(
            &format!("a scan of {} costs less than a block, and saves less", self.recurrence.name()),
            "20 scans keep 58.8 where 14 blocks keep 53.8 of accuracy, at 1.2 and 1.3 times the speed",
            format!(
                "{:+.4} against {:+.4} nats; {:.0} % against {:.0} % of the parameters left",
                self.rise(&scans.greedy),
                self.rise(&blocks.greedy),
                100.0 * scans.kept,
                100.0 * blocks.kept
            ),
            after_training(
                scale,
                self.rise(&scans.greedy) < self.rise(&blocks.greedy) && scans.kept > blocks.kept,
            ),
        )
        .noted("the paper's scans are Mamba-2's, its blocks Mamba-1's")
    }

    fn plots(&self) -> Vec<Plot> {
        [&self.blocks, &self.scans]
            .map(|curves| {
                let title = format!("{} of {} shed", curves.kind.name(), self.recurrence.name());
                plot(&title, self.whole, curves)
            })
            .to_vec()
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let work = Work::of(setting.scale);
    let text = Sides::of(setting)?;
    let mamba = Stack::run(Recurrence::Mamba, &text, &work, setting)?;
    let heads = Stack::run(Recurrence::Mamba2, &text, &work, setting)?;
    setting.tell(|| "a hybrid at three granularities".to_owned());
    let hybrid = hybrid::run(text.clone(), &work, setting.seed)?;
    setting.tell(|| "recall without scans".to_owned());
    let recall = recall::without_scans(&work, setting.seed)?;
    let mut claims = claims(setting.scale, &mamba, &heads, recall);
    claims.extend(hybrid.claims(setting.scale));
    let mut plots = mamba.plots();
    plots.extend(heads.plots());
    Ok(Reproduction {
        setting: format!(
            "{} blocks of Mamba-1 alone (state {STATE}) and of Mamba-2 alone (state {STATE_OF_HEADS}, \
             heads of {HEAD_WIDTH}), and a hybrid of as many; width {}, on {}, {} \
             steps of {} windows of {}; {} windows to search on, {} held out to measure on; {} random \
             choices; whole models at {:.4}, {:.4} and {:.4} nats",
            work.size.blocks,
            work.size.width,
            text.what,
            work.size.steps,
            decoder::BATCH,
            decoder::LENGTH,
            work.size.calibration,
            work.size.tests,
            work.size.draws,
            mamba.whole,
            heads.whole,
            hybrid.whole,
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

fn plot(title: &str, whole: f64, curves: &Curves) -> Plot {
    let series = [
        ("greedy", &curves.greedy),
        ("random", &curves.random),
        ("last", &curves.last),
    ];
    let series = series.map(|(name, losses)| Series {
        name: name.to_owned(),
        points: std::iter::once(whole)
            .chain(losses.iter().copied())
            .enumerate()
            .map(|(count, loss)| (count as f64, loss))
            .collect(),
    });
    Plot {
        title: title.to_owned(),
        x: "shed".to_owned(),
        y: "held-out loss in nats".to_owned(),
        series: series.to_vec(),
    }
}

fn claims(
    scale: Scale,
    mamba: &Stack,
    heads: &Stack,
    (recalls, recalls_without): (f64, f64),
) -> Vec<Claim> {
    let counted = [&mamba.blocks, &mamba.scans, &heads.blocks, &heads.scans];
    let counted = counted.map(|curves| curves.evaluations);
    let said: Vec<String> = counted
        .iter()
        .map(|(found, expected)| format!("{found} of {expected}"))
        .collect();
    let chance = 1.0 / recall::SYMBOLS as f64;
    let blocks = "14 of 64 blocks of mamba-2.8b keep about 90 %";
    let scans = "22 of 64 scans of mamba2-2.7b keep about 96 %";
    vec![
        Claim::new(
            "each step measures every candidate that is left",
            "Σ (M − t) evaluations",
            said.join(", "),
            Verdict::of(counted.iter().all(|(found, expected)| found == expected)),
        ),
        mamba.greed(scale, &mamba.blocks, &format!("estimate; {blocks}")),
        mamba.greed(scale, &mamba.scans, &format!("estimate; {scans}")),
        heads.greed(scale, &heads.blocks, &format!("estimate; {blocks}")),
        heads.greed(scale, &heads.scans, &format!("estimate; {scans}")),
        mamba.scans_beside_blocks(scale),
        heads.scans_beside_blocks(scale),
        mamba.speeds.faster(
            scale,
            (Recurrence::Mamba, Kind::Block),
            (
                1.3,
                "1.3 times without 14 of 64 blocks of mamba-2.8b; up to 1.4 of all models",
            ),
        ),
        heads.speeds.faster(
            scale,
            (Recurrence::Mamba2, Kind::Scan),
            (1.2, "1.2 times without 22 of 64 scans of mamba2-2.7b"),
        ),
        mamba.speeds.scans_beside_blocks(scale, Recurrence::Mamba),
        heads.speeds.scans_beside_blocks(scale, Recurrence::Mamba2),
        place(
            scale,
            &mamba.blocks,
            "blocks of Mamba-1 that go first are early",
            false,
        ),
        place(
            scale,
            &heads.scans,
            "scans of Mamba-2 that go first are late",
            true,
        ),
        Claim::new(
            "without any scan nothing is recalled",
            "a convolution reaches as far as its taps",
            format!(
                "{recalls:.3} right whole, {recalls_without:.3} without scans, chance {chance:.3}"
            ),
            match recalls > 0.5 {
                true => after_training(scale, recalls_without < 2.0 * chance),
                false => Verdict::NotMeasured,
            },
        )
        .noted("Mamba-1; not measured unless the whole model has learned to recall more than half"),
    ]
}

/// Where in the stack what goes first is.
fn place(scale: Scale, curves: &Curves, claim: &str, late: bool) -> Claim {
    let found = mean(curves.order.iter().map(|block| *block as f64));
    // Half of all blocks are shed.
    let middle = curves.order.len() as f64 - 0.5;
    let holds = match late {
        true => found > middle,
        false => found < middle,
    };
    let published = match late {
        true => "of 64 scans of mamba2-2.7b the first 22 are at 33 and above",
        false => "of 64 blocks of mamba-2.8b the first are 2, 6, 12, 5, 10, 8, 13, 11",
    };
    Claim::new(
        claim,
        published,
        format!(
            "order {:?}, mean {found:.2}, middle of the stack {middle:.1}",
            curves.order
        ),
        after_training(scale, holds),
    )
}
