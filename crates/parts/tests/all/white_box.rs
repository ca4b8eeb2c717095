//! The exact properties of CRATE's two parts.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use crate::common;
use crate::common::{Map, assert_near, build, random, tensor, values};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::{
    MultiHeadAttention, MultiHeadSpec, OutputProjection, QueryKeySharing,
};
use lapidary_parts::block::{Block, BlockSpec};
use lapidary_parts::feedforward::{SparseCode, SparseCodeSpec};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_parts::state::MixerState;
use lapidary_parts::{Context, Result};
use lapidary_signal::{Signal, Trace};

pub const WIDTH: usize = 6;

fn code(spec: &SparseCodeSpec, dictionary: &Tensor, y: &Tensor) -> Tensor {
    let map = Map::from([("dictionary".to_owned(), dictionary.clone())]);
    let part = build(&map, |p| SparseCode::new(spec, WIDTH, p)).unwrap();
    let trace = Trace::new();
    let out = part.forward(&Signal::from(y.clone()), &Context::new(&trace));
    out.unwrap().into_value()
}

fn spec(step: f64, penalty: f64) -> SparseCodeSpec {
    SparseCodeSpec {
        atoms: None,
        step,
        penalty,
    }
}

fn relu(x: &Tensor) -> Tensor {
    x.relu().unwrap()
}

/// A rotation of the first two features, and a sign.
pub fn orthogonal() -> Tensor {
    let mut entries = vec![0.0; WIDTH * WIDTH];
    for i in 0..WIDTH {
        entries[i * WIDTH + i] = if i == 3 { -1.0 } else { 1.0 };
    }
    let (sin, cos) = 0.7f64.sin_cos();
    entries[0] = cos;
    entries[1] = -sin;
    entries[WIDTH] = sin;
    entries[WIDTH + 1] = cos;
    tensor(entries, &[WIDTH, WIDTH])
}

#[test]
fn a_step_is_a_proximal_gradient_step() {
    let (step, penalty) = (0.3, 0.2);
    let d = random(&[WIDTH, WIDTH], 1);
    let y = random(&[2, 3, WIDTH], 2);
    let flat = y.reshape((6, WIDTH)).unwrap();
    // Rows: y ↦ ReLU(y + η (y − y Dᵀ) D − ηλ).
    let error = (&flat - flat.matmul(&d.t().unwrap()).unwrap()).unwrap();
    let slope = (error.matmul(&d).unwrap() * step).unwrap();
    let expected = relu(&((&flat + slope).unwrap() - step * penalty).unwrap());
    let found = code(&spec(step, penalty), &d, &y)
        .reshape((6, WIDTH))
        .unwrap();
    assert_near(&found, &expected, 1e-12, "one step");
    assert!(values(&found).iter().all(|x| *x >= 0.0));
}

#[test]
fn an_orthogonal_dictionary_leaves_the_difference_of_two_readings() {
    let y = random(&[1, 4, WIDTH], 3);
    let d = orthogonal();
    let read = y.broadcast_matmul(&d.unsqueeze(0).unwrap()).unwrap();
    let expected = relu(&((&y + ((read - &y).unwrap() * 0.5).unwrap()).unwrap() - 0.05).unwrap());
    assert_near(&code(&spec(0.5, 0.1), &d, &y), &expected, 1e-12, "Dᵀy − y");
}

