//! `lapidary inspect circuit`: which heads are behind an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cli::Global;
use crate::loading;
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use lapidary_explain::Target;
use lapidary_explain::analyses::circuit::{Settings, judged_circuit, report};
use lapidary_explain::contextual::{
    Case, Means, Method, Metric, Node, NodeScore, Outliers, Place, Search, against_closest, heads,
    heads_by_position,
};
use lapidary_explain::report::Report;
use lapidary_explain::tasks::Task;
use lapidary_model::{HeadSpec, Input, Model, Package, Pass};
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};

#[derive(Args, Debug)]
pub struct Circuit {
    /// A model directory, or `embedded`
    pub model: String,
    /// A prompt; may be given several times. The answer is what the model says
    #[arg(long, required_unless_present_any = ["dataset", "task"], conflicts_with = "dataset")]
    pub text: Vec<String>,
    /// Generate prompts instead, whose means are over prompts of the same template without the
    /// reason for the answer: `ioi` (whom something is given to) or `greater-than` (years)
    #[arg(long, value_parser = ["ioi", "greater-than"], conflicts_with_all = ["dataset", "text", "target"])]
    pub task: Option<String>,
    /// Which template of the task, from 0: of `ioi` 12, of `greater-than` 3
    #[arg(long, default_value_t = 0, requires = "task")]
    pub template: usize,
    /// CSV file with a prompt, its right answer and a wrong one in each row
    #[arg(long, value_name = "FILE")]
    pub dataset: Option<PathBuf>,
    /// Names of the dataset's columns: prompt, answer, wrong answer; `prefix,target,foil` or
    /// BLiMP's when absent
    #[arg(long, value_delimiter = ',')]
    pub columns: Vec<String>,
    /// Most prompts of the dataset or task
    #[arg(long, default_value_t = 32)]
    pub limit: usize,
    /// The answer to every --text, by name or number, in place of what the model says
    #[arg(long, conflicts_with = "dataset")]
    pub target: Option<String>,
    /// What the answer is contrasted with; the closest competitor when absent
    #[arg(long, conflicts_with = "dataset", requires = "target")]
    pub foil: Option<String>,
    /// How contributions are found
    #[arg(long, value_enum, default_value = "contextual")]
    pub method: By,
    /// Keep attention weights as they are, instead of following queries and keys
    #[arg(long)]
    pub frozen: bool,
    /// Leave parts of opposite sign as they are
    #[arg(long)]
    pub unstable: bool,
    /// Where heads are read in search of those before them
    #[arg(long, value_delimiter = ',', default_value = "mixed")]
    pub places: Vec<String>,
    /// Heads to take in each round
    #[arg(long, default_value_t = 2)]
    pub top: usize,
    /// Take those above so many standard deviations instead
    #[arg(long, value_name = "K", conflicts_with = "top")]
    pub deviations: Option<f64>,
    /// Look at each head at each position, of a task at each role's; prompts must have the same
    /// length
    #[arg(long)]
    pub positions: bool,
    /// Drop heads that the circuit is as faithful without
    #[arg(long)]
    pub prune: bool,
    /// Measure differences of probabilities in place of scores
    #[arg(long)]
    pub probabilities: bool,
    /// Random circuits of each size to compare with
    #[arg(long, default_value_t = 10)]
    pub draws: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// Contextual decomposition
    Contextual,
    /// Path patching
    PathPatching,
}

/// Most prompts, and most random circuits of a size.
const MOST: usize = 100_000;

pub fn run(arguments: &Circuit, global: &Global) -> Result<Report> {
    ensure!(
        (1..=MOST).contains(&arguments.limit) && (1..=MOST).contains(&arguments.draws),
        "--limit and --draws must be between 1 and {MOST}"
    );
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    let mut notes = Vec::new();
    if let Some(task) = arguments.task.as_deref().and_then(Task::from_name) {
        return of_task(task, arguments, &package, global);
    }
    let cases = match &arguments.dataset {
        Some(path) => from_dataset(arguments, path, &package, &mut notes)?,
        None => from_texts(arguments, &package)?,
    };
    let inputs: Vec<&Input> = cases.iter().map(|case| &case.input).collect();
    let length = common_length(&inputs);
    // One prompt is its own mean.
    let means = match length {
        Some(_) if inputs.len() > 1 => Means::by_position(model, &inputs)?,
        _ => Means::over_positions(model, &inputs)?,
    };
    notes.push(match length {
        Some(_) if inputs.len() > 1 => "means over the prompts for each position".to_owned(),
        _ => "means over the prompts and positions".to_owned(),
    });
    let candidates = match (arguments.positions, length) {
        (false, _) => heads(model)?,
        (true, Some(length)) => heads_by_position(model, length)?,
        (true, None) => bail!("--positions needs prompts of the same length in tokens"),
    };
    let found = judged_circuit(
        model,
        &cases,
        &means,
        &candidates,
        &settings(arguments, global)?,
    )?;
    notes.insert(
        0,
        format!("{} prompts, {} nodes", cases.len(), candidates.len()),
    );
    Ok(report(&found, notes))
}

