//! Parameters, pairs and operations.

use super::{BATCH, Given, LATENT, Subject, WIDTH, spec, tokens};
use crate::common::random;
use lapidary_kernels::Tensor;
use lapidary_parts::organisation::fit::FitSpec;
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};

#[test]
fn parameters_and_pairs_are_those_of_the_formulas() {
    let subject = Subject::new(spec("(2)1(1)2(1)", 5, false), false);
    let found: usize = subject.map.values().map(Tensor::elem_count).sum();
    let encoder = |width: usize, hidden: usize| {
        4 * (width * width + width) + 2 * width * hidden + hidden + width + 4 * width
    };
    // Query and output of the reader's width, key and value of the memory's, all to or from 4; two
    // norms.
    let exchange = |width: usize, memory: usize| {
        2 * (4 * width + 4 * memory) + (4 + width + 4 + 4) + 2 * width + 2 * memory
    };
    let expected = 4 * encoder(WIDTH, 12)
        + 3 * encoder(LATENT, 8)
        + 2 * exchange(LATENT, WIDTH)
        + 2 * exchange(WIDTH, LATENT)
        + 4 * WIDTH
        + 10 * LATENT
        + 2 * LATENT;
    assert_eq!(found, expected);

    let meter = Meter::new();
    let x = Signal::from(tokens(20)).into_metered(meter.clone());
    let trace = Trace::new();
    subject
        .signal(&subject.map, x, Given::default(), &trace)
        .unwrap();
    let mixed: u64 = meter
        .sites()
        .iter()
        .filter(|(site, _)| site.ends_with(".mixed"))
        .map(|(site, cost)| {
            // Heads of width 2 everywhere: 4 of them on tokens, 2 on latents and between.
            let heads = if site.starts_with("blocks") { 4 } else { 2 };
            cost.flops / (heads * (4 * 2 + 5))
        })
        .sum();
    let (t, n, m) = (5, 4, 2);
    let pairs = 4 * t * n * n + 2 * (2 * t * n * m) + 3 * (t * m) * (t * m);
    assert_eq!(mixed, BATCH as u64 * pairs);
}

#[test]
fn attention_grows_with_the_length_to_the_four_thirds() {
    let operations = |group: usize, groups: usize| {
        let subject = Subject::new(
            FitSpec {
                group,
                latents: 1,
                ..spec("(1)1(1)", groups, false)
            },
            false,
        );
        let meter = Meter::new();
        let x = random(&[1, group * groups, WIDTH], 2);
        let x = Signal::from(x).into_metered(meter.clone());
        let trace = Trace::new();
        subject
            .signal(&subject.map, x, Given::default(), &trace)
            .unwrap();
        let sites = meter.sites();
        let mixed = sites.iter().filter(|(site, _)| site.ends_with(".mixed"));
        mixed.map(|(_, cost)| cost.flops).sum::<u64>() as f64
    };
    // n = L^⅓, m = 1: from 512 tokens to 4096.
    let exponent = (operations(16, 256) / operations(8, 64)).ln() / 8f64.ln();
    assert!((exponent - 4.0 / 3.0).abs() < 0.1, "{exponent}");
}
