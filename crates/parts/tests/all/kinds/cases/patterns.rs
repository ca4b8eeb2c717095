//! Attention that meets some of the keys.

use super::*;

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
pub(super) fn sparse() -> Vec<(&'static str, MultiHeadSpec)> {
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
            "earlier rows by keys that a layer makes",
            MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Combiner(CombinerSpec {
                    summary: Summary::Projected {
                        of: RowSource::Keys,
                    },
                    ..CombinerSpec::new(CombinerForm::RowMajor { columns: 2 })
                }))
            },
        ),
        (
            "earlier rows by keys that a layer makes of their values",
            MultiHeadSpec {
                causal: true,
                value_width: Some(3),
                ..through(MechanismSpec::Combiner(CombinerSpec {
                    summary: Summary::Projected {
                        of: RowSource::Values,
                    },
                    ..CombinerSpec::new(CombinerForm::RowMajor { columns: 2 })
                }))
            },
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
