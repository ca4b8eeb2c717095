//! A page: one file with its style inside.

use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = r"
:root { color-scheme: light dark; --ground: #fbfaf7; --ink: #22252b; --soft: #6b7079;
  --line: #dedbd3; --card: #ffffff; --for: 40 110 205; --against: 221 107 20; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181d; --ink: #e8e6e1; --soft: #9aa0aa;
  --line: #33373f; --card: #1e2127; --for: 86 150 240; --against: 240 140 60; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; }
header, main, footer { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; } h1 { font-size: 1.9rem; margin: 0; letter-spacing: -.01em; }
header p, footer { color: var(--soft); } footer { padding-bottom: 2rem; font-size: .85rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  padding: .4rem 1.4rem 1.2rem; margin: 1.2rem 0; overflow-x: auto; }
h2 { font-size: 1.2rem; margin: .9rem 0 .5rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.tokens { font-size: 1.15rem; line-height: 2.1; }
.token { padding: .15em .35em; border-radius: .3em; }
.token.for { background: rgb(var(--for) / calc(var(--strength) * .75)); }
.token.against { background: rgb(var(--against) / calc(var(--strength) * .75)); }
.token:focus { outline: 2px solid var(--ink); }
.map { width: auto; border-collapse: separate; border-spacing: 1px; }
.map th { font-size: .75rem; padding: .1rem .3rem; border: 0; max-width: 9rem; overflow: hidden; }
.map td { min-width: 1.2rem; height: 1.2rem; padding: 0; border: 0; }
.map .for { background: rgb(var(--for) / var(--strength)); }
.map .against { background: rgb(var(--against) / var(--strength)); }
.plot svg { background: #fff; border-radius: .4rem; } .plot svg text { fill: #22252b; }
fieldset { border: 1px solid var(--line); border-radius: .5rem; margin: .3rem 0; }
fieldset label { margin-right: 1rem; white-space: nowrap; } legend { color: var(--soft); }
summary { cursor: pointer; color: var(--soft); }
.layers { display: flex; flex-wrap: wrap; gap: 1.5rem; } .layer { display: flex; gap: .3rem; align-items: center; }
.layer span { width: 1.6rem; color: var(--soft); font-size: .8rem; text-align: right; }
.patterns button { padding: 0; border: 1px solid var(--line); border-radius: .2rem; background: none; cursor: pointer; }
.patterns button[aria-pressed=true] { border-color: var(--ink); }
.patterns canvas { width: 2.2rem; height: 2.2rem; image-rendering: pixelated; display: block; }
.patterns canvas.large { width: 22rem; max-width: 80vw; height: auto; aspect-ratio: 1; border: 1px solid var(--line); }
.patterns output { display: block; color: var(--soft); font-size: .9rem; min-height: 1.5em; max-width: 22rem; }
.legend, .account { color: var(--soft); font-size: .9rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 13px; }
svg .for { fill: rgb(var(--for)); } svg .against { fill: rgb(var(--against)); }
svg .axis { stroke: var(--line); }
.graph line.for { stroke: rgb(var(--for)); } .graph line.against { stroke: rgb(var(--against)); }
.graph rect { fill: var(--card); stroke: var(--soft); }
";

/// A whole page around `body`.
pub fn page(title: &str, subtitle: &str, body: Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header { h1 { (title) } p { (subtitle) } }
                main { (body) }
                footer { "Made by Lapidary " (env!("CARGO_PKG_VERSION")) ". Needs no network." }
            }
        }
    }
    .into_string()
}

/// A table with the first column as row names.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        table {
            thead { tr { @for name in head { th scope="col" { (name) } } } }
            tbody { @for row in rows { tr { @for cell in row { td { (cell) } } } } }
        }
    }
}

/// Horizontal bars, positive to the right of the axis and negative to the left.
pub fn bar_chart(names: &[String], values: &[f64], what: &str) -> Markup {
    const ROW: f64 = 24.0;
    const NAMES: f64 = 170.0;
    const BARS: f64 = 460.0;
    let largest = values
        .iter()
        .fold(0.0f64, |largest, value| largest.max(value.abs()));
    let scale = if largest > 0.0 { largest } else { 1.0 };
    let has_negative = values.iter().any(|value| *value < 0.0);
    let axis = if has_negative {
        NAMES + BARS / 2.0
    } else {
        NAMES
    };
    let reach = if has_negative { BARS / 2.0 } else { BARS };
    let height = ROW * values.len() as f64 + 4.0;
    html! {
        svg viewBox=(format!("0 0 {} {height}", NAMES + BARS + 90.0)) role="img"
            aria-label=(format!("bar chart of {what}")) {
            line.axis x1=(axis) x2=(axis) y1="0" y2=(height) {}
            @for (index, value) in values.iter().enumerate() {
                @let y = ROW * index as f64;
                @let length = value.abs() / scale * reach;
                @let name = names.get(index).map_or("biases", String::as_str).trim();
                text x=(NAMES - 8.0) y=(y + 16.0) text-anchor="end" { (name) }
                @if *value >= 0.0 {
                    rect.for x=(axis) y=(y + 3.0) width=(length) height=(ROW - 6.0) rx="2" {}
                } @else {
                    rect.against x=(axis - length) y=(y + 3.0) width=(length) height=(ROW - 6.0) rx="2" {}
                }
                text x=(NAMES + BARS + 8.0) y=(y + 16.0) { (format!("{value:+.4}")) }
            }
        }
    }
}
