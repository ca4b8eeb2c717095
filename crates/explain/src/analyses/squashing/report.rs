//! The collapse as tables and plots.

use super::families::{Alphabet, Family, Prompt, Separator};
use super::paths::{mixing, path_sums, uniform};
use super::{
    Directions, Distance, Emulated, Flow, check_fits, collapse_length, decline, jacobian_norms,
    path_bound,
};
use crate::error::engine;
use crate::report::{Cell, Plot, Report, Series, Table};
use crate::{Question, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model};
use lapidary_signal::rounding::{Format, Rounding, SoftmaxPrecision};

/// Random directions of the Jacobians in a report.
const DIRECTIONS: usize = 16;
/// Tokens of the sequence whose Jacobians a report shows, at most.
const TOKENS: usize = 128;

/// What is asked of a model.
#[derive(Clone, Debug)]
pub struct Inquiry {
    /// The families to follow.
    pub families: Vec<Family>,
    /// Their tokens.
    pub alphabet: Alphabet,
    /// Their lengths, ascending.
    pub lengths: Vec<usize>,
    /// The formats, beside `f64`.
    pub formats: Vec<Format>,
    /// Where attention rounds.
    pub softmax: SoftmaxPrecision,
    /// A separator to try as a remedy.
    pub separator: Option<Separator>,
    /// A length from which to sharpen attention, to try as a remedy.
    pub sharpen: Option<usize>,
    /// Questions to answer in each format.
    pub prompts: Vec<Prompt>,
    /// Seed of random directions.
    pub seed: u64,
}

/// One curve of distances.
struct Curve {
    family: Family,
    format: Option<Format>,
    remedy: &'static str,
    distances: Vec<Distance>,
}

/// Distances, collapse lengths, sensitivities and answers.
///
/// # Errors
/// When sequences do not fit the model.
pub fn report(model: &Model, inquiry: &Inquiry) -> Result<Report> {
    let most = inquiry.lengths.iter().copied().max().unwrap_or(1);
    let with_separators = Alphabet {
        separator: inquiry.separator,
        ..inquiry.alphabet.clone()
    };
    check_fits(model, &with_separators, most)?;
    let roundings = std::iter::once(None).chain(inquiry.formats.iter().map(|format| {
        Some(Rounding {
            format: *format,
            softmax: inquiry.softmax,
        })
    }));
    let mut curves = Vec::new();
    let mut answers = answer_table();
    for rounding in roundings {
        let emulated = Emulated::new(model, rounding)?;
        let mut follow = |emulated: &Emulated, remedy, alphabet: &Alphabet| -> Result<()> {
            for family in &inquiry.families {
                curves.push(Curve {
                    family: *family,
                    format: emulated.format(),
                    remedy,
                    distances: emulated.distances(*family, alphabet, &inquiry.lengths)?,
                });
            }
            Ok(())
        };
        follow(&emulated, "none", &inquiry.alphabet)?;
        if inquiry.separator.is_some() {
            follow(&emulated, "separators", &with_separators)?;
        }
        if !inquiry.prompts.is_empty() {
            let right = emulated.answers(&inquiry.prompts)?;
            add_answers(&mut answers, &emulated, &inquiry.prompts, &right);
        }
        if let Some(length) = inquiry.sharpen {
            let sharpened = emulated.sharpened(length)?;
            follow(&sharpened, "sharpened", &inquiry.alphabet)?;
        }
    }
    let mut found = Report {
        title: "Collapse: what the last vector can still tell".to_owned(),
        notes: vec![
            format!("lengths {:?}", inquiry.lengths),
            format!("softmax {:?} under rounding", inquiry.softmax),
        ],
        tables: vec![collapse_table(&curves)],
        maps: Vec::new(),
        plots: inquiry
            .families
            .iter()
            .map(|family| curve_plot(*family, &curves))
            .collect(),
        ..Report::default()
    };
    if !inquiry.prompts.is_empty() {
        found.tables.push(answers);
    }
    add_sensitivity(&mut found, model, inquiry, most.min(TOKENS))?;
    Ok(found)
}

fn format_name(format: Option<Format>) -> &'static str {
    format.map_or("f64", Format::name)
}

