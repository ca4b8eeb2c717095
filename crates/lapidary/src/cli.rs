//! The command line, as types.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use lapidary_compress::automatic::AutomaticSettings;
use lapidary_compress::{ActivationRange, Pattern};
use lapidary_explain::contextual::Phrase;
use lapidary_explain::{Explainer, explainers};
use lapidary_parts::attention::MechanismSpec;

/// Takes Transformers apart: explains a prediction by decomposing it, cuts a checkpoint down,
/// builds and trains models from published parts.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every verb.
#[derive(Args, Debug, Clone)]
pub struct Global {
    /// Where tensors live: `cpu`, or `cuda[:N]` / `metal` in builds that have them
    #[arg(
        long,
        global = true,
        help_heading = "Options of every verb",
        default_value = "cpu"
    )]
    pub device: String,
    /// Seed of everything random; 0, or a training spec's own, when absent
    #[arg(
        long = "seed",
        value_name = "SEED",
        global = true,
        help_heading = "Options of every verb"
    )]
    pub given_seed: Option<u64>,
    /// The same, and 0 when absent: filled in before a verb begins
    #[arg(skip)]
    pub seed: u64,
    /// Threads to compute with; all cores when absent
    #[arg(long, global = true, help_heading = "Options of every verb")]
    pub threads: Option<usize>,
    /// Print one JSON document instead of text
    #[arg(long, global = true, help_heading = "Options of every verb")]
    pub json: bool,
    /// Say more about what is done, on standard error; twice for everything
    #[arg(short, long, global = true, help_heading = "Options of every verb", action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show the whole journey on the embedded model, offline, in under a minute
    Demo(Demo),
    /// Run a model on tensors and print its outputs at full precision
    Run(Run),
    /// Explain a prediction by decomposing it
    Explain(Explain),
    /// Where two models differ on one input, and which parts moved
    Diff(Diff),
    /// Look at a model as a whole, or at how it treats many inputs
    Inspect(Inspect),
    /// Cut a checkpoint down
    Compress(Box<Compress>),
    /// Write a model for other programs: multiplied out, or as GGUF
    Export(Export),
    /// Measure a language model's perplexity on a text
    Evaluate(Evaluate),
    /// Continue a text
    Generate(Generate),
    /// Train a model from a spec
    Train(Train),
    /// List the parts that models are built from, with measured costs
    Parts(Parts),
    /// Reproduce a system's published claims, at a scale of your choice
    Reproduce(Reproduce),
    /// Time this machine on the operations that matter
    Bench(Bench),
    /// Print the JSON schema of model specs or of explanations, or one model's spec
    Spec(Spec),
}

#[derive(Args, Debug)]
pub struct Demo {
    /// Where the report goes
    #[arg(long, default_value = "report.html")]
    pub out: PathBuf,
}

#[derive(Args, Debug)]
pub struct Run {
    /// A model directory, or `embedded`
    pub model: String,
    /// JSON file with `input_ids`, `attention_mask`, `token_type_ids` or `pixel_values`
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Also print what is written at these sites (`blocks.*.attention.out`)
    #[arg(long, value_name = "GLOB")]
    pub sites: Vec<String>,
    /// Run with another mechanism of attention, and say how far the outputs are from the model's
    /// own: `linformer{slots=64,longest=512}`
    #[arg(long, value_name = "MECHANISM", value_parser = mechanism)]
    pub replace_attention: Option<MechanismSpec>,
}

/// One input.
#[derive(Args, Debug)]
pub struct SubjectArguments {
    /// Text to look at
    #[arg(long, conflicts_with_all = ["tokens", "input"])]
    pub text: Option<String>,
    /// Token ids to look at, separated by commas
    #[arg(long, value_delimiter = ',', conflicts_with = "input")]
    pub tokens: Option<Vec<u32>>,
    /// JSON file with one example as tensors: `input_ids`, `attention_mask`, `token_type_ids` or
    /// `pixel_values`
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
}

