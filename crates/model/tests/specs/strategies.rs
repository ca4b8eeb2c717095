//! Specs at random, sensible and not.

use super::*;

/// Mostly a number that makes sense, now and then one that overflows what it is multiplied with.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        24 => prop_oneof![Just(1usize), Just(2), Just(4), Just(8), Just(16)],
        2 => 0usize..40,
        1 => prop_oneof![
            Just(1usize << 17), Just(1 << 20), Just(1 << 24), Just(1 << 32), Just(1 << 63),
            Just(usize::MAX / 2), Just(usize::MAX - 1), Just(usize::MAX)
        ],
    ]
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        20 => prop_oneof![Just(0.0), Just(0.1), Just(1e-5)],
        2 => prop_oneof![Just(1.0), Just(4.0), Just(10_000.0)],
        1 => prop_oneof![
            Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(-0.0), Just(f64::MAX),
            Just(f64::MIN_POSITIVE)
        ],
    ]
}

fn positive() -> impl Strategy<Value = f64> {
    prop_oneof![12 => prop_oneof![Just(1.0), Just(8.0), Just(10_000.0)], 1 => number()]
}

fn norm() -> BoxedStrategy<NormSpec> {
    prop_oneof![
        number().prop_map(|epsilon| NormSpec::Layer { epsilon }),
        number().prop_map(|epsilon| NormSpec::Rms { epsilon }),
        Just(NormSpec::None),
    ]
    .boxed()
}

fn activation() -> impl Strategy<Value = ActivationSpec> {
    prop_oneof![Just(ActivationSpec::Gelu), Just(ActivationSpec::Silu)]
}

fn position() -> BoxedStrategy<PositionSpec> {
    let scaling = prop_oneof![
        3 => Just(RotaryScaling::None),
        1 => positive().prop_map(|factor| RotaryScaling::Linear { factor }),
        1 => (positive(), positive(), positive(), size()).prop_map(
            |(factor, low_frequency_factor, high_frequency_factor, original_length)| {
                RotaryScaling::Llama3 {
                    factor,
                    low_frequency_factor,
                    high_frequency_factor,
                    original_length,
                }
            }
        ),
    ];
    let lists = proptest::collection::vec(proptest::collection::vec(0usize..4, 0..3), 0..3);
    let kept = (size(), lists).prop_map(|(of, groups)| KeptPairs { of, groups });
    let rotary = (
        positive(),
        proptest::option::weighted(0.2, size()),
        any::<bool>(),
        scaling,
        proptest::option::weighted(0.2, kept),
    );
    prop_oneof![
        Just(PositionSpec::None),
        Just(PositionSpec::Alibi),
        rotary.prop_map(|(theta, width, interleaved, scaling, kept)| {
            PositionSpec::Rotary(RotarySpec {
                theta,
                width,
                kept,
                interleaved,
                scaling,
            })
        }),
        (size(), size()).prop_map(|(buckets, distance)| PositionSpec::RelativeBuckets {
            buckets,
            max_distance: distance.saturating_mul(8),
        }),
    ]
    .boxed()
}

fn attention() -> BoxedStrategy<MultiHeadSpec> {
    let seldom = || proptest::option::weighted(0.3, size());
    let query_key_norm = proptest::option::weighted(0.2, (norm(), any::<bool>()));
    let numbers = (
        proptest::option::weighted(0.2, number()),
        number(),
        proptest::option::weighted(0.2, size()),
    );
    (
        size(),
        seldom(),
        seldom(),
        seldom(),
        any::<[bool; 2]>(),
        position(),
        query_key_norm,
        numbers,
    )
        .prop_map(
            |(heads, groups, head_width, window, [causal, bias], position, norm, numbers)| {
                MultiHeadSpec {
                    groups,
                    head_width,
                    causal,
                    window,
                    bias,
                    position,
                    query_key_norm: norm
                        .filter(|(norm, _)| *norm != NormSpec::None)
                        .map(|(norm, per_head)| QueryKeyNorm { norm, per_head }),
                    scale: numbers.0,
                    dropout: numbers.1,
                    value_width: numbers.2,
                    ..MultiHeadSpec::new(heads)
                }
            },
        )
        .boxed()
}

fn mixer() -> BoxedStrategy<MixerSpec> {
    let seldom = || proptest::option::weighted(0.5, size());
    prop_oneof![
        3 => attention().prop_map(MixerSpec::MultiHead),
        1 => (seldom(), size(), size(), seldom(), any::<bool>()).prop_map(
            |(inner, state, taps, step_rank, scan)| {
                let rest = MambaSpec::default();
                MixerSpec::Mamba(MambaSpec { inner, state, taps, step_rank, scan, ..rest })
            }
        ),
        1 => (seldom(), [size(), size(), size(), size()], any::<bool>()).prop_map(
            |(inner, [head_width, groups, state, taps], scan)| {
                let rest = Mamba2Spec::default();
                MixerSpec::Mamba2(Mamba2Spec { inner, head_width, groups, state, taps, scan, ..rest })
            }
        ),
        1 => wavelet(),
        1 => Just(MixerSpec::Absent),
    ]
    .boxed()
}

