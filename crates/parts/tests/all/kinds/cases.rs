//! Blocks that between them use every kind of part.

use super::*;

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

/// Blocks whose attention is a sum over features.
fn linear() -> Vec<(&'static str, BlockSpec)> {
    let multi_head = |spec| block(Wiring::PreNorm, LAYER, MixerSpec::MultiHead(spec));
    let plain = |mechanism| multi_head(through(mechanism));
    let causal = |mechanism| {
        multi_head(MultiHeadSpec {
            causal: true,
            ..through(mechanism)
        })
    };
    let fourier = ReadOut::Fourier { smoothing: 0.6 };
    let positive = |stabilise| ReadOut::Positive { stabilise };
    let mixture = |components| SpectrumSpec::Mixture { components };
    let fastfood = |learned| SpectrumSpec::Fastfood { learned };
    vec![
        (
            "lion without decay",
            plain(MechanismSpec::Lion(lion(LionDecay::None))),
        ),
        (
            "lion with a decay for each head, causal",
            causal(MechanismSpec::Lion(lion(LionDecay::Constant))),
        ),
        (
            "lion with a decay for each token",
            plain(MechanismSpec::Lion(lion(LionDecay::Selective))),
        ),
        (
            "lion with a decay for each token, step by step, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                value_width: Some(3),
                ..through(MechanismSpec::Lion(LionSpec {
                    form: LionForm::Recurrent,
                    ..lion(LionDecay::Selective)
                }))
            }),
        ),
        (
            "lion with decays of each feature, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                ..through(MechanismSpec::Lion(LionSpec {
                    per_feature: true,
                    ..lion(LionDecay::Selective)
                }))
            }),
        ),
        (
            "lion with decays of each feature, in both directions",
            plain(MechanismSpec::Lion(LionSpec {
                per_feature: true,
                form: LionForm::Chunked { size: 2 },
                ..lion(LionDecay::Constant)
            })),
        ),
        (
            "lion laid out, with a class token",
            plain(MechanismSpec::Lion(LionSpec {
                form: LionForm::Parallel,
                class_token: true,
                ..lion(LionDecay::Constant)
            })),
        ),
        (
            "lion on an image",
            plain(MechanismSpec::Lion(LionSpec {
                image: Some(LionImage {
                    columns: 3,
                    curves: vec![Curve::Rows, Curve::Columns],
                }),
                ..lion(LionDecay::Selective)
            })),
        ),
        ("fastmax, causal", causal(fastmax(2, Normalisation::Token))),
        (
            "fastmax of first degree",
            plain(fastmax(1, Normalisation::Token)),
        ),
        (
            "fastmax that learns its polynomial, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                ..through(MechanismSpec::Fastmax(FastmaxSpec {
                    learned: true,
                    ..FastmaxSpec::default()
                }))
            }),
        ),
        (
            "fastmax of first degree that learns its slope",
            plain(MechanismSpec::Fastmax(FastmaxSpec {
                degree: 1,
                learned: true,
                normalisation: Normalisation::Max { limit: 0.8 },
                ..FastmaxSpec::default()
            })),
        ),
        (
            "fastmax by the longest",
            plain(fastmax(2, Normalisation::Max { limit: 0.8 })),
        ),
        (
            "fastmax as it comes, causal, grouped keys",
            multi_head(MultiHeadSpec {
                causal: true,
                groups: Some(1),
                ..through(fastmax(2, Normalisation::None))
            }),
        ),
        (
            "waves of a mixture, causal",
            causal(kernelized(mixture(None), fourier)),
        ),
        (
            "waves of two mixtures",
            plain(kernelized(mixture(Some(2)), fourier)),
        ),
        (
            "exponentials of two mixtures, causal",
            causal(kernelized(mixture(Some(2)), positive(false))),
        ),
        (
            "exponentials of learned fastfood, causal",
            causal(kernelized(fastfood(Learned::All), positive(false))),
        ),
        (
            "waves of scaled fastfood",
            plain(kernelized(fastfood(Learned::Scaling), fourier)),
        ),
        (
            "exponentials of a generator, causal",
            causal(kernelized(SpectrumSpec::Generator, positive(false))),
        ),
        (
            "waves of a generator",
            plain(kernelized(SpectrumSpec::Generator, fourier)),
        ),
        (
            "exponentials kept in range",
            plain(kernelized(mixture(None), positive(true))),
        ),
        (
            "exponentials of normal frequencies",
            plain(kernelized(SpectrumSpec::Gaussian, positive(false))),
        ),
    ]
}

