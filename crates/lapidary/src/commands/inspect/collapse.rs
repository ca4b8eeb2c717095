//! `lapidary inspect collapse`: what a model's last vector can still tell of a long sequence.

use crate::cli::Global;
use crate::loading;
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use lapidary_explain::analyses::squashing::{
    Alphabet, Family, Inquiry, Prompt, Separator, lengths, report,
};
use lapidary_explain::report::Report;
use lapidary_model::{Model, Package};
use lapidary_signal::rounding::{Format, SoftmaxPrecision};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FamilyName {
    /// 1ⁿ and 1ⁿ⁺¹
    Ones,
    /// 1ⁿ⁻¹ 0 and 1ⁿ 0
    OnesThenZero,
    /// Random tokens, and the same with the last repeated
    RepeatedLast,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    Bf16,
    F16,
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SoftmaxName {
    /// Attention rounds only what it writes
    Fused,
    /// Scores and weights are rounded, the softmax between is wide
    Wide,
    /// Every step of the softmax is rounded
    Narrow,
}

#[derive(Args, Debug)]
pub struct Collapse {
    /// A model directory, or `embedded`
    pub model: String,
    /// Families to follow
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["ones", "ones-then-zero", "repeated-last"])]
    pub family: Vec<FamilyName>,
    /// What is repeated: one token as text, or `#ID`
    #[arg(long, default_value = "1")]
    pub one: String,
    /// What differs from it: one token as text, or `#ID`
    #[arg(long, default_value = "0")]
    pub zero: String,
    /// Text before each sequence
    #[arg(long)]
    pub prefix: Option<String>,
    /// Text after each sequence
    #[arg(long)]
    pub suffix: Option<String>,
    /// Largest n; what the model takes, at most 256, when absent
    #[arg(long)]
    pub longest: Option<usize>,
    /// How many lengths, in equal ratios
    #[arg(long, default_value_t = 24)]
    pub lengths: usize,
    /// Formats to emulate, beside f64
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["bf16", "f16", "f32"])]
    pub format: Vec<FormatName>,
    /// Where attention rounds
    #[arg(long, value_enum, default_value = "wide")]
    pub softmax: SoftmaxName,
    /// Also with this token between every so many: one token as text, or `#ID`
    #[arg(long)]
    pub separator: Option<String>,
    /// Tokens between separators
    #[arg(long, default_value_t = 3)]
    pub every: usize,
    /// Also with attention sharpened with the logarithm of the length from here on
    #[arg(long, value_name = "LENGTH")]
    pub sharpen: Option<usize>,
    /// File of questions to answer in each format: on each line the answer, a tab, the prompt
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
}

pub fn run(arguments: &Collapse, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    ensure!(arguments.every > 0, "every is 0, but must be at least 1");
    ensure!(
        (2..=1000).contains(&arguments.lengths),
        "lengths is {}, but must be between 2 and 1000",
        arguments.lengths
    );
    let alphabet = alphabet(arguments, &package)?;
    let separator = match &arguments.separator {
        Some(text) => Some(Separator {
            token: token(&package, "separator", text)?,
            every: arguments.every,
        }),
        None => None,
    };
    let longest = match arguments.longest {
        Some(longest) => longest,
        None => room(model, &alphabet, separator)?.min(256),
    };
    ensure!(longest >= 2, "longest is {longest}, but must be at least 2");
    let inquiry = Inquiry {
        families: arguments
            .family
            .iter()
            .map(|family| match family {
                FamilyName::Ones => Family::Ones,
                FamilyName::OnesThenZero => Family::OnesThenZero,
                FamilyName::RepeatedLast => Family::RepeatedLast { seed: global.seed },
            })
            .collect(),
        lengths: lengths(1, longest, arguments.lengths),
        formats: arguments
            .format
            .iter()
            .map(|format| match format {
                FormatName::Bf16 => Format::Bf16,
                FormatName::F16 => Format::F16,
                FormatName::F32 => Format::F32,
            })
            .collect(),
        softmax: match arguments.softmax {
            SoftmaxName::Fused => SoftmaxPrecision::Fused,
            SoftmaxName::Wide => SoftmaxPrecision::Wide,
            SoftmaxName::Narrow => SoftmaxPrecision::Narrow,
        },
        separator,
        sharpen: arguments.sharpen,
        prompts: match &arguments.prompts {
            Some(file) => prompts(&package, model, file)?,
            None => Vec::new(),
        },
        alphabet,
        seed: global.seed,
    };
    Ok(report(model, &inquiry)?)
}

