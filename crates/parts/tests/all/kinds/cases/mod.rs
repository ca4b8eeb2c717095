//! Blocks that between them use every kind of part.

mod kernels;
mod mechanisms;
mod patterns;
mod sums;
mod wavelets;

use super::*;
use kernels::*;
use mechanisms::*;
use patterns::*;
use sums::*;
use wavelets::*;

pub(super) fn block(wiring: Wiring, norm: NormSpec, attention: MixerSpec) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        wiring,
        norm,
        attention,
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: None,
        dropout: 0.0,
    }
}

pub(super) fn dense(activation: ActivationSpec, bias: bool) -> Option<FeedforwardSpec> {
    Some(FeedforwardSpec::Dense(DenseSpec {
        hidden: 12,
        activation,
        bias,
    }))
}

pub(super) fn gated(activation: ActivationSpec, bias: bool) -> Option<FeedforwardSpec> {
    Some(FeedforwardSpec::Gated(GatedSpec {
        hidden: 10,
        activation,
        bias,
    }))
}

pub(super) fn mixture(activation: ActivationSpec, normalise: bool) -> Option<FeedforwardSpec> {
    Some(FeedforwardSpec::Mixture(MixtureSpec {
        hidden: 6,
        experts: 5,
        active: 2,
        activation,
        normalise,
    }))
}

pub(super) const LAYER: NormSpec = NormSpec::Layer { epsilon: 1e-5 };
pub(super) const RMS: NormSpec = NormSpec::Rms { epsilon: 1e-6 };

pub(super) fn rotary(
    interleaved: bool,
    width: Option<usize>,
    scaling: RotaryScaling,
) -> PositionSpec {
    PositionSpec::Rotary(RotarySpec {
        theta: 100.0,
        width,
        kept: None,
        interleaved,
        scaling,
    })
}

/// Attention whose weights come from `mechanism`.
pub(super) fn through(mechanism: MechanismSpec) -> MultiHeadSpec {
    MultiHeadSpec {
        mechanism,
        ..MultiHeadSpec::new(2)
    }
}

pub(super) fn linformer(sharing: Sharing, projection: Projection) -> MechanismSpec {
    MechanismSpec::Linformer(LinformerSpec {
        sharing,
        projection,
        ..LinformerSpec::new(3, 9)
    })
}

/// Of tokens, before keys and values are made of them.
fn linformer_of_tokens(sharing: Sharing, projection: Projection) -> MechanismSpec {
    MechanismSpec::Linformer(LinformerSpec {
        sharing,
        projection,
        project: Project::Tokens,
        ..LinformerSpec::new(3, 9)
    })
}

/// Of two heads, the first has fewer slots.
fn linformer_by_head(sharing: Sharing, projection: Projection) -> MechanismSpec {
    MechanismSpec::Linformer(LinformerSpec {
        slots_by_head: vec![2, 3],
        sharing,
        projection,
        ..LinformerSpec::new(3, 9)
    })
}

fn lion(decay: LionDecay) -> LionSpec {
    LionSpec {
        decay,
        ..LionSpec::default()
    }
}

fn fastmax(degree: usize, normalisation: Normalisation) -> MechanismSpec {
    MechanismSpec::Fastmax(FastmaxSpec {
        degree,
        normalisation,
        ..FastmaxSpec::default()
    })
}

fn kernelized(spectrum: SpectrumSpec, features: ReadOut) -> MechanismSpec {
    MechanismSpec::Kernelized(KernelizedSpec {
        spectrum,
        features,
        ..KernelizedSpec::default()
    })
}

