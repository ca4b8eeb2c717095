//! One attention with drawn parameters, and what passes through it, for tests that compute the same
//! by brute force.

use super::{Map, assert_near, build, draw, random, values};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec};
use lapidary_parts::state::MixerState;
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};

pub const WIDTH: usize = 6;
pub const HEADS: usize = 2;
pub const HEAD_WIDTH: usize = WIDTH / HEADS;

/// What a pass is given beside the tokens.
#[derive(Clone, Copy, Default)]
pub struct Given<'a> {
    pub keep: Option<&'a Tensor>,
    pub draw: Option<u64>,
    pub dropout_seed: Option<u64>,
}

/// An attention whose parameters are drawn.
pub struct Subject {
    pub spec: MultiHeadSpec,
    pub map: Map,
}

/// Queries, keys, values and what becomes of them, `[batch, length, heads · width]` flat, and the
/// weights, `[batch, heads, query, key]` flat.
pub struct Run {
    pub length: usize,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    pub mixed: Vec<f64>,
    pub weights: Vec<f64>,
}

pub fn spec(mechanism: MechanismSpec, causal: bool) -> MultiHeadSpec {
    MultiHeadSpec {
        causal,
        mechanism,
        ..MultiHeadSpec::new(HEADS)
    }
}

impl Subject {
    pub fn new(spec: MultiHeadSpec, seed: u64) -> Self {
        let map = draw(seed, |p| MultiHeadAttention::new(&spec, WIDTH, p));
        Self { spec, map }
    }

    pub fn attention(&self) -> MultiHeadAttention {
        build(&self.map, |p| MultiHeadAttention::new(&self.spec, WIDTH, p)).unwrap()
    }

    pub fn pass(&self, x: &Tensor, given: Given<'_>, sites: &str) -> (Tensor, Trace) {
        let trace = Trace::new().capture(sites).unwrap();
        let cx = Context {
            key_padding: given.keep,
            draw: given.draw,
            dropout_seed: given.dropout_seed,
            ..Context::new(&trace)
        };
        let y = self
            .attention()
            .forward(&Signal::from(x.clone()), &cx, None);
        (y.unwrap().into_value(), trace)
    }

    pub fn output(&self, x: &Tensor, given: Given<'_>) -> Tensor {
        self.pass(x, given, "none").0
    }

    /// Asserts that pads on either side of nine tokens change nothing for these.
    pub fn check_pads(&self, what: &str) {
        let x = random(&[1, 9, WIDTH], 1);
        let junk = random(&[1, 3, WIDTH], 2);
        let alone = self.output(&x, Given::default());
        for (left, right) in [(0, 3), (3, 0), (1, 2)] {
            let parts = [
                junk.narrow(1, 0, left).unwrap(),
                x.clone(),
                junk.narrow(1, left, right).unwrap(),
            ];
            let padded = Tensor::cat(&parts, 1).unwrap();
            let keep: Vec<u8> = (0..12)
                .map(|j| u8::from((left..left + 9).contains(&j)))
                .collect();
            let keep = mask(&[&keep]);
            let given = Given {
                keep: Some(&keep),
                ..Given::default()
            };
            let y = self.output(&padded, given).narrow(1, left, 9).unwrap();
            assert_near(&y, &alone, 1e-12, what);
        }
    }

    /// Everything, the output by the way that lays no weights out.
    pub fn run(&self, x: &Tensor, given: Given<'_>) -> Run {
        let (_, plain) = self.pass(x, given, "*.{query,key,value,mixed}");
        let (_, laid) = self.pass(x, given, "*.weights");
        let of = |trace: &Trace, name: &str| match trace.signal(name) {
            Ok(signal) => values(signal.value()),
            Err(_) => Vec::new(),
        };
        Run {
            length: x.dims()[1],
            q: of(&plain, ".query"),
            k: of(&plain, ".key"),
            v: of(&plain, ".value"),
            mixed: of(&plain, ".mixed"),
            weights: of(&laid, ".weights"),
        }
    }

