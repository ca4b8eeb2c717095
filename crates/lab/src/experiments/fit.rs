//! FIT: two marks in far groups, Tiny Shakespeare in groups of a line's length, and how memory and
//! attention grow.
//!
//! The paper trains on images of up to 6400 × 6400 pixels. Here sequences are short and models narrow.

use super::attending::{self, shakespeare};
use super::classifier::Labelled;
use super::decoder::{self, Recipe};
use super::jobs::{in_parallel, means_by_seed};
use super::sequences::{Course, Measures, exponent, of, percent_right, train};
use super::{after_learning, after_training, difference};
use crate::catalogue::metered;
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass,
};
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::organisation::fit::{FitOutput, FitSpec, GroupPositions, LatentPositions};
use lapidary_signal::Trace;
use lapidary_signal::meter::Meter;
use lapidary_train::data::BYTE_VOCABULARY;
use lapidary_train::generator;
use rand::RngExt;

/// Groups, and tokens of each, that operations are counted with at every scale: their shares depend on the length.
const COUNTED: usize = 16;

/// How much is done.
struct Size {
    group: usize,
    groups: usize,
    examples: usize,
    steps: u64,
    seeds: u64,
    text_width: usize,
    text_batch: usize,
    text_steps: u64,
    longest: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                group: 4,
                groups: 4,
                examples: 40,
                steps: 2,
                seeds: 1,
                text_width: 16,
                text_batch: 1,
                text_steps: 1,
                longest: 4096,
            },
            Scale::Small => Self {
                group: 8,
                groups: 8,
                examples: 16_000,
                steps: 3000,
                seeds: 1,
                text_width: 64,
                text_batch: 4,
                text_steps: 200,
                longest: 32_768,
            },
            Scale::Full => Self {
                group: COUNTED,
                groups: COUNTED,
                examples: 50_000,
                steps: 3000,
                seeds: 3,
                text_width: 128,
                text_batch: 8,
                text_steps: 5000,
                longest: 65_536,
            },
        }
    }
}

/// Groups and latents around the blocks of a spec, the global blocks like the first of them.
fn interleaved(
    spec: &mut ModelSpec,
    layout: &str,
    [group, groups, latents]: [usize; 3],
    output: FitOutput,
) {
    let block = spec.blocks.first().cloned();
    let one = |block: BlockSpec| BlockSpec { repeat: 1, ..block };
    let global = block.map(one).filter(|_| latents > 0);
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        // A group's table tells places within it, and only its latents know which it is.
        tokens.position = AbsolutePosition::None;
    }
    spec.organisation = Some(OrganisationSpec::Interleaved(FitSpec {
        layout: layout.to_owned(),
        group,
        groups,
        latents,
        width: None,
        block: global.map(Box::new),
        exchange_heads: None,
        read_feedforward: None,
        positions: GroupPositions::Learned,
        latent_positions: LatentPositions::Learned,
        tiles: None,
        condition: 0,
        output,
    }));
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = exact(setting.seed)?;
    claims.extend(far_marks(setting, &size)?);
    let (what, more) = on_text(setting, &size)?;
    claims.extend(more);
    setting.tell(|| "memory by length".to_owned());
    let (claim, plot) = growth(&size)?;
    claims.push(claim);
    Ok(Reproduction {
        setting: format!(
            "two marked tokens in {} groups of {}, {} steps of 16, {} seed(s), operations counted with {COUNTED} \
             groups of {COUNTED}; {what}, {} steps of {} windows of {CONTEXT} in groups of {LINE}, width {}",
            size.groups,
            size.group,
            size.steps,
            size.seeds,
            size.text_steps,
            size.text_batch,
            size.text_width
        ),
        claims,
        plots: vec![plot],
        ..Reproduction::default()
    })
}

const PLAIN: usize = 14;
const MARKS: u32 = PLAIN as u32;

/// Noise with two marked tokens in different groups, each a bit; the class is whether they differ.
fn marked(size: &Size, count: usize, seed: u64) -> Vec<Labelled> {
    let mut generator = generator(seed);
    let mut example = || {
        let mut tokens: Vec<u32> = (0..size.group * size.groups)
            .map(|_| generator.random_range(0..MARKS))
            .collect();
        let first = generator.random_range(0..size.groups);
        let second = (first + generator.random_range(1..size.groups)) % size.groups;
        let mut label = 0;
        for group in [first, second] {
            let bit = generator.random_range(0..2u32);
            label ^= bit;
            let place = group * size.group + generator.random_range(0..size.group);
            if let Some(token) = tokens.get_mut(place) {
                *token = MARKS + bit;
            }
        }
        Labelled { tokens, label }
    };
    (0..count).map(|_| example()).collect()
}

