//! A decoder as a memory: how its loss, its states and what it knows by heart depend on how much
//! data it sees.
//!
//! The corpus is a grammar of questions whose entropy is known for each token, so that what a
//! loss levels at can be told from what it must level at.

mod byte_pairs;
mod fractions;
mod grammar;
mod grid;

use super::{after_training, decoder, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use grammar::{Text, VOCABULARY, Windows};
use lapidary_explain::analyses::energy::{
    Descent, Patterns, Radii, descent, log_partition, loss, loss_bound, memorised, radii,
    unit_ball_radius,
};
use lapidary_kernels::{DType, Device};
use lapidary_model::Model;
use lapidary_train::generator;

struct Size {
    width: usize,
    blocks: usize,
    steps: u64,
    /// Windows of the fractions below all of the data.
    fractions: [usize; 2],
    windows: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 2,
                steps: 2,
                fractions: [8, 4],
                windows: 4,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 2,
                steps: 800,
                fractions: [320, 32],
                windows: 32,
            },
            Scale::Full => Self {
                width: 128,
                blocks: 6,
                steps: 20_000,
                fractions: [32_000, 3200],
                windows: 256,
            },
        }
    }
}

/// A model trained on some of the data.
struct Trained {
    name: String,
    training_loss: f64,
    held_out_loss: f64,
    memorised: f64,
    radii: Radii,
    descent: Vec<Descent>,
}

impl Trained {
    fn measure(
        name: String,
        model: &Model,
        training: &[Vec<u32>],
        held_out: &[Vec<u32>],
        seed: u64,
    ) -> Result<Self> {
        Ok(Self {
            name,
            training_loss: loss(model, training)?,
            held_out_loss: loss(model, held_out)?,
            memorised: memorised(model, training, decoder::LENGTH / 2)?,
            radii: radii(model, training, held_out, &mut generator(seed))?,
            descent: descent(model, training, held_out, 8)?,
        })
    }

    /// Median distance to the nearest training state, as a share of what it is when coordinates
    /// no longer go together: states of different models are of different size.
    fn radius(&self) -> f64 {
        Radii::quantile(&self.radii.held_out, 0.5) / Radii::quantile(&self.radii.dealt, 0.5)
    }

