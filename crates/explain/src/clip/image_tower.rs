//! The image tower: which models can be decomposed, and the matrices that carry what a part
//! writes into the space of the embeddings.

use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{HeadSpec, InputSpec, Model, Pool};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::norm::NormSpec;
use serde::Serialize;

/// One entry of the sum that an image embedding is, its tokens summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Component {
    /// The class token before the first block.
    Embeddings,
    /// A head of attention.
    Head {
        /// Index of the block.
        layer: usize,
        /// Index of the head.
        head: usize,
    },
    /// A feed-forward part.
    Feedforward {
        /// Index of the block.
        layer: usize,
    },
}

impl std::fmt::Display for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embeddings => f.write_str("embeddings"),
            Self::Head { layer, head } => write!(f, "{layer}.{head}"),
            Self::Feedforward { layer } => write!(f, "feedforward {layer}"),
        }
    }
}

/// What attention of one block needs to be followed.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) heads: usize,
    pub(super) groups: usize,
    /// Features of a value of a head.
    pub(super) head_width: usize,
    /// `W_Oᵀ`, `[heads · head_width, width]`.
    pub(super) output: Tensor,
    /// `b_O`, `[width]`.
    pub(super) bias: Option<Tensor>,
    pub(super) feedforward: bool,
    /// Of what the feed-forward part writes, `[width]`; that of attention is in `output` and `bias`.
    pub(super) feedforward_scale: Option<Tensor>,
}

/// The norm before the projection.
#[derive(Debug)]
pub(super) enum LastNorm {
    /// Centres, and divides by `√(var + ε)`.
    Layer(f64),
    /// Divides by `√(mean square + ε)`.
    Rms(f64),
    None,
}

/// A linear map from the residual stream, and what each head's values become under it.
#[derive(Debug)]
pub(super) struct Frame {
    /// `[width, features]`.
    pub(super) matrix: Tensor,
    /// `W_Oᵀ · matrix` of each layer, `[heads · head_width, features]`.
    pub(super) layers: Vec<Tensor>,
    /// `b_O · matrix` of each layer, `[1, features]`.
    pub(super) biases: Vec<Option<Tensor>>,
}

impl Frame {
    fn new(matrix: Tensor, layers: &[Layer]) -> Result<Self> {
        let mut frame = Self {
            matrix,
            layers: Vec::new(),
            biases: Vec::new(),
        };
        for layer in layers {
            let output = engine(layer.output.matmul(&frame.matrix))?;
            frame.layers.push(output);
            frame.biases.push(match &layer.bias {
                Some(bias) => Some(engine(engine(bias.unsqueeze(0))?.matmul(&frame.matrix))?),
                None => None,
            });
        }
        Ok(frame)
    }
}

/// A vision tower whose embedding is read at its class token: CLIP's, and any ViT without layers
/// between the class token and a linear map.
#[derive(Debug)]
pub struct ImageTower<'a> {
    pub(super) model: &'a Model,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: LastNorm,
    /// `x ↦ (γ ⊙ x) P`: the norm's scale and the projection.
    pub(super) embedding: Frame,
    /// `γ P`: what a vector of ones becomes, `[1, features]`.
    pub(super) ones: Tensor,
    /// `β P`, and the projection's bias, `[1, features]`.
    pub(super) offset: Option<Tensor>,
    components: Vec<Component>,
    class_tokens: usize,
    grid: [usize; 2],
}

