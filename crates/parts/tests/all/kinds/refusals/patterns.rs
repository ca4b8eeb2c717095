//! Mechanisms that meet some of the keys.

use super::*;

#[test]
fn impossible_sparse_patterns_are_refused() {
    let layout = |block, heads: &[&[&str]], masks: &[(&str, [&str; 8])], steps| {
        let rows = |rows: &[&str]| rows.iter().map(|row| (*row).to_owned()).collect();
        let pattern = SparsePattern::Layout(BlockLayout {
            block,
            heads: heads.iter().map(|head| rows(head)).collect(),
            masks: masks
                .iter()
                .map(|(letter, mask)| ((*letter).to_owned(), rows(mask)))
                .collect(),
        });
        MultiHeadSpec {
            causal: true,
            ..through(MechanismSpec::Sparse(SparseSpec { pattern, steps }))
        }
    };
    let sparse = |stride, summaries, groups, steps| {
        let pattern = SparsePattern::Fixed {
            stride,
            summaries,
            groups,
        };
        through(MechanismSpec::Sparse(SparseSpec { pattern, steps }))
    };
    assert_refused([
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..sparse(0, 1, 1, Steps::Merged)
            }),
            "b.attention.mechanism.pattern.stride is 0, but must be between 1 and 16777216",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..sparse(4, 5, 1, Steps::Merged)
            }),
            "b.attention.mechanism.pattern.summaries is 5, but must be between 1 and 4",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..sparse(5, 2, 3, Steps::Merged)
            }),
            "b.attention.mechanism.pattern.groups is 3, but must be between 1 and 2",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                heads: 1,
                ..sparse(5, 2, 2, Steps::ByHead)
            }),
            "b.attention.mechanism.steps is \"by-head with one head\", but must be first, second or merged, or two heads at least",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Sparse(SparseSpec {
                    pattern: SparsePattern::LogSparse,
                    steps: Steps::First,
                }))
            }),
            "b.attention.mechanism.steps is \"first\", but must be merged: log-sparse and layouts have one step",
        ),
        (
            with_heads(layout(8, &[&["#"]], &[], Steps::ByHead)),
            "b.attention.mechanism.steps is \"by-head\", but must be merged: log-sparse and layouts have one step",
        ),
        (
            with_heads(layout(12, &[&["#"]], &[], Steps::Merged)),
            "b.attention.mechanism.pattern.block is 12, but must be 8, 16, 32 or 64",
        ),
        (
            with_heads(layout(8, &[&["#"], &["#"], &["#"]], &[], Steps::Merged)),
            "b.attention.mechanism.pattern.heads is 3, but must be the layout of one head, for all, or of 2",
        ),
        (
            with_heads(layout(8, &[&[]], &[], Steps::Merged)),
            "b.attention.mechanism.pattern.heads.0 is 0, but must be between 1 and 1024",
        ),
        (
            with_heads(layout(8, &[&["#", "###"]], &[], Steps::Merged)),
            "b.attention.mechanism.pattern.heads.0.1 is \"###\", but must be 2 of the characters ., # and the \
             letters of masks",
        ),
        (
            with_heads(layout(
                8,
                &[&["#", ".b"]],
                &[("a", ["########"; 8])],
                Steps::Merged,
            )),
            "b.attention.mechanism.pattern.heads.0.1 is \".b\", but must be 2 of the characters ., # and the \
             letters of masks",
        ),
        (
            with_heads(layout(
                8,
                &[&["#"]],
                &[("ab", ["########"; 8])],
                Steps::Merged,
            )),
            "b.attention.mechanism.pattern.masks.ab is \"a mask\", but must be named by one letter, a to z",
        ),
        (
            with_heads(layout(
                8,
                &[&["#"]],
                &[("a", ["#######x"; 8])],
                Steps::Merged,
            )),
            "b.attention.mechanism.pattern.masks.a is \"#######x #######x #######x #######x #######x #######x \
             #######x #######x\", but must be 8 rows of 8 characters, . or #",
        ),
        (
            with_heads(sparse(4, 1, 1, Steps::Merged)),
            "b.attention.mechanism is \"sparse in bidirectional attention\", but must be another mechanism, or causal = true: this sparse looks back only",
        ),
    ]);
}

