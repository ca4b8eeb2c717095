//! FIT that goes on from earlier tokens.
#![allow(clippy::panic, clippy::unwrap_used)]

use super::*;
use crate::common::tensor;
use lapidary_kernels::DType;
use lapidary_parts::state::MixerState;

#[test]
fn decoding_equals_the_whole_sequence() {
    let sinusoidal = FitSpec {
        latent_positions: LatentPositions::Sinusoidal,
        positions: GroupPositions::Sinusoidal,
        ..spec("(1)1(1)", 4, true)
    };
    let transformed = FitSpec {
        read_feedforward: block(10, 2, true).feedforward,
        ..spec("(1)1(1)1(1)", 4, true)
    };
    let layouts = ["(2)", "(1)1(1)", "(1)2(1)1(1)", "(0)1(2)", "(2)1(1)2"];
    let specs = layouts.map(|layout| spec(layout, 4, true)).into_iter();
    for spec in specs.chain([sinusoidal, transformed]) {
        let subject = Subject::new(spec, true);
        let x = tokens(14);
        let whole = subject.run(&x);
        for steps in [&[1; 14][..], &[5, 1, 1, 7], &[4, 4, 6], &[3, 10, 1], &[14]] {
            let (found, _) = subject.decode(&x, steps, &Trace::new()).unwrap();
            let what = format!("{} in steps of {steps:?}", subject.spec.layout);
            assert_near(&found, &whole, 1e-12, &what);
        }
    }
}

#[test]
fn a_step_keeps_its_own_group_and_computes_latents_once() {
    let subject = Subject::new(spec("(1)2(1)1(1)2", 4, true), true);
    let trace = Trace::new().capture("none").unwrap();
    let (_, mut state) = subject.decode(&tokens(14), &[1; 14], &trace).unwrap();
    let names = trace.names();
    let times = |site: &str| names.iter().filter(|name| *name == site).count();
    // Three of four groups are full.
    assert_eq!(times("blocks.0.out"), 14);
    assert_eq!(times("organisation.write.0.out"), 14);
    assert_eq!(times("organisation.read.0.out"), 3);
    assert_eq!(times("organisation.global.2.out"), 3);
    // Nobody hears of the latents of the last stage.
    assert_eq!(times("organisation.read.2.out"), 0);
    let MixerState::Cache(cache) = &mut state.mixers[0] else {
        panic!("a block keeps {}", state.mixers[0].name());
    };
    let one = tensor(vec![0.0; BATCH * WIDTH], &[BATCH, 1, WIDTH]);
    let (keys, _) = cache.append(&one, &one).unwrap();
    assert_eq!(keys.dims(), [BATCH, 2 + 1, WIDTH]);
}

#[test]
fn what_cannot_be_decoded_says_so() {
    let x = tokens(14);
    let silent = Trace::new();
    let refused = |subject: &Subject, steps: &[usize], x: &Tensor| {
        subject.decode(x, steps, &silent).unwrap_err().to_string()
    };
    let causal = Subject::new(spec("(1)1(1)", 4, true), true);
    let said = refused(&causal, &[14, 4], &tokens(18));
    assert!(said.starts_with("number of tokens is 18"), "{said}");
    for spec in [
        FitSpec {
            output: FitOutput::Latents,
            width: None,
            ..spec("(1)1(1)", 4, true)
        },
        FitSpec {
            condition: 1,
            ..spec("(1)1(1)", 4, true)
        },
    ] {
        let said = refused(&Subject::new(spec, true), &[3], &x);
        assert!(said.starts_with("offset is 0"), "{said}");
    }
    let both = Subject::new(spec("(1)1(1)", 4, false), false);
    let said = refused(&both, &[3], &x);
    assert!(said.starts_with("offset is 0"), "{said}");
    // Without a state there is nothing to go on from; pads have no place in one.
    let (organisation, blocks) = build(&causal.map, |p| causal.modules(p)).unwrap();
    let keep = Tensor::ones((BATCH, 3), DType::U8, &Device::Cpu).unwrap();
    let run = |cx: &Context<'_>, state: Option<&mut DecodeState>| {
        let x = Signal::from(rows(&x, 0, 3));
        let found = organisation.forward(x, &blocks, Read::default(), cx, None, state);
        found.unwrap_err().to_string()
    };
    let later = Context {
        offset: 2,
        ..Context::new(&silent)
    };
    let said = run(&later, None);
    assert!(said.starts_with("offset is 2"), "{said}");
    let padded = Context {
        key_padding: Some(&keep),
        ..Context::new(&silent)
    };
    let said = run(&padded, Some(&mut DecodeState::new(2)));
    assert!(said.starts_with("padding is \"given\""), "{said}");
}
