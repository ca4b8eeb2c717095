//! The properties of the block in Turner, An Introduction to Transformers (2023, arXiv
//! 2304.10557), against a slow block written here in plain loops.
//!
//! The note's matrices hold a token in each *column*: `X` is `D × N`, `A` has columns that sum
//! to one, and `Y = X A`. Tensors here hold a token in each *row*: `x = Xᵀ`, and the site
//! `attention.weights` is `Aᵀ`, whose rows sum to one.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod attention;
mod special_cases;

use crate::common::{
    Map, assert_near, build, contracted, difference, draw, gradient_error, random, tensor, values,
};
use lapidary_kernels::Tensor;
use lapidary_parts::Context;
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::position::{PositionSpec, RotarySpec};
use lapidary_parts::state::MixerState;
use lapidary_signal::meter::Meter;
use lapidary_signal::{Linear, Signal, Trace};

/// Features `D`.
const D: usize = 8;

/// Tokens `N`.
const N: usize = 5;

/// Heads `H`.
const H: usize = 2;

/// Features of a query or key, `K = D / H`.
const K: usize = D / H;

// The reference, in the note's own notation.

/// `matrix[row][column]`.
type Matrix = Vec<Vec<f64>>;

fn zeros(rows: usize, columns: usize) -> Matrix {
    vec![vec![0.0; columns]; rows]
}

