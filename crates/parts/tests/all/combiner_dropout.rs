//! Combiner with dropout: weights of keys that are met directly are zeroed or raised, those of spans left alone.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::combiner::divisions;
use crate::common::attention::{Given, HEADS, Run, Subject, WIDTH, spec};
use crate::common::{assert_near, contracted, gradient_error, random};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};

const DROPPED: f64 = 0.3;

fn subject(form: CombinerForm, causal: bool) -> Subject {
    let mechanism = MechanismSpec::Combiner(CombinerSpec {
        log_count: true,
        dropout: DROPPED,
        ..CombinerSpec::new(form)
    });
    Subject::new(spec(mechanism, causal), 4)
}

fn forms() -> Vec<(CombinerForm, bool)> {
    let columns = 3;
    vec![
        (CombinerForm::Fixed { segment: 4 }, true),
        (CombinerForm::Fixed { segment: 4 }, false),
        (CombinerForm::LogSparse, true),
        (CombinerForm::LogSparse, false),
        (CombinerForm::Vertical { columns }, true),
        (CombinerForm::Horizontal { columns }, true),
        (CombinerForm::RowMajor { columns }, true),
        (
            CombinerForm::Mixture {
                columns,
                joint: false,
            },
            true,
        ),
        (
            CombinerForm::Mixture {
                columns,
                joint: true,
            },
            true,
        ),
    ]
}

fn training(seed: u64) -> Given<'static> {
    Given {
        dropout_seed: Some(seed),
        ..Given::default()
    }
}

/// Asserts that values were mixed by the weights that are laid out.
fn check_output(run: &Run, what: &str) {
    let row = |b: usize, head: usize, i: usize| -> Vec<f64> {
        let row = (0..run.length).map(|j| run.weight(b, head, i, j));
        row.collect()
    };
    run.check(2, row, 1e-11, what);
}

/// The keys that a token meets directly: of doubling spans those of one token too.
fn direct(form: CombinerForm, causal: bool, length: usize, i: usize) -> Vec<usize> {
    let mut met = Vec::new();
    for (direct, spans) in divisions(form, causal, length, i) {
        met.extend(direct);
        if form == CombinerForm::LogSparse {
            let single = spans.into_iter().filter(|(span, _)| span.len() == 1);
            met.extend(single.flat_map(|(span, _)| span));
        }
    }
    met
}

#[test]
fn weights_of_direct_keys_are_dropped_or_raised_and_those_of_spans_stay() {
    let length = 13;
    let x = random(&[2, length, WIDTH], 1);
    for (form, causal) in forms() {
        let subject = subject(form, causal);
        let whole = subject.run(&x, Given::default());
        let (mut zeros, mut all) = (0u32, 0u32);
        for seed in 0..20 {
            let run = subject.run(&x, training(seed));
            check_output(&run, &format!("{form:?} causal {causal}"));
            for (b, head) in (0..2).flat_map(|b| (0..HEADS).map(move |head| (b, head))) {
                for i in 0..length {
                    let met = direct(form, causal, length, i);
                    for j in 0..length {
                        let weight = |run: &Run| run.weight(b, head, i, j);
                        let (found, before) = (weight(&run), weight(&whole));
                        let expected = match met.contains(&j) {
                            false => before,
                            true if found == 0.0 => 0.0,
                            true => before / (1.0 - DROPPED),
                        };
                        let apart = (found - expected).abs();
                        assert!(
                            apart < 1e-12,
                            "{form:?}: {i} gives {j} {found}, not {expected}"
                        );
                        if met.contains(&j) {
                            all += 1;
                            zeros += u32::from(found == 0.0);
                        }
                    }
                }
            }
        }
        // Five deviations of a binomial count.
        let count = f64::from(all);
        let off = (f64::from(zeros) - DROPPED * count).abs();
        let most = 5.0 * (count * DROPPED * (1.0 - DROPPED)).sqrt();
        assert!(off < most, "{form:?}: {zeros} of {all}");
    }
}

#[test]
fn evaluation_drops_nothing_and_a_seed_says_the_mask() {
    let x = random(&[1, 13, WIDTH], 1);
    for (form, causal) in forms() {
        let dropping = subject(form, causal);
        let plain = MechanismSpec::Combiner(CombinerSpec {
            log_count: true,
            ..CombinerSpec::new(form)
        });
        let plain = Subject::new(spec(plain, causal), 4);
        let what = format!("{form:?} causal {causal}");
        let evaluated = dropping.output(&x, Given::default());
        assert_near(
            &evaluated,
            &plain.output(&x, Given::default()),
            1e-12,
            &what,
        );
        let once = dropping.output(&x, training(7));
        assert_near(&once, &dropping.output(&x, training(7)), 0.0, &what);
        let other = dropping.output(&x, training(8));
        assert!(crate::common::difference(&once, &other) > 1e-6, "{what}");
    }
}

/// Clusters decide who meets whom directly; padded queries meet nobody.
#[test]
fn clusters_and_pads() {
    let (length, routed) = (12, CombinerForm::Routed { clusters: 3 });
    let x = random(&[2, length, WIDTH], 1);
    let subject = subject(routed, true);
    let whole = subject.run(&x, Given::default());
    let run = subject.run(&x, training(3));
    check_output(&run, "routed");
    let mut zeros = 0u32;
    for (found, before) in run.weights.iter().zip(&whole.weights) {
        let raised = before / (1.0 - DROPPED);
        let near = [*before, 0.0, raised]
            .iter()
            .any(|to| (found - to).abs() < 1e-12);
        assert!(near, "{found} of {before}");
        zeros += u32::from(*found == 0.0 && *before > 0.0);
    }
    assert!(zeros > 0);
    let keep: Vec<u8> = (0..2 * length).map(|j| u8::from(j % length < 9)).collect();
    let keep = Tensor::from_vec(keep, (2, length), x.device()).unwrap();
    for (form, causal) in forms() {
        let given = Given {
            keep: Some(&keep),
            ..training(3)
        };
        let y = self::subject(form, causal).output(&x, given);
        assert!(crate::common::is_finite(&y), "{form:?}");
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 9, WIDTH], 1);
    for (form, causal) in forms() {
        let subject = subject(form, causal);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 2, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], training(5)))
        });
        assert!(error < 1e-6, "{form:?}: {error:e}");
    }
}

#[test]
fn probabilities_that_mean_nothing_are_refused() {
    for dropout in [1.0, -0.1, f64::NAN] {
        let mechanism = MechanismSpec::Combiner(CombinerSpec {
            dropout,
            ..CombinerSpec::new(CombinerForm::LogSparse)
        });
        let said = spec(mechanism, true).validate(WIDTH, "b").unwrap_err();
        let said = said.to_string();
        assert!(said.starts_with("b.mechanism.dropout is"), "{said}");
    }
    let plain = CombinerSpec::new(CombinerForm::LogSparse);
    assert!(!toml::to_string(&plain).unwrap().contains("dropout"));
}
