//! How the parts of a block stand together.

use super::*;

#[test]
fn impossible_blocks_are_refused() {
    assert_refused([
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
            BlockSpec {
                coding_step: Some(CodingStep {
                    kappa: 0.0,
                    epsilon: 1.0,
                }),
                wiring: Wiring::Replacing,
                ..with_heads(MultiHeadSpec {
                    sharing: QueryKeySharing::All,
                    ..MultiHeadSpec::new(2)
                })
            },
            "b.coding_step.kappa is 0.0, but must be a number above 0",
        ),
        (
            BlockSpec {
                coding_step: Some(CodingStep {
                    kappa: 0.1,
                    epsilon: f64::NAN,
                }),
                wiring: Wiring::Replacing,
                ..with_heads(MultiHeadSpec {
                    sharing: QueryKeySharing::All,
                    ..MultiHeadSpec::new(2)
                })
            },
            "b.coding_step.epsilon is NaN, but must be a number above 0",
        ),
        (
            BlockSpec {
                coding_step: Some(CodingStep {
                    kappa: 0.1,
                    epsilon: 1.0,
                }),
                wiring: Wiring::PreNorm,
                ..with_heads(MultiHeadSpec {
                    sharing: QueryKeySharing::All,
                    ..MultiHeadSpec::new(2)
                })
            },
            "b.coding_step is \"given\", but must be absent in a block whose wiring is another than replacing",
        ),
        (
            BlockSpec {
                coding_step: Some(CodingStep {
                    kappa: 0.1,
                    epsilon: 1.0,
                }),
                wiring: Wiring::Replacing,
                ..with_heads(MultiHeadSpec {
                    ..MultiHeadSpec::new(2)
                })
            },
            "b.coding_step is \"given\", but must be absent beside another attention than softmax with sharing = \"all\", \
             whose heads are subspaces",
        ),
        (
            BlockSpec {
                coding_step: Some(CodingStep {
                    kappa: 0.1,
                    epsilon: 1.0,
                }),
                wiring: Wiring::Replacing,
                ..with_heads(MultiHeadSpec {
                    sharing: QueryKeySharing::All,
                    causal: true,
                    ..MultiHeadSpec::new(2)
                })
            },
            "b.coding_step is \"given\", but must be absent in causal attention or under a window: the rate is of all tokens \
             of a sequence together",
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
    ]);
}
