//! The geometry as tables, maps and plots.

use super::scores::{PARTS, ScoreBlocks, score_blocks};
use super::{Layer, Reading, Sites, smoothness, topics};
use crate::Result;
use crate::report::{Cell, Map, Plot, Report, Series, Table};
use lapidary_factor::Matrix;
use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;

/// Most positions along the side of a map.
const MAP: usize = 64;

/// What was looked at, beside its controls.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name, such as `the text` or `random tokens`.
    pub name: String,
    /// The layers found.
    pub layers: Vec<Layer>,
}

/// The first subject in full and the others, its controls, beside it. `labels` has the topic of
/// each window of the first subject; `head` is a block and head whose scores are drawn.
///
/// # Errors
/// When a factorisation does not converge or the head does not exist.
pub fn report(
    model: &Model,
    subjects: &[Subject],
    reading: Reading,
    labels: Option<&[usize]>,
    head: (usize, usize),
) -> Result<Report> {
    let Some(first) = subjects.first() else {
        return Ok(Report::default());
    };
    let mut found = Report {
        title: "Hidden geometry: position and context".to_owned(),
        notes: notes(first, reading),
        tables: subjects.iter().map(diagnostics_table).collect(),
        maps: Vec::new(),
        plots: plots(subjects),
        ..Report::default()
    };
    found.tables.push(energy_table(first));
    if let Some(labels) = labels {
        found.tables.push(topic_table(first, labels)?);
    }
    if let Some(layer) = first.layers.last() {
        let gram = smoothness::gram(&layer.decomposition.positions);
        let title = format!("cosines of position vectors at {}", layer.site);
        found.maps.push(map(title, &gram, reading.skip));
    }
    if reading.sites == Sites::Stream && reading.keep > 0 {
        add_scores(&mut found, model, first, reading.skip, head)?;
    }
    Ok(found)
}

fn notes(first: &Subject, reading: Reading) -> Vec<String> {
    let sizes = first.layers.first().map(|layer| {
        let d = &layer.decomposition;
        (d.contexts.nrows(), d.positions.nrows(), d.mean.len())
    });
    let (contexts, positions, width) = sizes.unwrap_or_default();
    vec![
        format!("{contexts} windows, {positions} positions of each, width {width}"),
        format!(
            "positions left out at the start of each window: {}",
            reading.skip
        ),
    ]
}

fn diagnostics_table(subject: &Subject) -> Table {
    let mut table = Table::new(
        format!("Position vectors: {}", subject.name),
        &[
            "site",
            "rank",
            "rule",
            "stable rank",
            "explained ratio",
            "relative norm",
            "centred",
            "mean |cos| to contexts",
            "largest",
            "low frequencies",
        ],
    );
    for layer in &subject.layers {
        let d = &layer.diagnostics;
        table.push([
            layer.site.as_str().into(),
            d.rank.rank.into(),
            d.rank.rule.name().into(),
            d.stable_rank.into(),
            d.explained_ratio.into(),
            d.relative_norm.into(),
            d.relative_norm_centred.into(),
            d.incoherence.into(),
            d.incoherence_most.into(),
            d.smoothness.into(),
        ]);
    }
    table
}

fn energy_table(subject: &Subject) -> Table {
    let mut table = Table::new(
        "Shares of the variance of hidden states",
        &["site", "position", "context", "residual"],
    );
    for layer in &subject.layers {
        let energy = layer.diagnostics.energy;
        let share = |part: f64| part / energy.total.max(f64::MIN_POSITIVE);
        table.push([
            layer.site.as_str().into(),
            share(energy.positions).into(),
            share(energy.contexts).into(),
            share(energy.residual).into(),
        ]);
    }
    table
}

fn topic_table(subject: &Subject, labels: &[usize]) -> Result<Table> {
    let mut table = Table::new(
        "Mean |cos| of context vectors",
        &[
            "site",
            "within a topic",
            "between topics",
            "within, 20 components",
            "between, 20 components",
        ],
    );
    for layer in &subject.layers {
        let found = topics(&layer.decomposition.contexts, labels)?;
        table.push([
            layer.site.as_str().into(),
            found.within.into(),
            found.between.into(),
            found.within_projected.into(),
            found.between_projected.into(),
        ]);
    }
    Ok(table)
}

/// Smoothness and stable rank of position vectors over layers, a line for each subject.
pub fn layer_plots(subjects: &[(&str, &[Layer])]) -> Vec<Plot> {
    let over_layers = |title: &str, y: &str, of: fn(&Layer) -> f64| Plot {
        title: title.to_owned(),
        x: "layer".to_owned(),
        y: y.to_owned(),
        series: subjects
            .iter()
            .map(|(name, layers)| Series {
                name: (*name).to_owned(),
                points: (0..)
                    .zip(*layers)
                    .map(|(index, layer)| (f64::from(index), of(layer)))
                    .collect(),
            })
            .collect(),
    };
    vec![
        over_layers(
            "Smoothness of position vectors",
            "share of low frequencies",
            |layer| layer.diagnostics.smoothness,
        ),
        over_layers("Stable rank of position vectors", "stable rank", |layer| {
            layer.diagnostics.stable_rank
        }),
    ]
}

