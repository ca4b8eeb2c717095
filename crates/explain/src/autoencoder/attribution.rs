//! Which heads and which source tokens made a feature, and what it writes to the logits.
//!
//! Before its nonlinearity a feature is a linear function of the heads' outputs, and these, the
//! attention weights `A` given, of the values at the source positions:
//!
//! ```text
//! z^k · E_i^k = Σ_src A^k[dst, src] (v^k[src] · E_i^k)
//! pre-activation = Σ_k Σ_src A^k[dst, src] (v^k[src] · E_i^k) + b_e,i − b_d · E_i
//! ```

use super::site::block_of;
use super::{Autoencoder, Feature, numbers};
use crate::error::{engine, require_whole_sequences};
use crate::{Error, Question, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules, StreamSpace};
use lapidary_signal::{Signal, Trace};

/// How the features of an attention site are shared out among heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heads {
    pub(crate) block: usize,
    pub(crate) heads: usize,
    pub(crate) groups: usize,
    /// Features of a value of a head.
    pub(crate) head_width: usize,
}

impl Heads {
    /// The heads whose outputs the autoencoder reads.
    pub(crate) fn of(model: &Model, autoencoder: &Autoencoder) -> Result<Self> {
        let site = autoencoder.site();
        let block = block_of(site)
            .filter(|block| site == format!("blocks.{block}.attention.mixed"))
            .ok_or_else(|| {
                Error::invalid(
                    "site of the autoencoder",
                    site,
                    "blocks.N.attention.mixed: only there do features come from heads",
                )
            })?;
        let heads = Self::in_block(model, block)?;
        if autoencoder.width() != heads.heads * heads.head_width {
            let expected = format!("{} heads of {}", heads.heads, heads.head_width);
            return Err(Error::invalid(
                "width of the autoencoder",
                autoencoder.width(),
                expected,
            ));
        }
        Ok(heads)
    }

    pub(crate) fn in_block(model: &Model, block: usize) -> Result<Self> {
        let blocks = model.spec().expanded_blocks();
        let Some(spec) = blocks.get(block) else {
            let expected = format!("below {}", blocks.len());
            return Err(Error::invalid("block of the autoencoder", block, expected));
        };
        match &spec.attention {
            MixerSpec::MultiHead(attention) if attention.local.is_some() => Err(Error::invalid(
                format!("attention of block {block}"),
                "heads with a filter beside them",
                "heads whose weights say which token a value came from",
            )),
            MixerSpec::MultiHead(attention) => Ok(Self {
                block,
                heads: attention.heads,
                groups: attention.groups(),
                head_width: attention.value_width(model.spec().width),
            }),
            other => Err(Error::invalid(
                format!("mixer of block {block}"),
                other.kind(),
                "multi-head attention, whose weights say which token a value came from",
            )),
        }
    }

    /// The group of keys and values that a query head reads.
    pub(crate) fn group(&self, head: usize) -> usize {
        head * self.groups / self.heads.max(1)
    }

    /// A head's part of a vector over all heads.
    pub(crate) fn part<'a>(&self, head: usize, vector: &'a [f64]) -> &'a [f64] {
        let start = head * self.head_width;
        vector.get(start..start + self.head_width).unwrap_or(&[])
    }
}

/// An autoencoder that was trained where the bias of values is added behind the attention, as
/// TransformerLens does by default, for a model that adds it to the values. As attention weights sum
/// to one, every head's output is larger by the bias: the decoder's bias takes it, and features stay
/// as they are.
///
/// # Errors
/// When the autoencoder does not read the heads of an attention layer.
pub fn with_value_biases(model: &Model, autoencoder: &Autoencoder) -> Result<Autoencoder> {
    let heads = Heads::of(model, autoencoder)?;
    let name = format!("blocks.{}.attention.value.bias", heads.block);
    let Some(bias) = model.parameters().get(&name) else {
        return Ok(autoencoder.clone());
    };
    let bias = numbers(bias)?;
    let read = (0..heads.heads).flat_map(|head| heads.part(heads.group(head), &bias));
    let weights = autoencoder.weights();
    let old = numbers(weights.decoder_bias)?;
    let sum: Vec<f64> = old.iter().zip(read).map(|(old, bias)| old + bias).collect();
    let moved = engine(Tensor::new(sum.as_slice(), weights.decoder_bias.device()))?;
    Autoencoder::new(
        autoencoder.site(),
        weights.encoder.clone(),
        weights.encoder_bias.clone(),
        weights.decoder.clone(),
        engine(moved.to_dtype(weights.decoder_bias.dtype()))?,
    )
}

