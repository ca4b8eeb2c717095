//! LION: one decay in two directions, on digits as pixels and on hidden tokens, and what its forms
//! cost.
//!
//! The paper trains image classifiers on ImageNet and masked language models on C4. Here printed
//! digits are 64 pixels without positions, where only the decay tells near from far, and a small
//! encoder names hidden tokens.

mod costs;

use super::jobs::means_by_seed;
use super::masked;
use super::sequences::{Course, LEVELS, Measures, SIDE, digits, of, percent_right, train};
use super::{after_training, difference};
use crate::mechanisms::mixing_alone;
use crate::{Claim, Reproduction, Result, Scale, Setting, Verdict};
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

    fn named(self) -> (&'static str, Self) {
        (self.name(), self)
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
    batch: usize,
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
                batch: 8,
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
                seeds: 1,
                steps: 800,
                batch: 16,
                masked,
                longest: 16_384,
                longest_parallel: 2048,
            },
            Scale::Full => Self {
                digits: 20_000,
                seeds: 3,
                steps: 4000,
                batch: 32,
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
    setting.tell(|| "costs by length".to_owned());
    let (more, plots) = costs::run(&size)?;
    claims.extend(more);
    Ok(Reproduction {
        setting: format!(
            "printed digits as {} pixels without positions, {} steps of {}, {} seed(s); hidden \
             tokens of {what}, {} steps of {} windows of {}",
            SIDE * SIDE,
            size.steps,
            size.batch,
            size.seeds,
            size.masked.steps,
            size.masked.batch,
            size.masked.length
        ),
        claims,
        plots,
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
    // Two curves take longest and come first: the others share what is left of the time.
    let ways = [D_IMAGE, S_IMAGE, D, S, LIT, Way::Softmax].map(Way::named);
    let found = means_by_seed(setting, "digits", &ways, size.seeds, |way, seed| {
        let course = Course {
            steps: size.steps,
            batch: size.batch,
            rate: 3e-3,
            seed,
        };
        let spec = measures.spec(way.mechanism(), *way == Way::Softmax);
        let model = train(spec, &digits(size.digits, seed), &course)?;
        percent_right(&model, &digits(size.digits / 4, seed ^ 0xd161))
    })?;
    let right = |way: Way| of(&found, way.name());
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
    let masked::Text {
        what, vocabulary, ..
    } = masked::text(setting)?;
    let measures = Measures {
        vocabulary: vocabulary + 1,
        length: size.masked.length,
        labels: 1,
        width: 48,
        heads: 4,
        blocks: 2,
    };
    let ways = [Way::Softmax, LIT, D, S];
    let named = ways.map(Way::named);
    let right = means_by_seed(setting, "hidden tokens", &named, 1, |way, _| {
        let mut spec = measures.spec(way.mechanism(), *way == Way::Softmax);
        spec.head = HeadSpec::LanguageModel {
            tied: true,
            bias: true,
            transform: None,
        };
        masked::text(setting)?.accuracy(spec, &size.masked)
    })?;
    let of = |way: Way| of(&right, way.name());
    let listed = ways.map(|way| format!("{} {:.1} %", way.name(), of(way)));
    let claim = Claim::new(
        "hidden tokens: LION-S names at least as many as LION-D, and that more than LION-LIT",
        "C4: LIT 67.1, D 68.6, S 69.2, BERT 69.9 %",
        listed.join(", "),
        after_training(setting.scale, of(S) >= of(D) && of(D) > of(LIT)),
    );
    Ok((what, vec![claim]))
}

const HEADS: Heads = Heads {
    width: 16,
    heads: 1,
    head_width: 16,
    value_width: 16,
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
