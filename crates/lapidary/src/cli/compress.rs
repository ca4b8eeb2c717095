//! Options of `compress`.

use std::path::PathBuf;

use clap::Args;
use lapidary_compress::automatic::AutomaticSettings;
use lapidary_compress::{ActivationRange, Pattern};

#[derive(Args, Debug, Clone)]
pub struct Compress {
    /// A model directory, or `embedded`
    pub model: String,
    /// A method, or several joined by `+`, one after another; docs/COMPRESS.md lists them
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
    /// each (`0.1+0.2`); with --compare several, by commas; that of --pattern or 0.3 when absent
    #[arg(long, allow_negative_numbers = true)]
    pub ratio: Option<String>,
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
    #[arg(long, value_name = "METHODS", conflicts_with_all = ["method", "out", "plan", "plan_only", "dense"])]
    pub compare: Option<String>,
    /// Only measure, for each pair of these methods, by commas, what both cost together beside what
    /// each costs alone, and whether their order counts
    #[arg(long, value_name = "METHODS",
        conflicts_with_all = ["method", "compare", "out", "plan", "plan_only", "recipe", "heal", "auto", "dense"])]
    pub interactions: Option<String>,
    /// Print what the method would do as JSON, which --plan carries out
    #[arg(long, conflicts_with_all = ["plan", "out", "html", "dense", "evaluate"])]
    pub plan_only: bool,
    /// Carry out this plan of the method instead of its own
    #[arg(long, value_name = "FILE", conflicts_with = "ratio")]
    pub plan: Option<PathBuf>,
    /// Page to write
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Multiply the factors out, so that the result has the original architecture and size
    #[arg(long, conflicts_with_all = ["compare", "interactions", "plan_only"])]
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
    #[arg(long, requires = "budget", conflicts_with_all = ["method", "ratio", "recipe", "compare", "plan", "plan_only",
        "layers", "uniform", "uniform_heads", "pattern"])]
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
    #[arg(
        long,
        value_name = "RATE",
        default_value_t = 1e-4,
        requires = "heal",
        allow_negative_numbers = true
    )]
    pub heal_rate: f64,
    /// Weight of the original's predictions in the loss of --heal, between 0 and 1
    #[arg(
        long,
        value_name = "WEIGHT",
        default_value_t = 0.0,
        requires = "heal",
        allow_negative_numbers = true
    )]
    pub distil: f64,
    /// Weight of the original's residual stream after each block, beside the loss of --heal
    #[arg(
        long,
        value_name = "WEIGHT",
        default_value_t = 0.0,
        requires = "heal",
        allow_negative_numbers = true
    )]
    pub hints: f64,
    /// Share of the weights that --heal lets change places with zeros at the first turn, falling to none;
    /// in ten turns, by size and gradient
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.0,
        requires = "heal",
        conflicts_with = "pattern",
        allow_negative_numbers = true
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
        requires = "adapters",
        allow_negative_numbers = true
    )]
    pub adapter_alpha: f64,
    /// Probability that an input of an adapter is left out at a step
    #[arg(
        long,
        value_name = "PROBABILITY",
        default_value_t = 0.0,
        requires = "adapters",
        allow_negative_numbers = true
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

impl Compress {
    /// What `--ratio` says, or what stands for it: the share that a pattern takes, where one is given.
    pub fn ratio(&self) -> String {
        match (&self.ratio, self.pattern) {
            (Some(ratio), _) => ratio.clone(),
            (None, Some(Pattern::NOfM { n, m })) => (1.0 - n as f64 / m as f64).to_string(),
            (None, Some(Pattern::Unstructured) | None) => "0.3".to_owned(),
        }
    }
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
