//! A trained decoder and held-out text, which reproductions of structured compression share.

use super::decoder;
use super::texts::Sides;
use crate::Result;
use lapidary_compress::quality::{Window, perplexity, sliding_windows};
use lapidary_compress::slicing::parameters_after;
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Compressed, Method, Requirements,
    Settings, Task,
};
use lapidary_model::{Model, ModelSpec};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::feedforward::{FeedforwardSpec, GatedSpec};
use lapidary_parts::norm::NormSpec;

/// How large the decoder is and what it is measured on.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Seeds.
    pub seeds: u64,
    /// Features of a token.
    pub width: usize,
    /// Blocks.
    pub blocks: usize,
    /// Steps of training.
    pub steps: u64,
    /// Windows of calibration.
    pub calibration: u64,
    /// Windows of held-out text.
    pub tests: u64,
}

/// A decoder, what it is calibrated by and what it is measured on.
pub struct Bench {
    /// The decoder.
    pub model: Model,
    /// Windows of the training side.
    pub data: CalibrationData,
    held_out: Vec<Window>,
}

/// A decoder as Llama: rotary positions, two query heads to a key, gated feed-forward parts.
fn spec(vocabulary: usize, width: usize, blocks: usize) -> ModelSpec {
    let mut spec = decoder::Positions::Rotary.spec(vocabulary, width, blocks);
    spec.final_norm = Some(NormSpec::Rms { epsilon: 1e-6 });
    for block in &mut spec.blocks {
        block.norm = NormSpec::Rms { epsilon: 1e-6 };
        if let MixerSpec::MultiHead(attention) = &mut block.attention {
            attention.bias = false;
            if attention.heads.is_multiple_of(2) {
                attention.groups = Some(attention.heads / 2);
            }
        }
        block.feedforward = Some(FeedforwardSpec::Gated(GatedSpec {
            hidden: 8 * width / 3,
            activation: ActivationSpec::Silu,
            bias: false,
        }));
    }
    spec
}

impl Bench {
    /// Trains the decoder of a seed on a text.
    pub fn train(text: &Sides, size: &Size, seed: u64) -> Result<Self> {
        let spec = spec(text.training.vocabulary(), size.width, size.blocks);
        let sample = text.training.fixed_windows(size.calibration)?;
        let model = decoder::train(spec, text.training.task(), size.steps, seed)?;
        let mut held_out = Vec::new();
        for tokens in text.held_out.fixed_windows(size.tests)? {
            let (length, stride) = (decoder::LENGTH, decoder::LENGTH / 2);
            held_out.extend(sliding_windows(&tokens, length, stride)?);
        }
        Ok(Self {
            model,
            data: CalibrationData::windows(sample)?,
            held_out,
        })
    }

    /// Perplexity on the held-out text.
    pub fn perplexity(&self, model: &Model) -> Result<f64> {
        Ok(perplexity(model, &self.held_out, 16)?.value)
    }

    /// The decoder compressed by a method that keeps `share` of what it works on.
    pub fn compress(&self, name: &str, share: f64, settings: &Settings) -> Result<Compressed> {
        let method = Method::find(name)?;
        let requirements = method.requirements(&self.model, settings)?;
        let calibration = self.calibrate(&requirements)?;
        let task = Task {
            calibration: calibration.as_ref(),
            data: Some(&self.data),
            settings: Some(settings),
            ..Task::new(&self.model)
        };
        let plan = method.plan(&task, &Budget::Keep(share))?;
        Ok(method.apply(&task, &plan)?)
    }

    /// What a method leaves of the decoder when that is to have `left` parameters, as near as its steps allow,
    /// wherever it takes the others from.
    pub fn with_parameters(&self, method: &str, left: usize) -> Result<Model> {
        let mut settings = Settings::default();
        let spec = self.model.spec();
        let inside = match method {
            "slicegpt" => {
                settings.slicing.multiple = 1;
                let mut width = spec.width;
                while width > 1 && parameters_after(spec, width, false)? > left as u64 {
                    width -= 1;
                }
                let share = width as f64 / spec.width as f64;
                return Ok(self.compress(method, share, &settings)?.model);
            }
            "channel-magnitude" => ".feedforward.",
            _ => "blocks.",
        };
        // What it can take from: all that goes has to come from there.
        let layers = self.model.linears().iter();
        let layers = layers.filter(|layer| layer.path.contains(inside));
        let weights: usize = layers.map(|layer| layer.input * layer.output).sum();
        let gone = self.model.parameter_count().saturating_sub(left);
        let share = 1.0 - gone as f64 / weights.max(1) as f64;
        Ok(self.compress(method, share, &settings)?.model)
    }

    fn calibrate(&self, requirements: &Requirements) -> Result<Option<Calibration>> {
        if requirements.is_empty() {
            return Ok(None);
        }
        let options = CalibrationOptions::default();
        let found = Calibration::collect(&self.model, &self.data, requirements, options)?;
        Ok(Some(found))
    }
}
