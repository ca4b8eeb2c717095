//! Topological attention (Choromanski et al., Fast Tree-Field Integrators: From Low Displacement Rank to
//! Topological Transformers, 2024, arXiv 2406.15881): linear attention whose weights carry a learned
//! function of the distance in a tree.
//!
//! ```text
//! y_i = Σ_j M_ij (φ(q_i) · φ(k_j)) v_j / Σ_j M_ij φ(q_i) · φ(k_j)
//! M_ij = g(a₀ + a₁ s + a₂ s²),   s = dist(i, j) / unit
//! ```
//!
//! The tree spans a grid of patches, the first row and every column from there (what Kruskal's rule makes of
//! equal edges); without `columns` it is a path, the order of the tokens; or it stands over a `graph` whose
//! vertices the tokens are, such as that of a mesh: a spanning tree, or several random ones over whose masks the mean is
//! taken. `a` are three numbers for a
//! layer, or for each head, and start where `M ≡ 1`: plain linear attention. `φ` is the positive part of
//! each feature, its square or fourth power, or positive random features of the exponential kernel
//! (Choromanski et al., Performer, arXiv 2009.14794).
//!
//! Products with `M` are those of [`lapidary_factor::trees`]: the tree is cut in two at a vertex again and
//! again, and what the sides give each other depends on levels of equal distance alone. Sums
//! `Σ φ(k_j) v_jᵀ` are held for the levels of one cut at a time, and never for each token; nothing is kept
//! for the gradient, which is three products of the same kind, `M` being symmetric, and a correlation
//! by distance for `a`. Where there are so few tokens that all pairs in tiles take less, they are laid out
//! tile by tile instead. So they are, too, under the distances of a graph's shortest paths, which is what trees
//! stand for.
//!
//! Pads have no features and stand behind the tokens on a grid or a graph. Where there are fewer tokens than
//! vertices, they are the first. Only bidirectional self-attention.
//!
//! Cost for each head of `n` tokens with `m` features: `2 n m (value_width + 1)` twice for every depth of
//! cuts, products of levels, and `2 · 32 n (m + value_width + 1)` in the pieces that are laid out; or
//! `2 n² (m + value_width + 1)` in tiles; that of each tree, where there are several.
//! Parameters: 3, or 3 for each head.

mod geometry;
mod laid_out;
mod operation;

pub use geometry::{GraphSpec, Metric};

use super::sums::{Normalised, Sums, kept};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Subsets, draw_seed};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use geometry::{Geometry, Pairs, Places};
use laid_out::LaidOut;
use lapidary_factor::trees::IntegratorTree;
use lapidary_kernels::{Tensor, by_hand, matmul};
use lapidary_signal::Mixing;
use operation::Masked;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};

const MAX_COLUMNS: usize = 1 << 16;
const MAX_FEATURES: usize = 1 << 12;
/// How many operations in tiles take as long as one in cuts.
const TILED: u64 = 8;

/// Linear attention under a function of the distance in a tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopologicalSpec {
    /// Patches in a row of an image; the order of the tokens when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<usize>,
    /// A graph whose vertices the tokens are, in place of the order of tokens or of an image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph: Option<GraphSpec>,
    /// What distances are taken along.
    #[serde(default, skip_serializing_if = "Metric::is_default")]
    pub metric: Metric,
    /// What queries and keys become.
    #[serde(default)]
    pub features: FeatureMap,
    /// `g`.
    #[serde(default)]
    pub mask: Mask,
    /// Whether each head has a mask of its own.
    #[serde(default)]
    pub per_head: bool,
    /// The distance that counts as one.
    #[serde(default = "one")]
    pub unit: f64,
}

fn one() -> f64 {
    1.0
}

impl Default for TopologicalSpec {
    fn default() -> Self {
        Self {
            columns: None,
            graph: None,
            metric: Metric::default(),
            features: FeatureMap::default(),
            mask: Mask::default(),
            per_head: false,
            unit: one(),
        }
    }
}