/// The first two components of a layer's position vectors.
pub fn spiral_plot(layer: &Layer) -> Plot {
    Plot {
        title: format!("Position vectors at {}", layer.site),
        x: "first component".to_owned(),
        y: "second component".to_owned(),
        series: vec![Series {
            name: "positions in order".to_owned(),
            points: layer
                .diagnostics
                .spiral
                .iter()
                .map(|[x, y, _]| (*x, *y))
                .collect(),
        }],
    }
}

fn plots(subjects: &[Subject]) -> Vec<Plot> {
    let named: Vec<_> = subjects
        .iter()
        .map(|subject| (subject.name.as_str(), subject.layers.as_slice()))
        .collect();
    let mut plots = layer_plots(&named);
    let Some(first) = subjects.first() else {
        return plots;
    };
    plots.extend(first.layers.iter().map(spiral_plot));
    let of_layer = |layer: &Layer| Series {
        name: layer.site.clone(),
        points: layer
            .diagnostics
            .truncation
            .iter()
            .filter(|(_, error)| *error > 0.0)
            .map(|(cutoff, error)| ((*cutoff as f64).log2(), error.log10()))
            .collect(),
    };
    plots.push(Plot {
        title: "What the lowest frequencies leave out".to_owned(),
        x: "log2 of the frequencies kept".to_owned(),
        y: "log10 of the relative error".to_owned(),
        series: first.layers.iter().map(of_layer).collect(),
    });
    plots
}

/// A large matrix is drawn by every so many of its rows and columns.
fn map(title: String, values: &Matrix, skip: usize) -> Map {
    let step = values.nrows().div_ceil(MAP).max(1);
    let shown: Vec<usize> = (0..values.nrows()).step_by(step).collect();
    let names: Vec<String> = shown.iter().map(|t| (t + skip).to_string()).collect();
    Map {
        title,
        rows: names.clone(),
        columns: names,
        values: shown
            .iter()
            .map(|i| shown.iter().map(|j| values[(*i, *j)]).collect())
            .collect(),
    }
}

/// The parts of scores: a table over all heads, and maps of one.
fn add_scores(
    found: &mut Report,
    model: &Model,
    subject: &Subject,
    skip: usize,
    (block, head): (usize, usize),
) -> Result<()> {
    let mut table = Table::new(
        "Attention scores of the first window: root mean square of each part, mean over heads",
        &[
            "block",
            "position to position",
            "position to the rest",
            "the rest to position",
            "the rest to itself",
            "with the mean",
            "all",
        ],
    );
    for (index, spec) in model.spec().expanded_blocks().iter().enumerate() {
        let MixerSpec::MultiHead(attention) = &spec.attention else {
            continue;
        };
        let Some(layer) = subject.layers.get(index) else {
            continue;
        };
        if attention.query_key_norm.is_some() {
            found.notes.push(format!(
                "block {index} normalises queries and keys, so its scores have no parts"
            ));
            continue;
        }
        let mut sums = [0.0; 6];
        for each in 0..attention.heads {
            let scores = score_blocks(model, &layer.decomposition, index, each, 0, skip)?;
            let parts = grouped(&scores);
            for (sum, part) in sums.iter_mut().zip(&parts) {
                *sum += root_mean_square(part, attention.causal) / attention.heads as f64;
            }
            if (index, each) == (block, head) {
                found.maps.extend(score_maps(&scores, index, each, skip));
            }
        }
        table.push(std::iter::once(Cell::from(index)).chain(sums.map(Into::into)));
    }
    found.tables.push(table);
    Ok(())
}

/// The sixteen blocks in five groups, as the table has them, and their sum.
fn grouped(scores: &ScoreBlocks) -> [Matrix; 6] {
    let sum = |of: &dyn Fn(usize, usize) -> bool| {
        let mut total = Matrix::zeros(scores.total.nrows(), scores.total.ncols());
        for (a, row) in scores.exact.iter().enumerate() {
            for (b, block) in row.iter().enumerate() {
                if of(a, b) {
                    total += block;
                }
            }
        }
        total
    };
    [
        sum(&|a, b| a == 1 && b == 1),
        sum(&|a, b| a == 1 && b >= 2),
        sum(&|a, b| a >= 2 && b == 1),
        sum(&|a, b| a >= 2 && b >= 2),
        sum(&|a, b| a == 0 || b == 0),
        sum(&|_, _| true),
    ]
}

fn root_mean_square(values: &Matrix, causal: bool) -> f64 {
    let (mut sum, mut count) = (0.0, 0usize);
    for i in 0..values.nrows() {
        let seen = if causal { i + 1 } else { values.ncols() };
        for j in 0..seen {
            sum += values[(i, j)].powi(2);
            count += 1;
        }
    }
    (sum / count.max(1) as f64).sqrt()
}

fn score_maps(scores: &ScoreBlocks, block: usize, head: usize, skip: usize) -> Vec<Map> {
    let mut maps = vec![map(
        format!("scores of head {block}.{head}"),
        &scores.total,
        skip,
    )];
    for (a, row) in scores.exact.iter().enumerate() {
        for (b, values) in row.iter().enumerate() {
            let title = format!("head {block}.{head}: {} to {}", PARTS[a], PARTS[b]);
            maps.push(map(title, values, skip));
        }
    }
    let names = ["position", "the rest"];
    for (a, row) in scores.renormalised.iter().enumerate() {
        for (b, values) in row.iter().enumerate() {
            let title = format!(
                "head {block}.{head}, each part normalised by itself: {} to {}",
                names[a], names[b]
            );
            maps.push(map(title, values, skip));
        }
    }
    maps
}
