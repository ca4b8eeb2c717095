//! LION: one decay in two directions, on digits as pixels and on hidden tokens, and what its forms
//! cost.
//!
//! The paper trains image classifiers on ImageNet and masked language models on C4. Here printed
//! digits are 64 pixels without positions, where only the decay tells near from far, and a small
//! encoder names hidden tokens.

use super::masked::{self, text};
use super::sequences::{Course, LEVELS, Measures, SIDE, crossover, digits, exponent, quickest};
use super::sequences::{percent_right, train};
use super::{after_training, difference, mean};
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{HeadSpec, Initialiser};
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::lion::{Curve, LionDecay, LionForm, LionImage, LionSpec};
use lapidary_parts::attention::mechanism::{Describe, Heads};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::Mixing;
use std::collections::BTreeMap;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Softmax,
    Lion { decay: LionDecay, image: bool },
}

const LIT: Way = plain(LionDecay::None);
const D: Way = plain(LionDecay::Constant);
const S: Way = plain(LionDecay::Selective);
const D_IMAGE: Way = Way::Lion {
    decay: LionDecay::Constant,
    image: true,
};
const S_IMAGE: Way = Way::Lion {
    decay: LionDecay::Selective,
    image: true,
};

const fn plain(decay: LionDecay) -> Way {
    Way::Lion {
        decay,
        image: false,
    }
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax with positions",
            LIT => "LION-LIT",
            D => "LION-D",
            S => "LION-S",
            D_IMAGE => "LION-D on curves",
            S_IMAGE => "LION-S on curves",
            Self::Lion { .. } => "LION-LIT on curves",
        }
    }

    fn mechanism(self) -> MechanismSpec {
        match self {
            Self::Softmax => MechanismSpec::Softmax,
            Self::Lion { decay, image } => MechanismSpec::Lion(LionSpec {
                decay,
                image: image.then(|| LionImage {
                    columns: SIDE,
                    curves: vec![Curve::Rows, Curve::Columns],
                }),
                ..LionSpec::default()
            }),
        }
    }
}

/// How much is done.
struct Size {
    digits: usize,
    seeds: u64,
    steps: u64,
    masked: masked::Course,
    longest: usize,
    longest_parallel: usize,
}

