//! `lapidary inspect sae-train` and `lapidary inspect sae`: the features of an attention layer.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::cli::Global;
use crate::commands::explain::readable;
use crate::loading;
use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use lapidary_explain::analyses::autoencoder::{Choice, rank_features, report};
use lapidary_explain::autoencoder::{
    Autoencoder, Centre, Progress, TrainedAutoencoder, TrainingOptions, head_shares, load, save,
    train, with_value_biases,
};
use lapidary_explain::report::{Plot, Report, Series, Table};
use lapidary_explain::tasks::Task;
use lapidary_model::{Model, Package};
use lapidary_train::language::{Corpus, Split};

/// Most prompts.
const MOST_PROMPTS: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CentreArgument {
    /// Zero
    Zero,
    /// The geometric median of the first batches
    GeometricMedian,
}

#[derive(Args, Debug)]
pub struct SaeTrain {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text to read; for `embedded`, its own language when absent
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Block whose heads' outputs are learned
    #[arg(long, default_value_t = 0)]
    pub layer: usize,
    /// Another site to learn, such as `blocks.1.out`
    #[arg(long, conflicts_with = "layer")]
    pub site: Option<String>,
    /// Features for each number of the site
    #[arg(long, default_value_t = 16)]
    pub expansion: usize,
    /// Steps
    #[arg(long, default_value_t = 4000)]
    pub steps: u64,
    /// Activations of a step
    #[arg(long, default_value_t = 1024)]
    pub batch: usize,
    /// Weight of the features' sum in the loss
    #[arg(long, default_value_t = 1.0)]
    pub sparsity: f64,
    /// Learning rate after the warm-up
    #[arg(long, default_value_t = 1.2e-3)]
    pub rate: f64,
    /// Tokens that the model sees at a time
    #[arg(long, default_value_t = 128)]
    pub window: usize,
    /// Steps between resamplings of dead features; a quarter of all when absent
    #[arg(long)]
    pub resample_every: Option<u64>,
    /// Where the decoder's bias starts
    #[arg(long, value_enum, default_value = "zero")]
    pub centre: CentreArgument,
    /// Directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Args, Debug)]
pub struct Sae {
    /// A model directory, or `embedded`
    pub model: String,
    /// Directory that `sae-train` wrote, or a file of PyTorch or safetensors with W_enc, b_enc,
    /// W_dec, b_dec
    #[arg(long, value_name = "PATH")]
    pub sae: PathBuf,
    /// What the autoencoder reads, where no config says so
    #[arg(long)]
    pub site: Option<String>,
    /// The autoencoder was trained where biases of values are added behind the attention, as
    /// TransformerLens does; add them to the decoder's
    #[arg(long)]
    pub folded_biases: bool,
    /// In place of a text, generated prompts: leave out each feature that is live at --role, and
    /// rank by what that changes of the answer; `ioi` (whom something is given to) or
    /// `greater-than` (years)
    #[arg(long, value_parser = ["ioi", "greater-than"], conflicts_with_all = ["text", "features"])]
    pub task: Option<String>,
    /// The role; `S2`, the second mention of the subject, or `YY`, the year, when absent
    #[arg(long, requires = "task")]
    pub role: Option<String>,
    /// Prompts to generate
    #[arg(long, default_value_t = 32, requires = "task")]
    pub prompts: usize,
    /// Text to read; for `embedded`, its own language when absent
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens that the model sees at a time
    #[arg(long, default_value_t = 128)]
    pub window: usize,
    /// Windows to read
    #[arg(long, default_value_t = 64)]
    pub windows: usize,
    /// Features to show, separated by commas; the most active ones when absent
    #[arg(long, value_delimiter = ',')]
    pub features: Option<Vec<usize>>,
    /// How many features to show when none are named
    #[arg(long, default_value_t = 24)]
    pub most: usize,
    /// Examples of each
    #[arg(long, default_value_t = 8)]
    pub examples: usize,
}

pub fn train_one(arguments: &SaeTrain, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    refuse_to_replace(&arguments.out)?;
    let site = match &arguments.site {
        Some(site) => site.clone(),
        None => format!("blocks.{}.attention.mixed", arguments.layer),
    };
    let source = Windows::new(
        &arguments.text,
        &arguments.model,
        &package,
        arguments.window,
    )?;
    let options = TrainingOptions {
        sparsity: arguments.sparsity,
        rate: arguments.rate,
        batch: arguments.batch,
        steps: arguments.steps,
        warm_up: (arguments.steps / 20).min(1000),
        buffer_batches: 16,
        resample_every: arguments
            .resample_every
            .unwrap_or(arguments.steps / 4)
            .max(1),
        resample_batches: 8,
        // Rarer than once in the activations that are counted is as good as never.
        dead_frequency: 1e-6,
        centre: match arguments.centre {
            CentreArgument::Zero => Centre::Zero,
            CentreArgument::GeometricMedian => Centre::GeometricMedian,
        },
        ..TrainingOptions::default()
    };
    ensure!(arguments.steps > 0, "steps is 0, but must be at least 1");
    let width = lapidary_explain::autoencoder::SiteReader::new(model, &site)?.width()?;
    let features = arguments.expansion.saturating_mul(width);
    let started = Instant::now();
    let bar = progress_bar(options.steps);
    let mut generator = lapidary_train::generator(global.seed);
    let hear = |progress: &Progress| show(&bar, progress, started);
    let trained = train(
        model,
        &site,
        features,
        source.endless(),
        &options,
        &mut generator,
        hear,
    );
    bar.finish_and_clear();
    let trained = trained?;
    save(&trained.autoencoder, &arguments.out)?;
    Ok(training_report(&trained, &options, &arguments.out, started))
}

pub fn inspect(arguments: &Sae, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    let mut autoencoder = load(&arguments.sae, arguments.site.as_deref())?;
    if arguments.folded_biases {
        autoencoder = with_value_biases(model, &autoencoder)?;
    }
    if let Some(task) = arguments.task.as_deref().and_then(Task::from_name) {
        return over_prompts(task, arguments, &package, &autoencoder, global);
    }
    ensure!(
        arguments.windows > 0,
        "windows is 0, but must be at least 1"
    );
    let source = Windows::new(
        &arguments.text,
        &arguments.model,
        &package,
        arguments.window,
    )?;
    let windows = source.held_out(arguments.windows);
    let choice = Choice {
        features: arguments.features.clone(),
        most: arguments.most,
        examples: arguments.examples,
    };
    let tokenizer = package.tokenizer.as_ref();
    let name = |token: u32| {
        let name = tokenizer.and_then(|tokenizer| tokenizer.token_of(token));
        name.map_or_else(|| format!("[{token}]"), |name| readable(&name))
    };
    Ok(report(model, &autoencoder, windows, &choice, &name)?)
}

/// Which features at a role of generated prompts the answer depends on.
fn over_prompts(
    task: Task,
    arguments: &Sae,
    package: &Package,
    autoencoder: &Autoencoder,
    global: &Global,
) -> Result<Report> {
    ensure!(
        (1..=MOST_PROMPTS).contains(&arguments.prompts),
        "--prompts is {}, but must be between 1 and {MOST_PROMPTS}",
        arguments.prompts
    );
    let model = package.text_model()?;
    let role = arguments.role.as_deref().unwrap_or(match task {
        Task::Ioi => "S2",
        Task::GreaterThan => "YY",
    });
    let mut generator = lapidary_train::generator(global.seed);
    let generated = task.generate(
        package.tokenizer()?,
        None,
        arguments.prompts,
        &mut generator,
    )?;
    let ranked = rank_features(model, autoencoder, &generated.prompts, role)?;
    let shares = head_shares(model, autoencoder)?;
    let mut found = ranked.report(autoencoder.site(), &shares, arguments.most);
    let such = generated.prompts.first();
    found
        .notes
        .extend(such.map(|prompt| format!("such as {:?}", prompt.text)));
    found.notes.extend(generated.notes);
    Ok(found)
}

/// Where windows of tokens come from.
enum Windows {
    Text {
        tokens: Vec<u32>,
        start: Option<u32>,
        length: usize,
    },
    Language {
        training: Box<Corpus>,
        held_out: Box<Corpus>,
        length: usize,
    },
}

impl Windows {
    fn new(text: &Option<PathBuf>, name: &str, package: &Package, window: usize) -> Result<Self> {
        let model: &Model = package.text_model()?;
        let length = window.min(model.spec().length());
        ensure!(length >= 2, "window is {window}, but must be at least 2");
        let Some(path) = text else {
            if name == "embedded" {
                return Ok(Self::Language {
                    training: Box::new(loading::language_corpus(Split::Training)?),
                    held_out: Box::new(loading::language_corpus(Split::HeldOut)?),
                    length,
                });
            }
            bail!("give --text FILE with text like what the model is for");
        };
        let tokens = loading::file_tokens(package, path)?;
        ensure!(
            tokens.len() >= length,
            "{} has {} tokens, but must have at least {length}, one window",
            path.display(),
            tokens.len()
        );
        // GPT-2's vocabulary names the token that its texts begin with.
        let start = package.tokenizer()?.id_of("<|endoftext|>");
        Ok(Self::Text {
            tokens,
            start,
            length,
        })
    }