/// `φ`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FeatureMap {
    /// `max(x, 0)`.
    #[default]
    Relu,
    /// `x²`.
    Square,
    /// `x⁴`.
    Fourth,
    /// `e^{w · x − ‖x‖²/2}` for random `w`.
    Exponential {
        /// How many.
        count: usize,
        /// Seed of `w` where a pass does not draw its own.
        #[serde(default)]
        seed: u64,
    },
}

/// `g`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mask {
    /// `e^z`, from `a₀ = 0`.
    #[default]
    Exponential,
    /// `z`, from `a₀ = 1`; weights may become negative.
    Identity,
    /// `2 / (1 + z²)`, from `a₀ = 1`, where it is steepest; from `a₀ = 0`, its top, it has no slope and would never
    /// leave.
    InverseQuadratic,
}

impl Describe for TopologicalSpec {
    fn kind(&self) -> &'static str {
        "topological"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            bidirectional: true,
            ..Abilities::default()
        }
    }

    fn subsets(&self) -> Subsets {
        Subsets::AsPadding
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if let Some(columns) = self.columns {
            bounded(at("columns"), columns, 1..=MAX_COLUMNS)?;
        }
        if self.columns.is_some() && self.graph.is_some() {
            let expected =
                "absent beside columns: tokens are vertices of a graph or patches of an image";
            return Err(Error::spec(at("graph"), "given", expected));
        }
        self.metric.validate(self.graph.as_ref(), field)?;
        if !(self.unit.is_finite() && self.unit > 0.0) {
            return Err(Error::spec(at("unit"), self.unit, "a positive number"));
        }
        if let FeatureMap::Exponential { count, .. } = self.features {
            bounded(at("features.count"), count, 1..=MAX_FEATURES)?;
            if heads.scale.is_nan() || heads.scale <= 0.0 {
                let expected = "another map where the scale is not positive: its root multiplies queries \
                                and keys";
                return Err(Error::spec(at("features.kind"), "exponential", expected));
            }
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        let rows = if self.per_head { heads.heads } else { 1 };
        Ok(Box::new(Topological {
            spec: self.clone(),
            heads: *heads,
            mask: parameters.tensor("mask", &[rows, 3], Init::Zeros)?,
            known: Mutex::new(None),
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Topological {
    spec: TopologicalSpec,
    heads: Heads,
    /// `a` less where it starts, `[1 or heads, 3]`.
    mask: Tensor,
    /// The number of tokens of the last pass, and how they are apart: cutting trees takes longer than
    /// a pass over them.
    known: Mutex<Option<(usize, Arc<Vec<Geometry>>)>>,
}

impl Topological {
    /// The ways in which so many tokens are apart.
    fn geometries(&self, tokens: usize) -> Result<Arc<Vec<Geometry>>> {
        // Those of a graph are the same for any number of tokens.
        let key = match &self.spec.graph {
            Some(graph) if tokens <= graph.vertices => graph.vertices,
            _ => tokens,
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, found)) = known.as_ref()
            && *of == key
        {
            return Ok(found.clone());
        }
        let spec = &self.spec;
        let found = geometry::geometries(tokens, spec.columns, spec.graph.as_ref(), spec.metric)?;
        let found = Arc::new(found);
        *known = Some((key, found.clone()));
        Ok(found)
    }

    /// `M` by distance, `[heads, distances]`, for the length of each.
    fn by_distance(&self, lengths: &[f64]) -> Result<Tensor> {
        let distances = lengths.len();
        let power = |power: i32| {
            lengths
                .iter()
                .map(move |s| (s / self.spec.unit).powi(power))
        };
        let powers: Vec<f64> = (0..3).flat_map(power).collect();
        let powers = tensor(Tensor::from_vec(powers, (3, distances), self.mask.device()))?;
        let z = tensor(
            self.mask
                .matmul(&tensor(powers.to_dtype(self.mask.dtype()))?),
        )?;
        let mask = match self.spec.mask {
            Mask::Exponential => tensor(z.exp())?,
            Mask::Identity => tensor(z + 1.0)?,
            Mask::InverseQuadratic => {
                let squares = tensor(tensor(z + 1.0)?.sqr())?;
                tensor(tensor(tensor(squares + 1.0)?.recip())? * 2.0)?
            }
        };
        tensor(tensor(mask.broadcast_as((self.heads.heads, distances)))?.contiguous())
    }

    /// `φ` of queries and keys, `[batch, heads, length, features]`, that of pads zero.
    fn features(&self, [q, k]: [&Tensor; 2], pass: &MechanismPass<'_>) -> Result<[Tensor; 2]> {
        let kept = kept(pass, tensor(k.dim(2))?, k.dtype())?;
        let each = |map: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<[Tensor; 2]> {
            Ok([map(q)?, map(k)?])
        };
        let [q, k] = match self.spec.features {
            FeatureMap::Relu => each(&|x| tensor(x.relu()))?,
            FeatureMap::Square => each(&|x| tensor(x.sqr()))?,
            FeatureMap::Fourth => each(&|x| tensor(tensor(x.sqr())?.sqr()))?,
            FeatureMap::Exponential { count, seed } => {
                let logits = self.logits([q, k], count, draw_seed(pass, seed))?;
                let [q, k] = logits;
                // Factors of a query, and of all keys of a head, that their quotient is free of.
                let largest = tensor(q.max_keepdim(3))?.detach();
                let q = tensor(tensor(q.broadcast_sub(&largest))?.exp())?;
                let hidden = match &kept {
                    None => k.clone(),
                    Some(kept) => {
                        let added = tensor(kept.affine(1e30, -1e30))?;
                        tensor(tensor(k.broadcast_mul(kept))?.broadcast_add(&added))?
                    }
                };
                let largest = tensor(tensor(hidden.max_keepdim(3))?.max_keepdim(2))?.detach();
                [q, tensor(tensor(hidden.broadcast_sub(&largest))?.exp())?]
            }
        };
        let k = match kept {
            None => k,
            Some(kept) => tensor(k.broadcast_mul(&kept))?,
        };
        Ok([q, k])
    }

    /// `w · x − ‖x‖²/2` for `x` times the root of the scale, `[batch, heads, length, count]`.
    fn logits(&self, both: [&Tensor; 2], count: usize, seed: u64) -> Result<[Tensor; 2]> {
        let (heads, width) = (self.heads.heads, self.heads.head_width);
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = || {
            let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
            radius * (std::f64::consts::TAU * random.random::<f64>()).cos()
        };
        let drawn: Vec<f64> = (0..heads * width * count).map(|_| normal()).collect();
        let [q, _] = both;
        let shape = (1, heads, width, count);
        let drawn = tensor(Tensor::from_vec(drawn, shape, q.device()))?;
        let drawn = tensor(drawn.to_dtype(q.dtype()))?;
        let of = |x: &Tensor| -> Result<Tensor> {
            let x = tensor(x * self.heads.scale.sqrt())?;
            let along = matmul(&x, &drawn)?;
            let squares = tensor(tensor(tensor(x.sqr())?.sum_keepdim(3))? * 0.5)?;
            tensor(along.broadcast_sub(&squares))
        };
        let [q, k] = both;
        Ok([of(q)?, of(k)?])
    }

    /// Operations of features, and of the mask by distance.
    fn before(&self, [q, k]: [&Tensor; 2], distances: usize) -> u64 {
        let entries = q.elem_count() + k.elem_count();
        let width = self.heads.head_width.max(1);
        let features = match self.spec.features {
            FeatureMap::Relu | FeatureMap::Square => entries,
            FeatureMap::Fourth => 2 * entries,
            FeatureMap::Exponential { count, .. } => {
                entries * 3 + entries / width * count * (2 * width + 3)
            }
        };
        (features + self.heads.heads * distances * 6) as u64
    }
}

impl Mechanism for Topological {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let (queries, keys) = (tensor(q.dim(2))?, tensor(k.dim(2))?);
        if queries != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("{keys}, as many as keys"),
            ));
        }
        let geometries = self.geometries(keys)?;
        let masks: Result<Vec<Tensor>> = geometries
            .iter()
            .map(|geometry| self.by_distance(&geometry.lengths))
            .collect();
        let distances = geometries.iter().map(|geometry| geometry.lengths.len());
        let before = self.before([q, k], distances.sum());
        let [q, k] = self.features([q, k], pass)?;
        let sums = OnTrees {
            q,
            k,
            masks: masks?,
            geometries,
        };
        Ok(Box::new(Normalised::new(sums, 0.0, before)))
    }
}

