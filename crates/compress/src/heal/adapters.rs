//! Training few numbers beside frozen ones (LoRA: Hu et al. 2021, arXiv 2106.09685).
//!
//! A linear layer with the weight `W` `[output, input]` has `A` `[rank, input]` and `B`
//! `[output, rank]` beside it:
//!
//! ```text
//! y = x Wᵀ + α/rank (x ⊙ m) Aᵀ Bᵀ        W' = W + α/rank B A
//! ```
//!
//! `B` is zero at first, so that nothing has changed then; `m` is 0 with the probability of dropout and
//! `1 / (1 − p)` otherwise, drawn for each element of a layer's input by the seed, the step and the layer, so
//! that it is the same where a part is recomputed. It enters as `x W'ᵀ + α/rank (x ⊙ (m − 1)) Aᵀ Bᵀ`. What
//! comes out are the matrices `W'`: no adapter is left in the model, and whatever has none is what it was,
//! bit for bit. Where `W` is exactly zero and zeros are kept, `W'` is.
//!
//! A layer that is factorised at `k` already is trained as its product and factored again by SVD at
//! `k + rank`, which holds the sum of both without loss (LoRAP: Li et al. 2024, arXiv 2404.09695); where a
//! pair of that rank takes as many weights as the matrix, it stays a matrix.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_model::{Model, ModelSpec};
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_signal::{DroppedPart, Matrix, Weight};
use lapidary_train::{Generator, Masks, generator};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::trained;
use crate::error::engine;
use crate::factorisation::merged;
use crate::selection::{Layer, Selection};
use crate::{Error, Result};

/// Which layers are trained beside their weights, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterSettings {
    /// Features between the two matrices, fewer where a layer has fewer.
    pub rank: usize,
    /// `α`: the product is multiplied by `α / rank`.
    pub alpha: f64,
    /// The probability that an element of an adapter's input is zero at a step.
    pub dropout: f64,
    /// Globs over the paths of linear layers; those of all blocks by default.
    pub layers: Vec<String>,
}

impl Default for AdapterSettings {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            layers: Selection::default().layers,
        }
    }
}

impl AdapterSettings {
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |what: &str, found: String, expected: &str| {
            let what = format!("{what} of adapters");
            Err(Error::invalid(what, found, expected))
        };
        if self.rank == 0 {
            return wrong("rank", "0".to_owned(), "at least 1");
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return wrong("alpha", self.alpha.to_string(), "above 0");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "at least 0 and below 1";
            return wrong("dropout", self.dropout.to_string(), expected);
        }
        Ok(())
    }
}

/// What adapters were trained, which the model has taken in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterReport {
    /// How.
    pub settings: AdapterSettings,
    /// Layers that had one.
    pub layers: usize,
    /// Of those, layers that were factorised.
    pub factorised: usize,
    /// Numbers that were trained.
    pub parameters: usize,
}

/// A layer with an adapter.
struct Adapted {
    layer: Layer,
    /// Name of its matrix.
    weight: String,
    /// Names of `A` and `B`.
    factors: [String; 2],
    /// Features of its adapter.
    rank: usize,
}

impl Adapted {
    /// `A` and `B` among what `value` finds.
    fn values(&self, value: impl Fn(&str) -> Option<Tensor>) -> Result<[Tensor; 2]> {
        let [down, up] = &self.factors;
        Ok([
            value(down).ok_or_else(|| missing(down))?,
            value(up).ok_or_else(|| missing(up))?,
        ])
    }
}

/// A model whose layers have adapters.
pub(super) struct Adapters {
    settings: AdapterSettings,
    seed: u64,
    /// Layers with adapters as matrices.
    spec: ModelSpec,
    frozen: BTreeMap<String, Tensor>,
    /// By path.
    adapted: Vec<Adapted>,
    variables: BTreeMap<String, Var>,
    masks: Masks,
}