fn times(a: &Matrix, b: &Matrix) -> Matrix {
    let mut c = zeros(a.len(), b[0].len());
    for i in 0..a.len() {
        for j in 0..b[0].len() {
            for k in 0..b.len() {
                c[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    c
}

fn plus(a: &Matrix, b: &Matrix) -> Matrix {
    let mut c = a.clone();
    for (row, other) in c.iter_mut().zip(b) {
        for (x, y) in row.iter_mut().zip(other) {
            *x += y;
        }
    }
    c
}

fn transposed(a: &Matrix) -> Matrix {
    let mut t = zeros(a[0].len(), a.len());
    for (i, row) in a.iter().enumerate() {
        for (j, x) in row.iter().enumerate() {
            t[j][i] = *x;
        }
    }
    t
}

/// A tensor `[rows, columns]` as a matrix.
fn matrix(t: &Tensor) -> Matrix {
    t.to_vec2().unwrap()
}

/// Tokens `[1, N, D]` as the note's `D × N`.
fn columns(x: &Tensor) -> Matrix {
    transposed(&matrix(&x.squeeze(0).unwrap()))
}

/// The note's `D × N` as tokens `[1, N, D]`.
fn tokens_of(x: &Matrix) -> Tensor {
    let (d, n) = (x.len(), x[0].len());
    tensor(transposed(x).concat(), &[1, n, d])
}

/// One head: `U_q`, `U_k` `K × D` and `V` `D × D`.
struct Head {
    u_query: Matrix,
    u_key: Matrix,
    v: Matrix,
}

/// `A[n][n']`: how much of token `n` of `source` goes to token `n'` of `x`.
fn attention_matrix(
    head: &Head,
    source: &Matrix,
    x: &Matrix,
    scale: f64,
    keep: impl Fn(usize, usize) -> bool,
) -> Matrix {
    let (keys, queries) = (times(&head.u_key, source), times(&head.u_query, x));
    let mut a = zeros(source[0].len(), x[0].len());
    for to in 0..x[0].len() {
        let mut total = 0.0;
        for from in 0..source[0].len() {
            if keep(from, to) {
                let product: f64 = (0..keys.len())
                    .map(|k| keys[k][from] * queries[k][to])
                    .sum();
                a[from][to] = (scale * product).exp();
                total += a[from][to];
            }
        }
        for row in &mut a {
            row[to] /= total;
        }
    }
    a
}

/// `Σ_h V_h X A_h`.
fn multi_head(
    heads: &[Head],
    source: &Matrix,
    x: &Matrix,
    scale: f64,
    keep: impl Fn(usize, usize) -> bool + Copy,
) -> Matrix {
    let mut y = zeros(x.len(), x[0].len());
    for head in heads {
        let a = attention_matrix(head, source, x, scale, keep);
        y = plus(&y, &times(&times(&head.v, source), &a));
    }
    y
}

/// TokenNorm: each column's mean over features taken off, divided by its deviation.
fn token_norm(x: &Matrix, gamma: &[f64], beta: &[f64], epsilon: f64) -> Matrix {
    let (d, n) = (x.len(), x[0].len());
    let mut y = zeros(d, n);
    for token in 0..n {
        let mean = (0..d).map(|i| x[i][token]).sum::<f64>() / d as f64;
        let variance = (0..d).map(|i| (x[i][token] - mean).powi(2)).sum::<f64>() / d as f64;
        for i in 0..d {
            y[i][token] = gamma[i] * (x[i][token] - mean) / (variance + epsilon).sqrt() + beta[i];
        }
    }
    y
}

/// The error function by its series, which converges everywhere.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn nonlinearity(activation: ActivationSpec, x: f64) -> f64 {
    match activation {
        ActivationSpec::Relu => x.max(0.0),
        ActivationSpec::Gelu => x * 0.5 * (1.0 + erf(x / 2f64.sqrt())),
        other => panic!("the note uses no {other:?}"),
    }
}

/// The note's block, with the parameters of a [`BlockSpec`].
struct Reference<'a> {
    spec: &'a BlockSpec,
    map: &'a Map,
}

impl Reference<'_> {
    fn heads(&self) -> Vec<Head> {
        let part = |name: &str| matrix(&self.map[&format!("attention.{name}.weight")]);
        let (query, key) = (part("query"), part("key"));
        let (value, output) = (part("value"), part("output"));
        let width = query.len() / H;
        (0..H)
            .map(|h| {
                let rows = h * width..(h + 1) * width;
                let w_output = output
                    .iter()
                    .map(|row| row[rows.clone()].to_vec())
                    .collect();
                Head {
                    u_query: query[rows.clone()].to_vec(),
                    u_key: key[rows.clone()].to_vec(),
                    v: times(&w_output, &value[rows].to_vec()),
                }
            })
            .collect()
    }

    fn norm(&self, name: &str, x: &Matrix) -> Matrix {
        let part = |part: &str| values(&self.map[&format!("{name}_norm.{part}")]);
        token_norm(x, &part("weight"), &part("bias"), EPSILON)
    }

    fn mlp(&self, x: &Matrix, activation: ActivationSpec) -> Matrix {
        let layer = |name: &str, x: &Matrix| {
            let bias = values(&self.map[&format!("feedforward.{name}.bias")]);
            let mut y = times(&matrix(&self.map[&format!("feedforward.{name}.weight")]), x);
            for (row, bias) in y.iter_mut().zip(bias) {
                row.iter_mut().for_each(|y| *y += bias);
            }
            y
        };
        let mut hidden = layer("up", x);
        for row in &mut hidden {
            row.iter_mut()
                .for_each(|h| *h = nonlinearity(activation, *h));
        }
        layer("down", &hidden)
    }

    fn run(&self, x: &Matrix) -> Matrix {
        let MixerSpec::MultiHead(attention) = &self.spec.attention else {
            panic!("the note's block has attention")
        };
        let Some(FeedforwardSpec::Dense(dense)) = &self.spec.feedforward else {
            panic!("the note's block has an MLP")
        };
        let heads = self.heads();
        let scale = 1.0 / (heads[0].u_query.len() as f64).sqrt();
        let causal = attention.causal;
        let mhsa = |x: &Matrix| multi_head(&heads, x, x, scale, |from, to| !causal || from <= to);
        let mlp = |x: &Matrix| self.mlp(x, dense.activation);
        if self.spec.wiring == Wiring::PostNorm {
            let y = self.norm("attention", &plus(x, &mhsa(x)));
            self.norm("feedforward", &plus(&y, &mlp(&y)))
        } else {
            let y = plus(x, &mhsa(&self.norm("attention", x)));
            plus(&y, &mlp(&self.norm("feedforward", &y)))
        }
    }
}

// The block under test.

const EPSILON: f64 = 1e-5;

fn attention() -> MultiHeadSpec {
    MultiHeadSpec {
        bias: false,
        ..MultiHeadSpec::new(H)
    }
}

fn block_with(attention: MultiHeadSpec) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        wiring: Wiring::PreNorm,
        norm: NormSpec::Layer { epsilon: EPSILON },
        attention: MixerSpec::MultiHead(attention),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 4 * D,
            activation: ActivationSpec::Gelu,
            bias: true,
        })),
        dropout: 0.0,
    }
}

