//! Sparse autoencoders of a small decoder's attention.
//!
//! The paper's figures are of GPT-2 small and larger models, which need weights and text from
//! elsewhere. Here a decoder of two blocks is trained on the generated language, or on the
//! characters of a text where one is given, mixed with windows that repeat a random segment:
//! half of them of many different tokens, where one token of context says what follows, and half
//! of four symbols, where it takes several. The heads of its second block are what is learned.

use super::logit_attribution::rank_correlation;
use super::{after_training, decoder, mean};
use crate::error::engine;
use crate::{Claim, Error, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::Question;
use lapidary_explain::analyses::autoencoder::{
    Activity, Against, Family, FeatureFamily, HeadFeatures, Score, ablation_effects,
    feature_families, head_features,
};
use lapidary_explain::analyses::prefix_induction::{PrefixDraws, PrefixScores, prefix_induction};
use lapidary_explain::autoencoder::{
    Attention, Autoencoder, Quality, SiteReader, TrainedAutoencoder, TrainingOptions,
    logit_effects, recovery, recursive_attribution, splice, train,
};
use lapidary_kernels::{DType, Device, Tensor, check};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_train::data::{Batch, Task};
use lapidary_train::language::{Corpus, Kind, Split};
use lapidary_train::{Generator, generator};
use rand::RngExt;
use rand::seq::SliceRandom;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const SITE: &str = "blocks.1.attention.mixed";
/// Share of windows that repeat a segment.
const REPEATED: f64 = 0.3;
/// Weight of the features' sum in the loss, for activations of length one.
const SPARSITY: f64 = 0.1;
/// A head with at least this attention for some prefix is one that does induction.
const INDUCES: f64 = 0.2;
/// Events from which a feature's family is worth telling.
const EVENTS: usize = 20;

struct Size {
    width: usize,
    model_steps: u64,
    expansion: usize,
    steps: u64,
    batch: usize,
    windows: usize,
    draws: usize,
    longest: usize,
    sentences: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                model_steps: 2,
                expansion: 4,
                steps: 20,
                batch: 128,
                windows: 8,
                draws: 4,
                longest: 3,
                sentences: 2,
            },
            Scale::Small => Self {
                width: 128,
                model_steps: 1500,
                expansion: 16,
                steps: 2500,
                batch: 1024,
                windows: 200,
                draws: 100,
                longest: 9,
                sentences: 20,
            },
            Scale::Full => Self {
                width: 128,
                model_steps: 6000,
                expansion: 16,
                steps: 6000,
                batch: 1024,
                windows: 1000,
                draws: 400,
                longest: 9,
                sentences: 200,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let source = Source::new(setting, Split::Training)?;
    let held_out = Source::new(setting, Split::HeldOut)?;
    let spec = decoder::spec(source.vocabulary, size.width, 2);
    let task = Box::new(source.clone());
    let model = decoder::train(spec, task, size.model_steps, setting.seed)?;
    let mut draws = generator(setting.seed ^ 0x5ae);
    let windows: Vec<Vec<u32>> = (0..size.windows)
        .map(|_| held_out.window(&mut draws, decoder::LENGTH))
        .collect();
    let trained = learn(&model, &source, &size, setting.seed)?;
    let quality = Quality::of(&model, &trained.autoencoder, &windows)?;
    let shuffled = shuffled(&model, setting.seed)?;
    let control = learn(&shuffled, &source, &size, setting.seed)?;
    let control = Quality::of(&shuffled, &control.autoencoder, &windows)?;
    let activity = Activity::collect(&model, &trained.autoencoder, windows.clone())?;
    let found = Found {
        exact: exact(&model, &trained.autoencoder, &activity)?,
        families: families(&model, &trained.autoencoder, &activity)?,
        heads: head_features(&model, &trained.autoencoder, &activity, 10, 10, 0.1)?,
        prefixes: prefixes(&model, &source, &size, setting.seed)?,
        agreement: agreement(&model, &trained.autoencoder, setting, &size)?,
        quality,
        control,
    };
    Ok(Reproduction {
        setting: format!(
            "decoder of two blocks, width {}, {} heads, {} steps on {} with {:.0} % repeated \
             segments; {} features on the {} numbers of the second block's heads, {} steps of {} \
             activations; measured on {} held-out tokens. The published figures are of GPT-2 small \
             and others, which need weights and data of your own",
            size.width,
            size.width / 16,
            size.model_steps,
            source.name(),
            100.0 * REPEATED,
            trained.autoencoder.features(),
            trained.autoencoder.width(),
            trained.history.len(),
            size.batch,
            found.quality.tokens,
        ),
        claims: claims(setting.scale, &found),
        plots: plots(&trained, &found),
        ..Reproduction::default()
    })
}

/// Text, and windows of repeated segments among it.
#[derive(Clone)]
struct Source {
    text: Text,
    vocabulary: usize,
    /// The token that windows begin with.
    start: Option<u32>,
}

#[derive(Clone)]
enum Text {
    Language(Corpus),
    Characters(Vec<u32>),
}

impl Source {
    fn new(setting: &Setting, split: Split) -> Result<Self> {
        let file = setting
            .data
            .as_ref()
            .map(|data| data.join("tiny_shakespeare.txt"));
        match file.filter(|file| file.exists()) {
            Some(file) => Self::characters(&file, split),
            None => {
                let corpus = decoder::corpus(split, setting.seed)?;
                let vocabulary = corpus.language().vocabulary();
                Ok(Self {
                    vocabulary: vocabulary.size(),
                    start: Some(vocabulary.start()),
                    text: Text::Language(corpus),
                })
            }
        }
    }

    /// Characters numbered in their order; the last tenth of the text is held out.
    fn characters(file: &Path, split: Split) -> Result<Self> {
        let text = lapidary_model::files::read_text(file, 1 << 28)
            .map_err(|error| Error::Experiment(error.to_string()))?;
        let known: BTreeSet<char> = text.chars().collect();
        let number: BTreeMap<char, u32> = known.iter().copied().zip(0u32..).collect();
        let all: Vec<u32> = text
            .chars()
            .filter_map(|c| number.get(&c).copied())
            .collect();
        let (training, held_out) = all.split_at(all.len() / 10 * 9);
        Ok(Self {
            text: Text::Characters(match split {
                Split::Training => training.to_vec(),
                Split::HeldOut => held_out.to_vec(),
            }),
            vocabulary: known.len(),
            start: None,
        })
    }

    fn name(&self) -> &'static str {
        match &self.text {
            Text::Language(_) => "the generated language",
            Text::Characters(_) => "the characters of tiny_shakespeare",
        }
    }

    /// Tokens that segments are made of.
    fn alphabet(&self) -> Vec<u32> {
        let all = 0..self.vocabulary as u32;
        all.filter(|token| Some(*token) != self.start).collect()
    }

    fn window(&self, generator: &mut Generator, length: usize) -> Vec<u32> {
        if generator.random_bool(REPEATED) {
            return self.repeated(generator, length);
        }
        match &self.text {
            // A window that cannot be written is empty, which whoever reads it refuses.
            Text::Language(corpus) => corpus
                .window(generator.random(), length)
                .unwrap_or_default(),
            Text::Characters(all) => {
                let last = all.len().saturating_sub(length);
                let start = generator.random_range(0..=last);
                all.iter().skip(start).take(length).copied().collect()
            }
        }
    }

    /// A random segment over and over: of tokens that hardly repeat in it, or of four symbols.
    fn repeated(&self, generator: &mut Generator, length: usize) -> Vec<u32> {
        let mut alphabet = self.alphabet();
        alphabet.shuffle(generator);
        if generator.random_bool(0.5) {
            alphabet.truncate(4);
        }
        let segment: Vec<u32> = (0..generator.random_range(10..=20usize))
            .filter_map(|_| {
                let index = generator.random_range(0..alphabet.len());
                alphabet.get(index).copied()
            })
            .collect();
        let repeats = segment.iter().copied().cycle();
        self.start.into_iter().chain(repeats).take(length).collect()
    }
}