    /// Windows without end, a text's over and over.
    fn endless(&self) -> Box<dyn Iterator<Item = Vec<u32>> + '_> {
        match self {
            Self::Text { .. } => Box::new(std::iter::repeat_with(|| self.of_text()).flatten()),
            Self::Language {
                training, length, ..
            } => Box::new(of_corpus(training, *length)),
        }
    }

    /// Some windows to measure on: the embedded language's are of its held-out side, a text's
    /// are its first.
    fn held_out(&self, count: usize) -> Vec<Vec<u32>> {
        match self {
            Self::Text { .. } => self.of_text().take(count).collect(),
            Self::Language {
                held_out, length, ..
            } => of_corpus(held_out, *length).take(count).collect(),
        }
    }

    fn of_text(&self) -> Box<dyn Iterator<Item = Vec<u32>> + '_> {
        let Self::Text {
            tokens,
            start,
            length,
        } = self
        else {
            return Box::new(std::iter::empty());
        };
        let body = length - usize::from(start.is_some());
        Box::new(
            tokens
                .chunks_exact(body)
                .map(move |chunk| start.iter().copied().chain(chunk.iter().copied()).collect()),
        )
    }
}

/// A window that cannot be written is empty, which whoever reads it refuses.
fn of_corpus(corpus: &Corpus, length: usize) -> impl Iterator<Item = Vec<u32>> + '_ {
    (0u64..).map(move |index| corpus.window(index, length).unwrap_or_default())
}

