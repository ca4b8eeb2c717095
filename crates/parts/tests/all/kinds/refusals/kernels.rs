//! Mechanisms whose weights are not a softmax of scores, or not of all of them.

use super::*;

#[test]
fn impossible_topological_attention_is_refused() {
    let on_a_tree = |spec: TopologicalSpec| through(MechanismSpec::Topological(spec));
    assert_refused([
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
                graph: Some(GraphSpec::new(3, vec![(0, 1, 1e150), (1, 2, 1e150)])),
                metric: Metric::RandomTrees { count: 1, seed: 0 },
                ..TopologicalSpec::default()
            })),
            "sum of lengths in b.attention.mechanism.graph.edges is 2e150, but must be at most 1e150",
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
    ]);
}

#[test]
fn impossible_doubly_stochastic_attention_is_refused() {
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
    assert_refused([
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
    ]);
}

#[test]
fn impossible_subsampled_attention_is_refused() {
    let subsampled = |spec: SubsampledSpec| through(MechanismSpec::Subsampled(spec));
    assert_refused([
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
    ]);
}
