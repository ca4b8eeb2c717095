//! Mixers that keep of earlier tokens what later ones need: steps are the pass, however a sequence is cut
//! and padded, and a step's work and memory hang on what it meets, not on how much there was.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common::attention::{Given, HEADS, Subject, WIDTH, growth, spec};
use crate::common::{assert_near, random};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::Context;
use lapidary_parts::attention::MultiHeadAttention;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};
use lapidary_parts::attention::mechanism::mra::MraSpec;
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_parts::state::MixerState;
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn combiner(form: CombinerForm) -> MechanismSpec {
    MechanismSpec::Combiner(CombinerSpec::new(form))
}

fn forms(size: usize) -> Vec<CombinerForm> {
    let mixture = |joint| CombinerForm::Mixture {
        columns: size,
        joint,
    };
    vec![
        CombinerForm::Fixed { segment: size },
        CombinerForm::LogSparse,
        CombinerForm::Vertical { columns: size },
        CombinerForm::Horizontal { columns: size },
        CombinerForm::RowMajor { columns: size },
        mixture(false),
        mixture(true),
    ]
}

fn sparse(pattern: SparsePattern, steps: Steps) -> MechanismSpec {
    MechanismSpec::Sparse(SparseSpec { pattern, steps })
}

fn patterns(stride: usize) -> Vec<SparsePattern> {
    let fixed = |summaries, groups| SparsePattern::Fixed {
        stride,
        summaries,
        groups,
    };
    vec![
        SparsePattern::Strided { stride },
        fixed(1, 1),
        fixed(1, stride.min(2)),
        SparsePattern::Axial { stride },
    ]
}

fn blocks(scales: &[usize], per_row: &[usize]) -> MraSpec {
    MraSpec {
        scales: scales.to_vec(),
        per_row: per_row.to_vec(),
        ..MraSpec::new(2, 1)
    }
}

fn mechanisms() -> Vec<MechanismSpec> {
    let mut all = vec![sparse(SparsePattern::LogSparse, Steps::Merged)];
    for size in [1, 3, 4, 7] {
        for form in forms(size) {
            all.push(combiner(form));
            all.push(MechanismSpec::Combiner(CombinerSpec {
                log_count: true,
                ..CombinerSpec::new(form)
            }));
        }
        for pattern in patterns(size) {
            for steps in [Steps::First, Steps::Second, Steps::Merged, Steps::ByHead] {
                all.push(sparse(pattern.clone(), steps));
            }
        }
    }
    for clusters in [1, 3, 5] {
        all.push(combiner(CombinerForm::Routed { clusters }));
    }
    let mras = [
        blocks(&[4, 1], &[2]),
        blocks(&[3, 1], &[1]),
        blocks(&[8, 4, 1], &[2, 1]),
        blocks(&[6, 3, 1], &[3, 2]),
        MraSpec {
            sparse: true,
            ..blocks(&[4, 2, 1], &[2, 2])
        },
        MraSpec {
            diagonal: 3,
            first: 1,
            ..blocks(&[4, 1], &[3])
        },
    ];
    all.extend(mras.map(MechanismSpec::Mra));
    all
}

/// A causal attention and what it remembers.
struct Decoder {
    attention: MultiHeadAttention,
    state: MixerState,
    length: usize,
}

impl Decoder {
    fn new(subject: &Subject) -> Self {
        Self {
            attention: subject.attention(),
            state: MixerState::Empty,
            length: 0,
        }
    }

    /// Reads the next tokens of `x`, where those of `keep` are real.
    fn read(&mut self, x: &Tensor, count: usize, keep: Option<&Tensor>, trace: &Trace) -> Tensor {
        let here = Signal::from(x.narrow(1, self.length, count).unwrap());
        self.pass(here, keep, trace)
    }

    fn pass(&mut self, here: Signal, keep: Option<&Tensor>, trace: &Trace) -> Tensor {
        let count = here.dims()[1];
        let keep = keep.map(|keep| keep.narrow(1, 0, self.length + count).unwrap());
        let cx = Context {
            offset: self.length,
            key_padding: keep.as_ref(),
            ..Context::new(trace)
        };
        self.length += count;
        let y = self.attention.forward(&here, &cx, Some(&mut self.state));
        y.unwrap().into_value()
    }
}

/// Numbers that sum to `length`.
fn cuts(length: usize, generator: &mut ChaCha8Rng) -> Vec<usize> {
    let (mut left, mut all) = (length, Vec::new());
    while left > 0 {
        let most = if generator.random_bool(0.5) {
            1
        } else {
            left.min(9)
        };
        all.push(generator.random_range(1..=most));
        left -= all.last().unwrap();
    }
    all
}

