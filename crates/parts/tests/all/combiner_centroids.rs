//! Combiner's centroids, trained by a pull beside the gradient of what attention gives.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::{Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, mask, spec};
use crate::common::{contracted, difference, random, tensor, values};
use lapidary_kernels::{Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};
use lapidary_parts::state::MixerState;
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};

const CLUSTERS: usize = 3;
const LENGTH: usize = 9;
const PULL: f64 = 0.5;

fn subject(pull: f64) -> Subject {
    let combiner = CombinerSpec {
        pull,
        ..CombinerSpec::new(CombinerForm::Routed { clusters: CLUSTERS })
    };
    Subject::new(spec(MechanismSpec::Combiner(combiner), true), 4)
}

/// The pulls' loss of a run's queries and keys, written out.
fn strayed(run: &Run, keep: &[&[u8]], centroids: &[f64]) -> f64 {
    let unit = |x: &[f64]| -> Vec<f64> {
        let length = (dot(x, x) + 1e-12).sqrt();
        x.iter().map(|x| x / length).collect()
    };
    let (mut sum, mut count) = (0.0, 0.0);
    for (b, keep) in keep.iter().enumerate() {
        for token in (0..LENGTH).filter(|token| keep[*token] == 1) {
            for head in 0..HEADS {
                let own = &centroids[head * CLUSTERS * HEAD_WIDTH..];
                let own: Vec<Vec<f64>> = own.chunks(HEAD_WIDTH).take(CLUSTERS).map(unit).collect();
                for x in [run.query(b, head, token), run.key(b, head, token)] {
                    let x = unit(x);
                    let likeness = own.iter().map(|centroid| dot(&x, centroid));
                    sum += 1.0 - likeness.fold(f64::NEG_INFINITY, f64::max);
                }
            }
            count += 2.0;
        }
    }
    sum / count
}

/// Attention whose centroids and queries' weights are variables.
fn trained(pull: f64) -> (Subject, Var, Var) {
    let mut subject = subject(pull);
    let variable = |subject: &mut Subject, name: &str| {
        let variable = Var::from_tensor(&subject.map[name]).unwrap();
        let tensor = variable.as_tensor().clone();
        subject.map.insert(name.to_owned(), tensor);
        variable
    };
    let centroids = variable(&mut subject, "mechanism.centroids");
    let queries = variable(&mut subject, "query.weight");
    (subject, centroids, queries)
}

#[test]
fn centroids_have_the_gradient_of_what_strays_from_them() {
    let x = random(&[2, LENGTH, WIDTH], 1);
    let all = [&[1u8; LENGTH][..]; 2];
    let some = [&[1, 1, 1, 1, 1, 1, 0, 0, 0][..], &[1u8; LENGTH][..]];
    for keep in [None, Some(some)] {
        let padding = keep.map(|keep| mask(&keep));
        let given = || Given {
            keep: padding.as_ref(),
            ..Given::default()
        };
        let (subject, centroids, queries) = trained(PULL);
        let y = subject.output(&x, given());
        let store = contracted(&y).backward().unwrap();
        let found = values(store.get(centroids.as_tensor()).unwrap());

        let run = subject.run(&x, given());
        let here = values(centroids.as_tensor());
        let loss = |centroids: &[f64]| PULL * strayed(&run, &keep.unwrap_or(all), centroids);
        for (at, found) in found.iter().enumerate() {
            let moved = |by: f64| {
                let mut moved = here.clone();
                moved[at] += by;
                loss(&moved)
            };
            let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            assert!((found - slope).abs() < 1e-7, "{found} {slope}");
        }

        // Nothing else hears of it.
        let (alone, fixed, others) = trained(0.0);
        let without = alone.output(&x, given());
        assert!(difference(&y, &without) < 1e-14);
        let plain = contracted(&without).backward().unwrap();
        assert!(plain.get(fixed.as_tensor()).is_none());
        let [a, b] = [(&store, &queries), (&plain, &others)]
            .map(|(store, of)| store.get(of.as_tensor()).unwrap().clone());
        assert!(difference(&a, &b) < 1e-12);
    }
}

#[test]
fn centroids_come_nearer_to_their_tokens() {
    let x = random(&[2, LENGTH, WIDTH], 1);
    let (subject, centroids, _) = trained(1.0);
    let run = subject.run(&x, Given::default());
    let all = [&[1u8; LENGTH][..]; 2];
    let far = |centroids: &Var| strayed(&run, &all, &values(centroids.as_tensor()));
    let before = far(&centroids);
    for _ in 0..30 {
        let y = subject.output(&x, Given::default());
        let store = contracted(&y).backward().unwrap();
        let slope = values(store.get(centroids.as_tensor()).unwrap());
        let moved = values(centroids.as_tensor()).into_iter().zip(slope);
        let moved: Vec<f64> = moved.map(|(x, slope)| x - 0.5 * slope).collect();
        let moved: Tensor = tensor(moved, &[HEADS, CLUSTERS, HEAD_WIDTH]);
        centroids.set(&moved).unwrap();
    }
    let after = far(&centroids);
    assert!(after < before - 1e-3, "{before} {after}");
}

#[test]
fn a_pull_without_centroids_is_refused() {
    let said = |form, pull| {
        let combiner = CombinerSpec {
            pull,
            ..CombinerSpec::new(form)
        };
        let attention = spec(MechanismSpec::Combiner(combiner), true);
        attention
            .validate(WIDTH, "attention")
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        said(CombinerForm::LogSparse, 0.5),
        "attention.mechanism.pull is 0.5, but must be 0 in a form without centroids"
    );
    assert_eq!(
        said(CombinerForm::Routed { clusters: 2 }, -1.0),
        "attention.mechanism.pull is -1.0, but must be a number of at least 0"
    );
}

/// With one cluster a step meets one key more than the step before it; what is looked at to find clusters, the new
/// query and key, is as much in each.
#[test]
fn a_step_finds_the_cluster_of_what_is_new_alone() {
    let combiner = CombinerSpec::new(CombinerForm::Routed { clusters: 1 });
    let subject = Subject::new(spec(MechanismSpec::Combiner(combiner), true), 4);
    let attention = subject.attention();
    let (trace, mut state) = (Trace::new(), MixerState::Empty);
    let mut steps = Vec::new();
    for offset in 0..7 {
        let meter = Meter::new();
        let x = Signal::from(random(&[1, 1, WIDTH], offset as u64));
        let cx = Context {
            offset,
            ..Context::new(&trace)
        };
        let x = x.into_metered(meter.clone());
        attention.forward(&x, &cx, Some(&mut state)).unwrap();
        steps.push(meter.total().flops);
    }
    let pair = (HEADS * (4 * HEAD_WIDTH + 5)) as u64;
    for (before, after) in steps.iter().zip(&steps[1..]).skip(1) {
        assert_eq!(after - before, pair, "{steps:?}");
    }
}
