//! A spec with its parameters: something that runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::head::{Head, Scorer};
use crate::initial::Beginning;
use crate::input::{Embedding, Input};
use crate::source::{Initialiser, Recorder};
use crate::spec::{HeadSpec, ModelSpec};
use lapidary_kernels::{DType, Device, QuantisedMatrix, Recomputation, Tensor, Var};
use lapidary_parts::block::Block;
use lapidary_parts::norm::Norm;
use lapidary_parts::organisation::{Organisation, Organised, Read, Surroundings};
use lapidary_parts::parameters::{LinearInfo, ParameterSource, Parameters};
use lapidary_parts::position::SharedBiases;
use lapidary_parts::recomputed::recomputed;
use lapidary_parts::state::DecodeState;
use lapidary_parts::{Context, Error, Result};
use lapidary_signal::{KeptColumns, Matrix, Signal, Trace};

/// A model: a spec, its named parameters, and the modules built from both.
///
/// A model is never changed in place. What alters weights or structure (training aside, which
/// updates the variables) makes a new spec and a new map of parameters and builds a new model.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    dtype: DType,
    parameters: BTreeMap<String, Tensor>,
    variables: BTreeMap<String, Var>,
    linears: Vec<LinearInfo>,
    embedding: Embedding,
    blocks: Vec<Arc<Block>>,
    organisation: Option<Organisation>,
    final_norm: Norm,
    head: Arc<Head>,
}

/// How one forward pass is run.
#[derive(Default)]
pub struct Pass<'a> {
    /// `[batch, length]` in `u8`, 1 = a real token; with a decode state it covers the earlier
    /// tokens too.
    pub padding: Option<&'a Tensor>,
    /// Sites to capture, replace or tap.
    pub trace: Option<&'a Trace>,
    /// Seed of dropout; evaluation when absent.
    pub dropout_seed: Option<u64>,
    /// Seed of what mixers draw anew in this pass; their own draw, always the same, when `None`.
    pub draw: Option<u64>,
    /// The step of training that this pass is part of, for draws that last several steps.
    pub step: Option<u64>,
    /// In a pass that draws: from 0, where mixers see the subsets of keys that their specs say, to 1, where
    /// they see all.
    pub annealing: f64,
    /// What was decoded before; updated.
    pub state: Option<&'a mut DecodeState>,
    /// Scores of the last position only.
    pub only_last: bool,
    /// What cross-attention reads, and its padding.
    pub memory: Option<(&'a Signal, Option<&'a Tensor>)>,
    /// Begin at this block with what flows into it, `[batch, length, width]`, as an earlier pass
    /// found it: embeddings and earlier blocks are not run. Not together with a decode state.
    pub start: Option<(usize, &'a Signal)>,
    /// Patches that are seen, `[batch, patches]` in `u8`, 1 = seen; a learned token stands for the
    /// others. All are when absent.
    pub visible: Option<&'a Tensor>,
    /// Remember only what flows between blocks, and recompute the rest in the backward pass. For
    /// training: not together with a trace, a decode state or a memory.
    pub recomputation: Option<&'a Recomputation>,
}

/// What a model gives.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[batch, length, width]`, after the final norm; of [`ModelSpec::read_width`].
    pub hidden: Signal,
    /// `[batch, width]`, for heads that pool.
    pub pooled: Option<Signal>,
    /// `[batch, length, vocabulary]` or `[batch, labels]`.
    pub logits: Option<Signal>,
    /// `[batch, patches, channels · patch²]`, for heads that give pixels.
    pub pixels: Option<Signal>,
}

impl Output {
    /// The scores; an error for a model without a head.
    pub fn into_logits(self) -> Result<Signal> {
        self.logits
            .ok_or_else(|| Error::spec("head", "none", "one that gives scores"))
    }
}

impl Model {
    /// Builds a model whose parameters come from `source`.
    pub fn new(spec: ModelSpec, source: &mut dyn ParameterSource) -> Result<Self> {
        Self::build(spec, source, false)
    }

    /// Builds a model whose parameters can be trained: each becomes a variable.
    pub fn trainable(spec: ModelSpec, source: &mut dyn ParameterSource) -> Result<Self> {
        Self::build(spec, source, true)
    }

    /// Builds a model with initial values from a seed.
    ///
    /// # Errors
    /// When the spec is invalid, or has more parameters than are made for anybody
    /// ([`ModelSpec::check_can_be_made`]).
    pub fn initialised(spec: ModelSpec, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        spec.check_can_be_made()?;
        Self::new(spec, &mut Initialiser::new(seed, dtype, device.clone()))
    }

