//! What the methods that read attention weights have in common: passes that give the weights,
//! their gradients and their relevance, products over layers, and the map of the tokens.

use crate::error::{engine, require_whole_sequences};
use crate::target::number;
use crate::{Error, Question, Result, Target};
use lapidary_kernels::{D, DType, Tensor, backward};
use lapidary_model::{HeadSpec, Input, InputSpec, Output, Pool};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_signal::Trace;
use lapidary_signal::relevance::RelevanceRules;

/// A forward pass whose attention weights are kept.
pub(crate) struct AttentionPass {
    pub(crate) output: Output,
    trace: Trace,
    sites: Vec<String>,
}

/// What a backward pass brings to the weights.
pub(crate) struct Arrived {
    /// The explained number of each seed.
    pub(crate) explained: Vec<f64>,
    /// For each block `[batch, heads, query, key]`, in `f64`.
    pub(crate) blocks: Vec<Tensor>,
}

impl AttentionPass {
    /// A pass under relevance rules, or a plain one.
    ///
    /// # Errors
    /// When a block has no attention weights.
    pub(crate) fn new(question: &Question<'_>, rules: Option<RelevanceRules>) -> Result<Self> {
        require_whole_sequences(question.model, "methods that read attention weights")?;
        let blocks = question.model.spec().expanded_blocks().len();
        let sites: Vec<String> = (0..blocks)
            .map(|block| format!("blocks.{block}.attention.weights"))
            .collect();
        let mut trace = Trace::new();
        for site in &sites {
            trace = trace.tap(site)?;
        }
        if let Some(rules) = rules {
            trace = trace.replace("embeddings", move |_, signal| {
                Ok(signal.into_relevance(rules)?.0)
            })?;
        }
        let output = question
            .model
            .forward(question.input, question.pass(&trace))?;
        let records = trace.records();
        if let Some(missing) = sites.iter().find(|site| !records.contains_key(*site)) {
            return Err(Error::invalid(
                format!("attention weights at {missing}"),
                "absent",
                "there in every block for methods that read them; decompx, attnlrp and cp-lrp go \
                 through other mixers too",
            ));
        }
        Ok(Self {
            output,
            trace,
            sites,
        })
    }

    /// The weights of each block, `[batch, heads, query, key]`, in `f64`.
    pub(crate) fn weights(&self) -> Result<Vec<Tensor>> {
        let records = self.trace.records();
        let of = |site| match records.get(site) {
            Some(record) => engine(record.signal.value().detach().to_dtype(DType::F64)),
            None => Err(Error::invalid("attention weights", "absent", "kept")),
        };
        self.sites.iter().map(of).collect()
    }

    /// What the targets of some sequences, one of each, bring to the weights in one backward pass:
    /// the gradient, or under rules the relevance. Zero where a number does not depend on them.
    pub(crate) fn arrived(&self, seeds: &[(usize, Target)]) -> Result<Arrived> {
        let mut numbers = Vec::with_capacity(seeds.len());
        for (sequence, target) in seeds {
            numbers.push(target.number_of(&self.output, *sequence)?);
        }
        let explained = numbers.iter().map(number).collect::<Result<Vec<f64>>>()?;
        let total = engine(engine(Tensor::stack(&numbers, 0))?.sum_all())?;
        let gradients = engine(backward(&total))?;
        let records = self.trace.records();
        let of = |site| match records.get(site) {
            Some(record) if record.is_reached(&gradients) => {
                engine(record.gradient(&gradients)?.to_dtype(DType::F64))
            }
            Some(record) => {
                engine(engine(record.signal.value().zeros_like())?.to_dtype(DType::F64))
            }
            None => Err(Error::invalid("attention weights", "absent", "kept")),
        };
        Ok(Arrived {
            explained,
            blocks: self.sites.iter().map(of).collect::<Result<Vec<Tensor>>>()?,
        })
    }
}

/// The mean over heads, `[batch, heads, query, key] -> [batch, query, key]`.
pub(crate) fn head_mean(heads: &Tensor) -> Result<Tensor> {
    engine(heads.mean(1))
}

/// `C = Ā⁽ᴮ⁾ ⋯ Ā⁽ˢ⁾` with `Ā = I + M`, each `[batch, query, key]`; with `normalise`, rows of `Ā`
/// sum to one.
///
/// # Errors
/// When no layer from `start` on is there, or a row that would be divided by its sum has none above nought: weights that
/// are not a softmax may be negative.
pub(crate) fn roll_out(layers: &[Tensor], start: usize, normalise: bool) -> Result<Tensor> {
    let mut product: Option<Tensor> = None;
    for layer in layers.iter().skip(start) {
        let (_, queries, keys) = engine(layer.dims3())?;
        if queries != keys {
            return Err(Error::invalid(
                "attention weights",
                format!("{queries} queries over {keys} keys"),
                "as many keys as queries to be multiplied over layers",
            ));
        }
        let identity = engine(Tensor::eye(queries, layer.dtype(), layer.device()))?;
        let mut layer = engine(layer.broadcast_add(&identity))?;
        if normalise {
            let sums = engine(layer.sum_keepdim(D::Minus1))?;
            let least = number(&engine(sums.min_all())?)?;
            if least <= 0.0 {
                return Err(Error::invalid(
                    "least sum of a token's attention weights and its residual",
                    least,
                    "above 0 to be divided into shares; decompx, attnlrp and cp-lrp take weights of any sign",
                ));
            }
            layer = engine(layer.broadcast_div(&sums))?;
        }
        product = Some(match product {
            None => layer,
            Some(before) => engine(layer.matmul(&before))?,
        });
    }
    product.ok_or_else(|| {
        let expected = format!("below {}, the number of layers", layers.len());
        Error::invalid("start layer", start, expected)
    })
}

