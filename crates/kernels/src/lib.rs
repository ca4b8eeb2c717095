//! Fused tensor kernels, each differentiable.
//!
//! This crate is the seam between Lapidary and its tensor engine (Candle). The rooms above
//! import [`Tensor`], [`DType`], [`Device`], [`Var`] and [`GradStore`] from here, and call the
//! functions below for everything that Candle does slowly or wrongly on a CPU.
//!
//! Every function accepts `f32` and `f64`, contiguous or strided tensors, and has a backward
//! pass that [`backward`] and, more slowly, Candle's [`Tensor::backward`] find. The same functions written as plain
//! compositions of Candle operations are in [`naive`]: slow, readable, and the truth that the
//! fused kernels are tested against.
//!
//! Boolean masks have one polarity everywhere: **1 (or `true`) means keep**, as in the
//! `attention_mask` of Hugging Face.

mod activation;
mod add;
mod appended_rows;
mod attention;
mod autoencoder;
mod backward;
mod beside_feature;
mod beside_ones;
mod by_hand;
mod by_head;
pub mod check;
mod cross_entropy;
mod decayed_attention;
mod dropout;
mod elementwise;
mod error;
mod exponentials;
mod fourier;
mod fourth_argument;
mod functional_bias;
mod gather;
mod hashed_codes;
mod host;
mod integers;
mod inverse;
mod landmark_attention;
mod linear;
mod linear_attention;
mod linear_by_feature;
mod linear_means;
mod local_filter;
mod matmul;
pub mod memory;
mod mixture;
pub mod naive;
mod norm;
mod online_softmax;
mod optimiser;
mod polynomial_attention;
mod pooled_rows;
mod product;
mod pytorch;
mod quantised;
mod quotient;
mod recompute;
mod recurrence;
mod relevance_rules;
mod resolution_attention;
mod rotary;
mod rows;
mod second_moment;
mod sequence_projection;
mod silu_directions;
mod simd;
mod sinkhorn_attention;
mod softmax;
mod sort;
mod sparse;
mod stack;
mod streams;
mod summed_rows;
#[cfg(test)]
mod test_data;
mod tree_attention;
mod wavelet;
mod weighted_change;
mod with_loss;

pub use activation::Activation;
pub use add::add;
pub use appended_rows::appended_rows;
pub use attention::{
    Attended, AttentionPart, BlockAttention, BlockPart, Listed, PartOptions, ScoreBias,
    SummaryAttention, attention, attention_part, merged_attention,
};
pub use autoencoder::{AutoencoderGradients, AutoencoderWeights, autoencoder_gradients};
pub use backward::backward;
pub use beside_feature::beside_feature;
pub use beside_ones::beside_ones;
pub use by_hand::{ByHand, by_hand};
pub use candle_core::backprop::GradStore;
pub use candle_core::{D, DType, Device, IndexOp, Shape, Tensor, TensorId, Var, WithDType};
pub use cross_entropy::cross_entropy;
pub use decayed_attention::{decayed_attention, decayed_attention_operations};
pub use dropout::{DropoutMask, dropout};
pub use elementwise::{activate, activation_secant, activation_tangent};
pub use error::{Error, Result};
pub use exponentials::{exponential_features, gaussian};
pub use fourier::{causal_depthwise_convolution, fft_convolution, inverse_real_fft, real_fft};
pub use functional_bias::{BiasSpan, FunctionalBias, functional_bias};
pub use gather::{embedding, gather, scatter_add};
pub use hashed_codes::{CodeHash, hashed_codes, hashed_features};
pub use integers::IntegerFunctions;
pub use inverse::newton_inverse;
pub use landmark_attention::landmark_attention;
pub use linear::{linear, linear_activation};
pub use linear_attention::{
    Direction, linear_attention, linear_attention_in_chunks, linear_attention_operations,
    operations_in_chunks,
};
pub use linear_by_feature::{linear_attention_by_feature, operations_by_feature};
pub use linear_means::{
    ExponentialMeans, causal_exponential_means, causal_linear_means, code_means, linear_means,
};
pub use local_filter::local_filter;
pub use matmul::matmul;
pub use mixture::{Mixture, VectorNorm, mixture_distances};
pub use norm::{layer_norm, rms_norm};
pub use optimiser::{
    AdamW, AdamWOptions, Lion, LionOptions, OptimiserState, Parameter, Sgd, SgdOptions,
    global_gradient_norm,
};
pub use polynomial_attention::{FactorDropout, PolynomialAttention};
pub use pooled_rows::{RowPooling, pooled_rows};
pub use pytorch::PytorchFile;
pub use quantised::{QuantisedMatrix, quantised_linear};
pub use quotient::quotients;
pub use recompute::{Coupling, Recomputation};
pub use recurrence::{cumulative_product, cumulative_sum, linear_scan};
pub use relevance_rules::{balanced_sum, pass_gradient, scale_gradient, stabilised_reciprocal};
pub use resolution_attention::{ResolutionAttention, ResolutionOptions, largest_of};
pub use rotary::{merged_rotary, rotary};
pub use rows::{reject_rows, unit_rows};
pub use second_moment::SecondMoment;
pub use sequence_projection::sequence_projection;
pub use silu_directions::silu_directions;
pub use sinkhorn_attention::{SinkhornOptions, sinkhorn_attention};
pub use softmax::{log_softmax, softmax};
pub use sort::{sort, top_k};
pub use sparse::{BitmapMatrix, CsrMatrix, SparseSizes, TwoOfFourMatrix};
pub use streams::{
    StreamAffine, StreamBuffer, StreamShare, stream_affine, stream_dot, stream_mix, stream_mix_own,
    stream_squares, stream_sum,
};
pub use summed_rows::{RowSums, RowTerm, summed_rows};
pub use tree_attention::{
    TreeFeatures, TreeMask, TreePairs, TreePiece, TreeSide, tree_attention,
    tree_attention_operations,
};
pub use wavelet::{wavelet_analysis, wavelet_synthesis};
pub use weighted_change::weighted_change;
pub use with_loss::with_loss;

