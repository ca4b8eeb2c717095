//! `lapidary inspect curvature`: how strongly texts lean on directions of little curvature, and what
//! it costs each of them to take those out.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use lapidary_compress::CalibrationData;
use lapidary_compress::curvature::{Keep, Spectrum, Subnet, correlation, factors};
use lapidary_compress::quality::{Recitation, Window, perplexity, ranking_kept, recitation};
use lapidary_explain::report::{Cell, Map, Plot, Report, Series, Table};
use lapidary_model::{Model, Package};

use crate::cli::Global;
use crate::loading;

/// Windows of a forward pass.
const BATCH: usize = 8;

/// Tokens whose ranking is compared.
const RANKED: usize = 10;

/// Fewest texts that a correlation is said of: two always lie on a line.
const CORRELATED: usize = 3;

/// Masses between the bands that are shown, beside that of the edit.
const MASSES: [f64; 6] = [0.25, 0.5, 0.75, 0.9, 0.97, 0.99];

#[derive(Args, Debug)]
pub struct Curvature {
    /// A model directory, or `embedded`
    pub model: String,
    /// Ordinary text, from which the curvature is taken
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// A text that is asked about, with a name for it; may be given several times
    #[arg(long = "task", value_name = "NAME=FILE", required = true)]
    pub tasks: Vec<String>,
    /// Blocks whose feed-forward weights are looked at, by commas; the later half when absent
    #[arg(long, value_delimiter = ',')]
    pub blocks: Vec<usize>,
    /// Share of the curvature that the edit keeps
    #[arg(long, default_value_t = 0.6)]
    pub mass: f64,
    /// Tokens of a window
    #[arg(long, default_value_t = 112)]
    pub window: usize,
    /// Tokens of a window that are shown where it is to be recited; most of a window when absent
    #[arg(long)]
    pub shown: Option<usize>,
    /// Most windows of each text
    #[arg(long, default_value_t = 64)]
    pub windows: usize,
    /// A text that a mask on single weights learns to forget, as large in norm as the edit, to be compared
    #[arg(long, value_name = "FILE")]
    pub forget: Option<PathBuf>,
    /// Steps of learning the mask
    #[arg(long, default_value_t = 100, requires = "forget")]
    pub mask_steps: u64,
}

/// What was found of one text.
struct Found {
    name: String,
    /// Shares of the bands, means over the layers.
    shares: Vec<f64>,
    /// The share of the directions that the edit takes out.
    removed: f64,
    before: Measured,
    after: Measured,
    /// With a learned mask in place of the edit.
    masked: Option<Measured>,
}

/// What a model makes of one text.
#[derive(Clone, Copy)]
struct Measured {
    /// In nats for each token.
    loss: f64,
    recited: Recitation,
    /// nDCG of its ranking of next tokens against the original's.
    ranking: f64,
}

impl Found {
    /// What the edit costs, in nats for each token.
    fn rise(&self) -> f64 {
        self.after.loss - self.before.loss
    }
}

/// The model, what the edit leaves of it, and what a mask does.
struct Models<'a> {
    original: &'a Model,
    edited: Model,
    masked: Option<Model>,
}