fn methods() -> PossibleValuesParser {
    let value = |one: &Explainer| PossibleValue::new(one.name).help(one.summary);
    let all = PossibleValue::new("all").help("Every method that is defined for the model");
    PossibleValuesParser::new(explainers().iter().map(value).chain([all]))
}

/// `name` or `name{field=value,…}`, the fields as in a spec.
fn mechanism(text: &str) -> Result<MechanismSpec, String> {
    let (name, fields) = match text.split_once('{') {
        None => (text, ""),
        Some((name, rest)) => match rest.strip_suffix('}') {
            Some(fields) => (name, fields),
            None => return Err("the brace that opens its fields is not closed".to_owned()),
        },
    };
    #[derive(serde::Deserialize)]
    struct Document {
        mechanism: MechanismSpec,
    }
    let comma = if fields.trim().is_empty() { "" } else { ", " };
    let document = format!("mechanism = {{ kind = {name:?}{comma}{fields} }}");
    let document: Document =
        toml::from_str(&document).map_err(|error| error.message().to_owned())?;
    Ok(document.mechanism)
}

fn phrase(text: &str) -> Result<Phrase, String> {
    let ends = text.split_once('-');
    let ends = ends.and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    match ends {
        Some((first, last)) => Ok(Phrase { first, last }),
        None => Err("must be two positions, as 3-5".to_owned()),
    }
}

/// What scores of text are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TextUnit {
    /// The tokens of the model
    Token,
    /// Words: the scores of their tokens, summed
    Word,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").args(["text", "tokens", "input", "evaluate"]).required(true))]
