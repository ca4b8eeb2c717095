//! Keys and values that several heads share: what each head does is what it does with the same ones of its own.
//! With two groups of two heads, so that it shows which heads share.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::{Given, Subject, WIDTH, mask, spec};
use crate::common::{assert_near, difference, random};
use crate::long_sequences::{bidirectional, causal};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::doubly_stochastic::{
    DoublyStochasticSpec, Operator, SinkhornForm,
};
use lapidary_parts::attention::mechanism::linformer::LinformerSpec;
use lapidary_parts::attention::mechanism::subsampled::SubsampledSpec;
use lapidary_parts::position::PositionSpec;

const LENGTH: usize = 20;
const HEADS: usize = 4;
const GROUPS: usize = 2;
const EACH: usize = 3;

fn with_groups(mechanism: &MechanismSpec, causal: bool, groups: usize) -> MultiHeadSpec {
    MultiHeadSpec {
        heads: HEADS,
        groups: Some(groups),
        head_width: Some(EACH),
        ..spec(mechanism.clone(), causal)
    }
}

/// Attention whose heads share keys and values in twos, and the same with copies of them for each head.
fn pair(of: impl Fn(usize) -> MultiHeadSpec) -> [Subject; 2] {
    let grouped = Subject::new(of(GROUPS), 4);
    let rows = (0..(HEADS * EACH) as u32).map(|row| {
        let (head, feature) = (row / EACH as u32, row % EACH as u32);
        head / (HEADS / GROUPS) as u32 * EACH as u32 + feature
    });
    let rows = Tensor::new(rows.collect::<Vec<u32>>().as_slice(), &Device::Cpu).unwrap();
    let mut map = grouped.map.clone();
    for name in ["key.weight", "key.bias", "value.weight", "value.bias"] {
        assert_eq!(map[name].dims()[0], GROUPS * EACH, "{name}");
        let copied = map[name].index_select(&rows, 0).unwrap();
        map.insert(name.to_owned(), copied);
    }
    let apart = Subject {
        spec: of(HEADS),
        map,
    };
    [grouped, apart]
}

/// Those whose queries are not keys too, which have none to share.
fn shareable(mechanisms: Vec<MechanismSpec>) -> Vec<MechanismSpec> {
    let shares = |of: &MechanismSpec| {
        !matches!(
            of,
            MechanismSpec::Ecoformer(_) | MechanismSpec::Reformer(_) | MechanismSpec::Soft(_)
        )
    };
    mechanisms.into_iter().filter(shares).collect()
}

#[test]
fn shared_keys_are_copies_of_them() {
    let sinkhorn = DoublyStochasticSpec {
        operator: Operator::Sinkhorn {
            iterations: 3,
            form: SinkhornForm::Log,
            epsilon: 1.0,
        },
    };
    let more = [
        MechanismSpec::DoublyStochastic(sinkhorn),
        MechanismSpec::Linformer(LinformerSpec::new(4, LENGTH)),
        MechanismSpec::Subsampled(SubsampledSpec {
            keep: 0.5,
            ..SubsampledSpec::default()
        }),
    ];
    let past = shareable(causal()).into_iter().map(|of| (of, true));
    let both = shareable(bidirectional()).into_iter().chain(more);
    let x = random(&[2, LENGTH, WIDTH], 1);
    let keep = mask(&[&[[1; 13].as_slice(), &[0; 7]].concat(), &[1; LENGTH]]);
    for (mechanism, causal) in past.chain(both.map(|of| (of, false))) {
        let [grouped, apart] = pair(|groups| with_groups(&mechanism, causal, groups));
        for keep in [None, Some(&keep)] {
            let given = Given {
                keep,
                draw: Some(3),
                ..Given::default()
            };
            let [found, expected] = [&grouped, &apart].map(|of| of.output(&x, given));
            // What stands at pads means nothing.
            let real = |y: &Tensor| {
                let first = y.narrow(0, 0, 1).unwrap().narrow(1, 0, 13).unwrap();
                let second = y.narrow(0, 1, 1).unwrap();
                Tensor::cat(&[first, second], 1).unwrap()
            };
            let what = format!("{mechanism:?} causal {causal}");
            assert_near(&real(&found), &real(&expected), 1e-10, &what);
        }
    }
}

#[test]
fn shared_keys_are_decoded_as_copies_of_them() {
    let x = random(&[2, LENGTH, WIDTH], 2);
    for mechanism in shareable(causal()) {
        let [grouped, apart] = pair(|groups| with_groups(&mechanism, true, groups));
        let whole = apart.output(&x, Given::default());
        for steps in [&[1; LENGTH][..], &[7, 1, 12]] {
            let stepped = grouped.decode(&x, steps);
            assert_near(&stepped, &whole, 1e-9, &format!("{mechanism:?}"));
        }
    }
}

/// Biases of positions are those of heads, not of groups.
#[test]
fn heads_that_share_keys_have_positions_of_their_own() {
    let x = random(&[2, LENGTH, WIDTH], 3);
    for position in [PositionSpec::Alibi, PositionSpec::KerpleLogarithmic] {
        let of = |groups: usize| MultiHeadSpec {
            position: position.clone(),
            ..with_groups(&MechanismSpec::Softmax, true, groups)
        };
        let [grouped, apart] = pair(of);
        let [found, expected] = [&grouped, &apart].map(|of| of.output(&x, Given::default()));
        assert_near(&found, &expected, 1e-12, position.kind());
        let [without, _] = pair(|groups| with_groups(&MechanismSpec::Softmax, true, groups));
        let without = Subject {
            map: grouped
                .map
                .iter()
                .filter(|(name, _)| !name.starts_with("position"))
                .map(|(name, x)| (name.clone(), x.clone()))
                .collect(),
            ..without
        };
        assert!(difference(&without.output(&x, Given::default()), &found) > 1e-4);
    }
}