fn collapse_table(curves: &[Curve]) -> Table {
    let mut table = Table::new(
        "Neighbours of each family: from where they look alike, and how their distance falls",
        &[
            "family",
            "format",
            "remedy",
            "collapse length",
            "exponent",
            "R²",
            "distance at the end",
        ],
    );
    for curve in curves {
        let collapse = curve
            .format
            .map(|format| collapse_length(&curve.distances, format));
        let collapse: Cell = match collapse {
            Some(Some(n)) => n.into(),
            Some(None) => "none measured".into(),
            None => "not asked".into(),
        };
        let law = decline(&curve.distances);
        let number = |value: Option<f64>| value.map_or_else(|| Cell::from("none"), Cell::from);
        table.push([
            curve.family.name().into(),
            format_name(curve.format).into(),
            curve.remedy.into(),
            collapse,
            number(law.map(|law| law.exponent)),
            number(law.map(|law| law.r_squared)),
            number(curve.distances.last().map(|distance| distance.relative)),
        ]);
    }
    table
}

fn curve_plot(family: Family, curves: &[Curve]) -> Plot {
    let of = curves.iter().filter(|curve| curve.family == family);
    Plot {
        title: format!("Distance of neighbours: {}", family.name()),
        x: "log10 n".to_owned(),
        y: "log10 of the largest difference".to_owned(),
        series: of
            .map(|curve| Series {
                name: match curve.remedy {
                    "none" => format_name(curve.format).to_owned(),
                    remedy => format!("{}, {remedy}", format_name(curve.format)),
                },
                points: curve
                    .distances
                    .iter()
                    .filter(|distance| distance.largest > 0.0)
                    .map(|distance| ((distance.n as f64).log10(), distance.largest.log10()))
                    .collect(),
            })
            .collect(),
    }
}

fn answer_table() -> Table {
    Table::new(
        "Prompts answered",
        &["format", "tokens in the prompt", "right", "of"],
    )
}

/// One row for each length of prompt.
fn add_answers(table: &mut Table, emulated: &Emulated, prompts: &[Prompt], right: &[bool]) {
    let mut counts = std::collections::BTreeMap::<usize, (usize, usize)>::new();
    for (prompt, right) in prompts.iter().zip(right) {
        let (answered, all) = counts.entry(prompt.tokens.len()).or_default();
        *answered += usize::from(*right);
        *all += 1;
    }
    for (length, (answered, all)) in counts {
        table.push([
            format_name(emulated.format()).into(),
            length.into(),
            answered.into(),
            all.into(),
        ]);
    }
}

/// What each token of `1ⁿ⁻¹ 0` can do to the last vector.
fn add_sensitivity(
    found: &mut Report,
    model: &Model,
    inquiry: &Inquiry,
    length: usize,
) -> Result<()> {
    let (tokens, _) = Family::OnesThenZero.pair(length, &inquiry.alphabet);
    let shape = (1, tokens.len());
    let ids = engine(Tensor::from_slice(&tokens, shape, &model.device()))?;
    let input = Input::tokens(ids);
    let question = Question::new(model, &input);
    let directions = Directions::Random {
        count: DIRECTIONS,
        seed: inquiry.seed,
    };
    let mut series = Vec::new();
    let mut add = |name: &str, values: &[f64]| {
        series.push(Series {
            name: name.to_owned(),
            points: (0..)
                .zip(values)
                .filter(|(_, value)| **value > 0.0)
                .map(|(i, value)| (f64::from(i), value.log10()))
                .collect(),
        });
    };
    for (flow, name) in [
        (Flow::All, "Jacobian (Frobenius, estimated)"),
        (Flow::Frozen, "with attention and norms fixed"),
    ] {
        add(
            name,
            &jacobian_norms(&question, flow, directions)?.frobenius,
        );
    }
    match path_bound(&question) {
        Ok(bound) => add("bound over paths (operator norm)", &bound),
        Err(error) => found.notes.push(format!("no bound over paths: {error}")),
    }
    let blocks = model.spec().expanded_blocks().len();
    let theory = vec![mixing(&uniform(tokens.len()), 1.0); blocks];
    add("paths of uniform attention", &path_sums(&theory));
    found.plots.push(Plot {
        title: format!(
            "What each of {} tokens can do to the last vector",
            tokens.len()
        ),
        x: "token".to_owned(),
        y: "log10".to_owned(),
        series,
    });
    Ok(())
}
