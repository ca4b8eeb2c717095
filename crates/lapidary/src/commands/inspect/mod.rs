//! `lapidary inspect`: a model as a whole, or many inputs at once. One file for each analysis.

pub mod attention;
pub mod collapse;
pub mod geometry;
pub mod channels;
pub mod clusters;
pub mod energy;
pub mod particles;
pub mod autoencoder;
pub mod prefix_induction;
pub mod clip;

use crate::cli::{Analysis, Global, Inspect};
use crate::{output, report};
use anyhow::Result;

pub fn run(arguments: &Inspect, global: &Global) -> Result<()> {
    if let Some(html) = &arguments.html {
        output::check_writable(html)?;
    }
    let found = match &arguments.analysis {
        Analysis::Attention(arguments) => attention::run(arguments, global)?,
        Analysis::Collapse(arguments) => collapse::run(arguments, global)?,
        Analysis::Geometry(arguments) => geometry::run(arguments, global)?,
        Analysis::Channels(arguments) => channels::run(arguments, global)?,
        Analysis::Clusters(arguments) => clusters::run(arguments, global)?,
        Analysis::Energy(arguments) => energy::run(arguments, global)?,
        Analysis::Particles(arguments) => particles::run(arguments)?,
        Analysis::PrefixInduction(arguments) => prefix_induction::run(arguments, global)?,
        Analysis::Sae(arguments) => autoencoder::inspect(arguments, global)?,
        Analysis::SaeTrain(arguments) => autoencoder::train_one(arguments, global)?,
        Analysis::Clip(arguments) => clip::run(arguments, global)?,
    };
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&found)?)?;
    }
    if global.json {
        return output::print_json(&found);
    }
    output::print(&report::analysis_text(&found))
    output::print(&in_terminal(&found))
}

/// Title, notes and tables; maps and plots are for pages and JSON.
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
    let drawn = report.maps.len() + report.plots.len();
    if drawn > 0 {
        text += &format!("\n{drawn} maps and plots: see --html FILE or --json\n");
    }
    if !report.sections.is_empty() {
        text += &format!(
            "\n{} sections in detail: see --html FILE or --json\n",
            report.sections.len()
        );
    }
    text
}
