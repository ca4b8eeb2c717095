//! Fastmax beside softmax: on digits as pixels, on nested lists, as a decoder of text, and in time.
//!
//! The paper trains on Long Range Arena and MNIST as a sequence; here the same kinds of task are made
//! small.

use super::classifier::Narrow;
use super::decoder::{self, Recipe};
use super::jobs::means_by_seed;
use super::masked::text;
use super::sequences::{
    Course, LEVELS, Measures, SIDE, crossover, digits, exponent, listed, of, on_lists_by,
    percent_right, quickest, train, train_from,
};
use super::{after_training, difference, mean, number};
use crate::error::engine;
use crate::mechanisms::mixing_alone;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{
    AttentionOptions, DType, Device, PolynomialAttention, Tensor, attention, naive,
};
use lapidary_model::{Initialiser, InputSpec, Pass};
use lapidary_parts::attention::mechanism::fastmax::{FastmaxSpec, Normalisation};
use lapidary_parts::attention::mechanism::{Describe, Heads};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, QueryKeySharing};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_train::{batch_loss, generator};
use std::collections::BTreeMap;

/// How much is done.
struct Size {
    digits: (usize, u64),
    seeds: u64,
    lists: (usize, u64),
    decoder: (u64, usize),
    longest: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                digits: (40, 2),
                seeds: 1,
                lists: (40, 1),
                decoder: (1, 32),
                longest: 512,
            },
            Scale::Small => Self {
                digits: (1797, 400),
                seeds: 2,
                lists: (8000, 500),
                decoder: (300, 256),
                longest: 8192,
            },
            Scale::Full => Self {
                digits: (20_000, 4000),
                seeds: 3,
                lists: (90_000, 10_000),
                decoder: (10_000, 256),
                longest: 16_384,
            },
        }
    }
}

fn fastmax(degree: usize, normalisation: Normalisation) -> MechanismSpec {
    MechanismSpec::Fastmax(FastmaxSpec {
        degree,
        normalisation,
        ..FastmaxSpec::default()
    })
}

