//! EcoFormer (Liu, Pan, He, Cai, Zhuang, EcoFormer: Energy-Saving Attention with Linear Complexity, 2022,
//! arXiv 2209.09004): queries that are keys too become short codes of ±1, and what codes have in common is
//! how much tokens attend to each other.
//!
//! ```text
//! κ(x)_j = exp(−‖x − a_j‖² / 2σ²),   x of unit length,   b(x) = sign((κ(x) − μ) Aᵀ) ∈ {−1, 1}^β
//! y_i = Σ_j (b_i · b_j + β + 1) v_j / Σ_j (b_i · b_j + β + 1)
//!     = (b_i · Σ_j b_jᵀ v_j + (β + 1) Σ_j v_j) / (b_i · Σ_j b_j + n (β + 1))
//! ```
//!
//! Anchors `a`, means `μ` and hashes `A` are parameters that no gradient reaches: they start random and are
//! learned from what tokens attend to by [`EcoformerSpec::fit`], once or again. `σ²` is the mean squared
//! distance of the real tokens of a sequence from a head's anchors, or that of the data that hashes were
//! learned from, which causal attention asks for. The sign's gradient is that of its argument where it is
//! below 1 in size and nothing elsewhere.
//!
//! `released` is what the authors' program computes: `(β + 1) v_i`, a token's own value, in the
//! place of `(β + 1) Σ_j v_j`. Its weights do not sum to 1.
//!
//! Codes are sums and differences to a chip without multipliers, which [`EcoformerSpec::tally`] counts; here
//! they are factors of a product, and where all weights are laid out, bits that are counted
//! ([`PackedCodes`]).
//!
//! Cost of a head of `n` tokens with `m` anchors: `n (3 head_width + m (2 head_width + 6) + 2 m β)` for codes,
//! then `4 n (β + 1)(value_width + 1)`, under a causal mask also the products of each chunk of 64 positions
//! with itself, and `n (value_width + 1)` for the quotients. Parameters: `m (head_width + 1 + β)` for
//! each head. Memory of a decode state: `(β + 1)(value_width + 1)` numbers for each head.

mod codes;
mod eigenvectors;
mod energy;
mod fit;
mod joint;

pub use codes::PackedCodes;
pub use energy::Tally;
pub use fit::{Bit, Fit, Fitted, Initial, Sample, Search, learn};

use super::sums::{Features, Normalised, kept, resume};
use super::{
    Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, QueryKeySharing, Resumed,
};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Error, Result};
use codes::MAX_BITS;
use lapidary_kernels::{
    CodeHash, DType, Device, Tensor, code_means, hashed_codes, hashed_features, matmul, naive,
};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_ANCHORS: usize = 1 << 12;
/// Positions that meet directly under a causal mask.
const CHUNK: usize = 64;
/// The least length and mean squared distance, as hashing has them.
const LEAST: f64 = 1e-12;

/// Attention by codes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EcoformerSpec {
    /// Entries `β` of a code.
    #[serde(default = "sixteen")]
    pub bits: usize,
    /// Anchors `m` of a head.
    #[serde(default = "twenty_five")]
    pub anchors: usize,
    /// Whose mean squared distance `σ²` is.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Whether a token's own value stands in the place of the sum of all, as in the authors' program.
    #[serde(default)]
    pub released: bool,
}

/// Whose mean squared distance `σ²` is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Bandwidth {
    /// That of the sequence at hand.
    #[default]
    Sample,
    /// That of the data that hashes were learned from.
    Fitted,
}

fn sixteen() -> usize {
    16
}

fn twenty_five() -> usize {
    25
}

impl Default for EcoformerSpec {
    fn default() -> Self {
        Self {
            bits: sixteen(),
            anchors: twenty_five(),
            bandwidth: Bandwidth::Sample,
            released: false,
        }
    }
}

impl EcoformerSpec {
    /// The map from queries of heads to codes.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    pub fn hashing(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Hashing> {
        let (count, width) = (heads.heads, heads.head_width);
        let unit = Init::Normal {
            deviation: 1.0 / (width as f64).sqrt(),
        };
        // Kernel values lie about exp(−1/2), and unit vectors √2 apart.
        let usual = Init::Constant((-0.5f64).exp());
        let mut constant = |name: &str, shape: &[usize], init: Init| -> Result<Tensor> {
            Ok(parameters.tensor(name, shape, init)?.detach())
        };
        Ok(Hashing(CodeHash {
            anchors: constant("anchors", &[count, self.anchors, width], unit)?,
            means: constant("means", &[count, self.anchors], usual)?,
            hashes: constant(
                "hashes",
                &[count, self.bits, self.anchors],
                Init::Normal { deviation: 1.0 },
            )?,
            bandwidths: match self.bandwidth {
                Bandwidth::Sample => None,
                Bandwidth::Fitted => Some(constant("bandwidths", &[count], Init::Constant(2.0))?),
            },
        }))
    }
}