impl<'a> ImageTower<'a> {
    /// Looks at a model as an image tower.
    ///
    /// # Errors
    /// When the class token is not a sum of what the parts wrote (norms after the sums), or
    /// something not linear stands between it and the embedding; the message names the field.
    pub fn new(model: &'a Model) -> Result<Self> {
        let spec = model.spec();
        if model.shares_weights() {
            let expected = "false: written out (Model::written_out)";
            return Err(Error::invalid("blocks.shared", true, expected));
        }
        let InputSpec::Patches(patches) = &spec.input else {
            return Err(Error::invalid("input", "tokens", "patches: an image tower"));
        };
        if patches.class_tokens == 0 {
            return Err(Error::invalid("input.class_tokens", 0, "at least 1"));
        }
        let HeadSpec::Pooled {
            pool,
            norm,
            hidden,
            labels,
            ..
        } = &spec.head
        else {
            let expected = "pooled: the embedding is read at the class token";
            return Err(Error::invalid("head.kind", "another", expected));
        };
        if *pool != Pool::First {
            let found = format!("{pool:?}");
            return Err(Error::invalid("head.pool", found, "first: the class token"));
        }
        if hidden.is_some() {
            let expected = "absent: what follows the class token must be linear";
            return Err(Error::invalid("head.hidden", "given", expected));
        }
        let real = |norm: &Option<NormSpec>| norm.filter(|norm| *norm != NormSpec::None);
        let (path, norm) = match (real(&spec.final_norm), real(norm)) {
            (Some(_), Some(_)) => {
                let expected = "absent beside final_norm: one norm before the projection";
                return Err(Error::invalid("head.norm", "given", expected));
            }
            (Some(norm), None) => ("final_norm", norm),
            (None, Some(norm)) => ("head.norm", norm),
            (None, None) => ("", NormSpec::None),
        };
        let blocks = spec.expanded_blocks();
        if blocks.is_empty() {
            return Err(Error::invalid("blocks", "none", "at least one block"));
        }
        let layers = blocks
            .iter()
            .enumerate()
            .map(|(index, block)| layer(model, index, block))
            .collect::<Result<Vec<_>>>()?;

        // γ P and β P; without a projection the embedding is the normed class token.
        let mut matrix = match labels {
            Some(_) => engine(dense(model, "head.output")?.t())?,
            None => engine(Tensor::eye(spec.width, model.dtype(), &model.device()))?,
        };
        let optional = |name: &str| model.parameters().get(name).cloned();
        let mut offset = optional("head.output.bias");
        if let Some(shift) = optional(&format!("{path}.bias")) {
            let shift = engine(engine(engine(shift.unsqueeze(0))?.matmul(&matrix))?.squeeze(0))?;
            offset = Some(match offset {
                Some(offset) => engine(offset + shift)?,
                None => shift,
            });
        }
        if let Some(scale) = optional(&format!("{path}.weight")) {
            matrix = engine(matrix.broadcast_mul(&engine(scale.unsqueeze(1))?))?;
        }
        let mut components = vec![Component::Embeddings];
        for (index, layer) in layers.iter().enumerate() {
            let heads = (0..layer.heads).map(|head| Component::Head { layer: index, head });
            components.extend(heads);
            if layer.feedforward {
                components.push(Component::Feedforward { layer: index });
            }
        }
        let side = |pixels: usize| pixels / patches.patch.max(1);
        Ok(Self {
            model,
            norm: match norm {
                NormSpec::Layer { epsilon } => LastNorm::Layer(epsilon),
                NormSpec::Rms { epsilon } => LastNorm::Rms(epsilon),
                NormSpec::None => LastNorm::None,
            },
            ones: engine(matrix.sum_keepdim(0))?,
            offset: match offset {
                Some(offset) => Some(engine(offset.unsqueeze(0))?),
                None => None,
            },
            embedding: Frame::new(engine(matrix.contiguous())?, &layers)?,
            layers,
            components,
            class_tokens: patches.class_tokens,
            grid: patches.image.map(side),
        })
    }

    /// The model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// The entries of [`Decomposition::components`](super::Decomposition::components), in order.
    pub fn components(&self) -> &[Component] {
        &self.components
    }

    /// Which component it is, in the order of [`ImageTower::components`].
    ///
    /// # Errors
    /// When the model has no such component.
    pub fn index_of(&self, component: Component) -> Result<usize> {
        let found = self.components.iter().position(|one| *one == component);
        found.ok_or_else(|| {
            let heads: Vec<_> = self.layers.iter().map(|layer| layer.heads).collect();
            let expected = format!(
                "layer.head with a layer below {} and a head of it ({heads:?} heads)",
                heads.len()
            );
            Error::invalid("component", component, expected)
        })
    }

