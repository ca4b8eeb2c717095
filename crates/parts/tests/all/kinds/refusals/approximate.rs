//! Mechanisms that come near a softmax: through slots, landmarks, codes and blocks of several sizes.

use super::*;

/// Attention through `mechanism`, whose queries are keys too.
fn shared(mechanism: MechanismSpec) -> BlockSpec {
    with_heads(MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..through(mechanism)
    })
}

#[test]
fn impossible_linformer_attention_is_refused() {
    assert_refused([
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..through(linformer(Sharing::Headwise, Projection::Learned))
            }),
            "b.attention.mechanism is \"linformer in causal attention\", but must be a causal \
             mechanism: every weight of linformer depends on later tokens too",
        ),
        (
            with_heads(MultiHeadSpec {
                window: Some(3),
                ..through(linformer(Sharing::Headwise, Projection::Learned))
            }),
            "b.attention.mechanism is \"linformer with a window\", but must be softmax, or attention \
             without a window, which this linformer does not take",
        ),
        (
            with_heads(through(MechanismSpec::Linformer(LinformerSpec::new(0, 9)))),
            "b.attention.mechanism.slots is 0, but must be between 1 and 65536",
        ),
        (
            with_heads(through(MechanismSpec::Linformer(LinformerSpec {
                slots_by_head: vec![2, 3, 3],
                ..LinformerSpec::new(3, 9)
            }))),
            "number of b.attention.mechanism.slots_by_head is 3, but must be 2, one number for each head",
        ),
        (
            with_heads(through(MechanismSpec::Linformer(LinformerSpec {
                slots_by_head: vec![2, 4],
                ..LinformerSpec::new(3, 9)
            }))),
            "b.attention.mechanism.slots_by_head[1] is 4, but must be between 1 and 3",
        ),
        (
            with_heads(through(MechanismSpec::Linformer(LinformerSpec {
                slots_by_head: vec![2, 3],
                projection: Projection::Convolution,
                ..LinformerSpec::new(3, 9)
            }))),
            "b.attention.mechanism.slots_by_head is \"given\", but must be absent, or beside sharing = \
             \"none\": windows of different lengths have no weights in common",
        ),
    ]);
}

#[test]
fn tokens_that_cannot_be_projected_are_refused() {
    let of = |change: fn(&mut LinformerSpec)| {
        let mut linformer = LinformerSpec {
            project: Project::Tokens,
            ..LinformerSpec::new(3, 9)
        };
        change(&mut linformer);
        through(MechanismSpec::Linformer(linformer))
    };
    assert_refused([
        (
            with_heads(of(|linformer| linformer.sharing = Sharing::None)),
            "b.attention.mechanism.project is \"tokens\", but must be keys beside projections of each head: tokens are \
             projected once for all of them",
        ),
        (
            with_heads(of(|linformer| linformer.projection = Projection::Max)),
            "b.attention.mechanism.project is \"tokens\", but must be keys beside projection = \"max\": the largest \
             entries of keys are not those of tokens",
        ),
        (
            with_heads(of(|linformer| {
                linformer.projection = Projection::Mean;
                linformer.slots_by_head = vec![2, 3];
            })),
            "b.attention.mechanism.project is \"tokens\", but must be keys beside windows of different lengths: tokens \
             are projected once for all heads",
        ),
        (
            with_heads(MultiHeadSpec {
                sharing: QueryKeySharing::QueryKey,
                ..of(|_| {})
            }),
            "b.attention.mechanism.project is \"tokens\", but must be keys beside queries that are keys: queries are \
             made of all tokens",
        ),
        (
            with_heads(MultiHeadSpec {
                position: rotary(false, None, RotaryScaling::None),
                ..of(|_| {})
            }),
            "b.attention.mechanism.project is \"tokens\", but must be keys beside rotary positions, which turn the key \
             of each token",
        ),
        (
            with_heads(MultiHeadSpec {
                query_key_norm: Some(QueryKeyNorm {
                    norm: RMS,
                    per_head: true,
                }),
                ..of(|_| {})
            }),
            "b.attention.mechanism.project is \"tokens\", but must be keys beside query_key_norm, which norms the key of \
             each token",
        ),
        (
            with_heads(through(MechanismSpec::Subsampled(SubsampledSpec {
                inner: Box::new(of(|_| {}).mechanism),
                ..SubsampledSpec::default()
            }))),
            "b.attention.mechanism.inner.project is \"tokens\", but must be keys: which of these are drawn is decided \
             once they are there",
        ),
    ]);
}