impl Describe for EcoformerSpec {
    fn kind(&self) -> &'static str {
        "ecoformer"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: true,
            ..Abilities::default()
        }
    }

    fn is_scaled(&self) -> bool {
        false
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if heads.sharing == QueryKeySharing::None {
            return Err(Error::spec(
                field,
                "ecoformer with keys of their own",
                "one with sharing = \"query-key\" beside it: queries and keys have one code",
            ));
        }
        bounded(at("bits"), self.bits, 1..=MAX_BITS)?;
        bounded(at("anchors"), self.anchors, 1..=MAX_ANCHORS)?;
        if heads.causal && self.bandwidth == Bandwidth::Sample {
            return Err(Error::spec(
                at("bandwidth"),
                "sample",
                "fitted in causal attention: the mean over a sequence depends on later tokens too",
            ));
        }
        match heads.causal && self.released {
            true => Err(Error::spec(
                at("released"),
                true,
                "false in causal attention, which the authors' program does not have",
            )),
            false => Ok(()),
        }
    }

    fn build(&self, heads: &Heads, parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Ecoformer {
            spec: self.clone(),
            causal: heads.causal,
            hashing: self.hashing(heads, parameters)?,
        }))
    }
}

/// The map from queries to codes.
#[derive(Debug)]
pub struct Hashing(CodeHash);

impl Hashing {
    /// `(κ(x) − μ) Aᵀ` `[batch, heads, length, bits]` of queries `[batch, heads, length, head_width]`, of
    /// which `kept` `[batch, 1, length, 1]` are no pads, with all of `κ` laid out.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn project(&self, queries: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        tensor(naive::hash_arguments(queries, kept, &self.0))
    }

    /// Codes of ±1 `[batch, heads, length, bits]`, of the same: the signs of [`Hashing::project`].
    ///
    /// # Errors
    /// When the shapes do not fit each other.
    pub fn codes(&self, queries: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        tensor(hashed_codes(queries, kept, &self.0))
    }
}

/// `1` from zero on and `−1` below; a gradient passes where `x` is below 1 in size.
///
/// # Errors
/// Those of the tensor engine.
pub fn sign(x: &Tensor) -> Result<Tensor> {
    tensor(naive::passing_signs(x))
}

/// What is known of a pass before its codes are.
#[derive(Debug)]
struct Pass {
    /// `[batch, heads, queries, keys]`.
    sizes: [usize; 4],
    /// `[batch, 1, length, 1]`, where there are pads.
    kept: Option<Tensor>,
    /// Operations that codes take.
    before: u64,
}

/// The module.
#[derive(Debug)]
struct Ecoformer {
    spec: EcoformerSpec,
    causal: bool,
    hashing: Hashing,
}

impl Ecoformer {
    /// What a pass says before its codes are known.
    fn known(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Pass> {
        let (batch, heads, queries, width) = tensor(q.dims4())?;
        let keys = tensor(k.dim(2))?;
        if queries != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("{keys}, as keys, which ecoformer's queries are"),
            ));
        }
        let EcoformerSpec { bits, anchors, .. } = self.spec;
        let each = 3 * width + anchors * (2 * width + 6) + 2 * anchors * bits;
        Ok(Pass {
            sizes: [batch, heads, queries, keys],
            kept: kept(pass, keys, q.dtype())?,
            before: (batch * heads * queries * each) as u64,
        })
    }

    /// `b · b + β + 1` for each query and key is the product of `[b, β + 1]` and `[b, 1]`.
    fn sums(
        &self,
        q: &Tensor,
        k: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Normalised<Features>> {
        let Pass { kept, before, .. } = self.known(q, k, pass)?;
        let both = hashed_features(q, kept.as_ref(), &self.hashing.0, self.offset());
        let [features_of_queries, features_of_keys] = tensor(both)?;
        let features = Features {
            q: features_of_queries,
            k: features_of_keys,
            causal: self.causal,
            log_decay: None,
            chunk: CHUNK,
        };
        Ok(Normalised::new(features, 0.0, before))
    }

    /// Codes alone, which all queries and keys share.
    fn coded(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Coded> {
        let pass = self.known(q, k, pass)?;
        Ok(Coded {
            codes: self.hashing.codes(q, pass.kept.as_ref())?,
            bits: self.spec.bits,
            pass,
        })
    }

    /// `β + 1`.
    fn offset(&self) -> f64 {
        self.spec.bits as f64 + 1.0
    }
}

impl Mechanism for Ecoformer {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        if !self.causal && !self.spec.released {
            return Ok(Box::new(self.coded(q, k, pass)?));
        }
        let sums = self.sums(q, k, pass)?;
        Ok(match self.spec.released {
            true => Box::new(Released {
                offset: self.offset(),
                sums,
            }),
            false => Box::new(Hashed {
                bits: self.spec.bits,
                sums,
            }),
        })
    }

    fn memory(&self) -> Memory {
        match self.causal {
            true => Memory::Own,
            false => Memory::KeysAndValues,
        }
    }

    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        resume(self.sums(q, k, pass)?, v, state, None, pass)
    }
}

/// Means over all keys, whose codes are those of the queries.
#[derive(Debug)]
struct Coded {
    /// `[batch, heads, length, bits]`.
    codes: Tensor,
    bits: usize,
    pass: Pass,
}