pub struct Explain {
    /// A model directory, or `embedded`
    pub model: String,
    #[command(flatten)]
    pub subject: SubjectArguments,
    /// A class or token, by name or number; may be given several times; what the model predicts
    /// when absent
    #[arg(long)]
    pub target: Vec<String>,
    /// What the target is contrasted with
    #[arg(long)]
    pub foil: Option<String>,
    /// Position of a language model's scores; the last when absent
    #[arg(long)]
    pub position: Option<usize>,
    /// How to explain; several methods separated by commas, or `all`
    #[arg(long, alias = "methods", value_delimiter = ',', default_value = "decompx", value_parser = methods())]
    pub method: Vec<String>,
    /// What scores are over, where a method scores tokens
    #[arg(long, value_enum, default_value = "token")]
    pub unit: TextUnit,
    #[command(flatten)]
    pub options: ExplainOptions,
    /// Score the methods on a data set instead: a CSV file with the columns prefix, target, foil
    /// and evidence; `ioi` or `greater-than`, prompts of words that are one token of the model
    /// (whom something is given to; which years follow one); or `generated:` and number-agreement, reflexive-agreement, learned-fact,
    /// context-fact, name-copy, brackets, induction, polarity or glyphs
    #[arg(long, value_name = "DATASET", conflicts_with_all = ["text", "tokens", "input", "target", "foil", "position"])]
    pub evaluate: Option<String>,
    /// Most examples of the data set
    #[arg(long, default_value_t = 200)]
    pub limit: usize,
    /// Also write a page that a browser shows without a network
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// What some methods let the user choose.
#[derive(Args, Debug)]
pub struct ExplainOptions {
    /// DecompX: how biases are shared (absdot, abssim, norm, equal, cls, dot, none, token)
    #[arg(long, default_value = "absdot")]
    pub bias: String,
    /// Contextual decomposition: score the tokens from FIRST to LAST, counted from 0, as one
    #[arg(long, value_name = "FIRST-LAST", value_parser = phrase)]
    pub phrase: Option<Phrase>,
    /// Contextual decomposition: follow queries and keys too
    #[arg(long)]
    pub split_attention: bool,
    /// Contextual decomposition: settle parts of opposite sign
    #[arg(long)]
    pub stabilise: bool,
    /// Steps of integrated gradients
    #[arg(long, default_value_t = 32)]
    pub steps: usize,
    /// First layer that takes part, for methods that multiply layers
    #[arg(long, default_value_t = 0)]
    pub start_layer: usize,
    /// ALTI-Logit: count what the position's embedding writes as that token's
    #[arg(long)]
    pub include_residual: bool,
    /// ALTI-Logit: spread what feed-forward parts write over tokens
    #[arg(long)]
    pub trace_feedforward: bool,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").args(["text", "tokens", "input"]).required(true))]
pub struct Diff {
    /// A model directory, or `embedded`
    pub before: String,
    /// What was made of it: a model directory
    pub after: String,
    #[command(flatten)]
    pub subject: SubjectArguments,
    /// A class or token, by name or number; what the first model predicts when absent
    #[arg(long)]
    pub target: Option<String>,
    /// What the target is contrasted with
    #[arg(long)]
    pub foil: Option<String>,
    /// Position of a language model's scores; the last when absent
    #[arg(long)]
    pub position: Option<usize>,
    /// How tokens are scored
    #[arg(long, default_value = "decompx", value_parser = methods())]
    pub method: String,
    #[command(flatten)]
    pub options: ExplainOptions,
    /// Also write a page that a browser shows without a network
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct Inspect {
    #[command(subcommand)]
    pub analysis: Analysis,
    /// Also write a page that a browser shows without a network
    #[arg(long, global = true, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
pub enum Analysis {
    /// Where each head looks
    Attention(crate::commands::inspect::attention::Attention),
    /// From which length sequences look alike to a model, in formats of several widths
    Collapse(crate::commands::inspect::collapse::Collapse),
    /// Hidden states as position and context
    Geometry(crate::commands::inspect::geometry::Geometry),
    /// Which head talks to which, read off the weights
    Channels(crate::commands::inspect::channels::Channels),
    /// How a text's tokens gather from layer to layer
    Clusters(crate::commands::inspect::clusters::Clusters),
    /// What tokens have in common at a site, as the maps of a few components
    Components(crate::commands::inspect::components::Components),
    /// How much of what texts make of feed-forward weights lies along directions of little curvature,
    /// and what taking those out costs each text
    Curvature(crate::commands::inspect::curvature::Curvature),
    /// How a model's states lie around those of its training data
    Energy(crate::commands::inspect::energy::Energy),
    /// How much entropy each block adds, and in which order blocks would go by it
    Entropy(crate::commands::inspect::entropy::Entropy),
    /// How nearly linear each block is
    Linearity(crate::commands::inspect::linearity::Linearity),
    /// Random particles that attention gathers
    Particles(crate::commands::inspect::particles::Particles),
    /// How long a repeated prefix heads need before they look at what followed it
    PrefixInduction(crate::commands::inspect::prefix_induction::PrefixInduction),
    /// What the features of a sparse autoencoder are about
    Sae(crate::commands::inspect::autoencoder::Sae),
    /// Train a sparse autoencoder on the outputs of an attention layer's heads
    SaeTrain(crate::commands::inspect::autoencoder::SaeTrain),
    /// What the image embeddings of a CLIP model are made of, in words
    Clip(crate::commands::inspect::clip::Clip),
    /// Which heads are behind an answer, and how much of it they carry
    Circuit(crate::commands::inspect::circuit::Circuit),
}

#[derive(Args, Debug, Clone)]
pub struct Compress {
    /// A model directory, or `embedded`
    pub model: String,
    /// A method, or several joined by `+`, one after another; `lapidary parts` lists them
    #[arg(long, default_value = "whitened")]
    pub method: String,
    /// Stages as a file (TOML): `[[stage]]` with `method`, `ratio` and `settings`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "ratio", "compare"])]
    pub recipe: Option<PathBuf>,
    /// Put the methods in the order that is better for them, instead of saying which that is
    #[arg(long, conflicts_with_all = ["compare", "interactions", "auto"])]
    pub reorder: bool,
    /// Settings of the methods as a file (TOML)
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// One setting, such as `quantise.group=64`; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Globs of the layers that factorisations, rounding and pruning may touch, by commas
    #[arg(long, value_name = "GLOBS")]
    pub layers: Option<String>,
    /// Share of the weights to remove, between 0 and 1; several methods share it, or have one
    /// each (`0.1+0.2`); with --compare several, by commas
    #[arg(long, default_value = "0.3")]
    pub ratio: String,
    /// Text to calibrate on
    #[arg(long, value_name = "FILE")]
    pub calibrate: Option<PathBuf>,
    /// Windows of text to calibrate on
    #[arg(long, default_value_t = 32)]
    pub windows: usize,
    /// Tokens in a window
    #[arg(long, default_value_t = 128)]
    pub window: usize,
    /// Directory to write; it must not exist or be empty
    #[arg(long, value_name = "DIR", required_unless_present_any = ["compare", "interactions", "plan_only"])]
    pub out: Option<PathBuf>,
    /// Text to measure the perplexity on, instead of the calibration text
    #[arg(long, value_name = "FILE")]
    pub evaluate: Option<PathBuf>,
    /// Only measure: `all` methods that do not train, or those named, by commas; nothing is written
    #[arg(long, value_name = "METHODS", conflicts_with_all = ["out", "plan", "plan_only"])]
    pub compare: Option<String>,
    /// Only measure, for each pair of these methods, by commas, what both cost together beside what
    /// each costs alone, and whether their order counts
    #[arg(long, value_name = "METHODS",
        conflicts_with_all = ["method", "compare", "out", "plan", "plan_only", "recipe", "heal", "auto"])]
    pub interactions: Option<String>,
    /// Print what the method would do as JSON, which --plan carries out
    #[arg(long, conflicts_with = "plan")]
    pub plan_only: bool,
    /// Carry out this plan of the method instead of its own
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Page to write
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Multiply the factors out, so that the result has the original architecture and size
    #[arg(long)]
    pub dense: bool,
    /// Have modegpt and lorap plan shapes that a Hugging Face config can say: heads and attention stay,
    /// and every feed-forward part is narrowed alike
    #[arg(long, conflicts_with = "plan")]
    pub uniform: bool,
    /// As --uniform, but modegpt also narrows heads, all alike, to a shape that a config with a width of
    /// heads can say
    #[arg(long, conflicts_with_all = ["plan", "uniform"])]
    pub uniform_heads: bool,
    /// Search for a mix of methods, module by module, within --budget
    #[arg(long, requires = "budget", conflicts_with_all = ["method", "ratio", "compare", "plan", "plan_only"])]
    pub auto: bool,
    /// What may be left of the model's parameters: a share (`0.7x`), or a number of them
    #[arg(long, requires = "auto")]
    pub budget: Option<String>,
    /// Mixes to try
    #[arg(long, default_value_t = 60, requires = "auto")]
    pub evaluations: usize,
    /// Methods to mix, by commas
    #[arg(long, value_name = "METHODS", value_delimiter = ',', requires = "auto",
        default_values_t = AutomaticSettings::METHODS.map(str::to_owned))]
    pub mix: Vec<String>,
    /// File that the search is kept in after each mix, and goes on from
    #[arg(long, value_name = "FILE", requires = "auto")]
    pub state: Option<PathBuf>,
    /// Train the compressed model for so many steps on the calibration text, of which a tenth is
    /// held out to tell when it is best
    #[arg(long, value_name = "STEPS", conflicts_with_all = ["compare", "plan_only"])]
    pub heal: Option<u64>,
    /// Highest learning rate of --heal
    #[arg(long, value_name = "RATE", default_value_t = 1e-4, requires = "heal")]
    pub heal_rate: f64,
    /// Weight of the original's predictions in the loss of --heal, between 0 and 1
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0, requires = "heal")]
    pub distil: f64,
    /// Weight of the original's residual stream after each block, beside the loss of --heal
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0, requires = "heal")]
    pub hints: f64,
    /// Share of the weights that --heal lets change places with zeros at the first turn, falling to none;
    /// in ten turns, by size and gradient
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.0,
        requires = "heal",
        conflicts_with = "pattern"
    )]
    pub regrow: f64,
    /// Have --heal train adapters of this rank beside the layers, which take them in at the end, and
    /// nothing else
    #[arg(
        long,
        value_name = "RANK",
        requires = "heal",
        conflicts_with = "regrow"
    )]
    pub adapters: Option<usize>,
    /// Over the rank, what an adapter's product is multiplied by
    #[arg(
        long,
        value_name = "ALPHA",
        default_value_t = 16.0,
        requires = "adapters"
    )]
    pub adapter_alpha: f64,
    /// Probability that an input of an adapter is left out at a step
    #[arg(
        long,
        value_name = "PROBABILITY",
        default_value_t = 0.0,
        requires = "adapters"
    )]
    pub adapter_dropout: f64,
    /// Globs of the layers that have adapters, by commas; the linear layers of all blocks when absent
    #[arg(long, value_name = "GLOBS", requires = "adapters")]
    pub adapter_layers: Option<String>,
    /// Heal with the weights seen as the last method, which rounds, will round them
    #[arg(long, requires = "heal", conflicts_with = "auto")]
    pub heal_rounded: bool,
    /// Also measure the result with what its layers read rounded to 8 bits, one step for each token or
    /// one for each site; `--set quantise.outliers=6` leaves inputs that are larger
    #[arg(long, value_name = "per-token|per-tensor", value_parser = range,
        conflicts_with_all = ["compare", "interactions", "plan_only"])]
    pub activations: Option<ActivationRange>,
    /// Where methods that set weights to zero may do so: `N:M` leaves N of every M neighbours, as
    /// 2:4, at the ratio that this comes to; anywhere when absent
    #[arg(long, value_name = "N:M", value_parser = pattern)]
    pub pattern: Option<Pattern>,
}

