//! The mechanisms of attention, each set up as it is compared with the others.

use crate::Result;
use crate::error::engine;
use lapidary_kernels::{
    AttentionOptions, Tensor, merged_attention, wavelet_analysis, wavelet_synthesis,
};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};
use lapidary_parts::attention::mechanism::doubly_stochastic::DoublyStochasticSpec;
use lapidary_parts::attention::mechanism::ecoformer::{Bandwidth, EcoformerSpec};
use lapidary_parts::attention::mechanism::fastmax::FastmaxSpec;
use lapidary_parts::attention::mechanism::kernelized::KernelizedSpec;
use lapidary_parts::attention::mechanism::linformer::LinformerSpec;
use lapidary_parts::attention::mechanism::lion::{LionDecay, LionSpec};
use lapidary_parts::attention::mechanism::mra::MraSpec;
use lapidary_parts::attention::mechanism::reformer::ReformerSpec;
use lapidary_parts::attention::mechanism::soft::{Landmarks, SoftSpec};
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_parts::attention::mechanism::subsampled::{Selection, SubsampledSpec};
use lapidary_parts::attention::mechanism::topological::TopologicalSpec;
use lapidary_parts::attention::mechanism::{self, MechanismPass};
use lapidary_parts::attention::wavelet::filters::daubechies;
use lapidary_parts::attention::wavelet::transform::FilterBank;
use lapidary_parts::attention::wavelet::{Boundary, Convolution, Family, WaveletSpec};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_signal::{Mixing, Trace};

/// One way to attend.
#[derive(Clone, Copy, Debug)]
pub struct Mechanism {
    /// Its name in tables.
    pub name: &'static str,
    /// Whether a token is kept from seeing later ones.
    pub causal: bool,
    /// Whether its cost grows with the square of the length.
    pub quadratic: bool,
    /// Which projections are one and the same.
    pub sharing: QueryKeySharing,
    /// Whether it mixes wavelet coefficients, each of two bands by itself.
    pub wavelets: bool,
    spec: fn(usize) -> MechanismSpec,
}

impl Mechanism {
    /// A mechanism with three projections, whose spec depends on the longest sequence.
    pub const fn new(
        name: &'static str,
        causal: bool,
        quadratic: bool,
        spec: fn(usize) -> MechanismSpec,
    ) -> Self {
        Self {
            name,
            causal,
            quadratic,
            sharing: QueryKeySharing::None,
            wavelets: false,
            spec,
        }
    }

    /// Its spec for sequences of up to `length` tokens.
    pub fn spec(&self, length: usize) -> MechanismSpec {
        (self.spec)(length)
    }

    /// Attention by it, or what is around that.
    pub fn mixer(&self, heads: usize, longest: usize) -> MixerSpec {
        let attention = MixerSpec::MultiHead(self.attention(heads, longest));
        match self.wavelets {
            false => attention,
            true => MixerSpec::Wavelet(WaveletSpec {
                family: Family::Adaptive,
                ..WaveletSpec::new(attention)
            }),
        }
    }

    /// Attention by it.
    pub fn attention(&self, heads: usize, longest: usize) -> MultiHeadSpec {
        MultiHeadSpec {
            causal: self.causal,
            sharing: self.sharing,
            mechanism: self.spec(longest),
            ..MultiHeadSpec::new(heads)
        }
    }
}

/// One whose queries are keys.
const fn shared(name: &'static str, causal: bool, spec: fn(usize) -> MechanismSpec) -> Mechanism {
    Mechanism {
        sharing: QueryKeySharing::QueryKey,
        ..Mechanism::new(name, causal, false, spec)
    }
}