/// A mask of a block, with a row that sees nothing.
fn edge() -> Vec<String> {
    let row = |i: usize| {
        let seen = |j: usize| i != 2 && (i + j) % 3 != 1;
        (0..8).map(|j| if seen(j) { '#' } else { '.' }).collect()
    };
    (0..8).map(row).collect()
}

/// Heads that meet some of the keys. One chunk holds everything where tokens are sorted and causal,
/// so that what is met doesn't hang on later ones.
fn sparse() -> Vec<(&'static str, MultiHeadSpec)> {
    let sparse = |pattern, steps| MultiHeadSpec {
        causal: true,
        ..through(MechanismSpec::Sparse(SparseSpec { pattern, steps }))
    };
    let combiner = |form| MultiHeadSpec {
        causal: true,
        ..through(MechanismSpec::Combiner(CombinerSpec {
            log_count: true,
            ..CombinerSpec::new(form)
        }))
    };
    let reformer = |rounds, chunk| MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..through(MechanismSpec::Reformer(ReformerSpec {
            rounds,
            buckets: vec![4],
            ..ReformerSpec::new(chunk)
        }))
    };
    let strided = SparsePattern::Strided { stride: 2 };
    let fixed = SparsePattern::Fixed {
        stride: 3,
        summaries: 1,
        groups: 2,
    };
    vec![
        ("strided, merged", sparse(strided.clone(), Steps::Merged)),
        ("strided, by head", sparse(strided, Steps::ByHead)),
        ("fixed, columns of each head", sparse(fixed, Steps::Merged)),
        (
            "a layout of its own for each head",
            sparse(
                SparsePattern::Layout(BlockLayout {
                    block: 8,
                    heads: vec![vec!["a".to_owned()], vec!["#".to_owned()]],
                    masks: BTreeMap::from([("a".to_owned(), edge())]),
                }),
                Steps::Merged,
            ),
        ),
        (
            "log-sparse, grouped keys, rotary",
            MultiHeadSpec {
                groups: Some(1),
                position: rotary(false, None, RotaryScaling::None),
                ..sparse(SparsePattern::LogSparse, Steps::Merged)
            },
        ),
        (
            "hashed",
            MultiHeadSpec {
                causal: true,
                ..reformer(2, 8)
            },
        ),
        ("hashed in both directions", reformer(1, 2)),
        (
            "hashed by fixed rotations",
            MultiHeadSpec {
                mechanism: MechanismSpec::Reformer(ReformerSpec {
                    rotations: Rotations::Fixed,
                    buckets: vec![4],
                    ..ReformerSpec::new(3)
                }),
                ..reformer(1, 3)
            },
        ),
        (
            "segments and their summaries",
            combiner(CombinerForm::Fixed { segment: 2 }),
        ),
        (
            "segments and their summaries in both directions",
            MultiHeadSpec {
                causal: false,
                ..combiner(CombinerForm::Fixed { segment: 2 })
            },
        ),
        ("doubling spans", combiner(CombinerForm::LogSparse)),
        (
            "columns and rows in summary",
            combiner(CombinerForm::Mixture {
                columns: 2,
                joint: false,
            }),
        ),
        (
            "earlier rows in summary",
            combiner(CombinerForm::RowMajor { columns: 2 }),
        ),
        (
            "segments and what a layer makes of them",
            MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Combiner(CombinerSpec {
                    summary: Summary::DeepSets {
                        pooling: Pooling::Mean,
                    },
                    ..CombinerSpec::new(CombinerForm::Fixed { segment: 2 })
                }))
            },
        ),
        (
            "columns and what a layer makes of them",
            MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Combiner(CombinerSpec {
                    summary: Summary::DeepSets {
                        pooling: Pooling::Max,
                    },
                    ..CombinerSpec::new(CombinerForm::Vertical { columns: 2 })
                }))
            },
        ),
        (
            "own cluster and others in summary, grouped keys",
            MultiHeadSpec {
                groups: Some(1),
                ..combiner(CombinerForm::Routed { clusters: 3 })
            },
        ),
        (
            "own cluster and others in summary in both directions",
            MultiHeadSpec {
                causal: false,
                ..combiner(CombinerForm::Routed { clusters: 2 })
            },
        ),
    ]
}

