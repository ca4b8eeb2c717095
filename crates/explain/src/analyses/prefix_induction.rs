//! How long a repeated prefix heads need before they look at what followed it (Kissane et al.
//! 2024, arXiv 2406.17759: GPT-2 small's head 5.1 needs a long one, 5.5 a short one).
//!
//! In random tokens, `p` tokens from `a₁` on are copied to `a₂`. A head's score is the attention
//! from the last copied token, `a₂ + p − 1`, to what followed the original, `a₁ + p`.

use crate::autoencoder::batch;
use crate::error::engine;
use crate::report::{Plot, Report, Series, Table};
use crate::{Error, Result};
use lapidary_kernels::DType;
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use rand::{Rng, RngExt};
use serde::Serialize;

/// Sequences in one pass of the model.
const AT_A_TIME: usize = 8;

/// What is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixDraws<'a> {
    /// Tokens that sequences are made of.
    pub alphabet: &'a [u32],
    /// A token that every sequence begins with.
    pub start: Option<u32>,
    /// Prefixes of 1 to this many tokens.
    pub longest: usize,
    /// Sequences for each length of prefix.
    pub draws: usize,
    /// Tokens of a sequence.
    pub length: usize,
}

/// One head's scores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrefixScores {
    /// Index of the block.
    pub block: usize,
    /// Index of the head.
    pub head: usize,
    /// Mean attention for prefixes of 1, 2, … tokens.
    pub scores: Vec<f64>,
}

impl PrefixScores {
    /// How much the score rises from the shortest prefix to the longest.
    pub fn rise(&self) -> f64 {
        match (self.scores.first(), self.scores.last()) {
            (Some(first), Some(last)) => last - first,
            _ => 0.0,
        }
    }
}

/// The scores of every head of every attention layer.
///
/// # Errors
/// When the sequences have no room for two prefixes, or the model does not take them.
pub fn prefix_induction(
    model: &Model,
    draws: PrefixDraws<'_>,
    generator: &mut impl Rng,
) -> Result<Vec<PrefixScores>> {
    crate::error::require_whole_sequences(model, "what heads look at")?;
    let least = 2 * draws.longest + 2 + usize::from(draws.start.is_some());
    let most = model.spec().length();
    if least > most {
        let longest = most.saturating_sub(2 + usize::from(draws.start.is_some())) / 2;
        return Err(Error::invalid(
            "longest prefix",
            draws.longest,
            format!("at most {longest}, which the model's {most} tokens have room for twice"),
        ));
    }
    if draws.length < least || draws.length > most {
        let expected = format!("between {least} and {most}");
        return Err(Error::invalid(
            "length of the sequences",
            draws.length,
            expected,
        ));
    }
    for (what, count) in [
        ("tokens of the alphabet", draws.alphabet.len()),
        ("longest prefix", draws.longest),
        ("number of draws", draws.draws),
    ] {
        if count == 0 {
            return Err(Error::invalid(what, 0, "at least 1"));
        }
    }
    let mut found: Vec<PrefixScores> = Vec::new();
    for prefix in 1..=draws.longest {
        let mut sums: Vec<(usize, usize, f64)> = Vec::new();
        let mut left = draws.draws;
        while left > 0 {
            let count = left.min(AT_A_TIME);
            left -= count;
            let drawn: Vec<Drawn> = (0..count)
                .map(|_| draw(&draws, prefix, generator))
                .collect();
            add_scores(model, &drawn, &mut sums)?;
        }
        for (index, (block, head, sum)) in sums.into_iter().enumerate() {
            let score = sum / draws.draws as f64;
            match found.get_mut(index) {
                Some(of_head) => of_head.scores.push(score),
                None => found.push(PrefixScores {
                    block,
                    head,
                    scores: vec![score],
                }),
            }
        }
    }
    Ok(found)
}

struct Drawn {
    tokens: Vec<u32>,
    from: usize,
    to: usize,
}