/// `h_k = ‖D_i^k‖ / Σ_k ‖D_i^k‖`: each head's share of each feature's decoder, `[feature][head]`.
///
/// # Errors
/// When the autoencoder does not read the heads of one of the model's attention layers.
pub fn head_shares(model: &Model, autoencoder: &Autoencoder) -> Result<Vec<Vec<f64>>> {
    let heads = Heads::of(model, autoencoder)?;
    let decoder = numbers(autoencoder.weights().decoder)?;
    let shares = decoder.chunks(autoencoder.width()).map(|row| {
        let lengths: Vec<f64> = row
            .chunks(heads.head_width.max(1))
            .map(|part| part.iter().map(|v| v * v).sum::<f64>().sqrt())
            .collect();
        let total: f64 = lengths.iter().sum();
        let scale = if total > 0.0 { 1.0 / total } else { 0.0 };
        lengths.into_iter().map(|length| length * scale).collect()
    });
    Ok(shares.collect())
}

/// What made one feature at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureAttribution {
    /// The feature.
    pub feature: usize,
    /// The position.
    pub position: usize,
    /// Its value before the nonlinearity.
    pub preactivation: f64,
    /// What comes from the autoencoder's biases: `b_e,i − b_d · E_i`.
    pub constant: f64,
    /// What each head at each source position adds, `[head][source]`.
    pub by_head_and_source: Vec<Vec<f64>>,
}

impl FeatureAttribution {
    /// What each head adds.
    pub fn by_head(&self) -> Vec<f64> {
        let heads = self.by_head_and_source.iter();
        heads.map(|sources| sources.iter().sum()).collect()
    }

    /// What each source position adds.
    pub fn by_source(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.by_head_and_source.first().map_or(0, Vec::len)];
        for sources in &self.by_head_and_source {
            sums.iter_mut().zip(sources).for_each(|(sum, s)| *sum += s);
        }
        sums
    }

    /// The feature's value.
    pub fn activation(&self) -> f64 {
        self.preactivation.max(0.0)
    }

    /// `|Σ + constant − pre-activation|`: zero but for rounding.
    pub fn completeness_error(&self) -> f64 {
        let sum: f64 = self.by_source().iter().sum();
        (sum + self.constant - self.preactivation).abs()
    }
}

/// One forward pass over the first sequence of a question, with everything that attribution asks
/// of it.
#[derive(Clone, Debug)]
pub struct Attention {
    heads: Heads,
    length: usize,
    /// `[head][query][key]`.
    weights: Vec<Vec<Vec<f64>>>,
    /// `[key][groups · head_width]`.
    values: Vec<Vec<f64>>,
    /// `[query][heads · head_width]`.
    mixed: Vec<Vec<f64>>,
}

impl Attention {
    /// Runs the model and keeps what its attention did at the autoencoder's block.
    ///
    /// # Errors
    /// When the autoencoder does not read the heads of one of the model's attention layers, or an organisation lets these
    /// see something else than the sequence.
    pub fn new(question: &Question<'_>, autoencoder: &Autoencoder) -> Result<Self> {
        Self::at(question, Heads::of(question.model, autoencoder)?)
    }

    pub(crate) fn at(question: &Question<'_>, heads: Heads) -> Result<Self> {
        require_whole_sequences(question.model, "the tokens that a feature came from")?;
        let site = |name: &str| format!("blocks.{}.attention.{name}", heads.block);
        let mut trace = Trace::new();
        for name in ["weights", "value", "mixed"] {
            trace = trace.capture(&site(name))?;
        }
        question
            .model
            .forward(question.input, question.pass(&trace))?;
        let first = |name: &str| -> Result<Tensor> {
            let value = trace.signal(&site(name))?.into_value();
            engine(engine(value.get(0))?.to_dtype(DType::F64))
        };
        let mixed = engine(first("mixed")?.to_vec2::<f64>())?;
        Ok(Self {
            heads,
            length: mixed.len(),
            weights: engine(first("weights")?.to_vec3::<f64>())?,
            values: engine(first("value")?.to_vec2::<f64>())?,
            mixed,
        })
    }