/// Blocks whose weights sum to one along columns too.
fn doubly_stochastic() -> Vec<(&'static str, MultiHeadSpec)> {
    let by = |operator| {
        through(MechanismSpec::DoublyStochastic(DoublyStochasticSpec {
            operator,
        }))
    };
    let sinkhorn = |iterations, form| {
        by(Operator::Sinkhorn {
            iterations,
            form,
            epsilon: 0.8,
        })
    };
    let norm_softmax = |statistic, over| by(Operator::NormSoftmax { statistic, over });
    vec![
        ("softmax as an operator", by(Operator::Softmax)),
        (
            "softmax by the deviation of a row",
            norm_softmax(Statistic::Deviation, Over::Row),
        ),
        (
            "softmax by the variance of all scores",
            norm_softmax(Statistic::Variance, Over::Matrix),
        ),
        ("sinkhorn by potentials", sinkhorn(5, SinkhornForm::Log)),
        (
            "sinkhorn by quotients, grouped keys",
            MultiHeadSpec {
                groups: Some(1),
                value_width: Some(3),
                ..sinkhorn(3, SinkhornForm::Naive)
            },
        ),
        (
            // Of full rank.
            "squares of an orthogonal factor",
            MultiHeadSpec {
                head_width: Some(8),
                ..by(Operator::Qr { seed: 1 })
            },
        ),
        (
            "a circuit as drawn",
            by(Operator::Circuit(CircuitSpec::new(LENGTH, 4))),
        ),
        (
            "a centrosymmetric circuit",
            by(Operator::Circuit(CircuitSpec {
                ansatz: Ansatz::Centrosymmetric,
                ..CircuitSpec::new(LENGTH, 4)
            })),
        ),
        (
            "steps of an Ising model",
            by(Operator::Circuit(CircuitSpec {
                ansatz: Ansatz::Trotter,
                training: Training::Differentiable,
                ..CircuitSpec::new(LENGTH, 4)
            })),
        ),
        (
            "a circuit that learns",
            by(Operator::Circuit(CircuitSpec {
                layers: 3,
                ansatz: Ansatz::Simple,
                training: Training::Differentiable,
                ..CircuitSpec::new(LENGTH, 3)
            })),
        ),
    ]
}

/// Sums under a function of the distance in a tree.
fn topological() -> Vec<(&'static str, MultiHeadSpec)> {
    let on = |columns, features, mask| TopologicalSpec {
        columns,
        features,
        mask,
        unit: 6.0,
        ..TopologicalSpec::default()
    };
    let exponential = FeatureMap::Exponential { count: 5, seed: 3 };
    let of = |spec| through(MechanismSpec::Topological(spec));
    vec![
        (
            "positive parts on a path",
            of(on(None, FeatureMap::Relu, Mask::Exponential)),
        ),
        (
            "squares on a grid, grouped keys",
            MultiHeadSpec {
                groups: Some(1),
                value_width: Some(3),
                ..of(on(Some(3), FeatureMap::Square, Mask::Identity))
            },
        ),
        (
            "fourth powers on a path, each head for itself",
            of(TopologicalSpec {
                per_head: true,
                ..on(None, FeatureMap::Fourth, Mask::InverseQuadratic)
            }),
        ),
        (
            "exponentials on a path",
            of(on(None, exponential, Mask::Exponential)),
        ),
    ]
}

/// Blocks that would draw their keys; what is not drawn is dense.
fn subsampled() -> Vec<(&'static str, MultiHeadSpec)> {
    let around = |inner, selection| {
        through(MechanismSpec::Subsampled(SubsampledSpec {
            inner: Box::new(inner),
            selection,
            ..SubsampledSpec::default()
        }))
    };
    let local = Selection::Local {
        radius: 2.0,
        columns: None,
    };
    vec![
        (
            "subsampled, causal, with a window and buckets, grouped keys",
            MultiHeadSpec {
                causal: true,
                window: Some(4),
                groups: Some(1),
                position: PositionSpec::RelativeBuckets {
                    buckets: 6,
                    max_distance: 5,
                },
                ..around(MechanismSpec::Softmax, local)
            },
        ),
        (
            "subsampled",
            around(MechanismSpec::Softmax, Selection::Unbiased),
        ),
        (
            "fastmax, subsampled, causal",
            MultiHeadSpec {
                causal: true,
                ..around(fastmax(2, Normalisation::Token), Selection::Unbiased)
            },
        ),
        (
            "linformer, subsampled",
            around(
                linformer(Sharing::Headwise, Projection::Learned),
                Selection::Unbiased,
            ),
        ),
    ]
}