/// The circuit behind a generated task.
fn of_task(task: Task, arguments: &Circuit, package: &Package, global: &Global) -> Result<Report> {
    let model = package.text_model()?;
    ensure!(
        matches!(model.spec().head, HeadSpec::LanguageModel { .. }) && model.spec().is_causal(),
        "--task {} is for language models that read from left to right, which this is not",
        task.name()
    );
    let mut generator = lapidary_train::generator(global.seed);
    let (template, limit) = (Some(arguments.template), arguments.limit);
    let generated = task.generate(package.tokenizer()?, template, limit, &mut generator)?;
    let cases = generated.prompts.iter().map(|prompt| prompt.case(model));
    let cases: Vec<Case> = cases.collect::<Result<_, _>>()?;
    let reference = generated.reference.iter().map(|prompt| prompt.input(model));
    let reference: Vec<Input> = reference.collect::<Result<_, _>>()?;
    let means = Means::by_position(model, &reference.iter().collect::<Vec<_>>())?;
    // One template and words of one token: a role is at one position in all prompts, which may be
    // that of two roles.
    let mut roles: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for (role, position) in generated.prompts.iter().flat_map(|prompt| &prompt.roles) {
        roles.entry(*position).or_default().insert(role);
    }
    let mut candidates = heads(model)?;
    if arguments.positions {
        let at = |node: Node| {
            let positions = roles.keys().copied().map(Some);
            positions.map(move |position| Node { position, ..node })
        };
        candidates = candidates.into_iter().flat_map(at).collect();
    }
    let mut settings = settings(arguments, global)?;
    if task == Task::GreaterThan {
        settings.metric = Metric::ProbabilityDifference;
    }
    let found = judged_circuit(model, &cases, &means, &candidates, &settings)?;
    let (metric, without) = match task {
        Task::Ioi => (
            match arguments.probabilities {
                false => "score of the indirect object less that of the subject",
                true => "probability of the indirect object less that of the subject",
            },
            "that name three people",
        ),
        Task::GreaterThan => (
            "probability of the years above less that of the years at or below",
            "with the lowest year",
        ),
    };
    let named = |(position, roles): (&usize, &BTreeSet<&str>)| {
        let roles: Vec<&str> = roles.iter().copied().collect();
        format!("@{position} {}", roles.join("/"))
    };
    let mut notes = vec![format!(
        "{} prompts of {}, {} nodes",
        cases.len(),
        task.name(),
        candidates.len()
    )];
    notes.extend(
        generated
            .prompts
            .first()
            .map(|prompt| format!("such as {:?}", prompt.text)),
    );
    notes.push(format!(
        "roles: {}",
        roles.iter().map(named).collect::<Vec<_>>().join(", ")
    ));
    notes.push(format!("F: {}", metric));
    notes.push(format!("means for each position over prompts {without}"));
    notes.extend(generated.notes);
    Ok(report(&found, notes))
}

fn settings(arguments: &Circuit, global: &Global) -> Result<Settings> {
    let rules = ContextualRules {
        attention: match arguments.frozen {
            true => AttentionSplit::Frozen,
            false => AttentionSplit::Split,
        },
        stabilise: !arguments.unstable,
    };
    let places = arguments.places.iter().map(|name| Place::from_name(name));
    Ok(Settings {
        method: match arguments.method {
            By::Contextual => Method::Contextual(rules, NodeScore::Share),
            By::PathPatching => Method::PathPatching,
        },
        search: Search {
            places: places.collect::<Result<_, _>>()?,
            outliers: match arguments.deviations {
                Some(k) => Outliers::Deviations(k),
                None => Outliers::Top(arguments.top),
            },
            ..Search::default()
        },
        metric: match arguments.probabilities {
            true => Metric::ProbabilityDifference,
            false => Metric::ScoreDifference,
        },
        prune: arguments.prune,
        draws: arguments.draws,
        seed: global.seed,
    })
}

/// The length that all inputs have.
fn common_length(inputs: &[&Input]) -> Option<usize> {
    let length = |input: &Input| match input {
        Input::Tokens { ids, .. } => ids.dims().get(1).copied(),
        Input::Pixels(_) => None,
    };
    let first = length(inputs.first()?)?;
    inputs
        .iter()
        .all(|input| length(input) == Some(first))
        .then_some(first)
}