/// Iterated with the data term held at the start, steps no longer than `1 / ‖D‖²` end where the
/// non-negative LASSO is solved: `Dᵀ(D a − y) + λ` is nowhere negative, and nought where `a` is not.
#[test]
fn steps_solve_the_lasso() {
    let (penalty, atoms) = (0.15, 9);
    let d = random(&[WIDTH, atoms], 4);
    let y = random(&[1, WIDTH], 5);
    let energy: f64 = values(&d).iter().map(|x| x * x).sum();
    let step = 1.0 / energy;
    let mut a = Tensor::zeros((1, atoms), y.dtype(), &Device::Cpu).unwrap();
    let slope = |a: &Tensor| {
        let error = (a.matmul(&d.t().unwrap()).unwrap() - &y).unwrap();
        (error.matmul(&d).unwrap() + penalty).unwrap()
    };
    for _ in 0..60_000 {
        a = relu(&(&a - (slope(&a) * step).unwrap()).unwrap());
    }
    for (a, slope) in values(&a).iter().zip(values(&slope(&a))) {
        assert!(slope > -1e-6, "{slope}");
        assert!((a * slope).abs() < 1e-6, "{a} {slope}");
    }
    // The part's two steps are the first two of these.
    let over = SparseCodeSpec {
        atoms: Some(atoms),
        step,
        penalty,
    };
    let mut two = Tensor::zeros((1, atoms), y.dtype(), &Device::Cpu).unwrap();
    for _ in 0..2 {
        two = relu(&(&two - (slope(&two) * step).unwrap()).unwrap());
    }
    let expected = two.matmul(&d.t().unwrap()).unwrap();
    let found = code(&over, &d, &y.unsqueeze(0).unwrap())
        .squeeze(0)
        .unwrap();
    assert_near(&found, &expected, 1e-12, "two steps");
}

#[test]
fn a_large_penalty_leaves_nothing() {
    let d = random(&[WIDTH, 14], 6);
    let y = random(&[1, 5, WIDTH], 7);
    let over = SparseCodeSpec {
        atoms: Some(14),
        step: 0.1,
        penalty: 1e3,
    };
    assert!(values(&code(&over, &d, &y)).iter().all(|x| *x == 0.0));
}

/// With one head of the whole width and no projection, attention is `softmax(Y Yᵀ / √d) Y`.
#[test]
fn without_projections_attention_is_that_of_the_gram_matrix() {
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::All,
        bias: false,
        output: OutputProjection::Absent,
        ..MultiHeadSpec::new(1)
    };
    let eye = Tensor::eye(WIDTH, DType::F64, &Device::Cpu).unwrap();
    let map = Map::from([("query.weight".to_owned(), eye)]);
    let attention = build(&map, |p| MultiHeadAttention::new(&spec, WIDTH, p)).unwrap();
    let y = random(&[1, 5, WIDTH], 8);
    let trace = Trace::new();
    let found = attention
        .forward(&Signal::from(y.clone()), &Context::new(&trace), None)
        .unwrap();
    let rows = y.squeeze(0).unwrap();
    let scores = (rows.matmul(&rows.t().unwrap()).unwrap() / (WIDTH as f64).sqrt()).unwrap();
    let weights = scores.exp().unwrap();
    let weights = weights
        .broadcast_div(&weights.sum_keepdim(1).unwrap())
        .unwrap();
    let expected = weights.matmul(&rows).unwrap().unsqueeze(0).unwrap();
    assert_near(found.value(), &expected, 1e-12, "Gram matrix");
}

fn block(atoms: Option<usize>) -> BlockSpec {
    let atoms = atoms.map_or(String::new(), |atoms| format!("atoms = {atoms}"));
    toml::from_str(&format!(
        "wiring = 'replacing'
        attention = {{ kind = 'multi-head', heads = 2, sharing = 'all', bias = false, output_bias = true }}
        [feedforward]
        kind = 'sparse-code'
        {atoms}"
    ))
    .unwrap()
}

/// `d · K p + K p · d + d + d² + 4 d`: three squares where the usual block has twelve.
#[test]
fn a_block_has_three_squares_of_parameters() {
    let spec = block(None);
    let map = common::draw(1, |p| Block::new(&spec, WIDTH, p));
    let count: usize = map.values().map(Tensor::elem_count).sum();
    assert_eq!(count, 3 * WIDTH * WIDTH + 5 * WIDTH);
}