impl Mixing for Coded {
    fn sizes(&self) -> [usize; 4] {
        self.pass.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let offset = self.bits as f64 + 1.0;
        code_means(&self.codes, values, self.pass.kept.as_ref(), offset)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, queries, keys] = self.pass.sizes;
        let sums = 2 * (queries + keys) * (self.bits + 1) * (width + 1);
        self.pass.before + (batch * heads * (sums + queries * (width + 1))) as u64
    }

    /// By counting bits, where no gradient asks for products.
    fn weights(&self, like: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, _, keys] = self.pass.sizes;
        let shape = (batch, heads, keys, 1);
        let there = match &self.pass.kept {
            Some(kept) => kept.broadcast_as(shape)?,
            None => Tensor::ones(shape, self.codes.dtype(), self.codes.device())?,
        };
        counted(self, [&self.codes, &there], false, like)
    }
}

/// Sums over codes that are not later, divided by the sum of weights.
#[derive(Debug)]
struct Hashed {
    bits: usize,
    sums: Normalised<Features>,
}

impl Mixing for Hashed {
    fn sizes(&self) -> [usize; 4] {
        self.sums.sizes()
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.sums.mix(values)
    }

    fn operations(&self, width: usize) -> u64 {
        self.sums.operations(width)
    }

    /// By counting bits, where no gradient asks for products.
    fn weights(&self, like: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let features = &self.sums.sums;
        let codes = features.q.narrow(3, 0, self.bits)?;
        // The constant feature of a key is whether it is one.
        let there = features.k.narrow(3, self.bits, 1)?;
        counted(self, [&codes, &there], features.causal, like)
    }
}

/// The weights of `mixing` by its codes `[batch, heads, length, bits]`, of tokens that are `there`
/// `[batch, heads, length, 1]`, by counting bits, where no gradient asks for products.
fn counted(
    mixing: &dyn Mixing,
    [codes, there]: [&Tensor; 2],
    causal: bool,
    like: &Tensor,
) -> lapidary_kernels::Result<Tensor> {
    let [batch, heads, queries, keys] = mixing.sizes();
    let packed = match codes.track_op() {
        true => None,
        false => PackedCodes::new(codes).ok(),
    };
    let Some(packed) = packed else {
        let units = Tensor::eye(keys, like.dtype(), like.device())?;
        let units = units.broadcast_as((batch, heads, keys, keys))?;
        return mixing.mix(&units.contiguous()?);
    };
    let there = there.to_dtype(DType::F64)?.flatten_all()?;
    let there = there.to_vec1::<f64>()?;
    let offset = codes.dim(3)? as i64 + 1;
    let mut weights = Vec::with_capacity(batch * heads * queries * keys);
    let each = packed
        .words()
        .chunks(keys.max(1))
        .zip(there.chunks(keys.max(1)));
    for (codes, there) in each {
        for (i, &query) in codes.iter().enumerate() {
            let of = codes
                .iter()
                .zip(there)
                .enumerate()
                .map(|(j, (&key, &there))| {
                    let seen = there > 0.0 && (!causal || j <= i);
                    match seen {
                        true => (packed.product(query, key) + offset) as f64,
                        false => 0.0,
                    }
                });
            let row = weights.len();
            weights.extend(of);
            let total: f64 = weights.iter().skip(row).sum();
            for weight in weights.iter_mut().skip(row) {
                *weight /= total.max(1.0);
            }
        }
    }
    let weights = Tensor::from_vec(weights, (batch, heads, queries, keys), &Device::Cpu)?;
    Ok(weights.to_dtype(like.dtype())?.to_device(like.device())?)
}

/// `(b_i · Σ_j b_jᵀ v_j + (β + 1) v_i) / (b_i · Σ_j b_j + n (β + 1))`.
#[derive(Debug)]
struct Released {
    /// `β + 1`.
    offset: f64,
    sums: Normalised<Features>,
}

impl Mixing for Released {
    fn sizes(&self) -> [usize; 4] {
        self.sums.sizes()
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let Features { q, k, .. } = &self.sums.sums;
        let bits = q.dim(3)?.saturating_sub(1);
        let (codes, keys) = (q.narrow(3, 0, bits)?, k.narrow(3, 0, bits)?);
        let there = k.narrow(3, bits, 1)?;
        let context = matmul(&keys.transpose(2, 3)?, values)?;
        let own = (values.broadcast_mul(&there)? * self.offset)?;
        let sums = (matmul(&codes, &context)? + own)?;
        let total = codes.broadcast_mul(&keys.sum_keepdim(2)?)?.sum_keepdim(3)?;
        let count = (there.sum_keepdim(2)? * self.offset)?;
        // Where there is no key at all, sums are zero.
        Ok(sums.broadcast_div(&total.broadcast_add(&count)?.maximum(1.0)?)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, queries, _] = self.sizes();
        let bits = self.offset as usize - 1;
        let each = 4 * bits * width + 3 * bits + 3 * width + 2;
        self.sums.before + (batch * heads * queries * each) as u64
    }
}