impl Adapters {
    /// Adapters beside the chosen layers of `model`; `masks` name the matrices whose zeros are kept.
    ///
    /// # Errors
    /// When no layer is chosen.
    pub(super) fn new(
        model: &Model,
        settings: &AdapterSettings,
        masks: &Masks,
        seed: u64,
    ) -> Result<Self> {
        let layers = chosen(model, settings)?;
        let mut spec = model.spec().clone();
        let mut frozen = trained(model)?;
        let mut variables = BTreeMap::new();
        let mut random = stream(seed, STARTS);
        let mut adapted = Vec::with_capacity(layers.len());
        for layer in layers {
            let weight = Layer::weight_name(&layer.path);
            if spec.low_rank.remove(&layer.path).is_some() {
                let whole = product(&frozen, &layer.path)?;
                frozen.remove(&format!("{}.down", layer.path));
                frozen.remove(&format!("{}.up", layer.path));
                frozen.insert(weight.clone(), whole);
            }
            let like = frozen.get(&weight).ok_or_else(|| missing(&weight))?;
            let factors = ["down", "up"].map(|name| format!("{}.adapter.{name}", layer.path));
            let rank = settings.rank.min(layer.input).min(layer.output);
            let [down, up] = starting(&layer, rank, like, &mut random)?;
            let [first, second] = factors.clone();
            variables.insert(first, down);
            variables.insert(second, up);
            adapted.push(Adapted {
                layer,
                weight,
                factors,
                rank,
            });
        }
        Ok(Self {
            settings: settings.clone(),
            seed,
            spec,
            frozen,
            adapted,
            variables,
            masks: masks.clone(),
        })
    }

    /// `A` and `B` of every layer.
    pub(super) fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// What the report says.
    pub(super) fn report(&self) -> AdapterReport {
        let factorised = self.adapted.iter().filter(|one| one.layer.rank.is_some());
        let variables = self.variables.values();
        AdapterReport {
            settings: self.settings.clone(),
            layers: self.adapted.len(),
            factorised: factorised.count(),
            parameters: variables.map(|variable| variable.elem_count()).sum(),
        }
    }

    /// The model's, layers with adapters being matrices.
    pub(super) fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The model's parameters with its adapters, through which gradients reach them; with the dropout of
    /// `step`, or without any.
    pub(super) fn step(&self, step: Option<u64>) -> Result<Step> {
        let probability = self.settings.dropout;
        let step = step.filter(|_| probability > 0.0);
        let mut made = Step {
            parameters: self.frozen.clone(),
            adapters: BTreeMap::new(),
            probability,
            seed: step.map_or(0, |step| stream(self.seed, step).random()),
        };
        for one in &self.adapted {
            let [down, up] = one.values(|name| {
                let variable = self.variables.get(name);
                variable.map(|variable| variable.as_tensor().clone())
            })?;
            let change = self.change(one, &down, &up)?;
            if step.is_some() {
                let masked = self.masks.tensors().contains_key(&one.weight);
                let adapter = match masked {
                    true => Weight::dense(change.clone()),
                    false => Weight::LowRank {
                        down: Matrix::Dense(down),
                        up: Matrix::Dense(engine(up.affine(self.scale(), 0.0))?),
                    },
                };
                made.adapters.insert(one.layer.path.clone(), adapter);
            }
            if let Some(weight) = made.parameters.get_mut(&one.weight) {
                *weight = engine(&*weight + change)?;
            }
        }
        Ok(made)
    }

