//! Hidden geometry: what training does to position vectors, beside controls that have nothing to
//! learn from positions.
//!
//! The paper looks at GPT-2, BERT, BLOOM and Llama 2. Here small decoders are trained on text, on
//! text whose second half is random in every window, and on random tokens alone, and are taken
//! apart on windows of the same kind.

mod addition;

use super::decoder::{self, Positions};
use super::texts::{Sides, Text};
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Setting, Verdict};
use lapidary_explain::analyses::geometry::{
    Bounds, Control, Layer, Reading, Survey, layer_plots, layers, randomised, score_blocks,
    smoothness, spiral_plot, topics,
};
use lapidary_explain::analyses::power_law::PowerLaw;
use lapidary_kernels::{DType, Device};
use lapidary_model::Model;
use lapidary_train::Generator;
use lapidary_train::data::{Batch, Task};
use lapidary_train::generator;
use lapidary_train::language::{Corpus, Kind, Language, Mixture, Split};

/// Tokens of a window.
const WINDOW: usize = decoder::LENGTH;
/// Windows of one topic.
const TOPIC_WINDOWS: u64 = 60;

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    /// Steps of the models that know positions in other ways; they are left out at 0.
    other_steps: u64,
    contexts: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 2,
                steps: 3,
                other_steps: 0,
                contexts: 24,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 4,
                steps: 700,
                other_steps: 250,
                contexts: 600,
            },
            Scale::Full => Self {
                width: 128,
                blocks: 4,
                steps: 3000,
                other_steps: 3000,
                contexts: 2000,
            },
        }
    }
}

/// A task whose windows are random in part.
struct Randomised {
    text: Box<dyn Task>,
    control: Control,
}

