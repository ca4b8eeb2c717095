//! How far apart the last vectors of neighbouring sequences lie, in a format's eyes.

use super::families::{Alphabet, Family, Prompt};
use crate::analyses::power_law::PowerLaw;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{D, DType, Tensor};
use lapidary_model::{HeadSpec, Input, Model, Output, Pass};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_signal::Trace;
use lapidary_signal::rounding::{Format, Rounding};
use std::collections::BTreeMap;

/// Neighbours in a row that must look equal before a model counts as collapsed.
const IN_A_ROW: usize = 5;

/// A model as it computes in some format, with or without a remedy.
#[derive(Debug)]
pub struct Emulated {
    model: Model,
    rounding: Option<Rounding>,
    /// Queries of rows longer than this grow with the logarithm of their length.
    sharpened_from: Option<usize>,
}

impl Emulated {
    /// `model` in `f64` throughout, or with parameters and the result of every operation rounded
    /// to a format, carried in `f64`.
    ///
    /// # Errors
    /// When the parameters cannot be converted.
    pub fn new(model: &Model, rounding: Option<Rounding>) -> Result<Self> {
        let mut parameters = BTreeMap::new();
        for (name, tensor) in model.parameters() {
            let wide = engine(tensor.detach().to_dtype(DType::F64))?;
            let rounded = match rounding {
                Some(rounding) => rounding.format.round(&wide)?,
                None => wide,
            };
            parameters.insert(name.clone(), rounded);
        }
        Ok(Self {
            model: Model::new(model.spec().clone(), &mut parameters)?,
            rounding,
            sharpened_from: None,
        })
    }

    /// Keeps attention sharp: the query at position `i` is multiplied by
    /// `max(1, ln(i + 1) / ln(length))`, as logits must grow with `ln n` for weights not to fade.
    ///
    /// # Errors
    /// When queries are normalised after their projection, which would undo it.
    pub fn sharpened(mut self, length: usize) -> Result<Self> {
        let normalises = |block: &BlockSpec| match &block.attention {
            MixerSpec::MultiHead(attention) => attention.query_key_norm.is_some(),
            MixerSpec::Mamba(_)
            | MixerSpec::Mamba2(_)
            | MixerSpec::Wavelet(_)
            | MixerSpec::Absent => false,
        };
        if self.model.spec().blocks.iter().any(normalises) {
            return Err(Error::invalid(
                "sharpened attention",
                "asked for in a model that normalises queries",
                "asked for where scores grow with queries",
            ));
        }
        self.sharpened_from = Some(length.max(2));
        Ok(self)
    }

    /// The format, unless it is `f64`.
    pub fn format(&self) -> Option<Format> {
        self.rounding.map(|rounding| rounding.format)
    }

    fn run(&self, tokens: &[u32]) -> Result<Output> {
        let mut trace = Trace::new();
        if let Some(rounding) = self.rounding {
            trace = trace.replace("embeddings", move |_, signal| signal.into_rounded(rounding))?;
        }
        if let Some(length) = self.sharpened_from {
            let factors: Vec<f64> = (0..tokens.len())
                .map(|i| (((i + 1) as f64).ln() / (length as f64).ln()).max(1.0))
                .collect();
            let shape = (tokens.len(), 1);
            let factors = engine(Tensor::from_vec(factors, shape, &self.model.device()))?;
            trace = trace.replace("blocks.*.attention.query", move |_, query| {
                query.multiply_constant(&factors)
            })?;
        }
        let shape = (1, tokens.len());
        let ids = engine(Tensor::from_slice(tokens, shape, &self.model.device()))?;
        let pass = Pass {
            trace: Some(&trace),
            only_last: matches!(self.model.spec().head, HeadSpec::LanguageModel { .. }),
            ..Pass::default()
        };
        Ok(self.model.forward(&Input::tokens(ids), pass)?)
    }

    /// `y_n`: the last token's vector after the final norm.
    pub fn last_vector(&self, tokens: &[u32]) -> Result<Vec<f64>> {
        let hidden = self.run(tokens)?.hidden.into_value();
        let last = engine(hidden.narrow(1, tokens.len().saturating_sub(1), 1))?;
        engine(engine(last.flatten_all())?.to_vec1::<f64>())
    }

    /// The most probable next token.
    ///
    /// # Errors
    /// When the model has no scores for tokens.
    pub fn next_token(&self, tokens: &[u32]) -> Result<u32> {
        let logits = self.run(tokens)?.into_logits()?.into_value();
        let best = engine(engine(logits.flatten_all())?.argmax(D::Minus1))?;
        engine(best.to_scalar::<u32>())
    }

    /// Whether each prompt is answered.
    pub fn answers(&self, prompts: &[Prompt]) -> Result<Vec<bool>> {
        let each = prompts.iter();
        each.map(|prompt| Ok(self.next_token(&prompt.tokens)? == prompt.answer))
            .collect()
    }