#[test]
fn tokens_may_change_places() {
    let spec = block(None);
    let map = common::draw(2, |p| Block::new(&spec, WIDTH, p));
    let block = build(&map, |p| Block::new(&spec, WIDTH, p)).unwrap();
    let x = random(&[1, 4, WIDTH], 9);
    let order = Tensor::new(&[2u32, 0, 3, 1], &Device::Cpu).unwrap();
    let moved = x.index_select(&order, 1).unwrap();
    let run = |x: &Tensor| -> Result<Tensor> {
        let trace = Trace::new();
        Ok(block
            .forward(Signal::from(x.clone()), &Context::new(&trace), None)?
            .into_value())
    };
    let expected = run(&x).unwrap().index_select(&order, 1).unwrap();
    assert_near(&run(&moved).unwrap(), &expected, 1e-12, "moved");
}

/// A decoder's step after an encoder's with the same weights leaves `κ² A'(Z) A(Z)`: with an orthogonal
/// dictionary, nothing taken off the code and no norms.
#[test]
fn a_reversed_block_takes_a_step_back() {
    let of = |wiring: &str, feedforward: &str| -> BlockSpec {
        toml::from_str(&format!(
            "wiring = '{wiring}'
            norm = {{ kind = 'none' }}
            attention = {{ kind = 'multi-head', heads = 2, sharing = 'all', bias = false }}
            feedforward = {feedforward}"
        ))
        .unwrap()
    };
    let encoder = of(
        "replacing",
        "{ kind = 'sparse-code', step = 1.0, penalty = 0.0 }",
    );
    let decoder = of("reversed", "{ kind = 'linear', bias = false }");
    // Another order of the features: codes of what is positive are positive.
    let order = Tensor::new(&[2u32, 0, 1, 5, 3, 4], &Device::Cpu).unwrap();
    let dictionary = Tensor::eye(WIDTH, DType::F64, &Device::Cpu).unwrap();
    let dictionary = dictionary.index_select(&order, 0).unwrap();
    let x = (random(&[1, 5, WIDTH], 12).abs().unwrap() + 1.0).unwrap();
    // What attention reads by, and what it writes by: drawn, and tied as in the derivation.
    let drawn = [11, 13].map(|seed| random(&[WIDTH, WIDTH], seed));
    let tied = [
        orthogonal(),
        orthogonal().t().unwrap().contiguous().unwrap(),
    ];
    let error = |[query, output]: &[Tensor; 2], scale: f64| {
        let output = (output * scale).unwrap();
        let attention = [
            ("attention.query.weight".to_owned(), query.clone()),
            ("attention.output.weight".to_owned(), output),
        ];
        let mut map = Map::from(attention);
        map.insert("feedforward.dictionary".to_owned(), dictionary.clone());
        map.insert("feedforward.map.weight".to_owned(), dictionary.clone());
        let trace = Trace::new();
        let mut y = Signal::from(x.clone());
        for spec in [&encoder, &decoder] {
            let block = build(&map, |p| Block::new(spec, WIDTH, p)).unwrap();
            y = block.forward(y, &Context::new(&trace), None).unwrap();
        }
        let squares = (y.value() - &x).unwrap().sqr().unwrap();
        values(&squares).iter().sum::<f64>().sqrt()
    };
    for weights in [drawn, tied] {
        let slope = (error(&weights, 0.02) / error(&weights, 0.01)).log2();
        assert!((slope - 2.0).abs() < 0.1, "{slope}");
        assert!(error(&weights, 0.0) < 1e-12);
    }
}

