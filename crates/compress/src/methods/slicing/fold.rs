//! Norms without gain and without mean: `x √D / ‖x‖` and nothing else.
//!
//! A layer norm is `γ (x − mean x)/√(var x + ε) + β`. The mean is taken out of whatever writes the
//! stream, so that the variance is the mean square; gain and bias go into the layers that read:
//!
//! ```text
//! E ← E − rowmean E,   W_out ← W_out − (mean over outputs),   b_out ← b_out − mean b_out
//! b_in ← b_in + W_in β,   W_in ← W_in diag(γ)
//! ```

use lapidary_kernels::{DType, Tensor};
use lapidary_model::{HeadSpec, InputSpec, Model, ModelSpec};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::norm::NormSpec;

use super::layout::Layout;
use crate::Result;
use crate::edit::Edit;
use crate::error::engine;

/// The table of the embeddings.
const TABLE: &str = "embeddings.tokens.weight";

/// A spec whose norms can be folded: widths inside the parts written out, the head untied, biases
/// where a layer norm has one.
pub(super) fn folded_spec(spec: &ModelSpec) -> ModelSpec {
    let width = spec.width;
    let mut blocks = spec.expanded_blocks();
    for block in &mut blocks {
        let biased = matches!(block.norm, NormSpec::Layer { .. });
        match &mut block.attention {
            MixerSpec::MultiHead(attention) => {
                attention.head_width = Some(attention.head_width(width));
                attention.output_bias = Some(attention.output_bias.unwrap_or(attention.bias));
                attention.bias |= biased;
            }
            MixerSpec::Mamba(mamba) => {
                mamba.step_rank = Some(mamba.step_rank(width));
                mamba.inner = Some(mamba.inner(width));
                mamba.bias |= biased;
            }
            MixerSpec::Mamba2(mamba) => {
                mamba.inner = Some(mamba.inner(width));
                mamba.bias |= biased;
            }
            MixerSpec::Wavelet(_) | MixerSpec::Absent => {}
        }
        match &mut block.feedforward {
            Some(FeedforwardSpec::Dense(dense)) => dense.bias |= biased,
            Some(FeedforwardSpec::Gated(gated)) => gated.bias |= biased,
            Some(FeedforwardSpec::Linear(map)) => map.bias |= biased,
            Some(FeedforwardSpec::Mixture(_) | FeedforwardSpec::SparseCode(_)) | None => {}
        }
        block.norm = without_mean(block.norm);
    }
    let centred = matches!(spec.final_norm, Some(NormSpec::Layer { .. }));
    let mut head = spec.head.clone();
    match &mut head {
        HeadSpec::LanguageModel { tied, bias, .. } => {
            *tied &= projected(spec);
            *bias |= centred;
        }
        HeadSpec::Pooled { bias, .. } => *bias |= centred,
        // Its output has a bias.
        HeadSpec::Pixels | HeadSpec::None => {}
    }
    ModelSpec {
        blocks,
        head,
        final_norm: spec.final_norm.map(without_mean),
        ..spec.clone()
    }
}

/// Whether the head reads the stream through a projection of its own, so that its output matrix
/// has nothing to do with the stream's basis.
fn projected(spec: &ModelSpec) -> bool {
    match &spec.input {
        InputSpec::Tokens(tokens) => tokens.embedding_width.is_some(),
        InputSpec::Patches(_) => false,
    }
}

fn without_mean(norm: NormSpec) -> NormSpec {
    match norm {
        NormSpec::Layer { epsilon } => NormSpec::Rms { epsilon },
        other => other,
    }
}

/// A model whose norms are folded in `f64`: the same scores. What stands outside the blocks is folded at once, a block
/// when it is asked for, so that memory holds one of them twice and not the whole model.
pub(super) struct Folding<'a> {
    layout: &'a Layout,
    original: ModelSpec,
    /// The folded spec; of the parameters those outside the blocks are folded.
    edit: Edit,
}

impl<'a> Folding<'a> {
    pub(super) fn of(model: &Model, layout: &'a Layout) -> Result<Self> {
        let mut edit = Edit::wide(model);
        let original = edit.spec.clone();
        edit.spec = folded_spec(&original);
        if let HeadSpec::LanguageModel { tied: true, .. } = original.head
            && !projected(&original)
        {
            let table = edit.get(TABLE)?;
            edit.put("head.output.weight", &table)?;
        }
        if centred(&original) {
            for table in &layout.tables {
                let rows = edit.get(table)?;
                edit.put(*table, &without(&rows, 1)?)?;
            }
            if let Some(writer) = layout.embedding {
                centre(&mut edit, writer)?;
            }
        }
        let norm = original.final_norm.unwrap_or(NormSpec::None);
        match layout.head.as_slice() {
            ["head.projection"] => fold_projection(&mut edit, &norm)?,
            readers => fold(&mut edit, &norm, "final_norm", readers)?,
        }
        Ok(Self {
            layout,
            original,
            edit,
        })
    }

    /// The folded spec.
    pub(super) fn spec(&self) -> &ModelSpec {
        &self.edit.spec
    }

    /// The spec as it was, its blocks written out.
    pub(super) fn original(&self) -> &ModelSpec {
        &self.original
    }

