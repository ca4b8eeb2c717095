//! `lapidary inspect components`: what tokens have in common at a site, of images as pictures.

use crate::cli::{Global, SubjectArguments};
use crate::loading;
use crate::subject::Subject;
use anyhow::Result;
use clap::{ArgGroup, Args};
use lapidary_explain::analyses::components;
use lapidary_explain::report::Report;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").args(["text", "tokens", "input"]).required(true))]
pub struct Components {
    /// A model directory, or `embedded`
    pub model: String,
    #[command(flatten)]
    pub subject: SubjectArguments,
    /// Where tokens are looked at, such as `blocks.3.out`; the keys of the last block when absent
    #[arg(long)]
    pub site: Option<String>,
    /// How many components are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    pub components: u8,
}

pub fn run(arguments: &Components, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let subject = Subject::new(&arguments.subject, &package, global)?;
    Ok(components::report(
        &subject.question(),
        arguments.site.as_deref(),
        usize::from(arguments.components),
        &subject.readable_names(),
    )?)
}