/// Written by the bases that it is read by, attention is the derived step, `Σ_k U_k (U_kᵀ Z) softmax((U_kᵀ Z)ᵀ (U_kᵀ Z))`.
#[test]
fn tied_projections_make_the_derived_step() {
    const HEADS: usize = 2;
    const EACH: usize = WIDTH / HEADS;
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::All,
        bias: false,
        output: OutputProjection::Tied,
        scale: Some(1.0),
        ..MultiHeadSpec::new(HEADS)
    };
    // Rows are the bases of both heads.
    let bases = orthogonal();
    let map = Map::from([("query.weight".to_owned(), bases.clone())]);
    let attention = build(&map, |p| MultiHeadAttention::new(&spec, WIDTH, p)).unwrap();
    let y = random(&[1, 5, WIDTH], 17);
    let trace = Trace::new();
    let found = attention
        .forward(&Signal::from(y.clone()), &Context::new(&trace), None)
        .unwrap();
    let rows = y.squeeze(0).unwrap();
    let mut expected = rows.zeros_like().unwrap();
    for head in 0..HEADS {
        let basis = bases.narrow(0, head * EACH, EACH).unwrap();
        let w = rows.matmul(&basis.t().unwrap()).unwrap();
        let weights = w.matmul(&w.t().unwrap()).unwrap().exp().unwrap();
        let weights = weights
            .broadcast_div(&weights.sum_keepdim(1).unwrap())
            .unwrap();
        let part = weights.matmul(&w).unwrap().matmul(&basis).unwrap();
        expected = (expected + part).unwrap();
    }
    assert_near(
        found.value(),
        &expected.unsqueeze(0).unwrap(),
        1e-12,
        "derived",
    );
}

/// The attention of `spec` with parameters of its own, for `y` `[batch, length, WIDTH]`.
fn attended(spec: &MultiHeadSpec, map: &Map, y: &Tensor) -> Tensor {
    let attention = build(map, |p| MultiHeadAttention::new(spec, WIDTH, p)).unwrap();
    let trace = Trace::new();
    let y = attention.forward(&Signal::from(y.clone()), &Context::new(&trace), None);
    y.unwrap().into_value()
}

/// Tied and absent outputs are those of matrices that say the same, and have no parameters.
#[test]
fn outputs_without_a_matrix_of_their_own() {
    let y = random(&[2, 5, WIDTH], 18);
    let own = MultiHeadSpec {
        sharing: QueryKeySharing::All,
        output_bias: Some(false),
        ..MultiHeadSpec::new(2)
    };
    let with = |output| MultiHeadSpec {
        output,
        ..own.clone()
    };
    let names = |map: &Map| map.keys().cloned().collect::<Vec<_>>();
    for output in [OutputProjection::Tied, OutputProjection::Absent] {
        let spec = with(output);
        let mut map = common::draw(6, |p| MultiHeadAttention::new(&spec, WIDTH, p));
        assert_eq!(names(&map), ["query.bias", "query.weight"]);
        let found = attended(&spec, &map, &y);
        let written = match output {
            OutputProjection::Tied => map["query.weight"].t().unwrap().contiguous().unwrap(),
            _ => Tensor::eye(WIDTH, DType::F64, &Device::Cpu).unwrap(),
        };
        map.insert("output.weight".to_owned(), written);
        assert_near(&found, &attended(&own, &map, &y), 1e-12, output.name());
    }
}

/// The matrix gets a gradient from both of its places, factorised too.
#[test]
fn a_tied_matrix_learns_where_it_reads_and_where_it_writes() {
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::All,
        bias: false,
        output: OutputProjection::Tied,
        ..MultiHeadSpec::new(2)
    };
    let y = random(&[1, 4, WIDTH], 19);
    for rank in [None, Some(3)] {
        let ranks: BTreeMap<String, usize> = rank
            .map(|rank| ("query".to_owned(), rank))
            .into_iter()
            .collect();
        let run = |map: &Map| {
            let (mut map, mut linears) = (map.clone(), Vec::new());
            let parameters = Parameters::new(&mut map, &ranks, &mut linears);
            let attention = MultiHeadAttention::new(&spec, WIDTH, parameters).unwrap();
            let trace = Trace::new();
            let y = attention.forward(&Signal::from(y.clone()), &Context::new(&trace), None);
            y.unwrap().into_value()
        };
        let map = match rank {
            None => Map::from([("query.weight".to_owned(), random(&[WIDTH, WIDTH], 20))]),
            Some(rank) => Map::from([
                ("query.down".to_owned(), random(&[rank, WIDTH], 21)),
                ("query.up".to_owned(), random(&[WIDTH, rank], 22)),
            ]),
        };
        if rank.is_some() {
            let product = map["query.up"].matmul(&map["query.down"]).unwrap();
            let dense = Map::from([("query.weight".to_owned(), product)]);
            assert_near(&run(&map), &attended(&spec, &dense, &y), 1e-12, "factors");
        }
        let error = common::gradient_error(&map, 4, |map| common::contracted(&run(map)));
        assert!(error < 1e-6, "{rank:?}: {error:e}");
    }
}

