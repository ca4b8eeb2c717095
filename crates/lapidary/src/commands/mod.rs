//! One file for each verb.

mod bench;
mod compress;
mod demo;
mod diff;
mod evaluate;
pub mod explain;
mod export;
mod generate;
pub mod inspect;
mod parts;
mod reproduce;
mod run;
mod spec;
mod train;

use crate::cli::{Cli, Verb};
use crate::loading;
use anyhow::Result;

/// Does what the command line asks.
pub fn execute(arguments: Cli) -> Result<()> {
    let mut global = arguments.global;
    global.seed = global.given_seed.unwrap_or_default();
    loading::set_threads(&global)?;
    match &arguments.verb {
        Verb::Demo(arguments) => demo::run(arguments, &global),
        Verb::Run(arguments) => run::run(arguments, &global),
        Verb::Explain(arguments) => explain::run(arguments, &global),
        Verb::Diff(arguments) => diff::run(arguments, &global),
        Verb::Inspect(arguments) => inspect::run(arguments, &global),
        Verb::Compress(arguments) => compress::run(arguments, &global),
        Verb::Export(arguments) => export::run(arguments, &global),
        Verb::Evaluate(arguments) => evaluate::run(arguments, &global),
        Verb::Generate(arguments) => generate::run(arguments, &global),
        Verb::Train(arguments) => train::run(arguments, &global),
        Verb::Parts(arguments) => parts::run(arguments, &global),
        Verb::Reproduce(arguments) => reproduce::run(arguments, &global),
        Verb::Bench(arguments) => bench::run(arguments, &global),
        Verb::Spec(arguments) => spec::run(arguments, &global),
    }
}
