//! The image embedding as a sum over layers, heads and tokens.
//!
//! With `x⁰` the class token's start, `A` the attention of the class token and `V` the values
//! (their bias included), the class token before the last norm is
//!
//! ```text
//! x = x⁰ + Σ_l Σ_h Σ_i (A^{lh}_i V^{lh}_i W_O^{lh} + b_O^l / (tokens · heads)) + Σ_l mlp_l
//! ```
//!
//! and the embedding `LN(x) P`, divided by its length. The norm's mean `μ`, its shift `β` and the
//! projection's bias belong to no term: each of the `T` terms (the start, each attention, each
//! feed-forward part) gets an equal share, attention splitting its own among heads and tokens.
//! `W_O diag(γ) P` of each head is made once, so that nothing of the size
//! `tokens × heads × width` is ever held.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::image_tower::{Frame, ImageTower, pixels_of};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{D, DType, Tensor, naive};
use lapidary_model::{Input, Pass};
use lapidary_signal::{Signal, Trace};

/// What one forward pass leaves behind, by block: only class rows, and the values of all tokens.
#[derive(Debug)]
struct Pieces {
    /// `[images, width]`.
    embeddings: Tensor,
    /// The attention of the class token, `[images, heads, tokens]`.
    weights: Vec<Tensor>,
    /// `[images, heads, tokens, head_width]`.
    values: Vec<Tensor>,
    /// `[images, width]`.
    feedforwards: Vec<Option<Tensor>>,
    /// The class token after the last block, `[images, width]`.
    last: Tensor,
}

/// How a frame's vectors are scaled, and what all entries share.
struct Scaling {
    /// `[images, 1]`.
    scale: Option<Tensor>,
    /// `[images, features]`.
    shared: Option<Tensor>,
}

/// The embeddings of some images as sums. Each method computes what it gives, and no more.
#[derive(Debug)]
pub struct Decomposition<'t, 'm> {
    tower: &'t ImageTower<'m>,
    pieces: Pieces,
    embeddings: Tensor,
    lengths: Tensor,
}

impl<'m> ImageTower<'m> {
    /// Runs the tower on `pixels` `[images, channels, height, width]`.
    ///
    /// # Errors
    /// When the pixels do not fit the model, or an embedding is zero or not finite.
    pub fn decompose(&self, pixels: &Tensor) -> Result<Decomposition<'_, 'm>> {
        let rows: Arc<Mutex<BTreeMap<String, Tensor>>> = Arc::default();
        let keep = |dimension: usize| {
            let rows = rows.clone();
            move |site: &str, signal: Signal| {
                let first = |value: &Tensor| {
                    value
                        .narrow(dimension, 0, 1)?
                        .squeeze(dimension)?
                        .force_contiguous()
                };
                let row = first(signal.value()).map_err(lapidary_kernels::Error::from)?;
                let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
                rows.insert(site.to_owned(), row);
                Ok(signal)
            }
        };
        let last = format!("blocks.{}.out", self.layers.len().saturating_sub(1));
        let trace = Trace::new()
            .replace("embeddings", keep(1))?
            .replace("blocks.*.attention.weights", keep(2))?
            .replace("blocks.*.feedforward.out", keep(1))?
            .replace(&last, keep(1))?
            .capture("blocks.*.attention.value")?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let input = Input::Pixels(pixels_of(self.model, pixels)?);
        let output = self.model.forward(&input, pass)?;
        let embedding = output.logits.or(output.pooled).ok_or_else(|| {
            Error::invalid("embedding of the model", "absent", "a pooled head's output")
        })?;
        let embedding = embedding.into_value().detach();
        let lengths = engine(engine(engine(embedding.sqr())?.sum_keepdim(1))?.sqrt())?;
        let all = engine(engine(lengths.to_dtype(DType::F64))?.flatten_all())?;
        for length in engine(all.to_vec1::<f64>())? {
            if !(length.is_finite() && length > 0.0) {
                let expected = "finite and above 0";
                return Err(Error::invalid("length of an embedding", length, expected));
            }
        }
        let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut row = |site: &str| {
            let missing = || Error::invalid(format!("site {site}"), "not written", "written");
            rows.remove(site).ok_or_else(missing)
        };
        let mut pieces = Pieces {
            embeddings: row("embeddings")?,
            weights: Vec::new(),
            values: Vec::new(),
            feedforwards: Vec::new(),
            last: row(&last)?,
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let site = |name: &str| format!("blocks.{index}.{name}");
            pieces.weights.push(row(&site("attention.weights"))?);
            let value = trace.signal(&site("attention.value"))?.into_value();
            let (images, tokens, _) = engine(value.dims3())?;
            let value = value.reshape((images, tokens, layer.groups, layer.head_width));
            let value = engine(engine(engine(value)?.transpose(1, 2))?.contiguous())?;
            let value = naive::repeat_groups(&value, layer.heads)?;
            pieces.values.push(value);
            pieces.feedforwards.push(match layer.feedforward {
                true => {
                    let written = row(&site("feedforward.out"))?;
                    Some(match &layer.feedforward_scale {
                        Some(scale) => engine(written.broadcast_mul(scale))?,
                        None => written,
                    })
                }
                false => None,
            });
        }
        Ok(Decomposition {
            tower: self,
            pieces,
            embeddings: engine(embedding.broadcast_div(&lengths))?,
            lengths,
        })
    }
}

