//! Specs that ask for the impossible are refused, and no spec makes the program panic or allocate
//! what it has no right to.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod strategies;

use std::alloc::System;

use lapidary_kernels::memory::{Counting, largest_piece};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{
    AbsolutePosition, HeadSpec, HeadTransform, InitialValues, Input, InputSpec, Model, ModelSpec,
    Pass, PatchInput, PatchNorms, PatchPosition, Pool, Projected, TokenInput,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::wavelet::{Base, Boundary, Family, WaveletSpec};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, QueryKeyNorm};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec, GatedSpec, LinearSpec, MixtureSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::fit::{FitOutput, FitSpec, GroupPositions, LatentPositions};
use lapidary_parts::organisation::reversible::{Joined, ReversibleSpec};
use lapidary_parts::organisation::vcc::{VccOutput, VccSpec};
use lapidary_parts::position::{KeptPairs, PositionSpec, RotaryScaling, RotarySpec};
use lapidary_parts::recurrent::{Mamba2Spec, MambaSpec};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use strategies::spec;

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

/// Models above this are not built by these tests.
const PARAMETERS: u64 = 1 << 18;
/// No piece of memory is larger: the parameters in `f64`, with room for what is computed.
const BYTES: usize = 16 << 20;

/// Two sequences that the model takes, as long as it can but no longer than four tokens.
fn something_to_read(spec: &ModelSpec) -> Input {
    match &spec.input {
        InputSpec::Tokens(tokens) => {
            let length = tokens.length.min(4);
            Input::tokens(Tensor::zeros((2, length), DType::U32, &Device::Cpu).unwrap())
        }
        InputSpec::Patches(patches) => {
            let [height, width] = patches.image;
            let shape = (2, patches.channels, height, width);
            Input::Pixels(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap())
        }
    }
}

/// What a spec comes to: refused, too large for this test, or run.
#[derive(Debug, PartialEq)]
enum Outcome {
    Refused,
    Large,
    Ran,
}

fn outcome(spec: &ModelSpec) -> Outcome {
    // Whether valid or not, these must not fail.
    let _ = (spec.length(), spec.vocabulary(), spec.is_causal());
    if spec.validate().is_err() {
        return Outcome::Refused;
    }
    let pixels = match &spec.input {
        InputSpec::Patches(patches) => patches.image[0] * patches.image[1] * patches.channels,
        InputSpec::Tokens(_) => 0,
    };
    if spec.parameter_count().unwrap() > PARAMETERS || pixels as u64 > PARAMETERS {
        return Outcome::Large;
    }
    let Ok(model) = Model::initialised(spec.clone(), 1, DType::F32, &Device::Cpu) else {
        // A rank is compared with its layer, and layers are known when the model is built.
        assert!(!spec.low_rank.is_empty(), "valid, but not built: {spec:?}");
        return Outcome::Refused;
    };
    if spec.low_rank.is_empty() {
        assert_eq!(
            model.parameter_count() as u64,
            spec.parameter_count().unwrap()
        );
    }
    let run = model.forward(&something_to_read(spec), Pass::default());
    // DeiT's head wants two tokens.
    let short = matches!(
        &spec.head,
        HeadSpec::Pooled {
            pool: Pool::FirstTwo,
            ..
        }
    );
    assert!(run.is_ok() || short, "{}: {spec:?}", run.unwrap_err());
    Outcome::Ran
}

#[test]
fn no_spec_panics_or_allocates_beyond_its_parameters() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (strategy, mut ran, mut refused) = (spec(), 0, 0);
    for _ in 0..12_000 {
        let spec = strategy.new_tree(&mut runner).unwrap().current();
        let (outcome, largest) = largest_piece(|| std::panic::catch_unwind(|| outcome(&spec)));
        match outcome {
            Ok(outcome) => {
                ran += usize::from(outcome == Outcome::Ran);
                refused += usize::from(outcome == Outcome::Refused);
            }
            Err(_) => panic!("panicked on {spec:?}"),
        }
        let largest = largest.unwrap();
        assert!(largest <= BYTES, "{largest} bytes at once for {spec:?}");
    }
    println!("{ran} ran, {refused} were refused");
    assert!(
        ran > 300 && refused > 300,
        "{ran} ran, {refused} were refused"
    );
}

fn small() -> ModelSpec {
    toml::from_str(
        r#"
width = 8
input = { kind = "tokens", vocabulary = 16, length = 8 }
head = { kind = "language-model" }
[[blocks]]
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 16 }
"#,
    )
    .unwrap()
}

/// The error names the field, what it holds and what would be valid.
fn assert_refused(change: impl FnOnce(&mut ModelSpec), field: &str) {
    let mut spec = small();
    change(&mut spec);
    let message = spec.check_can_be_made().unwrap_err().to_string();
    assert!(
        message.starts_with(field) && message.contains("must be"),
        "{message}"
    );
}

#[test]
fn initial_values_that_mean_nothing_are_refused_by_name() {
    for gain in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let by_depth = true;
        let initial = InitialValues::DepthScaled { gain, by_depth };
        assert_refused(|spec| spec.initial = initial, "initial.gain");
    }
    for wiring in [Wiring::Replacing, Wiring::Reversed] {
        let change = |spec: &mut ModelSpec| {
            spec.initial = InitialValues::depth_scaled();
            spec.blocks[0].wiring = wiring;
        };
        assert_refused(change, "initial.by_depth");
    }
}

