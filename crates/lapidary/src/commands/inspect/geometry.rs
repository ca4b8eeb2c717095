//! `lapidary inspect geometry`: hidden states as position and context.

use crate::cli::Global;
use crate::loading;
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use lapidary_explain::analyses::geometry::{
    Bounds, Control, Reading, Sites, Subject, layers, randomised, report,
};
use lapidary_explain::report::Report;
use lapidary_model::{Model, Package};
use std::path::{Path, PathBuf};

/// Most files of a directory of topics.
const TOPICS: usize = 64;

/// What the real text is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Comparison {
    /// Uniformly random tokens
    Random,
    /// Windows whose second half is random
    HalfRandom,
    /// The same text through the same architecture with initial weights
    Untrained,
}

#[derive(Args, Debug)]
pub struct Geometry {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text whose windows are the contexts; the embedded model has its own
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Most windows
    #[arg(long, default_value_t = 256)]
    pub windows: usize,
    /// Tokens in a window; the length of the model, at most 512, when absent
    #[arg(long)]
    pub window: Option<usize>,
    /// Directory with one text file for each topic, in place of --text
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    pub topics: Option<PathBuf>,
    /// Positions at the start of each window that do not count
    #[arg(long, default_value_t = 1)]
    pub skip: usize,
    /// Look at what attention reads, behind the norms, instead of the residual stream
    #[arg(long)]
    pub normalised: bool,
    /// Controls to show beside the text; may be given several times
    #[arg(long, value_enum)]
    pub control: Vec<Comparison>,
    /// Block and head whose scores are taken apart in full, as `BLOCK.HEAD`
    #[arg(long, default_value = "0.0", value_parser = block_and_head)]
    pub head: (usize, usize),
    /// Windows in a forward pass
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// The most that ScreeNOT takes the rank of the position vectors for
    #[arg(long, default_value_t = 20)]
    pub rank_bound: usize,
    /// How many of the lowest frequencies count as smooth
    #[arg(long, default_value_t = 10)]
    pub frequencies: usize,
}

fn block_and_head(text: &str) -> std::result::Result<(usize, usize), String> {
    let parsed = text.split_once('.').and_then(|(block, head)| {
        let block = block.parse().ok()?;
        Some((block, head.parse().ok()?))
    });
    parsed.ok_or_else(|| format!("{text:?} must be a block and a head, such as 0.3"))
}

pub fn run(arguments: &Geometry, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    let length = model.spec().length();
    let window = arguments.window.unwrap_or(length.min(512));
    let least = arguments.skip + 2;
    ensure!(
        (least..=length).contains(&window),
        "window is {window}, but must be between {least} and {length}, the length of the model"
    );
    ensure!(
        arguments.windows > 0,
        "windows is 0, but must be at least 1"
    );
    let (windows, labels) = windows(arguments, &package, window)?;
    let reading = Reading {
        sites: match arguments.normalised {
            true => Sites::Normalised,
            false => Sites::Stream,
        },
        skip: arguments.skip,
        batch: arguments.batch,
        ..Reading::default()
    };
    let bounds = Bounds {
        rank: arguments.rank_bound,
        frequencies: arguments.frequencies,
    };
    let mut subjects = vec![Subject {
        name: "the text".to_owned(),
        layers: layers(model, &windows, reading, bounds)?,
    }];
    for control in &arguments.control {
        subjects.push(compared(
            *control, model, &windows, reading, bounds, global,
        )?);
    }
    let mut found = report(model, &subjects, reading, labels.as_deref(), arguments.head)?;
    if let Some(topics) = &arguments.topics {
        found
            .notes
            .push(format!("topics: the files of {}", topics.display()));
    }
    Ok(found)
}

fn compared(
    control: Comparison,
    model: &Model,
    windows: &[Vec<u32>],
    reading: Reading,
    bounds: Bounds,
    global: &Global,
) -> Result<Subject> {
    let vocabulary = model.spec().vocabulary().unwrap_or(0);
    let mut generator = lapidary_train::generator(global.seed);
    let mut random = |control| randomised(windows, vocabulary, control, &mut generator);
    let (name, layers) = match control {
        Comparison::Random => {
            let windows = random(Control::All);
            ("random tokens", layers(model, &windows, reading, bounds)?)
        }
        Comparison::HalfRandom => {
            let windows = random(Control::SecondHalf);
            (
                "second half random",
                layers(model, &windows, reading, bounds)?,
            )
        }
        Comparison::Untrained => {
            let (spec, dtype) = (model.spec().clone(), model.dtype());
            let fresh = Model::initialised(spec, global.seed, dtype, &model.device())?;
            ("untrained", layers(&fresh, windows, reading, bounds)?)
        }
    };
    Ok(Subject {
        name: name.to_owned(),
        layers,
    })
}

/// Windows of tokens.
type Contexts = Vec<Vec<u32>>;

/// The contexts, and the topic of each.
fn windows(
    arguments: &Geometry,
    package: &Package,
    window: usize,
) -> Result<(Contexts, Option<Vec<usize>>)> {
    if let Some(directory) = &arguments.topics {
        let files = topic_files(directory)?;
        let each = (arguments.windows / files.len()).max(1);
        let (mut all, mut labels) = (Vec::new(), Vec::new());
        for (topic, file) in files.iter().enumerate() {
            let found = file_windows(package, file, window, each)?;
            labels.extend(std::iter::repeat_n(topic, found.len()));
            all.extend(found);
        }
        return Ok((all, Some(labels)));
    }
    match &arguments.text {
        Some(file) => {
            let windows = file_windows(package, file, window, arguments.windows)?;
            Ok((windows, None))
        }
        None if arguments.model == "embedded" => {
            let corpus = loading::language_corpus(lapidary_train::language::Split::HeldOut)?;
            let each = (0..arguments.windows as u64).map(|index| corpus.window(index, window));
            Ok((each.collect::<lapidary_train::Result<_>>()?, None))
        }
        None => bail!("give --text FILE or --topics DIR"),
    }
}

/// Windows one after the other.
fn file_windows(
    package: &Package,
    file: &Path,
    window: usize,
    most: usize,
) -> Result<Vec<Vec<u32>>> {
    let tokens = loading::file_tokens(package, file)?;
    let windows: Vec<Vec<u32>> = tokens
        .chunks_exact(window)
        .take(most)
        .map(<[u32]>::to_vec)
        .collect();
    ensure!(
        !windows.is_empty(),
        "{} has {} tokens, but must have at least {window}, a window",
        file.display(),
        tokens.len()
    );
    Ok(windows)
}

/// The files of a directory, by name.
fn topic_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(directory)
        .with_context(|| format!("{} cannot be read", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_file() {
            files.push(path);
        }
        ensure!(
            files.len() <= TOPICS,
            "{} has more than {TOPICS} files, each of which would be a topic",
            directory.display()
        );
    }
    files.sort();
    ensure!(
        files.len() >= 2,
        "{} has {} files, but must have at least 2, each a topic",
        directory.display(),
        files.len()
    );
    Ok(files)
}