impl<'t, 'm> Decomposition<'t, 'm> {
    /// The tower that was run.
    pub fn tower(&self) -> &'t ImageTower<'m> {
        self.tower
    }

    /// The embeddings as the model computes them, each of length one: `[images, features]`.
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    /// Lengths of the embeddings before they were made one: `[images, 1]`.
    pub fn lengths(&self) -> &Tensor {
        &self.lengths
    }

    /// What each component adds to the embedding of length one:
    /// `[images, components, features]`, in the order of [`ImageTower::components`].
    pub fn components(&self) -> Result<Tensor> {
        self.summed_over_tokens(&self.tower.embedding, &self.scaling()?)
    }

    /// What attention at each token adds to the embedding, summed over layers and heads:
    /// `[images, tokens, features]`, class tokens first.
    pub fn tokens(&self) -> Result<Tensor> {
        let scaling = self.scaling()?;
        let mut total: Option<Tensor> = None;
        for index in 0..self.tower.layers.len() {
            let moved = self.moved(index)?;
            let (images, heads, tokens, head_width) = engine(moved.dims4())?;
            let side_by_side = engine(engine(moved.transpose(1, 2))?.contiguous())?;
            let flat = engine(side_by_side.reshape((images * tokens, heads * head_width)))?;
            let matrix = of(&self.tower.embedding.layers, index)?;
            let written = engine(engine(flat.matmul(matrix))?.reshape((images, tokens, ())))?;
            let share = tokens as f64;
            let bias = of(&self.tower.embedding.biases, index)?;
            let written = add_rows(written, bias.as_ref(), 1.0 / share)?;
            let written = scaling.apply(written, 1.0 / (share * self.tower.terms() as f64))?;
            total = Some(match total {
                Some(total) => engine(total + written)?,
                None => written,
            });
        }
        total.ok_or_else(|| Error::invalid("blocks", "none", "at least one block"))
    }

    /// Every entry of one layer's attention: `[images, heads, tokens, features]`. The size of
    /// this is the reason for the other two: 13 MB for one image and layer of a ViT-L/14.
    pub fn entries(&self, layer: usize) -> Result<Tensor> {
        if layer >= self.tower.layers.len() {
            let expected = format!("below {}", self.tower.layers.len());
            return Err(Error::invalid("layer", layer, expected));
        }
        let moved = self.moved(layer)?;
        let (images, heads, tokens, head_width) = engine(moved.dims4())?;
        let by_head = engine(engine(moved.transpose(0, 1))?.contiguous())?;
        let by_head = engine(by_head.reshape((heads, images * tokens, head_width)))?;
        let matrix = per_head(of(&self.tower.embedding.layers, layer)?, heads)?;
        let written = engine(by_head.matmul(&matrix))?;
        let written = engine(written.reshape((heads, images, tokens, ())))?;
        let written = engine(engine(written.transpose(0, 1))?.contiguous())?;
        let features = engine(written.dim(D::Minus1))?;
        let flat = engine(written.reshape((images, heads * tokens, features)))?;
        let share = (heads * tokens) as f64;
        let bias = of(&self.tower.embedding.biases, layer)?;
        let flat = add_rows(flat, bias.as_ref(), 1.0 / share)?;
        let scaling = self.scaling()?;
        let flat = scaling.apply(flat, 1.0 / (share * self.tower.terms() as f64))?;
        engine(flat.reshape((images, heads, tokens, features)))
    }

