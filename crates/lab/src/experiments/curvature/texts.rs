//! How strongly kinds of text lean on the directions that go, and what that costs each.

use super::Size;
use crate::experiments::{after_training, mean};
use crate::{Claim, Plot, Result, Series, Setting, Verdict};
use lapidary_compress::CalibrationData;
use lapidary_compress::curvature::{Spectrum, correlation};
use lapidary_compress::quality::{Window, perplexity};
use lapidary_model::Model;
use lapidary_train::generator;
use lapidary_train::language::{Corpus, Kind, Split};

/// Sequences of a pass.
const BATCH: usize = 16;

/// One kind of text.
struct Text {
    name: &'static str,
    sequences: Vec<Vec<u32>>,
}

/// One kind of text, measured.
struct Leaning {
    name: &'static str,
    /// Share of the layers' output energy in the directions that go.
    removed: f64,
    /// Rise of the loss in nats for each token.
    rise: f64,
}

/// Canaries, clean text, and sentences of each kind.
fn texts(
    setting: &Setting,
    size: &Size,
    canaries: &[Vec<u32>],
    clean: Vec<Vec<u32>>,
    held_out: &Corpus,
) -> Result<Vec<Text>> {
    let mut texts = vec![
        Text {
            name: "canaries",
            sequences: canaries.to_vec(),
        },
        Text {
            name: "clean text",
            sequences: clean,
        },
    ];
    let mut random = generator(setting.seed ^ 0x7e97);
    let language = held_out.language();
    for kind in Kind::ALL {
        let mut sequences = Vec::new();
        for _ in 0..size.sentences {
            let sentence = language.sentence(kind, Split::HeldOut, &mut random);
            sequences.push(sentence.tokens(language.vocabulary())?);
        }
        texts.push(Text {
            name: kind.name(),
            sequences,
        });
    }
    Ok(texts)
}

/// What the edit that keeps `mass` does to each kind of text, as claims and a figure; without an
/// edit that is cheap enough they are not measured.
pub(super) fn claims(
    setting: &Setting,
    size: &Size,
    (canaries, clean, held_out): (&[Vec<u32>], Vec<Vec<u32>>, &Corpus),
    (model, spectrum): (&Model, &Spectrum),
    chosen: Option<(f64, &Model)>,
) -> Result<(Vec<Claim>, Option<Plot>)> {
    let mut leanings = Vec::new();
    if let Some((mass, edited)) = chosen {
        for text in texts(setting, size, canaries, clean, held_out)? {
            leanings.push(leaning(&text, (model, edited), spectrum, mass)?);
        }
    }
    let verdict = |holds: bool| match chosen {
        Some(_) => after_training(setting.scale, holds),
        None => Verdict::NotMeasured,
    };
    let (removed, rises): (Vec<f64>, Vec<f64>) = leanings
        .iter()
        .map(|text| (text.removed, text.rise))
        .unzip();
    let together = correlation(&removed, &rises);
    let share = |name: &str| {
        let text = leanings.iter().find(|text| text.name == name);
        text.map_or(f64::NAN, |text| text.removed)
    };
    let (recited, clean) = (share("canaries"), share("clean text"));
    let listed: Vec<String> = leanings
        .iter()
        .map(|text| {
            format!(
                "{} {:.1} % and {:+.2}",
                text.name,
                100.0 * text.removed,
                text.rise
            )
        })
        .collect();
    let or_none = |measured: String| match chosen {
        Some(_) => measured,
        None => "no edit costs so little".to_owned(),
    };
    let plot = chosen.map(|_| {
        let mut points: Vec<(f64, f64)> = removed.iter().copied().zip(rises).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Plot {
            title: "What the edit costs kinds of text".to_owned(),
            x: "share of energy in directions that go".to_owned(),
            y: "rise of the loss (nats per word)".to_owned(),
            series: vec![Series {
                name: "kinds of text".to_owned(),
                points,
            }],
        }
    });
    let claims = vec![
        Claim::new(
            "Canaries have more of their energy in the directions that go than clean text",
            "memorised text leans on low curvature",
            or_none(format!(
                "{:.1} % against {:.1} %",
                100.0 * recited,
                100.0 * clean
            )),
            verdict(recited > clean),
        ),
        Claim::new(
            "The share of a text's energy in the directions that go is correlated with what the edit costs it",
            "the more a task leans on them, the more it falls",
            or_none(format!(
                "correlation {}: {}",
                together.map_or("undefined".to_owned(), |r| format!("{r:.2}")),
                listed.join(", ")
            )),
            verdict(together.is_some_and(|r| r > 0.0)),
        )
        .noted("energy at every word, mean over the edited layers; rise of the loss in nats per word"),
    ];
    Ok((claims, plot))
}

fn leaning(
    text: &Text,
    (model, edited): (&Model, &Model),
    spectrum: &Spectrum,
    mass: f64,
) -> Result<Leaning> {
    let data = CalibrationData::windows(text.sequences.clone())?;
    let shares = spectrum.shares(model, &data, BATCH, &[mass])?;
    let windows: Vec<Window> = text
        .sequences
        .iter()
        .map(|tokens| Window {
            tokens: tokens.clone(),
            context: 1,
        })
        .collect();
    let loss =
        |model: &Model| -> Result<f64> { Ok(perplexity(model, &windows, BATCH)?.value.ln()) };
    Ok(Leaning {
        name: text.name,
        removed: mean(shares.values().filter_map(|bands| bands.last().copied())),
        rise: loss(edited)? - loss(model)?,
    })
}