    /// `original` with adapters of these values taken in, each matrix rounded once to its type.
    pub(super) fn taken_in(
        &self,
        values: &BTreeMap<String, Tensor>,
        original: &Model,
    ) -> Result<Model> {
        let mut spec = original.spec().clone();
        let mut parameters = original.parameters().clone();
        for one in &self.adapted {
            let [down, up] = one.values(|name| values.get(name).cloned())?;
            let [down, up] = [wide(&down)?, wide(&up)?];
            let change = self.change(one, &down, &up)?;
            let path = &one.layer.path;
            let Some(rank) = one.layer.rank else {
                let weight = parameters.get_mut(&one.weight);
                let weight = weight.ok_or_else(|| missing(&one.weight))?;
                let whole = engine(wide(weight)? + change)?;
                *weight = engine(whole.to_dtype(weight.dtype()))?;
                continue;
            };
            let own = parameters.remove(&format!("{path}.down"));
            let own = own.zip(parameters.remove(&format!("{path}.up")));
            let (down, up) = own.ok_or_else(|| missing(path))?;
            let dtype = up.dtype();
            let whole = engine(merged(&up.detach(), &down.detach(), DType::F64)? + change)?;
            let rank = rank + one.rank;
            let (input, output) = (one.layer.input, one.layer.output);
            if lapidary_factor::rank::parameters(input, output, rank) >= input * output {
                spec.low_rank.remove(path);
                parameters.insert(one.weight.clone(), engine(whole.to_dtype(dtype))?);
                continue;
            }
            let factored = lapidary_factor::plain(&whole, rank).map_err(|reason| Error::Layer {
                layer: path.clone(),
                reason,
            })?;
            let narrow = |tensor: &Tensor| engine(engine(tensor.to_dtype(dtype))?.contiguous());
            parameters.insert(format!("{path}.down"), narrow(&factored.factors.down)?);
            parameters.insert(format!("{path}.up"), narrow(&factored.factors.up)?);
            spec.low_rank.insert(path.clone(), rank);
        }
        for tensor in parameters.values_mut() {
            *tensor = tensor.detach();
        }
        Ok(Model::new(spec, &mut parameters)?)
    }

    /// `α/rank B A` `[output, input]`, zero where the layer's zeros are kept.
    fn change(&self, one: &Adapted, down: &Tensor, up: &Tensor) -> Result<Tensor> {
        let change = engine(engine(up.matmul(down))?.affine(self.scale(), 0.0))?;
        Ok(self.masks.masked(&one.weight, &change)?)
    }

    fn scale(&self) -> f64 {
        self.settings.alpha / self.settings.rank as f64
    }
}

/// What a model is made of for a step: parameters, and the adapters in them whose inputs are dropped.
pub(super) struct Step {
    pub(super) parameters: BTreeMap<String, Tensor>,
    /// By the path of the layer.
    adapters: BTreeMap<String, Weight>,
    probability: f64,
    seed: u64,
}

impl Step {
    /// Parameters without adapters.
    pub(super) fn of(parameters: BTreeMap<String, Tensor>) -> Self {
        Self {
            parameters,
            adapters: BTreeMap::new(),
            probability: 0.0,
            seed: 0,
        }
    }
}

impl ParameterSource for Step {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        self.parameters.parameter(name, shape, init)
    }

    fn packed(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
    ) -> lapidary_parts::Result<Tensor> {
        self.parameters.packed(name, shape, dtype)
    }

    /// Layers that share an adapter draw masks of their own.
    fn dropped(&mut self, stored: &str, path: &str) -> lapidary_parts::Result<Option<DroppedPart>> {
        Ok(self.adapters.get(stored).map(|weight| DroppedPart {
            weight: weight.clone(),
            probability: self.probability,
            seed: seed_of(self.seed, path),
        }))
    }
}