fn refuse_to_replace(out: &Path) -> Result<()> {
    let is_free = !out.exists()
        || out
            .read_dir()
            .is_ok_and(|mut entries| entries.next().is_none());
    ensure!(
        is_free,
        "{} exists and is not an empty directory; give a new one",
        out.display()
    );
    Ok(())
}

fn progress_bar(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  {eta} left") {
        bar.set_style(style);
    }
    bar
}

fn show(bar: &ProgressBar, progress: &Progress, started: Instant) {
    if progress.resampled > 0 {
        bar.println(format!(
            "step {}: {} dead features resampled",
            progress.step, progress.resampled
        ));
    }
    let rate = progress.activations as f64 / started.elapsed().as_secs_f64().max(1e-9);
    bar.set_message(format!(
        "error {:.4}  L0 {:.1}  {} tokens/s",
        progress.last.squared_error,
        progress.last.active,
        HumanCount(rate as u64)
    ));
    bar.set_position(progress.step);
}

fn training_report(
    trained: &TrainedAutoencoder,
    options: &TrainingOptions,
    out: &Path,
    started: Instant,
) -> Report {
    let seconds = started.elapsed().as_secs_f64();
    let last = trained.history.last();
    let mut table = Table::new("Training", &["measure", "value"]);
    for (measure, value) in [
        ("squared error", last.map_or(0.0, |step| step.squared_error)),
        (
            "active features per token (L0)",
            last.map_or(0.0, |step| step.active),
        ),
        (
            "tokens per second",
            trained.activations as f64 / seconds.max(1e-9),
        ),
    ] {
        table.push([measure.into(), value.into()]);
    }
    for (index, count) in trained.resampled.iter().enumerate() {
        let measure = format!("features resampled, time {}", index + 1);
        table.push([measure.into(), (*count).into()]);
    }
    // A few hundred points draw the line as well as all do.
    let every = (trained.history.len() / 300).max(1);
    let points = |of: fn(&lapidary_explain::autoencoder::Step) -> f64| {
        let each = trained.history.iter().enumerate().step_by(every);
        each.map(|(step, found)| (step as f64, of(found))).collect()
    };
    let line = |name: &str, points| Series {
        name: name.to_owned(),
        points,
    };
    let plot = |title: &str, y: &str, series| Plot {
        title: title.to_owned(),
        x: "step".to_owned(),
        y: y.to_owned(),
        series: vec![series],
    };
    Report {
        title: format!("Autoencoder of {}", trained.autoencoder.site()),
        notes: vec![
            format!(
                "{} features on a width of {}",
                trained.autoencoder.features(),
                trained.autoencoder.width()
            ),
            format!(
                "{} steps of {} activations",
                trained.history.len(),
                options.batch
            ),
            format!("in {}", out.display()),
        ],
        tables: vec![table],
        plots: vec![
            plot(
                "Error",
                "squared error",
                line("squared error", points(|s| s.squared_error)),
            ),
            plot(
                "Active features",
                "features per token",
                line("L0", points(|s| s.active)),
            ),
        ],
        ..Report::default()
    }
}