    /// Positions of the sequence.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Attention weights of one head from one position, by source.
    pub(crate) fn weights_from(&self, head: usize, position: usize) -> &[f64] {
        let of_head = self.weights.get(head).and_then(|rows| rows.get(position));
        of_head.map_or(&[], Vec::as_slice)
    }

    /// The value that a head reads at a source position.
    pub(crate) fn value(&self, head: usize, source: usize) -> &[f64] {
        let value = self.values.get(source).map_or(&[][..], Vec::as_slice);
        self.heads.part(self.heads.group(head), value)
    }

    /// Direct feature attribution: what each head at each source position adds to a feature at
    /// `position` before the nonlinearity. Exact, the attention weights given.
    ///
    /// # Errors
    /// When the feature or the position does not exist.
    pub fn attribute(
        &self,
        autoencoder: &Autoencoder,
        feature: usize,
        position: usize,
    ) -> Result<FeatureAttribution> {
        let Feature { encoder, bias, .. } = autoencoder.feature(feature)?;
        let Some(mixed) = self.mixed.get(position) else {
            return Err(Error::invalid(
                "position",
                position,
                format!("below {}", self.length),
            ));
        };
        let centre = numbers(autoencoder.weights().decoder_bias)?;
        let constant = bias - dot(&centre, &encoder);
        let of_head = |head: usize| -> Vec<f64> {
            let direction = self.heads.part(head, &encoder);
            let weights = self.weights_from(head, position).iter().enumerate();
            weights
                .map(|(source, weight)| weight * dot(self.value(head, source), direction))
                .collect()
        };
        Ok(FeatureAttribution {
            feature,
            position,
            preactivation: dot(mixed, &encoder) + constant,
            constant,
            by_head_and_source: (0..self.heads.heads).map(of_head).collect(),
        })
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The direct effect of a feature at `position` on the logits there, one number for each token:
/// what it writes through the output matrix of its attention goes straight to the final norm,
/// whose deviation is frozen, and to the output matrix. What it does through later parts is left
/// out.
///
/// # Errors
/// When the autoencoder does not read an attention layer's heads, or the model is no language
/// model, or the feature or position does not exist.
pub fn logit_effects(
    question: &Question<'_>,
    autoencoder: &Autoencoder,
    feature: usize,
    position: usize,
) -> Result<Vec<f64>> {
    Heads::of(question.model, autoencoder)?;
    let row = autoencoder.feature(feature)?.decoder;
    let space = StreamSpace::new(
        Partition::components(1),
        StreamRules {
            bias: BiasSplit::Extra,
            ..StreamRules::default()
        },
    );
    let reader = autoencoder.clone();
    let trace = Trace::new()
        .replace(autoencoder.site(), move |_, signal| {
            let value = signal.into_value();
            let written = written(&reader, feature, &row, &value)?;
            let rest = Signal::from((&value - &written).map_err(lapidary_kernels::Error::from)?);
            Signal::from(written)
                .into_whole_stream(&space, 0)?
                .add(&rest)
        })?
        .replace(
            "blocks.*.{attention,cross_attention,feedforward}.in",
            |_, signal| Ok(Signal::from(signal.into_value())),
        )?;
    let output = question
        .model
        .forward(question.input, question.pass(&trace))?;
    let logits = output.into_logits()?;
    let [_, length, _] = logits.dims() else {
        return Err(Error::invalid("model", "a classifier", "a language model"));
    };
    if position >= *length {
        return Err(Error::invalid(
            "position",
            position,
            format!("below {length}"),
        ));
    }
    let here = logits.narrow(0, 0, 1)?.narrow(1, position, 1)?;
    // [streams, 1, 1, vocabulary]
    numbers(&engine(here.contributions()?.narrow(0, 0, 1))?)
}

/// `f_i D_i` at every position of `value` `[batch, length, width]`.
fn written(
    autoencoder: &Autoencoder,
    feature: usize,
    row: &[f64],
    value: &Tensor,
) -> lapidary_kernels::Result<Tensor> {
    let features = autoencoder.encoded(value)?;
    let active = features.narrow(2, feature, 1)?.to_dtype(value.dtype())?;
    let row = Tensor::from_slice(row, (1, 1, row.len()), value.device())?;
    Ok(active.broadcast_mul(&row.to_dtype(value.dtype())?)?)
}