fn wavelet() -> BoxedStrategy<MixerSpec> {
    let family = prop_oneof![
        Just(Family::Fixed),
        Just(Family::Adaptive),
        Just(Family::Orthogonal),
        Just(Family::Lifting),
        Just(Family::AdaptiveLifting),
        Just(Family::Fourier),
    ];
    let base = prop_oneof![
        Just(Base::Daubechies),
        Just(Base::Symlet),
        Just(Base::Normal)
    ];
    let boundary = prop_oneof![3 => Just(Boundary::Periodised), 1 => Just(Boundary::Reflect)];
    (
        attention(),
        size(),
        family,
        base,
        size(),
        boundary,
        any::<bool>(),
    )
        .prop_map(|(inner, levels, family, base, taps, boundary, band_mask)| {
            MixerSpec::Wavelet(WaveletSpec {
                levels,
                family,
                base,
                taps,
                boundary,
                band_mask,
                ..WaveletSpec::new(MixerSpec::MultiHead(MultiHeadSpec {
                    causal: inner.causal && levels == 3,
                    ..inner
                }))
            })
        })
        .boxed()
}

fn organisation() -> BoxedStrategy<OrganisationSpec> {
    let layouts = [
        "", "(1)", "(2)", "(1)1", "(1)1(1)", "(2)1", "(0)1(1)", "(1)2(0)", "(1)(1)",
    ];
    let positions = prop_oneof![
        Just(GroupPositions::Learned),
        Just(GroupPositions::Sinusoidal),
        Just(GroupPositions::Grid),
    ];
    let latent_positions = prop_oneof![
        Just(LatentPositions::Learned),
        Just(LatentPositions::Sinusoidal)
    ];
    let sizes = (
        size(),
        size(),
        size(),
        proptest::option::weighted(0.5, size()),
    );
    let fit = (
        proptest::sample::select(layouts.to_vec()),
        sizes,
        proptest::option::weighted(0.7, block()),
        proptest::option::weighted(0.2, size()),
        (positions, latent_positions),
        any::<bool>(),
    )
        .prop_map(
            |(layout, (group, groups, latents, width), block, heads, positions, tokens)| {
                // Most of the time latents where there is a block for them.
                let latents = if block.is_some() { latents } else { 0 };
                OrganisationSpec::Interleaved(FitSpec {
                    layout: layout.to_owned(),
                    group,
                    groups,
                    latents,
                    width,
                    block: block.map(|block| Box::new(BlockSpec { repeat: 1, ..block })),
                    exchange_heads: heads,
                    read_feedforward: None,
                    positions: positions.0,
                    latent_positions: positions.1,
                    tiles: None,
                    condition: 0,
                    output: if tokens {
                        FitOutput::Tokens
                    } else {
                        FitOutput::Latents
                    },
                })
            },
        );
    let vcc = (
        (0usize..3, size()),
        size(),
        size(),
        size(),
        number(),
        any::<bool>(),
    )
        .prop_map(
            |((segment_blocks, segment), vips, size, fine, exploration, tokens)| {
                let rest = VccSpec::new(vips, fine);
                OrganisationSpec::VipCentric(VccSpec {
                    segment_blocks,
                    segment: match segment_blocks {
                        0 => rest.segment,
                        _ => segment,
                    },
                    size,
                    exploration,
                    output: if tokens {
                        VccOutput::Tokens
                    } else {
                        VccOutput::Vips
                    },
                    ..rest
                })
            },
        );
    let joined = prop_oneof![Just(Joined::Mean), Just(Joined::Concatenated)];
    let reversible = (joined, proptest::option::of(0..5usize));
    let reversible = reversible
        .prop_map(|(output, chunk)| OrganisationSpec::Reversible(ReversibleSpec { output, chunk }));
    prop_oneof![fit, vcc, reversible].boxed()
}

fn feedforward() -> BoxedStrategy<FeedforwardSpec> {
    let (bias, normalise) = (true, true);
    prop_oneof![
        (size(), activation()).prop_map(move |(hidden, activation)| {
            FeedforwardSpec::Dense(DenseSpec {
                hidden,
                activation,
                bias,
            })
        }),
        (size(), activation()).prop_map(move |(hidden, activation)| {
            FeedforwardSpec::Gated(GatedSpec {
                hidden,
                activation,
                bias,
            })
        }),
        (size(), size(), size(), activation()).prop_map(
            move |(hidden, experts, active, activation)| {
                FeedforwardSpec::Mixture(MixtureSpec {
                    hidden,
                    experts,
                    active,
                    activation,
                    normalise,
                })
            }
        ),
        any::<bool>().prop_map(|bias| FeedforwardSpec::Linear(LinearSpec { bias })),
    ]
    .boxed()
}