impl Task for Randomised {
    fn vocabulary(&self) -> usize {
        self.text.vocabulary()
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let read = self.text.batch(generator, rows, length + 1)?;
        let windows: Vec<Vec<u32>> = read
            .inputs
            .chunks(length + 1)
            .map(<[u32]>::to_vec)
            .collect();
        let windows = randomised(&windows, self.vocabulary(), self.control, generator);
        let mut batch = Batch::with_capacity(rows, length);
        for window in &windows {
            batch.inputs.extend(window.iter().take(length));
            batch.targets.extend(window.iter().skip(1));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// Other ways to know positions than a table.
const OTHERS: [Positions; 3] = [Positions::Rotary, Positions::Alibi, Positions::None];

struct Subject {
    name: String,
    layers: Vec<Layer>,
}

impl Subject {
    /// Every layer but the embeddings.
    fn later(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().skip(1)
    }

    fn mean_of(&self, of: fn(&Layer) -> f64) -> f64 {
        mean(self.later().map(of))
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let Sides {
        training,
        held_out,
        what,
    } = Sides::of(setting)?;
    let vocabulary = training.vocabulary();
    let learned = || Positions::Learned.spec(vocabulary, size.width, size.blocks);
    let mut generator = generator(setting.seed ^ 0x6e0);
    let windows = held_out.windows(size.contexts, &mut generator)?;
    let random = |control, generator: &mut Generator| -> Vec<Vec<u32>> {
        randomised(&windows, vocabulary, control, generator)
    };
    let (half, all) = (
        random(Control::SecondHalf, &mut generator),
        random(Control::All, &mut generator),
    );
    let subject = |name: &str, model: &Model, windows: &[Vec<u32>]| -> Result<Subject> {
        Ok(Subject {
            name: name.to_owned(),
            layers: layers(model, windows, reading(), Bounds::default())?,
        })
    };
    let trained_on = |control| -> Result<Model> {
        let text = training.task();
        let task = Box::new(Randomised { text, control });
        decoder::train(learned(), task, size.steps, setting.seed)
    };
    let model = decoder::train(learned(), training.task(), size.steps, setting.seed)?;
    let untrained = Model::initialised(learned(), setting.seed, DType::F32, &Device::Cpu)?;
    let mut subjects = vec![
        subject("trained on text", &model, &windows)?,
        subject("untrained", &untrained, &windows)?,
        subject("trained on random tokens", &trained_on(Control::All)?, &all)?,
        subject(
            "second half random",
            &trained_on(Control::SecondHalf)?,
            &half,
        )?,
    ];
    let mut claims = exact_claims(&model, &windows)?;
    claims.extend(trained_claims(setting.scale, &subjects));
    claims.push(topic_claim(setting, &training, &model)?);
    let text = subjects
        .first()
        .map_or(f64::NAN, |text| text.mean_of(|l| l.diagnostics.smoothness));
    let sums = addition::run(setting)?;
    claims.extend(addition::claims(setting.scale, &sums, text));
    if size.other_steps > 0 {
        for positions in OTHERS {
            let spec = positions.spec(vocabulary, size.width, size.blocks);
            let model = decoder::train(spec, training.task(), size.other_steps, setting.seed)?;
            let name = format!("positions: {}", positions.name());
            subjects.push(subject(&name, &model, &windows)?);
        }
    }
    let mut plots = plots(&subjects);
    plots.extend(
        sums.last()
            .and_then(|sum| sum.layers.last())
            .map(spiral_plot),
    );
    Ok(Reproduction {
        setting: format!(
            "decoders of {} blocks, width {}, windows of {WINDOW} of {what}, {} steps of {} \
             (other kinds of positions: {}), {} held-out windows, the first position left out, \
             one seed",
            size.blocks,
            size.width,
            size.steps,
            decoder::BATCH,
            size.other_steps,
            windows.len(),
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

fn reading() -> Reading {
    Reading {
        batch: 32,
        ..Reading::default()
    }
}

/// What holds whatever the model has learned.
fn exact_claims(model: &Model, windows: &[Vec<u32>]) -> Result<Vec<Claim>> {
    let (first, second) = windows.split_at(windows.len() / 3);
    let read = |windows: &[Vec<u32>]| -> Result<Survey> {
        let mut survey = Survey::new(model, reading());
        survey.read(model, windows)?;
        Ok(survey)
    };
    let (whole, mut merged) = (read(windows)?, read(first)?);
    merged.merge(read(second)?)?;
    let (whole, merged) = (whole.finish()?, merged.finish()?);
    let (mut shards, mut scores) = (0f64, 0f64);
    for (index, ((_, a), (_, b))) in whole.iter().zip(&merged).enumerate() {
        let apart = (&a.positions - &b.positions).norm_max() / a.positions.norm_max();
        shards = shards.max(apart);
        if index + 1 == whole.len() {
            continue;
        }
        let parts = score_blocks(model, a, index, 0, 0, reading().skip)?;
        let mut rest = parts.total.clone();
        for block in parts.exact.iter().flatten() {
            rest -= block;
        }
        scores = scores.max(rest.norm_max() / parts.total.norm_max());
    }
    let synthetic = synthetic_exponents();
    let rates: Vec<String> = synthetic
        .iter()
        .map(|(order, found)| format!("{found:.2} for {:.1}", -(order - 0.5)))
        .collect();
    let near = |(order, found): &(f64, f64)| (found + (order - 0.5)).abs() < 0.25;
    Ok(vec![
        Claim::new(
            "shards merge into one run, and the sixteen blocks of a score add up to it",
            "exact",
            format!("largest relative differences {shards:.1e} and {scores:.1e}"),
            Verdict::of(shards < 1e-10 && scores < 1e-10),
        ),
        Claim::new(
            "what the lowest K frequencies of a smooth kernel leave out falls as a power of K \
             given by its smoothness",
            "order (cK)^-m",
            format!("exponents {}", rates.join(", ")),
            Verdict::of(synthetic.iter().all(near)),
        )
        .noted("synthetic kernels with coefficients k^-p, even about both ends; Frobenius norm"),
    ])
}

/// `p` and the fitted exponent of kernels `Σ_k k^{−p} cos(πks) cos(πkt)`, whose error falls with
/// `K^{½ − p}`.
fn synthetic_exponents() -> Vec<(f64, f64)> {
    let size = 96;
    let basis = smoothness::cosine_basis(size);
    let exponent = |order: f64| {
        let mut scaled = basis.clone();
        for k in 0..size {
            let factor = if k == 0 { 0.0 } else { (k as f64).powf(-order) };
            scaled.col_mut(k).iter_mut().for_each(|x| *x *= factor);
        }
        let kernel = &scaled * basis.transpose();
        let cutoffs = [4, 6, 8, 12, 16];
        let errors = smoothness::truncation_errors(&smoothness::frequencies(&kernel), &cutoffs);
        let points: Vec<(f64, f64)> = cutoffs.iter().map(|k| *k as f64).zip(errors).collect();
        PowerLaw::fit(&points).map_or(f64::NAN, |law| law.exponent)
    };
    [1.5, 2.0, 3.0]
        .map(|order| (order, exponent(order)))
        .to_vec()
}

fn trained_claims(scale: Scale, subjects: &[Subject]) -> Vec<Claim> {
    let [text, untrained, random, half, ..] = subjects else {
        return Vec::new();
    };
    let most = |of: fn(&Layer) -> f64| text.later().map(of).fold(f64::MIN, f64::max);
    let least = |of: fn(&Layer) -> f64| text.later().map(of).fold(f64::MAX, f64::min);
    let stable = |layer: &Layer| layer.diagnostics.stable_rank;
    let smooth = |layer: &Layer| layer.diagnostics.smoothness;
    let (rank, low) = (most(stable), least(smooth));
    let incoherence = most(|layer| layer.diagnostics.incoherence);
    let mut claims = vec![
        Claim::new(
            "behind every block the position vectors are of low rank and smooth",
            "GPT-2: stable rank 1.9-2.2; here asked: stable rank at most 5, at least 0.9 of the \
             Gram matrix in the 10 lowest frequencies",
            format!("stable rank at most {rank:.2}, share at least {low:.3}"),
            after_training(scale, rank <= 5.0 && low >= 0.9),
        ),
        Claim::new(
            "position and context vectors are nearly orthogonal",
            "mean |cos| at most 0.1",
            format!("mean |cos| at most {incoherence:.3}"),
            after_training(scale, incoherence <= 0.1),
        ),
    ];
    for control in [untrained, random] {
        let (ours, theirs) = (text.mean_of(smooth), control.mean_of(smooth));
        let ratio = control.mean_of(stable) / text.mean_of(stable);
        claims.push(Claim::new(
            &format!("neither is so in a model that is {}", control.name),
            "share of low frequencies at least 0.15 lower, stable rank at least 3 times as large",
            format!("share {theirs:.3} against {ours:.3}, stable rank {ratio:.1} times"),
            after_training(scale, ours - theirs >= 0.15 && ratio >= 3.0),
        ));
    }
    let halves: Vec<(f64, f64)> = half.later().map(shares_of_halves).collect();
    let (real, drawn) = (
        mean(halves.iter().map(|pair| pair.0)),
        mean(halves.iter().map(|pair| pair.1)),
    );
    claims.push(Claim::new(
        "trained on windows whose second half is random, smoothness persists where the text is \
         real",
        "no figure",
        format!("share of the 5 lowest frequencies {real:.3} in the first half, {drawn:.3} in the second"),
        after_training(scale, real > drawn),
    ));
    let exponents: Vec<f64> = text.later().filter_map(decline).collect();
    let slowest = exponents.iter().copied().fold(f64::MIN, f64::max);
    claims.push(Claim::new(
        "the Gram matrix of the trained position vectors is approximated at a rate of order 1 or \
         better",
        "order (cK)^-m",
        format!("exponents {}", listed(&exponents)),
        after_training(scale, !exponents.is_empty() && slowest <= -1.0),
    ));
    claims
}

fn listed(values: &[f64]) -> String {
    let each: Vec<String> = values.iter().map(|value| format!("{value:.2}")).collect();
    each.join(", ")
}

/// Share of low frequencies in each half of the positions by itself.
fn shares_of_halves(layer: &Layer) -> (f64, f64) {
    let positions = &layer.decomposition.positions;
    // The first position of the window is left out, so the random half starts one earlier.
    let middle = WINDOW / 2 - 1;
    let share = |start: usize, count: usize| {
        let half = positions.as_ref().subrows(start, count).to_owned();
        let frequencies = smoothness::frequencies(&smoothness::gram(&half));
        smoothness::low_frequency_share(&frequencies, 5)
    };
    (share(0, middle), share(middle, positions.nrows() - middle))
}

/// The exponent at which the error of the Gram matrix falls, from 2 frequencies on.
fn decline(layer: &Layer) -> Option<f64> {
    let points: Vec<(f64, f64)> = layer
        .diagnostics
        .truncation
        .iter()
        .filter(|(cutoff, _)| *cutoff >= 2)
        .map(|(cutoff, error)| (*cutoff as f64, *error))
        .collect();
    PowerLaw::fit(&points).map(|law| law.exponent)
}

/// Windows that are all of one kind of sentence, each kind a topic.
fn topic_claim(setting: &Setting, text: &Text, model: &Model) -> Result<Claim> {
    let claim = "context vectors of one topic are more alike than those of different topics";
    let published = "GPT-2: mean |cos| 0.41-0.44 within, 0.10-0.11 between; here asked: 0.15 more";
    let Text::Language(_) = text else {
        let verdict = Verdict::NotMeasured;
        return Ok(Claim::new(
            claim,
            published,
            "not measured: the text has no topics",
            verdict,
        ));
    };
    let (mut windows, mut labels) = (Vec::new(), Vec::new());
    for (label, kind) in Kind::ALL.into_iter().enumerate() {
        let language = Language::new(setting.seed);
        let corpus = Corpus::new(language, Split::HeldOut, only(kind), setting.seed)?;
        for index in 0..TOPIC_WINDOWS {
            windows.push(corpus.window(index, WINDOW)?);
            labels.push(label);
        }
    }
    let mut gaps = Vec::new();
    for layer in layers(model, &windows, reading(), Bounds::default())?
        .iter()
        .skip(1)
    {
        let found = topics(&layer.decomposition.contexts, &labels)?;
        gaps.push(found.within - found.between);
    }
    let least = gaps.iter().copied().fold(f64::MAX, f64::min);
    Ok(Claim::new(
        claim,
        published,
        format!("{} more behind each block", listed(&gaps)),
        after_training(setting.scale, least >= 0.15),
    )
    .noted("topics are kinds of sentences of the generated language"))
}

/// Nothing but sentences of one kind.
fn only(kind: Kind) -> Mixture {
    let weight = |of: Kind| f64::from(u8::from(of == kind));
    Mixture {
        number_agreement: weight(Kind::NumberAgreement),
        reflexive_agreement: weight(Kind::ReflexiveAgreement),
        learned_fact: weight(Kind::LearnedFact),
        context_fact: weight(Kind::ContextFact),
        name_copy: weight(Kind::NameCopy),
        brackets: weight(Kind::Brackets),
    }
}

fn plots(subjects: &[Subject]) -> Vec<Plot> {
    let named: Vec<_> = subjects
        .iter()
        .map(|subject| (subject.name.as_str(), subject.layers.as_slice()))
        .collect();
    let mut plots = layer_plots(&named);
    let last = subjects.first().and_then(|text| text.layers.last());
    plots.extend(last.map(spiral_plot));
    plots
}