fn alphabet(arguments: &Collapse, package: &Package) -> Result<Alphabet> {
    let ids = |text: &Option<String>| -> Result<Vec<u32>> {
        match text {
            Some(text) => Ok(package.tokenizer()?.ids(text)?),
            None => Ok(Vec::new()),
        }
    };
    let (one, zero) = (
        token(package, "one", &arguments.one)?,
        token(package, "zero", &arguments.zero)?,
    );
    // Random sequences are of the ten digits where each is a token.
    let digits: Result<Vec<u32>> = (0..10)
        .map(|digit| token(package, "digit", &digit.to_string()))
        .collect();
    Ok(Alphabet {
        one,
        zero,
        digits: digits.unwrap_or_else(|_| vec![one, zero]),
        prefix: ids(&arguments.prefix)?,
        suffix: ids(&arguments.suffix)?,
        separator: None,
    })
}

/// The one token that a text is, or that `#ID` names.
fn token(package: &Package, what: &str, text: &str) -> Result<u32> {
    if let Some(id) = text.strip_prefix('#') {
        return id
            .parse()
            .with_context(|| format!("{what} is {text:?}, but must be # and a token id"));
    }
    let ids = package.tokenizer()?.ids(text).with_context(|| {
        format!("{what} is {text:?}, but must be a token of this model, or # and its id")
    })?;
    match ids.as_slice() {
        [id] => Ok(*id),
        several => anyhow::bail!(
            "{what} is {text:?}, which is {} tokens, but must be one; give # and its id",
            several.len()
        ),
    }
}

/// The largest `n` whose sequences the model takes, separators and prompt included.
fn room(model: &Model, alphabet: &Alphabet, separator: Option<Separator>) -> Result<usize> {
    let around = alphabet.prefix.len() + alphabet.suffix.len();
    let left = model.spec().length().saturating_sub(around + 1);
    let room = match separator {
        // `m` tokens and the separators between them: `m + (m − 1) / every`.
        Some(separator) => left * separator.every / (separator.every + 1),
        None => left,
    };
    ensure!(
        room >= 2,
        "the model takes {} tokens, {around} of which stand around the sequence; it needs room for more",
        model.spec().length()
    );
    Ok(room)
}

/// Lines of an answer, a tab and a prompt.
fn prompts(package: &Package, model: &Model, file: &Path) -> Result<Vec<Prompt>> {
    let text = lapidary_model::files::read_text(file, 1 << 24)?;
    let tokenizer = package.tokenizer()?;
    let mut prompts = Vec::new();
    for (number, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
    {
        let at = || format!("line {} of {}", number + 1, file.display());
        let (answer, prompt) = line
            .split_once('\t')
            .with_context(|| format!("{} has no tab between answer and prompt", at()))?;
        let answer = tokenizer.ids(answer).with_context(at)?;
        let tokens = tokenizer.ids(prompt).with_context(at)?;
        let answer = *answer
            .first()
            .with_context(|| format!("the answer on {} has no tokens", at()))?;
        ensure!(
            (1..=model.spec().length()).contains(&tokens.len()),
            "the prompt on {} has {} tokens, but must have between 1 and {}",
            at(),
            tokens.len(),
            model.spec().length()
        );
        prompts.push(Prompt { tokens, answer });
    }
    Ok(prompts)
}
