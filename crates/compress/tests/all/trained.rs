//! On a trained model, does the Fisher information know which factorisation costs more? It does
//! where the theory applies: at an optimum of the loss on the very data that it is taken from.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use crate::common::model;
use lapidary_compress::quality::accuracy;
use lapidary_compress::{
    Calibration, CalibrationData, CalibrationOptions, Change, Content, Example, Factorisation,
    ModulePlan, Objective, Plan, Requirements, Selection, Statistic, Target,
};
use lapidary_kernels::{CrossEntropyOptions, DType, Device, Tensor, cross_entropy};
use lapidary_model::{Input, Model, Pass};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const LENGTH: usize = 8;
const LABELS: u32 = 4;

const SPEC: &str = r#"
width = 16
[input]
kind = "tokens"
vocabulary = 20
length = 8
position = { kind = "learned" }
norm = { kind = "layer" }
[[blocks]]
repeat = 1
wiring = "post-norm"
attention = { kind = "multi-head", heads = 2 }
feedforward = { kind = "dense", hidden = 32 }
[head]
kind = "pooled"
pool = "mean"
labels = 4
"#;

/// Two tokens of eight that tell the class (0..8, two for each class), among nuisance (8..20).
fn sample(rng: &mut ChaCha8Rng) -> Example {
    let label = rng.random_range(0..LABELS);
    let mut ids: Vec<u32> = (0..LENGTH).map(|_| rng.random_range(8..20)).collect();
    for _ in 0..2 {
        let position = rng.random_range(0..LENGTH);
        ids[position] = 2 * label + rng.random_range(0..2);
    }
    // One token of another class, so that counting matters.
    let position = rng.random_range(0..LENGTH);
    ids[position] = rng.random_range(0..8);
    // Labels are wrong now and then, so that the optimum has a loss, and a Fisher information.
    let label = if rng.random_bool(0.2) {
        rng.random_range(0..LABELS)
    } else {
        label
    };
    Example::labelled(ids, label)
}

fn tensors(examples: &[Example]) -> (Input, Tensor) {
    let mut ids: Vec<u32> = Vec::new();
    let mut labels = Vec::new();
    for example in examples {
        if let (Content::Tokens { ids: tokens, .. }, Target::Label(label)) =
            (&example.content, &example.target)
        {
            ids.extend(tokens);
            labels.push(*label);
        }
    }
    let count = labels.len();
    (
        Input::tokens(Tensor::from_vec(ids, (count, LENGTH), &Device::Cpu).unwrap()),
        Tensor::from_vec(labels, count, &Device::Cpu).unwrap(),
    )
}

fn cross_entropy_of(model: &Model, examples: &[Example]) -> Tensor {
    let (input, labels) = tensors(examples);
    let output = model.forward(&input, Pass::default()).unwrap();
    let logits = output.into_logits().unwrap().into_value();
    cross_entropy(&logits, &labels, &CrossEntropyOptions::default()).unwrap()
}

/// Adam to an optimum on the examples: the step goes to zero.
fn train(start: &Model, examples: &[Example], steps: usize) -> Model {
    let mut parameters = start.parameters().clone();
    let model = Model::trainable(start.spec().clone(), &mut parameters).unwrap();
    let mut moments: BTreeMap<&String, (Tensor, Tensor)> = model
        .variables()
        .iter()
        .map(|(name, v)| (name, (v.zeros_like().unwrap(), v.zeros_like().unwrap())))
        .collect();
    let batches: Vec<&[Example]> = examples.chunks(50).collect();
    for step in 0..steps {
        let rate = 0.01 * (1.0 - step as f64 / steps as f64);
        let loss = cross_entropy_of(&model, batches[step % batches.len()]);
        let gradients = loss.backward().unwrap();
        for (name, variable) in model.variables() {
            let Some(g) = gradients.get(variable.as_tensor()) else {
                continue;
            };
            let (m, v) = moments.get_mut(name).unwrap();
            *m = ((&*m * 0.9).unwrap() + (g * 0.1).unwrap()).unwrap();
            *v = ((&*v * 0.99).unwrap() + (g.sqr().unwrap() * 0.01).unwrap()).unwrap();
            let power = step as i32 + 1;
            let corrected = (&*m / (1.0 - 0.9f64.powi(power))).unwrap();
            let scale = (&*v / (1.0 - 0.99f64.powi(power))).unwrap().sqrt().unwrap();
            let update = (corrected / (scale + 1e-8).unwrap()).unwrap();
            let next = (variable.as_tensor() - (update * rate).unwrap()).unwrap();
            variable.set(&next.detach()).unwrap();
        }
    }
    let mut parameters = model
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.detach().copy().unwrap()))
        .collect::<BTreeMap<_, _>>();
    Model::new(model.spec().clone(), &mut parameters).unwrap()
}

fn loss(model: &Model, data: &CalibrationData) -> f64 {
    let loss = cross_entropy_of(model, data.examples());
    loss.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

#[test]
fn predicted_loss_rises_rank_svd_and_fwsvd_as_measured_ones_do() {
    let (mut agreeing, mut compared) = (0, 0);
    for seed in [1, 2] {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let data = CalibrationData::new((0..1000).map(|_| sample(&mut rng)).collect()).unwrap();
        let trained = train(&model(SPEC, seed), data.examples(), 600);
        assert!(accuracy(&trained, &data, 50).unwrap() > 0.9);
        let selection = Selection::default();
        let mut requirements: Requirements = Factorisation::Fwsvd
            .requirements(&trained, &selection)
            .unwrap();
        for layer in selection.chosen(&trained).unwrap() {
            let layer = layer.path;
            requirements.statistics.insert(Statistic::Fisher { layer });
        }
        let options = CalibrationOptions::default();
        let calibration = Calibration::collect(&trained, &data, &requirements, options).unwrap();
        assert_eq!(calibration.objective, Some(Objective::Label));
        let before = loss(&trained, &data);
        assert!((before - calibration.mean_loss.unwrap()).abs() < 1e-9);

        for layer in selection.chosen(&trained).unwrap() {
            let one = |method: Factorisation| {
                let plan = Plan {
                    method: method.name().to_owned(),
                    modules: vec![ModulePlan {
                        path: layer.path.clone(),
                        input: layer.input,
                        output: layer.output,
                        change: Change::Factorise {
                            rank: layer.input.min(layer.output) / 2,
                        },
                    }],
                };
                let compressed = plan.apply(&trained, Some(&calibration)).unwrap();
                let errors = compressed.report.modules[0].chosen.unwrap();
                (
                    errors.predicted_loss_rise.unwrap(),
                    loss(&compressed.model, &data) - before,
                )
            };
            let ((svd, svd_rise), (fwsvd, fwsvd_rise)) =
                (one(Factorisation::Svd), one(Factorisation::Fwsvd));
            println!(
                "{seed} {}: predicted {svd:.2e} {fwsvd:.2e}, measured {svd_rise:.2e} {fwsvd_rise:.2e}",
                layer.path
            );
            compared += 1;
            agreeing += usize::from((svd > fwsvd) == (svd_rise > fwsvd_rise));
        }
    }
    println!("{agreeing} of {compared}");
    assert!(5 * agreeing >= 4 * compared, "{agreeing} of {compared}");
}