pub fn run(arguments: &Curvature, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    ensure!(
        model.spec().is_causal(),
        "{} is a model that sees later tokens, but must be one that predicts each next token: curvature is that of its \
         loss",
        arguments.model
    );
    let window = arguments.window.min(model.spec().length());
    ensure!(
        window >= 2,
        "window is {}, but must be at least 2",
        arguments.window
    );
    ensure!(
        arguments.mass > 0.0 && arguments.mass < 1.0,
        "mass is {}, but must be above 0 and below 1",
        arguments.mass
    );
    let shown = arguments
        .shown
        .unwrap_or((4 * window).div_ceil(7).min(window - 1));
    ensure!(
        (1..window).contains(&shown),
        "tokens that are shown are {shown}, but must be between 1 and {}",
        window - 1
    );
    let cut = |path: &Path| windows(&package, path, window, arguments.windows);
    let tasks = arguments
        .tasks
        .iter()
        .map(|task| {
            let (name, path) = task
                .split_once('=')
                .with_context(|| format!("--task has {task:?}, but must have NAME=FILE"))?;
            Ok((name, cut(Path::new(path))?))
        })
        .collect::<Result<Vec<_>>>()?;
    let calibration = CalibrationData::windows(cut(&arguments.text)?)?;
    let blocks = match arguments.blocks.is_empty() {
        false => arguments.blocks.clone(),
        true => {
            let all = model.spec().expanded_blocks().len();
            (all / 2..all).collect()
        }
    };
    let curvature = factors(model, &calibration, &blocks, BATCH, global.seed)?;
    let spectrum = Spectrum::of(model, &curvature)?;
    let masked = match &arguments.forget {
        None => None,
        Some(path) => {
            let subnet = Subnet {
                steps: arguments.mask_steps,
                seed: global.seed,
                ..Subnet::default()
            };
            let forget = CalibrationData::windows(cut(path)?)?;
            let removed = spectrum.removed(arguments.mass, Keep::Staircase);
            Some(subnet.learn(model, &forget, &calibration, &removed)?)
        }
    };
    let models = Models {
        original: model,
        edited: spectrum.edited(model, arguments.mass, Keep::Staircase)?,
        masked,
    };
    let mut found = Vec::new();
    for (name, texts) in tasks {
        found.push(about(
            name,
            &texts,
            shown,
            &models,
            &spectrum,
            arguments.mass,
        )?);
    }
    Ok(report(
        &found,
        &blocks,
        [calibration.len(), window, shown],
        arguments,
    ))
}

/// Whole windows of a text.
fn windows(package: &Package, path: &Path, window: usize, most: usize) -> Result<Vec<Vec<u32>>> {
    let tokens = loading::file_tokens(package, path)?;
    let whole = tokens.chunks_exact(window).take(most);
    let windows: Vec<Vec<u32>> = whole.map(<[u32]>::to_vec).collect();
    ensure!(
        !windows.is_empty(),
        "{} gives no window: it has {} tokens, but must have at least {window}, and --windows must be at least 1",
        path.display(),
        tokens.len()
    );
    Ok(windows)
}

fn about(
    name: &str,
    texts: &[Vec<u32>],
    shown: usize,
    models: &Models<'_>,
    spectrum: &Spectrum,
    mass: f64,
) -> Result<Found> {
    let data = CalibrationData::windows(texts.to_vec())?;
    let mean = |masses: &[f64]| -> Result<Vec<f64>> {
        let layers = spectrum.shares(models.original, &data, BATCH, masses)?;
        let mean = |band: usize| {
            let each = layers.values().filter_map(|shares| shares.get(band));
            each.sum::<f64>() / layers.len().max(1) as f64
        };
        Ok((0..=masses.len()).map(mean).collect())
    };
    let scored: Vec<Window> = texts
        .iter()
        .map(|tokens| Window {
            tokens: tokens.clone(),
            context: 1,
        })
        .collect();
    let measured = |model: &Model| -> Result<Measured> {
        Ok(Measured {
            loss: perplexity(model, &scored, BATCH)?.value.ln(),
            recited: recitation(model, texts, shown)?,
            ranking: ranking_kept(models.original, model, &data, BATCH, RANKED)?,
        })
    };
    Ok(Found {
        name: name.to_owned(),
        shares: mean(&MASSES)?,
        removed: mean(&[mass])?.last().copied().unwrap_or(0.0),
        before: measured(models.original)?,
        after: measured(&models.edited)?,
        masked: models.masked.as_ref().map(measured).transpose()?,
    })
}