/// How a softmax over the last dimension is masked.
#[derive(Clone, Debug, Default)]
pub struct SoftmaxMask {
    /// Added to the scores before the softmax; broadcastable to their shape. Not differentiated.
    pub additive: Option<Tensor>,
    /// `Some(offset)`: entry `[.., i, j]` is kept only when `j <= i + offset`.
    pub causal: Option<usize>,
}

/// Which keys a query may attend to, and what is added to its scores.
///
/// Shapes: queries `[batch, heads, query, head_width]`, keys and values
/// `[batch, groups, key, head_width]` with `heads` a multiple of `groups`: query head `h` reads
/// group `h / (heads / groups)`. Keys and values may differ in width.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// Multiplies every score before the bias is added, usually `1 / sqrt(head_width)`.
    pub scale: f64,
    /// Keep key `j` for query `i` only when `j <= i + query_offset`.
    pub causal: bool,
    /// Keep key `j` for query `i` only when `|i + query_offset - j| < window`.
    pub window: Option<usize>,
    /// Absolute position of the first query minus that of the first key: with a key/value cache
    /// of `n` earlier keys this is `n`.
    pub query_offset: usize,
    /// `[batch, key]` in `u8`, 1 = keep. A query that keeps no key gets zeros.
    pub key_padding: Option<Tensor>,
    /// Added to the scaled scores; differentiated.
    pub bias: Option<ScoreBias>,
}

impl AttentionOptions {
    /// Unmasked attention with the usual `1 / sqrt(head_width)` scale.
    pub fn new(head_width: usize) -> Self {
        Self {
            scale: 1.0 / (head_width as f64).sqrt(),
            causal: false,
            window: None,
            query_offset: 0,
            key_padding: None,
            bias: None,
        }
    }
}

/// How rotary position embedding pairs the features of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryPairs {
    /// Feature `i` with feature `i + width / 2` (Llama, GPT-NeoX).
    Halves,
    /// Feature `2 i` with feature `2 i + 1` (GPT-J, the RoFormer paper).
    Interleaved,
}

/// What counts in a cross-entropy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyOptions {
    /// Targets equal to this are left out of the mean.
    pub ignore_index: Option<u32>,
    /// Mass spread uniformly over all classes, in `[0, 1)`.
    pub label_smoothing: f64,
}