    fn build(spec: ModelSpec, source: &mut dyn ParameterSource, trainable: bool) -> Result<Self> {
        spec.validate()?;
        let mut source = Beginning::new(source, &spec);
        let mut recorder = Recorder::new(&mut source, trainable);
        let mut linears = Vec::new();
        let ranks = spec.low_rank.clone();
        let width = spec.width;
        let quantised = spec.quantised.clone();
        let mut root =
            Parameters::new(&mut recorder, &ranks, &mut linears).with_quantised(&quantised);
        let embedding = Embedding::new(&spec.input, width, root.at("embeddings"))?;
        let mut blocks = Vec::new();
        for block in &spec.blocks {
            let first = blocks.len();
            for index in first..first + block.repeat {
                let mut all = root.at("blocks");
                let own = all.at(index);
                let own = match block.shared && index > first {
                    true => own.shared_with(format!("blocks.{first}")),
                    false => own,
                };
                blocks.push(Arc::new(Block::new(block, width, own)?));
            }
        }
        let organisation = match &spec.organisation {
            None => None,
            Some(organisation) => {
                let model = Surroundings {
                    blocks: &spec.expanded_blocks(),
                    width,
                    length: spec.length(),
                };
                let own = root.at("organisation");
                Some(Organisation::new(organisation, &model, own)?)
            }
        };
        let read = spec.read_width();
        let final_norm = match &spec.final_norm {
            Some(norm) => Norm::new(norm, read, root.at("final_norm"))?,
            None => Norm::None,
        };
        let head = Head::new(&spec.head, [width, read], &embedding, root)?;
        let known: BTreeSet<&str> = linears.iter().map(|linear| linear.path.as_str()).collect();
        if let Some(unknown) = ranks.keys().find(|path| !known.contains(path.as_str())) {
            return Err(Error::spec(
                format!("low_rank.{unknown}"),
                "no such layer",
                "the path of a linear layer",
            ));
        }
        let dtype = recorder.dtype();
        let Recorder {
            parameters,
            variables,
            ..
        } = recorder;
        let absent = |name: &&String| !parameters.contains_key(&format!("{name}.codes"));
        if let Some(unknown) = quantised.keys().find(absent) {
            return Err(Error::spec(
                format!("quantised.{unknown}"),
                "no such matrix",
                "the weight of a linear layer, or a factor of it",
            ));
        }
        Ok(Self {
            spec,
            dtype,
            parameters,
            variables,
            linears,
            embedding,
            blocks,
            organisation,
            final_norm,
            head: Arc::new(head),
        })
    }

    /// The same model with every quantised matrix as numbers.
    pub fn dequantised(&self) -> Result<Self> {
        let mut spec = self.spec.clone();
        let mut parameters = self.parameters.clone();
        for (name, form) in std::mem::take(&mut spec.quantised) {
            let mut take = |part: &str| parameters.remove(&format!("{name}.{part}"));
            let (codes, scales) = (take("codes"), take("scales"));
            let (minima, input_scale) = (take("minima"), take("input_scale"));
            let kept = take("columns").zip(take("kept"));
            let (Some(codes), Some(scales)) = (codes, scales) else {
                return Err(Error::spec(
                    name,
                    "absent",
                    "a quantised matrix of the model",
                ));
            };
            let weight = QuantisedMatrix::new(form.bits, form.group, codes, scales, minima)?;
            let kept = match kept {
                Some((index, weights)) => {
                    let kept = KeptColumns::new(index, weights, weight.input());
                    Some(kept.map_err(lapidary_parts::Error::from)?)
                }
                None => None,
            };
            let matrix = Matrix::Quantised {
                weight,
                input_scale,
                kept,
                dtype: self.dtype,
            };
            let weight = matrix.dense().map_err(lapidary_parts::Error::from)?;
            parameters.insert(name, weight);
        }
        Self::new(spec, &mut parameters)
    }

    /// The same model in the form that methods need which look parameters up: shared blocks are
    /// written out, one for each pass, by names of their own for the same tensors, which take no
    /// more memory; layer scales are multiplied into the layers before them; small integers become
    /// the numbers that they stand for.
    pub fn written_out(&self) -> Result<Self> {
        if !self.spec.quantised.is_empty() {
            return self.dequantised()?.written_out();
        }
        let mut spec = self.spec.clone();
        spec.blocks = self.spec.expanded_blocks();
        let mut parameters = self.parameters.clone();
        let mut first = 0;
        for block in &self.spec.blocks {
            if block.shared {
                let own = format!("blocks.{first}.");
                for index in first + 1..first + block.repeat {
                    let copied = |name: &str| {
                        let rest = name.strip_prefix(&own)?;
                        Some(format!("blocks.{index}.{rest}"))
                    };
                    for (name, tensor) in &self.parameters {
                        parameters.extend(copied(name).map(|name| (name, tensor.clone())));
                    }
                    for (path, rank) in &self.spec.low_rank {
                        spec.low_rank.extend(copied(path).map(|path| (path, *rank)));
                    }
                }
            }
            first += block.repeat;
        }
        for (index, block) in spec.blocks.iter_mut().enumerate() {
            if block.layer_scale.take().is_some() {
                fold_scales(&mut parameters, index)?;
            }
        }
        Self::new(spec, &mut parameters)
    }