/// `Σ_j M_ij (φ(q_i) · φ(k_j)) v_j`, `M` the mean over several trees.
#[derive(Debug)]
struct OnTrees {
    /// `φ(q)` and `φ(k)`, `[batch, heads, length, features]`.
    q: Tensor,
    k: Tensor,
    /// `M` by distance for each tree, `[heads, distances]`.
    masks: Vec<Tensor>,
    geometries: Arc<Vec<Geometry>>,
}

/// In which order the pairs of one tree are gone through.
enum Way {
    Tiles(Pairs),
    Cuts(Arc<IntegratorTree>),
}

impl OnTrees {
    fn features(&self) -> usize {
        self.q.dims().last().copied().unwrap_or(0)
    }

    /// The way that takes less, and its operations for one head.
    fn way(&self, geometry: &Geometry, width: usize) -> (Way, u64) {
        let [.., length] = self.sizes();
        let tiles = |pairs: &Pairs| {
            let operations = laid_out::operations(length, self.features(), width);
            (Way::Tiles(pairs.clone()), operations)
        };
        let cuts = |cut: &Arc<IntegratorTree>| {
            let operations = operation::operations(cut, self.features(), width);
            (Way::Cuts(cut.clone()), operations)
        };
        match &geometry.places {
            Places::Pairs(pairs) => tiles(pairs),
            Places::Cut(cut) => cuts(cut),
            Places::Both(pairs, cut) => {
                let (tiles, cuts) = (tiles(pairs), cuts(cut));
                match tiles.1 <= TILED * cuts.1 {
                    true => tiles,
                    false => cuts,
                }
            }
        }
    }