impl Size {
    fn of(setting: &Setting) -> Self {
        let masked = masked::Course {
            steps: 300,
            batch: 4,
            length: 256,
            hidden: 0.3,
            rate: 3e-3,
            questions: 20,
            seed: setting.seed,
        };
        match setting.scale {
            Scale::Smoke => Self {
                digits: 40,
                seeds: 1,
                steps: 2,
                masked: masked::Course {
                    steps: 1,
                    batch: 2,
                    length: 32,
                    questions: 1,
                    ..masked
                },
                longest: 512,
                longest_parallel: 512,
            },
            Scale::Small => Self {
                digits: 4000,
                seeds: 2,
                steps: 500,
                masked,
                longest: 16_384,
                longest_parallel: 2048,
            },
            Scale::Full => Self {
                digits: 20_000,
                seeds: 3,
                steps: 4000,
                masked: masked::Course {
                    steps: 10_000,
                    batch: 16,
                    ..masked
                },
                longest: 16_384,
                longest_parallel: 4096,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting);
    let mut claims = exact(setting.seed)?;
    claims.extend(on_digits(setting, &size)?);
    let (what, more) = on_hidden_tokens(setting, &size)?;
    claims.extend(more);
    let (more, plot) = costs(&size)?;
    claims.extend(more);
    Ok(Reproduction {
        setting: format!(
            "printed digits as {} pixels without positions, {} steps of 32, {} seed(s); hidden \
             tokens of {what}, {} steps of {} windows of {}",
            SIDE * SIDE,
            size.steps,
            size.seeds,
            size.masked.steps,
            size.masked.batch,
            size.masked.length
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

fn on_digits(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    let measures = Measures {
        vocabulary: LEVELS,
        length: SIDE * SIDE,
        labels: 10,
        width: 32,
        heads: 4,
        blocks: 2,
    };
    let ways = [Way::Softmax, LIT, D, S, D_IMAGE, S_IMAGE];
    let mut found: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for seed in (setting.seed..).take(size.seeds as usize) {
        let training = digits(size.digits, seed);
        let held_out = digits(size.digits / 4, seed ^ 0xd161);
        for way in ways {
            let course = Course {
                steps: size.steps,
                batch: 32,
                rate: 3e-3,
                seed,
            };
            let spec = measures.spec(way.mechanism(), way == Way::Softmax);
            let model = train(spec, &training, &course)?;
            let right = percent_right(&model, &held_out)?;
            found.entry(way.name()).or_default().push(right);
        }
    }
    let right = |way: Way| mean(found.get(way.name()).cloned().unwrap_or_default());
    let listed = |ways: &[Way]| {
        let each = ways
            .iter()
            .map(|way| format!("{} {:.1} %", way.name(), right(*way)));
        each.collect::<Vec<_>>().join(", ")
    };
    Ok(vec![
        Claim::new(
            "without positions, a decay is worth at least 5 points of accuracy on digits",
            "ImageNet: LION-LIT 74.7 %, LION-D 77.8 %",
            listed(&[LIT, D, S]),
            after_training(setting.scale, right(D) >= right(LIT) + 5.0),
        ),
        Claim::new(
            "two curves over the image are at least as good as one order of its pixels",
            "ImageNet: LION-D 77.8 → 80.2 %, LION-S 76.3 → 79.9 %",
            listed(&[D, D_IMAGE, S, S_IMAGE]),
            after_training(setting.scale, right(D_IMAGE) >= right(D)),
        ),
        Claim::new(
            "LION-D on curves comes within 2 points of softmax with positions",
            "ImageNet: LION-D on curves 80.2 %, DeiT 81.8 %",
            listed(&[D_IMAGE, Way::Softmax]),
            after_training(setting.scale, right(D_IMAGE) >= right(Way::Softmax) - 2.0),
        ),
    ])
}

fn on_hidden_tokens(setting: &Setting, size: &Size) -> Result<(String, Vec<Claim>)> {
    let mut text = text(setting)?;
    let measures = Measures {
        vocabulary: text.vocabulary + 1,
        length: size.masked.length,
        labels: 1,
        width: 48,
        heads: 4,
        blocks: 2,
    };
    let mut right = BTreeMap::new();
    let ways = [Way::Softmax, LIT, D, S];
    for way in ways {
        let mut spec = measures.spec(way.mechanism(), way == Way::Softmax);
        spec.head = HeadSpec::LanguageModel {
            tied: true,
            bias: true,
            transform: None,
        };
        right.insert(way.name(), text.accuracy(spec, &size.masked)?);
    }
    let of = |way: Way| right.get(way.name()).copied().unwrap_or(f64::NAN);
    let listed = ways.map(|way| format!("{} {:.1} %", way.name(), of(way)));
    let claim = Claim::new(
        "hidden tokens: LION-S names at least as many as LION-D, and that more than LION-LIT",
        "C4: LIT 67.1, D 68.6, S 69.2, BERT 69.9 %",
        listed.join(", "),
        after_training(setting.scale, of(S) >= of(D) && of(D) > of(LIT)),
    );
    Ok((text.what.clone(), vec![claim]))
}

const HEADS: Heads = Heads {
    width: 16,
    heads: 1,
    head_width: 16,
    causal: false,
    scale: 0.25,
    sharing: QueryKeySharing::None,
};

/// Parameters of width enough that decays differ.
struct Lively(Initialiser);

impl ParameterSource for Lively {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match init {
            Init::Normal { .. } => Init::Normal { deviation: 0.3 },
            other => other,
        };
        self.0.parameter(name, shape, init)
    }
}

/// The mixing of one head of 16 features on drawn queries and keys, and values to mix.
fn specimen(
    spec: &LionSpec,
    length: usize,
    dtype: DType,
    seed: u64,
) -> Result<(Box<dyn Mixing>, Tensor)> {
    let mut source = Lively(Initialiser::new(seed, dtype, Device::Cpu));
    let normal = Init::Normal { deviation: 1.0 };
    let shape = [1, 1, length, 16];
    let mut draw = |name: &str| source.parameter(name, &shape, normal);
    let (q, k, v) = (draw("q")?, draw("k")?, draw("v")?);
    let tokens = source.parameter("tokens", &[1, length, 16], normal)?;
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let module = spec.build(&HEADS, Parameters::new(&mut source, &ranks, &mut linears))?;
    let mixing = mixing_alone(module.as_ref(), [&q, &k], &tokens, None)?;
    Ok((mixing, v))
}

const FORMS: [(LionForm, &str); 3] = [
    (LionForm::Parallel, "parallel"),
    (LionForm::Recurrent, "recurrent"),
    (LionForm::Chunked { size: 64 }, "chunks of 64"),
];

fn with_form(decay: LionDecay, form: LionForm) -> LionSpec {
    LionSpec {
        decay,
        form,
        ..LionSpec::default()
    }
}

fn exact(seed: u64) -> Result<Vec<Claim>> {
    let mut worst = 0f64;
    for decay in [LionDecay::None, LionDecay::Constant, LionDecay::Selective] {
        let of = |form: LionForm| -> Result<Tensor> {
            let (mixing, v) = specimen(&with_form(decay, form), 100, DType::F64, seed)?;
            Ok(mixing.mix(&v)?)
        };
        let parallel = of(LionForm::Parallel)?;
        for size in [1, 3, 64, 100] {
            let other = of(LionForm::Chunked { size })?;
            worst = worst.max(difference(&other, &parallel)?);
        }
        worst = worst.max(difference(&of(LionForm::Recurrent)?, &parallel)?);
    }
    let mut by_feature = 0f64;
    for decay in [LionDecay::Constant, LionDecay::Selective] {
        let of = |form: LionForm| -> Result<Tensor> {
            let spec = LionSpec {
                per_feature: true,
                ..with_form(decay, form)
            };
            let (mixing, v) = specimen(&spec, 100, DType::F64, seed)?;
            Ok(mixing.mix(&v)?)
        };
        let recurrent = of(LionForm::Recurrent)?;
        for size in [3, 16, 64, 100] {
            let chunked = of(LionForm::Chunked { size })?;
            by_feature = by_feature.max(difference(&chunked, &recurrent)?);
        }
    }
    Ok(vec![
        Claim::new(
            "the parallel, recurrent and chunked forms are equal",
            "exact",
            format!(
                "largest relative difference {worst:.1e} in f64, of 100 tokens and three decays"
            ),
            Verdict::of(worst < 1e-12),
        ),
        Claim::new(
            "with a decay for each feature, chunks of any size are the recurrence",
            "stated for any diagonal decay",
            format!(
                "largest relative difference {by_feature:.1e} in f64, of 100 tokens and two decays"
            ),
            Verdict::of(by_feature < 1e-12),
        ),
    ])
}

fn costs(size: &Size) -> Result<(Vec<Claim>, Plot)> {
    let (mut counted, mut timed) = (Vec::new(), Vec::new());
    for (form, name) in FORMS {
        let longest = match form {
            LionForm::Parallel => size.longest_parallel,
            _ => size.longest,
        };
        let spec = with_form(LionDecay::Selective, form);
        let (mut operations, mut seconds) = (Vec::new(), Vec::new());
        let lengths = std::iter::successors(Some(256usize), |length| Some(2 * length));
        for length in lengths.take_while(|length| *length <= longest) {
            let (mixing, v) = specimen(&spec, length, DType::F32, 1)?;
            operations.push((length as f64, mixing.operations(16) as f64));
            let best = quickest(3, || mixing.mix(&v).map(|_| ()).map_err(Into::into))?;
            seconds.push((length as f64, best * 1e3));
        }
        counted.push((name, exponent(&operations)));
        timed.push(Series {
            name: name.to_owned(),
            points: seconds,
        });
    }
    let of = |form: &str| {
        let found = counted.iter().find(|(name, _)| *name == form);
        found.map_or(f64::NAN, |(_, exponent)| *exponent)
    };
    let near = |form: &str, claimed: f64| (of(form) - claimed).abs() < 0.1;
    let holds = near("parallel", 2.0) && near("recurrent", 1.0) && near("chunks of 64", 1.0);
    let meets = |ours: &str| {
        let points = |name: &str| timed.iter().find(|series| series.name == name);
        let pair = points(ours).zip(points("parallel"));
        let at = pair.and_then(|(ours, other)| crossover(&ours.points, &other.points));
        at.map_or("not in this range".to_owned(), |at| format!("{at}"))
    };
    let claim = Claim::new(
        "operations of the parallel form grow with the square of the length, those of the others \
         linearly",
        "quadratic and linear",
        format!(
            "exponents {:.2}, {:.2} and {:.2}; on this machine chunks are quicker than the \
             parallel form from {} tokens on, the recurrence from {}",
            of("parallel"),
            of("recurrent"),
            of("chunks of 64"),
            meets("chunks of 64"),
            meets("recurrent")
        ),
        Verdict::of(holds),
    );
    let plot = Plot {
        title: "Time of the forms, one head of 16 features".to_owned(),
        x: "tokens".to_owned(),
        y: "milliseconds".to_owned(),
        series: timed,
    };
    Ok((vec![claim], plot))
}