    /// Whether some of its blocks scale what their parts write.
    pub fn scales_layers(&self) -> bool {
        let mut blocks = self.spec.blocks.iter();
        blocks.any(|block| block.layer_scale.is_some())
    }

    /// Whether [`Model::written_out`] differs from it: something is shared, scaled or quantised.
    pub fn needs_writing_out(&self) -> bool {
        self.shares_weights() || self.scales_layers() || !self.spec.quantised.is_empty()
    }

    /// Whether some of its blocks share their weights.
    pub fn shares_weights(&self) -> bool {
        let several = |block: &lapidary_parts::block::BlockSpec| block.shared && block.repeat > 1;
        self.spec.blocks.iter().any(several)
    }

    /// The spec it was built from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Every parameter by name.
    pub fn parameters(&self) -> &BTreeMap<String, Tensor> {
        &self.parameters
    }

    /// The variables of a trainable model, by parameter name.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// Every linear layer, with the site where its input can be seen.
    pub fn linears(&self) -> &[LinearInfo] {
        &self.linears
    }

    /// Number of parameters, tied ones counted once. A quantised matrix has as many as the one
    /// that it stands for.
    pub fn parameter_count(&self) -> usize {
        let count = |(name, tensor): (&String, &Tensor)| {
            let packed = name.rsplit_once('.').and_then(|(matrix, part)| {
                self.spec.quantised.get(matrix).map(|form| (form, part))
            });
            match packed {
                Some((form, "codes")) => tensor.elem_count() * 8 / form.bits.max(1) as usize,
                Some(_) => 0,
                None => tensor.elem_count(),
            }
        };
        self.parameters.iter().map(count).sum()
    }

    /// An empty decode state for this model.
    pub fn decode_state(&self) -> DecodeState {
        DecodeState::new(self.blocks.len())
    }

    /// Element type of the parameters; that of dense ones where some are quantised.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the parameters live.
    pub fn device(&self) -> Device {
        self.parameters
            .values()
            .next()
            .map_or(Device::Cpu, |tensor| tensor.device().clone())
    }

    /// Refuses a start in the middle that does not fit.
    fn check_start(&self, block: usize, hidden: &Signal) -> Result<usize> {
        let count = self.blocks.len();
        if block > count {
            let expected = format!("at most {count}, the number of blocks");
            return Err(Error::spec("block to start at", block, expected));
        }
        match hidden.dims() {
            [_, _, width] if *width == self.spec.width => Ok(block),
            found => {
                let expected = format!("[batch, length, {}]", self.spec.width);
                Err(Error::spec(
                    "shape of what flows into the block",
                    found,
                    expected,
                ))
            }
        }
    }

    /// Runs the model.
    pub fn forward(&self, input: &Input, pass: Pass<'_>) -> Result<Output> {
        let silent = Trace::new();
        let trace = pass.trace.unwrap_or(&silent);
        let only_last = pass.only_last;
        let Organised { hidden, padding } = self.through_blocks(input, pass)?;
        let length = hidden.dims().get(1).copied().unwrap_or(0);
        // A pooled head has one score for all positions, whichever it reads.
        let by_position = matches!(self.spec.head, HeadSpec::LanguageModel { .. });
        let scored = if only_last && by_position && length > 1 {
            hidden.narrow(1, length - 1, 1)?
        } else {
            hidden.clone()
        };
        let cx = Context {
            key_padding: padding.as_ref(),
            ..Context::new(trace)
        };
        let output = self.head.forward(&scored, input, &cx)?;
        Ok(Output {
            hidden,
            pooled: output.pooled,
            logits: output.logits,
            pixels: output.pixels,
        })
    }