#[test]
fn impossible_reformer_attention_is_refused() {
    let reformer = |spec: ReformerSpec| MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..through(MechanismSpec::Reformer(spec))
    };
    assert_refused([
        (
            with_heads(through(MechanismSpec::Reformer(ReformerSpec::new(4)))),
            "b.attention.mechanism is \"reformer with keys of their own\", but must be one with sharing = \"query-key\" beside it: tokens are sorted by queries that are keys too",
        ),
        (
            with_heads(reformer(ReformerSpec::new(0))),
            "b.attention.mechanism.chunk is 0, but must be between 1 and 1048576",
        ),
        (
            with_heads(reformer(ReformerSpec {
                rounds: 65,
                ..ReformerSpec::new(4)
            })),
            "b.attention.mechanism.rounds is 65, but must be between 1 and 64",
        ),
        (
            with_heads(reformer(ReformerSpec {
                before: 65,
                ..ReformerSpec::new(4)
            })),
            "b.attention.mechanism.before is 65, but must be between 0 and 64",
        ),
        (
            with_heads(reformer(ReformerSpec {
                after: 65,
                ..ReformerSpec::new(4)
            })),
            "b.attention.mechanism.after is 65, but must be between 0 and 64",
        ),
        (
            with_heads(reformer(ReformerSpec {
                buckets: vec![4, 3],
                ..ReformerSpec::new(4)
            })),
            "b.attention.mechanism.buckets is 3, but must be even numbers between 2 and 4096",
        ),
        (
            with_heads(reformer(ReformerSpec {
                buckets: vec![4; 5],
                ..ReformerSpec::new(4)
            })),
            "number of b.attention.mechanism.buckets is 5, but must be between 0 and 4",
        ),
        (
            with_heads(reformer(ReformerSpec {
                buckets: vec![4096, 4096, 256],
                ..ReformerSpec::new(4)
            })),
            "b.attention.mechanism.buckets is [4096, 4096, 256], but must be digits whose product is at most 4294967295",
        ),
    ]);
}

#[test]
fn impossible_combiner_attention_is_refused() {
    let combiner = |form| through(MechanismSpec::Combiner(CombinerSpec::new(form)));
    assert_refused([
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..combiner(CombinerForm::Fixed { segment: 0 })
            }),
            "b.attention.mechanism.form.segment is 0, but must be between 1 and 16777216",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..combiner(CombinerForm::Vertical { columns: 0 })
            }),
            "b.attention.mechanism.form.columns is 0, but must be between 1 and 16777216",
        ),
        (
            with_heads(combiner(CombinerForm::Routed { clusters: 0 })),
            "b.attention.mechanism.form.clusters is 0, but must be between 1 and 65536",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Combiner(CombinerSpec {
                    summary: Summary::DeepSets {
                        pooling: Pooling::Sum,
                    },
                    ..CombinerSpec::new(CombinerForm::RowMajor { columns: 4 })
                }))
            }),
            "b.attention.mechanism.summary.kind is \"deep-sets\", but must be largest in row-major form, \
             whose spans are summed up by their tokens",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..through(MechanismSpec::Combiner(CombinerSpec {
                    summary: Summary::Projected {
                        of: RowSource::Keys,
                    },
                    ..CombinerSpec::new(CombinerForm::Vertical { columns: 4 })
                }))
            }),
            "b.attention.mechanism.summary.kind is \"projected\", but must be largest or deep-sets in a form whose spans \
             no token sums up",
        ),
        (
            with_heads(combiner(CombinerForm::RowMajor { columns: 4 })),
            "b.attention.mechanism is \"combiner in bidirectional attention\", but must be another mechanism, or causal = true: this combiner looks back only",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                window: Some(3),
                ..combiner(CombinerForm::LogSparse)
            }),
            "b.attention.mechanism is \"combiner with a window\", but must be softmax, or attention without a window, which this combiner does not take",
        ),
        (
            with_cross(combiner(CombinerForm::LogSparse)),
            "b.cross_attention.mechanism is \"combiner in cross-attention\", but must be one that can read another sequence, such as softmax or linformer",
        ),
    ]);
}