fn range(text: &str) -> Result<ActivationRange, String> {
    text.parse()
        .map_err(|error: lapidary_compress::Error| error.to_string())
}

fn pattern(text: &str) -> Result<Pattern, String> {
    let numbers = text.split_once(':');
    let numbers = numbers.and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
    match numbers {
        Some((n, m)) if 0 < n && n < m => Ok(Pattern::NOfM { n, m }),
        _ => Err("must be two numbers, the first below the second, as in 2:4".to_owned()),
    }
}

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("form").required(true).multiple(true).args(["dense", "gguf", "replace_attention"])))]
pub struct Export {
    /// A model directory, or `embedded`
    pub model: String,
    /// Multiply factors out and write integers out as numbers
    #[arg(long)]
    pub dense: bool,
    /// Put another mechanism in the place of attention's softmax, with parameters of its own from
    /// --seed: `linformer{slots=64,longest=512}`
    #[arg(long, value_name = "MECHANISM", value_parser = mechanism)]
    pub replace_attention: Option<MechanismSpec>,
    /// GGUF file to write, for llama.cpp
    #[arg(long, value_name = "FILE", conflicts_with = "out")]
    pub gguf: Option<PathBuf>,
    /// Write matrices that are not quantised in half precision
    #[arg(long, requires = "gguf")]
    pub half: bool,
    /// Directory to write; it must not exist
    #[arg(long, value_name = "DIR", required_unless_present = "gguf")]
    pub out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct Evaluate {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text to measure on
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens that the model sees at a time
    #[arg(long, default_value_t = 128)]
    pub window: usize,
    /// Tokens between the starts of windows, half a window when absent; each window scores what
    /// the one before did not
    #[arg(long)]
    pub stride: Option<usize>,
    /// Most windows; all of the text when absent
    #[arg(long)]
    pub limit: Option<usize>,
    /// Measure too what so many sub-networks say together that the model draws, one pass for each
    #[arg(long, value_name = "N")]
    pub ensemble: Option<usize>,
}

#[derive(Args, Debug)]
pub struct Generate {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text to continue; may be given several times
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    /// Most tokens to add
    #[arg(long, default_value_t = 40)]
    pub tokens: usize,
    /// 0 takes the most probable token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Keep only so many of the most probable tokens
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Keep the most probable tokens that together have this probability
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Above 1: tokens that occurred already become less probable
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Stop at this text; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
    /// Run the whole sequence again at each step, which gives the same tokens
    #[arg(long)]
    pub no_cache: bool,
}

#[derive(Args, Debug)]
pub struct Train {
    /// Training spec: model, data, optimiser (TOML)
    pub spec: PathBuf,
    /// Text file, or directory of pictures, to train on, in place of what the spec names
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Directory of the run: checkpoints, logs and the model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Continue the run in that directory
    #[arg(long)]
    pub resume: bool,
    /// Steps, in place of the spec's
    #[arg(long)]
    pub steps: Option<usize>,
}

#[derive(Args, Debug)]
pub struct Parts {
    /// Only kinds whose name contains this
    pub filter: Option<String>,
    /// Width of the tokens that costs are measured at
    #[arg(long, default_value_t = 256)]
    pub width: usize,
    /// Length that costs are measured at
    #[arg(long, default_value_t = 256)]
    pub length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scale {
    /// Seconds: it runs
    Smoke,
    /// Minutes on two cores
    Small,
    /// As published; wants a GPU and the real data
    Full,
}

#[derive(Args, Debug)]
pub struct Reproduce {
    /// The system; see --list
    #[arg(required_unless_present_any = ["list", "all"])]
    pub slug: Option<String>,
    /// List every system
    #[arg(long)]
    pub list: bool,
    /// Reproduce every system, and write REPRODUCTIONS.md into the directory of --out
    #[arg(long, conflicts_with = "slug")]
    pub all: bool,
    /// How much to do
    #[arg(long, value_enum, default_value = "small")]
    pub scale: Scale,
    /// Run with so many seeds, from --seed on, and join what they find: a claim holds if it does with
    /// every seed that measures it. Plots and kept models are of the first
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=32))]
    pub seeds: u64,
    /// Print the section of REPRODUCTIONS.md instead of a table
    #[arg(long, conflicts_with_all = ["all", "list"])]
    pub markdown: bool,
    /// Directory with data sets, for those that want one
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Directory to keep trained models in, for systems that offer theirs (decompx: `polarity`, chefer: `glyphs`)
    #[arg(long, value_name = "DIR")]
    pub models: Option<PathBuf>,
    /// Directory for JSON and plots
    #[arg(long, value_name = "DIR", default_value = "reproductions")]
    pub out: PathBuf,
}

