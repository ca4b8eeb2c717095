//! LION: one decay in two directions, on digits as pixels and on hidden tokens, and what its forms
//! cost.
//!
//! The paper trains image classifiers on ImageNet and masked language models on C4. Here printed
//! digits are 64 pixels without positions, where only the decay tells near from far, and a small
//! encoder names hidden tokens.

use super::jobs::means_by_seed;
use super::masked;
use super::sequences::{Course, LEVELS, Measures, SIDE, crossover, digits, exponent, of};
use super::sequences::{percent_right, quickest, train};
use super::{after_training, difference};
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::memory::most_held;
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
    let costs = costs(&size)?;
    claims.extend([of_operations(&costs), of_memory(&costs)]);
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
        plots: plots(&costs),
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

/// What one form costs: amounts by length.
#[derive(Debug, Default)]
struct Costs {
    operations: Vec<(f64, f64)>,
    milliseconds: Vec<(f64, f64)>,
    /// MiB held at a time beyond queries, keys and values; nothing where they aren't counted.
    held: Vec<(f64, f64)>,
}

/// What each of [`FORMS`] costs.
fn costs(size: &Size) -> Result<[Costs; 3]> {
    let mut all: [Costs; 3] = Default::default();
    for ((form, _), costs) in FORMS.into_iter().zip(&mut all) {
        let longest = match form {
            LionForm::Parallel => size.longest_parallel,
            _ => size.longest,
        };
        let spec = with_form(LionDecay::Selective, form);
        let lengths = std::iter::successors(Some(256usize), |length| Some(2 * length));
        for length in lengths.take_while(|length| *length <= longest) {
            let (mixing, v) = specimen(&spec, length, DType::F32, 1)?;
            let at = length as f64;
            costs.operations.push((at, mixing.operations(16) as f64));
            let (mixed, held) = most_held(|| mixing.mix(&v));
            mixed?;
            let held = held.map(|bytes| (at, bytes as f64 / f64::from(1 << 20)));
            costs.held.extend(held);
            let best = quickest(3, || mixing.mix(&v).map(|_| ()).map_err(Into::into))?;
            costs.milliseconds.push((at, best * 1e3));
        }
    }
    Ok(all)
}

fn of_operations(costs: &[Costs; 3]) -> Claim {
    let exponents = costs.each_ref().map(|costs| exponent(&costs.operations));
    let [parallel, recurrent, chunked] = exponents;
    let near = |exponent: f64, claimed: f64| (exponent - claimed).abs() < 0.1;
    let holds = near(parallel, 2.0) && near(recurrent, 1.0) && near(chunked, 1.0);
    let [others, recurrence, chunks] = costs.each_ref().map(|costs| &costs.milliseconds);
    let meets = |ours: &[(f64, f64)]| {
        let at = crossover(ours, others);
        at.map_or("not in this range".to_owned(), |at| format!("{at}"))
    };
    Claim::new(
        "operations of the parallel form grow with the square of the length, those of the others \
         linearly",
        "quadratic and linear",
        format!(
            "exponents {parallel:.2}, {recurrent:.2} and {chunked:.2}; on this machine chunks are \
             quicker than the parallel form from {} tokens on, the recurrence from {}",
            meets(chunks),
            meets(recurrence)
        ),
        Verdict::of(holds),
    )
}

fn of_memory(costs: &[Costs; 3]) -> Claim {
    let exponents = costs.each_ref().map(|costs| exponent(&costs.held));
    let [parallel, recurrent, chunked] = exponents;
    let both = costs.iter().map(|costs| costs.held.last());
    let longest = both.flatten().map(|(length, _)| *length);
    // The longest that all forms have.
    let longest = longest.fold(f64::INFINITY, f64::min);
    let [laid_out, carried, by_chunks] = costs.each_ref().map(|costs| {
        let found = costs.held.iter().find(|(length, _)| *length == longest);
        found.map_or(f64::NAN, |(_, held)| *held)
    });
    let (measured, verdict) = match exponents.iter().any(|exponent| exponent.is_nan()) {
        true => ("memory not counted".to_owned(), Verdict::NotMeasured),
        false => (
            format!(
                "exponents {parallel:.2}, {recurrent:.2} and {chunked:.2}; with {longest} tokens \
                 {laid_out:.2}, {carried:.2} and {by_chunks:.2} MiB"
            ),
            Verdict::of((parallel - 2.0).abs() < 0.1 && recurrent < 1.1 && chunked < 1.1),
        ),
    };
    Claim::new(
        "memory of the parallel form grows with the square of the length, that of the recurrence \
         and of chunks at most linearly",
        "quadratic and linear",
        measured,
        verdict,
    )
    .noted(
        "the most that one head of 16 features holds at a time to mix, beyond queries, keys, values \
         and decays, in pieces of at least 1 KiB",
    )
}

/// What all forms cost of one kind, by length.
fn plot(costs: &[Costs; 3], [title, y]: [&str; 2], of: fn(&Costs) -> &[(f64, f64)]) -> Plot {
    let series = FORMS.iter().zip(costs).map(|((_, name), costs)| Series {
        name: (*name).to_owned(),
        points: of(costs).to_vec(),
    });
    Plot {
        title: format!("{title} of the forms, one head of 16 features"),
        x: "tokens".to_owned(),
        y: y.to_owned(),
        series: series.collect(),
    }
}

fn plots(costs: &[Costs; 3]) -> Vec<Plot> {
    let mut plots = vec![plot(costs, ["Time", "milliseconds"], |costs| {
        &costs.milliseconds
    })];
    if costs.iter().all(|costs| !costs.held.is_empty()) {
        plots.push(plot(costs, ["Memory", "MiB"], |costs| &costs.held));
    }
    plots
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forms that hold `length^exponent`.
    fn held(exponents: [f64; 3]) -> [Costs; 3] {
        exponents.map(|exponent| Costs {
            held: [256.0, 512.0, 1024.0]
                .map(|length: f64| (length, length.powf(exponent)))
                .to_vec(),
            ..Costs::default()
        })
    }

    #[test]
    fn memory_is_judged_by_its_exponents() {
        let verdict = |exponents| of_memory(&held(exponents)).verdict;
        assert_eq!(verdict([2.0, 1.0, 0.9]), Verdict::Holds);
        assert_eq!(verdict([1.5, 1.0, 1.0]), Verdict::DoesNotHold);
        assert_eq!(verdict([2.0, 1.2, 1.0]), Verdict::DoesNotHold);
        assert_eq!(verdict([2.0, 1.0, 1.2]), Verdict::DoesNotHold);
        let uncounted: [Costs; 3] = Default::default();
        assert_eq!(of_memory(&uncounted).verdict, Verdict::NotMeasured);
    }

    /// All forms are told of at the longest length that each was run at.
    #[test]
    fn memory_is_told_where_all_forms_were_run() {
        let mut costs = held([2.0, 1.0, 1.0]);
        costs[0].held.pop();
        let told = of_memory(&costs).measured;
        assert!(
            told.ends_with("with 512 tokens 262144.00, 512.00 and 512.00 MiB"),
            "{told}"
        );
    }
}