    /// Number of blocks.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Features of a head of one layer: the rank of what the head writes.
    pub fn head_width(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |layer| layer.head_width)
    }

    /// Tokens before the patches: the class token and registers.
    pub fn class_tokens(&self) -> usize {
        self.class_tokens
    }

    /// Rows and columns of patches.
    pub fn grid(&self) -> [usize; 2] {
        self.grid
    }

    /// Terms that share what belongs to none: the start, and the parts of each layer.
    pub(super) fn terms(&self) -> usize {
        let parts = |layer: &Layer| 1 + usize::from(layer.feedforward);
        1 + self.layers.iter().map(parts).sum::<usize>()
    }

    /// The residual stream itself.
    pub(super) fn residual(&self) -> Result<Frame> {
        let (dtype, device) = (self.model.dtype(), self.model.device());
        let identity = engine(Tensor::eye(self.model.spec().width, dtype, &device))?;
        Frame::new(identity, &self.layers)
    }

    /// Mean `μ` and deviation `σ` of the class rows `[images, width]`, each `[images, 1]`.
    pub(super) fn moments(&self, rows: &Tensor) -> Result<(Tensor, Tensor)> {
        let mean = engine(rows.mean_keepdim(1))?;
        let none = engine(mean.zeros_like())?;
        let root = |square: Tensor, epsilon: f64| engine(engine(square + epsilon)?.sqrt());
        match self.norm {
            LastNorm::Layer(epsilon) => {
                let centred = engine(rows.broadcast_sub(&mean))?;
                let variance = engine(engine(centred.sqr())?.mean_keepdim(1))?;
                Ok((mean, root(variance, epsilon)?))
            }
            LastNorm::Rms(epsilon) => {
                let square = engine(engine(rows.sqr())?.mean_keepdim(1))?;
                Ok((none, root(square, epsilon)?))
            }
            LastNorm::None => Ok((none, engine(mean.ones_like())?)),
        }
    }
}

/// Layer scales multiply the entries: `ls_1` what heads write, `ls_2` what feed-forward parts do.
fn layer(model: &Model, index: usize, block: &BlockSpec) -> Result<Layer> {
    let field = |name: &str| format!("blocks.{index}.{name}");
    if !block.wiring.adds() {
        let expected = "pre-norm or parallel: a norm after the sum mixes what was written";
        return Err(Error::invalid(
            field("wiring"),
            block.wiring.name(),
            expected,
        ));
    }
    if block.shortcuts {
        let expected = "false: what a layer writes must reach the output as it is";
        return Err(Error::invalid(field("shortcuts"), true, expected));
    }
    if block.cross_attention.is_some() {
        return Err(Error::invalid(field("cross_attention"), "given", "absent"));
    }
    let MixerSpec::MultiHead(attention) = &block.attention else {
        let found = block.attention.kind();
        return Err(Error::invalid(field("attention"), found, "multi-head"));
    };
    if let Some(found) = attention.peculiarity()
        && (attention.local.is_some() || !attention.output.is_own())
    {
        let expected =
            "heads that write by a matrix of their own what their weights say that they mix";
        return Err(Error::invalid(field("attention"), found, expected));
    }
    let get = |name: &str| model.parameters().get(&field(name)).cloned();
    let scale = get("attention_scale.weight");
    let mut output = dense(model, &field("attention.output"))?;
    let mut bias = get("attention.output.bias");
    if let Some(scale) = &scale {
        output = engine(output.broadcast_mul(&engine(scale.unsqueeze(1))?))?;
        bias = bias.map(|bias| engine(bias * scale)).transpose()?;
    }
    Ok(Layer {
        heads: attention.heads,
        groups: attention.groups(),
        head_width: attention.value_width(model.spec().width),
        output: engine(engine(output.t())?.contiguous())?,
        bias,
        feedforward: block.feedforward.is_some(),
        feedforward_scale: get("feedforward_scale.weight"),
    })
}

/// The matrix `[output, input]` of the linear layer at `path`, factors multiplied out.
fn dense(model: &Model, path: &str) -> Result<Tensor> {
    let get = |name: &str| model.parameters().get(&format!("{path}.{name}"));
    match (get("weight"), get("down"), get("up")) {
        (Some(weight), ..) => Ok(weight.clone()),
        (None, Some(down), Some(up)) => engine(up.matmul(down)),
        _ => Err(Error::invalid(
            format!("parameter {path}.weight"),
            "missing",
            "there",
        )),
    }
}

/// Pixels in the model's type.
pub(super) fn pixels_of(model: &Model, pixels: &Tensor) -> Result<Tensor> {
    let dtype: DType = model.dtype();
    engine(pixels.to_dtype(dtype))
}