#[test]
fn impossible_soft_attention_is_refused() {
    let soft = |spec: SoftSpec| shared(MechanismSpec::Soft(spec));
    let means = || SoftSpec::new(Landmarks::Mean { ratio: 2 });
    assert_refused([
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Soft(means()))
            }),
            "b.attention.mechanism is \"soft in causal attention\", but must be a causal mechanism: \
             every weight of soft depends on later tokens too",
        ),
        (
            with_heads(through(MechanismSpec::Soft(means()))),
            "b.attention.mechanism is \"soft with keys of their own\", but must be one with sharing = \
             \"query-key\" beside it: its kernel is of queries that are keys too",
        ),
        (
            soft(SoftSpec::new(Landmarks::Convolution { ratio: 0 })),
            "b.attention.mechanism.landmarks.ratio is 0, but must be between 1 and 1024",
        ),
        (
            soft(SoftSpec::new(Landmarks::Segments { count: 0 })),
            "b.attention.mechanism.landmarks.count is 0, but must be between 1 and 65536",
        ),
        (
            soft(SoftSpec {
                columns: Some(0),
                ..means()
            }),
            "b.attention.mechanism.columns is 0, but must be between 1 and 65536",
        ),
        (
            soft(SoftSpec {
                local: Some(4),
                ..means()
            }),
            "b.attention.mechanism.local is 4, but must be odd and at most 63",
        ),
        (
            soft(SoftSpec {
                epsilon: f64::NAN,
                ..means()
            }),
            "b.attention.mechanism.epsilon is NaN, but must be between 0 and 0.05, for which Newton's \
             iteration converges",
        ),
        (
            soft(SoftSpec {
                steps: 0,
                ..means()
            }),
            "b.attention.mechanism.steps is 0, but must be between 1 and 100",
        ),
    ]);
}

#[test]
fn impossible_ecoformer_attention_is_refused() {
    let ecoformer = |spec: EcoformerSpec| shared(MechanismSpec::Ecoformer(spec));
    assert_refused([
        (
            with_heads(through(MechanismSpec::Ecoformer(EcoformerSpec::default()))),
            "b.attention.mechanism is \"ecoformer with keys of their own\", but must be one with \
             sharing = \"query-key\" beside it: queries and keys have one code",
        ),
        (
            ecoformer(EcoformerSpec {
                bits: 65,
                ..EcoformerSpec::default()
            }),
            "b.attention.mechanism.bits is 65, but must be between 1 and 64",
        ),
        (
            ecoformer(EcoformerSpec {
                anchors: 0,
                ..EcoformerSpec::default()
            }),
            "b.attention.mechanism.anchors is 0, but must be between 1 and 4096",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                sharing: QueryKeySharing::QueryKey,
                ..through(MechanismSpec::Ecoformer(EcoformerSpec::default()))
            }),
            "b.attention.mechanism.bandwidth is \"sample\", but must be fitted in causal attention: \
             the mean over a sequence depends on later tokens too",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                sharing: QueryKeySharing::QueryKey,
                ..through(MechanismSpec::Ecoformer(EcoformerSpec {
                    bandwidth: Bandwidth::Fitted,
                    released: true,
                    ..EcoformerSpec::default()
                }))
            }),
            "b.attention.mechanism.released is true, but must be false in causal attention, which the \
             authors' program does not have",
        ),
    ]);
}

#[test]
fn impossible_mra_attention_is_refused() {
    let mra = |spec: MraSpec| with_heads(through(MechanismSpec::Mra(spec)));
    assert_refused([
        (
            mra(MraSpec {
                scales: vec![32, 5, 1],
                per_row: vec![2, 2],
                ..MraSpec::new(32, 2)
            }),
            "b.attention.mechanism.scales is [32, 5, 1], but must be falling numbers of at most 65536, \
             each a divisor of the one before",
        ),
        (
            mra(MraSpec {
                scales: vec![32],
                ..MraSpec::new(32, 2)
            }),
            "number of b.attention.mechanism.scales is 1, but must be between 2 and 16",
        ),
        (
            mra(MraSpec {
                per_row: vec![2, 2],
                ..MraSpec::new(32, 2)
            }),
            "number of b.attention.mechanism.per_row is 2, but must be 1, one less than scales",
        ),
        (
            mra(MraSpec {
                sparse: true,
                ..MraSpec::new(32, 0)
            }),
            "b.attention.mechanism.per_row is 0, but must be between 1 and 1048576",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Mra(MraSpec {
                    scales: vec![32, 8],
                    ..MraSpec::new(32, 2)
                }))
            }),
            "b.attention.mechanism.scales is [32, 8], but must be numbers down to 1 in causal \
             attention, whose diagonal is of single entries",
        ),
        (
            mra(MraSpec {
                image: Some(Tiles {
                    columns: 12,
                    tile: [4, 8],
                }),
                ..MraSpec::new(32, 2)
            }),
            "b.attention.mechanism.image.tile is [4, 8], but must be a height and a width that make 32, \
             the largest scale, together, the width a divisor of 12 columns",
        ),
    ]);
}
