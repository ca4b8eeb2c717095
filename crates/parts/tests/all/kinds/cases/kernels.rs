//! Weights that are not a softmax of scores, or not of all of them.

use super::*;

/// Blocks whose weights sum to one along columns too.
pub(super) fn doubly_stochastic() -> Vec<(&'static str, MultiHeadSpec)> {
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

/// Vertices of a ring, more than tokens.
const RING: usize = 8;

/// Sums under a function of the distance in a tree.
pub(super) fn topological() -> Vec<(&'static str, MultiHeadSpec)> {
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
        (
            "squares along the shortest paths of a ring",
            of(TopologicalSpec {
                graph: Some(GraphSpec::new(
                    RING,
                    (0..RING).map(|v| (v, (v + 1) % RING, 1.0)).collect(),
                )),
                metric: Metric::ShortestPaths,
                ..on(None, FeatureMap::Square, Mask::Exponential)
            }),
        ),
    ]
}

/// Blocks that would draw their keys; what is not drawn is dense.
pub(super) fn subsampled() -> Vec<(&'static str, MultiHeadSpec)> {
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
pub(super) fn approximate() -> Vec<(&'static str, MultiHeadSpec)> {
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