fn block() -> BoxedStrategy<BlockSpec> {
    let wiring = prop_oneof![
        Just(Wiring::PreNorm),
        Just(Wiring::PostNorm),
        Just(Wiring::Parallel),
        Just(Wiring::Replacing),
        Just(Wiring::Reversed)
    ];
    let part = proptest::option::weighted(0.8, feedforward());
    (size(), wiring, norm(), mixer(), part, number())
        .prop_map(
            |(repeat, wiring, norm, attention, feedforward, dropout)| BlockSpec {
                repeat,
                wiring,
                norm,
                attention,
                cross_attention: None,
                shared: repeat.is_multiple_of(2),
                layer_scale: None,
                drop_path: 0.0,
                dropout_by_feature: false,
                coding_step: None,
                shortcuts: false,
                feedforward,
                dropout,
            },
        )
        .boxed()
}

fn input() -> BoxedStrategy<InputSpec> {
    let position = prop_oneof![
        Just(AbsolutePosition::None),
        Just(AbsolutePosition::Sinusoidal),
        (size(), any::<bool>()).prop_map(|(offset, skip_padding)| AbsolutePosition::Learned {
            offset,
            skip_padding
        }),
        (1..6usize, any::<bool>(), proptest::option::of(size())).prop_map(
            |(columns, channels, row_width)| AbsolutePosition::Axial {
                columns,
                channels: if channels { 2 } else { 1 },
                row_width
            }
        ),
    ];
    let norm = || proptest::option::weighted(0.2, norm());
    let embedding_width = proptest::option::weighted(0.2, size());
    prop_oneof![
        3 => (size(), size(), position, size(), norm(), embedding_width, number()).prop_map(
            |(vocabulary, length, position, token_types, norm, embedding_width, dropout)| {
                InputSpec::Tokens(TokenInput {
                    vocabulary,
                    length,
                    position,
                    token_types,
                    norm,
                    embedding_width,
                    projected: match length.is_multiple_of(2) {
                        true => Projected::Sum,
                        false => Projected::Token,
                    },
                    dropout,
                    dropout_by_feature: dropout > 0.0 && vocabulary.is_multiple_of(2),
                })
            }
        ),
        1 => (size(), size(), size(), size(), size(), norm(), any::<[bool; 5]>()).prop_map(
            |(height, width, patch, channels, class_tokens, norm, [waves, mask_token, around, wide, resized])| {
                InputSpec::Patches(PatchInput {
                    image: [height, width],
                    patch,
                    channels,
                    class_tokens,
                    bias: true,
                    around: around.then(PatchNorms::default),
                    norm,
                    deviation: if wide { 1.0 } else { PatchInput::DEVIATION },
                    position: match waves {
                        true => PatchPosition::SineCosine,
                        false => PatchPosition::Learned,
                    },
                    mask_token,
                    resized,
                })
            }
        ),
    ]
    .boxed()
}

fn head() -> BoxedStrategy<HeadSpec> {
    let transform = (activation(), norm()).prop_map(|(activation, norm)| HeadTransform {
        activation,
        norm,
        narrows: activation == ActivationSpec::Gelu,
    });
    let pool = prop_oneof![
        Just(Pool::First),
        Just(Pool::Mean),
        Just(Pool::Last),
        Just(Pool::HighestId),
        Just(Pool::AtToken(0)),
        Just(Pool::FirstTwo),
    ];
    let seldom = || proptest::option::weighted(0.3, activation());
    prop_oneof![
        Just(HeadSpec::None),
        Just(HeadSpec::Pixels),
        (any::<[bool; 2]>(), proptest::option::of(transform)).prop_map(
            |([tied, bias], transform)| HeadSpec::LanguageModel {
                tied,
                bias,
                transform
            }
        ),
        (
            pool,
            proptest::option::of(norm()),
            seldom(),
            proptest::option::of(size())
        )
            .prop_map(|(pool, norm, hidden, labels)| HeadSpec::Pooled {
                pool,
                norm,
                hidden,
                labels,
                bias: true
            }),
    ]
    .boxed()
}

pub(super) fn spec() -> impl Strategy<Value = ModelSpec> {
    let ranks = proptest::collection::btree_map(
        prop_oneof![
            Just("blocks.0.attention.query".to_owned()),
            Just("blocks.0.feedforward.up".to_owned()),
            Just("head.output".to_owned())
        ],
        size(),
        0..2,
    );
    let blocks = proptest::collection::vec(block(), 0..3);
    let final_norm = proptest::option::of(norm());
    let organisation = proptest::option::weighted(0.3, organisation());
    (
        size(),
        input(),
        blocks,
        final_norm,
        head(),
        ranks,
        organisation,
    )
        .prop_map(
            |(width, input, blocks, final_norm, head, low_rank, organisation)| ModelSpec {
                quantised: Default::default(),
                organisation,
                initial: match width {
                    8 => InitialValues::DepthScaled {
                        gain: 0.5,
                        by_depth: false,
                    },
                    _ => InitialValues::OfParts,
                },
                width,
                input,
                blocks,
                final_norm,
                head,
                low_rank,
            },
        )
}