/// What is compared.
fn ways() -> [(&'static str, MechanismSpec); 3] {
    [
        ("softmax", MechanismSpec::Softmax),
        ("Fastmax 1", fastmax(1, Normalisation::Token)),
        ("Fastmax 2", fastmax(2, Normalisation::Token)),
    ]
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = exact()?;
    claims.push(on_digits(setting, &size)?);
    claims.push(on_lists(setting, &size)?);
    let (what, claim) = as_a_decoder(setting, &size)?;
    claims.push(claim);
    claims.push(with_large_weights(setting, &size)?);
    setting.tell(|| "time by length".to_owned());
    let (claim, plot) = in_time(&size)?;
    claims.push(claim);
    Ok(Reproduction {
        setting: format!(
            "{} digits as {} pixels, {} steps; {} nested lists, {} steps; a decoder of {what}, {} \
             steps of windows of {}",
            size.digits.0,
            SIDE * SIDE,
            size.digits.1,
            size.lists.0,
            size.lists.1,
            size.decoder.0,
            size.decoder.1
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

fn draw(name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let mut source = Initialiser::new(1, dtype, Device::Cpu);
    Ok(source.parameter(name, shape, Init::Normal { deviation: 0.5 })?)
}

fn exact() -> Result<Vec<Claim>> {
    let mut worst = 0f64;
    for coefficients in [[1.0, 1.0, 0.0], [1.0, 1.0, 0.5]] {
        for causal in [false, true] {
            let of = |name: &str| draw(name, &[2, 2, 100, 8], DType::F64);
            let (q, k, v) = (of("q")?, of("k")?, of("v")?);
            let factored = PolynomialAttention::new(coefficients, causal).sums(&q, &k, &v)?;
            let laid_out = naive::polynomial_attention(&q, &k, &v, coefficients, causal)?;
            worst = worst.max(difference(&factored, &laid_out)?);
        }
    }
    Ok(vec![Claim::new(
        "sums over monomials equal those over all pairs of positions, in both degrees, with and \
         without a causal mask",
        "exact",
        format!("largest relative difference {worst:.1e} in f64, of 100 tokens"),
        Verdict::of(worst < 1e-12),
    )])
}

const DIGITS: Measures = Measures {
    vocabulary: LEVELS,
    length: SIDE * SIDE,
    labels: 10,
    width: 32,
    heads: 4,
    blocks: 2,
};

fn on_digits(setting: &Setting, size: &Size) -> Result<Claim> {
    let (count, steps) = size.digits;
    let found = means_by_seed(setting, "digits", &ways(), size.seeds, |mechanism, seed| {
        let course = Course {
            steps,
            batch: 32,
            rate: 3e-3,
            seed,
        };
        let training = digits(count, seed);
        let spec = DIGITS.spec(mechanism.clone(), true);
        let model = train(spec, &training, &course)?;
        percent_right(&model, &digits(count / 2, seed ^ 0xd161))
    })?;
    Ok(Claim::new(
        "digits as sequences: Fastmax 2 within 1.5 points of softmax of the same size",
        "the accuracy of softmax on MNIST as a sequence",
        listed(&found),
        after_training(
            setting.scale,
            of(&found, "Fastmax 2") >= of(&found, "softmax") - 1.5,
        ),
    ))
}

fn on_lists(setting: &Setting, size: &Size) -> Result<Claim> {
    let found = on_lists_by(setting, &ways(), 32, size.lists)?;
    Ok(Claim::new(
        "nested lists: Fastmax 2 within 1.5 points of softmax of the same size",
        "Long Range Arena: softmax 38.4, Fastmax 1 37.2, Fastmax 2 37.4 %",
        listed(&found),
        after_training(
            setting.scale,
            of(&found, "Fastmax 2") >= of(&found, "softmax") - 1.5,
        ),
    ))
}

fn as_a_decoder(setting: &Setting, size: &Size) -> Result<(String, Claim)> {
    let (steps, length) = size.decoder;
    let what = text(setting)?.what;
    let found = means_by_seed(setting, "a decoder", &ways(), 1, |mechanism, seed| {
        let mut text = text(setting)?;
        let mut spec = decoder::spec(text.vocabulary, 64, 2);
        if let InputSpec::Tokens(tokens) = &mut spec.input {
            tokens.length = length;
        }
        for block in &mut spec.blocks {
            if let MixerSpec::MultiHead(attention) = &mut block.attention {
                attention.mechanism = mechanism.clone();
            }
        }
        let recipe = Recipe {
            batch: 4,
            length,
            narrow: true,
            ..Recipe::default()
        };
        let model = decoder::train_by(recipe, spec, text.training, steps, seed)?;
        let mut generator = generator(seed ^ 0xfa57);
        let mut losses = Vec::new();
        for _ in 0..10 {
            let batch = text.held_out.batch(&mut generator, 4, length)?;
            losses.push(number(&batch_loss(&model, &batch, Pass::default())?)?);
        }
        Ok(mean(losses))
    })?;
    let each = found.iter().map(|(name, loss)| format!("{name} {loss:.3}"));
    let claim = Claim::new(
        "a causal decoder: the loss of Fastmax 2 is at most 0.1 nats above that of softmax",
        "no figure",
        format!("{} nats", each.collect::<Vec<_>>().join(", ")),
        after_training(
            setting.scale,
            of(&found, "Fastmax 2") <= of(&found, "softmax") + 0.1,
        ),
    );
    Ok((what, claim))
}

/// Initial queries and keys many times as long.
struct Large(Narrow);

impl ParameterSource for Large {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let tensor = self.0.parameter(name, shape, init)?;
        let is_score = ["query.weight", "key.weight"]
            .iter()
            .any(|part| name.ends_with(part));
        let factor = if is_score { 8.0 } else { 1.0 };
        Ok((tensor * factor).map_err(lapidary_kernels::Error::from)?)
    }
}

/// Percent between two accuracies that are not the same by chance: about a standard error of the difference on the
/// digits held out at small scale.
const APART: f64 = 2.0;

fn with_large_weights(setting: &Setting, size: &Size) -> Result<Claim> {
    let (count, steps) = size.digits;
    let training = digits(count, setting.seed);
    let held_out = digits(count / 2, setting.seed ^ 0xd161);
    let ways = [
        ("token, degree 1", (1, Normalisation::Token)),
        ("token, degree 2", (2, Normalisation::Token)),
        ("none, degree 1", (1, Normalisation::None)),
        ("none, degree 2", (2, Normalisation::None)),
    ];
    let task = "digits from large weights, normalised by";
    let found = means_by_seed(setting, task, &ways, 1, |(degree, normalisation), seed| {
        let course = Course {
            steps,
            batch: 32,
            rate: 3e-3,
            seed,
        };
        let mut source = Large(Narrow(Initialiser::new(seed, DType::F32, Device::Cpu)));
        let spec = DIGITS.spec(fastmax(*degree, *normalisation), true);
        let model = train_from(spec, &mut source, &training, &course)?;
        percent_right(&model, &held_out)
    })?;
    let worse = |none: &str, token: &str| {
        let none = of(&found, none);
        none.is_nan() || none <= of(&found, token) - APART
    };
    let worse =
        worse("none, degree 1", "token, degree 1") && worse("none, degree 2", "token, degree 2");
    let each = found
        .iter()
        .map(|(name, right)| format!("{name}: {right:.1} %"));
    Ok(Claim::new(
        "with queries and keys eight times as long at the start, attention without normalisation \
         diverges or is worse by 2 points at least, in both degrees",
        "normalisation is needed",
        each.collect::<Vec<_>>().join("; "),
        after_training(setting.scale, worse),
    ))
}

fn in_time(size: &Size) -> Result<(Claim, Plot)> {
    const WIDTH: usize = 16;
    let heads = Heads {
        width: WIDTH,
        heads: 1,
        head_width: WIDTH,
        value_width: WIDTH,
        causal: false,
        scale: 1.0 / (WIDTH as f64).sqrt(),
        sharing: QueryKeySharing::None,
    };
    let mut source = Initialiser::new(1, DType::F32, Device::Cpu);
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let parameters = Parameters::new(&mut source, &ranks, &mut linears);
    let module = FastmaxSpec::default().build(&heads, parameters)?;
    let (mut ours, mut other, mut counted) = (Vec::new(), Vec::new(), Vec::new());
    let lengths = std::iter::successors(Some(256usize), |length| Some(2 * length));
    for length in lengths.take_while(|length| *length <= size.longest) {
        let of = |name: &str| draw(name, &[1, 1, length, WIDTH], DType::F32);
        let (q, k, v) = (of("q")?, of("k")?, of("v")?);
        let tokens = engine(q.squeeze(1))?;
        // With what is done to queries and keys first, and the division.
        let mixing = || mixing_alone(module.as_ref(), [&q, &k], &tokens, None);
        let per_token = |seconds: f64| (length as f64, seconds * 1e6 / length as f64);
        ours.push(per_token(quickest(3, || {
            mixing()?.mix(&v)?;
            Ok(())
        })?));
        other.push(per_token(quickest(3, || {
            attention(&q, &k, &v, &AttentionOptions::new(WIDTH))?;
            Ok(())
        })?));
        counted.push((length as f64, mixing()?.operations(WIDTH) as f64));
    }
    let meets = match crossover(&ours, &other) {
        Some(length) => format!("{length}"),
        None => "no length in this range".to_owned(),
    };
    let slope = exponent(&counted);
    let claim = Claim::new(
        "operations of Fastmax 2 grow linearly with the length",
        "linear; quicker than softmax from about d² tokens on",
        format!(
            "exponent {slope:.2}; with heads of 16 features quicker than softmax on this machine \
             from {meets} tokens on",
        ),
        Verdict::of((slope - 1.0).abs() < 0.1),
    );
    let line = |name: &str, points: Vec<(f64, f64)>| Series {
        name: name.to_owned(),
        points,
    };
    let plot = Plot {
        title: "Time for each token, one head of 16 features".to_owned(),
        x: "tokens".to_owned(),
        y: "microseconds".to_owned(),
        series: vec![line("Fastmax 2", ours), line("softmax", other)],
    };
    Ok((claim, plot))
}
