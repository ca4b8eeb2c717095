//! A tree cut in two again and again, and products with functions of its distances.
//!
//! A vertex `p` divides a tree into two that have only `p` in common, each with a quarter of the vertices at
//! least. What both sides give each other depends on how far each vertex is from `p` alone:
//!
//! ```text
//! Y_i += Σ_w f(x_i + y_w) X^R_w,   X^R_w = Σ_{j right, y_j = y_w} X_j,   and the other way round
//! ```
//!
//! Within the sides the same again, and small trees are laid out. `p` is in both sides, so that each
//! cut takes `f(0) X_p` off once.
//!
//! Cost: `O(n ln n)` to cut and to add up levels, and a product with `[f(x_u + y_w)]` for each cut: of low
//! rank for polynomials, exponentials and waves, a Fourier transform where distances are multiples of
//! one length, in blocks of low rank for rational functions ([`super::Blocked`], off by no more than
//! [`super::TOLERANCE`]), laid out otherwise.

use super::product::multiply;
use super::{Function, Tree};
use crate::{Error, Result};

/// Vertices up to which a tree is laid out.
const LEAF: usize = 32;
/// The fewest that a tree can be laid out from: smaller ones may have no balanced cut.
const LEAST_LEAF: usize = 6;

/// A small tree, laid out.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaf {
    /// Its vertices.
    pub vertices: Vec<usize>,
    /// Distances `[vertices, vertices]`.
    pub distances: Vec<f64>,
}

/// One side of a cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// Its vertices, the cut one left out.
    pub vertices: Vec<usize>,
    /// The level of each, a place in `distances`.
    pub levels: Vec<usize>,
    /// How far each level is from the cut vertex, rising.
    pub distances: Vec<f64>,
}

impl Side {
    /// Sums of the rows of a field `[tree, width]` by level, `[levels, width]`.
    fn collected(&self, field: &[f64], width: usize) -> Vec<f64> {
        let mut sums = vec![0.0; self.distances.len() * width];
        for (vertex, level) in self.vertices.iter().zip(&self.levels) {
            let row = &field[vertex * width..][..width];
            let sums = &mut sums[level * width..][..width];
            for (sum, entry) in sums.iter_mut().zip(row) {
                *sum += entry;
            }
        }
        sums
    }

    /// Adds the row of its level `[levels, width]` to that of each vertex.
    fn spread(&self, sums: &[f64], field: &mut [f64], width: usize) {
        for (vertex, level) in self.vertices.iter().zip(&self.levels) {
            let row = &mut field[vertex * width..][..width];
            for (entry, sum) in row.iter_mut().zip(&sums[level * width..][..width]) {
                *entry += sum;
            }
        }
    }
}

/// A cut at a vertex.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// The vertex that both sides have.
    pub pivot: usize,
    /// What is left of it and right.
    pub sides: [Side; 2],
    /// How many cuts lie above.
    pub depth: usize,
}

/// A tree, cut.
#[derive(Clone, Debug, PartialEq)]
pub struct IntegratorTree {
    vertices: usize,
    leaves: Vec<Leaf>,
    splits: Vec<Split>,
    lattice: Option<f64>,
}

impl IntegratorTree {
    /// Cuts a tree down to pieces that are best laid out.
    pub fn new(tree: &Tree) -> Self {
        Self::cut(tree, LEAF)
    }

    /// Cuts a tree down to pieces of at most `leaf` vertices, 6 at least.
    ///
    /// # Errors
    /// For smaller pieces.
    pub fn with_leaves(tree: &Tree, leaf: usize) -> Result<Self> {
        if leaf < LEAST_LEAF {
            let detail =
                format!("is to be cut down to {leaf} vertices, but {LEAST_LEAF} is the least");
            return Err(Error::Graph { detail });
        }
        Ok(Self::cut(tree, leaf))
    }

