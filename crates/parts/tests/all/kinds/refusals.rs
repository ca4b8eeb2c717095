//! Specs that cannot be built, and what is said of them.

use super::*;

#[test]
fn impossible_specs_are_refused_with_field_value_and_what_is_valid() {
    let heads = MultiHeadSpec::new(2);
    let with_heads =
        |heads: MultiHeadSpec| block(Wiring::PreNorm, LAYER, MixerSpec::MultiHead(heads));
    let with_feedforward = |part: Option<FeedforwardSpec>| BlockSpec {
        feedforward: part,
        ..with_heads(MultiHeadSpec::new(2))
    };
    let with_mamba = |mamba: MambaSpec| block(Wiring::PreNorm, LAYER, MixerSpec::Mamba(mamba));
    let with_mamba2 = |mamba: Mamba2Spec| block(Wiring::PreNorm, LAYER, MixerSpec::Mamba2(mamba));
    let with_position = |position: PositionSpec| {
        with_heads(MultiHeadSpec {
            position,
            ..MultiHeadSpec::new(2)
        })
    };
    let with_cross = |cross: MultiHeadSpec| BlockSpec {
        cross_attention: Some(cross),
        ..with_heads(MultiHeadSpec::new(2))
    };
    let llama3 = |low: f64, high: f64, original_length: usize| {
        with_position(rotary(
            false,
            None,
            RotaryScaling::Llama3 {
                factor: 8.0,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_length,
            },
        ))
    };
    let buckets = |buckets, max_distance| {
        with_position(PositionSpec::RelativeBuckets {
            buckets,
            max_distance,
        })
    };
    let kept = |of, width, groups| {
        PositionSpec::Rotary(RotarySpec {
            width,
            kept: Some(KeptPairs { of, groups }),
            ..RotarySpec::default()
        })
    };
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
    let reformer = |spec: ReformerSpec| MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..through(MechanismSpec::Reformer(spec))
    };
    let combiner = |form| through(MechanismSpec::Combiner(CombinerSpec::new(form)));
    let made_by = |operator| {
        through(MechanismSpec::DoublyStochastic(DoublyStochasticSpec {
            operator,
        }))
    };
    let sinkhorn = |iterations, epsilon| {
        made_by(Operator::Sinkhorn {
            iterations,
            form: SinkhornForm::Log,
            epsilon,
        })
    };
    let subsampled = |spec: SubsampledSpec| through(MechanismSpec::Subsampled(spec));
    let on_a_tree = |spec: TopologicalSpec| through(MechanismSpec::Topological(spec));
    let shared = |mechanism| {
        with_heads(MultiHeadSpec {
            sharing: QueryKeySharing::QueryKey,
            ..through(mechanism)
        })
    };
    let soft = |spec: SoftSpec| shared(MechanismSpec::Soft(spec));
    let means = || SoftSpec::new(Landmarks::Mean { ratio: 2 });
    let ecoformer = |spec: EcoformerSpec| shared(MechanismSpec::Ecoformer(spec));
    let mra = |spec: MraSpec| with_heads(through(MechanismSpec::Mra(spec)));
    let refused = [
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
        (
            with_heads(on_a_tree(TopologicalSpec {
                columns: Some(0),
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.columns is 0, but must be between 1 and 65536",
        ),
        (
            with_heads(on_a_tree(TopologicalSpec {
                columns: Some(2),
                graph: Some(GraphSpec::new(2, vec![(0, 1, 1.0)])),
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.graph is \"given\", but must be absent beside columns: tokens are vertices \
             of a graph or patches of an image",
        ),
        (
            with_heads(on_a_tree(TopologicalSpec {
                graph: Some(GraphSpec::new(4, vec![(0, 1, 1.0), (2, 3, 1.0)])),
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.graph.edges is \"in parts that nothing joins\", but must be edges (a, b, \
             length) that join all vertices, lengths of at least 0",
        ),
        (
            with_heads(on_a_tree(TopologicalSpec {
                graph: Some(GraphSpec::new(3, vec![(0, 1, 1.0), (1, 2, 0.3)])),
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.graph.step is \"absent\", but must be a length that edges are rounded to a \
             whole number of: these have none in common",
        ),
        (
            with_heads(on_a_tree(TopologicalSpec {
                metric: Metric::RandomTrees { count: 0, seed: 0 },
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.metric.count is 0, but must be between 1 and 64",
        ),
        (
            with_heads(on_a_tree(TopologicalSpec {
                unit: 0.0,
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.unit is 0.0, but must be a positive number",
        ),
        (
            with_heads(on_a_tree(TopologicalSpec {
                features: FeatureMap::Exponential { count: 0, seed: 0 },
                ..TopologicalSpec::default()
            })),
            "b.attention.mechanism.features.count is 0, but must be between 1 and 4096",
        ),
        (
            with_heads(MultiHeadSpec {
                scale: Some(-1.0),
                ..on_a_tree(TopologicalSpec {
                    features: FeatureMap::Exponential { count: 4, seed: 0 },
                    ..TopologicalSpec::default()
                })
            }),
            "b.attention.mechanism.features.kind is \"exponential\", but must be another map where the scale \
             is not positive: its root multiplies queries and keys",
        ),
        (
            with_heads(sinkhorn(4, 1.0)),
            "b.attention.mechanism.operator.iterations is 4, but must be an odd number, so that rows are \
             normalised last",
        ),
        (
            with_heads(sinkhorn(0, 1.0)),
            "b.attention.mechanism.operator.iterations is 0, but must be between 1 and 10001",
        ),
        (
            with_heads(sinkhorn(3, 0.0)),
            "b.attention.mechanism.operator.epsilon is 0.0, but must be a positive number",
        ),
        (
            with_heads(made_by(Operator::Circuit(CircuitSpec::new(9, 3)))),
            "b.attention.mechanism.operator.tokens is 9, but must be between 2 and 8",
        ),
        (
            with_heads(made_by(Operator::Circuit(CircuitSpec::new(8, 11)))),
            "b.attention.mechanism.operator.qubits is 11, but must be between 1 and 10",
        ),
        (
            with_heads(made_by(Operator::Circuit(CircuitSpec {
                layers: 257,
                ..CircuitSpec::new(8, 4)
            }))),
            "b.attention.mechanism.operator.layers is 257, but must be between 0 and 256",
        ),
        (
            with_heads(MultiHeadSpec {
                scale: Some(0.0),
                ..made_by(Operator::NormSoftmax {
                    statistic: Statistic::Deviation,
                    over: Over::Row,
                })
            }),
            "b.attention.mechanism.operator.kind is \"norm-softmax\", but must be another operator where \
             the scale is not positive: its inverse is the temperature",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..sinkhorn(3, 1.0)
            }),
            "b.attention.mechanism is \"doubly-stochastic in causal attention\", but must be a causal \
             mechanism: every weight of doubly-stochastic depends on later tokens too",
        ),
        (
            with_heads(subsampled(SubsampledSpec {
                keep: 0.0,
                ..SubsampledSpec::default()
            })),
            "b.attention.mechanism.keep is 0.0, but must be above 0 and at most 1",
        ),
        (
            with_heads(subsampled(SubsampledSpec {
                selection: Selection::Local {
                    radius: -1.0,
                    columns: None,
                },
                ..SubsampledSpec::default()
            })),
            "b.attention.mechanism.selection.radius is -1.0, but must be a number of at least 0",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..subsampled(SubsampledSpec {
                    selection: Selection::Local {
                        radius: 1.0,
                        columns: Some(4),
                    },
                    ..SubsampledSpec::default()
                })
            }),
            "b.attention.mechanism.selection.columns is 4, but must be absent in causal attention, which \
             has one order",
        ),
        (
            with_heads(subsampled(SubsampledSpec {
                selection: Selection::Local {
                    radius: 1.0,
                    columns: None,
                },
                inner: Box::new(MechanismSpec::Fastmax(FastmaxSpec::default())),
                ..SubsampledSpec::default()
            })),
            "b.attention.mechanism.selection.kind is \"local\", but must be unbiased: windows are those \
             of softmax",
        ),
        (
            with_heads(MultiHeadSpec {
                causal: true,
                ..subsampled(SubsampledSpec {
                    inner: Box::new(MechanismSpec::Combiner(CombinerSpec::new(
                        CombinerForm::LogSparse,
                    ))),
                    ..SubsampledSpec::default()
                })
            }),
            "b.attention.mechanism.inner.kind is \"combiner\", but must be softmax, or a mechanism that \
             can leave any of its keys out, such as fastmax",
        ),
        (
            with_heads(subsampled(SubsampledSpec {
                inner: Box::new(linformer(Sharing::Headwise, Projection::Learned)),
                per_head: true,
                ..SubsampledSpec::default()
            })),
            "b.attention.mechanism.per_head is true, but must be false where keys that are left out are \
             as padding, which all heads share",
        ),
        (
            with_heads(subsampled(SubsampledSpec {
                inner: Box::new(linformer(Sharing::Headwise, Projection::Learned)),
                own: true,
                ..SubsampledSpec::default()
            })),
            "b.attention.mechanism.own is true, but must be false: a key of its own is that of softmax",
        ),
        (
            with_heads(subsampled(SubsampledSpec {
                inner: Box::new(MechanismSpec::Linformer(LinformerSpec::new(0, 9))),
                ..SubsampledSpec::default()
            })),
            "b.attention.mechanism.inner.slots is 0, but must be between 1 and 65536",
        ),
        (
            with_feedforward(Some(FeedforwardSpec::SparseCode(SparseCodeSpec {
                step: -1.0,
                ..SparseCodeSpec::default()
            }))),
            "b.feedforward.step is -1.0, but must be a number of at least 0",
        ),
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
             without a window: linformer has no scores to mask or add to",
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
        (
            with_heads(MultiHeadSpec {
                groups: Some(1),
                sharing: QueryKeySharing::QueryKey,
                ..MultiHeadSpec::new(2)
            }),
            "b.attention.groups is 1, but must be 2, as queries that are keys too ask for",
        ),
        (
            with_position(PositionSpec::Fire(FireSpec {
                layers: 3,
                ..FireSpec::default()
            })),
            "b.attention.position.layers is 3, but must be between 1 and 2",
        ),
        (
            with_position(PositionSpec::Sandwich { width: 0 }),
            "b.attention.position.width is 0, but must be between 2 and 65536",
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
                ..heads.clone()
            }),
            "b.attention.groups is 3, but must be a divisor of 2 heads",
        ),
        (
            with_heads(MultiHeadSpec {
                head_width: Some(usize::MAX),
                ..heads.clone()
            }),
            "b.attention.head_width is 18446744073709551615, but must be between 1 and 524288",
        ),
        (
            with_heads(MultiHeadSpec {
                value_width: Some(0),
                ..heads.clone()
            }),
            "b.attention.value_width is 0, but must be between 1 and 524288",
        ),
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
            "b.attention.mechanism.steps is First, but must be merged: log-sparse and layouts have one step",
        ),
        (
            with_heads(layout(8, &[&["#"]], &[], Steps::ByHead)),
            "b.attention.mechanism.steps is ByHead, but must be merged: log-sparse and layouts have one step",
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
            "b.attention.mechanism is \"sparse in bidirectional attention\", but must be another mechanism, or causal = true: sparse looks back only",
        ),
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
            with_heads(combiner(CombinerForm::RowMajor { columns: 4 })),
            "b.attention.mechanism is \"combiner in bidirectional attention\", but must be another mechanism, or causal = true: combiner looks back only",
        ),
        (
            with_cross(combiner(CombinerForm::LogSparse)),
            "b.cross_attention.mechanism is \"combiner in cross-attention\", but must be one that can read another sequence, such as softmax or linformer",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 1]])),
            "number of lists in b.attention.position.kept.groups is 1, but must be 2, one list for each group of keys",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 1], vec![3]])),
            "b.attention.position.kept.groups.1 is [3], but must be 2 rising indices below 4",
        ),
        (
            with_position(kept(8, None, vec![vec![1, 0], vec![2, 3]])),
            "b.attention.position.kept.groups.0 is [1, 0], but must be 2 rising indices below 4",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 4], vec![2, 3]])),
            "b.attention.position.kept.groups.0 is [0, 4], but must be 2 rising indices below 4",
        ),
        (
            with_position(kept(8, None, vec![vec![], vec![]])),
            "b.attention.position.kept.groups.0 is [], but must be 1 rising indices below 4",
        ),
        (
            with_position(kept(7, None, vec![vec![0], vec![1]])),
            "b.attention.position.kept.of is 7, but must be an even number of at most 1048576",
        ),
        (
            with_position(kept(8, Some(2), vec![vec![0, 1], vec![1, 2]])),
            "b.attention.position.width is 2, but must be absent or 4, two for each kept pair",
        ),
        (
            with_position(kept(8, None, vec![vec![0, 1, 2], vec![1, 2, 3]])),
            "b.attention.position.width is 6, but must be an even number of at most 4, the width of a head",
        ),
        (
            with_heads(MultiHeadSpec {
                window: Some(0),
                ..heads.clone()
            }),
            "b.attention.window is 0, but must be at least 1",
        ),
        (
            with_heads(MultiHeadSpec {
                dropout: 1.0,
                ..heads.clone()
            }),
            "b.attention.dropout is 1.0, but must be at least 0 and below 1",
        ),
        (
            with_heads(MultiHeadSpec {
                scale: Some(f64::NAN),
                ..heads.clone()
            }),
            "b.attention.scale is NaN, but must be a finite number",
        ),
        (
            with_heads(MultiHeadSpec {
                query_key_norm: Some(QueryKeyNorm {
                    norm: NormSpec::Rms { epsilon: -1.0 },
                    per_head: true,
                }),
                ..heads.clone()
            }),
            "b.attention.query_key_norm.norm.epsilon is -1.0, but must be a number of at least 0",
        ),
        (
            with_position(rotary(false, Some(3), RotaryScaling::None)),
            "b.attention.position.width is 3, but must be an even number of at most 4, the width of a head",
        ),
        (
            with_position(rotary(false, None, RotaryScaling::Linear { factor: 0.0 })),
            "b.attention.position.scaling.factor is 0.0, but must be a positive number",
        ),
        (
            llama3(0.0, 4.0, 64),
            "b.attention.position.scaling.low_frequency_factor is 0.0, but must be a positive number",
        ),
        (
            llama3(4.0, 4.0, 64),
            "b.attention.position.scaling.high_frequency_factor is 4.0, but must be above the low_frequency_factor 4",
        ),
        (
            llama3(1.0, 4.0, 0),
            "b.attention.position.scaling.original_length is 0, but must be at least 1",
        ),
        (
            buckets(2, 100),
            "b.attention.position.buckets is 2, but must be between 4 and 4096",
        ),
        (
            buckets(32, 8),
            "b.attention.position.max_distance is 8, but must be above 8, the distances that have a bucket of their own",
        ),
        (
            with_mamba(MambaSpec {
                inner: Some(0),
                ..MambaSpec::default()
            }),
            "b.attention.inner is 0, but must be between 1 and 1048576",
        ),
        (
            with_mamba(MambaSpec {
                state: 0,
                ..MambaSpec::default()
            }),
            "b.attention.state is 0, but must be between 1 and 4096",
        ),
        (
            with_mamba(MambaSpec {
                taps: 0,
                ..MambaSpec::default()
            }),
            "b.attention.taps is 0, but must be between 1 and 1024",
        ),
        (
            with_mamba(MambaSpec {
                step_rank: Some(17),
                ..MambaSpec::default()
            }),
            "b.attention.step_rank is 17, but must be between 1 and 16",
        ),
        (
            with_mamba2(Mamba2Spec::default()),
            "b.attention.head_width is 64, but must be a divisor of the inner channels, 16",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 0,
                ..Mamba2Spec::default()
            }),
            "b.attention.head_width is 0, but must be a divisor of the inner channels, 16",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                groups: 3,
                ..Mamba2Spec::default()
            }),
            "b.attention.groups is 3, but must be a divisor of the heads, 4",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                state: 0,
                ..Mamba2Spec::default()
            }),
            "b.attention.state is 0, but must be between 1 and 4096",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                chunk: 0,
                ..Mamba2Spec::default()
            }),
            "b.attention.chunk is 0, but must be between 1 and 65536",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                norm: LAYER,
                ..Mamba2Spec::default()
            }),
            "b.attention.norm.kind is \"layer\", but must be rms or none",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                smallest_step: Some(0.2),
                largest_step: Some(0.1),
                ..Mamba2Spec::default()
            }),
            "b.attention.smallest_step is 0.2, but must be at most the largest, 0.1",
        ),
        (
            with_mamba2(Mamba2Spec {
                head_width: 4,
                largest_step: Some(f64::INFINITY),
                ..Mamba2Spec::default()
            }),
            "b.attention.largest_step is inf, but must be a number of at least 0",
        ),
        (
            with_feedforward(Some(FeedforwardSpec::Dense(DenseSpec {
                hidden: 0,
                activation: ActivationSpec::Gelu,
                bias: true,
            }))),
            "b.feedforward.hidden is 0, but must be between 1 and 1048576",
        ),
        (
            with_feedforward(Some(FeedforwardSpec::Mixture(MixtureSpec {
                hidden: 4,
                experts: 2,
                active: 3,
                activation: ActivationSpec::Silu,
                normalise: true,
            }))),
            "b.feedforward.active is 3, but must be between 1 and 2",
        ),
        (
            with_cross(MultiHeadSpec {
                causal: true,
                ..heads.clone()
            }),
            "b.cross_attention.causal is \"true\", but must be false in cross-attention",
        ),
        (
            with_cross(MultiHeadSpec {
                position: PositionSpec::Alibi,
                ..heads
            }),
            "b.cross_attention.position.kind is \"alibi\", but must be none in cross-attention",
        ),
        (
            BlockSpec {
                wiring: Wiring::Parallel,
                ..with_cross(MultiHeadSpec::new(2))
            },
            "b.wiring is \"parallel\", but must be pre-norm or post-norm in a block with cross-attention",
        ),
        (
            BlockSpec {
                wiring: Wiring::PostNorm,
                shortcuts: true,
                ..with_heads(MultiHeadSpec::new(2))
            },
            "b.shortcuts is true, but must be false in a post-norm, replacing or reversed block, whose parts \
             change what the residual carries",
        ),
        (
            BlockSpec {
                wiring: Wiring::Reversed,
                ..with_cross(MultiHeadSpec::new(2))
            },
            "b.wiring is \"reversed\", but must be pre-norm or post-norm in a block with cross-attention",
        ),
        (
            BlockSpec {
                shortcuts: true,
                ..with_cross(MultiHeadSpec::new(2))
            },
            "b.shortcuts is true, but must be false in a block with cross-attention",
        ),
        (
            BlockSpec {
                feedforward: dense(ActivationSpec::Gelu, true),
                ..block(Wiring::PostNorm, LAYER, MixerSpec::Absent)
            },
            "b.attention.kind is \"absent\", but must be a mixer in a post-norm block, whose norm follows it",
        ),
        (
            block(Wiring::PreNorm, LAYER, MixerSpec::Absent),
            "b.attention.kind is \"absent\", but must be a mixer in a block without any other part",
        ),
        (
            block(
                Wiring::PreNorm,
                LAYER,
                MixerSpec::Wavelet(WaveletSpec::new(MixerSpec::MultiHead(MultiHeadSpec {
                    causal: true,
                    ..MultiHeadSpec::new(2)
                }))),
            ),
            "b.attention.inner.causal is true, but must be false: every coefficient is made of later \
             tokens too",
        ),
        (
            block(
                Wiring::PreNorm,
                LAYER,
                MixerSpec::Wavelet(WaveletSpec {
                    taps: 5,
                    ..WaveletSpec::new(MixerSpec::MultiHead(MultiHeadSpec::new(2)))
                }),
            ),
            "b.attention.taps is 5, but must be an even number of taps, or an adaptive lifting",
        ),
        (
            BlockSpec {
                repeat: 0,
                ..with_heads(MultiHeadSpec::new(2))
            },
            "b.repeat is 0, but must be between 1 and 4096",
        ),
        (
            BlockSpec {
                dropout: -0.1,
                ..with_heads(MultiHeadSpec::new(2))
            },
            "b.dropout is -0.1, but must be at least 0 and below 1",
        ),
    ];
    for (spec, message) in refused {
        assert_eq!(spec.validate(WIDTH, "b").unwrap_err().to_string(), message);
    }
    let unknown = r#"{"attention": {"kind": "multi-head", "heads": 2, "head": 3}}"#;
    let error = serde_json::from_str::<BlockSpec>(unknown).unwrap_err();
    assert!(
        error.to_string().contains("unknown field `head`"),
        "{error}"
    );
}
