//! Every matrix in new bases, given one for each site or one for all.

use lapidary_factor::{Matrix, matrix_to_tensor};
use lapidary_kernels::{DType, Device, Tensor, matmul};
use lapidary_model::ModelSpec;
use lapidary_parts::norm::NormSpec;

use super::fold::{Folding, folded_spec};
use crate::edit::Edit;
use crate::error::engine;
use crate::{Error, Result};

/// Bases of the stream, each `[width, narrower]` with orthonormal columns.
#[derive(Clone, Debug)]
pub(super) enum Bases {
    /// One for all sites: shortcuts are the identity and left out.
    Shared(Matrix),
    /// One for each site.
    PerSite(Vec<Matrix>),
}

impl Bases {
    fn at(&self, site: usize) -> Result<&Matrix> {
        let found = match self {
            Self::Shared(basis) => Some(basis),
            Self::PerSite(bases) => bases.get(site),
        };
        found.ok_or_else(|| {
            Error::invalid(
                format!("basis of site {site}"),
                "absent",
                "one for each site",
            )
        })
    }
}

/// The spec of a model whose stream is cut to `width`.
pub(super) fn cut_spec(spec: &ModelSpec, width: usize, shortcuts: bool) -> ModelSpec {
    let mut cut = folded_spec(spec);
    let ratio = spec.width as f64 / width.max(1) as f64;
    cut.width = width;
    for block in &mut cut.blocks {
        block.norm = rescaled(block.norm, ratio);
        block.shortcuts = shortcuts;
    }
    cut.final_norm = cut.final_norm.map(|norm| rescaled(norm, ratio));
    cut
}

/// The epsilon that goes with a mean over fewer features.
fn rescaled(norm: NormSpec, ratio: f64) -> NormSpec {
    match norm {
        NormSpec::Rms { epsilon } => NormSpec::Rms {
            epsilon: epsilon * ratio,
        },
        other => other,
    }
}

/// Gives a model these bases as it is folded, and each part `dtype` as soon as it has them.
pub(super) fn cut(folding: Folding<'_>, bases: &Bases, dtype: DType) -> Result<Edit> {
    let basis = |site: usize| -> Result<Tensor> {
        let basis = bases.at(site)?;
        Ok(matrix_to_tensor(basis.as_ref(), DType::F64, &Device::Cpu)?)
    };
    let layout = folding.layout();
    let wide = folding.original().width;
    let narrow = bases.at(0)?.ncols();
    let mut cut_blocks = Vec::with_capacity(folding.original().blocks.len());
    for index in 0..folding.original().blocks.len() {
        let mut block = folding.block(index)?;
        for part in layout.parts_of(index) {
            let (from, to) = (basis(part.from)?, basis(part.to)?);
            for reader in &part.readers {
                read_in(&mut block, reader, &from)?;
            }
            for writer in &part.writers {
                write_in(&mut block, writer, &to)?;
            }
            regain(&mut block, &part.norm, wide, narrow)?;
            for layer in part.readers.iter().chain(&part.writers) {
                block.round(layer, dtype)?;
            }
        }
        cut_blocks.push(block);
    }
    let shortcuts = matches!(bases, Bases::PerSite(_));
    let spec = cut_spec(folding.original(), narrow, shortcuts);
    let mut edit = folding.into_edit();
    for (index, block) in cut_blocks.into_iter().enumerate() {
        edit.replace(&format!("blocks.{index}"), block);
    }
    let first = basis(0)?;
    for table in &layout.tables {
        let rows = edit.get(table)?;
        edit.put(*table, &matmul(&rows, &first)?)?;
    }
    if let Some(embedding) = layout.embedding {
        write_in(&mut edit, embedding, &first)?;
    }
    let last = basis(layout.last())?;
    for reader in &layout.head {
        read_in(&mut edit, reader, &last)?;
    }
    regain(&mut edit, "final_norm", wide, narrow)?;
    if shortcuts {
        for shortcut in &layout.shortcuts {
            // h S with S = Q_fromᵀ Q_to; stored as [output, input], its transpose.
            let to = basis(shortcut.to)?;
            let stored = matmul(&engine(to.t())?, &basis(shortcut.from)?)?;
            edit.put(format!("{}.weight", shortcut.path), &stored)?;
        }
    }
    edit.spec = spec;
    Ok(edit)
}

/// `W ← W Q`.
fn read_in(edit: &mut Edit, layer: &str, basis: &Tensor) -> Result<()> {
    let name = format!("{layer}.weight");
    let weight = edit.get(&name)?;
    edit.put(name, &matmul(&weight, basis)?)
}

/// `W ← Qᵀ W`, `b ← b Q`.
fn write_in(edit: &mut Edit, layer: &str, basis: &Tensor) -> Result<()> {
    let transposed = engine(basis.t())?;
    let name = format!("{layer}.weight");
    let weight = edit.get(&name)?;
    edit.put(name, &matmul(&transposed, &weight)?)?;
    let name = format!("{layer}.bias");
    if let Some(bias) = edit.find(&name)? {
        let row = engine(engine(bias.unsqueeze(0))?.matmul(basis))?;
        edit.put(name, &engine(row.squeeze(0))?)?;
    }
    Ok(())
}

/// The gain `√(D/d)` that makes a mean over `d` features one over `D`; nothing for no norm.
fn regain(edit: &mut Edit, path: &str, from: usize, to: usize) -> Result<()> {
    let name = format!("{path}.weight");
    if edit.find(&name)?.is_some() {
        let gain = (from as f64 / to as f64).sqrt();
        let gains = engine(Tensor::full(gain, to, &Device::Cpu))?;
        edit.put(name, &gains)?;
    }
    Ok(())
}
