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
//! Pairs of tokens are those of [`lapidary_kernels::tree_attention`]: the tree is cut in two at a vertex again and again,
//! down to pieces whose tokens meet pair by pair, and what the sides of a cut give each other depends on sums of two
//! distances alone. Where the mask is smooth over these, as a polynomial beside an exponential is, sums
//! `Σ φ(k_j) v_jᵀ` are held at a few distances on either side, `r` of them, for one cut at a time and never for each
//! token; elsewhere, and where there are too few tokens for that to be less, tokens of both sides meet pair by pair as
//! well. Nothing is kept for the gradient. Under the distances of a graph's shortest paths, which is what trees stand
//! for, all pairs are laid out.
//!
//! Pads have no features and stand behind the tokens on a grid or a graph. Where there are fewer tokens than
//! vertices, they are the first. Only bidirectional self-attention.
//!
//! Cost for each head of `n` tokens with `m` features: `4 r n m (value_width + 1)` for every depth of cuts, and
//! `2 · 128 n (m + value_width + 1)` in the pieces that are laid out, `2 n² (m + value_width + 1)` at most; that of each
//! tree, where there are several.
//! Parameters: 3, or 3 for each head.

mod geometry;
mod own;

pub use geometry::{GraphSpec, Metric};

use super::sums::{Normalised, Sums, kept};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Subsets, draw_seed};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Draws, Error, Result};
use geometry::Geometry;
use lapidary_kernels::{
    DType, Device, Tensor, TreeFeatures, TreeMask, matmul, quotients, tree_attention,
    tree_attention_operations,
};
use lapidary_signal::Mixing;
use own::{OnOwnTrees, Own};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