fn drawn(spec: &BlockSpec) -> Map {
    draw(11, |p| Block::new(spec, D, p))
}

fn run_traced(spec: &BlockSpec, map: &Map, x: &Tensor, trace: &Trace) -> Tensor {
    let block = build(map, |p| Block::new(spec, D, p)).unwrap();
    let x = Signal::from(x.clone());
    let y = block.forward(x, &Context::new(trace), None).unwrap();
    y.into_value()
}

fn run(spec: &BlockSpec, map: &Map, x: &Tensor) -> Tensor {
    run_traced(spec, map, x, &Trace::new())
}

/// What the block wrote at one of its sites.
fn site(spec: &BlockSpec, map: &Map, x: &Tensor, name: &str) -> Tensor {
    let trace = Trace::new().capture(name).unwrap();
    run_traced(spec, map, x, &trace);
    trace.signal(name).unwrap().into_value()
}

/// Attention weights `[1, heads, query, key]`.
fn weights(spec: &BlockSpec, map: &Map, x: &Tensor) -> Tensor {
    site(spec, map, x, "attention.weights")
}

fn tokens() -> Tensor {
    random(&[1, N, D], 21)
}

/// The rows of `x` `[1, N, D]` in another order.
fn permuted(x: &Tensor) -> Tensor {
    let order = Tensor::new(&[3u32, 0, 4, 2, 1], x.device()).unwrap();
    x.index_select(&order, 1).unwrap()
}

fn with_row(x: &Tensor, row: usize, seed: u64) -> Tensor {
    let other = random(&[1, 1, D], seed);
    let before = x.narrow(1, 0, row).unwrap();
    let after = x.narrow(1, row + 1, N - row - 1).unwrap();
    Tensor::cat(&[&before, &other, &after], 1).unwrap()
}

/// Whether each token differs between `a` and `b`.
fn changed(a: &Tensor, b: &Tensor) -> Vec<bool> {
    (0..N)
        .map(|n| difference(&a.narrow(1, n, 1).unwrap(), &b.narrow(1, n, 1).unwrap()) > 0.0)
        .collect()
}

fn identity(size: usize) -> Tensor {
    let entry = |i: usize| if i / size == i % size { 1.0 } else { 0.0 };
    tensor((0..size * size).map(entry).collect(), &[size, size])
}

#[test]
fn the_block_equals_the_notes_equations() {
    for wiring in [Wiring::PreNorm, Wiring::PostNorm] {
        for activation in [ActivationSpec::Gelu, ActivationSpec::Relu] {
            for causal in [false, true] {
                let mut spec = block_with(MultiHeadSpec {
                    causal,
                    ..attention()
                });
                spec.wiring = wiring;
                if let Some(FeedforwardSpec::Dense(dense)) = &mut spec.feedforward {
                    dense.activation = activation;
                }
                let map = drawn(&spec);
                let reference = Reference {
                    spec: &spec,
                    map: &map,
                };
                let expected = tokens_of(&reference.run(&columns(&tokens())));
                let what = format!("{wiring:?} {activation:?} causal: {causal}");
                assert_near(&run(&spec, &map, &tokens()), &expected, 1e-10, &what);
            }
        }
    }
}