static MECHANISMS: &[Mechanism] = &[
    Mechanism::new("softmax", false, true, |_| MechanismSpec::Softmax),
    Mechanism::new("softmax, causal", true, true, |_| MechanismSpec::Softmax),
    Mechanism::new("linformer, up to 128 slots", false, false, |length| {
        MechanismSpec::Linformer(LinformerSpec::new((length / 4).clamp(1, 128), length))
    }),
    Mechanism::new("lion, constant decay", false, false, |_| {
        MechanismSpec::Lion(LionSpec {
            decay: LionDecay::Constant,
            ..LionSpec::default()
        })
    }),
    Mechanism::new("lion, selective decay, causal", true, false, |_| {
        MechanismSpec::Lion(LionSpec::default())
    }),
    Mechanism::new("fastmax of degree 1", true, false, |_| {
        MechanismSpec::Fastmax(FastmaxSpec {
            degree: 1,
            ..FastmaxSpec::default()
        })
    }),
    Mechanism::new("fastmax of degree 2", true, false, |_| {
        MechanismSpec::Fastmax(FastmaxSpec::default())
    }),
    Mechanism::new("kernelized, positive features", true, false, |_| {
        MechanismSpec::Kernelized(KernelizedSpec::default())
    }),
    Mechanism::new("sparse, strided by the root", true, false, |length| {
        MechanismSpec::Sparse(SparseSpec {
            pattern: SparsePattern::Strided {
                stride: length.isqrt(),
            },
            steps: Steps::Merged,
        })
    }),
    Mechanism::new("sparse, fixed by the root", true, false, |length| {
        MechanismSpec::Sparse(SparseSpec {
            pattern: SparsePattern::Fixed {
                stride: length.isqrt(),
                summaries: 1,
                groups: 1,
            },
            steps: Steps::Merged,
        })
    }),
    shared("reformer, 2 rounds of chunks of 64", true, |_| {
        MechanismSpec::Reformer(ReformerSpec {
            rounds: 2,
            ..ReformerSpec::new(64)
        })
    }),
    Mechanism::new("combiner, segments of the root", true, false, |length| {
        MechanismSpec::Combiner(CombinerSpec::new(CombinerForm::Fixed {
            segment: length.isqrt(),
        }))
    }),
    Mechanism {
        wavelets: true,
        ..Mechanism::new("wavelets, softmax in two bands", false, true, |_| {
            MechanismSpec::Softmax
        })
    },
    Mechanism::new("combiner, log-sparse", true, false, |_| {
        MechanismSpec::Combiner(CombinerSpec::new(CombinerForm::LogSparse))
    }),
    Mechanism::new("doubly stochastic, sinkhorn", false, true, |_| {
        MechanismSpec::DoublyStochastic(DoublyStochasticSpec::default())
    }),
    Mechanism::new("topological, on a path", false, false, |length| {
        MechanismSpec::Topological(TopologicalSpec {
            unit: length as f64,
            ..TopologicalSpec::default()
        })
    }),
    Mechanism::new("subsampled, a quarter of the keys", false, true, |_| {
        MechanismSpec::Subsampled(SubsampledSpec::default())
    }),
    Mechanism::new("subsampled, local, causal", true, true, |length| {
        MechanismSpec::Subsampled(SubsampledSpec {
            selection: Selection::Local {
                radius: length as f64 / 8.0,
                columns: None,
            },
            ..SubsampledSpec::default()
        })
    }),
    shared("soft, 64 landmarks", false, |_| {
        MechanismSpec::Soft(SoftSpec::new(Landmarks::Segments { count: 64 }))
    }),
    shared("ecoformer, 16 bits", false, |_| {
        MechanismSpec::Ecoformer(EcoformerSpec::default())
    }),
    shared("ecoformer, 16 bits, causal", true, |_| {
        MechanismSpec::Ecoformer(EcoformerSpec {
            bandwidth: Bandwidth::Fitted,
            ..EcoformerSpec::default()
        })
    }),
    Mechanism::new("mra, 4 blocks of 32 in a row", false, false, |_| {
        MechanismSpec::Mra(MraSpec::new(32, 4))
    }),
    Mechanism::new("mra, 4 blocks of 32 in a row, causal", true, false, |_| {
        MechanismSpec::Mra(MraSpec::new(32, 4))
    }),
];

/// What a module mixes by that stands alone, without projections around it: for queries and keys
/// `[batch, heads, length, head_width]` of `tokens` `[batch, length, width]`.
///
/// # Errors
/// Those of the module.
pub fn mixing_alone(
    module: &dyn mechanism::Mechanism,
    [q, k]: [&Tensor; 2],
    tokens: &Tensor,
    draw: Option<u64>,
) -> Result<Box<dyn Mixing>> {
    let trace = Trace::new();
    let context = Context {
        draw,
        ..Context::new(&trace)
    };
    let pass = MechanismPass {
        path: "attention",
        tokens,
        keep: None,
        offset: 0,
        context: &context,
    };
    Ok(module.mixing(q, k, &pass)?)
}

/// Softmax in each of two bands of Daubechies' wavelet with 8 taps, without projections around it: of
/// queries, keys and values `[batch, heads, length, head_width]` of an even length.
///
/// # Errors
/// Those of the tensor engine.
pub fn attention_in_bands([q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    const TAPS: usize = 8;
    let (batch, heads, length, width) = engine(q.dims4())?;
    let (channels, half) = (heads * width, length / 2);
    let filter = engine(Tensor::from_vec(daubechies(TAPS), (TAPS, 1), q.device()))?;
    let filter = engine(engine(filter.to_dtype(q.dtype()))?.broadcast_as((TAPS, channels)))?;
    let filter = engine(filter.contiguous())?;
    let bank = FilterBank::new(filter, Boundary::Periodised, Convolution::Direct)?;
    let filters = bank.filters()?;
    // Heads side by side, as a projection leaves them, and the bands as sequences of their own.
    let bands = |x: &Tensor| -> Result<Tensor> {
        let x = engine(engine(x.transpose(1, 2))?.contiguous())?;
        let x = engine(x.reshape((batch, length, channels)))?;
        let halves = wavelet_analysis(&x, &filters, half)?;
        engine(halves.reshape((2 * batch, half, channels)))
    };
    let mixed = merged_attention(
        &bands(q)?,
        &bands(k)?,
        &bands(v)?,
        heads,
        heads,
        &AttentionOptions::new(width),
    )?;
    let mixed = engine(mixed.reshape((2, batch, half, channels)))?;
    let y = wavelet_synthesis(&mixed, &filters, length)?;
    let y = engine(y.reshape((batch, length, heads, width)))?;
    engine(y.transpose(1, 2))
}

/// All of them, softmax first.
pub fn mechanisms() -> &'static [Mechanism] {
    MECHANISMS
}
