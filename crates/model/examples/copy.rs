//! Loads a model directory of any kind and writes it again: `copy FROM TO`.
//!
//! `tests/oracles/families.py --round-trip` lets `transformers` load what this writes.

use std::path::PathBuf;
use std::process::ExitCode;

use lapidary_model::{OpenOptions, Package};

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [from, to] = arguments.as_slice() else {
        eprintln!("usage: copy FROM TO");
        return ExitCode::from(2);
    };
    let copied =
        Package::open(from, &OpenOptions::default()).and_then(|package| package.save(to, None));
    match copied {
        Ok(form) => {
            println!("{form:?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
