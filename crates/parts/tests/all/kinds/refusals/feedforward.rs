//! Feed-forward parts.

use super::*;

#[test]
fn impossible_feedforward_parts_are_refused() {
    let with_feedforward = |part: Option<FeedforwardSpec>| BlockSpec {
        feedforward: part,
        ..with_heads(MultiHeadSpec::new(2))
    };
    assert_refused([
        (
            with_feedforward(Some(FeedforwardSpec::SparseCode(SparseCodeSpec {
                step: -1.0,
                ..SparseCodeSpec::default()
            }))),
            "b.feedforward.step is -1.0, but must be a number of at least 0",
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
    ]);
}
