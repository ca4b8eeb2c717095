//! A block of each mechanism of attention.

use super::*;

/// Blocks that together use every mechanism and every bias.
pub(super) fn mechanisms() -> Vec<(&'static str, BlockSpec)> {
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
            "an output tied to the queries, which are keys and values",
            multi_head(MultiHeadSpec {
                sharing: QueryKeySharing::All,
                bias: false,
                output: OutputProjection::Tied,
                ..causal(PositionSpec::None)
            }),
        ),
        (
            "a filter beside the heads",
            multi_head(MultiHeadSpec {
                local: Some(LocalFilter {
                    side: 3,
                    columns: None,
                }),
                ..MultiHeadSpec::new(2)
            }),
        ),
        (
            "no output matrix",
            multi_head(MultiHeadSpec {
                output: OutputProjection::Absent,
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
            "sparse codes behind a step down the coding rate",
            BlockSpec {
                feedforward: Some(FeedforwardSpec::SparseCode(SparseCodeSpec::default())),
                coding_step: Some(CodingStep {
                    kappa: 0.3,
                    epsilon: 0.7,
                }),
                ..block(
                    Wiring::Replacing,
                    LAYER,
                    MixerSpec::MultiHead(MultiHeadSpec {
                        sharing: QueryKeySharing::All,
                        bias: false,
                        output: OutputProjection::Tied,
                        scale: Some(1.0),
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
            multi_head(through(linformer(Sharing::Headwise, Projection::Mean))),
        ),
        (
            "linformer by convolution",
            multi_head(through(linformer(
                Sharing::Headwise,
                Projection::Convolution,
            ))),
        ),
        (
            "linformer of tokens",
            multi_head(through(linformer_of_tokens(
                Sharing::Headwise,
                Projection::Learned,
            ))),
        ),
        (
            "linformer of tokens with one convolution, grouped keys",
            multi_head(MultiHeadSpec {
                groups: Some(1),
                bias: false,
                ..through(linformer_of_tokens(
                    Sharing::KeyValue,
                    Projection::Convolution,
                ))
            }),
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
