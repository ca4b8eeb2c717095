//! Which blocks are refined.

use super::layout::Layout;
use super::{MraSpec, PRIOR};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{DType, Tensor};
use std::collections::BTreeMap;

/// The blocks of one scale that are refined.
#[derive(Debug, Default)]
pub(super) struct Refined {
    /// For each head of a sequence and row of blocks, the blocks of keys in order.
    pub(super) by_row: BTreeMap<(usize, usize), Vec<usize>>,
}

/// What is refined at every scale but the last.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) levels: Vec<Refined>,
    /// Blocks whose logits were looked at.
    pub(super) considered: usize,
}

/// Queries and keys of blocks of each scale, from the largest on.
pub(super) struct Scaled<'a> {
    pub(super) q: &'a [Tensor],
    pub(super) k: &'a [Tensor],
    pub(super) scale: f64,
}

/// The rows of a tensor on the host.
pub(super) struct Table {
    values: Vec<f64>,
    width: usize,
}

impl Table {
    pub(super) fn new(x: &Tensor) -> Result<Self> {
        let flat = tensor(tensor(x.detach().to_dtype(DType::F64))?.flatten_all())?;
        Ok(Self {
            values: tensor(flat.to_vec1())?,
            width: tensor(x.dim(1))?,
        })
    }

    pub(super) fn row(&self, row: usize) -> &[f64] {
        self.values
            .get(row * self.width..(row + 1) * self.width)
            .unwrap_or_default()
    }
}

/// A block that may be refined.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) query: usize,
    pub(super) key: usize,
    pub(super) value: f64,
}

impl Plan {
    /// Looks at blocks of the largest scale, refines the best, looks at what they became, and so on; no
    /// gradient passes.
    pub(super) fn new(
        spec: &MraSpec,
        causal: bool,
        layout: &Layout,
        scaled: &Scaled<'_>,
    ) -> Result<Self> {
        let mut plan = Self {
            levels: spec.per_row.iter().map(|_| Refined::default()).collect(),
            considered: 0,
        };
        let mut tables = Vec::new();
        for (q, k) in scaled.q.iter().zip(scaled.k).take(spec.per_row.len()) {
            tables.push([Table::new(q)?, Table::new(k)?]);
        }
        for of in 0..layout.count() {
            plan.refine(spec, causal, layout, of, &tables, scaled.scale);
        }
        Ok(plan)
    }

    fn refine(
        &mut self,
        spec: &MraSpec,
        causal: bool,
        layout: &Layout,
        of: usize,
        tables: &[[Table; 2]],
        scale: f64,
    ) {
        let block = spec.scales.first().copied().unwrap_or(1);
        let all = layout.blocks(of, block);
        // Largest logit of each row of the largest blocks.
        let mut largest: Vec<f64> = vec![f64::NEG_INFINITY; all];
        let mut current: Vec<(usize, usize)> = (0..all)
            .flat_map(|x| {
                let end = if causal { x + 1 } else { all };
                (0..end).map(move |y| (x, y))
            })
            .collect();
        let levels = self.levels.iter_mut().zip(&spec.per_row).zip(tables);
        let sizes = spec.scales.windows(2);
        for (depth, (((refined, &budget), [q, k]), sizes)) in levels.zip(sizes).enumerate() {
            let [size, finer] = *sizes else {
                continue;
            };
            let logit = |x: usize, y: usize| -> f64 {
                let (x, y) = (layout.row(of, x, size), layout.row(of, y, size));
                scale * dot(q.row(x), k.row(y))
            };
            self.considered += current.len();
            let mut candidates: Vec<Candidate> = current
                .iter()
                .map(|&(query, key)| Candidate {
                    query,
                    key,
                    value: logit(query, key),
                })
                .collect();
            for candidate in &mut candidates {
                if let Some(most) = largest.get_mut(candidate.query * size / block)
                    && depth == 0
                {
                    *most = most.max(candidate.value);
                }
            }
            for candidate in &mut candidates {
                let most = largest.get(candidate.query * size / block);
                candidate.value -= most.copied().unwrap_or(0.0);
                if depth == 0 {
                    candidate.value += spec.prior(candidate.query, candidate.key);
                }
            }
            let chosen = match causal {
                true => best_of_rows(candidates, budget),
                false => best(&candidates, budget * layout.blocks(of, size)),
            };
            current = Vec::new();
            for (x, y) in chosen {
                refined.by_row.entry((of, x)).or_default().push(y);
                let each = size / finer;
                let (queries, keys) = (layout.blocks(of, finer), layout.blocks(of, finer));
                for x in x * each..queries.min((x + 1) * each) {
                    let keys = if causal { keys.min(x + 1) } else { keys };
                    current.extend((y * each..keys.min((y + 1) * each)).map(|y| (x, y)));
                }
            }
        }
    }
}

/// The product of two rows, summed up in several lanes at once.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    let mut sums = [0.0; LANES];
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// The `count` best, in order of rows and columns; the first of those that are equal.
fn best(candidates: &[Candidate], count: usize) -> Vec<(usize, usize)> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, |a, b| {
            let [x, y] = [*a, *b].map(|at| candidates[at].value);
            y.total_cmp(&x).then(a.cmp(b))
        });
        order.truncate(count);
    }
    let mut chosen: Vec<(usize, usize)> = order
        .into_iter()
        .map(|at| (candidates[at].query, candidates[at].key))
        .collect();
    chosen.sort_unstable();
    chosen
}

/// Of each row what lies on the diagonal, and the best before it, `count` together.
pub(super) fn best_of_rows(mut candidates: Vec<Candidate>, count: usize) -> Vec<(usize, usize)> {
    for candidate in &mut candidates {
        if candidate.query == candidate.key {
            candidate.value = f64::INFINITY;
        }
    }
    // Stable: those of a row stay in order.
    candidates.sort_by_key(|candidate| candidate.query);
    let rows = candidates.chunk_by(|a, b| a.query == b.query);
    rows.flat_map(|row| best(row, count)).collect()
}

impl MraSpec {
    /// What is added to the logit of a block of the largest scale.
    pub(super) fn prior(&self, query: usize, key: usize) -> f64 {
        let near = self.diagonal > 0 && query.abs_diff(key) <= self.diagonal / 2;
        let first = query < self.first || key < self.first;
        PRIOR * (f64::from(u8::from(near)) + f64::from(u8::from(first)))
    }
}