/// Heads whose queries are keys, in codes or through landmarks, and blocks of several sizes.
fn approximate() -> Vec<(&'static str, MultiHeadSpec)> {
    let shared = |mechanism| MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..through(mechanism)
    };
    let soft = |landmarks| SoftSpec::new(landmarks);
    let ecoformer = EcoformerSpec {
        bits: 5,
        anchors: 3,
        ..EcoformerSpec::default()
    };
    let mra = |spec: MraSpec| MechanismSpec::Mra(spec);
    vec![
        (
            "learned landmarks and filters",
            shared(MechanismSpec::Soft(SoftSpec {
                local: Some(3),
                ..soft(Landmarks::Convolution { ratio: 2 })
            })),
        ),
        (
            "learned landmarks of an image",
            shared(MechanismSpec::Soft(SoftSpec {
                columns: Some(3),
                ..soft(Landmarks::Convolution { ratio: 2 })
            })),
        ),
        (
            "means of an image as landmarks, not normalised, filters",
            shared(MechanismSpec::Soft(SoftSpec {
                columns: Some(3),
                local: Some(3),
                normalised: false,
                ..soft(Landmarks::Mean { ratio: 2 })
            })),
        ),
        (
            "means of segments as landmarks",
            shared(MechanismSpec::Soft(soft(Landmarks::Segments { count: 3 }))),
        ),
        ("codes", shared(MechanismSpec::Ecoformer(ecoformer.clone()))),
        (
            "codes, causal",
            MultiHeadSpec {
                causal: true,
                ..shared(MechanismSpec::Ecoformer(EcoformerSpec {
                    bandwidth: Bandwidth::Fitted,
                    ..ecoformer.clone()
                }))
            },
        ),
        (
            "codes and own values",
            shared(MechanismSpec::Ecoformer(EcoformerSpec {
                released: true,
                ..ecoformer
            })),
        ),
        (
            "blocks of two sizes, grouped keys",
            MultiHeadSpec {
                groups: Some(1),
                ..through(mra(MraSpec {
                    diagonal: 1,
                    ..MraSpec::new(2, 1)
                }))
            },
        ),
        (
            "blocks of two sizes, causal, narrow values",
            MultiHeadSpec {
                causal: true,
                value_width: Some(3),
                ..through(mra(MraSpec::new(2, 2)))
            },
        ),
        (
            "refined blocks of three sizes alone",
            through(mra(MraSpec {
                scales: vec![4, 2, 1],
                per_row: vec![1, 2],
                sparse: true,
                diagonal: 1,
                ..MraSpec::new(4, 1)
            })),
        ),
    ]
}