/// The layers of one head each are listed once, and keys are what queries are.
#[test]
fn shared_projections_are_one_layer() {
    let spec = block(None);
    let mut map = common::draw(3, |p| Block::new(&spec, WIDTH, p));
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    Block::new(
        &spec,
        WIDTH,
        Parameters::new(&mut map, &ranks, &mut linears),
    )
    .unwrap();
    let paths: Vec<&str> = linears.iter().map(|linear| linear.path.as_str()).collect();
    assert_eq!(paths, ["attention.query", "attention.output"]);
    // A cache still works.
    let causal: BlockSpec = toml::from_str(
        "wiring = 'replacing'
        attention = { kind = 'multi-head', heads = 2, sharing = 'all', causal = true, bias = false }
        feedforward = { kind = 'sparse-code' }",
    )
    .unwrap();
    let map = common::draw(4, |p| Block::new(&causal, WIDTH, p));
    let block = build(&map, |p| Block::new(&causal, WIDTH, p)).unwrap();
    let x = random(&[1, 4, WIDTH], 10);
    let trace = Trace::new();
    let whole = block
        .forward(Signal::from(x.clone()), &Context::new(&trace), None)
        .unwrap();
    let mut state = MixerState::Empty;
    for offset in 0..4 {
        let cx = Context {
            offset,
            ..Context::new(&trace)
        };
        let token = Signal::from(x.narrow(1, offset, 1).unwrap());
        let y = block.forward(token, &cx, Some(&mut state)).unwrap();
        assert_near(
            y.value(),
            &whole.value().narrow(1, offset, 1).unwrap(),
            1e-12,
            "cached",
        );
    }
    // Keys are values: half of what others hold.
    let MixerState::Cache(cache) = &state else {
        panic!("{state:?}");
    };
    assert!(cache.is_single());
}

/// Turned by their positions, keys are no values any more, and both are held.
#[test]
fn turned_keys_are_held_beside_their_values() {
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::All,
        causal: true,
        position: toml::from_str("kind = 'rotary'").unwrap(),
        ..MultiHeadSpec::new(1)
    };
    let state = decoded(&spec, Trace::new());
    let MixerState::Cache(cache) = &state else {
        panic!("{state:?}");
    };
    assert!(!cache.is_single());
}

/// Values that somebody changes at their site are others than keys, and remembered as such.
#[test]
fn changed_values_are_held_beside_their_keys() {
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::All,
        causal: true,
        ..MultiHeadSpec::new(2)
    };
    let twice = Trace::new().replace("*value", |_, value| value.scale(2.0));
    let state = decoded(&spec, twice.unwrap());
    let MixerState::Cache(cache) = &state else {
        panic!("{state:?}");
    };
    assert!(!cache.is_single());
}

/// What is remembered of a sequence that is read in parts, which gives what the whole gives.
fn decoded(spec: &MultiHeadSpec, trace: Trace) -> MixerState {
    let map = common::draw(5, |p| MultiHeadAttention::new(spec, WIDTH, p));
    let attention = build(&map, |p| MultiHeadAttention::new(spec, WIDTH, p)).unwrap();
    let x = random(&[1, 5, WIDTH], 14);
    let whole = attention
        .forward(&Signal::from(x.clone()), &Context::new(&trace), None)
        .unwrap();
    let mut state = MixerState::Empty;
    for (offset, length) in [(0, 3), (3, 1), (4, 1)] {
        let cx = Context {
            offset,
            ..Context::new(&trace)
        };
        let tokens = Signal::from(x.narrow(1, offset, length).unwrap());
        let y = attention.forward(&tokens, &cx, Some(&mut state)).unwrap();
        let expected = whole.value().narrow(1, offset, length).unwrap();
        assert_near(y.value(), &expected, 1e-12, "cached");
    }
    state
}

