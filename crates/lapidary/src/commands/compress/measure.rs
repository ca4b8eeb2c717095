//! What a model is worth and how fast it is, before and after.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Result, ensure};
use lapidary_compress::quality::{
    Agreement, Likeness, Perplexity, Window, agreement, agreement_rounded, block_errors_after,
    likeness, likeness_rounded, perplexity, perplexity_rounded,
};
use lapidary_compress::{
    ActivationRange, Calibration, CalibrationData, CalibrationOptions, Content, Report,
    RoundedActivations, Settings, Size,
};
use lapidary_kernels::Tensor;
use lapidary_kernels::memory::most_held;
use lapidary_model::generation::{GenerationOptions, generate};
use lapidary_model::{HeadSpec, Input, Model, Output, Package, Pass};
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_train::generator;
use lapidary_train::language::{Kind, Language, Split};
use serde::Serialize;

use crate::commands::demo::question;
use crate::loading;

/// Sequences in a forward pass that only measures.
pub(super) const BATCH: usize = 8;
/// Times that are measured; the median counts.
const REPEATS: usize = 3;
/// Tokens that are generated when decoding is timed or sampled.
const NEW_TOKENS: usize = 24;
/// Sentences of each kind that the embedded model answers.
const SENTENCES: usize = 60;

/// One model, measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) size: Size,
    /// Tokens per second when the model reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prefill: Option<f64>,
    /// Most bytes that were held while it read one window, its parameters included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<usize>,
    /// Tokens per second when it writes, one after another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) decode: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) perplexity: Option<Perplexity>,
    /// Share of sentences of each kind whose right word beats the wrong one: of models with the
    /// embedded vocabulary.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) choices: Vec<(&'static str, f64)>,
    /// What it makes of the first words of the text, always taking the most probable token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sample: Option<String>,
}

/// A compressed model beside the original.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Distance {
    pub(super) agreement: Option<Agreement>,
    pub(super) likeness: Option<Likeness>,
    /// Relative error of the residual stream after each block that is left, where streams are as wide.
    pub(super) block_errors: Vec<f64>,
}

/// Refuses to measure rounded activations where there is nothing to measure them on, or to find steps by.
pub(super) fn check_rounded(
    settings: &Settings,
    data: Option<&CalibrationData>,
    windows: &[Window],
) -> Result<()> {
    let Some(range) = settings.activations.range else {
        return Ok(());
    };
    let by_site = range == ActivationRange::PerTensor || settings.quantise.outliers > 0.0;
    ensure!(
        data.is_some() || !(by_site || windows.is_empty()),
        "--activations {range} needs --calibrate FILE: what rounded activations are measured on, and steps of \
         sites and outliers found by"
    );
    Ok(())
}

/// A compressed model with rounded activations.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Rounded {
    pub(super) range: ActivationRange,
    pub(super) bits: u32,
    /// Whether softmax, GELU and norms were computed by integers.
    pub(super) functions: bool,
    /// Sites that linear layers read.
    pub(super) sites: usize,
    /// Features at all of them.
    pub(super) inputs: usize,
    /// Those that are outliers and were left.
    pub(super) kept: usize,
    pub(super) perplexity: Option<Perplexity>,
    /// With the original, whose activations are not rounded.
    pub(super) agreement: Option<Agreement>,
    pub(super) likeness: Option<Likeness>,
}

/// What is measured, and on what.
pub(super) struct Measure<'a> {
    pub(super) package: &'a Package,
    /// Whether the model reads the language of the embedded one.
    pub(super) embedded: bool,
    pub(super) data: Option<&'a CalibrationData>,
    /// Windows of text for the perplexity.
    pub(super) windows: &'a [Window],
}

