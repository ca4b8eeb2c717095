//! How attention mixes tokens, block by block: what methods that multiply mixings build on.
//!
//! With the attention weights `A` held fixed and the norm before it linearised, attention writes
//! at token `t` a sum of one vector for each token `j`
//!
//! ```text
//! T_t(x_j) = Σ_h A^h_tj F^h_j,   F^h_j = V^h_j W_O^h
//! ```
//!
//! where the value `V^h_j` has the biases of norm and value in it (rows of `A` sum to one, so
//! they are each token's own). [`Contributions`] says how much of the block's vector at `t` each
//! of these is.

mod contributions;
mod norm;
mod reading;

pub use contributions::{Contributions, rollout};
pub(crate) use contributions::{after, identity};
pub(crate) use norm::FixedNorm;
pub(crate) use reading::{Reading, dot};

use crate::error::engine;
use crate::{Error, Question, Result, Target};
use lapidary_kernels::{DType, Mixture, Tensor, VectorNorm, mixture_distances};
use lapidary_model::{HeadSpec, Input, Model, Output, Pass};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_signal::{Linear, Matrix, Trace, Weight};

/// A forward pass whose blocks can be taken apart.
pub(crate) struct Captured<'a> {
    model: &'a Model,
    specs: Vec<BlockSpec>,
    trace: Trace,
    output: Output,
    /// Whether the output has the scores of the last position alone.
    only_last: bool,
}

/// What applies where these methods do not.
const OTHERS: &str = "decompx, cp-lrp and gradient-x-input go through any part";

impl<'a> Captured<'a> {
    /// Runs the model on the question's input, for targets that read these positions.
    ///
    /// # Errors
    /// For a model that has other parts than self-attention to mix tokens, or attention without an output matrix of its
    /// own.
    pub(crate) fn new(question: &Question<'a>, targets: &[Target]) -> Result<Self> {
        crate::error::require_written_out(question.model, "mixings of tokens")?;
        crate::error::require_one_stream(question.model, "mixings of tokens")?;
        let specs = question.model.spec().expanded_blocks();
        for (index, block) in specs.iter().enumerate() {
            let attention = multi_head(index, block)?;
            if !attention.output.is_own() {
                return Err(Error::invalid(
                    format!("the output of attention in block {index}"),
                    attention.output.name(),
                    format!(
                        "own, whose matrix says what each head writes, in a block with a residual around each \
                         part; {OTHERS}"
                    ),
                ));
            }
            if attention.local.is_some() {
                return Err(Error::invalid(
                    format!("the attention of block {index}"),
                    "heads with a filter beside them",
                    format!("heads whose weights say all that they mix; {OTHERS}"),
                ));
            }
            if block.shortcuts {
                return Err(Error::invalid(
                    format!("block {index} of the model"),
                    "one with shortcuts",
                    format!("one whose residual is added as it is; {OTHERS}"),
                ));
            }
            if block.cross_attention.is_some() {
                return Err(Error::invalid(
                    format!("block {index} of the model"),
                    "one with cross-attention",
                    format!("one that mixes tokens by self-attention alone; {OTHERS}"),
                ));
            }
        }
        let trace = Trace::new()
            .capture("blocks.*.{in,out}")?
            .capture("blocks.*.attention.{weights,value}")?
            .tap("final_norm")?;
        let only_last = reads_only_last(question, targets);
        let output = question.model.forward(
            question.input,
            Pass {
                only_last,
                ..question.pass(&trace)
            },
        )?;
        Ok(Self {
            model: question.model,
            specs,
            trace,
            output,
            only_last,
        })
    }

