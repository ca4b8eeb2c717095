//! Kronecker factors of the curvature, per token.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, SoftmaxMask, Tensor, Var, activate, backward, gather, log_softmax};
use lapidary_model::{HeadSpec, Model, Pass};
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_signal::Trace;
use rand::RngExt;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::data::{Batch, Target};
use crate::error::engine;
use crate::{CalibrationData, Error, Objective, Result};

/// `A` and `G` of one linear layer `y = x Wᵀ`: the curvature of the loss in `W` is nearly
/// `G ⊗ A` (Martens & Grosse 2015, arXiv 1503.05671).
#[derive(Clone, Debug)]
pub struct Factors {
    /// `A = E[x xᵀ]` over tokens, `[input, input]`.
    pub input: Tensor,
    /// `G = E[g gᵀ]` over tokens, `g` the gradient of the summed loss at the layer's output,
    /// `[output, output]`.
    pub output: Tensor,
    /// Tokens.
    pub tokens: usize,
}

/// Sums of one layer.
#[derive(Default)]
struct Sums {
    input: Option<Tensor>,
    output: Option<Tensor>,
    tokens: usize,
}

impl Sums {
    /// Adds the inputs `[tokens, input]` and output gradients `[tokens, output]` of a batch.
    fn add(&mut self, x: &Tensor, g: &Tensor) -> Result<()> {
        let gram = |rows: &Tensor, before: Option<Tensor>| -> Result<Tensor> {
            let rows = engine(rows.detach().to_dtype(DType::F64))?;
            let gram = engine(engine(rows.t())?.matmul(&rows))?;
            match before {
                Some(before) => engine(before + gram),
                None => Ok(gram),
            }
        };
        self.tokens += engine(x.dim(0))?;
        self.input = Some(gram(x, self.input.take())?);
        self.output = Some(gram(g, self.output.take())?);
        Ok(())
    }
}

/// The linear layers of the feed-forward parts of these blocks: those whose curvature can be had
/// from the sites around them.
pub(super) fn layers(model: &Model, blocks: &[usize]) -> Result<Vec<String>> {
    let specs = model.spec().expanded_blocks();
    let mut layers = Vec::new();
    for index in blocks {
        let spec = specs
            .get(*index)
            .ok_or_else(|| Error::invalid("block", index, format!("below {}", specs.len())))?;
        let names: &[&str] = match &spec.feedforward {
            Some(FeedforwardSpec::Dense(_)) => &["up", "down"],
            Some(FeedforwardSpec::Gated(_)) => &["gate", "up", "down"],
            other => {
                return Err(Error::invalid(
                    format!("the feed-forward part of block {index}"),
                    other.as_ref().map_or("absent", FeedforwardSpec::kind),
                    "dense or gated for K-FAC; whitened and second-order take others",
                ));
            }
        };
        let path = |name: &&str| format!("blocks.{index}.feedforward.{name}");
        layers.extend(names.iter().map(path));
    }
    Ok(layers)
}

/// The factors of every linear layer of the feed-forward parts of `blocks`, over the positions of
/// `data` that have a label: of a causal language model all but the last of a window, which predicts
/// nothing there is; of one that sees both sides those with a target; of a classifier all, since each
/// moves the one label. Padding is left out. Labels are drawn from what the model itself predicts,
/// which gives the true Fisher information.
///
/// # Errors
/// For models without scores, parts that are neither dense nor gated, and data without labels for the
/// model: windows of one token, or without targets where the model sees both sides.
pub fn factors(
    model: &Model,
    data: &CalibrationData,
    blocks: &[usize],
    batch: usize,
    seed: u64,
) -> Result<BTreeMap<String, Factors>> {
    check_head(model)?;
    if matches!(model.spec().head, HeadSpec::LanguageModel { .. }) {
        Objective::of(model, data)?;
    }
    let mut sums: BTreeMap<String, Sums> = layers(model, blocks)?
        .into_iter()
        .map(|layer| (layer, Sums::default()))
        .collect();
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let device = model.device();
    for batch in data.batches(batch, &device) {
        add_batch(model, &batch?, blocks, &mut sums, &mut generator)?;
    }
    let mut factors = BTreeMap::new();
    for (layer, sums) in sums {
        let (Some(input), Some(output)) = (sums.input, sums.output) else {
            return Err(Error::invalid(
                "positions with a label",
                0,
                "at least one: masked tokens, or windows of two tokens or more",
            ));
        };
        let scale = 1.0 / sums.tokens.max(1) as f64;
        let found = Factors {
            input: engine(input.affine(scale, 0.0))?,
            output: engine(output.affine(scale, 0.0))?,
            tokens: sums.tokens,
        };
        factors.insert(layer, found);
    }
    Ok(factors)
}