#[derive(Args, Debug)]
pub struct Bench {
    /// forward, step, explain, generate, compress, mixers, decoding or sparse
    #[arg(default_value = "step")]
    pub work: String,
    /// Model directory for the works that need one
    #[arg(long)]
    pub model: Option<String>,
    /// Method of the works `explain` (decompx when absent) and `compress` (slicegpt), or the one
    /// mechanism that `mixers` and `decoding` measure
    #[arg(long)]
    pub method: Option<String>,
    /// Width of the tokens
    #[arg(long, default_value_t = 256)]
    pub width: usize,
    /// Blocks
    #[arg(long, default_value_t = 4)]
    pub blocks: usize,
    /// Heads
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = 256)]
    pub length: usize,
    /// Shortest sequences of the work `mixers`, which doubles them up to --length
    #[arg(long, default_value_t = 256)]
    pub least: usize,
    /// Sequences at a time
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Vocabulary
    #[arg(long, default_value_t = 512)]
    pub vocabulary: usize,
    /// Timed repetitions, after one that is not counted
    #[arg(long, default_value_t = 10)]
    pub repeat: usize,
}

#[derive(Args, Debug)]
pub struct Spec {
    /// A model directory, or `embedded`; the JSON schema of specs when absent
    pub model: Option<String>,
    /// The JSON schema of what `explain --json` prints
    #[arg(long, conflicts_with = "model")]
    pub explanation: bool,
}