fn draw(draws: &PrefixDraws<'_>, prefix: usize, generator: &mut impl Rng) -> Drawn {
    let mut tokens: Vec<u32> = (0..draws.length)
        .map(|_| {
            let index = generator.random_range(0..draws.alphabet.len());
            draws.alphabet.get(index).copied().unwrap_or_default()
        })
        .collect();
    let first = usize::from(draws.start.is_some());
    if let (Some(start), Some(place)) = (draws.start, tokens.first_mut()) {
        *place = start;
    }
    // The original, what follows it, and then the copy.
    let original = generator.random_range(first..=draws.length - 2 * prefix - 1);
    let copy = generator.random_range(original + prefix + 1..=draws.length - prefix);
    tokens.copy_within(original..original + prefix, copy);
    Drawn {
        tokens,
        from: copy + prefix - 1,
        to: original + prefix,
    }
}

fn add_scores(model: &Model, drawn: &[Drawn], sums: &mut Vec<(usize, usize, f64)>) -> Result<()> {
    let trace = Trace::new().capture("blocks.*.attention.weights")?;
    let pass = Pass {
        trace: Some(&trace),
        only_last: true,
        ..Pass::default()
    };
    let tokens: Vec<&[u32]> = drawn.iter().map(|one| one.tokens.as_slice()).collect();
    model.forward(&Input::tokens(batch(model, &tokens)?), pass)?;
    let records = trace.records();
    let blocks = model.spec().expanded_blocks().len();
    let mut place = 0;
    for block in 0..blocks {
        let Some(record) = records.get(&format!("blocks.{block}.attention.weights")) else {
            continue;
        };
        // [batch, heads, query, key]
        let weights = record.signal.value();
        let heads = engine(weights.dim(1))?;
        for head in 0..heads {
            if sums.len() <= place + head {
                sums.push((block, head, 0.0));
            }
        }
        for (row, one) in drawn.iter().enumerate() {
            let here = engine(weights.narrow(0, row, 1))?;
            let here = engine(engine(here.narrow(2, one.from, 1))?.narrow(3, one.to, 1))?;
            let here = engine(engine(here.flatten_all())?.to_dtype(DType::F64))?;
            let of_heads = engine(here.to_vec1::<f64>())?;
            for ((_, _, sum), score) in sums.iter_mut().skip(place).zip(of_heads) {
                *sum += score;
            }
        }
        place += heads;
    }
    Ok(())
}

/// The scores as a table, and as lines for the heads with the highest.
pub fn report(model: &Model, draws: PrefixDraws<'_>, generator: &mut impl Rng) -> Result<Report> {
    let mut heads = prefix_induction(model, draws, generator)?;
    let most = |one: &PrefixScores| one.scores.iter().copied().fold(0.0, f64::max);
    heads.sort_by(|a, b| most(b).total_cmp(&most(a)));
    let lengths: Vec<String> = (1..=draws.longest).map(|p| format!("p = {p}")).collect();
    let mut columns = vec!["head"];
    columns.extend(lengths.iter().map(String::as_str));
    let mut table = Table::new(
        "Attention to what followed a repeated prefix of p tokens",
        &columns,
    );
    for one in &heads {
        let name = format!("{}.{}", one.block, one.head);
        let scores = one.scores.iter().map(|score| (*score).into());
        table.push(std::iter::once(name.into()).chain(scores));
    }
    let series = heads.iter().take(8).map(|one| Series {
        name: format!("{}.{}", one.block, one.head),
        points: one
            .scores
            .iter()
            .enumerate()
            .map(|(index, score)| ((index + 1) as f64, *score))
            .collect(),
    });
    let plot = Plot {
        title: "Induction by length of the prefix".to_owned(),
        x: "tokens of the prefix".to_owned(),
        y: "attention".to_owned(),
        series: series.collect(),
    };
    Ok(Report {
        title: "How long a prefix induction needs".to_owned(),
        notes: vec![format!(
            "{} sequences of {} random tokens for each length",
            draws.draws, draws.length
        )],
        tables: vec![table],
        plots: vec![plot],
        ..Report::default()
    })
}
