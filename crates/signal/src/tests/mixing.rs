//! A mixing that happens to be softmax attention does under every lens what attention does.

use super::{assert_close, heads, input, numbers};
use crate::contextual::ContextualRules;
use crate::meter::Meter;
use crate::relevance::{RelevanceRules, relevance_of};
use crate::rounding::{Format, Rounding, SoftmaxPrecision};
use crate::streams::{Partition, StreamRules};
use crate::{Mixing, Signal};
use lapidary_kernels::{AttentionOptions, Tensor, naive};

/// Softmax attention, with nothing but [`Mixing::mix`] said about it.
#[derive(Debug)]
struct Softmax {
    q: Tensor,
    k: Tensor,
}

impl Mixing for Softmax {
    fn sizes(&self) -> [usize; 4] {
        let (batch, heads, queries, _) = self.q.dims4().unwrap();
        [batch, heads, queries, self.k.dim(2).unwrap()]
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        naive::attention(&self.q, &self.k, values, &AttentionOptions::new(2))
    }

    fn operations(&self, width: usize) -> u64 {
        width as u64
    }
}

fn ours(x: &Signal) -> Signal {
    let each = heads(x).unwrap();
    let scores = heads(&x.for_scores()).unwrap();
    let mixing = Softmax {
        q: scores.for_weights().unwrap(),
        k: scores.for_weights().unwrap(),
    };
    each.mix_through(&mixing).unwrap().merge_heads().unwrap()
}

fn attention(x: &Signal) -> Signal {
    let each = heads(x).unwrap();
    let scores = heads(&x.for_scores()).unwrap();
    let options = AttentionOptions::new(2);
    let mixed = each.attend(&scores, &scores, &options).unwrap();
    mixed.merge_heads().unwrap()
}

#[test]
fn without_a_lens_and_rounded() {
    let x = Signal::from(input());
    assert_close(ours(&x).value(), attention(&x).value(), 1e-14, "plain");
    let rounding = Rounding {
        format: Format::Bf16,
        softmax: SoftmaxPrecision::Wide,
    };
    let x = Signal::from(input()).into_rounded(rounding).unwrap();
    // Attention rounds its weights too; a mixing says nothing of them.
    assert_close(ours(&x).value(), attention(&x).value(), 0.02, "rounded");
}

#[test]
fn streams_and_relevant_parts_are_mixed_by_frozen_weights() {
    let partition = || Partition::positions(3);
    let streams = || {
        Signal::from(input())
            .into_streams(partition(), StreamRules::default())
            .unwrap()
    };
    let [found, expected] = [ours(&streams()), attention(&streams())];
    assert_close(
        &found.contributions().unwrap(),
        &expected.contributions().unwrap(),
        1e-14,
        "streams",
    );
    let relevant = (input() * 0.3).unwrap().unsqueeze(0).unwrap();
    let rules = ContextualRules::default();
    let parts = || {
        Signal::from(input())
            .into_contextual(relevant.clone(), rules)
            .unwrap()
    };
    let found = ours(&parts());
    let sum = (found.relevant().unwrap() + found.irrelevant().unwrap()).unwrap();
    let whole = found.value().unsqueeze(0).unwrap();
    assert_close(&sum, &whole, 1e-14, "parts");
}

#[test]
fn relevance_is_that_of_attention() {
    let rules = [
        RelevanceRules::value_only(),
        RelevanceRules::attention_aware(),
        RelevanceRules::gradient_times_input(),
    ];
    for rules in rules {
        let through = |map: fn(&Signal) -> Signal| {
            let (x, leaf) = Signal::from(input()).into_relevance(rules).unwrap();
            let y = map(&x).into_value();
            let weighted = (&y * numbers(y.dims(), 3.0)).unwrap().sum_all().unwrap();
            relevance_of(leaf.as_tensor(), &weighted.backward().unwrap()).unwrap()
        };
        assert_close(
            &through(ours),
            &through(attention),
            1e-12,
            &format!("{rules:?}"),
        );
    }
}

#[test]
fn the_meter_takes_the_mixings_word() {
    let meter = Meter::new();
    let x = Signal::from(input()).into_metered(meter.clone());
    let before = meter.total().flops;
    let each = heads(&x).unwrap();
    let plain = heads(&Signal::from(input())).unwrap().into_value();
    let mixing = Softmax {
        q: plain.clone(),
        k: plain,
    };
    each.mix_through(&mixing).unwrap();
    assert_eq!(meter.total().flops - before, 2);
}

#[test]
fn values_of_another_shape_are_refused() {
    let plain = heads(&Signal::from(input())).unwrap().into_value();
    let mixing = Softmax {
        q: plain.clone(),
        k: plain,
    };
    let fewer = Signal::from(numbers(&[2, 2, 2, 2], 0.0));
    assert!(fewer.mix_through(&mixing).is_err());
}
