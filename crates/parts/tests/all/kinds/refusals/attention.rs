//! Heads and their widths, and attention to another sequence.

use super::*;

#[test]
fn impossible_heads_are_refused() {
    assert_refused([
        (
            with_heads(MultiHeadSpec {
                groups: Some(1),
                sharing: QueryKeySharing::QueryKey,
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.groups is 1, but must be 2, as queries that are keys too ask for",
        ),
        (
            with_heads(MultiHeadSpec {
                output: OutputProjection::Tied,
                sharing: QueryKeySharing::QueryKey,
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.output is \"tied\", but must be own, or sharing = \"all\" beside it: values are written by the \
             matrix of the queries",
        ),
        (
            with_heads(MultiHeadSpec {
                output: OutputProjection::Absent,
                value_width: Some(3),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.output is \"absent\", but must be own where heads give 6 features and tokens have 8, or as many",
        ),
        (
            with_heads(MultiHeadSpec {
                output: OutputProjection::Absent,
                output_bias: Some(true),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.output_bias is true, but must be false or absent where the output is absent",
        ),
        (
            with_cross(MultiHeadSpec {
                output: OutputProjection::Absent,
                ..MultiHeadSpec::new(2)
            }),
            "b.cross_attention.output is \"absent\", but must be own in cross-attention",
        ),
        (
            with_heads(MultiHeadSpec {
                local: Some(LocalFilter {
                    side: 4,
                    columns: None,
                }),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.local.side is 4, but must be odd and at most 63",
        ),
        (
            with_heads(MultiHeadSpec {
                local: Some(LocalFilter {
                    side: 3,
                    columns: Some(0),
                }),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.local.columns is 0, but must be between 1 and 65536",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                local: Some(LocalFilter {
                    side: 3,
                    columns: None,
                }),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.local is \"given\", but must be absent in causal attention: a filter sees later tokens too",
        ),
        (
            with_heads(MultiHeadSpec::new(0)),
            "b.attention.heads is 0, but must be between 1 and the width 8",
        ),
        (
            with_heads(MultiHeadSpec::new(3)),
            "b.attention.heads is 3, but must be a divisor of the width 8, or head_width must be given",
        ),
        (
            with_heads(MultiHeadSpec {
                groups: Some(3),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.groups is 3, but must be a divisor of 2 heads",
        ),
        (
            with_heads(MultiHeadSpec {
                head_width: Some(usize::MAX),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.head_width is 18446744073709551615, but must be between 1 and 524288",
        ),
        (
            with_heads(MultiHeadSpec {
                value_width: Some(0),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.value_width is 0, but must be between 1 and 524288",
        ),
        (
            with_heads(MultiHeadSpec {
                window: Some(0),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.window is 0, but must be at least 1",
        ),
        (
            with_heads(MultiHeadSpec {
                dropout: 1.0,
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.dropout is 1.0, but must be at least 0 and below 1",
        ),
        (
            with_heads(MultiHeadSpec {
                scale: Some(f64::NAN),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.scale is NaN, but must be a finite number",
        ),
        (
            with_heads(MultiHeadSpec {
                query_key_norm: Some(QueryKeyNorm {
                    norm: NormSpec::Rms { epsilon: -1.0 },
                    per_head: true,
                }),
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.query_key_norm.norm.epsilon is -1.0, but must be a number of at least 0",
        ),
    ]);
}

#[test]
fn impossible_cross_attention_is_refused() {
    assert_refused([
        (
            with_cross(MultiHeadSpec {
                causal: true,
                ..MultiHeadSpec::new(2)
            }),
            "b.cross_attention.causal is \"true\", but must be false in cross-attention",
        ),
        (
            with_cross(MultiHeadSpec {
                position: PositionSpec::Alibi,
                ..MultiHeadSpec::new(2)
            }),
            "b.cross_attention.position.kind is \"alibi\", but must be none in cross-attention",
        ),
    ]);
}