#[test]
fn steps_are_the_pass_however_it_is_cut() {
    let mut generator = ChaCha8Rng::seed_from_u64(5);
    for mechanism in mechanisms() {
        let subject = Subject::new(spec(mechanism.clone(), true), 4);
        for length in [5, 17, 34] {
            let x = random(&[2, length, WIDTH], length as u64);
            let whole = subject.output(&x, Given::default());
            let drawn = cuts(length, &mut generator);
            for cuts in [drawn, vec![length - 1, 1], vec![1; length]] {
                let mut decoder = Decoder::new(&subject);
                let read = |count: &usize| decoder.read(&x, *count, None, &Trace::new());
                let steps: Vec<Tensor> = cuts.iter().map(read).collect();
                let steps = Tensor::cat(&steps, 1).unwrap();
                assert_near(&steps, &whole, 1e-11, &format!("{mechanism:?} in {cuts:?}"));
            }
        }
    }
}

/// Sequences of a batch that have pads at different places, in the middle too.
#[test]
fn steps_are_the_pass_however_it_is_padded() {
    let mut generator = ChaCha8Rng::seed_from_u64(6);
    let length = 21;
    let x = random(&[3, length, WIDTH], 1);
    for mechanism in mechanisms() {
        let subject = Subject::new(spec(mechanism.clone(), true), 4);
        for share in [0.9, 0.5] {
            let keep = (0..3 * length).map(|_| u8::from(generator.random_bool(share)));
            let keep = Tensor::from_vec(keep.collect::<Vec<_>>(), (3, length), &Device::Cpu);
            let keep = keep.unwrap();
            let given = Given {
                keep: Some(&keep),
                ..Given::default()
            };
            let whole = subject.output(&x, given);
            let cuts = cuts(length, &mut generator);
            let mut decoder = Decoder::new(&subject);
            let read = |count: &usize| decoder.read(&x, *count, Some(&keep), &Trace::new());
            let steps: Vec<Tensor> = cuts.iter().map(read).collect();
            let steps = Tensor::cat(&steps, 1).unwrap();
            assert_near(&steps, &whole, 1e-11, &format!("{mechanism:?} in {cuts:?}"));
        }
    }
}

/// An attention that has read `before` of some more tokens.
fn after(mechanism: MechanismSpec, before: usize) -> (Decoder, Tensor) {
    let subject = Subject::new(spec(mechanism, true), 4);
    let x = random(&[1, before + before.isqrt(), WIDTH], 1);
    let mut decoder = Decoder::new(&subject);
    decoder.read(&x, before, None, &Trace::new());
    (decoder, x)
}

/// Mean operations of one more token behind `n` others, summaries that are made on the way and
/// projections among them: over a row, so that one row ends.
fn work(mechanism: MechanismSpec, n: usize) -> u64 {
    let (mut decoder, x) = after(mechanism, n);
    let meter = Meter::new();
    for _ in 0..n.isqrt() {
        let here = Signal::from(x.narrow(1, decoder.length, 1).unwrap());
        decoder.pass(here.into_metered(meter.clone()), None, &Trace::new());
    }
    meter.total().flops / n.isqrt() as u64
}

/// The most rows of keys that are gathered for one more token behind `n` others.
fn gathered(mechanism: MechanismSpec, n: usize) -> usize {
    let (mut decoder, x) = after(mechanism, n);
    let rows = (0..n.isqrt()).map(|_| {
        let trace = Trace::new().capture("*.weights").unwrap();
        decoder.read(&x, 1, None, &trace);
        *trace.signal(".weights").unwrap().dims().last().unwrap()
    });
    rows.max().unwrap()
}

#[test]
fn a_step_gathers_what_it_meets() {
    for n in [64usize, 1000, 4096] {
        let m = n.isqrt();
        // Rows and segments, one of each begun.
        let (across, down) = (m + 1, (n + m) / m + 1);
        let doubled = (n + m).ilog2() as usize + 2;
        let mut all: Vec<(MechanismSpec, usize)> = vec![
            (combiner(CombinerForm::LogSparse), doubled),
            (sparse(SparsePattern::LogSparse, Steps::Merged), doubled),
        ];
        let most = |form: CombinerForm| match form {
            CombinerForm::Fixed { .. } | CombinerForm::RowMajor { .. } => across + down,
            CombinerForm::Vertical { .. } => down + 2 * across,
            CombinerForm::Horizontal { .. } => 3 * down + across,
            _ => 3 * down + 2 * across,
        };
        let forms = forms(m)
            .into_iter()
            .filter(|form| *form != CombinerForm::LogSparse);
        all.extend(forms.map(|form| (combiner(form), most(form))));
        let patterns = patterns(m).into_iter();
        // Heads may have columns of their own.
        all.extend(patterns.map(|pattern| (sparse(pattern, Steps::Merged), across + HEADS * down)));
        let coarse = blocks(&[m, 1], &[2]);
        all.push((MechanismSpec::Mra(coarse), down + HEADS * 2 * m));
        for (mechanism, most) in all {
            let found = gathered(mechanism.clone(), n);
            assert!(found <= most, "{mechanism:?} at {n}: {found}, not {most}");
        }
    }
}

