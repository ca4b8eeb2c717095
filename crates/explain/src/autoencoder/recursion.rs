//! What the sources of a feature are made of.
//!
//! The value that a head reads at a source position is a linear function of the residual stream
//! there, once the norm's deviation is frozen. The residual stream is the sum of what the token,
//! its position and every earlier part wrote, so that each source's share of a feature splits
//! into theirs: the streams of [`lapidary_signal::streams`], with one stream for each part.

use super::attribution::{Attention, Heads};
use super::site::{SiteReader, block_of};
use super::{Autoencoder, numbers};
use crate::error::engine;
use crate::{Error, Question, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{AbsolutePosition, InputSpec, Model};
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules, StreamSpace};
use lapidary_signal::{Signal, Trace};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How what an earlier attention layer wrote is split.
#[derive(Clone, Debug)]
pub enum Split {
    /// One part for each head.
    Heads,
    /// One head's output by the source that it read from; the other heads as one part.
    Sources(usize),
    /// The features of that layer's own autoencoder: the most active ones each, the others, the
    /// autoencoder's bias, and its error.
    Features {
        /// The layer's autoencoder.
        autoencoder: Autoencoder,
        /// How many features are parts of their own.
        most: usize,
    },
    /// Not split: the layer's inputs are followed through its values, its weights frozen, so that
    /// earlier parts get what they wrote by way of this layer.
    Through,
}

/// Each part's share of each source's share of a feature.
#[derive(Clone, Debug, PartialEq)]
pub struct Components {
    /// What the parts are.
    pub labels: Vec<String>,
    /// `[part][source]`.
    pub scores: Vec<Vec<f64>>,
    /// What is split: the share of each source, as
    /// [`FeatureAttribution::by_source`](super::FeatureAttribution::by_source) gives it.
    pub parent: Vec<f64>,
}

impl Components {
    /// The sum of each part over sources.
    pub fn totals(&self) -> Vec<f64> {
        self.scores.iter().map(|part| part.iter().sum()).collect()
    }

    /// The largest `|Σ_parts − parent|` over sources: zero but for rounding.
    pub fn completeness_error(&self) -> f64 {
        let error = |(source, parent): (usize, &f64)| {
            let parts = self.scores.iter().filter_map(|part| part.get(source));
            (parts.sum::<f64>() - parent).abs()
        };
        self.parent
            .iter()
            .enumerate()
            .map(error)
            .fold(0.0, f64::max)
    }
}

/// Values that sum to what is written at a site, `[1, length, width]`, with their names.
type Parts = Vec<(String, Tensor)>;

/// Splits what each source adds to `feature` at `position` into the shares of what wrote to the
/// residual stream there: the token, its position, earlier attention layers as `splits` says
/// (heads where it says nothing), earlier feed-forward parts, and the biases on the way.
///
/// # Errors
/// As [`Attention::new`] and [`Attention::attribute`]; and when a split names a block that is not
/// earlier, or an autoencoder of another layer.
pub fn recursive_attribution(
    question: &Question<'_>,
    autoencoder: &Autoencoder,
    feature: usize,
    position: usize,
    splits: &BTreeMap<usize, Split>,
) -> Result<Components> {
    crate::error::require_one_stream(question.model, "recursive attribution")?;
    let heads = Heads::of(question.model, autoencoder)?;
    if let Some(late) = splits.keys().find(|block| **block >= heads.block) {
        let expected = format!("earlier than {}", heads.block);
        return Err(Error::invalid("block that is split", late, expected));
    }
    let attention = Attention::new(question, autoencoder)?;
    let parent = attention.attribute(autoencoder, feature, position)?;
    let writers = writers(question, heads.block, splits)?;
    let (value, mut labels) = followed(question, heads.block, writers)?;
    let encoder = autoencoder.feature(feature)?.encoder;
    labels.push("biases".to_owned());
    let mut scores = vec![vec![0.0; attention.length()]; labels.len()];
    for head in 0..heads.heads {
        let mut along = vec![0.0; heads.groups * heads.head_width];
        let start = heads.group(head) * heads.head_width;
        if let Some(place) = along.get_mut(start..start + heads.head_width) {
            place.copy_from_slice(heads.part(head, &encoder));
        }
        let along = engine(Tensor::new(along.as_slice(), value.device()))?;
        let along = engine(along.to_dtype(value.dtype()))?;
        // [streams, batch, length]
        let products = engine(value.contributions_along(&along)?.narrow(1, 0, 1))?;
        let products = numbers(&products)?;
        let weights = attention.weights_from(head, position);
        for (part, products) in scores
            .iter_mut()
            .zip(products.chunks(attention.length().max(1)))
        {
            for ((score, product), weight) in part.iter_mut().zip(products).zip(weights) {
                *score += weight * product;
            }
        }
    }
    Ok(Components {
        labels,
        scores,
        parent: parent.by_source(),
    })
}

/// A site whose value becomes one stream or several.
struct Writer {
    site: String,
    parts: Parts,
}