    /// Number of blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.specs.len()
    }

    /// The spec of one block.
    pub(crate) fn spec(&self, index: usize) -> Result<&BlockSpec> {
        self.specs.get(index).ok_or_else(|| {
            let expected = format!("below {}", self.specs.len());
            Error::invalid("the index of a block", index, expected)
        })
    }

    pub(crate) fn model(&self) -> &'a Model {
        self.model
    }

    /// Where `target` reads the last vectors, and along what.
    pub(crate) fn reading(&self, target: &Target) -> Result<Reading> {
        let target = match *target {
            Target::Score { class, foil, .. } if self.only_last => Target::Score {
                class,
                foil,
                position: None,
            },
            other => other,
        };
        Reading::new(&target, &self.output, &self.trace)
    }

    /// `[tokens, features]` of the first sequence at a site.
    pub(crate) fn site(&self, site: &str) -> Result<Tensor> {
        engine(self.trace.signal(site)?.into_value().get(0))
    }

    /// What the last block writes, `[tokens, width]`.
    pub(crate) fn last(&self) -> Result<Tensor> {
        match self.blocks().checked_sub(1) {
            Some(last) => self.site(&format!("blocks.{last}.out")),
            None => Err(Error::invalid(
                "the model",
                "without blocks",
                "one with a block at least",
            )),
        }
    }

    /// One block's attention.
    pub(crate) fn attention(&self, index: usize) -> Result<Attention> {
        let spec = multi_head(index, self.spec(index)?)?;
        let (heads, groups) = (spec.heads, spec.groups());
        let width = self.model.spec().width;
        let value_width = spec.value_width(width);
        let path = format!("blocks.{index}.attention");
        // [heads, query, key]
        let weights = self.site(&format!("{path}.weights"))?;
        // [key, groups · value_width] -> [heads, key, value_width], head h reading its group
        let values = self.site(&format!("{path}.value"))?;
        let keys = engine(values.dim(0))?;
        let values = engine(values.reshape((keys, groups, value_width)))?;
        let values = engine(engine(values.transpose(0, 1))?.unsqueeze(1))?;
        let shape = (groups, heads / groups, keys, value_width);
        let values = engine(engine(values.broadcast_as(shape))?.contiguous())?;
        let values = engine(values.reshape((heads, keys, value_width)))?;
        // [width, heads · value_width] -> [heads, value_width, width]
        let output = linear(self.model, &format!("{path}.output"))?;
        let by_head = engine(engine(output.dense_weight()?.t())?.contiguous())?;
        let by_head = engine(by_head.reshape((heads, value_width, width)))?;
        Ok(Attention {
            weights,
            values,
            output: by_head,
            bias: output.bias().cloned(),
            read: self.site(&format!("blocks.{index}.in"))?,
            written: self.site(&format!("{path}.out"))?,
        })
    }

    /// What a block's feed-forward part writes, `[tokens, width]`; nothing where it has none.
    pub(crate) fn feedforward(&self, index: usize) -> Result<Option<Tensor>> {
        match self.spec(index)?.feedforward {
            Some(_) => Ok(Some(self.site(&format!("blocks.{index}.feedforward.out"))?)),
            None => Ok(None),
        }
    }
}

/// Whether a language model's scores of other positions than the last are of no use.
fn reads_only_last(question: &Question<'_>, targets: &[Target]) -> bool {
    let (HeadSpec::LanguageModel { .. }, Input::Tokens { ids, .. }) =
        (&question.model.spec().head, question.input)
    else {
        return false;
    };
    let last = ids.dims().last().and_then(|length| length.checked_sub(1));
    targets.iter().all(|target| match target {
        Target::Score { position, .. } => position.is_none() || *position == last,
        Target::Representation => false,
    })
}

fn multi_head(index: usize, block: &BlockSpec) -> Result<&MultiHeadSpec> {
    match &block.attention {
        MixerSpec::MultiHead(spec) => Ok(spec),
        other => Err(Error::invalid(
            format!("the mixer of block {index}"),
            other.kind(),
            format!("multi-head, whose weights can be read; {OTHERS}"),
        )),
    }
}

