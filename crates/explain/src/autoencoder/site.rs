//! Reading one site of a model, at no more cost than what comes before it.

use crate::error::engine;
use crate::{Error, Question, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{HeadSpec, Input, Model, ModelSpec, Pass};
use lapidary_signal::Trace;
use std::borrow::Borrow;

/// Index of the block that a site `blocks.N…` is in.
pub(crate) fn block_of(site: &str) -> Option<usize> {
    site.strip_prefix("blocks.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// A model as far as one site.
#[derive(Debug)]
pub struct SiteReader<'a> {
    whole: &'a Model,
    cut: Option<Model>,
    site: String,
}

impl<'a> SiteReader<'a> {
    /// A reader of `site`. Blocks after the site's, and the head, are left off.
    ///
    /// # Errors
    /// When the site names a block that the model does not have.
    pub fn new(model: &'a Model, site: &str) -> Result<Self> {
        // Where tokens are organised above the blocks, these are not left off one by one.
        let cut = match block_of(site) {
            Some(block) if model.spec().organisation.is_none() => Some(up_to(model, block, site)?),
            _ => None,
        };
        Ok(Self {
            whole: model,
            cut,
            site: site.to_owned(),
        })
    }

    /// What is written at the site for sequences of one length, `[batch, length, width]`.
    ///
    /// # Errors
    /// When the model fails or writes no such site.
    pub fn read(&self, windows: &[impl Borrow<[u32]>]) -> Result<Tensor> {
        let model = self.cut.as_ref().unwrap_or(self.whole);
        let trace = Trace::new().capture(&self.site)?;
        let pass = Pass {
            trace: Some(&trace),
            only_last: true,
            ..Pass::default()
        };
        model.forward(&Input::tokens(batch(self.whole, windows)?), pass)?;
        Ok(trace.signal(&self.site)?.into_value())
    }

    /// Runs the part of the model that is kept on a question's input.
    pub(crate) fn run(&self, question: &Question<'_>, trace: &Trace) -> Result<()> {
        let model = self.cut.as_ref().unwrap_or(self.whole);
        model.forward(question.input, question.pass(trace))?;
        Ok(())
    }

    /// Width of the site.
    pub fn width(&self) -> Result<usize> {
        let value = self.read(&[[0u32].as_slice()])?;
        Ok(value.dims().last().copied().unwrap_or(0))
    }
}

/// The model up to and with one block. After an attention site, the block's feed-forward part is
/// left off too.
fn up_to(model: &Model, block: usize, site: &str) -> Result<Model> {
    let mut blocks = model.spec().expanded_blocks();
    if block >= blocks.len() {
        let expected = format!("in one of the model's {} blocks", blocks.len());
        return Err(Error::invalid("site", site, expected));
    }
    blocks.truncate(block + 1);
    if site.contains(".attention.")
        && let Some(last) = blocks.last_mut()
    {
        last.feedforward = None;
    }
    let mut spec = ModelSpec {
        blocks,
        final_norm: None,
        head: HeadSpec::None,
        ..model.spec().clone()
    };
    let without = format!("blocks.{block}.feedforward");
    let has_feedforward = spec
        .blocks
        .last()
        .is_some_and(|last| last.feedforward.is_some());
    let stays = |path: &str| match block_of(path) {
        Some(of) => of < block || of == block && (has_feedforward || !path.starts_with(&without)),
        None => path.starts_with("embeddings"),
    };
    spec.low_rank.retain(|path, _| stays(path));
    spec.quantised.retain(|name, _| stays(name));
    Ok(Model::new(spec, &mut model.parameters().clone())?)
}

/// Sequences of one length as ids `[batch, length]`.
pub(crate) fn batch(model: &Model, windows: &[impl Borrow<[u32]>]) -> Result<Tensor> {
    let length = windows.first().map_or(0, |window| window.borrow().len());
    let mut ids = Vec::with_capacity(windows.len() * length);
    for window in windows {
        let window = window.borrow();
        if window.len() != length || length == 0 {
            let expected = format!("{} as in the first, and at least 1", length.max(1));
            return Err(Error::invalid("tokens of a window", window.len(), expected));
        }
        ids.extend_from_slice(window);
    }
    engine(Tensor::from_vec(
        ids,
        (windows.len(), length),
        &model.device(),
    ))
}

/// Groups of neighbours of equal length, at most `tokens` tokens (and at least one window) each.
pub(crate) fn groups<W: Borrow<[u32]>>(windows: &[W], tokens: usize) -> Vec<&[W]> {
    let mut groups = Vec::new();
    let mut rest = windows;
    while let Some(first) = rest.first() {
        let length = first.borrow().len();
        let most = (tokens / length.max(1)).max(1);
        let alike = rest
            .iter()
            .take(most)
            .take_while(|window| (*window).borrow().len() == length)
            .count();
        let (group, after) = rest.split_at(alike);
        groups.push(group);
        rest = after;
    }
    groups
}

/// Rows of a value `[.., width]` as `f32`.
pub(crate) fn rows(value: &Tensor) -> Result<(usize, Vec<f32>)> {
    let width = value.dims().last().copied().unwrap_or(0);
    let flat = engine(engine(value.to_dtype(DType::F32))?.flatten_all())?;
    Ok((width, engine(flat.to_vec1::<f32>())?))
}
