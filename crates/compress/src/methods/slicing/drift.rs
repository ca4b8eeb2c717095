//! How far the stream of a narrower model is from the one that it stands for.

use lapidary_factor::matrix_to_tensor;
use lapidary_kernels::{D, DType, Device, Tensor};
use lapidary_model::{Model, ModelSpec};
use lapidary_parts::norm::NormSpec;
use serde::Serialize;

use super::layout::Layout;
use super::plan::Sliced;
use crate::error::engine;
use crate::observe::observe;
use crate::{CalibrationData, Error, Result};

/// The stream after one part of the narrower model beside the whole model's, the mean over tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Drift {
    /// The part that writes it, or `embeddings`.
    pub path: String,
    /// `‖h'‖ / ‖h‖`.
    pub length: f64,
    /// `cos(h' Qᵀ, h)`.
    pub cosine: f64,
}

impl Sliced {
    /// Compares the stream with that of `whole`, the model that was cut, on `data`, site by site:
    /// `h'` in the basis of its site with `h`, the mean taken out where norms ignore it.
    ///
    /// # Errors
    /// When `whole` is not the model that was cut.
    pub fn drift(&self, whole: &Model, data: &CalibrationData, batch: usize) -> Result<Vec<Drift>> {
        let layout = Layout::of(whole.spec(), "a narrower stream")?;
        let centring = matches!(whole.spec().final_norm, Some(NormSpec::Layer { .. }));
        let theirs = streams(whole, data, batch)?;
        let ours = streams(&self.model, data, batch)?;
        let shared = self.bases.len() == 1;
        let mut drifts = Vec::new();
        for (site, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
            let index = if shared { 0 } else { site };
            let basis = self
                .bases
                .get(index)
                .ok_or_else(|| Error::invalid("model", "of other sites", "the one that was cut"))?;
            let basis = matrix_to_tensor(basis.as_ref(), DType::F64, &Device::Cpu)?;
            let back = engine(ours.matmul(&engine(engine(basis.t())?.contiguous())?))?;
            let mut original = theirs.clone();
            if centring {
                let mean = engine(original.mean_keepdim(D::Minus1))?;
                original = engine(original.broadcast_sub(&mean))?;
            }
            let (a, b) = (lengths(&original)?, lengths(&back)?);
            let products = engine(engine(&original * &back)?.sum(D::Minus1))?;
            drifts.push(Drift {
                path: layout.writer(site).to_owned(),
                length: mean(&engine(&b / &a)?)?,
                cosine: mean(&engine(products / engine(&a * &b)?)?)?,
            });
        }
        Ok(drifts)
    }
}

fn lengths(x: &Tensor) -> Result<Tensor> {
    engine(engine(engine(x.sqr())?.sum(D::Minus1))?.sqrt())
}

fn mean(x: &Tensor) -> Result<f64> {
    engine(engine(x.mean_all())?.to_scalar::<f64>())
}

/// The stream at every site, `[tokens, width]` in `f64`: between the parts of a block it is the
/// residual, behind its shortcut, and what attention wrote.
fn streams(model: &Model, data: &CalibrationData, batch: usize) -> Result<Vec<Tensor>> {
    let blocks = model.spec().expanded_blocks().len();
    let mut wanted = vec!["embeddings".to_owned()];
    for index in 0..blocks {
        wanted.push(format!("blocks.{index}.attention.out"));
        wanted.push(format!("blocks.{index}.out"));
    }
    let mut found: Vec<Vec<Tensor>> = vec![Vec::new(); sites(model.spec())];
    observe(model, data, batch, &wanted, |seen| {
        let rows = |site: &str| engine(seen.rows(site)?.to_dtype(DType::F64));
        let mut stream = rows("embeddings")?;
        let mut all = vec![stream.clone()];
        for (index, block) in model.spec().expanded_blocks().iter().enumerate() {
            if has_middle(block) {
                let residual = match shortcut(model, index)? {
                    Some(map) => engine(stream.matmul(&map))?,
                    None => stream,
                };
                all.push(engine(
                    residual + rows(&format!("blocks.{index}.attention.out"))?,
                )?);
            }
            stream = rows(&format!("blocks.{index}.out"))?;
            all.push(stream.clone());
        }
        for (found, rows) in found.iter_mut().zip(all) {
            found.push(rows);
        }
        Ok(())
    })?;
    found
        .iter()
        .map(|rows| engine(Tensor::cat(rows, 0)))
        .collect()
}

/// `S` of `h S`, `[width, width]`.
fn shortcut(model: &Model, block: usize) -> Result<Option<Tensor>> {
    let name = format!("blocks.{block}.attention_shortcut.weight");
    let Some(stored) = model.parameters().get(&name) else {
        return Ok(None);
    };
    let stored = engine(stored.detach().to_dtype(DType::F64))?;
    Ok(Some(engine(engine(stored.t())?.contiguous())?))
}

/// Whether there is a site between the parts of a block.
fn has_middle(block: &lapidary_parts::block::BlockSpec) -> bool {
    block.feedforward.is_some() && block.wiring != lapidary_parts::block::Wiring::Parallel
}

fn sites(spec: &ModelSpec) -> usize {
    let blocks = spec.expanded_blocks();
    1 + blocks.len() + blocks.iter().filter(|block| has_middle(block)).count()
}