impl Measure<'_> {
    /// Measures one model.
    pub(super) fn of(&self, model: &Model) -> Result<Measured> {
        let language_model = is_language_model(model);
        let size = Size::of(model);
        let (prefill, held) = self.prefill(model)?.unzip();
        Ok(Measured {
            size,
            prefill,
            memory: held.flatten().map(|held| held + size.bytes),
            decode: match language_model {
                true => self.decode(model)?,
                false => None,
            },
            perplexity: match language_model && !self.windows.is_empty() {
                true => Some(perplexity(model, self.windows, BATCH)?),
                false => None,
            },
            choices: match language_model && self.embedded {
                true => choices(model)?,
                false => Vec::new(),
            },
            sample: match language_model {
                true => self.sample(model)?,
                false => None,
            },
        })
    }

    /// Measures how far `other`, which came of `original` by what `reports` say, is from it.
    pub(super) fn between<'r>(
        &self,
        original: &Model,
        other: &Model,
        reports: impl IntoIterator<Item = &'r Report>,
    ) -> Result<Distance> {
        let Some(data) = self.data else {
            return Ok(Distance {
                agreement: None,
                likeness: None,
                block_errors: Vec::new(),
            });
        };
        let scored = has_scores(original);
        let all = (0..original.spec().expanded_blocks().len()).collect();
        let left = reports
            .into_iter()
            .fold(all, |earlier: Vec<usize>, report| {
                report.blocks_left(&earlier)
            });
        Ok(Distance {
            agreement: match scored {
                true => Some(agreement(original, other, data, BATCH)?),
                false => None,
            },
            likeness: match scored {
                true => None,
                false => Some(likeness(original, other, data, BATCH)?),
            },
            block_errors: match &original.spec().organisation {
                // Behind a block there are two streams.
                Some(OrganisationSpec::Reversible(_)) => Vec::new(),
                _ => block_errors_after(original, other, &left, data, BATCH)?,
            },
        })
    }

    /// Measures `other` as [`Measure::between`], with its activations rounded as the settings say, if they
    /// do.
    pub(super) fn rounded(
        &self,
        original: &Model,
        other: &Model,
        settings: &Settings,
    ) -> Result<Option<Rounded>> {
        let requirements = RoundedActivations::requirements(other, settings)?;
        let calibration = match self.data {
            Some(data) if !requirements.is_empty() => {
                let options = CalibrationOptions::default();
                Some(Calibration::collect(other, data, &requirements, options)?)
            }
            _ => None,
        };
        let calibration = calibration.as_ref();
        let Some(activations) = RoundedActivations::new(other, settings, calibration)? else {
            return Ok(None);
        };
        let [sites, inputs, kept] = activations.counts();
        let by = &activations;
        let scored = has_scores(original);
        Ok(Some(Rounded {
            range: by.range(),
            bits: by.bits(),
            functions: by.has_integer_functions(),
            sites,
            inputs,
            kept,
            perplexity: match is_language_model(other) && !self.windows.is_empty() {
                true => Some(perplexity_rounded(other, self.windows, BATCH, by)?),
                false => None,
            },
            agreement: match self.data.filter(|_| scored) {
                Some(data) => Some(agreement_rounded(original, other, data, BATCH, by)?),
                None => None,
            },
            likeness: match self.data.filter(|_| !scored) {
                Some(data) => Some(likeness_rounded(original, other, data, BATCH, by)?),
                None => None,
            },
        }))
    }

    /// Tokens per second over one window or image of the model's data, and the most bytes that were held
    /// meanwhile beside what was held before.
    fn prefill(&self, model: &Model) -> Result<Option<(f64, Option<usize>)>> {
        let Some(input) = self.one(model)? else {
            return Ok(None);
        };
        let read = || -> Result<Output> { Ok(model.forward(&input, Pass::default())?) };
        // What is made once and kept is there after the first time.
        let tokens = read()?.hidden.value().dim(1)?;
        let (done, held) = most_held(read);
        done?;
        let seconds = median(|| read().map(|_| ()))?;
        Ok(Some((tokens as f64 / seconds, held)))
    }

    /// One window of the text, or one example of the data.
    fn one(&self, model: &Model) -> Result<Option<Input>> {
        let device = model.device();
        let tokens = |ids: &[u32]| -> Result<Input> {
            let ids = Tensor::from_slice(ids, (1, ids.len()), &device)?;
            Ok(Input::tokens(ids))
        };
        if let Some(ids) = self.text() {
            return tokens(ids).map(Some);
        }
        let example = self.data.and_then(|data| data.examples().first());
        Ok(match example.map(|example| &example.content) {
            None => None,
            Some(Content::Tokens { ids, .. }) => Some(tokens(ids)?),
            Some(Content::Pixels(pixels)) => {
                Some(Input::Pixels(pixels.unsqueeze(0)?.to_device(&device)?))
            }
        })
    }

    fn decode(&self, model: &Model) -> Result<Option<f64>> {
        let Some(prompt) = self.text().map(|ids| &ids[..ids.len().min(8)]) else {
            return Ok(None);
        };
        let new_tokens = NEW_TOKENS.min(model.spec().length().saturating_sub(prompt.len()));
        if new_tokens < 2 {
            return Ok(None);
        }
        let time = |count: usize| median(|| continued(model, prompt, count).map(|_| ()));
        // The prompt's time is in both, and goes.
        let seconds = time(new_tokens)? - time(1)?;
        Ok((seconds > 0.0).then(|| (new_tokens - 1) as f64 / seconds))
    }

    fn sample(&self, model: &Model) -> Result<Option<String>> {
        let (Some(tokenizer), Some(ids)) = (&self.package.tokenizer, self.text()) else {
            return Ok(None);
        };
        let prompt = &ids[..ids.len().min(12)];
        let room = model.spec().length().saturating_sub(prompt.len());
        let new = continued(model, prompt, NEW_TOKENS.min(room))?;
        Ok(Some(tokenizer.decode(&[prompt, &new].concat(), true)?))
    }

    /// The first window of the data.
    fn text(&self) -> Option<&[u32]> {
        let window = self.windows.first()?;
        (!window.tokens.is_empty()).then_some(window.tokens.as_slice())
    }
}