/// A mechanism for so many tokens.
type Made = fn(usize) -> MechanismSpec;

/// With rows and blocks of the root, a step's operations grow as the root; those of doubling spans as the
/// logarithm.
#[test]
fn a_step_does_not_pay_for_all_that_was_before() {
    let of: [(&str, Made, f64); 9] = [
        (
            "fixed",
            |m| combiner(CombinerForm::Fixed { segment: m }),
            0.5,
        ),
        (
            "vertical",
            |m| combiner(CombinerForm::Vertical { columns: m }),
            0.5,
        ),
        (
            "horizontal",
            |m| combiner(CombinerForm::Horizontal { columns: m }),
            0.5,
        ),
        (
            "row-major",
            |m| combiner(CombinerForm::RowMajor { columns: m }),
            0.5,
        ),
        ("log-sparse", |_| combiner(CombinerForm::LogSparse), 0.2),
        (
            "strided",
            |stride| sparse(SparsePattern::Strided { stride }, Steps::Merged),
            0.5,
        ),
        (
            "summaries",
            |stride| {
                let pattern = SparsePattern::Fixed {
                    stride,
                    summaries: 1,
                    groups: 1,
                };
                sparse(pattern, Steps::Merged)
            },
            0.5,
        ),
        ("blocks", |m| MechanismSpec::Mra(blocks(&[m, 1], &[2])), 0.5),
        (
            "three sizes of blocks",
            |m| MechanismSpec::Mra(blocks(&[m, m / 4, 1], &[2, 2])),
            0.5,
        ),
    ];
    for (name, mechanism, most) in of {
        let exponent = growth(1024, |n| work(mechanism(n.isqrt()), n));
        assert!(exponent < most + 0.1, "{name}: {exponent}");
    }
}

/// What is held is what later tokens may need, and at most as much again.
#[test]
fn memory_is_what_later_tokens_need() {
    let (n, m) = (1000, 31);
    let rows = n / m + 1;
    // Tokens, queries of tokens, summaries; at most twice as many, and sixteen of what there is little of.
    let of = [
        (CombinerForm::Fixed { segment: m }, [m, m, rows]),
        (CombinerForm::LogSparse, [n + m, n + m, 10]),
        (CombinerForm::Vertical { columns: m }, [n + m, n + m, 2 * m]),
        (
            CombinerForm::Horizontal { columns: m },
            [n + m, m, 2 * (n + m)],
        ),
        (CombinerForm::RowMajor { columns: m }, [m, m, n + m]),
    ];
    for (form, needed) in of {
        let (mut decoder, x) = after(combiner(form), n);
        for _ in 0..m {
            decoder.read(&x, 1, None, &Trace::new());
            let MixerState::Spans(memory) = &decoder.state else {
                panic!("{:?}", decoder.state);
            };
            for (held, needed) in memory.held().into_iter().zip(needed) {
                assert!(
                    held <= (2 * needed).max(16),
                    "{form:?}: {held} for {needed}"
                );
            }
        }
    }
    let (decoder, _) = after(MechanismSpec::Mra(blocks(&[8, 4, 1], &[2, 2])), n);
    let MixerState::Refined(memory) = &decoder.state else {
        panic!("{:?}", decoder.state);
    };
    let [tokens, queries, means] = memory.means().held();
    assert_eq!((tokens, means), (n, n / 8 + n / 4));
    assert!(queries <= 16, "{queries}");
}

/// A state of another mixer is refused, and stays.
#[test]
fn states_of_others_are_refused() {
    let x = random(&[1, 3, WIDTH], 1);
    let of = [
        combiner(CombinerForm::LogSparse),
        sparse(SparsePattern::LogSparse, Steps::Merged),
        MechanismSpec::Mra(blocks(&[2, 1], &[1])),
    ];
    for (place, mechanism) in of.iter().enumerate() {
        let mut decoder = Decoder::new(&Subject::new(spec(mechanism.clone(), true), 4));
        let mut other = Decoder::new(&Subject::new(spec(of[(place + 1) % 3].clone(), true), 4));
        other.read(&x, 2, None, &Trace::new());
        std::mem::swap(&mut decoder.state, &mut other.state);
        let (trace, here) = (Trace::new(), Signal::from(x.narrow(1, 2, 1).unwrap()));
        let cx = Context {
            offset: 2,
            ..Context::new(&trace)
        };
        let said = decoder
            .attention
            .forward(&here, &cx, Some(&mut decoder.state));
        assert!(said.unwrap_err().to_string().starts_with("decode state"));
        assert!(!matches!(decoder.state, MixerState::Empty));
    }
}
