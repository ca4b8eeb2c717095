//! The report of an analysis, as text and as a page.

use super::coloured::Coloured;
use super::graph::graph;
use super::page::{page, table};
use anyhow::Result;
use comfy_table::{ContentArrangement, LineStyle, TableStyle};
use lapidary_explain::report::{Map, Report, Section, Table};
use maud::{Markup, PreEscaped, html};

/// Tables, maps, plots and graphs on one page.
pub fn analysis_page(report: &Report) -> Result<String> {
    let plots = report.plots.iter().map(|plot| plot.to_svg());
    let plots = plots.collect::<std::result::Result<Vec<_>, _>>()?;
    let body = html! {
        @for one in &report.tables {
            section { h2 { (one.title) } (cells(one)) }
        }
        @for plot in plots { section.plot { (PreEscaped(plot)) } }
        @for one in &report.graphs {
            section { h2 { (one.title) } (graph(one)) }
        }
        @for one in &report.maps {
            section { h2 { (one.title) } (map(one)) }
        }
        @for one in &report.sections { (in_detail(one)) }
    };
    Ok(page(&report.title, &report.notes.join(" · "), body))
}

fn cells(one: &Table) -> Markup {
    let columns: Vec<&str> = one.columns.iter().map(String::as_str).collect();
    let rows: Vec<Vec<String>> = one
        .rows
        .iter()
        .map(|row| row.iter().map(ToString::to_string).collect())
        .collect();
    table(&columns, &rows)
}

/// One thing with its examples, tokens coloured by their scores.
fn in_detail(section: &Section) -> Markup {
    html! {
        section {
            h2 { (section.title) }
            @for note in &section.notes { p.legend { (note) } }
            @for example in &section.examples {
                h3 { (example.title) }
                (Coloured::new(&example.tokens, &example.scores).as_html())
            }
            @for one in &section.tables { h3 { (one.title) } (cells(one)) }
        }
    }
}

/// Numbers as coloured cells: blue above zero, orange below, in the strength of their share of
/// the largest.
pub fn map(map: &Map) -> Markup {
    let largest = map
        .values
        .iter()
        .flatten()
        .filter(|value| value.is_finite())
        .fold(f64::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
    html! {
        table.map {
            thead { tr { th {} @for column in &map.columns { th scope="col" { (column) } } } }
            tbody {
                @for (index, row) in map.values.iter().enumerate() {
                    tr {
                        th scope="row" { (map.rows.get(index).map_or("", String::as_str)) }
                        @for value in row {
                            td class=(if *value >= 0.0 { "for" } else { "against" })
                                style=(format!("--strength:{:.3}", (value.abs() / largest).min(1.0)))
                                title=(format!("{value:.4}")) {}
                        }
                    }
                }
            }
        }
    }
}

/// A line between the header and the rows, and no other.
const UNDER_THE_HEADER: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

/// Title, notes and tables; maps, plots and graphs are for pages and JSON.
pub fn analysis_text(report: &Report) -> String {
    let mut text = format!("{}\n", report.title);
    for note in &report.notes {
        text += &format!("  {note}\n");
    }
    for table in &report.tables {
        let mut shown = comfy_table::Table::new();
        shown
            .load_style(UNDER_THE_HEADER)
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
    if !report.sections.is_empty() {
        text += &format!(
            "\n{} sections in detail: see --html FILE or --json\n",
            report.sections.len()
        );
    }
    text
}
