//! What the tests of parts share: drawn parameters, comparison, and gradient checking.
#![allow(dead_code, reason = "a test that stands alone uses some of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

pub mod attention;

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::Result;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::Heads;
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_parts::position::{Position, PositionSpec, Span};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Named parameters.
pub type Map = BTreeMap<String, Tensor>;

/// Draws every parameter, wide enough that a wrong bias, scale or transpose shows.
pub struct Drawn {
    rng: ChaCha8Rng,
    pub map: Map,
}

impl Drawn {
    pub fn new(seed: u64) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            map: Map::new(),
        }
    }
}

impl ParameterSource for Drawn {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let (mean, deviation) = match init {
            Init::Zeros => (0.0, 0.2),
            Init::Ones => (1.0, 0.2),
            Init::Normal { .. } => (0.0, 0.4),
            Init::Constant(number) => (number, 0.1),
            Init::Uniform { low, high } => ((low + high) / 2.0, (high - low) / 12f64.sqrt()),
            Init::LogRange => (0.5, 0.4),
            Init::Spaced { first, last } => ((first + last) / 2.0, 0.4),
            Init::InverseSoftplusLogUniform { .. } => (-1.0, 0.5),
        };
        let values = (0..shape.iter().product())
            .map(|_| mean + deviation * normal(&mut self.rng))
            .collect();
        let tensor = tensor(values, shape);
        self.map.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    }
}

pub fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * rng.random::<f64>()).cos()
}

/// Standard normal numbers in f64.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product())
        .map(|_| normal(&mut rng))
        .collect();
    tensor(values, shape)
}

pub fn tensor(values: Vec<f64>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Draws the parameters of whatever `build` builds.
pub fn draw<T>(seed: u64, build: impl Fn(Parameters<'_>) -> Result<T>) -> Map {
    let mut drawn = Drawn::new(seed);
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    build(Parameters::new(&mut drawn, &ranks, &mut linears)).unwrap();
    drawn.map
}

/// Builds from ready parameters.
pub fn build<T>(map: &Map, build: impl Fn(Parameters<'_>) -> Result<T>) -> Result<T> {
    let mut map = map.clone();
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    build(Parameters::new(&mut map, &ranks, &mut linears))
}

pub fn values(x: &Tensor) -> Vec<f64> {
    let flat = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

/// Largest absolute difference; infinite where a number is missing or not one.
pub fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = values(a).into_iter().zip(values(b));
    pairs.fold(0.0, |worst: f64, (a, b)| {
        let error = (a - b).abs();
        if error.is_nan() {
            f64::INFINITY
        } else {
            worst.max(error)
        }
    })
}

#[track_caller]
pub fn assert_near(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let found = difference(a, b);
    assert!(found <= tolerance, "{what}: differs by {found:e}");
}

pub fn is_finite(x: &Tensor) -> bool {
    values(x).iter().all(|x| x.is_finite())
}

/// The worst of `|analytic − numeric| / (1 + |numeric|)` over central differences of a scalar
/// `function` of named tensors in f64: along one random direction over all of them together, and
/// along up to `entries` single entries of each.
pub fn gradient_error(inputs: &Map, entries: usize, function: impl Fn(&Map) -> Tensor) -> f64 {
    const STEP: f64 = 1e-5;
    let variables: BTreeMap<&String, Var> = inputs
        .iter()
        .map(|(name, tensor)| (name, Var::from_tensor(tensor).unwrap()))
        .collect();
    let live: Map = variables
        .iter()
        .map(|(name, var)| ((*name).clone(), var.as_tensor().clone()))
        .collect();
    let gradients = function(&live).backward().unwrap();
    let analytic: Map = variables
        .iter()
        .map(|(name, var)| {
            let gradient = gradients.get(var.as_tensor()).cloned();
            let gradient = gradient.unwrap_or_else(|| var.zeros_like().unwrap());
            ((*name).clone(), gradient)
        })
        .collect();
    let slope = |direction: &Map| -> f64 {
        let shifted = |by: f64| -> f64 {
            let mut moved = inputs.clone();
            for (name, along) in direction {
                let there = (&inputs[name] + (along * by).unwrap()).unwrap();
                moved.insert(name.clone(), there);
            }
            function(&moved).to_scalar::<f64>().unwrap()
        };
        (shifted(STEP) - shifted(-STEP)) / (2.0 * STEP)
    };
    let mut directions: Vec<Map> = Vec::new();
    directions.push(
        inputs
            .iter()
            .zip(0..)
            .map(|((name, tensor), seed)| {
                let scale = 1.0 / (tensor.elem_count() as f64).sqrt();
                let along = (random(tensor.dims(), 1000 + seed) * scale).unwrap();
                (name.clone(), along)
            })
            .collect(),
    );
    for (name, tensor) in inputs {
        let count = tensor.elem_count();
        for entry in (0..count).step_by(count.div_ceil(entries)) {
            let mut unit = vec![0.0; count];
            unit[entry] = 1.0;
            let unit = self::tensor(unit, tensor.dims());
            directions.push(Map::from([(name.clone(), unit)]));
        }
    }
    let mut worst = 0f64;
    for direction in &directions {
        let expected: f64 = direction
            .iter()
            .map(|(name, along)| {
                let product = (&analytic[name] * along).unwrap().sum_all().unwrap();
                product.to_scalar::<f64>().unwrap()
            })
            .sum();
        let numeric = slope(direction);
        let error = (expected - numeric).abs() / (1.0 + numeric.abs());
        assert!(error.is_finite(), "a gradient is not a number");
        worst = worst.max(error);
    }
    worst
}

/// A scalar in which every entry of `y` counts differently.
pub fn contracted(y: &Tensor) -> Tensor {
    let weights = random(y.dims(), 77);
    (y * weights).unwrap().sum_all().unwrap()
}

/// What a mechanism is told of `heads` heads, with scores of half the products.
pub fn heads(heads: usize, head_width: usize, causal: bool) -> Heads {
    Heads {
        width: heads * head_width,
        heads,
        head_width,
        value_width: head_width,
        causal,
        scale: 0.5,
        sharing: QueryKeySharing::None,
    }
}

/// Positions of heads of four features.
pub fn position(spec: &PositionSpec, heads: usize, causal: bool, map: &Map) -> Position {
    build(map, |p| Position::new(spec, (heads, heads), 4, causal, p)).unwrap()
}

pub fn span(queries: usize, keys: usize, offset: usize) -> Span {
    Span {
        queries,
        keys,
        offset,
        draw: None,
    }
}
