//! The report of an analysis as a page.

use super::graph::graph;
use super::page::{page, table};
use anyhow::Result;
use lapidary_explain::report::{Map, Report};
use maud::{Markup, PreEscaped, html};

/// Tables, maps, plots and graphs on one page.
pub fn analysis_page(report: &Report) -> Result<String> {
    let plots = report.plots.iter().map(|plot| plot.to_svg());
    let plots = plots.collect::<std::result::Result<Vec<_>, _>>()?;
    let body = html! {
        @for one in &report.tables {
            section {
                h2 { (one.title) }
                @let columns: Vec<&str> = one.columns.iter().map(String::as_str).collect();
                @let rows: Vec<Vec<String>> = one
                    .rows
                    .iter()
                    .map(|row| row.iter().map(ToString::to_string).collect())
                    .collect();
                (table(&columns, &rows))
            }
        }
        @for plot in plots { section.plot { (PreEscaped(plot)) } }
        @for one in &report.graphs {
            section { h2 { (one.title) } (graph(one)) }
        }
        @for one in &report.maps {
            section { h2 { (one.title) } (map(one)) }
        }
    };
    Ok(page(&report.title, &report.notes.join(" · "), body))
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