    /// The sums of one tree, `[batch, heads, length, width]`.
    fn of(
        &self,
        geometry: &Geometry,
        mask: &Tensor,
        values: &Tensor,
    ) -> lapidary_kernels::Result<Tensor> {
        let (batch, heads, length, width) = values.dims4()?;
        let (features, distances) = (self.features(), mask.dim(1)?);
        match self.way(geometry, width) {
            (Way::Tiles(pairs), _) => {
                let tiles = LaidOut {
                    pairs,
                    length,
                    heads,
                    features,
                    width,
                    distances,
                };
                let inputs = [&self.q, &self.k, values, mask];
                by_hand(tiles, &inputs, &[batch, heads, length, width])
            }
            (Way::Cuts(cut), _) => {
                // Vertices that are no tokens have no features.
                let all = cut.vertices();
                let filled = |x: &Tensor| x.pad_with_zeros(2, 0, all.saturating_sub(length));
                let (q, k, values) = (filled(&self.q)?, filled(&self.k)?, filled(values)?);
                let cuts = Masked {
                    cut,
                    heads,
                    features,
                    width,
                    distances,
                };
                let sums = by_hand(cuts, &[&q, &k, &values, mask], &[batch, heads, all, width])?;
                Ok(sums.narrow(2, 0, length)?)
            }
        }
    }
}

impl Sums for OnTrees {
    fn sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let mut total: Option<Tensor> = None;
        for (geometry, mask) in self.geometries.iter().zip(&self.masks) {
            let sums = self.of(geometry, mask, values)?;
            total = Some(match total {
                None => sums,
                Some(total) => (total + sums)?,
            });
        }
        let Some(total) = total else {
            let name = "attention on trees";
            let error = lapidary_kernels::Error::argument(name, "trees", 0, "at least 1");
            return Err(error);
        };
        match self.masks.len() {
            1 => Ok(total),
            trees => Ok((total / trees as f64)?),
        }
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes();
        let ways = self.geometries.iter();
        let ways = ways.map(|geometry| self.way(geometry, width).1);
        let trees = self.masks.len();
        let averaging = if trees > 1 { trees * length * width } else { 0 };
        (batch * heads) as u64 * (ways.sum::<u64>() + averaging as u64)
    }
}