fn prompt(package: &Package, model: &Model, text: &str) -> Result<Input> {
    let encoding = loading::encode(package, model, text)?;
    let types = match &model.spec().input {
        lapidary_model::InputSpec::Tokens(tokens) if tokens.token_types > 0 => {
            Some(loading::row(&encoding.type_ids, model)?)
        }
        _ => None,
    };
    Ok(Input::Tokens {
        ids: loading::row(&encoding.ids, model)?,
        token_types: types,
    })
}

/// The class or token of that name or number.
fn class(package: &Package, model: &Model, what: &str, name: &str) -> Result<usize> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    if matches!(model.spec().head, HeadSpec::LanguageModel { .. }) {
        return Ok(loading::single_token(package, what, name)? as usize);
    }
    let index = package.labels.iter().position(|label| label == name);
    index.with_context(|| {
        let known = package.labels.join(", ");
        format!("{what} {name:?} is not a class; the classes are {known}")
    })
}

fn from_texts(arguments: &Circuit, package: &Package) -> Result<Vec<Case>> {
    let model = package.text_model()?;
    let mut cases = Vec::new();
    for text in &arguments.text {
        let input = prompt(package, model, text)?;
        let answer = match &arguments.target {
            Some(name) => class(package, model, "target", name)?,
            None => most_likely(model, &input)?,
        };
        let target = match &arguments.foil {
            Some(name) => Target::Score {
                class: answer,
                foil: Some(class(package, model, "foil", name)?),
                position: None,
            },
            None => against_closest(model, &input, answer)?,
        };
        cases.push(Case {
            input,
            target,
            contrast: None,
        });
    }
    Ok(cases)
}

/// The class of the largest score at the last position.
fn most_likely(model: &Model, input: &Input) -> Result<usize> {
    let pass = Pass {
        only_last: true,
        ..Pass::default()
    };
    let scores = model.forward(input, pass)?.into_logits()?.into_value();
    let scores = scores.flatten_all()?;
    Ok(scores.argmax(0)?.to_scalar::<u32>()? as usize)
}

/// The columns that are asked for, or those of a known kind of file.
fn column_names(arguments: &Circuit, headers: &csv::StringRecord) -> Result<Vec<String>> {
    const OWN: [&str; 3] = ["prefix", "target", "foil"];
    const BLIMP: [&str; 3] = [
        "one_prefix_prefix",
        "one_prefix_word_good",
        "one_prefix_word_bad",
    ];
    let has = |name: &str| headers.iter().any(|header| header == name);
    let names = match arguments.columns.len() {
        0 if has(BLIMP[0]) => BLIMP.map(str::to_owned).to_vec(),
        0 => OWN.map(str::to_owned).to_vec(),
        _ => arguments.columns.clone(),
    };
    ensure!(
        names.len() == 3,
        "columns is {}, but must be three names separated by commas",
        names.join(",")
    );
    Ok(names)
}

/// The dataset's rows whose answers are single tokens; how many are not goes into `notes`.
fn from_dataset(
    arguments: &Circuit,
    path: &Path,
    package: &Package,
    notes: &mut Vec<String>,
) -> Result<Vec<Case>> {
    let model = package.text_model()?;
    let text = lapidary_model::files::read_text(path, 1 << 28)?;
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers()?.clone();
    let names = column_names(arguments, &headers)?;
    let mut columns = Vec::new();
    for name in &names {
        let column = headers.iter().position(|header| header == name.as_str());
        columns.push(column.with_context(|| {
            let known: Vec<&str> = headers.iter().collect();
            format!(
                "{} has no column {name:?}, but {}; name them with --columns",
                path.display(),
                known.join(", ")
            )
        })?);
    }
    let (mut cases, mut left_out) = (Vec::new(), 0);
    let mut reason = None;
    for record in reader.records() {
        let record = record.with_context(|| format!("{}", path.display()))?;
        let field = |index: usize| {
            let column = columns.get(index).copied();
            column.and_then(|column| record.get(column)).unwrap_or("")
        };
        let case = || -> Result<Case> {
            Ok(Case {
                target: Target::Score {
                    class: class(package, model, "answer", field(1))?,
                    foil: Some(class(package, model, "wrong answer", field(2))?),
                    position: None,
                },
                input: prompt(package, model, field(0))?,
                contrast: None,
            })
        };
        match case() {
            Ok(case) => cases.push(case),
            Err(error) => {
                left_out += 1;
                reason.get_or_insert(error);
            }
        }
        if cases.len() == arguments.limit {
            break;
        }
    }
    if left_out > 0 {
        let why = reason.as_ref().map(ToString::to_string).unwrap_or_default();
        notes.push(format!("{left_out} rows left out, the first because {why}"));
    }
    match reason {
        Some(reason) if cases.is_empty() => Err(reason.context(format!(
            "none of the rows of {} can be used",
            path.display()
        ))),
        _ => {
            ensure!(!cases.is_empty(), "{} has no rows", path.display());
            Ok(cases)
        }
    }
}