    /// The distances of a family at some lengths.
    pub fn distances(
        &self,
        family: Family,
        alphabet: &Alphabet,
        lengths: &[usize],
    ) -> Result<Vec<Distance>> {
        let each = lengths.iter();
        each.map(|n| {
            let (v, longer) = family.pair(*n, alphabet);
            let (y, other) = (self.last_vector(&v)?, self.last_vector(&longer)?);
            Ok(Distance::between(*n, &y, &other))
        })
        .collect()
    }

    /// Largest difference of any row from the first at each block's output, relative to the
    /// largest entry: zero for equal tokens without positions.
    pub fn row_spread(&self, tokens: &[u32]) -> Result<Vec<f64>> {
        let blocks = self.model.spec().expanded_blocks().len();
        let mut trace = Trace::new();
        if let Some(rounding) = self.rounding {
            trace = trace.replace("embeddings", move |_, signal| signal.into_rounded(rounding))?;
        }
        for block in 0..blocks {
            trace = trace.capture(&format!("blocks.{block}.out"))?;
        }
        let shape = (1, tokens.len());
        let ids = engine(Tensor::from_slice(tokens, shape, &self.model.device()))?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        self.model.forward(&Input::tokens(ids), pass)?;
        let mut spreads = Vec::with_capacity(blocks);
        for block in 0..blocks {
            let out = trace.signal(&format!("blocks.{block}.out"))?.into_value();
            let first = engine(out.narrow(1, 0, 1))?;
            let most = |x: Tensor| -> Result<f64> {
                engine(engine(engine(x.abs())?.max_all())?.to_scalar::<f64>())
            };
            let apart = most(engine(out.broadcast_sub(&first))?)?;
            spreads.push(apart / most(out)?.max(f64::MIN_POSITIVE));
        }
        Ok(spreads)
    }
}

/// How far apart two last vectors lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distance {
    /// The family's `n`.
    pub n: usize,
    /// `‖y − y*‖_∞`.
    pub largest: f64,
    /// `‖y − y*‖₂ / ‖y‖₂`.
    pub relative: f64,
    /// `‖y‖_∞`.
    pub norm: f64,
    /// Whether every number is the same, bit for bit.
    pub equal: bool,
}

impl Distance {
    fn between(n: usize, y: &[f64], other: &[f64]) -> Self {
        let pairs = || y.iter().zip(other);
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let squares: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
        let own: f64 = y.iter().map(|a| a * a).sum();
        Self {
            n,
            largest: most(&mut pairs().map(|(a, b)| (a - b).abs())),
            relative: (squares / own.max(f64::MIN_POSITIVE)).sqrt(),
            norm: most(&mut y.iter().map(|a| a.abs())),
            equal: pairs().all(|(a, b)| a.to_bits() == b.to_bits()),
        }
    }

    /// Whether a format with this epsilon cannot be trusted to tell the two apart.
    fn collapsed(&self, epsilon: f64) -> bool {
        self.equal || self.largest < epsilon * self.norm
    }
}

/// The first `n` from which five measured neighbours in a row are equal bit for bit, or differ by
/// less than the format's `ε ‖y‖`; none where that does not happen.
pub fn collapse_length(distances: &[Distance], format: Format) -> Option<usize> {
    let epsilon = format.epsilon();
    distances
        .windows(IN_A_ROW)
        .find(|row| row.iter().all(|distance| distance.collapsed(epsilon)))
        .and_then(|row| row.first())
        .map(|distance| distance.n)
}

/// How `‖y − y*‖_∞` falls with `n`.
pub fn decline(distances: &[Distance]) -> Option<PowerLaw> {
    let points: Vec<(f64, f64)> = distances
        .iter()
        .map(|distance| (distance.n as f64, distance.largest))
        .collect();
    PowerLaw::fit(&points)
}

/// Checks that sequences of a family up to `n` fit a model.
///
/// # Errors
/// When they are longer than the model takes, or have tokens that it does not.
pub fn check_fits(model: &Model, alphabet: &Alphabet, n: usize) -> Result<()> {
    let most = Family::OnesThenZero.pair(n, alphabet).1;
    if most.len() > model.spec().length() {
        return Err(Error::invalid(
            "length of the longest sequence",
            most.len(),
            format!("at most {}, the length of the model", model.spec().length()),
        ));
    }
    let vocabulary = model.spec().vocabulary().unwrap_or(0);
    let all = most.iter().chain(&alphabet.digits);
    if let Some(token) = all.copied().find(|token| *token as usize >= vocabulary) {
        return Err(Error::invalid(
            "token",
            token,
            format!("below {vocabulary}, the model's vocabulary"),
        ));
    }
    Ok(())
}
