//! Sequences of several of the chunks and blocks that mechanisms work in: they are padded, cut and masked as
//! short ones are.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::{Given, Subject, WIDTH, mask, spec};
use crate::common::{assert_near, difference, random};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};
use lapidary_parts::attention::mechanism::ecoformer::{Bandwidth, EcoformerSpec};
use lapidary_parts::attention::mechanism::fastmax::{FastmaxSpec, Normalisation};
use lapidary_parts::attention::mechanism::kernelized::{KernelizedSpec, ReadOut, SpectrumSpec};
use lapidary_parts::attention::mechanism::lion::{LionDecay, LionForm, LionSpec};
use lapidary_parts::attention::mechanism::mra::MraSpec;
use lapidary_parts::attention::mechanism::reformer::ReformerSpec;
use lapidary_parts::attention::mechanism::soft::{Landmarks, SoftSpec};
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_parts::attention::{MultiHeadSpec, QueryKeySharing};

const LENGTH: usize = 150;

fn kernelized(spectrum: SpectrumSpec, features: ReadOut) -> MechanismSpec {
    MechanismSpec::Kernelized(KernelizedSpec {
        spectrum,
        features,
        ..KernelizedSpec::default()
    })
}

fn fastmax(degree: usize, normalisation: Normalisation) -> MechanismSpec {
    MechanismSpec::Fastmax(FastmaxSpec {
        degree,
        normalisation,
        ..FastmaxSpec::default()
    })
}

fn lion(decay: LionDecay, per_feature: bool) -> MechanismSpec {
    MechanismSpec::Lion(LionSpec {
        decay,
        per_feature,
        ..LionSpec::default()
    })
}

fn ecoformer(bandwidth: Bandwidth) -> MechanismSpec {
    MechanismSpec::Ecoformer(EcoformerSpec {
        bits: 7,
        anchors: 5,
        bandwidth,
        ..EcoformerSpec::default()
    })
}

fn combiner(form: CombinerForm) -> MechanismSpec {
    MechanismSpec::Combiner(CombinerSpec::new(form))
}

/// Those of which steps are the pass, and earlier tokens know nothing of later ones.
pub fn causal() -> Vec<MechanismSpec> {
    let positive = ReadOut::Positive { stabilise: false };
    let fourier = ReadOut::Fourier { smoothing: 1.0 };
    let mixture = SpectrumSpec::Mixture {
        components: Some(2),
    };
    vec![
        MechanismSpec::Softmax,
        fastmax(1, Normalisation::Token),
        fastmax(2, Normalisation::Token),
        kernelized(SpectrumSpec::Gaussian, positive),
        kernelized(mixture, positive),
        kernelized(SpectrumSpec::Gaussian, fourier),
        lion(LionDecay::None, false),
        lion(LionDecay::Constant, false),
        lion(LionDecay::Selective, false),
        lion(LionDecay::Selective, true),
        ecoformer(Bandwidth::Fitted),
        combiner(CombinerForm::Fixed { segment: 12 }),
        combiner(CombinerForm::LogSparse),
        combiner(CombinerForm::Vertical { columns: 12 }),
        MechanismSpec::Sparse(SparseSpec {
            pattern: SparsePattern::Strided { stride: 12 },
            steps: Steps::Merged,
        }),
        MechanismSpec::Mra(MraSpec::new(16, 2)),
    ]
}

/// Those that see both sides.
pub fn bidirectional() -> Vec<MechanismSpec> {
    let stabilised = ReadOut::Positive { stabilise: true };
    let recurrent = LionSpec {
        decay: LionDecay::Selective,
        form: LionForm::Recurrent,
        ..LionSpec::default()
    };
    vec![
        MechanismSpec::Softmax,
        fastmax(2, Normalisation::Max { limit: 1.0 }),
        kernelized(SpectrumSpec::Gaussian, stabilised),
        lion(LionDecay::Selective, false),
        lion(LionDecay::Constant, true),
        MechanismSpec::Lion(recurrent),
        ecoformer(Bandwidth::Sample),
        combiner(CombinerForm::Fixed { segment: 12 }),
        combiner(CombinerForm::LogSparse),
        MechanismSpec::Mra(MraSpec::new(16, 2)),
        MechanismSpec::Soft(SoftSpec::new(Landmarks::Segments { count: 8 })),
    ]
}