    /// Who reads and who writes the stream.
    pub(super) fn layout(&self) -> &'a Layout {
        self.layout
    }

    /// What stands outside the blocks, by name.
    pub(super) fn outside(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        let parameters = self.edit.parameters.iter();
        parameters.filter(|(name, _)| !name.starts_with("blocks."))
    }

    /// One block, folded.
    pub(super) fn block(&self, index: usize) -> Result<Edit> {
        let path = format!("blocks.{index}");
        let mut edit = self.edit.part(&path);
        let norm = self.original.blocks.get(index).map(|block| block.norm);
        let norm = norm.unwrap_or(NormSpec::None);
        for part in self.layout.parts_of(index) {
            if centred(&self.original) {
                for writer in &part.writers {
                    centre(&mut edit, writer)?;
                }
            }
            fold(&mut edit, &norm, &part.norm, &part.readers)?;
            // A bias that the spec asks for and nothing gave.
            for writer in &part.writers {
                ensure_bias(&mut edit, writer, &part.path)?;
            }
        }
        Ok(edit)
    }

    /// The parameters, to be changed further: what stands outside the blocks is folded.
    pub(super) fn into_edit(self) -> Edit {
        self.edit
    }
}

/// Whether every norm takes the mean out of the stream, so that nothing need write it.
fn centred(original: &ModelSpec) -> bool {
    matches!(original.final_norm, Some(NormSpec::Layer { .. }))
}

/// The same model with parameters of another type.
pub(super) fn in_type(model: &Model, dtype: DType) -> Result<Model> {
    let mut parameters = std::collections::BTreeMap::new();
    for (name, tensor) in model.parameters() {
        let tensor = engine(tensor.detach().to_dtype(dtype))?;
        parameters.insert(name.clone(), tensor);
    }
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}

/// Takes the mean over outputs out of a layer that writes the stream.
fn centre(edit: &mut Edit, writer: &str) -> Result<()> {
    let name = format!("{writer}.weight");
    let weight = edit.get(&name)?;
    edit.put(name, &without(&weight, 0)?)?;
    let name = format!("{writer}.bias");
    if let Some(bias) = edit.find(&name)? {
        edit.put(name, &without(&bias, 0)?)?;
    }
    Ok(())
}

/// `x − mean x` along a dimension.
fn without(x: &Tensor, dimension: usize) -> Result<Tensor> {
    engine(x.broadcast_sub(&engine(x.mean_keepdim(dimension))?))
}

/// Puts gain and bias of a norm into the linear layers that read what it gives.
fn fold<S: AsRef<str>>(edit: &mut Edit, norm: &NormSpec, path: &str, readers: &[S]) -> Result<()> {
    if *norm == NormSpec::None {
        return Ok(());
    }
    let gain = edit.get(&format!("{path}.weight"))?;
    let shift = edit.find(&format!("{path}.bias"))?;
    for reader in readers {
        let reader = reader.as_ref();
        let name = format!("{reader}.weight");
        let weight = edit.get(&name)?;
        if let Some(shift) = &shift {
            let constant = product(&weight, shift)?;
            add_bias(edit, reader, &constant)?;
        }
        edit.put(name, &engine(weight.broadcast_mul(&gain))?)?;
    }
    plain(edit, path, &gain)
}

/// The head of a model whose output matrix `T` is narrower than the stream reads through a
/// projection `P` without bias: the scores are `T P (γ ⊙ n + β)`, and `T P β` is a bias of theirs.
fn fold_projection(edit: &mut Edit, norm: &NormSpec) -> Result<()> {
    const PATH: &str = "head.projection.weight";
    if *norm == NormSpec::None {
        return Ok(());
    }
    let gain = edit.get("final_norm.weight")?;
    let projection = edit.get(PATH)?;
    if let Some(shift) = edit.find("final_norm.bias")? {
        let output = match edit.find("head.output.weight")? {
            Some(output) => output,
            None => edit.get(TABLE)?,
        };
        let constant = product(&output, &product(&projection, &shift)?)?;
        add_bias(edit, "head.output", &constant)?;
    }
    edit.put(PATH, &engine(projection.broadcast_mul(&gain))?)?;
    plain(edit, "final_norm", &gain)
}

/// A norm that has become an RMS norm without gain.
fn plain(edit: &mut Edit, path: &str, gain: &Tensor) -> Result<()> {
    edit.put(format!("{path}.weight"), &engine(gain.ones_like())?)?;
    edit.parameters.remove(&format!("{path}.bias"));
    Ok(())
}

fn add_bias(edit: &mut Edit, layer: &str, constant: &Tensor) -> Result<()> {
    let name = format!("{layer}.bias");
    let bias = match edit.find(&name)? {
        Some(bias) => engine(bias + constant)?,
        None => constant.clone(),
    };
    edit.put(name, &bias)
}

/// Zeros for a writer's bias, where the spec has come to ask for one.
fn ensure_bias(edit: &mut Edit, writer: &str, part: &str) -> Result<()> {
    let Some((index, name)) = crate::edit::block_of(part) else {
        return Ok(());
    };
    let block = edit.block(index)?;
    let wanted = match (name, &block.attention, &block.feedforward) {
        ("attention", MixerSpec::MultiHead(attention), _) => {
            attention.output_bias.unwrap_or(attention.bias)
        }
        ("attention", MixerSpec::Mamba(mamba), _) => mamba.bias,
        ("attention", MixerSpec::Mamba2(mamba), _) => mamba.bias,
        (_, _, Some(FeedforwardSpec::Dense(dense))) => dense.bias,
        (_, _, Some(FeedforwardSpec::Gated(gated))) => gated.bias,
        _ => false,
    };
    let name = format!("{writer}.bias");
    if wanted && edit.find(&name)?.is_none() {
        let weight = edit.get(&format!("{writer}.weight"))?;
        let zeros = engine(engine(weight.narrow(1, 0, 1))?.squeeze(1))?;
        edit.put(name, &engine(zeros.zeros_like())?)?;
    }
    Ok(())
}

/// `W v` for `W` `[output, input]`, `v` `[input]`.
fn product(weight: &Tensor, vector: &Tensor) -> Result<Tensor> {
    let column = engine(vector.unsqueeze(1))?;
    engine(engine(weight.matmul(&column))?.squeeze(1))
}
