//! Weights read, set to zero and written back, and what they would take without their zeros.

use lapidary_kernels::{DType, Device, SparseSizes, Tensor};
use lapidary_model::Model;

use crate::edit::Edit;
use crate::error::engine;
use crate::plan::{Change, ModulePlan};
use crate::report::ModuleReport;
use crate::{Error, Layer, Result, Selection};

/// The chosen layers that hold a matrix of their own, and those that do not.
pub(super) fn chosen(model: &Model, selection: &Selection) -> Result<(Vec<Layer>, Vec<Layer>)> {
    let layers = selection.chosen(model)?;
    let (dense, factorised): (Vec<_>, Vec<_>) =
        layers.into_iter().partition(|layer| layer.rank.is_none());
    match dense.is_empty() {
        false => Ok((dense, factorised)),
        true => Err(Error::invalid(
            "chosen layers that are not factorised",
            0,
            "at least one; multiply factors out first, or choose layers that no factorisation took",
        )),
    }
}

/// The module of a plan for a layer.
pub(super) fn planned(layer: &Layer, change: Change) -> ModulePlan {
    ModulePlan {
        path: layer.path.clone(),
        input: layer.input,
        output: layer.output,
        change,
    }
}

/// The modules of layers that stay since they are factorised.
pub(super) fn left(factorised: &[Layer]) -> impl Iterator<Item = ModulePlan> {
    factorised.iter().map(|layer| {
        let reason = "it is factorised: multiply it out first".to_owned();
        planned(layer, Change::Leave { reason })
    })
}

/// The layer that a module of a plan is about, and the share of it that goes; none where it stays.
pub(super) fn asked(model: &Model, module: &ModulePlan) -> Result<Option<(Layer, f64)>> {
    let layers = Layer::all(model);
    let layer = layers.into_iter().find(|layer| {
        (layer.path.as_str(), layer.input, layer.output)
            == (module.path.as_str(), module.input, module.output)
    });
    let layer = layer.ok_or_else(|| {
        Error::invalid(
            "plan",
            format!(
                "for {} of shape {}×{}",
                module.path, module.output, module.input
            ),
            "one that was made for this model",
        )
    })?;
    match module.change {
        Change::Leave { .. } => Ok(None),
        Change::Prune { share } if (0.0..=1.0).contains(&share) && layer.rank.is_none() => {
            Ok(Some((layer, share)))
        }
        ref other => Err(Error::invalid(
            format!("change of {}", module.path),
            format!("{other:?}"),
            "leave, or prune a share between 0 and 1 of a layer that is not factorised",
        )),
    }
}

/// A layer's weights `[output, input]`, row after row.
pub(super) fn read(edit: &Edit, layer: &Layer) -> Result<Vec<f64>> {
    entries(layer, &edit.get(&Layer::weight_name(&layer.path))?)
}

/// Puts a layer's weights back.
pub(super) fn write(edit: &mut Edit, layer: &Layer, weights: Vec<f64>) -> Result<()> {
    let weight = laid_out(layer, weights, &edit.device())?;
    edit.put(Layer::weight_name(&layer.path), &weight)
}

/// The entries of a tensor that lies as a layer's weight does: `[output, input]`, row after row.
pub(super) fn entries(layer: &Layer, tensor: &Tensor) -> Result<Vec<f64>> {
    let mut tensor = engine(tensor.detach().to_dtype(DType::F64))?;
    if layer.is_table() {
        tensor = engine(tensor.t())?;
    }
    let tensor = engine(engine(tensor.to_device(&Device::Cpu))?.flatten_all())?;
    engine(tensor.to_vec1::<f64>())
}

/// The tensor, in `f64`, of entries `[output, input]` that lies as a layer's weight does.
pub(super) fn laid_out(layer: &Layer, entries: Vec<f64>, device: &Device) -> Result<Tensor> {
    let tensor = engine(Tensor::from_vec(
        entries,
        (layer.output, layer.input),
        device,
    ))?;
    match layer.is_table() {
        true => engine(engine(tensor.t())?.contiguous()),
        false => Ok(tensor),
    }
}

/// What became of a layer whose weights are now these, and what they take, each of `value` bytes.
pub(super) fn report(
    module: &ModulePlan,
    weights: &[f64],
    value: usize,
) -> (ModuleReport, SparseSizes) {
    let entries = weights.iter().filter(|weight| **weight != 0.0).count();
    let fits = weights
        .chunks(module.input.max(1))
        .flat_map(|row| row.chunks(4))
        .all(|four| four.iter().filter(|weight| **weight != 0.0).count() <= 2);
    let sizes = SparseSizes::of(module.output, module.input, entries, value, fits);
    let report = ModuleReport {
        note: Some(stored(&sizes)),
        ..ModuleReport::new(module, weights.len(), entries)
    };
    (report, sizes)
}

/// What all matrices take together.
pub(super) fn together(all: &[SparseSizes]) -> SparseSizes {
    let none = SparseSizes {
        two_of_four: Some(0),
        ..SparseSizes::default()
    };
    all.iter().fold(none, |sum, one| SparseSizes {
        dense: sum.dense + one.dense,
        bitmap: sum.bitmap + one.bitmap,
        csr: sum.csr + one.csr,
        two_of_four: sum.two_of_four.zip(one.two_of_four).map(|(a, b)| a + b),
    })
}

/// What matrices that are stored with their zeros would take without them.
pub(super) fn stored(sizes: &SparseSizes) -> String {
    let mut text = format!(
        "stored dense, {} bytes; as bitmap {}, as CSR {}",
        sizes.dense, sizes.bitmap, sizes.csr
    );
    if let Some(pairs) = sizes.two_of_four {
        text += &format!(", as 2 of 4 {pairs}");
    }
    text
}