fn subject(mechanism: &MechanismSpec, causal: bool) -> Subject {
    let sharing = match mechanism {
        MechanismSpec::Ecoformer(_) | MechanismSpec::Reformer(_) | MechanismSpec::Soft(_) => {
            QueryKeySharing::QueryKey
        }
        _ => QueryKeySharing::None,
    };
    let spec = MultiHeadSpec {
        sharing,
        ..spec(mechanism.clone(), causal)
    };
    Subject::new(spec, 4)
}

/// Pads before one sequence and behind another, beside one without any.
#[test]
fn pads_on_either_side_are_not_there() {
    let reformer = MechanismSpec::Reformer(ReformerSpec {
        buckets: vec![8],
        rounds: 2,
        ..ReformerSpec::new(16)
    });
    let both = bidirectional().into_iter().map(|of| (of, false));
    let past = causal().into_iter().map(|of| (of, true));
    let hashed = [(reformer.clone(), true), (reformer, false)];
    let x = random(&[3, LENGTH, WIDTH], 1);
    let real = [40..LENGTH, 0..LENGTH, 0..70];
    let rows = real
        .clone()
        .map(|real| (0..LENGTH).map(|at| u8::from(real.contains(&at))).collect());
    let rows: [Vec<u8>; 3] = rows;
    let keep = mask(&[&rows[0], &rows[1], &rows[2]]);
    for (mechanism, causal) in both.chain(past).chain(hashed) {
        let subject = subject(&mechanism, causal);
        let given = Given {
            keep: Some(&keep),
            ..Given::default()
        };
        let y = subject.output(&x, given);
        for (row, real) in real.iter().enumerate() {
            let own = |x: &Tensor| {
                let row = x.narrow(0, row, 1).unwrap();
                row.narrow(1, real.start, real.len()).unwrap()
            };
            let alone = subject.output(&own(&x), Given::default());
            let what = format!("{mechanism:?} causal {causal}: {real:?}");
            assert_near(&own(&y), &alone, 1e-9, &what);
        }
    }
}

#[test]
fn steps_are_the_pass_across_chunks() {
    let x = random(&[2, LENGTH, WIDTH], 2);
    for mechanism in causal() {
        let subject = subject(&mechanism, true);
        let whole = subject.output(&x, Given::default());
        for steps in [&[70, 1, 1, 78][..], &[63, 1, 1, 1, 63, 21], &[149, 1]] {
            let stepped = subject.decode(&x, steps);
            assert_near(&stepped, &whole, 1e-9, &format!("{mechanism:?}"));
        }
    }
}

#[test]
fn later_tokens_are_not_seen_across_chunks() {
    let x = random(&[2, LENGTH, WIDTH], 3);
    for mechanism in causal() {
        let subject = subject(&mechanism, true);
        let whole = subject.output(&x, Given::default());
        for kept in [1, 63, 64, 65, 100, 128, 149] {
            let later = random(&[2, LENGTH - kept, WIDTH], 4);
            let other = Tensor::cat(&[&x.narrow(1, 0, kept).unwrap(), &later], 1).unwrap();
            let other = subject.output(&other, Given::default());
            let part = |y: &Tensor, from: usize, count: usize| y.narrow(1, from, count).unwrap();
            let before = difference(&part(&other, 0, kept), &part(&whole, 0, kept));
            assert!(before < 1e-12, "{mechanism:?} before {kept}: {before:e}");
            let here = difference(&part(&other, kept, 1), &part(&whole, kept, 1));
            assert!(here > 1e-6, "{mechanism:?} at {kept}: {here:e}");
        }
    }
}