fn report(
    found: &[Found],
    blocks: &[usize],
    [count, window, shown]: [usize; 3],
    arguments: &Curvature,
) -> Report {
    let mass = arguments.mass;
    let column = |of: fn(&Found) -> f64| found.iter().map(of).collect::<Vec<f64>>();
    let (removed, rises) = (column(|f| f.removed), column(Found::rise));
    let together = correlated(&removed, &rises);
    let mut by_removed: Vec<(f64, f64)> = removed.iter().copied().zip(rises).collect();
    by_removed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let notes = vec![
        format!(
            "curvature of the feed-forward weights of blocks {blocks:?} on {count} windows of {window} tokens; the edit \
             keeps {mass} of it; the first {shown} tokens of a window are shown, the others recited greedily"
        ),
        together,
    ];
    Report {
        title: "Texts along the curvature of the loss".to_owned(),
        notes,
        tables: [costs(found), recited(found)]
            .into_iter()
            .chain(masked(found))
            .collect(),
        maps: vec![Map {
            title: "share of energy by band, most curvature first".to_owned(),
            rows: found.iter().map(|found| found.name.clone()).collect(),
            columns: bands(),
            values: found.iter().map(|found| found.shares.clone()).collect(),
        }],
        plots: vec![Plot {
            title: "What the edit costs".to_owned(),
            x: "share of energy in removed directions".to_owned(),
            y: "rise of the loss (nats per token)".to_owned(),
            series: vec![Series {
                name: "texts".to_owned(),
                points: by_removed,
            }],
        }],
        ..Report::default()
    }
}

/// How the shares that the edit takes out go with what that costs.
fn correlated(removed: &[f64], rises: &[f64]) -> String {
    let count = removed.len();
    let what = "the removed share of energy and the rise of the loss";
    if count < CORRELATED {
        return format!("how {what} go together takes at least {CORRELATED} texts, not {count}");
    }
    match correlation(removed, rises) {
        Some(r) => format!("over {count} texts {what} correlate by {r:.3}"),
        None => format!("over {count} texts {what} do not both vary, so that nothing correlates"),
    }
}

/// Names of the bands, by the curvature that lies before their ends.
fn bands() -> Vec<String> {
    let from = std::iter::once(0.0).chain(MASSES);
    let to = MASSES.into_iter().chain([1.0]);
    from.zip(to)
        .map(|(from, to)| format!("{from}–{to}"))
        .collect()
}

fn costs(found: &[Found]) -> Table {
    let mut table = Table::new(
        "what the edit costs",
        &[
            "text",
            "energy in removed directions",
            "loss before",
            "after",
            "rise",
            "perplexity before",
            "after",
        ],
    );
    for found in found {
        let (before, after) = (found.before.loss, found.after.loss);
        table.push([
            Cell::from(found.name.as_str()),
            Cell::from(found.removed),
            Cell::from(before),
            Cell::from(after),
            Cell::from(found.rise()),
            Cell::from(before.exp()),
            Cell::from(after.exp()),
        ]);
    }
    table
}

fn recited(found: &[Found]) -> Table {
    let mut table = Table::new(
        "what is recited",
        &[
            "text",
            "strict before",
            "after",
            "loose before",
            "after",
            "distance before",
            "after",
            "nDCG@10 of the edited model",
        ],
    );
    for found in found {
        let (before, after) = (found.before.recited, found.after.recited);
        table.push([
            Cell::from(found.name.as_str()),
            Cell::from(before.strict),
            Cell::from(after.strict),
            Cell::from(before.loose),
            Cell::from(after.loose),
            Cell::from(before.distance),
            Cell::from(after.distance),
            Cell::from(found.after.ranking),
        ]);
    }
    table
}

/// The same of a learned mask, where there is one.
fn masked(found: &[Found]) -> Option<Table> {
    let mut table = Table::new(
        "with a learned mask of the same norm instead",
        &[
            "text", "loss", "rise", "strict", "loose", "distance", "nDCG@10",
        ],
    );
    for found in found {
        let masked = found.masked?;
        table.push([
            Cell::from(found.name.as_str()),
            Cell::from(masked.loss),
            Cell::from(masked.loss - found.before.loss),
            Cell::from(masked.recited.strict),
            Cell::from(masked.recited.loose),
            Cell::from(masked.recited.distance),
            Cell::from(masked.ranking),
        ]);
    }
    Some(table)
}