impl Task for Source {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let window = self.window(generator, length + 1);
            batch.inputs.extend(window.iter().take(length));
            batch.targets.extend(window.iter().skip(1));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

/// An autoencoder of the second block's heads.
fn learn(model: &Model, source: &Source, size: &Size, seed: u64) -> Result<TrainedAutoencoder> {
    let mut draws = generator(seed ^ 0xac7);
    let probe: Vec<Vec<u32>> = (0..16)
        .map(|_| source.window(&mut draws, decoder::LENGTH))
        .collect();
    let x = engine(SiteReader::new(model, SITE)?.read(&probe)?.flatten_to(1))?;
    let centred = engine(x.broadcast_sub(&engine(x.mean_keepdim(0))?))?;
    let lengths = engine(engine(engine(centred.sqr())?.sum(1))?.sqrt())?;
    let options = TrainingOptions {
        sparsity: SPARSITY * mean(super::numbers(&lengths)?),
        batch: size.batch,
        steps: size.steps,
        warm_up: size.steps / 20,
        buffer_batches: 16,
        resample_every: (size.steps / 4).max(1),
        resamplings: 2,
        dead_frequency: 1e-5,
        resample_batches: 8,
        ..TrainingOptions::default()
    };
    let features = size.expansion * model.spec().width;
    let windows = std::iter::repeat_with(|| source.window(&mut draws, decoder::LENGTH));
    let mut generator = generator(seed);
    Ok(train(
        model,
        SITE,
        features,
        windows,
        &options,
        &mut generator,
        |_| (),
    )?)
}

/// The same model with the numbers of each matrix in its blocks in random order.
fn shuffled(model: &Model, seed: u64) -> Result<Model> {
    let mut generator = generator(seed ^ 0x5f1e);
    let mut parameters = BTreeMap::new();
    for (name, tensor) in model.parameters() {
        let mut tensor = tensor.clone();
        if name.starts_with("blocks.") && tensor.rank() == 2 {
            let flat = engine(engine(tensor.flatten_all())?.to_dtype(DType::F32))?;
            let mut values = engine(flat.to_vec1::<f32>())?;
            values.shuffle(&mut generator);
            tensor = engine(Tensor::from_vec(values, tensor.shape(), &Device::Cpu))?;
        }
        parameters.insert(name.clone(), tensor);
    }
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}

/// What is exact at any scale.
struct Exact {
    /// Largest `|Σ_src + constant − pre-activation|`, relative to the largest pre-activation.
    by_source: f64,
    /// Largest `|Σ_parts − source's share|`, relative to the largest share.
    by_part: f64,
    /// Largest change of a logit when no feature is changed.
    unchanged: f64,
    /// Loss recovered by zeros and by the value itself.
    recovered: (f64, f64),
}

fn exact(model: &Model, autoencoder: &Autoencoder, activity: &Activity) -> Result<Exact> {
    let window: Vec<u32> = activity.windows().first().cloned().unwrap_or_default();
    let shape = (1, window.len());
    let input = Input::tokens(engine(Tensor::from_slice(&window, shape, &Device::Cpu))?);
    let question = Question::new(model, &input);
    let attention = Attention::new(&question, autoencoder)?;
    let (mut by_source, mut by_part) = (0f64, 0f64);
    let here = |feature: &usize| {
        let mut events = activity.events(*feature).iter();
        let first = events.find(|event| event.window == 0);
        first.map(|event| event.position)
    };
    let live = activity.live();
    let live = live
        .iter()
        .filter_map(|feature| Some((*feature, here(feature)?)));
    for (feature, position) in live.take(8) {
        let direct = attention.attribute(autoencoder, feature, position)?;
        let scale = direct
            .preactivation
            .abs()
            .max(direct.constant.abs())
            .max(1e-3);
        by_source = by_source.max(direct.completeness_error() / scale);
        let parts = BTreeMap::new();
        let parts = recursive_attribution(&question, autoencoder, feature, position, &parts)?;
        let scale = parts
            .parent
            .iter()
            .fold(1e-3f64, |m, share| m.max(share.abs()));
        by_part = by_part.max(parts.completeness_error() / scale);
    }
    let logits = |trace: &Trace| -> Result<Tensor> {
        let pass = Pass {
            trace: Some(trace),
            ..Pass::default()
        };
        Ok(model.forward(&input, pass)?.into_logits()?.into_value())
    };
    let same = splice(Trace::new(), autoencoder, |features| Ok(features.clone()))?;
    let unchanged = check::difference(&logits(&same)?, &logits(&Trace::new())?)?;
    let few: Vec<Vec<u32>> = activity.windows().iter().take(4).cloned().collect();
    let zeros = recovery(model, SITE, &few, |x| Ok(x.zeros_like()?))?.recovered();
    let value = recovery(model, SITE, &few, |x| Ok(x.clone()))?.recovered();
    Ok(Exact {
        by_source,
        by_part,
        unchanged,
        recovered: (zeros, value),
    })
}

fn families(
    model: &Model,
    autoencoder: &Autoencoder,
    activity: &Activity,
) -> Result<Vec<FeatureFamily>> {
    let often = |feature: &usize| activity.events(*feature).len() >= EVENTS;
    let features: Vec<usize> = activity.live().into_iter().filter(often).collect();
    Ok(feature_families(
        model,
        autoencoder,
        activity,
        &features,
        10,
    )?)
}

fn prefixes(model: &Model, source: &Source, size: &Size, seed: u64) -> Result<Vec<PrefixScores>> {
    let alphabet = source.alphabet();
    let draws = PrefixDraws {
        alphabet: &alphabet,
        start: source.start,
        longest: size.longest,
        draws: size.draws,
        length: decoder::LENGTH,
    };
    Ok(prefix_induction(model, draws, &mut generator(seed ^ 0x9f))?)
}

/// Rank correlation, mean over sentences with two names, of what ablating each live feature at
/// the last position does to right name less wrong, with its direct effect on the logits turned
/// around. Only the language has such sentences.
fn agreement(
    model: &Model,
    autoencoder: &Autoencoder,
    setting: &Setting,
    size: &Size,
) -> Result<Option<f64>> {
    let Text::Language(corpus) = Source::new(setting, Split::HeldOut)?.text else {
        return Ok(None);
    };
    let vocabulary = corpus.language().vocabulary();
    let copies = corpus
        .sentences(1)
        .filter(|sentence| sentence.kind == Kind::NameCopy);
    let mut correlations = Vec::new();
    for sentence in copies.take(size.sentences) {
        let tokens = sentence.tokens(vocabulary)?;
        let prefix: Vec<u32> = tokens.into_iter().take(sentence.target + 1).collect();
        let position = prefix.len().saturating_sub(1);
        let shape = (1, prefix.len());
        let input = Input::tokens(engine(Tensor::from_vec(prefix, shape, &Device::Cpu))?);
        let question = Question::new(model, &input);
        let (class, foil) = (
            vocabulary.identifier(sentence.target_word())? as usize,
            vocabulary.identifier(sentence.foil)? as usize,
        );
        let score = Score {
            class,
            foil: Some(foil),
            position: None,
        };
        let found = ablation_effects(&question, autoencoder, position, Against::Zero, score)?;
        let mut direct = Vec::new();
        for effect in &found.effects {
            let logits = logit_effects(&question, autoencoder, effect.feature, position)?;
            let of = |token: usize| logits.get(token).copied().unwrap_or(0.0);
            direct.push(of(foil) - of(class));
        }
        let effects: Vec<f64> = found.effects.iter().map(|effect| effect.effect).collect();
        if effects.len() >= 4 {
            correlations.push(rank_correlation(&effects, &direct));
        }
    }
    Ok((!correlations.is_empty()).then(|| mean(correlations)))
}

struct Found {
    exact: Exact,
    families: Vec<FeatureFamily>,
    heads: Vec<HeadFeatures>,
    prefixes: Vec<PrefixScores>,
    agreement: Option<f64>,
    quality: Quality,
    control: Quality,
}

fn claims(scale: Scale, found: &Found) -> Vec<Claim> {
    let mut claims = exact_claims(&found.exact);
    claims.extend(quality_claims(scale, &found.quality, &found.control));
    claims.push(induction_claim(scale, &found.families));
    claims.push(heads_claim(scale, &found.heads));
    claims.push(prefix_claim(scale, &found.prefixes));
    claims.push(agreement_claim(scale, found.agreement));
    claims
}

fn exact_claims(exact: &Exact) -> Vec<Claim> {
    vec![
        Claim::new(
            "a feature's shares by head and source token, and the biases, sum to its \
             pre-activation; those of earlier parts sum to each source's share",
            "exact",
            format!(
                "largest relative error {:.1e} by source, {:.1e} by part, in f32",
                exact.by_source, exact.by_part
            ),
            Verdict::of(exact.by_source < 1e-4 && exact.by_part < 1e-4),
        ),
        Claim::new(
            "with the error term kept, changing no feature changes no logit; zeros at the site \
             recover none of the loss and its value all of it",
            "exact",
            format!(
                "largest change {:.1e}; recovered {:.3} and {:.3}",
                exact.unchanged, exact.recovered.0, exact.recovered.1
            ),
            Verdict::of(exact.unchanged < 1e-6 && exact.recovered == (0.0, 1.0)),
        ),
    ]
}

fn quality_claims(scale: Scale, quality: &Quality, control: &Quality) -> Vec<Claim> {
    let (recovered, active) = (quality.recovery.recovered(), quality.l0);
    let beyond = control.recovery.recovered();
    let falls = beyond <= recovered - 0.05 || control.l0 >= 2.0 * active;
    vec![
        Claim::new(
            "at most 20 active features recover at least 0.9 of the loss",
            "about 0.78 to 0.99 with 3 to 41 active features by layer of GPT-2 small (not checked)",
            format!(
                "{recovered:.3} with {active:.1} active; loss {:.4} becomes {:.4}, {:.4} with zeros",
                quality.recovery.clean, quality.recovery.replaced, quality.recovery.zero
            ),
            after_training(scale, recovered >= 0.9 && active <= 20.0),
        ),
        Claim::new(
            "at most a fifth of the features are never active",
            "none published",
            format!(
                "{:.1} % of {}",
                100.0 * quality.dead,
                quality.frequencies.len()
            ),
            after_training(scale, quality.dead <= 0.2),
        ),
        Claim::new(
            "on the model with shuffled weights the loss recovered is lower by 0.05, or twice as \
             many features are active",
            "none published",
            format!(
                "{beyond:.3} with {:.1} active there, {recovered:.3} with {active:.1} here",
                control.l0
            ),
            after_training(scale, falls),
        )
        .noted(format!(
            "with zeros at the site the shuffled model's loss changes by {:.4}, of which the \
             share is taken",
            control.recovery.zero - control.recovery.clean
        )),
    ]
}

fn induction_claim(scale: Scale, families: &[FeatureFamily]) -> Claim {
    let of = |family: Family| families.iter().filter(move |one| one.family == family);
    let specific = of(Family::Induction)
        .filter(|one| one.specificity >= 0.8)
        .count();
    let best = of(Family::Induction).max_by(|a, b| a.specificity.total_cmp(&b.specificity));
    Claim::new(
        "at least one feature reads what followed an earlier copy of the token, and is specific \
         to it: at least 0.8 of the events in its top decile",
        "induction features found in every model looked at",
        format!(
            "{specific} such features; of {} features with {EVENTS} events or more, {} induction, \
             {} short-range, {} long-range; the most specific: {}",
            families.len(),
            of(Family::Induction).count(),
            of(Family::ShortRange).count(),
            of(Family::LongRange).count(),
            best.map_or("none".to_owned(), |one| format!(
                "specificity {:.2}, sensitivity {:.2}",
                one.specificity, one.sensitivity
            )),
        ),
        after_training(scale, specific >= 1),
    )
}

fn heads_claim(scale: Scale, heads: &[HeadFeatures]) -> Claim {
    let many = heads.iter().filter(|head| head.is_polysemantic()).count();
    let share = many as f64 / heads.len().max(1) as f64;
    Claim::new(
        "at least 0.9 of the heads are polysemantic",
        "at least 0.9 of GPT-2 small's heads, labelled by hand",
        format!("{many} of {} heads", heads.len()),
        after_training(scale, share >= 0.9),
    )
    .noted(
        "here a head is polysemantic when its ten features with the largest share fall into two \
         or more groups whose tokens do not overlap, which is easier to be than for a person \
         who sees what different tokens have in common",
    )
}

fn prefix_claim(scale: Scale, prefixes: &[PrefixScores]) -> Claim {
    let most = |one: &&PrefixScores| one.scores.iter().copied().fold(0.0, f64::max) >= INDUCES;
    let heads: Vec<&PrefixScores> = prefixes.iter().filter(most).collect();
    let rises = || heads.iter().map(|one| one.rise());
    let (least, largest) = (
        rises().fold(f64::INFINITY, f64::min),
        rises().fold(f64::NEG_INFINITY, f64::max),
    );
    let shown: Vec<String> = heads
        .iter()
        .map(|one| {
            let (first, last) = (one.scores.first(), one.scores.last());
            format!(
                "{}.{} {:.2} to {:.2}",
                one.block,
                one.head,
                first.copied().unwrap_or(0.0),
                last.copied().unwrap_or(0.0)
            )
        })
        .collect();
    Claim::new(
        "of the heads that do induction, some need a longer repeated prefix: from the shortest to \
         the longest, the attention of two heads rises by amounts that differ by at least 0.2",
        "GPT-2 small: 5.1 needs a long prefix, 5.5 a short one",
        match shown.as_slice() {
            [] => format!("no head reaches {INDUCES}"),
            heads => heads.join(", "),
        },
        after_training(scale, heads.len() >= 2 && largest - least >= 0.2),
    )
}

fn agreement_claim(scale: Scale, agreement: Option<f64>) -> Claim {
    let claim = "where one of two names is to be said, ablating features ranks them as their \
                 direct effects on the logits do: rank correlation of at least 0.5";
    match agreement {
        Some(correlation) => Claim::new(
            claim,
            "none published",
            format!("{correlation:.2}"),
            after_training(scale, correlation >= 0.5),
        ),
        None => Claim::new(
            claim,
            "none published",
            "no sentence with enough live features",
            Verdict::NotMeasured,
        ),
    }
    .noted("direct effects leave out the feed-forward part after the heads, ablation does not")
}

fn plots(trained: &TrainedAutoencoder, found: &Found) -> Vec<Plot> {
    let most = |one: &PrefixScores| one.scores.iter().copied().fold(0.0, f64::max);
    let mut heads: Vec<&PrefixScores> = found.prefixes.iter().collect();
    heads.sort_by(|a, b| most(b).total_cmp(&most(a)));
    let curves = heads.iter().take(8).map(|one| Series {
        name: format!("{}.{}", one.block, one.head),
        points: (1u32..)
            .map(f64::from)
            .zip(one.scores.iter().copied())
            .collect(),
    });
    let histogram = |name: &str, quality: &Quality| Series {
        name: name.to_owned(),
        points: quality
            .histogram()
            .into_iter()
            .map(|(edge, count)| (edge + 0.25, count as f64))
            .collect(),
    };
    let every = (trained.history.len() / 200).max(1);
    let active = trained.history.iter().enumerate().step_by(every);
    vec![
        Plot {
            title: "Induction by length of the repeated prefix".to_owned(),
            x: "tokens of the prefix".to_owned(),
            y: "attention to what followed".to_owned(),
            series: curves.collect(),
        },
        Plot {
            title: "How often features are active".to_owned(),
            x: "log10 of the share of tokens".to_owned(),
            y: "features".to_owned(),
            series: vec![
                histogram("trained model", &found.quality),
                histogram("shuffled weights", &found.control),
            ],
        },
        Plot {
            title: "Active features in training".to_owned(),
            x: "step".to_owned(),
            y: "features per token".to_owned(),
            series: vec![Series {
                name: "trained model".to_owned(),
                points: active
                    .map(|(step, found)| (step as f64, found.active))
                    .collect(),
            }],
        },
    ]
}
