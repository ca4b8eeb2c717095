//! `lapidary inspect`: a model as a whole, or many inputs at once. One file for each analysis.

pub mod attention;
pub mod circuit;

use crate::cli::{Analysis, Global, Inspect};
use crate::{output, report};
use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use lapidary_explain::report::Report;

pub fn run(arguments: &Inspect, global: &Global) -> Result<()> {
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    let found = match &arguments.analysis {
        Analysis::Attention(arguments) => attention::run(arguments, global)?,
        Analysis::Circuit(arguments) => circuit::run(arguments, global)?,
    };
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&found)?)?;
    }
    if global.json {
        return output::print_json(&found);
    }
    output::print(&in_terminal(&found))
}

/// Title, notes and tables; maps, plots and graphs are for pages and JSON.
fn in_terminal(report: &Report) -> String {
    let mut text = format!("{}\n", report.title);
    for note in &report.notes {
        text += &format!("  {note}\n");
    }
    for table in &report.tables {
        let mut shown = Table::new();
        shown
            .load_style(presets::UTF8_HORIZONTAL_ONLY)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(&table.columns);
        for row in &table.rows {
            shown.add_row(row.iter().map(ToString::to_string));
        }
        text += &format!("\n{}\n{shown}\n", table.title);
    }
    let drawn = report.maps.len() + report.plots.len() + report.graphs.len();
    if drawn > 0 {
        text += &format!("\n{drawn} figures: see --html FILE or --json\n");
    }
    text
}
