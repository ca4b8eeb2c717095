//! `lapidary inspect clusters`: how a text's tokens gather from layer to layer.

use crate::cli::{Global, SubjectArguments};
use crate::loading;
use crate::subject::Subject;
use anyhow::Result;
use clap::{ArgGroup, Args};
use lapidary_explain::Question;
use lapidary_explain::analyses::clustering::{deepened, iterated, report};
use lapidary_explain::report::Report;
use lapidary_train::generator;

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").args(["text", "tokens", "input"]).required(true))]
pub struct Clusters {
    /// A model directory, or `embedded`
    pub model: String,
    #[command(flatten)]
    pub subject: SubjectArguments,
    /// How often tokens pass through the model's blocks
    #[arg(long, default_value_t = 1)]
    pub passes: usize,
    /// Blocks that tokens pass through, in a model whose blocks share their weights
    #[arg(long, conflicts_with = "passes")]
    pub depth: Option<usize>,
}

pub fn run(arguments: &Clusters, global: &Global) -> Result<Report> {
    let package = loading::package(&arguments.model, global)?;
    let subject = Subject::new(&arguments.subject, &package, global)?;
    let deeper = match arguments.depth {
        Some(depth) => deepened(subject.model, depth)?,
        None => iterated(&subject.model.written_out()?, arguments.passes)?,
    };
    let question = Question {
        model: &deeper,
        ..subject.question()
    };
    Ok(report(&question, &mut generator(global.seed))?)
}