    /// What each component wrote to the class token, before norm and projection
    /// (`[images, components, width]`), and the class token after the last block
    /// (`[images, width]`), which is their sum.
    pub fn residual(&self) -> Result<(Tensor, Tensor)> {
        let plain = Scaling {
            scale: None,
            shared: None,
        };
        let written = self.summed_over_tokens(&self.tower.residual()?, &plain)?;
        Ok((written, self.pieces.last.clone()))
    }

    /// `1 / (σ length)`, and `((β − μ/σ γ) P + b) / length`.
    fn scaling(&self) -> Result<Scaling> {
        let (mean, deviation) = self.tower.moments(&self.pieces.last)?;
        let centre = engine(engine(mean / &deviation)?.neg())?;
        let mut shared = engine(centre.matmul(&self.tower.ones))?;
        if let Some(offset) = &self.tower.offset {
            shared = engine(shared.broadcast_add(offset))?;
        }
        Ok(Scaling {
            scale: Some(engine(engine(deviation * &self.lengths)?.recip())?),
            shared: Some(engine(shared.broadcast_div(&self.lengths))?),
        })
    }

    /// `A_i V_i`, `[images, heads, tokens, head_width]`.
    fn moved(&self, layer: usize) -> Result<Tensor> {
        let weights = engine(of(&self.pieces.weights, layer)?.unsqueeze(3))?;
        engine(of(&self.pieces.values, layer)?.broadcast_mul(&weights))
    }

    /// `[images, components, features]` in a frame.
    fn summed_over_tokens(&self, frame: &Frame, scaling: &Scaling) -> Result<Tensor> {
        let share = 1.0 / self.tower.terms() as f64;
        let direct = |rows: &Tensor| {
            let written = engine(engine(rows.matmul(&frame.matrix))?.unsqueeze(1))?;
            scaling.apply(written, share)
        };
        let mut all = vec![direct(&self.pieces.embeddings)?];
        for (index, feedforward) in self.pieces.feedforwards.iter().enumerate() {
            // [images, heads, 1, tokens] · [images, heads, tokens, head_width]
            let weights = engine(of(&self.pieces.weights, index)?.unsqueeze(2))?;
            let mixed = engine(weights.matmul(of(&self.pieces.values, index)?))?;
            let mixed = engine(engine(mixed.squeeze(2))?.transpose(0, 1))?;
            let heads = engine(mixed.dim(0))?;
            let matrix = per_head(of(&frame.layers, index)?, heads)?;
            let written = engine(engine(mixed.contiguous())?.matmul(&matrix))?;
            let written = engine(engine(written.transpose(0, 1))?.contiguous())?;
            let bias = of(&frame.biases, index)?;
            let written = add_rows(written, bias.as_ref(), 1.0 / heads as f64)?;
            all.push(scaling.apply(written, share / heads as f64)?);
            if let Some(rows) = feedforward {
                all.push(direct(rows)?);
            }
        }
        engine(Tensor::cat(&all, 1))
    }
}

impl Scaling {
    /// Scales `entries` `[images, entries, features]` and gives each its share.
    fn apply(&self, entries: Tensor, share: f64) -> Result<Tensor> {
        let mut entries = entries;
        if let Some(scale) = &self.scale {
            entries = engine(entries.broadcast_mul(&engine(scale.unsqueeze(2))?))?;
        }
        if let Some(shared) = &self.shared {
            let shared = engine(engine(shared * share)?.unsqueeze(1))?;
            entries = engine(entries.broadcast_add(&shared))?;
        }
        Ok(entries)
    }
}

/// `[heads · head_width, features] -> [heads, head_width, features]`.
fn per_head(matrix: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, features) = engine(matrix.dims2())?;
    engine(matrix.reshape((heads, rows / heads.max(1), features)))
}

/// `entries + share · row`, for a row `[1, features]`.
fn add_rows(entries: Tensor, row: Option<&Tensor>, share: f64) -> Result<Tensor> {
    match row {
        Some(row) => engine(entries.broadcast_add(&engine(row * share)?)),
        None => Ok(entries),
    }
}

fn of<T>(list: &[T], layer: usize) -> Result<&T> {
    let missing = || Error::invalid("layer", layer, format!("below {}", list.len()));
    list.get(layer).ok_or_else(missing)
}
