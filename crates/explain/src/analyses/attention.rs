//! Where each head looks (Clark et al., What Does BERT Look At?, 2019, arXiv 1906.04341).

use crate::error::{engine, require_whole_sequences};
use crate::report::{Map, Report, Table};
use crate::{Question, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_signal::Trace;

/// How one head spreads its attention, averaged over queries.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadPattern {
    /// Index of the block.
    pub block: usize,
    /// Index of the head.
    pub head: usize,
    /// `−Σ_j A_ij log A_ij`, in nats.
    pub entropy: f64,
    /// `Σ_j A_ij |i − j|`, in tokens.
    pub distance: f64,
    /// Weight on the first token.
    pub first: f64,
    /// Weight on the token before.
    pub previous: f64,
    /// Weight on the token itself.
    pub own: f64,
    /// The weights, `[query][key]`.
    pub weights: Vec<Vec<f64>>,
}

/// The pattern of every head on the first sequence of the question; positions that are padding
/// do not count.
///
/// # Errors
/// When the model fails, or an organisation lets its blocks see something else than the sequence. Blocks whose mixer has no
/// weights give no heads.
pub fn head_patterns(question: &Question<'_>) -> Result<Vec<HeadPattern>> {
    require_whole_sequences(question.model, "patterns of heads")?;
    let trace = Trace::new().capture("blocks.*.attention.weights")?;
    question
        .model
        .forward(question.input, question.pass(&trace))?;
    let kept = match question.padding {
        Some(padding) => Some(engine(
            engine(engine(padding.get(0))?.to_dtype(DType::U8))?.to_vec1::<u8>(),
        )?),
        None => None,
    };
    let keeps = |position: usize| {
        let of = |kept: &Vec<u8>| kept.get(position).copied().unwrap_or(0) != 0;
        kept.as_ref().is_none_or(of)
    };
    let blocks = question.model.spec().expanded_blocks().len();
    let records = trace.records();
    let mut patterns = Vec::new();
    for block in 0..blocks {
        let Some(record) = records.get(&format!("blocks.{block}.attention.weights")) else {
            continue;
        };
        // [heads, query, key]
        let weights: Tensor = engine(record.signal.value().get(0))?;
        let weights = engine(engine(weights.to_dtype(DType::F64))?.to_vec3::<f64>())?;
        for (head, weights) in weights.into_iter().enumerate() {
            let rows: Vec<_> = weights
                .iter()
                .enumerate()
                .filter(|(query, _)| keeps(*query))
                .collect();
            let over_rows = |of: &dyn Fn(usize, &[f64]) -> f64| {
                let sum: f64 = rows.iter().map(|(query, row)| of(*query, row)).sum();
                sum / rows.len().max(1) as f64
            };
            let at = |row: &[f64], key: usize| row.get(key).copied().unwrap_or(0.0);
            patterns.push(HeadPattern {
                block,
                head,
                entropy: over_rows(&|_, row| {
                    let each = row.iter().filter(|weight| **weight > 0.0);
                    each.map(|weight| -weight * weight.ln()).sum()
                }),
                distance: over_rows(&|query, row| {
                    let each = row.iter().enumerate();
                    each.map(|(key, weight)| weight * query.abs_diff(key) as f64)
                        .sum()
                }),
                first: over_rows(&|_, row| at(row, 0)),
                previous: over_rows(&|query, row| query.checked_sub(1).map_or(0.0, |j| at(row, j))),
                own: over_rows(&|query, row| at(row, query)),
                weights,
            });
        }
    }
    Ok(patterns)
}

/// The patterns of every head as a table and maps; `names` are the tokens'.
pub fn report(question: &Question<'_>, names: &[String]) -> Result<Report> {
    let patterns = head_patterns(question)?;
    let mut table = Table::new(
        "Heads, averaged over queries",
        &[
            "head",
            "entropy (nats)",
            "distance (tokens)",
            "on the first",
            "on the previous",
            "on itself",
        ],
    );
    let mut maps = Vec::new();
    for pattern in patterns {
        let name = format!("{}.{}", pattern.block, pattern.head);
        table.push([
            name.as_str().into(),
            pattern.entropy.into(),
            pattern.distance.into(),
            pattern.first.into(),
            pattern.previous.into(),
            pattern.own.into(),
        ]);
        maps.push(Map {
            title: format!("head {name}: from each row to each column"),
            rows: names.to_vec(),
            columns: names.to_vec(),
            values: pattern.weights,
        });
    }
    Ok(Report {
        title: "Where each head looks".to_owned(),
        notes: vec![format!("{} tokens", names.len())],
        tables: vec![table],
        maps,
        ..Report::default()
    })
}
