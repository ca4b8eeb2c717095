//! `lapidary inspect prefix-induction`: how long a repeated prefix heads need.

use crate::cli::Global;
use crate::loading;
use anyhow::Result;
use clap::Args;
use lapidary_explain::analyses::prefix_induction::{PrefixDraws, report};
use lapidary_explain::report::Report;

#[derive(Args, Debug)]
pub struct PrefixInduction {
    /// A model directory, or `embedded`
    pub model: String,
    /// Longest prefix in tokens
    #[arg(long, default_value_t = 9)]
    pub longest: usize,
    /// Sequences for each length
    #[arg(long, default_value_t = 400)]
    pub draws: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 128)]
    pub length: usize,
}

pub fn run(arguments: &PrefixInduction, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    let tokenizer = package.tokenizer.as_ref();
    let is_special = |token: &u32| tokenizer.is_some_and(|tokenizer| tokenizer.is_special(*token));
    let vocabulary = model.spec().vocabulary().unwrap_or(0) as u32;
    let alphabet: Vec<u32> = (0..vocabulary).filter(|token| !is_special(token)).collect();
    let start = (0..vocabulary).find(is_special);
    let draws = PrefixDraws {
        alphabet: &alphabet,
        start,
        longest: arguments.longest,
        draws: arguments.draws,
        length: arguments.length.min(model.spec().length()),
    };
    let mut generator = lapidary_train::generator(global.seed);
    Ok(report(model, draws, &mut generator)?)
}
