//! The kernelized Transformer: whether a learned spectrum finds a kernel that is not Gaussian, how its
//! variants do on nested lists, and how their cost grows.
//!
//! The paper trains on Long Range Arena; here attention by a known kernel is to be imitated, and lists
//! of operators are short.

use super::sequences::{exponent, listed, of, on_lists_by, quickest};
use super::{after_training, mean, number};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{AdamW, AdamWOptions, DType, Device, Parameter, Tensor, Var, backward};
use lapidary_model::Initialiser;
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::kernelized::{
    KernelizedSpec, Learned, ReadOut, SpectrumSpec,
};
use lapidary_parts::attention::mechanism::lion::{LionDecay, LionSpec};
use lapidary_parts::attention::mechanism::{Describe, Heads, Mechanism};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::Mixing;
use std::collections::BTreeMap;

/// Features of a query, and tokens of a sequence, where a kernel is to be found.
const WIDTH: usize = 8;
const LENGTH: usize = 64;
/// Frequencies of every student.
const COUNT: usize = 256;
const FOURIER: ReadOut = ReadOut::Fourier { smoothing: 1.0 };
const POSITIVE: ReadOut = ReadOut::Positive { stabilise: false };
const MIXTURE: SpectrumSpec = SpectrumSpec::Mixture { components: None };

/// How much is done.
struct Size {
    sequences: usize,
    steps: u64,
    lists: (usize, u64),
    longest: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                sequences: 16,
                steps: 2,
                lists: (40, 1),
                longest: 512,
            },
            Scale::Small => Self {
                sequences: 2000,
                steps: 600,
                lists: (8000, 500),
                longest: 8192,
            },
            Scale::Full => Self {
                sequences: 2000,
                steps: 10_000,
                lists: (90_000, 10_000),
                longest: 8192,
            },
        }
    }
}