/// Everything that writes to the residual stream before `block`, in order.
fn writers(
    question: &Question<'_>,
    block: usize,
    splits: &BTreeMap<usize, Split>,
) -> Result<Vec<Writer>> {
    let specs = question.model.spec().expanded_blocks();
    if let Some(index) = specs.iter().take(block).position(|block| block.shortcuts) {
        return Err(Error::invalid(
            format!("shortcuts of block {index}"),
            true,
            "false: what was written must reach later blocks as it is",
        ));
    }
    let mut trace = Trace::new().capture("embeddings")?;
    for index in 0..block {
        for name in [
            "attention.mixed",
            "attention.out",
            "cross_attention.out",
            "feedforward.out",
        ] {
            trace = trace.capture(&format!("blocks.{index}.{name}"))?;
        }
    }
    question
        .model
        .forward(question.input, question.pass(&trace))?;
    let records = trace.records();
    let written = |site: &str| -> Result<Option<Tensor>> {
        let record = records.get(site);
        record
            .map(|record| engine(record.signal.value().narrow(0, 0, 1)))
            .transpose()
    };
    let mut writers = Vec::new();
    let mut push = |site: String, parts: Parts| writers.push(Writer { site, parts });
    if let Some(value) = written("embeddings")? {
        push("embeddings".to_owned(), embedding(question, value)?);
    }
    for index in 0..block {
        let mixed = format!("blocks.{index}.attention.mixed");
        match (splits.get(&index), written(&mixed)?) {
            (Some(Split::Through), _) => {}
            (Some(Split::Sources(head)), Some(value)) => {
                let parts = by_source(question, index, *head, &value)?;
                push(mixed, parts);
            }
            (Some(Split::Features { autoencoder, most }), Some(value)) => {
                let parts = by_feature(autoencoder, *most, index, &value)?;
                push(mixed, parts);
            }
            (_, Some(value)) => {
                let parts = by_head(question.model, index, &value)?;
                push(mixed, parts);
            }
            // A mixer that is no attention is one part.
            (_, None) => {
                let site = format!("blocks.{index}.attention.out");
                if let Some(value) = written(&site)? {
                    push(site, vec![(format!("mixer {index}"), value)]);
                }
            }
        }
        for name in ["cross_attention", "feedforward"] {
            let site = format!("blocks.{index}.{name}.out");
            if let Some(value) = written(&site)? {
                push(site, vec![(format!("{name} {index}"), value)]);
            }
        }
    }
    Ok(writers)
}

/// The token and its position, where they are added and nothing comes after.
fn embedding(question: &Question<'_>, value: Tensor) -> Result<Parts> {
    let whole = |value| vec![("embedding".to_owned(), value)];
    let InputSpec::Tokens(spec) = &question.model.spec().input else {
        return Ok(whole(value));
    };
    let AbsolutePosition::Learned {
        offset,
        skip_padding,
    } = spec.position
    else {
        return Ok(whole(value));
    };
    let table = question
        .model
        .parameters()
        .get("embeddings.positions.weight");
    let (Some(table), None, false) = (
        table,
        &spec.norm,
        skip_padding && question.padding.is_some(),
    ) else {
        return Ok(whole(value));
    };
    let length = engine(value.dim(1))?;
    let positions = engine(engine(table.narrow(0, offset, length))?.unsqueeze(0))?;
    let token = engine(&value - &positions)?;
    Ok(vec![
        ("token".to_owned(), token),
        ("position".to_owned(), positions),
    ])
}

fn by_head(model: &Model, block: usize, value: &Tensor) -> Result<Parts> {
    let heads = Heads::in_block(model, block)?;
    (0..heads.heads)
        .map(|head| {
            Ok((
                format!("head {block}.{head}"),
                only_head(&heads, head, value)?,
            ))
        })
        .collect()
}

/// The value with every other head's part zero.
fn only_head(heads: &Heads, head: usize, value: &Tensor) -> Result<Tensor> {
    let start = head * heads.head_width;
    let after = (heads.heads * heads.head_width).saturating_sub(start + heads.head_width);
    let part = engine(value.narrow(2, start, heads.head_width))?;
    engine(part.pad_with_zeros(2, start, after))
}

fn by_source(question: &Question<'_>, block: usize, head: usize, value: &Tensor) -> Result<Parts> {
    let heads = Heads::in_block(question.model, block)?;
    if head >= heads.heads {
        let expected = format!("below {}", heads.heads);
        return Err(Error::invalid(
            format!("head of block {block}"),
            head,
            expected,
        ));
    }
    let attention = Attention::at(question, heads)?;
    let width = heads.heads * heads.head_width;
    let start = head * heads.head_width;
    let mut parts = Vec::new();
    for source in 0..attention.length() {
        let mut moved = vec![0.0; attention.length() * width];
        for (position, row) in moved.chunks_exact_mut(width.max(1)).enumerate() {
            let weights = attention.weights_from(head, position);
            let weight = weights.get(source).copied().unwrap_or(0.0);
            let places = row.iter_mut().skip(start);
            for (place, v) in places.zip(attention.value(head, source)) {
                *place = weight * v;
            }
        }
        let shape = (1, attention.length(), width);
        let moved = engine(Tensor::from_vec(moved, shape, value.device()))?;
        let label = format!("head {block}.{head} from position {source}");
        parts.push((label, engine(moved.to_dtype(value.dtype()))?));
    }
    let others = engine(value - only_head(&heads, head, value)?)?;
    parts.push((format!("other heads of block {block}"), others));
    Ok(parts)
}