const MAX_COLUMNS: usize = 1 << 16;
const MAX_FEATURES: usize = 1 << 12;
/// Most tokens, of sequences of all lengths together, of which it is kept how they are apart.
const MOST_KNOWN: usize = 1 << 16;

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
    #[serde(deserialize_with = "crate::fields::none")]
    Relu,
    /// `x²`.
    #[serde(deserialize_with = "crate::fields::none")]
    Square,
    /// `x⁴`.
    #[serde(deserialize_with = "crate::fields::none")]
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

    fn is_scaled(&self) -> bool {
        matches!(self.features, FeatureMap::Exponential { .. })
    }

    fn longest(&self) -> Option<(String, usize)> {
        let graph = self.graph.as_ref()?;
        Some(("graph.vertices".to_owned(), graph.vertices))
    }

    fn draws(&self) -> Draws {
        Draws::anything(matches!(self.features, FeatureMap::Exponential { .. }))
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
            known: Mutex::default(),
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
    /// How so many tokens are apart, for the numbers of the last passes: cutting trees takes longer than a pass over
    /// them, and sequences of one batch may each have trees of their own.
    known: Mutex<BTreeMap<usize, Arc<Vec<Geometry>>>>,
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
        if let Some(found) = known.get(&key) {
            return Ok(found.clone());
        }
        let spec = &self.spec;
        let found = geometry::geometries(tokens, spec.columns, spec.graph.as_ref(), spec.metric)?;
        let found = Arc::new(found);
        if known.keys().sum::<usize>().saturating_add(key) > MOST_KNOWN {
            known.clear();
        }
        known.insert(key, found.clone());
        Ok(found)
    }

    /// Whether tokens are farther apart, or nearer, where there are more of them.
    fn has_trees_of_each_length(&self) -> bool {
        self.spec.graph.is_none() && matches!(self.spec.metric, Metric::RandomTrees { .. })
    }

    /// The mixing of sequences each of which has the trees of its real tokens, that stand at `places`.
    fn mixing_of_each(
        &self,
        [q, k]: [&Tensor; 2],
        places: &[Vec<u32>],
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let (batch, heads, length, _) = tensor(q.dims4())?;
        let (features, phi) = self.features([q, k], pass)?;
        let (mut each, mut distances) = (Vec::with_capacity(batch), 0);
        for (sequence, real) in places.iter().enumerate() {
            if real.is_empty() {
                each.push(None);
                continue;
            }
            let geometries = self.geometries(real.len())?;
            let lengths = geometries.iter().map(|geometry| geometry.lengths.len());
            distances += lengths.sum::<usize>();
            let masks = geometries.iter().map(|geometry| self.mask(geometry));
            let masks = masks.collect::<Result<Vec<TreeMask>>>()?;
            let places = tensor(Tensor::from_slice(real, real.len(), q.device()))?;
            let of = |x: &Tensor| -> Result<Tensor> {
                let x = tensor(tensor(x.narrow(0, sequence, 1))?.contiguous())?;
                tensor(x.index_select(&places, 2))
            };
            let [q, k] = features.each_ref().map(of);
            each.push(Some(Own {
                trees: OnTrees {
                    q: q?,
                    k: k?,
                    phi,
                    masks,
                },
                rows: Own::rows(real, length, places.device())?,
                places,
            }));
        }
        let before = self.before([q, k], distances);
        let sizes = [batch, heads, length, length];
        let sums = OnOwnTrees { sizes, each };
        Ok(Box::new(Normalised::new(sums, 0.0, before)))
    }

    /// `M` by distance, `[1 or heads, distances]`, and its derivatives by `a`.
    fn mask(&self, geometry: &Geometry) -> Result<TreeMask> {
        let distances = geometry.lengths.len();
        let power = |power: i32| {
            let lengths = geometry.lengths.iter();
            lengths.map(move |s| (s / self.spec.unit).powi(power))
        };
        let powers: Vec<f64> = (0..3).flat_map(power).collect();
        let powers = tensor(Tensor::from_vec(powers, (3, distances), &Device::Cpu))?;
        // What a mask is read off must not be rough with rounding.
        let a = tensor(tensor(self.mask.to_device(&Device::Cpu))?.to_dtype(DType::F64))?;
        let z = tensor(a.matmul(&powers))?;
        let (values, slope) = match self.spec.mask {
            Mask::Exponential => {
                let values = tensor(z.exp())?;
                (values.clone(), values.detach())
            }
            Mask::Identity => (tensor(&z + 1.0)?, tensor(z.ones_like())?.detach()),
            Mask::InverseQuadratic => {
                // 2/(1 + (1 + z)²), whose slope is −(1 + z) of its square.
                let moved = tensor(&z + 1.0)?;
                let values = tensor(tensor(tensor(moved.sqr())? + 1.0)?.recip())?;
                let values = tensor(values * 2.0)?;
                let squared = tensor(values.detach().sqr())?;
                let slope = tensor(tensor(squared * moved.detach())?.neg())?;
                (values, slope)
            }
        };
        let directions = tensor(slope.unsqueeze(1))?;
        Ok(TreeMask {
            pairs: geometry.pairs.clone(),
            values,
            directions: tensor(directions.broadcast_mul(&tensor(powers.unsqueeze(0))?))?,
        })
    }

    /// `φ` of queries and keys, `[batch, heads, length, features]`, that of pads zero, or what the kernel is to make it of.
    fn features(
        &self,
        [q, k]: [&Tensor; 2],
        pass: &MechanismPass<'_>,
    ) -> Result<([Tensor; 2], TreeFeatures)> {
        let kept = kept(pass, tensor(k.dim(2))?, k.dtype())?;
        let given = || [q.clone(), k.clone()];
        let ([q, k], phi) = match self.spec.features {
            FeatureMap::Relu => (given(), TreeFeatures::Relu),
            FeatureMap::Square => (given(), TreeFeatures::Square),
            FeatureMap::Fourth => (given(), TreeFeatures::Fourth),
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
                let k = tensor(tensor(hidden.broadcast_sub(&largest))?.exp())?;
                ([q, k], TreeFeatures::Given)
            }
        };
        // The features of zeros are zeros, where the kernel makes them.
        let k = match kept {
            None => k,
            Some(kept) => tensor(k.broadcast_mul(&kept))?,
        };
        Ok(([q, k], phi))
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
        let masks = if self.spec.per_head {
            self.heads.heads
        } else {
            1
        };
        (features + masks * distances * 6) as u64
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
        if let Some(keep) = pass.keep.filter(|_| self.has_trees_of_each_length()) {
            let places = own::real_places(keep)?;
            if places.iter().any(|real| real.len() != keys) {
                return self.mixing_of_each([q, k], &places, pass);
            }
        }
        let known = self.geometries(keys)?;
        let geometries = match known.iter().all(|geometry| geometry.pairs.tokens() == keys) {
            true => known,
            false => Arc::new(known.iter().map(|geometry| geometry.first(keys)).collect()),
        };
        let masks: Result<Vec<TreeMask>> = geometries
            .iter()
            .map(|geometry| self.mask(geometry))
            .collect();
        let distances = geometries.iter().map(|geometry| geometry.lengths.len());
        let before = self.before([q, k], distances.sum());
        let ([q, k], phi) = self.features([q, k], pass)?;
        let sums = OnTrees {
            q,
            k,
            phi,
            masks: masks?,
        };
        Ok(Box::new(Normalised::new(sums, 0.0, before)))
    }
}