fn spec(spectrum: SpectrumSpec, features: ReadOut, count: Option<usize>) -> KernelizedSpec {
    KernelizedSpec {
        spectrum,
        features,
        count,
        ..KernelizedSpec::default()
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = recovery(setting, &size)?;
    claims.extend(on_lists(setting, &size)?);
    let (claim, plot) = costs(&size)?;
    claims.push(claim);
    Ok(Reproduction {
        setting: format!(
            "attention of {LENGTH} tokens of {WIDTH} features by the kernel cos(3 δ₁) \
             exp(−‖δ‖²/2) + 1, imitated with {COUNT} frequencies, {} sequences, {} steps; {} \
             nested lists, {} steps",
            size.sequences, size.steps, size.lists.0, size.lists.1
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

/// Queries, keys and values `[sequences, 1, length, width]`, and what the teacher makes of them.
struct Sample {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
}

impl Sample {
    fn new(sequences: usize, seed: u64) -> Result<Self> {
        let mut source = Initialiser::new(seed, DType::F32, Device::Cpu);
        let shape = [sequences, 1, LENGTH, WIDTH];
        let mut draw =
            |name: &str, deviation: f64| source.parameter(name, &shape, Init::Normal { deviation });
        let (q, k, v) = (draw("q", 0.4)?, draw("k", 0.4)?, draw("v", 1.0)?);
        let y = teacher(&q, &k, &v)?;
        Ok(Self { q, k, v, y })
    }

    fn part(&self, start: usize, count: usize) -> Result<Self> {
        let part = |x: &Tensor| engine(x.narrow(0, start, count));
        Ok(Self {
            q: part(&self.q)?,
            k: part(&self.k)?,
            v: part(&self.v)?,
            y: part(&self.y)?,
        })
    }

    fn sequences(&self) -> usize {
        self.q.dims().first().copied().unwrap_or(0)
    }
}

/// Attention by the kernel `cos(3 δ₁) exp(−‖δ‖²/2) + 1` of `δ = q − k`, laid out.
fn teacher(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let squares = |x: &Tensor| engine(engine(x.sqr())?.sum_keepdim(3));
    let across = |x: &Tensor| engine(engine(x.transpose(2, 3))?.contiguous());
    let inner = engine(q.matmul(&across(k)?))?;
    let distances = engine(engine(inner * -2.0)?.broadcast_add(&squares(q)?))?;
    let distances = engine(distances.broadcast_add(&across(&squares(k)?)?))?;
    let first = |x: &Tensor| engine(x.narrow(3, 0, 1));
    let turned = engine(first(q)?.broadcast_sub(&across(&first(k)?)?))?;
    let waves = engine(engine(turned * 3.0)?.cos())?;
    let fades = engine(engine(distances * -0.5)?.exp())?;
    let weights = engine(engine(waves * fades)? + 1.0)?;
    let total = engine(weights.sum_keepdim(3))?;
    engine(engine(weights.matmul(v))?.broadcast_div(&total))
}

/// Initial values that are kept as variables.
struct Variables {
    source: Initialiser,
    all: Vec<Var>,
}

impl ParameterSource for Variables {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let value = self.source.parameter(name, shape, init)?;
        let variable = Var::from_tensor(&value).map_err(lapidary_kernels::Error::from)?;
        let tensor = variable.as_tensor().clone();
        self.all.push(variable);
        Ok(tensor)
    }
}

/// One head whose scale is 1, so that its kernel is that of its frequencies.
const HEADS: Heads = Heads {
    width: WIDTH,
    heads: 1,
    head_width: WIDTH,
    value_width: WIDTH,
    causal: false,
    scale: 1.0,
    sharing: QueryKeySharing::None,
};

fn student(spec: &KernelizedSpec, seed: u64) -> Result<(Box<dyn Mechanism>, Vec<Var>)> {
    let mut source = Variables {
        source: Initialiser::new(seed, DType::F32, Device::Cpu),
        all: Vec::new(),
    };
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let module = spec.build(&HEADS, Parameters::new(&mut source, &ranks, &mut linears))?;
    Ok((module, source.all))
}

fn mixing(
    module: &dyn Mechanism,
    q: &Tensor,
    k: &Tensor,
    draw: Option<u64>,
) -> Result<Box<dyn Mixing>> {
    mixing_alone(module, [q, k], &engine(q.squeeze(1))?, draw)
}

/// The mean squared error of a sample.
fn error(module: &dyn Mechanism, sample: &Sample, draw: Option<u64>) -> Result<Tensor> {
    let y = mixing(module, &sample.q, &sample.k, draw)?.mix(&sample.v)?;
    engine(engine(engine(y - &sample.y)?.sqr())?.mean_all())
}

/// The error of a student on held-out sequences after training, over several draws.
fn taught(
    spec: &KernelizedSpec,
    size: &Size,
    sample: &Sample,
    asked: &Sample,
    seed: u64,
) -> Result<f64> {
    let (module, variables) = student(spec, seed)?;
    if !variables.is_empty() {
        let parameters = variables.iter().map(|variable| Parameter {
            variable: variable.clone(),
            weight_decay: Some(0.0),
            rate_factor: 1.0,
        });
        let mut optimiser = AdamW::new(parameters.collect(), AdamWOptions::default())?;
        let batch = 16.min(sample.sequences());
        let places = sample.sequences() / batch;
        for step in 0..size.steps {
            let part = sample.part(step as usize % places * batch, batch)?;
            let loss = error(module.as_ref(), &part, Some(step))?;
            let gradients = engine(backward(&loss))?;
            // The rate falls to zero along a line.
            let rate = 2e-2 * (1.0 - step as f64 / size.steps as f64);
            optimiser.step(&gradients, rate, 1.0)?;
        }
    }
    let mut errors = Vec::new();
    for draw in 0..4 {
        let draw = Some(u64::MAX - draw);
        errors.push(number(&error(module.as_ref(), asked, draw)?)?);
    }
    Ok(mean(errors))
}

fn recovery(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    let sample = Sample::new(size.sequences, setting.seed)?;
    let asked = Sample::new(size.sequences.min(100), setting.seed ^ 0x7e57)?;
    let of = |spectrum: SpectrumSpec| {
        let spec = spec(spectrum, FOURIER, Some(COUNT));
        taught(&spec, size, &sample, &asked, setting.seed)
    };
    let fixed = of(SpectrumSpec::Gaussian)?;
    let mut claims = Vec::new();
    for (name, spectrum) in [
        ("a mixture", MIXTURE),
        ("a generator", SpectrumSpec::Generator),
    ] {
        let learned = of(spectrum)?;
        claims.push(
            Claim::new(
                &format!(
                    "a kernel that is not Gaussian: frequencies learned by {name} have a third of \
                     the error of fixed Gaussian ones, or less"
                ),
                "estimate",
                format!(
                    "mean squared error {learned:.2e} against {fixed:.2e}, {:.1} times less",
                    fixed / learned
                ),
                after_training(setting.scale, fixed >= 3.0 * learned),
            )
            .noted(match name {
                "a generator" => {
                    "its tanh keeps frequencies within [−1, 1]; the kernel's lie at ±3"
                }
                _ => "",
            }),
        );
    }
    Ok(claims)
}

/// The variants that are compared on lists.
fn ways() -> Vec<(&'static str, MechanismSpec)> {
    let kernelized = |spectrum, features| MechanismSpec::Kernelized(spec(spectrum, features, None));
    let fastfood = SpectrumSpec::Fastfood {
        learned: Learned::Scaling,
    };
    vec![
        ("softmax", MechanismSpec::Softmax),
        (
            "elu-linear",
            MechanismSpec::Lion(LionSpec {
                decay: LionDecay::None,
                ..LionSpec::default()
            }),
        ),
        ("mixture, positive", kernelized(MIXTURE, POSITIVE)),
        ("FastFood, positive", kernelized(fastfood, POSITIVE)),
        (
            "generator, positive",
            kernelized(SpectrumSpec::Generator, POSITIVE),
        ),
        ("mixture, Fourier", kernelized(MIXTURE, FOURIER)),
    ]
}

fn on_lists(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    let found = on_lists_by(setting, &ways(), 32, size.lists)?;
    let of = |name: &str| of(&found, name);
    let positive = found.iter().filter(|(name, _)| name.ends_with("positive"));
    let least = positive
        .map(|(_, right)| *right)
        .fold(f64::INFINITY, f64::min);
    let listed = listed(&found);
    Ok(vec![
        Claim::new(
            "nested lists: every variant with positive features comes within 3 points of softmax",
            "Long Range Arena: positive variants about 37 %, on par with softmax",
            listed.clone(),
            after_training(setting.scale, least >= of("softmax") - 3.0),
        ),
        Claim::new(
            "nested lists: linear attention with elu + 1 stays below the positive variants",
            "below",
            listed,
            after_training(setting.scale, of("elu-linear") < least),
        ),
    ])
}

fn costs(size: &Size) -> Result<(Claim, Plot)> {
    let mut counted = Vec::new();
    let mut timed = Vec::new();
    for (name, spectrum, features) in [
        ("mixture, Fourier", MIXTURE, FOURIER),
        ("mixture, positive", MIXTURE, POSITIVE),
        (
            "FastFood, positive",
            SpectrumSpec::Fastfood {
                learned: Learned::Scaling,
            },
            POSITIVE,
        ),
        ("generator, positive", SpectrumSpec::Generator, POSITIVE),
    ] {
        let (module, _) = student(&spec(spectrum, features, None), 1)?;
        let (mut operations, mut seconds) = (Vec::new(), Vec::new());
        let lengths = std::iter::successors(Some(256usize), |length| Some(2 * length));
        for length in lengths.take_while(|length| *length <= size.longest) {
            let mut source = Initialiser::new(1, DType::F32, Device::Cpu);
            let shape = [1, 1, length, WIDTH];
            let x = source.parameter("x", &shape, Init::Normal { deviation: 0.5 })?;
            let work = mixing(module.as_ref(), &x, &x, None)?.operations(WIDTH);
            operations.push((length as f64, work as f64));
            let best = quickest(3, || {
                mixing(module.as_ref(), &x, &x, None)?.mix(&x)?;
                Ok(())
            })?;
            seconds.push((length as f64, best * 1e3));
        }
        counted.push((name, exponent(&operations), exponent(&seconds)));
        timed.push(Series {
            name: name.to_owned(),
            points: seconds,
        });
    }
    let each = counted.iter().map(|(name, operations, time)| {
        format!("{name} {operations:.2} of operations and {time:.2} of time")
    });
    let claim = Claim::new(
        "operations grow linearly with the length",
        "linear up to 4000 tokens",
        format!("exponents: {}", each.collect::<Vec<_>>().join(", ")),
        Verdict::of(
            counted
                .iter()
                .all(|(_, slope, _)| (slope - 1.0).abs() < 0.1),
        ),
    );
    let plot = Plot {
        title: "Time of attention, one head of 8 features".to_owned(),
        x: "tokens".to_owned(),
        y: "milliseconds".to_owned(),
        series: timed,
    };
    Ok((claim, plot))
}
