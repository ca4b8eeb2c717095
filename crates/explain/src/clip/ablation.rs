//! Entries replaced by their means, and the classifier that is left.

use super::image_tower::{Component, ImageTower};
use super::zero_shot::ZeroShot;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use std::collections::BTreeSet;

/// A mean over a data set that is never held as a whole, in `f64`.
#[derive(Clone, Debug, Default)]
pub struct StreamingMean {
    sum: Option<Tensor>,
    count: usize,
}

impl StreamingMean {
    /// Adds the rows of `batch` `[rows, ..]`.
    ///
    /// # Errors
    /// When the shape behind the rows is another than before.
    pub fn add(&mut self, batch: &Tensor) -> Result<()> {
        let sum = engine(engine(batch.detach().to_dtype(DType::F64))?.sum(0))?;
        self.count += engine(batch.dim(0))?;
        self.sum = Some(match self.sum.take() {
            Some(earlier) if earlier.dims() != sum.dims() => {
                let expected = format!("{:?}", earlier.dims());
                let found = format!("{:?}", sum.dims());
                return Err(Error::invalid("shape of a row", found, expected));
            }
            Some(earlier) => engine(earlier + sum)?,
            None => sum,
        });
        Ok(())
    }

    /// Rows so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The mean of a row, in `f64`.
    ///
    /// # Errors
    /// When there were no rows.
    pub fn mean(&self) -> Result<Tensor> {
        match &self.sum {
            Some(sum) if self.count > 0 => engine(sum / self.count as f64),
            _ => Err(Error::invalid("rows of a mean", 0, "at least 1")),
        }
    }
}

/// Embeddings `[images, features]` whose entries are summed again, those of `ablated` replaced by
/// their means. `entries` `[images, entries, features]` may be components, tokens, or the entries
/// of a layer side by side; `means` is `[entries, features]`.
///
/// # Errors
/// When the shapes do not go together.
pub fn mean_ablated(entries: &Tensor, means: &Tensor, ablated: &[bool]) -> Result<Tensor> {
    let (images, count, features) = engine(entries.dims3())?;
    if means.dims() != [count, features] || ablated.len() != count {
        let found = format!("{:?} with {} marks", means.dims(), ablated.len());
        let expected = format!("[{count}, {features}] with {count} marks");
        return Err(Error::invalid("shape of the means", found, expected));
    }
    let mask = |wanted: bool| {
        let marks = ablated
            .iter()
            .map(|mark| f64::from(u8::from(*mark == wanted)))
            .collect();
        let mask = engine(Tensor::from_vec(marks, (1, count), entries.device()))?;
        engine(mask.to_dtype(entries.dtype()))
    };
    let kept = engine(engine(mask(false)?.broadcast_left(images))?.contiguous())?;
    let kept = engine(engine(kept.matmul(entries))?.squeeze(1))?;
    let means = engine(means.to_dtype(entries.dtype()))?;
    engine(kept.broadcast_add(&engine(mask(true)?.matmul(&means))?))
}

/// What the paper ablates to rid a classifier of a spurious cue: the start, every feed-forward
/// part, attention of all but the last `keep_layers` layers, and the named heads.
pub fn spurious_edit(
    tower: &ImageTower<'_>,
    keep_layers: usize,
    heads: &[Component],
) -> Vec<Component> {
    let first_kept = tower.depth().saturating_sub(keep_layers);
    let goes = |component: &Component| match component {
        Component::Embeddings | Component::Feedforward { .. } => true,
        Component::Head { layer, .. } => *layer < first_kept || heads.contains(component),
    };
    tower.components().iter().copied().filter(goes).collect()
}

/// A zero-shot classifier some of whose components say the same of every image.
#[derive(Debug)]
pub struct EditedClassifier<'t, 'm> {
    tower: &'t ImageTower<'m>,
    classes: ZeroShot,
    means: Tensor,
    ablated: Vec<bool>,
}

impl<'t, 'm> EditedClassifier<'t, 'm> {
    /// `means` `[components, features]` over the data set on which the components are to be
    /// replaced.
    ///
    /// # Errors
    /// When the tower lacks one of the components, or the means do not fit.
    pub fn new(
        tower: &'t ImageTower<'m>,
        classes: ZeroShot,
        means: Tensor,
        ablated: &[Component],
    ) -> Result<Self> {
        let indices = ablated
            .iter()
            .map(|component| tower.index_of(*component))
            .collect::<Result<BTreeSet<_>>>()?;
        let count = tower.components().len();
        if engine(means.dims2())?.0 != count {
            let found = format!("{:?}", means.dims());
            let expected = format!("[{count}, features]");
            return Err(Error::invalid("shape of the means", found, expected));
        }
        Ok(Self {
            tower,
            classes,
            means,
            ablated: (0..count).map(|index| indices.contains(&index)).collect(),
        })
    }

    /// The edited embeddings of `pixels`, `[images, features]`; not of length one.
    pub fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let components = self.tower.decompose(pixels)?.components()?;
        mean_ablated(&components, &self.means, &self.ablated)
    }

    /// The class of each image.
    pub fn classify(&self, pixels: &Tensor) -> Result<Vec<usize>> {
        self.classes.classify(&self.embed(pixels)?)
    }
}
