//! `lapidary parts`: the catalogue, measured on the spot.

use crate::cli::{Global, Parts};
use crate::output;
use anyhow::{Result, ensure};
use comfy_table::{Table, presets};
use lapidary_lab::catalogue::catalogue;

pub fn run(arguments: &Parts, global: &Global) -> Result<()> {
    ensure!(
        (8..=4096).contains(&arguments.width),
        "width is {}, but must be between 8 and 4096",
        arguments.width
    );
    ensure!(
        arguments.width.is_multiple_of(2),
        "width is {}, but must be even",
        arguments.width
    );
    ensure!(
        (2..=8192).contains(&arguments.length),
        "length is {}, but must be between 2 and 8192",
        arguments.length
    );
    let mut entries = catalogue(arguments.width, arguments.length)?;
    if let Some(filter) = &arguments.filter {
        entries.retain(|entry| {
            entry.kind.contains(filter.as_str()) || entry.family.contains(filter.as_str())
        });
        ensure!(
            !entries.is_empty(),
            "no part's name contains {filter:?}; run `lapidary parts` for all of them"
        );
    }
    if global.json {
        return output::print_json(&entries);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header([
        "family",
        "kind",
        "parameters",
        "MFLOPs",
        "MB moved",
        "peak MB",
        "growth",
        "ms",
        "what it is",
    ]);
    let mega = |number: u64| format!("{:.2}", number as f64 / 1e6);
    for entry in &entries {
        table.add_row([
            entry.family.to_owned(),
            entry.kind.to_owned(),
            output::grouped(entry.parameters),
            mega(entry.flops),
            mega(entry.bytes),
            mega(entry.peak_bytes),
            format!("n^{:.2}", entry.growth),
            format!("{:.2}", entry.milliseconds),
            entry.description.to_owned(),
        ]);
    }
    output::print(&format!(
        "One block of width {}, one sequence of {} tokens; growth is that of the operations from there to twice the length.\n\n{table}\n",
        arguments.width, arguments.length
    ))
}