    /// Decodes `x` in steps of so many tokens.
    pub fn decode(&self, x: &Tensor, steps: &[usize]) -> Tensor {
        let attention = self.attention();
        let (trace, mut state, mut offset) = (Trace::new(), MixerState::Empty, 0);
        let mut outputs = Vec::new();
        for &step in steps {
            let cx = Context {
                offset,
                ..Context::new(&trace)
            };
            let here = Signal::from(x.narrow(1, offset, step).unwrap());
            let y = attention.forward(&here, &cx, Some(&mut state));
            outputs.push(y.unwrap().into_value());
            offset += step;
        }
        Tensor::cat(&outputs, 1).unwrap()
    }

    /// Operations of one sequence of `length` tokens, projections left out.
    pub fn mixing_operations(&self, length: usize) -> u64 {
        let operations = |spec: &MultiHeadSpec| {
            let meter = Meter::new();
            let trace = Trace::new();
            let map = draw(1, |p| MultiHeadAttention::new(spec, WIDTH, p));
            let attention = build(&map, |p| MultiHeadAttention::new(spec, WIDTH, p)).unwrap();
            let x = Signal::from(random(&[1, length, WIDTH], 3)).into_metered(meter.clone());
            attention.forward(&x, &Context::new(&trace), None).unwrap();
            meter.total().flops
        };
        // What dense attention has beside its pairs is what this one has beside its own.
        let dense = MultiHeadSpec {
            causal: true,
            mechanism: MechanismSpec::Softmax,
            ..self.spec.clone()
        };
        let pairs = (length * (length + 1) / 2 * HEADS * (4 * HEAD_WIDTH + 5)) as u64;
        operations(&self.spec) - (operations(&dense) - pairs)
    }
}

impl Run {
    fn head<'a>(&self, x: &'a [f64], batch: usize, head: usize, token: usize) -> &'a [f64] {
        &x[(batch * self.length + token) * WIDTH + head * HEAD_WIDTH..][..HEAD_WIDTH]
    }

    pub fn query(&self, batch: usize, head: usize, token: usize) -> &[f64] {
        self.head(&self.q, batch, head, token)
    }

    pub fn key(&self, batch: usize, head: usize, token: usize) -> &[f64] {
        self.head(&self.k, batch, head, token)
    }

    pub fn weight(&self, batch: usize, head: usize, query: usize, key: usize) -> f64 {
        self.weights[((batch * HEADS + head) * self.length + query) * self.length + key]
    }

    /// Asserts that weights are `expected`, and that values were mixed by them.
    pub fn check(
        &self,
        batch: usize,
        expected: impl Fn(usize, usize, usize) -> Vec<f64>,
        tolerance: f64,
        what: &str,
    ) {
        for sequence in 0..batch {
            for head in 0..HEADS {
                for i in 0..self.length {
                    let expected = expected(sequence, head, i);
                    for (j, &weight) in expected.iter().enumerate() {
                        let found = self.weight(sequence, head, i, j);
                        assert!(
                            (found - weight).abs() < tolerance,
                            "{what}: {i} gives {j} {found}, not {weight}"
                        );
                    }
                    let mixed = self.head(&self.mixed, sequence, head, i);
                    for (feature, &found) in mixed.iter().enumerate() {
                        let value = |j: usize| self.head(&self.v, sequence, head, j)[feature];
                        let sum: f64 = expected.iter().enumerate().map(|(j, w)| w * value(j)).sum();
                        assert!((found - sum).abs() < tolerance, "{what}: output of {i}");
                    }
                }
            }
        }
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Softmax over scores, `-∞` and nothing but that being zeros.
pub fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::MIN, f64::max);
    let exponentials: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    let share = |e: f64| if sum > 0.0 { e / sum } else { 0.0 };
    exponentials.into_iter().map(share).collect()
}

pub fn mask(rows: &[&[u8]]) -> Tensor {
    let shape = (rows.len(), rows[0].len());
    Tensor::from_vec(rows.concat(), shape, &Device::Cpu).unwrap()
}

/// The exponent with which `of` grows from `n` to `4 n`.
pub fn growth(n: usize, of: impl Fn(usize) -> u64) -> f64 {
    (of(4 * n) as f64 / of(n) as f64).ln() / 4f64.ln()
}