/// Takes down how parameters start.
struct Starts(Vec<(String, Init)>);

impl ParameterSource for Starts {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        self.0.push((name.to_owned(), init));
        Ok(Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap())
    }
}

/// Square or not, `D` starts uniform between `±√(6 / width)`, as in both published programs: what counts is how many
/// features a coefficient reads, not how many coefficients there are.
#[test]
fn dictionaries_start_as_the_published_ones() {
    for atoms in [None, Some(4 * WIDTH)] {
        let spec = SparseCodeSpec {
            atoms,
            ..SparseCodeSpec::default()
        };
        let mut starts = Starts(Vec::new());
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let parameters = Parameters::new(&mut starts, &ranks, &mut linears);
        SparseCode::new(&spec, WIDTH, parameters).unwrap();
        let most = (6.0 / WIDTH as f64).sqrt();
        let expected = Init::Uniform {
            low: -most,
            high: most,
        };
        assert_eq!(starts.0, [("dictionary".to_owned(), expected)]);
    }
}

/// What a reversed block's map gives takes the place of the stream: it begins as wide as a dictionary does. Beside a
/// residual it begins small.
#[test]
fn a_map_that_replaces_begins_as_wide_as_a_dictionary() {
    let most = (6.0 / WIDTH as f64).sqrt();
    let wide = Init::Uniform {
        low: -most,
        high: most,
    };
    let small = Init::Normal { deviation: 0.02 };
    for (wiring, expected) in [("reversed", wide), ("pre-norm", small)] {
        let spec: BlockSpec = toml::from_str(&format!(
            "wiring = '{wiring}'
            attention = {{ kind = 'multi-head', heads = 2, sharing = 'all', bias = false }}
            feedforward = {{ kind = 'linear' }}"
        ))
        .unwrap();
        let mut starts = Starts(Vec::new());
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let parameters = Parameters::new(&mut starts, &ranks, &mut linears);
        Block::new(&spec, WIDTH, parameters).unwrap();
        let of = |name: &str| {
            let named = starts.0.iter().find(|(known, _)| known == name);
            named.map(|(_, init)| *init)
        };
        assert_eq!(of("feedforward.map.weight"), Some(expected), "{wiring}");
        assert_eq!(of("feedforward.map.bias"), Some(Init::Zeros), "{wiring}");
    }
}

/// The code of an over-complete dictionary, which the part reads back, has no negative entry.
#[test]
fn codes_of_many_atoms_are_nowhere_negative() {
    const ATOMS: usize = 4 * WIDTH;
    let d = random(&[WIDTH, ATOMS], 15);
    let map = Map::from([("dictionary".to_owned(), d.clone())]);
    let over = SparseCodeSpec {
        atoms: Some(ATOMS),
        ..spec(0.1, 0.1)
    };
    let part = build(&map, |p| SparseCode::new(&over, WIDTH, p)).unwrap();
    let trace = Trace::new().capture(".code").unwrap();
    let x = Signal::from(random(&[2, 7, WIDTH], 16));
    let out = part.forward(&x, &Context::new(&trace)).unwrap();
    let code = trace.signal(".code").unwrap().value().clone();
    let entries = values(&code);
    assert!(entries.iter().all(|entry| *entry >= 0.0));
    assert!(entries.contains(&0.0) && entries.iter().any(|entry| *entry > 0.0));
    let read = code.reshape((14, ATOMS)).unwrap();
    let read = read.matmul(&d.t().unwrap()).unwrap();
    assert_near(
        out.value(),
        &read.reshape((2, 7, WIDTH)).unwrap(),
        1e-12,
        "D a",
    );
}