/// A head of one vector for a sequence.
fn pooled(pool: Pool) -> HeadSpec {
    HeadSpec::Pooled {
        pool,
        norm: None,
        hidden: None,
        labels: Some(2),
        bias: true,
    }
}

/// What would change nothing, without a word.
#[test]
fn fields_without_effect_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut HeadSpec), pool: Pool, field: &str| {
        let mut head = pooled(pool);
        change(&mut head);
        assert_refused(|spec| spec.head = head, field);
    };
    // Scores of the first two tokens are of these as they are.
    let normed = |head: &mut HeadSpec| {
        if let HeadSpec::Pooled { norm, .. } = head {
            *norm = Some(NormSpec::default());
        }
    };
    refused(&normed, Pool::FirstTwo, "head.norm is \"given\"");
    let deeper = |head: &mut HeadSpec| {
        if let HeadSpec::Pooled { hidden, .. } = head {
            *hidden = Some(ActivationSpec::Gelu);
        }
    };
    refused(&deeper, Pool::FirstTwo, "head.hidden is \"given\"");
    let unscored = |head: &mut HeadSpec| {
        if let HeadSpec::Pooled { labels, bias, .. } = head {
            (*labels, *bias) = (None, false);
        }
    };
    refused(&unscored, Pool::Mean, "head.bias is false");
    // Where no token has the id, the first one stands for the sequence.
    refused(
        &|_| {},
        Pool::AtToken(16),
        "head.pool.at-token is 16, but must be below 16",
    );
    let mut spec = small();
    spec.head = pooled(Pool::AtToken(15));
    assert!(spec.validate().is_ok());
    spec.head = pooled(Pool::First);
    normed(&mut spec.head);
    deeper(&mut spec.head);
    assert!(spec.validate().is_ok());
    let narrowing = |spec: &mut ModelSpec| {
        spec.head = HeadSpec::LanguageModel {
            tied: true,
            bias: false,
            transform: Some(HeadTransform {
                activation: ActivationSpec::Gelu,
                norm: NormSpec::default(),
                narrows: true,
            }),
        };
    };
    assert_refused(narrowing, "head.transform.narrows is true");
    let mut spec = small();
    narrowing(&mut spec);
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        tokens.embedding_width = Some(4);
    }
    assert!(spec.validate().is_ok());
    assert_refused(
        |spec| spec.blocks[0].dropout_by_feature = true,
        "blocks.0.dropout_by_feature is true",
    );
    let dropping = |spec: &mut ModelSpec| {
        if let InputSpec::Tokens(tokens) = &mut spec.input {
            tokens.dropout_by_feature = true;
        }
    };
    assert_refused(dropping, "input.dropout_by_feature is true");
    // Nothing that is drawn would have this deviation.
    let patches = |class_tokens: usize| {
        let text = format!(
            "width = 8
            input = {{ kind = 'patches', image = [4, 4], patch = 2, class_tokens = {class_tokens}, deviation = 1.0, position = 'sine-cosine' }}
            blocks = []"
        );
        toml::from_str::<ModelSpec>(&text).unwrap().validate()
    };
    assert!(patches(1).is_ok());
    let said = patches(0).unwrap_err().to_string();
    assert!(said.starts_with("input.deviation is 1"), "{said}");
}

#[test]
fn sums_beyond_all_bounds_are_refused_by_name() {
    let block = |repeat| BlockSpec {
        repeat,
        ..small().blocks[0].clone()
    };
    assert_refused(
        |spec| spec.blocks = vec![block(usize::MAX), block(usize::MAX)],
        "blocks",
    );
    assert_refused(
        |spec| spec.blocks = vec![block(4_000), block(4_000)],
        "blocks",
    );
    let experts = FeedforwardSpec::Mixture(MixtureSpec {
        hidden: 1,
        experts: 4_096,
        active: 1,
        activation: ActivationSpec::Silu,
        normalise: true,
    });
    assert_refused(
        |spec| {
            spec.blocks = vec![BlockSpec {
                feedforward: Some(experts),
                ..block(100)
            }];
        },
        "number of linear layers",
    );
    assert_refused(
        |spec| {
            spec.width = 1 << 17;
            spec.input = InputSpec::Tokens(TokenInput {
                vocabulary: 1 << 24,
                length: 8,
                position: AbsolutePosition::None,
                token_types: 0,
                norm: None,
                embedding_width: None,
                projected: Default::default(),
                dropout: 0.0,
                dropout_by_feature: false,
            });
        },
        "number of parameters",
    );
    assert_refused(
        |spec| {
            spec.head = HeadSpec::Pooled {
                pool: Pool::First,
                norm: None,
                hidden: None,
                labels: Some(usize::MAX),
                bias: true,
            };
        },
        "head.labels",
    );
    assert_refused(
        |spec| {
            spec.head = HeadSpec::LanguageModel {
                tied: true,
                bias: false,
                transform: Some(HeadTransform {
                    activation: ActivationSpec::Gelu,
                    norm: NormSpec::Layer { epsilon: f64::NAN },
                    narrows: false,
                }),
            };
        },
        "head.transform.norm.epsilon",
    );
}