#[test]
fn permuting_tokens_permutes_outputs_until_positions_break_it() {
    let spec = block_with(attention());
    let map = drawn(&spec);
    let x = tokens();
    let of_permuted = run(&spec, &map, &permuted(&x));
    assert_near(
        &of_permuted,
        &permuted(&run(&spec, &map, &x)),
        1e-6,
        "no positions",
    );

    // Positions that are added to the tokens.
    let p = random(&[1, N, D], 22);
    let with_positions = permuted(&run(&spec, &map, &(&x + &p).unwrap()));
    let moved = run(&spec, &map, &(permuted(&x) + &p).unwrap());
    assert!(difference(&moved, &with_positions) > 1e-2);
    let restored = run(&spec, &map, &(permuted(&x) + permuted(&p)).unwrap());
    assert_near(&restored, &with_positions, 1e-6, "positions permuted too");

    // Positions inside attention.
    let rotary = block_with(MultiHeadSpec {
        position: PositionSpec::Rotary(RotarySpec::default()),
        ..attention()
    });
    let moved = run(&rotary, &map, &permuted(&x));
    assert!(difference(&moved, &permuted(&run(&rotary, &map, &x))) > 1e-2);
}

#[test]
fn token_norm_centres_scales_and_ignores_affine_changes() {
    let spec = NormSpec::Layer { epsilon: 0.0 };
    let norm = |x: &Tensor| {
        let map = Map::from([
            ("weight".to_owned(), tensor(vec![1.0; D], &[D])),
            ("bias".to_owned(), tensor(vec![0.0; D], &[D])),
        ]);
        let norm = build(&map, |p| lapidary_parts::norm::Norm::new(&spec, D, p)).unwrap();
        norm.forward(&Signal::from(x.clone())).unwrap().into_value()
    };
    let x = tokens();
    let y = norm(&x);
    let mean = y.mean(2).unwrap();
    assert_near(&mean, &mean.zeros_like().unwrap(), 1e-12, "mean");
    let variance = y.sqr().unwrap().mean(2).unwrap();
    assert_near(&variance, &variance.ones_like().unwrap(), 1e-12, "variance");
    assert_near(&norm(&x.affine(3.7, -1.2).unwrap()), &y, 1e-12, "affine");
}

#[test]
fn the_mlp_acts_on_each_token_and_attention_on_all() {
    let spec = block_with(attention());
    let map = drawn(&spec);
    let x = tokens();
    let other = with_row(&x, 2, 27);

    let Some(feedforward) = &spec.feedforward else {
        panic!("the note's block has an MLP")
    };
    let part = draw(14, |p| {
        lapidary_parts::feedforward::Feedforward::new(feedforward, D, p)
    });
    let mlp = build(&part, |p| {
        lapidary_parts::feedforward::Feedforward::new(feedforward, D, p)
    })
    .unwrap();
    let trace = Trace::new();
    let cx = Context::new(&trace);
    let run_mlp = |x: &Tensor| {
        let y = mlp.forward(&Signal::from(x.clone()), &cx).unwrap();
        y.into_value()
    };
    assert_eq!(
        changed(&run_mlp(&x), &run_mlp(&other)),
        [false, false, true, false, false]
    );
    let attended = |x: &Tensor| site(&spec, &map, x, "attention.out");
    assert_eq!(changed(&attended(&x), &attended(&other)), [true; N]);
}

#[test]
fn without_output_weights_the_block_is_the_identity() {
    let spec = block_with(attention());
    let mut map = drawn(&spec);
    for name in [
        "attention.output.weight",
        "feedforward.down.weight",
        "feedforward.down.bias",
    ] {
        map.insert(name.to_owned(), map[name].zeros_like().unwrap());
    }
    assert_near(&run(&spec, &map, &tokens()), &tokens(), 0.0, "identity");
}