fn add_batch(
    model: &Model,
    batch: &Batch<'_>,
    blocks: &[usize],
    sums: &mut BTreeMap<String, Sums>,
    generator: &mut ChaCha8Rng,
) -> Result<()> {
    let mut trace = Trace::new();
    for block in blocks {
        let path = format!("blocks.{block}.feedforward");
        trace = trace
            .capture(&format!("{path}.in"))?
            .tap(&format!("{path}.hidden"))?
            .tap(&format!("{path}.out"))?;
    }
    let output = model.forward(
        &batch.input,
        Pass {
            padding: batch.padding.as_ref(),
            trace: Some(&trace),
            ..Pass::default()
        },
    )?;
    let (batches, length, _) = engine(output.hidden.value().dims3())?;
    let logits = output.into_logits()?.into_value();
    let (scores, rows) = match logits.rank() {
        3 => {
            let rows = labelled(batch, batches, length);
            if rows.is_empty() {
                return Ok(());
            }
            let rows = engine(Tensor::new(rows, logits.device()))?;
            (selected(&logits, &rows)?, Some(rows))
        }
        _ => (logits, batch.real.clone()),
    };
    let loss = sampled_loss(&scores, generator)?;
    let gradients = engine(backward(&loss))?;
    let rows_of = |tensor: &Tensor| match &rows {
        Some(rows) => selected(tensor, rows),
        None => engine(tensor.flatten(0, 1)),
    };
    let specs = model.spec().expanded_blocks();
    for block in blocks {
        let path = format!("blocks.{block}.feedforward");
        let site = |name: &str| trace.record(&format!("{path}.{name}"));
        let (read, hidden, out) = (site("in")?, site("hidden")?, site("out")?);
        let x = rows_of(read.signal.value())?;
        let mut add =
            |name: &str, x: &Tensor, g: &Tensor| match sums.get_mut(&format!("{path}.{name}")) {
                Some(sums) => sums.add(x, g),
                None => Ok(()),
            };
        add(
            "down",
            &rows_of(hidden.signal.value())?,
            &rows_of(&out.gradient(&gradients)?)?,
        )?;
        let at_hidden = rows_of(&hidden.gradient(&gradients)?)?;
        let spec = specs.get(*block).and_then(|spec| spec.feedforward.as_ref());
        for (name, gradient) in before_activation(model, &path, spec, &x, &at_hidden)? {
            add(name, &x, &gradient)?;
        }
    }
    Ok(())
}