/// A linear layer of the model, by its path.
fn linear(model: &Model, path: &str) -> Result<Linear> {
    let find = |name: &str| model.parameters().get(&format!("{path}.{name}")).cloned();
    let weight = match (find("weight"), find("down"), find("up")) {
        (Some(weight), _, _) => Weight::dense(weight),
        (None, Some(down), Some(up)) => Weight::LowRank {
            down: Matrix::Dense(down),
            up: Matrix::Dense(up),
        },
        _ => {
            return Err(Error::invalid(
                format!("the linear layer {path}"),
                "absent",
                "one of the model's",
            ));
        }
    };
    Ok(Linear::from_weight(weight, find("bias"))?)
}

/// The attention of one block on one sequence.
pub(crate) struct Attention {
    /// `A`, `[heads, query, key]`.
    pub(crate) weights: Tensor,
    /// `V`, `[heads, key, value_width]`.
    pub(crate) values: Tensor,
    /// `W_O`, `[heads, value_width, width]`.
    pub(crate) output: Tensor,
    /// `b_O`, `[width]`.
    pub(crate) bias: Option<Tensor>,
    /// The block's input `x`, `[tokens, width]`.
    pub(crate) read: Tensor,
    /// What attention writes, `[tokens, width]`.
    pub(crate) written: Tensor,
}

/// Numbers of `F` that are laid out at one time.
const AT_ONCE: usize = 1 << 23;

impl Attention {
    /// `x + attention`, `[tokens, width]`.
    pub(crate) fn sum(&self) -> Result<Tensor> {
        engine(&self.read + &self.written)
    }

    /// `‖y_t − (S T_t(x_j) + [j = t] own_t)‖`, `[query, key]`, and `‖y_t‖`, `[query]`, for the
    /// references `y` `[tokens, width]` and a linear map `S` of what is at hand as `map` times
    /// the number `scale_t`.
    pub(crate) fn distances(
        &self,
        map: impl Fn(&Tensor) -> Result<Tensor>,
        scale: Option<&Tensor>,
        own: &Tensor,
        reference: &Tensor,
        norm: VectorNorm,
    ) -> Result<(Tensor, Tensor)> {
        let (heads, keys, _) = engine(self.values.dims3())?;
        let width = engine(self.output.dim(2))?;
        let weights = match scale {
            // [query, 1]
            Some(scale) => engine(self.weights.broadcast_mul(scale))?,
            None => self.weights.clone(),
        };
        let together = (AT_ONCE / (heads * width).max(1)).clamp(1, keys.max(1));
        let (mut distances, mut lengths) = (Vec::new(), None);
        for first in (0..keys).step_by(together) {
            let count = together.min(keys - first);
            let values = engine(engine(self.values.narrow(1, first, count))?.contiguous())?;
            let sources = map(&engine(values.matmul(&self.output))?)?;
            let mixture = Mixture {
                weights: &engine(weights.narrow(2, first, count))?,
                sources: &sources,
                own: Some(own),
                first,
            };
            let (some, length) = mixture_distances(mixture, reference, norm)?;
            distances.push(some);
            lengths = Some(length);
        }
        let lengths =
            lengths.ok_or_else(|| Error::invalid("the number of tokens", keys, "at least one"))?;
        Ok((engine(Tensor::cat(&distances, 1))?, lengths))
    }

    /// What each head writes along `direction` `[width]` at token `at` for each token, without
    /// the bias: `A^h_tj F^h_j · u`, by head.
    pub(crate) fn writes(&self, at: usize, direction: &[f64]) -> Result<Vec<Vec<f64>>> {
        let double = |tensor: &Tensor| engine(tensor.to_dtype(DType::F64));
        let column = engine(Tensor::from_slice(
            direction,
            (direction.len(), 1),
            self.output.device(),
        ))?;
        // [heads, value_width, width] · [width, 1] -> [heads, value_width, 1]
        let along = engine(double(&self.output)?.broadcast_matmul(&column))?;
        // [heads, key, value_width] · [heads, value_width, 1] -> [heads, key]
        let along = engine(double(&self.values)?.matmul(&along))?;
        let weights = double(&engine(self.weights.narrow(1, at, 1))?)?;
        let written = engine(engine(along.squeeze(2))?.mul(&engine(weights.squeeze(1))?))?;
        engine(written.to_vec2::<f64>())
    }
}