/// FNV-1a, the same whichever compiler built the program.
fn seed_of(seed: u64, path: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(path.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The chosen linear layers, by path.
fn chosen(model: &Model, settings: &AdapterSettings) -> Result<Vec<Layer>> {
    let selection = Selection {
        layers: settings.layers.clone(),
        embeddings: false,
    };
    let mut layers = selection.chosen(model)?;
    layers.sort_by(|a, b| a.path.cmp(&b.path));
    match layers.is_empty() {
        false => Ok(layers),
        true => Err(Error::invalid(
            "layers with adapters",
            "none",
            "at least one, to train anything",
        )),
    }
}

/// Of the independent sequences of a seed, the one that adapters start from; steps count up to it.
const STARTS: u64 = u64::MAX;

fn stream(seed: u64, number: u64) -> Generator {
    let mut random = generator(seed);
    random.set_stream(number);
    random
}

/// `A` uniform within `±1/√input` (He et al. 2015 with `a = √5`) and `B` zero.
fn starting(layer: &Layer, rank: usize, like: &Tensor, random: &mut Generator) -> Result<[Var; 2]> {
    let bound = 1.0 / (layer.input.max(1) as f64).sqrt();
    let drawn: Vec<f64> = (0..rank * layer.input)
        .map(|_| random.random_range(-bound..bound))
        .collect();
    let down = engine(Tensor::from_vec(drawn, (rank, layer.input), &Device::Cpu))?;
    let down = engine(engine(down.to_dtype(like.dtype()))?.to_device(like.device()))?;
    let up = engine(Var::zeros(
        (layer.output, rank),
        like.dtype(),
        like.device(),
    ))?;
    Ok([engine(Var::from_tensor(&down))?, up])
}

/// The matrix that two factors stand for, in their type.
fn product(parameters: &BTreeMap<String, Tensor>, path: &str) -> Result<Tensor> {
    let find = |name: &str| {
        let found = parameters.get(&format!("{path}.{name}"));
        found.ok_or_else(|| missing(path))
    };
    let (up, down) = (find("up")?, find("down")?);
    merged(up, down, up.dtype())
}

fn wide(tensor: &Tensor) -> Result<Tensor> {
    engine(tensor.detach().to_dtype(DType::F64))
}

fn missing(name: &str) -> Error {
    Error::invalid(
        format!("weights of {name}"),
        "absent",
        "a matrix of the model or its factors, to train an adapter beside",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::check::gradient_error;

    fn model(seed: u64) -> Model {
        let spec: ModelSpec = toml::from_str(
            "width = 8
            head = { kind = 'language-model' }
            input = { kind = 'tokens', vocabulary = 8, length = 4 }
            [[blocks]]
            attention = { kind = 'multi-head', heads = 2, causal = true }
            feedforward = { kind = 'dense', hidden = 12 }",
        )
        .unwrap();
        Model::initialised(spec, seed, DType::F64, &Device::Cpu).unwrap()
    }

    fn settings(rank: usize) -> AdapterSettings {
        AdapterSettings {
            rank,
            alpha: 6.0,
            layers: vec!["blocks.*.up".to_owned()],
            ..AdapterSettings::default()
        }
    }

    fn made(adapters: &Adapters) -> Model {
        let mut step = adapters.step(None).unwrap();
        assert!(step.adapters.is_empty(), "no dropout without a step");
        Model::new(adapters.spec().clone(), &mut step).unwrap()
    }

    fn drawn(shape: (usize, usize), seed: u64) -> Tensor {
        let mut random = generator(seed);
        let values: Vec<f64> = (0..shape.0 * shape.1)
            .map(|_| random.random_range(-1.0..1.0))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
        tensor.to_vec2().unwrap()
    }

    const WEIGHT: &str = "blocks.0.feedforward.up.weight";

    #[test]
    fn a_layer_with_an_adapter_is_the_sum_and_so_is_what_takes_it_in() {
        let model = model(1);
        // The weight's first row is kept at zero.
        let masked: Vec<u8> = (0..12 * 8).map(|at| u8::from(at >= 8)).collect();
        let mask = Tensor::from_vec(masked, (12, 8), &Device::Cpu).unwrap();
        let masks = Masks::new([(WEIGHT.to_owned(), mask)].into()).unwrap();
        let adapters = Adapters::new(&model, &settings(3), &masks, 1).unwrap();
        let start = made(&adapters);
        let own = rows(&model.parameters()[WEIGHT]);
        assert_eq!(rows(&start.parameters()[WEIGHT]), own);

        let (down, up) = (drawn((3, 8), 2), drawn((12, 3), 3));
        let path = "blocks.0.feedforward.up";
        let set = |name: &str, value: &Tensor| {
            let name = format!("{path}.adapter.{name}");
            adapters.variables()[&name].set(value).unwrap();
            (name, value.clone())
        };
        let values = BTreeMap::from([set("down", &down), set("up", &up)]);
        let (a, b) = (rows(&down), rows(&up));
        let trained = made(&adapters);
        let taken_in = adapters.taken_in(&values, &model).unwrap();
        for found in [&trained, &taken_in] {
            for (o, row) in rows(&found.parameters()[WEIGHT]).iter().enumerate() {
                for (i, found) in row.iter().enumerate() {
                    let product: f64 = (0..3).map(|k| b[o][k] * a[k][i]).sum();
                    let change = if o == 0 { 0.0 } else { 6.0 / 3.0 * product };
                    assert!((found - own[o][i] - change).abs() < 1e-14);
                }
            }
        }
        for (name, tensor) in taken_in.parameters() {
            if name != WEIGHT {
                let (before, after) = (&model.parameters()[name], tensor);
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                assert_eq!(flat(before), flat(after), "{name}");
            }
        }
    }

    #[test]
    fn gradients_of_the_change_are_those_of_differences() {
        let model = model(1);
        let masked: Vec<u8> = (0..12 * 8).map(|at| u8::from(at % 5 != 0)).collect();
        let mask = Tensor::from_vec(masked, (12, 8), &Device::Cpu).unwrap();
        let masks = Masks::new([(WEIGHT.to_owned(), mask)].into()).unwrap();
        let adapters = Adapters::new(&model, &settings(2), &masks, 1).unwrap();
        let change = |inputs: &[Tensor]| {
            let one = &adapters.adapted[0];
            Ok(adapters.change(one, &inputs[0], &inputs[1]).unwrap())
        };
        let error = gradient_error(change, &[drawn((2, 8), 5), drawn((12, 2), 6)]).unwrap();
        assert!(error < 1e-8, "{error}");
    }

    #[test]
    fn dropout_is_a_function_of_seed_step_and_layer_and_the_adapters_alone() {
        let path = "blocks.0.feedforward.up";
        let masked: Vec<u8> = (0..12 * 8).map(|at| u8::from(at % 5 != 0)).collect();
        let mask = Tensor::from_vec(masked, (12, 8), &Device::Cpu).unwrap();
        let masks = Masks::new([(WEIGHT.to_owned(), mask)].into()).unwrap();
        for masks in [Masks::default(), masks] {
            let at = |seed: u64, dropout: f64| {
                let told = AdapterSettings {
                    dropout,
                    ..settings(3)
                };
                let adapters = Adapters::new(&model(1), &told, &masks, seed).unwrap();
                for (name, variable) in adapters.variables() {
                    let shape = variable.dims2().unwrap();
                    variable.set(&drawn(shape, name.len() as u64)).unwrap();
                }
                adapters
            };
            let part = |adapters: &Adapters, step: u64, path: &str| {
                let mut made = adapters.step(Some(step)).unwrap();
                made.dropped("blocks.0.feedforward.up", path).unwrap()
            };
            let adapters = at(1, 0.25);
            let found = part(&adapters, 2, path).unwrap();
            assert_eq!(found.probability, 0.25);
            // What is dropped is what the weight contains of the adapter.
            let made = adapters.step(Some(2)).unwrap();
            let change = (&made.parameters[WEIGHT] - &adapters.frozen[WEIGHT]).unwrap();
            let product = match &found.weight {
                Weight::Whole(matrix) => matrix.dense().unwrap(),
                Weight::LowRank { down, up } => {
                    assert!(masks.is_empty());
                    up.dense().unwrap().matmul(&down.dense().unwrap()).unwrap()
                }
            };
            for (a, b) in rows(&product).concat().iter().zip(rows(&change).concat()) {
                assert!((a - b).abs() < 1e-14);
            }
            let seed =
                |adapters: &Adapters, step, path: &str| part(adapters, step, path).unwrap().seed;
            assert_eq!(seed(&adapters, 2, path), seed(&at(1, 0.25), 2, path));
            let others = [
                seed(&adapters, 3, path),
                seed(&at(2, 0.25), 2, path),
                seed(&adapters, 2, "blocks.1.feedforward.up"),
            ];
            assert!(others.iter().all(|other| *other != found.seed));
            let mut step = adapters.step(Some(2)).unwrap();
            assert!(
                step.dropped("blocks.0.feedforward.down", path)
                    .unwrap()
                    .is_none()
            );
            assert!(part(&at(1, 0.0), 2, path).is_none(), "without a rate");
        }
    }

    #[test]
    fn a_rank_is_no_more_than_a_layer_has() {
        let adapters = Adapters::new(&model(1), &settings(100), &Masks::default(), 1).unwrap();
        let report = adapters.report();
        assert_eq!((report.layers, report.factorised), (1, 0));
        assert_eq!(report.parameters, 8 * (8 + 12));
        let none = AdapterSettings {
            layers: Vec::new(),
            ..settings(1)
        };
        assert!(Adapters::new(&model(1), &none, &Masks::default(), 1).is_err());
    }
}
