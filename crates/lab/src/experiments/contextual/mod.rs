//! Contextual decomposition on a planted circuit and on phrases whose meaning is known.
//!
//! The published figures are of GPT-2 and BERT models that come from elsewhere, and of reports of
//! patients that are private. Here the circuit is the one that attention without feed-forward
//! parts must grow to repeat patterns, a head that looks back by one and heads that look for what
//! it marked ([`induction`]), and the phrases are negated words of generated sentences
//! ([`phrases`]).

mod induction;
mod phrases;

use super::after_training;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use induction::Planted;
use phrases::Phrases;

/// How much is done.
struct Size {
    /// Steps of the attention-only decoder.
    decoder_steps: u64,
    prompts: usize,
    /// Examples and steps of the classifier.
    examples: usize,
    classifier_steps: u64,
    tests: usize,
    /// Blocks, heads and width of the model that searches are timed on.
    timed: [usize; 3],
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                decoder_steps: 3,
                prompts: 6,
                examples: 200,
                classifier_steps: 4,
                tests: 10,
                timed: [2, 2, 16],
            },
            Scale::Small => Self {
                decoder_steps: 2000,
                prompts: 48,
                examples: 20_000,
                classifier_steps: 1200,
                tests: 200,
                timed: [6, 8, 128],
            },
            Scale::Full => Self {
                decoder_steps: 6000,
                prompts: 256,
                examples: 20_000,
                classifier_steps: 6000,
                tests: 1000,
                timed: [12, 12, 384],
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let planted = induction::run(size.decoder_steps, size.prompts, setting.seed)?;
    let times = induction::times(size.timed, size.prompts.min(16), setting.seed)?;
    let phrases = phrases::run(
        size.examples,
        size.classifier_steps,
        size.tests,
        setting.seed,
    )?;
    let mut claims = planted_claims(setting.scale, &planted);
    claims.extend(phrase_claims(setting.scale, &phrases));
    let [blocks, heads, width] = size.timed;
    let ratio = times.patching / times.contextual;
    claims.push(
        Claim::new(
            "the same search takes at least twice as long by path patching, on the same sites",
            "half the time (pathology reports)",
            format!(
                "{ratio:.1} times: {:.2} s for {:.2} s, from {} heads to the scores and to the \
                 {heads} heads of the last block, in {blocks} blocks of width {width}",
                times.patching, times.contextual, times.sources,
            ),
            // Milliseconds are not worth comparing.
            match setting.scale {
                Scale::Smoke => Verdict::NotMeasured,
                Scale::Small | Scale::Full => Verdict::of(ratio >= 2.0),
            },
        )
        .noted("path patching sets a sender to its mean and runs 64 sequences at a time, too"),
    );
    Ok(Reproduction {
        setting: format!(
            "an attention-only decoder (2 blocks of 4 heads, width 64) after {} steps on patterns \
             that come back (32 symbols, length 32), {} prompts of which it gets {:.0} % right; a \
             post-norm encoder (3 blocks, width 64) after {} steps on polarity sentences, {} \
             held-out ones of which it gets {:.0} % right; one seed",
            size.decoder_steps,
            size.prompts,
            100.0 * planted.accuracy,
            size.classifier_steps,
            size.tests,
            100.0 * phrases.accuracy,
        ),
        claims,
        plots: vec![controls_plot(&planted), phrases.plot()],
        ..Reproduction::default()
    })
}

fn planted_claims(scale: Scale, planted: &Planted) -> Vec<Claim> {
    let named = |nodes: &[lapidary_explain::contextual::Node]| {
        let names: Vec<String> = nodes.iter().map(ToString::to_string).collect();
        names.join(", ")
    };
    let found = |node| planted.circuit.contains(node);
    let halves = planted
        .controls
        .iter()
        .filter(|control| control.share <= 0.5);
    let beaten = super::mean(halves.map(|control| control.beaten));
    vec![
        Claim::new(
            "everything relevant gives the scores and nothing gives zero, in both modes, with \
             and without the stabiliser",
            "exact",
            format!("largest relative error {:.1e} in f32", planted.error),
            Verdict::of(planted.error < 1e-4),
        ),
        Claim::new(
            "the circuit has the head of block 0 that looks back by one and the head of block 1 \
             that looks at what followed",
            "planted",
            format!(
                "circuit {}; looking back most: {} ({:.2} of its weight), looking at what \
                 followed most: {} ({:.2})",
                named(&planted.circuit),
                planted.previous.0,
                planted.previous.1,
                planted.induction.0,
                planted.induction.1,
            ),
            after_training(
                scale,
                found(&planted.previous.0) && found(&planted.induction.0),
            ),
        )
        .noted("two heads a round, targets read at queries, keys and values, split attention"),
        Claim::new(
            "three of its heads at most are faithful to 0.9",
            "0.817 with 8 heads (greater-than), 0.847 with 10 of 32 (docstring)",
            format!(
                "{:.3} with {}; {:.3} with all {}",
                planted.best.1,
                named(&planted.best.0),
                planted.faithfulness,
                planted.circuit.len(),
            ),
            after_training(scale, planted.best.1 >= 0.9),
        ),
        Claim::new(
            "contributions to the scores and the cost of ablating each head: rank correlation of \
             at least 0.7",
            "none published",
            format!(
                "{:.2} with split attention, {:.2} with frozen",
                planted.agreement[0], planted.agreement[1]
            ),
            after_training(scale, planted.agreement[0] >= 0.7),
        )
        .noted(
            "contributions are those along values; what a head does to the queries and keys of \
             later ones is seen by the search, from those heads, not from the scores",
        ),
        Claim::new(
            "it is more faithful than random circuits of up to half of the heads",
            "with probability about 1",
            format!("than {:.0} % of them", 100.0 * beaten),
            after_training(scale, beaten >= 0.95),
        ),
    ]
}

fn phrase_claims(scale: Scale, phrases: &Phrases) -> Vec<Claim> {
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let difference = phrases.aopc - phrases.decompx_aopc;
    vec![
        Claim::new(
            "a positive word after a negator, scored as one, speaks against positive in at least \
             90 %, while neither of the words does",
            "shown by examples",
            format!(
                "{} of {} phrases; the negators alone {}, the words alone {}",
                percent(phrases.negative),
                phrases.count,
                percent(phrases.negators),
                percent(phrases.words),
            ),
            after_training(
                scale,
                phrases.negative >= 0.9 && phrases.negators < 0.9 && phrases.words < 0.9,
            ),
        ),
        Claim::new(
            "masking its tokens, highest first, costs the predicted class what DecompX's cost: \
             AOPC within 0.05",
            "none published",
            format!(
                "{:.3}, DecompX {:.3}: {difference:+.3}",
                phrases.aopc, phrases.decompx_aopc
            ),
            after_training(scale, difference.abs() <= 0.05),
        ),
    ]
}

fn controls_plot(planted: &Planted) -> Plot {
    let points = |of: &dyn Fn(&lapidary_explain::contextual::Control) -> f64| {
        let each = planted.controls.iter();
        each.map(|one| (100.0 * one.share, of(one))).collect()
    };
    Plot {
        title: "Faithfulness of the planted circuit and of random ones".to_owned(),
        x: "heads in a random circuit, %".to_owned(),
        y: "faithfulness".to_owned(),
        series: vec![
            Series {
                name: "found by contextual decomposition".to_owned(),
                points: points(&|_| planted.faithfulness),
            },
            Series {
                name: "random, mean of 10".to_owned(),
                points: points(&|one| super::mean(one.faithfulness.iter().copied())),
            },
        ],
    }
}
