use super::*;
use crate::Trace;
use crate::streams::{Partition, StreamRules};

/// A model of two sites, `a.in` and `a.out`, around a square.
fn run(trace: &Trace, x: Signal) -> crate::Result<Signal> {
    let x = trace.site(format_args!("a.in"), x)?;
    trace.site(format_args!("a.out"), x.gate(&x)?)
}

#[test]
fn rules_act_in_the_order_in_which_they_were_declared() {
    let x = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
    let trace = Trace::new()
        .replace("a.in", |_, x| x.scale(2.0))
        .unwrap()
        .replace("a.*", |name, x| {
            assert!(name.starts_with("a."));
            x.add_constant(&Tensor::new(&[1f64], &Device::Cpu).unwrap())
        })
        .unwrap()
        .capture("*")
        .unwrap();
    let y = run(&trace, Signal::from(x)).unwrap();
    // (2 x + 1)² + 1
    assert_eq!(values(y.value()), [10.0, 26.0]);
    // What is kept is what is written after every replacement, wherever the capture stands.
    assert_eq!(values(trace.signal("a.in").unwrap().value()), [3.0, 5.0]);
    assert_eq!(values(trace.signal("a.out").unwrap().value()), [10.0, 26.0]);
    assert_eq!(trace.names(), ["a.in", "a.out"]);
}

#[test]
fn globs_choose_sites_by_name() {
    let trace = Trace::new().capture("a.{in,mixed}").unwrap();
    run(&trace, Signal::from(input())).unwrap();
    let kept: Vec<String> = trace.records().into_keys().collect();
    assert_eq!(kept, ["a.in"]);
    assert!(trace.wants(format_args!("a.mixed")));
    assert!(!trace.wants(format_args!("a.out")));
    assert!(!Trace::new().wants(format_args!("a.in")));
    let error = Trace::new().capture("a.{in").unwrap_err().to_string();
    assert!(error.contains("not a valid glob"), "{error}");
}

#[test]
fn a_tapped_site_gives_its_gradient() {
    let trace = Trace::new().tap("a.in").unwrap();
    let x = numbers(&[4], 0.0);
    let y = run(&trace, Signal::from(x.clone())).unwrap();
    assert_close(y.value(), &x.sqr().unwrap(), 0.0, "a tap changes no value");
    let gradients = y.value().sum_all().unwrap().backward().unwrap();
    let found = values(&trace.record("a.in").unwrap().gradient(&gradients).unwrap());
    for (i, found) in found.iter().enumerate() {
        let at = |delta: f64| {
            let mut moved = values(&x);
            moved[i] += delta;
            let moved = Tensor::from_vec(moved, 4, &Device::Cpu).unwrap();
            let y = run(&Trace::new(), Signal::from(moved)).unwrap();
            values(y.value()).iter().sum::<f64>()
        };
        assert!((found - (at(1e-5) - at(-1e-5)) / 2e-5).abs() < 1e-8);
    }
    let relevance = trace.record("a.in").unwrap().relevance(&gradients).unwrap();
    assert_close(
        &relevance,
        &(x.sqr().unwrap() * 2.0).unwrap(),
        1e-12,
        "value times gradient",
    );
}

#[test]
fn a_gradient_that_is_not_there_is_an_error() {
    let trace = Trace::new().capture("a.in").unwrap().tap("a.out").unwrap();
    let y = run(&trace, Signal::from(input())).unwrap();
    let gradients = y.value().sum_all().unwrap().backward().unwrap();
    let error = trace
        .record("a.in")
        .unwrap()
        .gradient(&gradients)
        .unwrap_err()
        .to_string();
    assert!(error.contains("not tapped"), "{error}");
    // Another result does not depend on the site.
    let other = lapidary_kernels::Var::from_tensor(&input()).unwrap();
    let elsewhere = other.as_tensor().sum_all().unwrap().backward().unwrap();
    let error = trace
        .record("a.out")
        .unwrap()
        .gradient(&elsewhere)
        .unwrap_err()
        .to_string();
    assert!(error.contains("must depend on the site"), "{error}");
}

#[test]
fn a_missing_site_is_named_beside_those_that_exist() {
    let trace = Trace::new().capture("a.in").unwrap();
    run(&trace, Signal::from(input())).unwrap();
    let error = trace.signal("b.in").unwrap_err().to_string();
    assert_eq!(
        error,
        "no site matches \"b.in\"; the model wrote 2 sites from a.in to a.out"
    );
    let error = trace.signal("a.out").unwrap_err().to_string();
    assert!(
        error.contains("a.out is \"written but not kept\""),
        "{error}"
    );
}

#[test]
fn conservation_is_followed_where_streams_flow() {
    let trace = Trace::new()
        .replace("a.in", |_, x| {
            x.into_streams(Partition::positions(TOKENS), StreamRules::default())
        })
        .unwrap()
        .follow_conservation();
    run(&trace, Signal::from(input())).unwrap();
    let errors = trace.conservation();
    assert_eq!(errors.keys().collect::<Vec<_>>(), ["a.in", "a.out"]);
    assert!(errors.values().all(|error| *error < 1e-12));
    // Without streams there is nothing to conserve.
    let trace = Trace::new().follow_conservation();
    run(&trace, Signal::from(input())).unwrap();
    assert!(trace.conservation().is_empty());
}