    fn cut(tree: &Tree, leaf: usize) -> Self {
        let all = tree.vertices();
        let mut cutter = Cutter {
            tree,
            piece: vec![0; all],
            pieces: 0,
        };
        let mut found = Self {
            vertices: all,
            leaves: Vec::new(),
            splits: Vec::new(),
            lattice: tree.step(),
        };
        let mut open = vec![((0..all).collect::<Vec<_>>(), 0)];
        while let Some((vertices, depth)) = open.pop() {
            cutter.mark(&vertices);
            if vertices.len() <= leaf {
                found.leaves.push(cutter.leaf(vertices));
                continue;
            }
            let (pivot, sides) = cutter.split(&vertices);
            for side in &sides {
                let mut vertices = side.vertices.clone();
                vertices.push(pivot);
                open.push((vertices, depth + 1));
            }
            found.splits.push(Split {
                pivot,
                sides,
                depth,
            });
        }
        found
    }

    /// Number of vertices.
    pub fn vertices(&self) -> usize {
        self.vertices
    }

    /// The pieces that are laid out; a vertex may be in several, two of them in one at most.
    pub fn leaves(&self) -> &[Leaf] {
        &self.leaves
    }

    /// The cuts.
    pub fn splits(&self) -> &[Split] {
        &self.splits
    }

    /// Cuts above the deepest piece.
    pub fn depth(&self) -> usize {
        let deepest = self.splits.iter().map(|split| split.depth + 1).max();
        deepest.unwrap_or(0)
    }

    /// A length that all distances are whole numbers of, where there is one.
    pub fn lattice(&self) -> Option<f64> {
        self.lattice
    }

    /// `Y_i = Σ_j f(dist(i, j)) X_j` for a field `[vertices, width]` row by row.
    ///
    /// # Errors
    /// For a field of another size.
    pub fn integrate(&self, function: &Function, field: &[f64], width: usize) -> Result<Vec<f64>> {
        if field.len() != self.vertices * width {
            return Err(Error::Shape {
                name: "field",
                found: vec![field.len()],
                expected: vec![self.vertices * width],
            });
        }
        let mut sum = vec![0.0; field.len()];
        for leaf in &self.leaves {
            for (row, i) in leaf.vertices.iter().enumerate() {
                let distances = &leaf.distances[row * leaf.vertices.len()..];
                let sum = &mut sum[i * width..][..width];
                for (j, distance) in leaf.vertices.iter().zip(distances) {
                    let value = function.value(*distance);
                    for (sum, entry) in sum.iter_mut().zip(&field[j * width..][..width]) {
                        *sum += value * entry;
                    }
                }
            }
        }
        let own = function.value(0.0);
        for split in &self.splits {
            for [to, from] in [[0, 1], [1, 0]].map(|sides| sides.map(|side| &split.sides[side])) {
                let levels = (&to.distances[..], &from.distances[..]);
                let collected = from.collected(field, width);
                let given = multiply(function, self.lattice, levels, &collected, width);
                to.spread(&given, &mut sum, width);
            }
            let at = split.pivot * width;
            for (sum, entry) in sum[at..at + width].iter_mut().zip(&field[at..at + width]) {
                *sum -= own * entry;
            }
        }
        Ok(sum)
    }

    /// The gradient of `⟨G, Y⟩` with respect to each coefficient of the function, in the order of
    /// [`Function::derivatives`], for `G` of the shape of the field: what each derivative integrates to. That
    /// with respect to the field is `G` integrated, the matrix being symmetric.
    ///
    /// # Errors
    /// As [`IntegratorTree::integrate`].
    pub fn gradient(
        &self,
        function: &Function,
        field: &[f64],
        width: usize,
        gradient: &[f64],
    ) -> Result<Vec<f64>> {
        let each = function.derivatives().into_iter().map(|derivative| {
            let moved = self.integrate(&derivative, field, width)?;
            Ok(moved.iter().zip(gradient).map(|(y, g)| y * g).sum())
        });
        each.collect()
    }

