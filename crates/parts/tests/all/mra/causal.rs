//! MRA without later tokens, and step by step.

use super::{check, sharper, specs};
use crate::common::attention::{Given, WIDTH};
use crate::common::{assert_near, random};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::mra::MraSpec;

fn causal_specs() -> Vec<MraSpec> {
    let fit = |mra: &MraSpec| {
        mra.image.is_none()
            && mra.per_row.iter().all(|count| *count > 0)
            && mra.scales.last() == Some(&1)
    };
    specs().into_iter().filter(fit).collect()
}

#[test]
fn the_causal_form_equals_blocks_laid_out() {
    let keep = [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0];
    for mra in causal_specs() {
        let subject = sharper(&mra, true, 3.0);
        for length in [1, 7, 16] {
            let x = random(&[1, length, WIDTH], 1);
            let keep = (length == 16).then_some(&keep[..]);
            check(&mra, &subject, &x, keep, true);
        }
    }
}

/// Neither a value, nor a mean, nor the choice of blocks hangs on later tokens.
#[test]
fn later_tokens_change_nothing_before_them_and_steps_are_the_pass() {
    let x = random(&[1, 24, WIDTH], 1);
    for mra in causal_specs() {
        let subject = sharper(&mra, true, 3.0);
        let whole = subject.output(&x, Given::default());
        for kept in [1, 6, 13, 23] {
            let later = random(&[1, 24 - kept, WIDTH], 7);
            let other = Tensor::cat(&[&x.narrow(1, 0, kept).unwrap(), &later], 1).unwrap();
            let other = subject.output(&other, Given::default());
            let [before, after] = [&whole, &other].map(|y| y.narrow(1, 0, kept).unwrap());
            assert_near(&after, &before, 1e-14, &format!("{mra:?} before {kept}"));
        }
        for steps in [vec![1; 24], vec![5, 1, 10, 8], vec![23, 1]] {
            let stepped = subject.decode(&x, &steps);
            assert_near(&stepped, &whole, 1e-10, &format!("{mra:?} in {steps:?}"));
        }
    }
}
