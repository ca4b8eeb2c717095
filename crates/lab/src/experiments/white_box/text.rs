//! Small decoders that read bytes.

use super::{BLOCKS, HEADS, Job, Size, Trained, white_box};
use crate::experiments::after_training;
use crate::experiments::attending::{self, shakespeare};
use crate::experiments::decoder::train_by;
use crate::{Claim, Result, Setting, Verdict};
use lapidary_parts::attention::MultiHeadSpec;

const CLOSE: &str = "within 0.25 nats of a Transformer's block of the same width and depth";
const MORE: &str = "an over-complete dictionary is better than a square one";

/// A training for each kind of block, and none where there is no text.
pub(super) fn jobs<'a>(setting: &Setting, size: &'a Size) -> Result<Vec<(String, Job<'a>)>> {
    let Some([training, held_out]) = shakespeare(setting)? else {
        return Ok(Vec::new());
    };
    let attention = MultiHeadSpec {
        causal: true,
        ..MultiHeadSpec::new(HEADS)
    };
    let gpt = attending::spec(256, size.width, size.text.length, &vec![attention; BLOCKS]);
    let jobs = [
        ("Transformer", gpt.clone()),
        ("square", white_box(&gpt, None)),
        ("over-complete", white_box(&gpt, Some(4 * size.width))),
    ];
    let seed = setting.seed;
    let jobs = jobs.map(|(name, spec)| {
        let (training, mut held_out) = (training.clone(), held_out.clone());
        let job = move || -> Result<Trained> {
            let task = Box::new(training);
            let model = train_by(size.text, spec, task, size.text_steps, seed)?;
            let found = attending::measure(&model, &mut held_out, size.text, size.text_batches)?;
            Ok(Trained::Decoder(found.loss))
        };
        (
            format!("a decoder of text, {name}"),
            Box::new(job) as Job<'a>,
        )
    });
    Ok(jobs.into())
}

/// What they read, and what is claimed of the losses of all that were trained.
pub(super) fn claimed(setting: &Setting, losses: &[f64]) -> (String, Vec<Claim>) {
    let [gpt, square, over] = losses else {
        let missing = |claim: &str| {
            Claim::new(
                &format!("on text, causal: {claim}"),
                "OpenWebText: CRATE-GPT2-Base 3.37 (60 M), GPT2-Small 3.04 (64 M)",
                "no text: give --data with tiny_shakespeare.txt",
                Verdict::NotMeasured,
            )
        };
        return ("no text".to_owned(), vec![missing(CLOSE), missing(MORE)]);
    };
    let told =
        format!("Transformer {gpt:.3}, square {square:.3}, over-complete {over:.3} nats a byte");
    (
        "the bytes of Tiny Shakespeare".to_owned(),
        vec![
            Claim::new(
                &format!("on text, causal: {CLOSE}"),
                "OpenWebText: CRATE-GPT2-Base 3.37 (60 M), GPT2-Small 3.04 (64 M)",
                told.clone(),
                after_training(setting.scale, square - gpt <= 0.25),
            ),
            Claim::new(
                &format!("on text, causal: {MORE}"),
                "the group's follow-up recommends it",
                told,
                after_training(setting.scale, over < square),
            ),
        ],
    )
}