fn by_feature(
    autoencoder: &Autoencoder,
    most: usize,
    block: usize,
    value: &Tensor,
) -> Result<Parts> {
    if block_of(autoencoder.site()) != Some(block) || !autoencoder.site().ends_with(".mixed") {
        let expected = format!("blocks.{block}.attention.mixed");
        return Err(Error::invalid(
            "site of an earlier autoencoder",
            autoencoder.site(),
            expected,
        ));
    }
    let autoencoder = autoencoder.to_dtype(value.dtype())?;
    let features = autoencoder.encode(value)?;
    let largest = numbers(&engine(engine(features.max(1))?.squeeze(0))?)?;
    let mut order: Vec<usize> = (0..largest.len()).collect();
    order.retain(|feature| largest.get(*feature).is_some_and(|value| *value > 0.0));
    let of = |feature: &usize| largest.get(*feature).copied().unwrap_or(0.0);
    order.sort_by(|a, b| of(b).total_cmp(&of(a)));
    order.truncate(most);
    let mut parts = Vec::new();
    let reconstruction = autoencoder.decode(&features)?;
    let bias = engine(
        autoencoder
            .weights()
            .decoder_bias
            .broadcast_as(value.shape()),
    )?;
    let mut others = engine(&reconstruction - &bias)?;
    for feature in order {
        let active = engine(features.narrow(2, feature, 1))?;
        let row = engine(autoencoder.weights().decoder.narrow(0, feature, 1))?;
        let written = engine(active.broadcast_mul(&engine(row.unsqueeze(0))?))?;
        others = engine(others - &written)?;
        parts.push((format!("feature {block}.{feature}"), written));
    }
    parts.push((format!("other features of block {block}"), others));
    parts.push((
        format!("autoencoder bias of block {block}"),
        engine(bias.contiguous())?,
    ));
    let missed = engine(value - reconstruction)?;
    parts.push((format!("autoencoder error of block {block}"), missed));
    Ok(parts)
}

/// The values at `block`'s attention with each part as a stream, and the parts' names.
fn followed(
    question: &Question<'_>,
    block: usize,
    writers: Vec<Writer>,
) -> Result<(Signal, Vec<String>)> {
    let labels: Vec<String> = writers
        .iter()
        .flat_map(|writer| writer.parts.iter().map(|(label, _)| label.clone()))
        .collect();
    let rules = StreamRules {
        bias: BiasSplit::Extra,
        ..StreamRules::default()
    };
    let space = StreamSpace::new(Partition::components(labels.len()), rules);
    let split: Vec<String> = writers.iter().map(|writer| writer.site.clone()).collect();
    let mut trace = Trace::new();
    let mut stream = 0;
    for writer in writers {
        let first = stream;
        stream += writer.parts.len();
        trace = trace.replace(&writer.site, as_streams(space.clone(), first, writer.parts))?;
    }
    // Inside a part whose output is split, streams are of no use.
    for index in 0..block {
        for name in ["attention", "cross_attention", "feedforward"] {
            let path = format!("blocks.{index}.{name}");
            if split.iter().any(|site| site.starts_with(&path)) {
                trace = trace.replace(&format!("{path}.in"), |_, signal| {
                    Ok(Signal::from(signal.into_value()))
                })?;
            }
        }
    }
    let site = format!("blocks.{block}.attention.value");
    let last = format!("blocks.{block}.attention.mixed");
    let trace = trace
        .capture(&site)?
        // Nothing after it is asked for.
        .replace(&last, |_, signal| Ok(Signal::from(signal.into_value())))?;
    let reader = SiteReader::new(question.model, &site)?;
    reader.run(question, &trace)?;
    Ok((trace.signal(&site)?, labels))
}

/// A replacement by the sum of `parts`, each a stream from `first` on.
fn as_streams(
    space: Arc<StreamSpace>,
    first: usize,
    parts: Parts,
) -> impl Fn(&str, Signal) -> lapidary_signal::Result<Signal> + Send + Sync + 'static {
    move |_, signal| {
        let mut sum: Option<Signal> = None;
        for (index, (_, part)) in parts.iter().enumerate() {
            let part = Signal::from(part.clone()).into_whole_stream(&space, first + index)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => sum.add(&part)?,
            });
        }
        Ok(sum.unwrap_or(signal))
    }
}