/// Gradients at the outputs of the layers before the hidden features, from the gradient there:
/// the part from its input to its hidden features is computed once more.
fn before_activation(
    model: &Model,
    path: &str,
    spec: Option<&FeedforwardSpec>,
    x: &Tensor,
    at_hidden: &Tensor,
) -> Result<Vec<(&'static str, Tensor)>> {
    let variable = |name: &str| -> Result<Var> {
        let parameter = |kind: &str| model.parameters().get(&format!("{path}.{name}.{kind}"));
        let weight = parameter("weight").ok_or_else(|| {
            Error::invalid(
                format!("layer {path}.{name}"),
                "factorised",
                "dense: multiply it out first",
            )
        })?;
        let y = engine(x.detach().matmul(&engine(weight.detach().t())?))?;
        let y = match parameter("bias") {
            Some(bias) => engine(y.broadcast_add(&bias.detach()))?,
            None => y,
        };
        engine(Var::from_tensor(&y))
    };
    let (hidden, variables) = match spec {
        Some(FeedforwardSpec::Dense(spec)) => {
            let up = variable("up")?;
            let hidden = activate(up.as_tensor(), spec.activation.into())?;
            (hidden, vec![("up", up)])
        }
        Some(FeedforwardSpec::Gated(spec)) => {
            let (gate, up) = (variable("gate")?, variable("up")?);
            let gated = activate(gate.as_tensor(), spec.activation.into())?;
            let hidden = engine(gated * up.as_tensor())?;
            (hidden, vec![("gate", gate), ("up", up)])
        }
        _ => return Ok(Vec::new()),
    };
    let product = engine(engine(hidden * at_hidden.detach())?.sum_all())?;
    let gradients = engine(backward(&product))?;
    variables
        .into_iter()
        .map(|(name, variable)| {
            let gradient = gradients.get(variable.as_tensor()).cloned();
            let gradient = gradient.ok_or_else(|| {
                Error::invalid(format!("gradient of {path}.{name}"), "absent", "present")
            })?;
            Ok((name, gradient))
        })
        .collect()
}

/// Rows of `[batch · length]` that predict a token: those with a target, or without targets all
/// real ones but the last of their sequence.
fn labelled(batch: &Batch<'_>, batches: usize, length: usize) -> Vec<u32> {
    let mut rows = Vec::new();
    for (index, example) in batch.examples.iter().enumerate().take(batches) {
        let real = example.tokens().min(length);
        let predicts = |t: &usize| match &example.target {
            Target::Tokens(targets) => targets.get(*t).is_some_and(Option::is_some),
            Target::None | Target::Label(_) => t + 1 < real,
        };
        let here = (0..real).filter(predicts);
        rows.extend(here.map(|t| (index * length + t) as u32));
    }
    rows
}

/// Some rows of `[batch, length, width]`.
fn selected(tensor: &Tensor, rows: &Tensor) -> Result<Tensor> {
    engine(engine(tensor.flatten(0, 1))?.index_select(rows, 0))
}

/// `−Σ log p(label)` with one label for each row, drawn from `p`.
fn sampled_loss(scores: &Tensor, generator: &mut ChaCha8Rng) -> Result<Tensor> {
    let log_p = log_softmax(scores, &SoftmaxMask::default())?;
    let p = engine(engine(engine(log_p.detach().to_dtype(DType::F64))?.exp())?.to_vec2::<f64>())?;
    let labels: Vec<u32> = p
        .iter()
        .map(|row| {
            let mut left: f64 = generator.random::<f64>() * row.iter().sum::<f64>();
            let drawn = row.iter().position(|p| {
                left -= p;
                left < 0.0
            });
            drawn.unwrap_or(row.len().saturating_sub(1)) as u32
        })
        .collect();
    let count = labels.len();
    let labels = engine(Tensor::from_vec(labels, (count, 1), scores.device()))?;
    engine(engine(gather(&log_p, &labels, 1)?.sum_all())?.neg())
}

/// Refuses models that predict nothing.
pub(super) fn check_head(model: &Model) -> Result<()> {
    match &model.spec().head {
        HeadSpec::LanguageModel { .. } => Ok(()),
        HeadSpec::Pooled {
            labels: Some(_), ..
        } => Ok(()),
        HeadSpec::Pooled { .. } | HeadSpec::None | HeadSpec::Pixels => Err(Error::invalid(
            "head of the model",
            "one without scores",
            "a language model's or a classifier's for K-FAC; whitened and second-order \
             take others",
        )),
    }
}
