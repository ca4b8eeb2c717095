//! The command line, as types.

mod compress;

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
pub use compress::Compress;
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

/// `name` or `name{field=value,…}`, the fields as in a spec; texts need no quotes.
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
    let fields = quoted(fields);
    let document = format!("mechanism = {{ kind = {name:?}{comma}{fields} }}");
    let document: Document =
        toml::from_str(&document).map_err(|error| error.message().to_owned())?;
    Ok(document.mechanism)
}

/// TOML of fields whose texts may be bare: `kind=fixed` stands for `kind="fixed"`, since a shell's quotes are around all of
/// it already.
fn quoted(fields: &str) -> String {
    let in_word = |c: char| c.is_ascii_alphanumeric() || "_-+.".contains(c);
    let mut toml = String::with_capacity(fields.len());
    let mut rest = fields;
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '"' | '\'' => {
                let mut behind = rest.char_indices().skip(1);
                behind.find(|(_, c)| *c == first).map(|(at, _)| at + 1)
            }
            _ if in_word(first) => rest.find(|c: char| !in_word(c)),
            other => Some(other.len_utf8()),
        };
        let (piece, after) = rest.split_at(end.unwrap_or(rest.len()));
        let is_key = after.trim_start().starts_with('=');
        let is_value = ["true", "false", "inf", "nan"].contains(&piece);
        if first.is_ascii_alphabetic() && !is_key && !is_value {
            toml.extend(["\"", piece, "\""]);
        } else {
            toml.push_str(piece);
        }
        rest = after;
    }
    toml
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
    /// Run the whole sequence again at each step: the same tokens, unless several blocks hash them (`reformer`)
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
