//! The methods that are more than a factorisation of single layers, one file each; and the list.

pub(crate) mod attention_cosine;
pub(crate) mod block_influence;
pub(crate) mod channel_magnitude;
pub(crate) mod channels;
pub mod curvature;
pub(crate) mod entropy;
pub(crate) mod fuse;
pub(crate) mod linearise;
pub(crate) mod lorap;
pub(crate) mod merged_features;
pub(crate) mod modegpt;
pub(crate) mod pruning;
pub(crate) mod quantise;
pub(crate) mod replace_me;
pub(crate) mod shedder;
pub mod slicing;

pub use lorap::{LorapDecomposition, LorapSettings};
pub use modegpt::ModegptSettings;
pub use pruning::{MovementSettings, Pattern, PruneSettings, Scope};
pub use quantise::{QuantiseSettings, RoundingGoal};
pub use shedder::ShedderSettings;

use crate::factorisation::{
    ACTIVATION_WEIGHTED, FWSVD, GENERALISED_FISHER, ROW_COLUMN_FISHER, SVD, WHITENED,
};
use crate::method::Method;

/// Every method, by name.
pub(crate) const METHODS: &[&Method] = &[
    &ACTIVATION_WEIGHTED,
    &attention_cosine::ATTENTION_COSINE,
    &quantise::AWQ,
    &block_influence::BLOCK_INFLUENCE,
    &pruning::CHANNEL_GRADIENT,
    &channel_magnitude::CHANNEL_MAGNITUDE,
    &slicing::COORDINATE_MAGNITUDE,
    &curvature::CURVATURE,
    &curvature::CURVATURE_RECTANGLE,
    &linearise::DELETE_LINEAR,
    &slicing::DOTRESIZE,
    &merged_features::DOTRESIZE_HIDDEN,
    &slicing::DOTRESIZE_SHARED,
    &entropy::ENTROPY_ATTENTION,
    &entropy::ENTROPY_BLOCKS,
    &pruning::FIRST_ORDER,
    &fuse::FUSE_LORA,
    &fuse::FUSEGPT,
    &FWSVD,
    &GENERALISED_FISHER,
    &quantise::GPTQ,
    &quantise::INT4,
    &quantise::INT8,
    &linearise::LINEARISE,
    &lorap::LORAP,
    &fuse::MACRO_INFLUENCE,
    &pruning::MAGNITUDE,
    &shedder::MAMBA_SHEDDER,
    &shedder::MAMBA_SHEDDER_SCAN,
    &shedder::MAMBA_SHEDDER_WIDTH,
    &modegpt::MODEGPT,
    &pruning::MOVEMENT,
    &pruning::PRUNE_HEADS,
    &pruning::RANDOM_WEIGHTS,
    &replace_me::REPLACE_ME,
    &replace_me::REPLACE_ME_COSINE,
    &ROW_COLUMN_FISHER,
    &pruning::SECOND_ORDER,
    &slicing::SLICEGPT,
    &slicing::SLICEGPT_SHARED,
    &SVD,
    &pruning::WANDA,
    &WHITENED,
];
