//! Masked linear attention on a tree with all pairs laid out, a tile of queries at a time.
//!
//! Where few tokens have many features, this is less work than sums over levels: products of whole
//! matrices, between which a tile is multiplied by the mask. With `S = Q Kᵀ`, `D = ∂Y Vᵀ`:
//!
//! ```text
//! Y = (M ∘ S) V,   ∂Q = (M ∘ D) K,   ∂K = (M ∘ D)ᵀ Q,   ∂V = (M ∘ S)ᵀ ∂Y,   ∂M = S ∘ D
//! ```

use super::geometry::Pairs;
use lapidary_kernels::{ByHand, Device, Result, Tensor, matmul};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of a tile.
const TILE: usize = 64;

/// Multiplications and additions of one head.
pub(super) fn operations(length: usize, features: usize, width: usize) -> u64 {
    (length * length * (2 * (features + width) + 1)) as u64
}

/// Inputs as those of [`super::operation::Masked`].
pub(super) struct LaidOut {
    /// The places of all pairs in the mask.
    pub pairs: Pairs,
    pub length: usize,
    pub heads: usize,
    pub features: usize,
    pub width: usize,
    pub distances: usize,
}

/// Queries, keys and values of one head, and what they are multiplied by.
struct Head<'a> {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// `M` by distance.
    mask: &'a [f64],
}

impl LaidOut {
    fn each<'a>(&self, inputs: &[&'a [f64]]) -> Result<Vec<Head<'a>>> {
        let [q, k, v, mask] = [0, 1, 2, 3].map(|input| inputs.get(input).copied().unwrap_or(&[]));
        let (of_features, of_values) = (self.length * self.features, self.length * self.width);
        (0..v.len() / of_values.max(1))
            .map(|head| {
                let row = head % self.heads * self.distances;
                Ok(Head {
                    q: matrix(&q[head * of_features..][..of_features], self.features)?,
                    k: matrix(&k[head * of_features..][..of_features], self.features)?,
                    v: matrix(&v[head * of_values..][..of_values], self.width)?,
                    mask: &mask[row..][..self.distances],
                })
            })
            .collect()
    }

    /// Calls `pair` with the distance of every pair of a tile of queries and all keys, in order.
    fn pairs(&self, queries: Range<usize>, mut pair: impl FnMut(usize)) {
        let columns = match &self.pairs {
            Pairs::Path => {
                for i in queries {
                    (0..self.length).for_each(|j| pair(i.abs_diff(j)));
                }
                return;
            }
            Pairs::Table { stride, places } => {
                for i in queries {
                    let row = &places[i * stride..][..self.length];
                    row.iter().for_each(|place| pair(*place as usize));
                }
                return;
            }
            Pairs::Grid(columns) => *columns,
        };
        for i in queries {
            let (row, column) = (i / columns, i % columns);
            let (mut other_row, mut other_column) = (0, 0);
            for _ in 0..self.length {
                pair(match column == other_column {
                    true => row.abs_diff(other_row),
                    false => row + other_row + column.abs_diff(other_column),
                });
                other_column += 1;
                if other_column == columns {
                    (other_row, other_column) = (other_row + 1, 0);
                }
            }
        }
    }

    fn tiles(&self) -> Vec<Range<usize>> {
        let starts = (0..self.length).step_by(TILE);
        starts
            .map(|start| start..self.length.min(start + TILE))
            .collect()
    }

    /// `M ∘ x` of a tile.
    fn masked(&self, mask: &[f64], queries: Range<usize>, x: &Tensor) -> Result<Tensor> {
        let mut numbers = x.flatten_all()?.to_vec1::<f64>()?;
        let mut rest = numbers.iter_mut();
        self.pairs(queries, |distance| {
            if let (Some(number), Some(factor)) = (rest.next(), mask.get(distance)) {
                *number *= factor;
            }
        });
        let rows = numbers.len() / self.length.max(1);
        Ok(Tensor::from_vec(
            numbers,
            (rows, self.length),
            &Device::Cpu,
        )?)
    }

    fn output(&self, head: &Head<'_>, queries: Range<usize>) -> Result<Vec<f64>> {
        let q = head.q.narrow(0, queries.start, queries.len())?;
        let scores = self.masked(head.mask, queries, &matmul(&q, &head.k.t()?)?)?;
        Ok(matmul(&scores, &head.v)?.flatten_all()?.to_vec1()?)
    }

    /// Gradients of `q`, `k`, `v` and the mask of one head.
    fn gradients(&self, head: &Head<'_>, gradient: &Tensor) -> Result<[Vec<f64>; 4]> {
        let (mut dq, mut of_mask) = (Vec::new(), vec![0.0; self.distances]);
        let (mut dk, mut dv) = (head.k.zeros_like()?, head.v.zeros_like()?);
        for queries in self.tiles() {
            let here = |x: &Tensor| x.narrow(0, queries.start, queries.len());
            let (q, g) = (here(&head.q)?, here(gradient)?);
            let scores = matmul(&q, &head.k.t()?)?;
            let slopes = matmul(&g, &head.v.t()?)?;
            let both = (&scores * &slopes)?.flatten_all()?.to_vec1::<f64>()?;
            let mut rest = both.iter();
            self.pairs(queries.clone(), |distance| {
                if let (Some(number), Some(sum)) = (rest.next(), of_mask.get_mut(distance)) {
                    *sum += number;
                }
            });
            let slopes = self.masked(head.mask, queries.clone(), &slopes)?;
            let scores = self.masked(head.mask, queries.clone(), &scores)?;
            dq.extend(matmul(&slopes, &head.k)?.flatten_all()?.to_vec1::<f64>()?);
            dk = (dk + matmul(&slopes.t()?, &q)?)?;
            dv = (dv + matmul(&scores.t()?, &g)?)?;
        }
        let flat = |x: Tensor| -> Result<Vec<f64>> { Ok(x.flatten_all()?.to_vec1()?) };
        Ok([dq, flat(dk)?, flat(dv)?, of_mask])
    }

    fn all(&self, inputs: &[&[f64]]) -> Result<Vec<f64>> {
        let heads = self.each(inputs)?;
        let tiles = self.tiles();
        let jobs: Vec<_> = heads
            .iter()
            .flat_map(|head| tiles.iter().map(move |tile| (head, tile.clone())))
            .collect();
        let outputs: Result<Vec<Vec<f64>>> = jobs
            .into_par_iter()
            .map(|(head, tile)| self.output(head, tile))
            .collect();
        Ok(outputs?.concat())
    }

    fn all_gradients(&self, inputs: &[&[f64]], gradient: &[f64]) -> Result<Vec<Vec<f64>>> {
        let heads = self.each(inputs)?;
        let size = self.length * self.width;
        let each: Result<Vec<[Vec<f64>; 4]>> = heads
            .par_iter()
            .zip(gradient.par_chunks(size.max(1)))
            .map(|(head, gradient)| self.gradients(head, &matrix(gradient, self.width)?))
            .collect();
        let mut joined: Vec<Vec<f64>> = vec![Vec::new(); 3];
        let mut of_mask = vec![0.0; self.heads * self.distances];
        for (head, [dq, dk, dv, mask]) in each?.into_iter().enumerate() {
            for (joined, part) in joined.iter_mut().zip([dq, dk, dv]) {
                joined.extend(part);
            }
            let row = head % self.heads * self.distances;
            for (sum, part) in of_mask.iter_mut().skip(row).zip(mask) {
                *sum += part;
            }
        }
        joined.push(of_mask);
        Ok(joined)
    }
}