fn continued(model: &Model, prompt: &[u32], new_tokens: usize) -> Result<Vec<u32>> {
    let prompts = [prompt.to_vec()];
    let said = |cache| {
        let options = GenerationOptions {
            new_tokens,
            cache,
            ..Default::default()
        };
        generate(model, &prompts, &options, |_, _| ControlFlow::Continue(()))
    };
    // What cannot be kept between steps, such as buckets that grow with the text, is run again.
    let sequences = match said(true) {
        Ok(sequences) => sequences,
        Err(_) => said(false)?,
    };
    Ok(sequences.into_iter().next().unwrap_or_default())
}

/// The median time of some repetitions after one that warms up.
fn median(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut times = (0..REPEATS)
        .map(|_| {
            let started = Instant::now();
            work()?;
            Ok(started.elapsed().as_secs_f64())
        })
        .collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times.get(REPEATS / 2).copied().unwrap_or(f64::NAN))
}

/// How often the right word beats the wrong one, by kind of sentence.
fn choices(model: &Model) -> Result<Vec<(&'static str, f64)>> {
    let language = Language::new(loading::LANGUAGE_SEED);
    let mut random = generator(1);
    Kind::ALL
        .into_iter()
        .map(|kind| {
            let mut right = 0;
            for _ in 0..SENTENCES {
                let sentence = language.sentence(kind, Split::HeldOut, &mut random);
                let (ids, target, foil) = question(&sentence, language.vocabulary())?;
                let scores = crate::commands::demo::scores(model, &ids)?;
                let beats = scores.get(target).zip(scores.get(foil)).map(|(t, f)| t > f);
                right += usize::from(beats == Some(true));
            }
            Ok((kind.name(), right as f64 / SENTENCES as f64))
        })
        .collect()
}

pub(super) fn is_language_model(model: &Model) -> bool {
    model.spec().is_causal() && matches!(model.spec().head, HeadSpec::LanguageModel { .. })
}

fn has_scores(model: &Model) -> bool {
    match &model.spec().head {
        HeadSpec::LanguageModel { .. } => true,
        HeadSpec::Pooled { labels, .. } => labels.is_some(),
        HeadSpec::None | HeadSpec::Pixels => false,
    }
}

#[cfg(test)]
mod tests {
    use lapidary_kernels::{DType, Device};
    use lapidary_model::ModelSpec;

    use super::*;

    fn model(attention: &str, organisation: &str) -> Model {
        let text = format!(
            "width = 8
            input = {{ kind = 'tokens', vocabulary = 11, length = 16 }}
            head = {{ kind = 'language-model' }}
            {organisation}
            [[blocks]]
            repeat = 2
            attention = {{ kind = 'multi-head', heads = 2, causal = true{attention} }}
            feedforward = {{ kind = 'dense', hidden = 16 }}"
        );
        let spec: ModelSpec = toml::from_str(&text).unwrap();
        Model::initialised(spec, 0, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn two_streams_are_compared_by_what_they_say() {
        let reversible = || model("", "organisation = { kind = 'reversible' }");
        let package = Package::new(reversible(), None);
        let data = CalibrationData::windows([vec![1, 2, 3, 4], vec![5, 6, 7, 8]]).unwrap();
        let measure = Measure {
            package: &package,
            embedded: false,
            data: Some(&data),
            windows: &[],
        };
        let one = reversible();
        let distance = measure.between(&one, &reversible(), []).unwrap();
        assert!(distance.block_errors.is_empty() && distance.agreement.is_some());
        let plain = || model("", "");
        let distance = measure.between(&plain(), &plain(), []).unwrap();
        assert_eq!(distance.block_errors, [0.0, 0.0]);
    }

    #[test]
    fn what_cannot_be_kept_between_steps_is_run_again() {
        let growing = ", sharing = 'query-key', mechanism = { kind = 'reformer', chunk = 4 }";
        let model = model(growing, "");
        let said = continued(&model, &[1, 2, 3], 2).unwrap();
        assert_eq!(said.len(), 2);
        let options = GenerationOptions {
            new_tokens: 2,
            ..Default::default()
        };
        let go_on = |_, _| ControlFlow::Continue(());
        let refused = generate(&model, &[vec![1, 2, 3]], &options, go_on);
        let refused = refused.unwrap_err().to_string();
        assert!(
            refused.contains("generation without a cache asks for none"),
            "{refused}"
        );
    }
}