    fn descends(&self) -> f64 {
        mean(self.descent.iter().map(|block| block.descends))
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut drawn = generator(setting.seed ^ 0xda7a);
    let mut draw = |count: usize| -> Vec<Text> {
        (0..count)
            .map(|_| Text::window(decoder::LENGTH, &mut drawn))
            .collect()
    };
    let tokens =
        |texts: &[Text]| -> Vec<Vec<u32>> { texts.iter().map(|t| t.tokens.clone()).collect() };
    let held_out = draw(size.windows);
    // Of every token but the first of a window, which nothing predicts.
    let surprise = held_out
        .iter()
        .flat_map(|text| text.surprise.iter().skip(1));
    let entropy = mean(surprise.copied());
    let held_out = tokens(&held_out);

    let spec = decoder::spec(VOCABULARY, size.width, size.blocks);
    let mut models = Vec::new();
    let [some, few] = size.fractions;
    for (name, count) in [
        ("new windows for ever", None),
        ("some", Some(some)),
        ("few", Some(few)),
    ] {
        let windows = tokens(&draw(count.unwrap_or(size.windows)));
        let seen: Vec<Vec<u32>> = windows.iter().take(size.windows).cloned().collect();
        let (name, task) = match count {
            None => (name.to_owned(), Windows::New),
            Some(count) => (format!("{count} windows"), Windows::Fixed(windows)),
        };
        let model = decoder::train(spec.clone(), Box::new(task), size.steps, setting.seed)?;
        models.push(Trained::measure(
            name,
            &model,
            &seen,
            &held_out,
            setting.seed,
        )?);
    }
    let random = Model::initialised(spec, setting.seed, DType::F32, &Device::Cpu)
        .map_err(lapidary_model::Error::from)?;
    let random = Trained::measure(
        "untrained".to_owned(),
        &random,
        &tokens(&draw(size.windows)),
        &held_out,
        setting.seed,
    )?;

    let mut claims = exact(size.width, setting.seed)?;
    claims.extend(trained_claims(setting.scale, entropy, &models, &random));
    let grid = grid::run(setting)?;
    claims.extend(grid.claims(setting.scale));
    let fractions = fractions::run(setting)?;
    claims.extend(fractions.claims(setting.scale));
    let mut plots = vec![plot(&models, &random), grid.plot()];
    plots.extend(fractions.plots());
    Ok(Reproduction {
        setting: format!(
            "decoder of {} blocks, width {}, {} steps of {} windows of {} tokens of a grammar of \
             questions with {VOCABULARY} words: new ones for ever, {some}, and {few}; {}; {}; one \
             seed",
            size.blocks,
            size.width,
            size.steps,
            decoder::BATCH,
            decoder::LENGTH,
            grid.setting(),
            fractions.setting(),
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

/// What holds at any size.
fn exact(width: usize, seed: u64) -> Result<Vec<Claim>> {
    use rand::RngExt;
    let mut rng = generator(seed);
    let mut point = |scale: f64| -> Vec<f64> {
        (0..4)
            .map(|_| scale * (2.0 * rng.random::<f64>() - 1.0))
            .collect()
    };
    let patterns = Patterns::new(4, (0..12).flat_map(|_| point(2.0)).collect())?;
    let (mut rises, mut outside) = (0, 0);
    for _ in 0..300 {
        let x = point(3.0);
        let energy = patterns.energy(&x)?;
        let least = patterns
            .distances(&x)?
            .into_iter()
            .fold(f64::INFINITY, f64::min);
        rises += usize::from(patterns.energy(&patterns.descend(&x)?)? > energy + 1e-12);
        outside += usize::from(energy > least + 1e-12 || energy < least - 12f64.ln() - 1e-12);
    }
    let (lowest, at) = (-300..=300)
        .map(|step| f64::from(step) * 0.01)
        .map(|mass| (loss_bound(mass), mass.exp()))
        .fold((f64::INFINITY, f64::NAN), |least, found| {
            match found.0 < least.0 {
                true => found,
                false => least,
            }
        });
    let (exact, limit) = unit_ball_radius(width);
    Ok(vec![
        Claim::new(
            "the energy lies between the least distance less ln M and the least distance, and a \
             step down its majoriser never raises it",
            "theorem",
            format!("{outside} outside, {rises} rises, of 300 starts"),
            Verdict::of(rises + outside == 0),
        ),
        Claim::new(
            "ln Z + 1/Z is at least 1",
            "the bound on the loss",
            format!("least {lowest:.6}, at Z = {at:.2}"),
            Verdict::of((lowest - 1.0).abs() < 1e-12),
        )
        .noted(format!(
            "of balls around 10^6 states at the unit-ball radius {exact:.2} (√(n/2πe) = {limit:.2}), \
             ln Z is {:.1}",
            log_partition(1_000_000, width, exact)?
        )),
    ])
}

fn trained_claims(scale: Scale, entropy: f64, models: &[Trained], random: &Trained) -> Vec<Claim> {
    let told = |of: &dyn Fn(&Trained) -> String| -> String {
        let each: Vec<String> = models
            .iter()
            .map(|m| format!("{}: {}", m.name, of(m)))
            .collect();
        each.join("; ")
    };
    let all = models.first();
    let few = models.last();
    let loss = all.map_or(f64::NAN, |m| m.held_out_loss);
    let below = |m: &&Trained| m.training_loss < 0.95 * entropy;
    let by_heart = models.iter().filter(below).all(|m| m.memorised > 0.5);
    let overfits = models.iter().filter(below).all(|m| m.held_out_loss > loss);
    let radius = |m: Option<&Trained>| m.map_or(f64::NAN, Trained::radius);
    vec![
        Claim::new(
            "on new data the loss levels at the entropy of the grammar, within 10 %, and not below",
            "vanilla Transformers: the loss levels off near 1",
            format!(
                "loss {loss:.3}, entropy {entropy:.3} nats for each token, on the same windows"
            ),
            after_training(scale, loss >= 0.99 * entropy && loss <= 1.1 * entropy),
        )
        .noted("what a loss levels at is a property of the text; that of this grammar is known"),
        Claim::new(
            "the entropy at which the loss levels is near 1 (between 0.9 and 1.1)",
            "about 1",
            format!("{entropy:.3}"),
            after_training(scale, (0.9..=1.1).contains(&entropy)),
        )
        .noted("depends on the grammar alone: with a larger vocabulary it would be higher"),
        Claim::new(
            "the training loss falls below the entropy only where more than half of the training \
             windows are known by heart, and there the held-out loss rises",
            "1 % and 0.1 % of OpenWebText overfit",
            told(&|m| {
                format!(
                    "training {:.3}, held out {:.3}, by heart {:.0} %",
                    m.training_loss,
                    m.held_out_loss,
                    100.0 * m.memorised
                )
            }),
            after_training(
                scale,
                models.iter().any(|m| below(&m)) && by_heart && overfits,
            ),
        ),
        Claim::new(
            "held-out states are at least 20 % nearer to training states in the model that \
             memorises than in the one that sees all data",
            "none published",
            told(&|m| format!("{:.3}", m.radius())),
            after_training(scale, radius(few) <= 0.8 * radius(all)),
        )
        .noted(
            "median distance over that with coordinates dealt out anew among the held-out states",
        ),
        Claim::new(
            "a block of a trained model brings at least 70 % of held-out states down in energy, of \
             an untrained one about half (40 to 60 %)",
            "the theory: layers descend",
            format!(
                "{}; untrained: {:.0} %",
                told(&|m| format!("{:.0} %", 100.0 * m.descends())),
                100.0 * random.descends()
            ),
            after_training(
                scale,
                all.is_some_and(|m| m.descends() >= 0.7)
                    && (0.4..=0.6).contains(&random.descends()),
            ),
        ),
    ]
}

fn plot(models: &[Trained], random: &Trained) -> Plot {
    let curve = |model: &Trained| Series {
        name: model.name.clone(),
        points: (0..=40)
            .map(|step| f64::from(step) / 40.0)
            .map(|share| (Radii::quantile(&model.radii.held_out, share), share))
            .collect(),
    };
    Plot {
        title: "From held-out states to the nearest training state".to_owned(),
        x: "distance".to_owned(),
        y: "share below".to_owned(),
        series: models.iter().chain([random]).map(curve).collect(),
    }
}