/// Models to tell marks apart in so many groups of so many tokens.
fn ways(group: usize, groups: usize) -> [(&'static str, ModelSpec); 3] {
    let measures = Measures {
        vocabulary: PLAIN + 2,
        length: group * groups,
        labels: 2,
        width: 32,
        heads: 4,
        blocks: 2,
    };
    let flat = measures.spec(MechanismSpec::Softmax, true);
    let mut local = flat.clone();
    interleaved(&mut local, "(2)", [group, groups, 0], FitOutput::Tokens);
    let mut fit = flat.clone();
    interleaved(&mut fit, "(1)1(1)1", [group, groups, 2], FitOutput::Latents);
    // The slowest first: the others share what is left of the time.
    [("FIT", fit), ("flat", flat), ("local", local)]
}

/// Operations of FIT, as a share of those of the flat Transformer.
fn share_of_operations() -> Result<f64> {
    let operations = |(_, spec): (&str, ModelSpec)| -> Result<f64> {
        let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
        Ok(metered(&model, COUNTED * COUNTED)?.total().flops as f64)
    };
    let [fit, flat, _] = ways(COUNTED, COUNTED);
    Ok(operations(fit)? / operations(flat)?)
}

/// Percent of marks told apart from which on a model has learned to.
const LEARNED: f64 = 75.0;

fn far_marks(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    let share = share_of_operations()?;
    let ways = ways(size.group, size.groups);
    let right = means_by_seed(setting, "far marks", &ways, size.seeds, |spec, seed| {
        let course = Course {
            steps: size.steps,
            batch: 16,
            rate: 3e-3,
            seed,
        };
        let model = train(spec.clone(), &marked(size, size.examples, seed), &course)?;
        let held_out = marked(size, (size.examples / 8).max(20), seed ^ 0x0f17);
        percent_right(&model, &held_out)
    })?;
    let [local, fit, flat] = ["local", "FIT", "flat"].map(|name| of(&right, name));
    let listed = format!("local blocks alone {local:.1} %, FIT {fit:.1} %, flat {flat:.1} %");
    Ok(vec![
        Claim::new(
            "whether two marks in different groups differ: local blocks alone cannot tell",
            "estimate for this task: 50 %",
            listed.clone(),
            after_learning(setting.scale, fit.max(flat) >= LEARNED, local < 60.0),
        )
        .noted(format!(
            "their mean over tokens adds both marks up, from which a linear reading has no parity; not measured \
             unless another model tells at least {LEARNED:.0} %"
        )),
        Claim::new(
            "FIT (1)1(1)1 with two latents tells at least 95 % within 3000 steps, and so does a flat \
             Transformer",
            "estimate for this task",
            listed,
            after_training(setting.scale, fit >= 95.0 && flat >= 95.0),
        ),
        Claim::new(
            "with 16 groups of 16 FIT does at most 35 % of the flat Transformer's operations",
            "estimate for this task",
            format!(
                "{:.1} % with {} tokens, read-outs and all",
                100.0 * share,
                COUNTED * COUNTED
            ),
            match setting.scale {
                Scale::Smoke => Verdict::NotMeasured,
                Scale::Small | Scale::Full => Verdict::of(share <= 0.35),
            },
        )
        .noted("counted, two blocks of width 32 beside two global ones, reads and a write"),
    ])
}

const CONTEXT: usize = 512;
const LINE: usize = 32;

fn on_text(setting: &Setting, size: &Size) -> Result<(String, Vec<Claim>)> {
    let width = size.text_width;
    let blocks = 4;
    let flat = |blocks: usize| {
        let attention = attending::causal((width / 16).max(1), MechanismSpec::Softmax);
        attending::spec(
            BYTE_VOCABULARY as usize,
            width,
            CONTEXT,
            &vec![attention; blocks],
        )
    };
    let mut fit = flat(blocks);
    interleaved(
        &mut fit,
        "(2)1(2)",
        [LINE, CONTEXT / LINE, 2],
        FitOutput::Tokens,
    );
    // Pairs of a query and a key that weights are for, causal ones half.
    let (n, m, t) = (LINE as f64, 2.0, (CONTEXT / LINE) as f64);
    let own = blocks as f64 * t * n * n / 2.0 + 2.0 * t * n * m + (t * m) * (t * m) / 2.0;
    let all = blocks as f64 * (CONTEXT * CONTEXT) as f64 / 2.0;
    let memory = Claim::new(
        "attention weights of FIT as a decoder, 16 groups of 32 with two latents, are at most 25 % of a \
         flat decoder's",
        "estimate for this task",
        format!("{:.1} % of the pairs", 100.0 * own / all),
        Verdict::of(own <= 0.25 * all),
    );
    let recipe = Recipe {
        batch: size.text_batch,
        length: CONTEXT,
        narrow: true,
        ..Recipe::default()
    };
    let Some([training, held_out]) = shakespeare(setting)? else {
        let claim = Claim::new(
            "on Tiny Shakespeare its loss is within 0.1 nats of a flat decoder's",
            "estimate for this task",
            "no data",
            Verdict::NotMeasured,
        );
        return Ok(("no text".to_owned(), vec![memory, claim]));
    };
    let batches = if setting.scale == Scale::Smoke { 1 } else { 8 };
    // A global block, a read and a write are about as many parameters as one block more and a half.
    let jobs = [("FIT", fit), ("flat", flat(blocks + 2))];
    let jobs = jobs.map(|(name, spec)| (format!("a decoder of text, {name}"), spec));
    let losses = in_parallel(setting, jobs.into(), |spec| {
        let task = Box::new(training.clone());
        let model = decoder::train_by(recipe, spec, task, size.text_steps, setting.seed)?;
        let measure = attending::measure(&model, &mut held_out.clone(), recipe, batches)?;
        Ok((measure.loss, model.parameter_count()))
    })?;
    let (own, flat) = match losses.as_slice() {
        [own, flat] => (*own, *flat),
        _ => ((f64::NAN, 0), (f64::NAN, 0)),
    };
    let claim = Claim::new(
        "on Tiny Shakespeare its loss is within 0.1 nats of a flat decoder's with as many parameters",
        "estimate for this task",
        format!(
            "{:.3} with {} parameters, flat {:.3} with {}",
            own.0, own.1, flat.0, flat.1
        ),
        after_training(setting.scale, own.0 <= flat.0 + 0.1),
    );
    Ok(("bytes of Tiny Shakespeare".to_owned(), vec![memory, claim]))
}

/// What holds of any parameters.
fn exact(seed: u64) -> Result<Vec<Claim>> {
    let mut spec = attending::spec(
        16,
        32,
        32,
        &vec![attending::causal(2, MechanismSpec::Softmax); 2],
    );
    spec.head = HeadSpec::LanguageModel {
        tied: true,
        bias: true,
        transform: None,
    };
    interleaved(&mut spec, "(1)2(1)", [4, 8, 2], FitOutput::Tokens);
    let mut source = super::classifier::Narrow(Initialiser::new(seed, DType::F64, Device::Cpu));
    let model = Model::new(spec.clone(), &mut source)?;
    let ids: Vec<u32> = (0..32).map(|i| i * 7 % 16).collect();
    let scores = |ids: &[u32]| -> Result<Tensor> {
        let input = engine(Tensor::from_vec(ids.to_vec(), (1, ids.len()), &Device::Cpu))?;
        let output = model.forward(&Input::tokens(input), Pass::default())?;
        Ok(output.into_logits()?.into_value())
    };
    let whole = scores(&ids)?;
    let mut leak = 0f64;
    let mut apart = 0f64;
    for place in 1..32 {
        let mut other = ids.clone();
        if let Some(token) = other.get_mut(place) {
            *token = (*token + 5) % 16;
        }
        let before = engine(whole.narrow(1, 0, place))?;
        leak = leak.max(difference(
            &engine(scores(&other)?.narrow(1, 0, place))?,
            &before,
        )?);
        let prefix: Vec<u32> = ids.iter().take(place).copied().collect();
        apart = apart.max(difference(&scores(&prefix)?, &before)?);
    }
    let mut plain = spec.clone();
    if let InputSpec::Tokens(tokens) = &mut plain.input {
        tokens.length = 4;
    }
    interleaved(&mut plain, "(2)", [4, 1, 0], FitOutput::Tokens);
    let grouped = Model::initialised(plain.clone(), seed, DType::F64, &Device::Cpu)?;
    let mut parameters = grouped.parameters().clone();
    if let Some(table) = parameters.remove("organisation.positions.weight") {
        parameters.insert("embeddings.positions.weight".to_owned(), table);
    }
    plain.organisation = None;
    if let InputSpec::Tokens(tokens) = &mut plain.input {
        tokens.position = AbsolutePosition::Learned {
            offset: 0,
            skip_padding: false,
        };
    }
    let encoder = Model::new(plain, &mut parameters)?;
    let four = engine(Tensor::new(&[[1u32, 5, 2, 9]], &Device::Cpu))?;
    let of = |model: &Model| -> Result<Tensor> {
        let output = model.forward(&Input::tokens(four.clone()), Pass::default())?;
        Ok(output.into_logits()?.into_value())
    };
    let same = difference(&of(&grouped)?, &of(&encoder)?)?;
    Ok(vec![
        Claim::new(
            "as a decoder no token hears of later ones, those of its own group among them, and the first \
             tokens alone have the same scores",
            "exact",
            format!(
                "scores before a changed token differ by {leak:.1e}, those of prefixes by {apart:.1e}"
            ),
            Verdict::of(leak == 0.0 && apart < 1e-10),
        ),
        Claim::new(
            "one group without latents is the plain Transformer",
            "exact",
            format!("scores differ by {same:.1e}"),
            Verdict::of(same < 1e-12),
        ),
    ])
}

/// Bytes that a training pass would keep, and operations of attention, by the length with `n = L^⅓`.
fn growth(size: &Size) -> Result<(Claim, Plot)> {
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    let lengths = std::iter::successors(Some(8usize), |side| Some(2 * side))
        .map(|side| (side, side * side))
        .take_while(|(side, groups)| side * groups <= size.longest);
    for (group, groups) in lengths {
        let length = group * groups;
        let measures = Measures {
            vocabulary: 64,
            length,
            labels: 2,
            width: 16,
            heads: 1,
            blocks: 2,
        };
        let mut spec = measures.spec(MechanismSpec::Softmax, true);
        interleaved(&mut spec, "(1)1(1)", [group, groups, 1], FitOutput::Tokens);
        let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
        let meter = Meter::new();
        let start = meter.clone();
        // Captured signals stay alive, as what a backward pass reads does.
        let trace = Trace::new()
            .replace("embeddings", move |_, signal| {
                Ok(signal.into_metered(start.clone()))
            })?
            .capture("{blocks,organisation}.*.{in,out,query,key,value,mixed,memory,hidden}")?;
        let ids: Vec<u32> = (0..length as u32).map(|i| i * 7 % 64).collect();
        let ids = engine(Tensor::from_vec(ids, (1, length), &Device::Cpu))?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids), pass)?;
        bytes.push((length as f64, meter.peak_live_bytes() as f64));
        let sites = meter.sites();
        let mixed = sites.iter().filter(|(site, _)| site.ends_with(".mixed"));
        let mixed: u64 = mixed.map(|(_, cost)| cost.flops).sum();
        operations.push((length as f64, mixed as f64));
    }
    let (kept, done) = (exponent(&bytes), exponent(&operations));
    let longest = bytes.last().map_or(0.0, |(length, _)| *length);
    let claim = Claim::new(
        "with groups of n = L^⅓ memory and attention grow at most as L^1.35",
        "O(L^{4/3})",
        format!(
            "bytes of everything that sites saw as L^{kept:.2}, operations of attention as L^{done:.2}, \
             from 512 to {longest} tokens"
        ),
        Verdict::of(kept <= 1.35 && done <= 1.35),
    );
    let plot = Plot {
        title: "Bytes that a training pass keeps, one latent a group".to_owned(),
        x: "tokens".to_owned(),
        y: "MiB".to_owned(),
        series: vec![Series {
            name: "FIT (1)1(1), groups of L^⅓".to_owned(),
            points: bytes
                .iter()
                .map(|(length, bytes)| (*length, bytes / f64::from(1u32 << 20)))
                .collect(),
        }],
    };
    Ok((claim, plot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_two_in_different_groups_and_the_class_their_parity() {
        let size = Size::of(Scale::Small);
        for example in marked(&size, 200, 3) {
            let marks: Vec<(usize, u32)> = (0..)
                .zip(&example.tokens)
                .filter(|(_, token)| **token >= MARKS)
                .map(|(place, token)| (place / size.group, token - MARKS))
                .collect();
            assert_eq!(marks.len(), 2);
            assert_ne!(marks[0].0, marks[1].0);
            assert_eq!(example.label, marks[0].1 ^ marks[1].1);
        }
    }
}