    /// What the head would read, `[batch, length, width]` of [`ModelSpec::read_width`]; the head is not run.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn hidden(&self, input: &Input, pass: Pass<'_>) -> Result<Signal> {
        Ok(self.through_blocks(input, pass)?.hidden)
    }

    /// The head of a language model by itself, to score hidden vectors a few at a time.
    ///
    /// # Errors
    /// When the head is another.
    pub fn scorer(&self) -> Result<Scorer> {
        Scorer::new(&self.head)
    }

    /// What comes out of the final norm, and which of it is padding.
    fn through_blocks(&self, input: &Input, pass: Pass<'_>) -> Result<Organised> {
        let silent = Trace::new();
        let biases = SharedBiases::default();
        let mut state = pass.state;
        let cx = Context {
            trace: pass.trace.unwrap_or(&silent),
            key_padding: pass.padding,
            offset: state.as_ref().map_or(0, |state| state.length),
            dropout_seed: pass.dropout_seed,
            draw: pass.draw,
            step: pass.step,
            annealing: pass.annealing,
            memory: pass.memory,
            key_bias: None,
            places: None,
            biases: Some(&biases),
            decisions: None,
        };
        let (first, mut x) = match pass.start {
            Some((block, hidden)) => (self.check_start(block, hidden)?, hidden.clone()),
            None => {
                let x = self.embedding.forward(input, pass.visible, &cx)?;
                (0, cx.trace.site(format_args!("embeddings"), x)?)
            }
        };
        let length = x.dims().get(1).copied().unwrap_or(0);
        let mut padding = pass.padding.cloned();
        if let Some(organisation) = &self.organisation {
            refuse_steps(&self.spec, first, state.is_some())?;
            let state = state.as_deref_mut();
            let organised = organisation.forward(
                x,
                &self.blocks,
                read(input),
                &cx,
                pass.recomputation,
                state,
            )?;
            Organised { hidden: x, padding } = organised;
        } else {
            for (index, block) in self.blocks.iter().enumerate().skip(first) {
                if let Some(recomputation) = pass.recomputation {
                    x = recomputed(recomputation, block, &x, &cx)?;
                    continue;
                }
                let mixer = state
                    .as_deref_mut()
                    .and_then(|state| state.mixers.get_mut(index));
                x = block.forward(x, &cx, mixer)?;
            }
        }
        if let Some(state) = state {
            state.length += length;
        }
        let hidden = cx
            .trace
            .site(format_args!("final_norm"), self.final_norm.forward(&x)?)?;
        Ok(Organised { hidden, padding })
    }
}

/// What organisations are told of the input.
fn read(input: &Input) -> Read<'_> {
    match input {
        Input::Tokens { ids, token_types } => Read {
            ids: Some(ids),
            token_types: token_types.as_ref(),
        },
        Input::Pixels(_) => Read::default(),
    }
}

/// Refuses passes that begin at a block, or go on from earlier tokens, where an organisation decides
/// what blocks see.
fn refuse_steps(spec: &ModelSpec, first: usize, decodes: bool) -> Result<()> {
    let Some(organisation) = &spec.organisation else {
        return Ok(());
    };
    let kind = organisation.kind();
    if first > 0 {
        let expected = format!("0 in a model with an organisation that is {kind}");
        return Err(Error::spec("block to start at", first, expected));
    }
    if decodes && !organisation.decodes(spec.is_causal()) {
        let expected = format!(
            "absent in a model with an organisation that is {kind}: every step runs the whole sequence"
        );
        return Err(Error::spec("decode state", "given", expected));
    }
    Ok(())
}

/// Multiplies the scales of a block's parts into the layers that write: the rows of a matrix, or of
/// its factor on the left, and the bias. Refuses a scale behind a part that ends otherwise.
fn fold_scales(parameters: &mut BTreeMap<String, Tensor>, block: usize) -> Result<()> {
    let ends: [(&str, &[&str]); 3] = [
        ("attention", &["output"]),
        ("cross_attention", &["output"]),
        ("feedforward", &["down", "map"]),
    ];
    for (part, layers) in ends {
        let path = format!("blocks.{block}.{part}");
        let Some(scale) = parameters.remove(&format!("{path}_scale.weight")) else {
            continue;
        };
        let columns = scale.unsqueeze(1).map_err(lapidary_kernels::Error::from)?;
        // Of a mixture every expert's; an expert's own layers have the same names.
        let under = format!("{path}.");
        let written = |name: &str| -> Option<bool> {
            let rest = name.strip_prefix(&under)?;
            let (layer_path, kind) = rest.rsplit_once('.')?;
            let last = layer_path.rsplit('.').next();
            let writes = last.is_some_and(|last| layers.contains(&last));
            match kind {
                "weight" | "up" if writes => Some(true),
                "bias" if writes => Some(false),
                _ => None,
            }
        };
        let mut folded = false;
        for (name, tensor) in parameters.iter_mut() {
            let by = match written(name) {
                Some(true) => &columns,
                Some(false) => &scale,
                None => continue,
            };
            let product = tensor.broadcast_mul(by);
            *tensor = product.map_err(lapidary_kernels::Error::from)?;
            folded = true;
        }
        if !folded {
            return Err(Error::spec(
                format!("blocks.{block}.layer_scale"),
                "behind a part that ends in no linear layer",
                "absent, or behind one that can take the scale in, to be written out",
            ));
        }
    }
    Ok(())
}