/// `Σ_j M_ij (φ(q_i) · φ(k_j)) v_j`, `M` the mean over several trees.
#[derive(Debug)]
struct OnTrees {
    /// `[batch, heads, length, width]`.
    q: Tensor,
    k: Tensor,
    /// What features are, made of these.
    phi: TreeFeatures,
    /// That of each tree.
    masks: Vec<TreeMask>,
}

impl OnTrees {
    /// Sums of values with those of the weights behind them, `[batch, heads, length, width + 1]`.
    fn beside_weights(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let mut total: Option<Tensor> = None;
        for mask in &self.masks {
            let sums = tree_attention([&self.q, &self.k, values], self.phi, mask)?;
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
}

impl Sums for OnTrees {
    fn sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let sums = self.beside_weights(values)?;
        Ok(sums.narrow(3, 0, values.dim(3)?)?)
    }

    /// Without a column of ones beside the values.
    fn means(&self, values: &Tensor, epsilon: f64) -> lapidary_kernels::Result<Tensor> {
        quotients(&self.beside_weights(values)?, epsilon)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes();
        let features = self.q.dims().last().copied().unwrap_or(0);
        let each = self.masks.iter().map(|mask| {
            // Sizes that do not fit are refused where sums are made.
            tree_attention_operations(mask, heads, features, width).unwrap_or(0)
        });
        let trees = self.masks.len();
        let averaging = if trees > 1 { trees * length * width } else { 0 };
        batch as u64 * (each.sum::<u64>() + (heads * averaging) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::QueryKeySharing;

    /// Batches come with sequences of several lengths, again and again.
    #[test]
    fn trees_of_several_lengths_are_cut_once() {
        let mechanism = Topological {
            spec: TopologicalSpec {
                metric: Metric::RandomTrees { count: 1, seed: 0 },
                ..TopologicalSpec::default()
            },
            heads: Heads {
                width: 2,
                heads: 1,
                head_width: 2,
                value_width: 2,
                causal: false,
                scale: 1.0,
                sharing: QueryKeySharing::None,
            },
            mask: Tensor::zeros((1, 3), DType::F64, &Device::Cpu).unwrap(),
            known: Mutex::default(),
        };
        let of = |tokens| mechanism.geometries(tokens).unwrap();
        let [five, nine] = [5, 9].map(of);
        assert!(Arc::ptr_eq(&five, &of(5)) && Arc::ptr_eq(&nine, &of(9)));
        // What is held does not grow without end.
        let known = || mechanism.known.lock().unwrap();
        known().insert(MOST_KNOWN, five);
        of(7);
        assert!(known().keys().eq(&[7]));
    }
}