/// Blocks that together use every kind.
pub(super) fn cases() -> Vec<(&'static str, BlockSpec)> {
    use ActivationSpec::{Gelu, GeluTanh, Identity, QuickGelu, Relu, Sigmoid, Silu, Tanh};
    use Wiring::{Parallel, PostNorm, PreNorm};
    let heads = MultiHeadSpec::new(2);
    let llama3 = RotaryScaling::Llama3 {
        factor: 4.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_length: 64,
    };
    let buckets = PositionSpec::RelativeBuckets {
        buckets: 6,
        max_distance: 5,
    };
    let per_head = |norm, per_head| Some(QueryKeyNorm { norm, per_head });
    let multi_head = MixerSpec::MultiHead;
    let mamba = MambaSpec {
        inner: Some(10),
        state: 3,
        step_rank: Some(2),
        ..MambaSpec::default()
    };
    let mamba2 = Mamba2Spec {
        inner: Some(12),
        head_width: 3,
        groups: 2,
        state: 2,
        chunk: 4,
        ..Mamba2Spec::default()
    };
    let mut all = mechanisms();
    all.extend(linear());
    all.extend(wavelets());
    let tokens_meet = sparse()
        .into_iter()
        .chain(approximate())
        .chain(subsampled())
        .chain(doubly_stochastic())
        .chain(topological());
    all.extend(tokens_meet.map(|(name, spec)| {
        let spec = MixerSpec::MultiHead(spec);
        (name, block(PreNorm, LAYER, spec))
    }));
    all.extend(vec![
        (
            "plain bidirectional",
            BlockSpec {
                feedforward: dense(Gelu, true),
                ..block(PreNorm, LAYER, multi_head(heads.clone()))
            },
        ),
        (
            "causal grouped rotary",
            BlockSpec {
                feedforward: gated(Silu, false),
                ..block(
                    PreNorm,
                    RMS,
                    multi_head(MultiHeadSpec {
                        groups: Some(1),
                        causal: true,
                        bias: false,
                        position: rotary(false, None, llama3),
                        ..heads.clone()
                    }),
                )
            },
        ),
        (
            "post-norm alibi",
            BlockSpec {
                feedforward: dense(Relu, true),
                ..block(
                    PostNorm,
                    LAYER,
                    multi_head(MultiHeadSpec {
                        causal: true,
                        position: PositionSpec::Alibi,
                        ..heads.clone()
                    }),
                )
            },
        ),
        (
            "narrow values, rotary pairs kept of wider heads, each group its own",
            block(
                PreNorm,
                RMS,
                multi_head(MultiHeadSpec {
                    heads: 4,
                    groups: Some(2),
                    head_width: Some(4),
                    value_width: Some(3),
                    causal: true,
                    position: PositionSpec::Rotary(RotarySpec {
                        theta: 100.0,
                        kept: Some(KeptPairs {
                            of: 10,
                            groups: vec![vec![0, 3], vec![1, 4]],
                        }),
                        ..RotarySpec::default()
                    }),
                    scale: Some(0.3),
                    ..heads.clone()
                }),
            ),
        ),
        (
            "wide values beside unrotated features and interleaved kept pairs",
            block(
                PostNorm,
                LAYER,
                multi_head(MultiHeadSpec {
                    head_width: Some(3),
                    value_width: Some(5),
                    position: PositionSpec::Rotary(RotarySpec {
                        theta: 100.0,
                        interleaved: true,
                        kept: Some(KeptPairs {
                            of: 4,
                            groups: vec![vec![1], vec![0]],
                        }),
                        ..RotarySpec::default()
                    }),
                    ..heads.clone()
                }),
            ),
        ),
        (
            "parallel without norms, interleaved partial rotary",
            BlockSpec {
                feedforward: dense(Tanh, true),
                ..block(
                    Parallel,
                    NormSpec::None,
                    multi_head(MultiHeadSpec {
                        head_width: Some(6),
                        causal: true,
                        output_bias: Some(false),
                        position: rotary(true, Some(4), RotaryScaling::Linear { factor: 2.0 }),
                        scale: Some(0.3),
                        ..heads.clone()
                    }),
                )
            },
        ),
        (
            "causal window, buckets, norm of each head, mixture",
            BlockSpec {
                feedforward: mixture(Silu, true),
                ..block(
                    PreNorm,
                    RMS,
                    multi_head(MultiHeadSpec {
                        causal: true,
                        window: Some(3),
                        position: buckets.clone(),
                        query_key_norm: per_head(RMS, true),
                        ..heads.clone()
                    }),
                )
            },
        ),
        (
            "bidirectional buckets, norm of all heads, mixture without normalising",
            BlockSpec {
                feedforward: mixture(GeluTanh, false),
                ..block(
                    PostNorm,
                    RMS,
                    multi_head(MultiHeadSpec {
                        position: buckets,
                        query_key_norm: per_head(LAYER, false),
                        ..heads.clone()
                    }),
                )
            },
        ),
        (
            "cross-attention over a memory",
            BlockSpec {
                cross_attention: Some(MultiHeadSpec {
                    groups: Some(1),
                    ..heads.clone()
                }),
                feedforward: gated(Sigmoid, true),
                ..block(
                    PreNorm,
                    LAYER,
                    multi_head(MultiHeadSpec {
                        causal: true,
                        position: rotary(false, None, RotaryScaling::None),
                        ..heads
                    }),
                )
            },
        ),
        (
            "shortcuts around narrow heads",
            BlockSpec {
                feedforward: gated(Silu, false),
                shortcuts: true,
                ..block(
                    PreNorm,
                    RMS,
                    multi_head(MultiHeadSpec {
                        head_width: Some(6),
                        causal: true,
                        ..MultiHeadSpec::new(2)
                    }),
                )
            },
        ),
        (
            "a shortcut around both parts",
            BlockSpec {
                feedforward: dense(Gelu, true),
                shortcuts: true,
                ..block(Parallel, LAYER, multi_head(MultiHeadSpec::new(2)))
            },
        ),
        (
            "mamba alone",
            block(PreNorm, RMS, MixerSpec::Mamba(mamba.clone())),
        ),
        (
            "layer scales before a norm",
            BlockSpec {
                layer_scale: Some(0.6),
                feedforward: dense(Gelu, true),
                ..block(PostNorm, LAYER, MixerSpec::MultiHead(MultiHeadSpec::new(2)))
            },
        ),
        (
            "layer scales side by side",
            BlockSpec {
                layer_scale: Some(-0.4),
                feedforward: gated(Silu, true),
                ..block(Parallel, RMS, MixerSpec::MultiHead(MultiHeadSpec::new(2)))
            },
        ),
        (
            "mamba with biases and one tap",
            BlockSpec {
                feedforward: gated(QuickGelu, true),
                ..block(
                    PostNorm,
                    LAYER,
                    MixerSpec::Mamba(MambaSpec {
                        taps: 1,
                        bias: true,
                        activation: Identity,
                        ..mamba.clone()
                    }),
                )
            },
        ),
        (
            "mamba beside a feed-forward part",
            BlockSpec {
                feedforward: dense(Silu, false),
                ..block(
                    Parallel,
                    RMS,
                    MixerSpec::Mamba(MambaSpec {
                        taps: 3,
                        convolution_bias: false,
                        ..mamba.clone()
                    }),
                )
            },
        ),
        (
            "mamba without a scan",
            block(
                PreNorm,
                RMS,
                MixerSpec::Mamba(MambaSpec {
                    scan: false,
                    ..mamba
                }),
            ),
        ),
        (
            "mamba of heads",
            block(PreNorm, RMS, MixerSpec::Mamba2(mamba2.clone())),
        ),
        (
            "mamba of heads with biases, bounds and one tap",
            BlockSpec {
                feedforward: gated(QuickGelu, true),
                ..block(
                    PostNorm,
                    LAYER,
                    MixerSpec::Mamba2(Mamba2Spec {
                        groups: 1,
                        taps: 1,
                        chunk: 1,
                        bias: true,
                        activation: Identity,
                        smallest_step: Some(0.0),
                        largest_step: Some(50.0),
                        ..mamba2.clone()
                    }),
                )
            },
        ),
        (
            "mamba of heads without a gated norm, beside a feed-forward part",
            BlockSpec {
                feedforward: dense(Silu, false),
                ..block(
                    Parallel,
                    RMS,
                    MixerSpec::Mamba2(Mamba2Spec {
                        taps: 3,
                        chunk: 64,
                        convolution_bias: false,
                        norm: NormSpec::None,
                        ..mamba2.clone()
                    }),
                )
            },
        ),
        (
            "mamba of heads without a scan",
            block(
                PreNorm,
                RMS,
                MixerSpec::Mamba2(Mamba2Spec {
                    scan: false,
                    ..mamba2
                }),
            ),
        ),
        (
            "no mixer",
            BlockSpec {
                feedforward: gated(Silu, true),
                ..block(PreNorm, LAYER, MixerSpec::Absent)
            },
        ),
        (
            "no mixer in a parallel block",
            BlockSpec {
                feedforward: dense(Gelu, true),
                ..block(Parallel, RMS, MixerSpec::Absent)
            },
        ),
        (
            "a linear map",
            BlockSpec {
                feedforward: Some(FeedforwardSpec::Linear(LinearSpec { bias: true })),
                ..block(PreNorm, NormSpec::None, MixerSpec::Absent)
            },
        ),
    ]);
    all
}