#[test]
fn a_causal_mask_keeps_prefixes_and_allows_a_cache() {
    let spec = block_with(MultiHeadSpec {
        causal: true,
        ..attention()
    });
    let map = drawn(&spec);
    let x = tokens();
    let whole = run(&spec, &map, &x);
    let later = run(&spec, &map, &with_row(&x, 3, 28));
    assert_eq!(
        changed(&whole, &later),
        [false, false, false, true, true],
        "only tokens from the changed one on"
    );
    let block = build(&map, |p| Block::new(&spec, D, p)).unwrap();
    let trace = Trace::new();
    let mut state = MixerState::Empty;
    for n in 0..N {
        let cx = Context {
            offset: n,
            ..Context::new(&trace)
        };
        let token = Signal::from(x.narrow(1, n, 1).unwrap());
        let y = block.forward(token, &cx, Some(&mut state)).unwrap();
        assert_near(y.value(), &whole.narrow(1, n, 1).unwrap(), 1e-6, "cached");
    }
}

#[test]
fn adding_positions_is_concatenating_them_and_a_linear_map() {
    let spec = block_with(attention());
    let map = drawn(&spec);
    let (e, p) = (tokens(), random(&[1, N, D], 29));
    let (w_e, w_p) = (random(&[D, D], 30), random(&[D, D], 31));
    let joined = Signal::concatenate(&[Signal::from(e.clone()), Signal::from(p.clone())], 2);
    let both = Linear::new(Tensor::cat(&[&w_e, &w_p], 1).unwrap(), None).unwrap();
    let concatenated = joined.unwrap().linear(&both).unwrap().into_value();
    let apart = |x: Tensor, w: Tensor| Linear::new(w, None).unwrap().apply(&x).unwrap();
    let added = (apart(e, w_e) + apart(p, w_p)).unwrap();
    let expected = run(&spec, &map, &added);
    assert_near(
        &run(&spec, &map, &concatenated),
        &expected,
        1e-10,
        "positions",
    );
}

#[test]
fn the_gradient_of_the_whole_block_equals_central_differences() {
    for causal in [false, true] {
        let spec = block_with(MultiHeadSpec {
            causal,
            ..attention()
        });
        let mut inputs = drawn(&spec);
        inputs.insert("x".to_owned(), tokens());
        let error = gradient_error(&inputs, 40, |inputs| {
            contracted(&run(&spec, inputs, &inputs["x"]))
        });
        assert!(error < 1e-6, "{error:e}");
    }
}

#[test]
fn counted_work_and_parameters_equal_the_notes_formulas() {
    let mut spec = block_with(attention());
    spec.feedforward = Some(FeedforwardSpec::Dense(DenseSpec {
        hidden: 4 * D,
        activation: ActivationSpec::Gelu,
        bias: false,
    }));
    let map = drawn(&spec);
    let count = |prefix: &str| -> usize {
        map.iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(_, t)| t.elem_count())
            .sum()
    };
    assert_eq!(count("attention."), 4 * D * D);
    assert_eq!(count("feedforward."), 8 * D * D);
    assert_eq!(count(""), 12 * D * D + 4 * D);
    let meter = Meter::new();
    let trace = Trace::new();
    let block = build(&map, |p| Block::new(&spec, D, p)).unwrap();
    let x = Signal::from(tokens()).into_metered(meter.clone());
    block.forward(x, &Context::new(&trace), None).unwrap();
    let products = 8 * N * D * D + 4 * N * N * D + 16 * N * D * D;
    let softmax = 5 * H * N * N;
    let (norms, activation, residuals) = (2 * 8 * N * D, N * 4 * D, 2 * N * D);
    assert_eq!(
        meter.total().flops as usize,
        products + softmax + norms + activation + residuals
    );
}