fn matrix(numbers: &[f64], columns: usize) -> Result<Tensor> {
    let rows = numbers.len() / columns.max(1);
    Ok(Tensor::from_slice(numbers, (rows, columns), &Device::Cpu)?)
}

impl ByHand for LaidOut {
    fn name(&self) -> &'static str {
        "attention on a tree"
    }

    // A failure gives nothing, which is then refused for its size.
    fn forward(&self, inputs: &[&[f64]]) -> Vec<f64> {
        self.all(inputs).unwrap_or_default()
    }

    fn backward(&self, inputs: &[&[f64]], gradient: &[f64]) -> Vec<Vec<f64>> {
        self.all_gradients(inputs, gradient).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::operation::{self, Masked};
    use super::*;
    use lapidary_factor::trees::{IntegratorTree, Tree};
    use std::sync::Arc;

    fn numbers(count: usize, phase: f64) -> Vec<f64> {
        let each = (0..count).map(|i| (i as f64 * 1.37 + phase).sin());
        each.collect()
    }

    /// Cut into pieces and laid out are one operation, in value and gradient: trees that are one piece, that
    /// are cut, and whose levels go through transforms.
    #[test]
    fn equals_what_cuts_give() {
        let (sequences, heads, features, width) = (2, 3, 4, 5);
        for (columns, length) in [
            (None, 1),
            (None, 9),
            (None, 280),
            (None, 700),
            (Some(10), 97),
            (Some(3), 300),
            (Some(1), 40),
        ] {
            let tree = match columns {
                None => Tree::path(length),
                Some(columns) => Tree::of_grid(length, columns),
            };
            let cut = Arc::new(IntegratorTree::new(&tree));
            let distances = operation::distances(&cut);
            let cuts = Masked {
                cut,
                heads,
                features,
                width,
                distances,
            };
            let tiles = LaidOut {
                pairs: columns.map_or(Pairs::Path, Pairs::Grid),
                length,
                heads,
                features,
                width,
                distances,
            };
            let each = sequences * heads * length;
            let owned = [
                numbers(each * features, 0.1),
                numbers(each * features, 0.2),
                numbers(each * width, 0.3),
                numbers(heads * distances, 0.4),
            ];
            let inputs: Vec<&[f64]> = owned.iter().map(Vec::as_slice).collect();
            let near = |found: &[f64], expected: &[f64]| {
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    assert!(
                        (found - expected).abs() < 1e-9 * length as f64,
                        "{columns:?} {length}"
                    );
                }
            };
            near(&tiles.forward(&inputs), &cuts.forward(&inputs));
            let gradient = numbers(each * width, 0.5);
            let [found, expected] = [
                tiles.backward(&inputs, &gradient),
                cuts.backward(&inputs, &gradient),
            ];
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                near(found, expected);
            }
        }
    }
}