    /// The whole matrix `[f(dist(i, j))]`, row by row: for small trees.
    pub fn matrix(&self, function: &Function) -> Result<Vec<f64>> {
        let size = self.vertices;
        let mut units = vec![0.0; size * size];
        for vertex in 0..size {
            units[vertex * size + vertex] = 1.0;
        }
        self.integrate(function, &units, size)
    }
}

/// A tree while it is cut.
struct Cutter<'a> {
    tree: &'a Tree,
    /// The piece that each vertex was last in.
    piece: Vec<usize>,
    pieces: usize,
}

impl Cutter<'_> {
    /// Makes vertices the piece that is looked at.
    fn mark(&mut self, vertices: &[usize]) {
        self.pieces += 1;
        for &vertex in vertices {
            self.piece[vertex] = self.pieces;
        }
    }

    /// Vertices of the piece from `from` on, `beside` and what lies behind it left out, each with how far it
    /// is and the place of the one before it in the list.
    fn walk(&self, from: usize, start: f64, beside: Option<usize>) -> Vec<(usize, f64, usize)> {
        let mut found = vec![(from, start, usize::MAX)];
        let mut at = 0;
        while let Some(&(vertex, distance, before)) = found.get(at) {
            let parent = match found.get(before) {
                Some(parent) => Some(parent.0),
                None => beside,
            };
            for &(other, weight) in self.tree.neighbours(vertex) {
                if self.piece[other] == self.pieces && Some(other) != parent {
                    found.push((other, distance + weight, at));
                }
            }
            at += 1;
        }
        found
    }

    fn leaf(&self, mut vertices: Vec<usize>) -> Leaf {
        vertices.sort_unstable();
        let mut distances = vec![0.0; vertices.len() * vertices.len()];
        for (row, &vertex) in vertices.iter().enumerate() {
            for (other, distance, _) in self.walk(vertex, 0.0, None) {
                if let Ok(column) = vertices.binary_search(&other) {
                    distances[row * vertices.len() + column] = distance;
                }
            }
        }
        Leaf {
            vertices,
            distances,
        }
    }

    /// The deepest vertex that more than half of the piece hangs from, and what hangs from it in two
    /// heaps.
    fn split(&self, vertices: &[usize]) -> (usize, [Side; 2]) {
        let order = self.walk(vertices[0], 0.0, None);
        let mut sizes = vec![1; order.len()];
        for at in (1..order.len()).rev() {
            sizes[order[at].2] += sizes[at];
        }
        let half = |at: &usize| 2 * sizes[*at] > vertices.len();
        // Later in the list is deeper, among those that lie on one way.
        let pivot = (0..order.len())
            .rev()
            .find(half)
            .map_or(vertices[0], |at| order[at].0);
        let mut branches: Vec<Vec<(usize, f64)>> = self
            .tree
            .neighbours(pivot)
            .iter()
            .filter(|(other, _)| self.piece[*other] == self.pieces)
            .map(|&(other, weight)| {
                let branch = self.walk(other, weight, Some(pivot)).into_iter();
                branch
                    .map(|(vertex, distance, _)| (vertex, distance))
                    .collect()
            })
            .collect();
        // Largest first; of equal ones those of lower numbers.
        branches.sort_by_key(|branch| (std::cmp::Reverse(branch.len()), branch[0].0));
        let mut heaps = [Vec::new(), Vec::new()];
        for branch in branches {
            let left = 4 * heaps[0].len() <= vertices.len();
            heaps[usize::from(!left)].extend(branch);
        }
        (pivot, heaps.map(side))
    }
}

/// Vertices by how far they are.
fn side(mut vertices: Vec<(usize, f64)>) -> Side {
    vertices.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    let mut found = Side {
        vertices: Vec::with_capacity(vertices.len()),
        levels: Vec::with_capacity(vertices.len()),
        distances: Vec::new(),
    };
    for (vertex, distance) in vertices {
        if found.distances.last() != Some(&distance) {
            found.distances.push(distance);
        }
        found.vertices.push(vertex);
        found.levels.push(found.distances.len() - 1);
    }
    found
}