/// Whether the input is an image cut into patches.
pub(crate) fn reads_patches(question: &Question<'_>) -> bool {
    matches!(question.model.spec().input, InputSpec::Patches(_))
}

/// Tokens that stand before the patches of an image.
pub(crate) fn class_tokens(question: &Question<'_>) -> usize {
    match &question.model.spec().input {
        InputSpec::Patches(patches) => patches.class_tokens,
        InputSpec::Tokens(_) => 0,
    }
}

/// The row of `matrix` `[batch, query, key]` that belongs to the explained position of `sequence`:
/// that of the scores, or the one that the head pools; the mean over those where it pools several.
pub(crate) fn explained_row(
    question: &Question<'_>,
    matrix: &Tensor,
    sequence: usize,
    target: Target,
) -> Result<Vec<f64>> {
    let rows = engine(engine(matrix.get(sequence))?.to_vec2::<f64>())?;
    let length = rows.len();
    let kept = kept(question, sequence, length)?;
    let chosen = match (&question.model.spec().head, target) {
        (HeadSpec::LanguageModel { .. }, Target::Score { position, .. }) => {
            vec![position.unwrap_or(length.saturating_sub(1))]
        }
        (HeadSpec::Pooled { pool, .. }, _) => pooled_positions(question, *pool, sequence, &kept)?,
        _ => vec![0],
    };
    let mut sum = vec![0.0; rows.first().map_or(0, Vec::len)];
    for position in &chosen {
        let row = rows.get(*position).ok_or_else(|| {
            Error::invalid("explained position", position, format!("below {length}"))
        })?;
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum += value / chosen.len() as f64;
        }
    }
    Ok(sum)
}

/// Which of the `length` tokens of `sequence` are no pads: those that are not 0.
pub(crate) fn kept(question: &Question<'_>, sequence: usize, length: usize) -> Result<Vec<u8>> {
    match question.padding {
        Some(padding) => {
            engine(engine(engine(padding.get(sequence))?.to_dtype(DType::U8))?.to_vec1::<u8>())
        }
        None => Ok(vec![1; length]),
    }
}

/// The positions that the head reads.
fn pooled_positions(
    question: &Question<'_>,
    pool: Pool,
    sequence: usize,
    kept: &[u8],
) -> Result<Vec<usize>> {
    let ids = || match question.input {
        Input::Tokens { ids, .. } => engine(engine(ids.get(sequence))?.to_vec1::<u32>()),
        Input::Pixels(_) => Ok(Vec::new()),
    };
    let all = kept.iter().enumerate().filter(|(_, kept)| **kept != 0);
    let mut all = all.map(|(position, _)| position);
    Ok(match pool {
        Pool::First => vec![0],
        Pool::FirstTwo => vec![0, 1],
        Pool::Mean => all.collect(),
        Pool::Last => vec![all.next_back().unwrap_or(0)],
        Pool::AtToken(id) => vec![ids()?.iter().position(|token| *token == id).unwrap_or(0)],
        Pool::HighestId => {
            let ids = ids()?;
            let highest = ids.iter().max();
            vec![ids.iter().position(|id| Some(id) == highest).unwrap_or(0)]
        }
    })
}

/// The scores that a row gives: the tokens that stand for the whole (the class tokens of an image,
/// the first of a text whose head reads it) say nothing about the input and get the least of the
/// others.
pub(crate) fn heat(question: &Question<'_>, mut row: Vec<f64>) -> Vec<f64> {
    let reads_first = matches!(
        question.model.spec().head,
        HeadSpec::Pooled {
            pool: Pool::First,
            ..
        }
    );
    let whole = match reads_patches(question) {
        true => class_tokens(question),
        false => usize::from(reads_first),
    };
    let least = row.iter().skip(whole).copied().reduce(f64::min);
    for score in row.iter_mut().take(whole) {
        *score = least.unwrap_or(0.0);
    }
    row
}

/// What all maps leave out.
pub(crate) fn is_a_map(question: &Question<'_>) -> Vec<String> {
    let mut left_out =
        vec!["any sum: the scores are a map, not shares of the explained number".to_owned()];
    let blocks = &question.model.spec().blocks;
    let filtered = |block: &BlockSpec| match &block.attention {
        MixerSpec::MultiHead(attention) => attention.local.is_some(),
        _ => false,
    };
    if blocks.iter().any(filtered) {
        left_out.push("what filters beside the heads bring from neighbours".to_owned());
    }
    left_out
}
