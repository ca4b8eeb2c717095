use super::*;
use crate::meter::{Cost, Meter};
use crate::{Lens, Trace};
use proptest::prelude::*;
use std::sync::Arc;

fn cost(x: Tensor, operation: impl Fn(&Signal) -> crate::Result<Signal>) -> Cost {
    let meter = Meter::new();
    operation(&Signal::from(x).into_metered(meter.clone())).unwrap();
    meter.total()
}

#[test]
fn linear_layers_count_two_operations_for_each_multiplication() {
    let rows = (BATCH * TOKENS) as u64;
    let found = cost(input(), |x| x.linear(&layer(4, 5, true, 1.0)));
    assert_eq!(found.flops, rows * (2 * 4 * 5 + 5));
    assert_eq!(found.bytes, 8 * (rows * 4 + 4 * 5 + 5 + rows * 5));
    let found = cost(input(), |x| x.linear(&layer(4, 5, false, 1.0)));
    assert_eq!(found.flops, rows * 2 * 4 * 5);
    let found = cost(input(), |x| x.linear(&low_rank(4, 2, 5)));
    assert_eq!(found.flops, rows * (2 * (2 * 4 + 5 * 2) + 5));
}

#[test]
fn elementwise_operations_count_by_convention() {
    let elements = (BATCH * TOKENS * WIDTH) as u64;
    let gamma = numbers(&[WIDTH], 1.0);
    let other = Signal::from(input());
    let expected: Vec<(u64, Operation)> = vec![
        (elements, Box::new(|x| x.scale(2.0))),
        (elements, Box::new(move |x| x.add(&other))),
        (elements, Box::new(|x| x.activate(Activation::Gelu))),
        (elements, Box::new(|x| x.gate(x))),
        (elements, Box::new(|x| x.mean(1))),
        (elements, Box::new(|x| x.sum_last())),
        (5 * elements, Box::new(|x| x.softmax(&Default::default()))),
        (5 * elements, Box::new(|x| x.rms_norm(None, 1e-5))),
        (
            8 * elements,
            Box::new(move |x| x.layer_norm(Some(&gamma), None, 1e-5)),
        ),
        (
            // Five terms.
            2 * 5 * WIDTH as u64,
            Box::new(|x| Signal::summed_rows(&[&token_rows(x)?], row_sums(1))),
        ),
        (0, Box::new(|x| x.transpose(0, 1)?.contiguous())),
        (
            0,
            Box::new(|x| {
                x.reshape(&[TOKENS * BATCH, WIDTH])?
                    .unsqueeze(0)?
                    .squeeze(0)
            }),
        ),
    ];
    for (index, (flops, operation)) in expected.into_iter().enumerate() {
        assert_eq!(cost(input(), operation).flops, flops, "operation {index}");
    }
}

#[test]
fn memory_counts_while_a_signal_holds_it() {
    let meter = Meter::new();
    let bytes = 8 * (BATCH * TOKENS * WIDTH) as u64;
    let x = Signal::from(input()).into_metered(meter.clone());
    assert_eq!(meter.live_bytes(), bytes);
    // A view looks at the same memory, and keeps it.
    let view = x.transpose(0, 1).unwrap().narrow(0, 0, 1).unwrap();
    assert_eq!(meter.live_bytes(), bytes);
    drop(x);
    assert_eq!(meter.live_bytes(), bytes);
    let y = view.scale(2.0).unwrap();
    let copy = y.clone();
    assert_eq!(meter.live_bytes(), bytes + bytes / TOKENS as u64);
    drop((view, y));
    assert_eq!(meter.live_bytes(), bytes / TOKENS as u64);
    drop(copy);
    assert_eq!(meter.live_bytes(), 0);
    assert_eq!(meter.peak_live_bytes(), bytes + bytes / TOKENS as u64);
}

#[test]
fn every_operation_keeps_counting_and_gives_its_memory_back() {
    let meter = Meter::new();
    for (name, operation) in linear_operations().into_iter().chain(other_operations()) {
        let y = operation(&Signal::from(input()).into_metered(meter.clone())).unwrap();
        assert!(matches!(y.lens(), Lens::Meter(..)), "{name}");
        drop(y);
        assert_eq!(meter.live_bytes(), 0, "{name}");
    }
}

#[test]
fn work_is_booked_at_the_site_that_ends_it() {
    let meter = Meter::new();
    let trace = Trace::new();
    let x = Signal::from(input()).into_metered(meter.clone());
    let x = trace
        .site(format_args!("first"), x.scale(2.0).unwrap())
        .unwrap();
    let x = x.scale(2.0).unwrap().scale(2.0).unwrap();
    trace.site(format_args!("second"), x).unwrap();
    let sites = meter.sites();
    assert_eq!(2 * sites["first"].flops, sites["second"].flops);
    assert_eq!(
        meter.total().flops,
        sites["first"].flops + sites["second"].flops
    );
}

proptest! {
    #[test]
    fn attention_counts_the_keys_that_are_seen(
        queries in 1usize..6,
        offset in 0usize..3,
        causal: bool,
        window in prop::option::of(1usize..4),
        pads in prop::collection::vec(any::<bool>(), 8),
    ) {
        let keys = queries + offset;
        let keep: Vec<u8> = (0..keys).map(|j| u8::from(j == 0 || pads[j % 8])).collect();
        let options = AttentionOptions {
            causal,
            window,
            query_offset: offset,
            key_padding: Some(Tensor::from_slice(&keep, (1, keys), &Device::Cpu).unwrap()),
            ..AttentionOptions::new(2)
        };
        let mut seen = 0;
        for i in 0..queries {
            for (j, kept) in keep.iter().enumerate() {
                let near = window.is_none_or(|window| (i + offset).abs_diff(j) < window);
                seen += u64::from(*kept == 1 && near && (!causal || j <= i + offset));
            }
        }
        let meter: Arc<Meter> = Meter::new();
        let q = Signal::from(numbers(&[1, 2, queries, 3], 1.0)).into_metered(meter.clone());
        let k = Signal::from(numbers(&[1, 1, keys, 3], 2.0));
        let v = Signal::from(numbers(&[1, 1, keys, 5], 3.0));
        v.attend(&q, &k, &options).unwrap();
        prop_assert_eq!(meter.total().flops, 2 * seen * (2 * 3 + 2 * 5 + 5));
        let meter: Arc<Meter> = Meter::new();
        let q = Signal::from(numbers(&[1, queries, 6], 1.0)).into_metered(meter.clone());
        let k = Signal::from(numbers(&[1, keys, 3], 2.0));
        let v = Signal::from(numbers(&[1, keys, 5], 3.0));
        v.attend_merged(&q, &k, 2, 1, &options).unwrap();
        prop_assert_eq!(meter.total().flops, 2 * seen * (2 * 3 + 2 * 5 + 5));
    }
}