/// Blocks that together use every mechanism and every bias.
fn mechanisms() -> Vec<(&'static str, BlockSpec)> {
    let multi_head = |spec| block(Wiring::PreNorm, LAYER, MixerSpec::MultiHead(spec));
    let causal = |position| MultiHeadSpec {
        causal: true,
        position,
        ..MultiHeadSpec::new(2)
    };
    let fire = FireSpec {
        hidden: 4,
        initial_length: 4,
        ..FireSpec::default()
    };
    vec![
        ("fire", multi_head(causal(PositionSpec::Fire(fire.clone())))),
        (
            "fire beside a rotation",
            multi_head(causal(PositionSpec::Fire(FireSpec {
                rotary: Some(RotarySpec::default()),
                ..fire.clone()
            }))),
        ),
        (
            "fire that layers share",
            multi_head(causal(PositionSpec::Fire(FireSpec {
                shared: true,
                ..fire.clone()
            }))),
        ),
        (
            "fire in both directions",
            multi_head(MultiHeadSpec {
                causal: false,
                ..causal(PositionSpec::Fire(FireSpec { layers: 1, ..fire }))
            }),
        ),
        (
            "kerple, logarithmic",
            multi_head(causal(PositionSpec::KerpleLogarithmic)),
        ),
        (
            "kerple, power",
            multi_head(causal(PositionSpec::KerplePower)),
        ),
        (
            "sandwich",
            multi_head(causal(PositionSpec::Sandwich { width: 6 })),
        ),
        (
            "queries that are keys",
            multi_head(MultiHeadSpec {
                sharing: QueryKeySharing::QueryKey,
                ..causal(PositionSpec::None)
            }),
        ),
        (
            "queries that are keys and values",
            multi_head(MultiHeadSpec {
                sharing: QueryKeySharing::All,
                bias: false,
                output_bias: Some(true),
                ..causal(PositionSpec::None)
            }),
        ),
        (
            "sparse codes in the place of the stream",
            BlockSpec {
                feedforward: Some(FeedforwardSpec::SparseCode(SparseCodeSpec::default())),
                ..block(
                    Wiring::Replacing,
                    LAYER,
                    MixerSpec::MultiHead(MultiHeadSpec {
                        sharing: QueryKeySharing::All,
                        bias: false,
                        output_bias: Some(true),
                        ..MultiHeadSpec::new(2)
                    }),
                )
            },
        ),
        (
            "codes in an over-complete dictionary",
            BlockSpec {
                feedforward: Some(FeedforwardSpec::SparseCode(SparseCodeSpec {
                    atoms: Some(14),
                    ..SparseCodeSpec::default()
                })),
                ..block(
                    Wiring::Replacing,
                    RMS,
                    MixerSpec::MultiHead(MultiHeadSpec {
                        causal: true,
                        ..MultiHeadSpec::new(2)
                    }),
                )
            },
        ),
        (
            "a dictionary, and attention taken off",
            BlockSpec {
                feedforward: Some(FeedforwardSpec::Linear(LinearSpec { bias: false })),
                ..block(
                    Wiring::Reversed,
                    LAYER,
                    MixerSpec::MultiHead(MultiHeadSpec {
                        sharing: QueryKeySharing::All,
                        bias: false,
                        output_bias: Some(true),
                        ..MultiHeadSpec::new(2)
                    }),
                )
            },
        ),
        (
            "taken off causally",
            BlockSpec {
                feedforward: Some(FeedforwardSpec::Linear(LinearSpec { bias: true })),
                layer_scale: Some(0.7),
                ..block(
                    Wiring::Reversed,
                    RMS,
                    MixerSpec::MultiHead(causal(PositionSpec::None)),
                )
            },
        ),
        (
            "linformer",
            multi_head(through(linformer(Sharing::Headwise, Projection::Learned))),
        ),
        (
            "linformer of each head, grouped keys",
            multi_head(MultiHeadSpec {
                groups: Some(1),
                ..through(linformer(Sharing::None, Projection::Learned))
            }),
        ),
        (
            "linformer with one projection for all layers",
            multi_head(through(linformer(Sharing::Layerwise, Projection::Learned))),
        ),
        (
            "linformer by means",
            multi_head(through(linformer(Sharing::KeyValue, Projection::Mean))),
        ),
        (
            "linformer by convolution",
            multi_head(through(linformer(
                Sharing::Headwise,
                Projection::Convolution,
            ))),
        ),
        (
            "linformer by the largest keys",
            multi_head(through(linformer(Sharing::Headwise, Projection::Max))),
        ),
        (
            "linformer with slots of each head, in one matrix",
            multi_head(through(linformer_by_head(
                Sharing::KeyValue,
                Projection::Learned,
            ))),
        ),
        (
            "linformer with slots and matrices of each head",
            multi_head(through(linformer_by_head(
                Sharing::None,
                Projection::Learned,
            ))),
        ),
        (
            "linformer with slots and windows of each head",
            multi_head(through(linformer_by_head(
                Sharing::None,
                Projection::Convolution,
            ))),
        ),
    ]
}

/// Attention in the space of coefficients.
fn wavelets() -> Vec<(&'static str, BlockSpec)> {
    let inner = || MixerSpec::MultiHead(MultiHeadSpec::new(2));
    let wavelet = |family, levels, taps| {
        block(
            Wiring::PreNorm,
            LAYER,
            MixerSpec::Wavelet(WaveletSpec {
                family,
                levels,
                taps,
                ..WaveletSpec::new(inner())
            }),
        )
    };
    vec![
        ("wavelets, fixed", wavelet(Family::Fixed, 1, 4)),
        ("wavelets, adaptive", wavelet(Family::Adaptive, 2, 4)),
        ("wavelets, by angles", wavelet(Family::Orthogonal, 1, 8)),
        ("wavelets, lifted", wavelet(Family::Lifting, 2, 8)),
        (
            "wavelets, lifted by filters",
            wavelet(Family::AdaptiveLifting, 1, 3),
        ),
        ("waves", wavelet(Family::Fourier, 1, 8)),
    ]
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
