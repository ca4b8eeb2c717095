//! `lapidary inspect attention`: where each head looks.

use crate::cli::{Global, SubjectArguments};
use crate::loading;
use crate::subject::Subject;
use anyhow::Result;
use clap::{ArgGroup, Args};
use lapidary_explain::analyses::attention;
use lapidary_explain::report::Report;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").args(["text", "tokens", "input"]).required(true))]
pub struct Attention {
    /// A model directory, or `embedded`
    pub model: String,
    #[command(flatten)]
    pub subject: SubjectArguments,
}

pub fn run(arguments: &Attention, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let subject = Subject::new(&arguments.subject, &package, global)?;
    Ok(attention::report(
        &subject.question(),
        &subject.readable_names(),
    )?)
}
