//! A compression as text, JSON and a page.

use std::path::PathBuf;

use super::auto::Searched;
use super::measure::{Distance, Measured, Rounded};
use super::stage::{Order, changed};
use super::{class, saved_as, stage_json};
use crate::output;
use anyhow::Result;
use comfy_table::{Table, presets};
use lapidary_compress::{Change, HealReport, Report, Seconds};
use lapidary_explain::report::{self, Cell, Plot, Series};
use lapidary_model::SavedAs;
use serde_json::{Value, json};

/// All that a compression did and cost.
pub(super) struct Outcome {
    pub(super) reports: Vec<(Report, Seconds)>,
    /// How a mix was found, when it was searched for.
    pub(super) search: Option<Searched>,
    /// The order that is better, or was taken for it.
    pub(super) order: Option<Order>,
    pub(super) before: Measured,
    pub(super) after: Measured,
    pub(super) distance: Distance,
    /// The result with rounded activations, if that was asked for.
    pub(super) activations: Option<Rounded>,
    /// Tokens that methods looked at and features of one, where those are more.
    pub(super) few: Option<[usize; 2]>,
    /// Bytes of the files of tensors, of the original where it is a directory and of what was written.
    pub(super) disk: [Option<u64>; 2],
    /// How it healed, if it was trained further.
    pub(super) healing: Option<HealReport>,
    /// Whether the perplexity is that of a text which was not calibrated on.
    pub(super) held_out: bool,
    pub(super) dense: bool,
    pub(super) saved: SavedAs,
    /// Whether the original is of a family, which other programs know.
    pub(super) family: bool,
    pub(super) directory: PathBuf,
    pub(super) seconds: f64,
}

impl Outcome {
    fn kept(&self) -> f64 {
        self.after.size.parameters as f64 / self.before.size.parameters.max(1) as f64
    }

    fn methods(&self) -> String {
        let names = self
            .reports
            .iter()
            .map(|(report, _)| report.method.as_str());
        names.collect::<Vec<_>>().join("+")
    }

    fn text_measured(&self) -> &'static str {
        match (self.held_out, &self.healing) {
            (true, _) => "the text of --evaluate",
            (false, None) => "the calibration text",
            (false, Some(_)) => "the calibration text, which it was healed on",
        }
    }

    /// Everything, for machines.
    pub(super) fn json(&self) -> Result<Value> {
        let stages = self.reports.iter();
        let stages = stages.map(|(report, seconds)| stage_json(report, *seconds));
        let perplexities = self.before.perplexity.zip(self.after.perplexity);
        Ok(json!({
            "methods": self.methods(),
            "report": self.reports.last().map(|(report, _)| report),
            "stages": stages.collect::<Result<Vec<_>>>()?,
            "search": self.search,
            "better_order": self.order,
            "bytes_on_disk": { "before": self.disk[0], "after": self.disk[1] },
            "activations": self.activations,
            "kept": self.kept(),
            "agreement_on_calibration": self.distance.agreement,
            "likeness_on_calibration": self.distance.likeness,
            "block_errors_on_calibration": self.distance.block_errors,
            "perplexity_on": self.text_measured(),
            "perplexity_on_calibration": match self.held_out {
                true => None,
                false => perplexities.map(|(before, after)| json!({ "before": before, "after": after })),
            },
            "before": self.before,
            "after": self.after,
            "healing": self.healing,
            "saved_as": saved_as(self.saved),
            "dense": self.dense,
            "directory": self.directory,
            "seconds": self.seconds,
            "version": env!("CARGO_PKG_VERSION"),
        }))
    }

    /// Lines of `name`, what it was and what it is.
    fn lines(&self) -> Vec<[String; 3]> {
        let (before, after) = (&self.before, &self.after);
        let mut lines = Vec::new();
        let mut line = |name: String, before: String, after: String| {
            lines.push([name, before, after]);
        };
        let grouped = output::grouped;
        line(
            "parameters".into(),
            grouped(before.size.parameters),
            format!(
                "{} ({:.1} % kept)",
                grouped(after.size.parameters),
                100.0 * self.kept()
            ),
        );
        line(
            "bytes".into(),
            output::bytes(before.size.bytes as u64),
            output::bytes(after.size.bytes as u64),
        );
        let [stored, written] = self
            .disk
            .map(|bytes| bytes.map_or_else(|| "–".to_owned(), output::bytes));
        line("on disk".into(), stored, written);
        line(
            "FLOPs/token".into(),
            grouped(before.size.flops_per_token),
            grouped(after.size.flops_per_token),
        );
        if let Some((before, after)) = before.memory.zip(after.memory) {
            line(
                "memory".into(),
                output::bytes(before as u64),
                format!("{} at most, reading a window", output::bytes(after as u64)),
            );
        }
        let mut rate = |name: &str, before: Option<f64>, after: Option<f64>| {
            if let Some((before, after)) = before.zip(after) {
                line(
                    name.into(),
                    format!("{before:.0} tokens/s"),
                    format!("{after:.0} tokens/s ({:.2} times as fast)", after / before),
                );
            }
        };
        rate("reading", before.prefill, after.prefill);
        rate("writing", before.decode, after.decode);
        if let Some((before, after)) = before.perplexity.zip(after.perplexity) {
            line(
                "perplexity".into(),
                format!("{:.3}", before.value),
                format!(
                    "{:.3} on {} ({} scored tokens, {} windows)",
                    after.value,
                    self.text_measured(),
                    grouped(before.tokens),
                    before.windows
                ),
            );
        }
        for ((kind, before), (_, after)) in before.choices.iter().zip(&after.choices) {
            line(
                format!("right on {kind}"),
                format!("{:.0} %", 100.0 * before),
                format!("{:.0} %", 100.0 * after),
            );
        }
        if let Some((before, after)) = before.sample.as_ref().zip(after.sample.as_ref()) {
            line("writes".into(), format!("{before:?}"), format!("{after:?}"));
        }
        lines
    }

    /// Lines about the distance between the two.
    fn distance_lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some([tokens, width]) = self.few {
            lines.push(format!(
                "data        {} tokens, fewer than the {} features of one: what was calibrated on them may fit \
                 them alone, and be measured on them so; give more text, or more --windows",
                output::grouped(tokens),
                output::grouped(width)
            ));
        }
        if let Some(measured) = self.distance.agreement {
            lines.push(format!(
                "agreement   KL {:.4} nats, same first answer {:.1} % of {} predictions",
                measured.divergence,
                100.0 * measured.top1,
                output::grouped(measured.predictions)
            ));
        }
        if let Some(measured) = self.distance.likeness {
            lines.push(format!(
                "likeness    cosine {:.4}, relative error {:.4} over {} last hidden vectors",
                measured.cosine,
                measured.relative_error,
                output::grouped(measured.vectors)
            ));
        }
        if !self.distance.block_errors.is_empty() {
            let errors = self.distance.block_errors.iter();
            let errors: Vec<String> = errors.map(|error| format!("{error:.3}")).collect();
            lines.push(format!(
                "stream      relative error after each block: {}",
                errors.join(" ")
            ));
        }
        lines.extend(self.activations.as_ref().map(rounded));
        lines
    }

    /// Lines about each stage as a whole, and about healing.
    fn stage_lines(&self) -> Vec<String> {
        let mut lines = self.order.as_ref().map_or_else(Vec::new, Order::lines);
        for (report, _) in &self.reports {
            let short = report.shortfall.iter();
            lines.extend(short.map(|short| format!("ratio       {}: {short}", report.method)));
            lines.extend(
                report
                    .notes
                    .iter()
                    .map(|note| format!("{:<11} {note}", subject(report))),
            );
        }
        if let Some(healing) = &self.healing {
            let told = match self.distance.likeness {
                Some(_) => "the original's hidden vectors",
                None => "the original's predictions",
            };
            let mut from = match healing.distil {
                weight if weight >= 1.0 => told.to_owned(),
                weight if weight > 0.0 => {
                    format!("{} and {told} (weight {weight})", healing.objective)
                }
                _ => healing.objective.to_string(),
            };
            if healing.hints > 0.0 {
                from += &format!(" and residual stream (weight {})", healing.hints);
            }
            if let Some(adapters) = &healing.adapters {
                from += &format!(
                    ", by adapters of rank {} beside {} layers ({} numbers)",
                    adapters.settings.rank,
                    adapters.layers,
                    output::grouped(adapters.parameters)
                );
            }
            if let Some(bits) = healing.bits {
                from += &format!(", seen in {bits} bits");
            }
            let regrown = match healing.regrown {
                0 => String::new(),
                count => format!(", {} zeros grown again", output::grouped(count)),
            };
            lines.push(format!(
                "healing     {} steps on {} examples by {from}: {} -> {} on held-out ones, best after \
                 {}{regrown}, {:.1} s",
                healing.steps,
                output::grouped(healing.examples),
                loss(healing.before),
                loss(healing.after),
                healing.best,
                healing.seconds
            ));
        }
        let search = self.search.as_ref();
        lines.extend(search.and_then(|search| search.beyond(self.after.size.parameters)));
        lines
    }

    /// For the terminal.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for (report, _) in &self.reports {
            text += &format!("{}\n\n", modules(report));
        }
        text += &format!("method      {}\n", self.methods());
        if let Some(search) = &self.search {
            text += &search.text();
        }
        for [name, before, after] in self.lines() {
            match name.as_str() {
                "writes" => text += &format!("writes      {before}\n         -> {after}\n"),
                _ => text += &format!("{name:<11} {before} -> {after}\n"),
            }
        }
        for line in self.distance_lines().into_iter().chain(self.stage_lines()) {
            text += &format!("{line}\n");
        }
        text + &format!("{}, {:.1} s\n", self.written(), self.seconds)
    }

    /// Where the result is, and what kind of directory it is.
    fn written(&self) -> String {
        let merged = match self.dense {
            true => {
                "; sizes and speeds are of the factors and integers, before they were written out"
            }
            false => "",
        };
        format!(
            "written to  {} ({}{merged})",
            self.directory.display(),
            class(self.saved, self.dense, self.family)
        )
    }

    /// For a page.
    pub(super) fn report(&self) -> report::Report {
        let mut sizes = report::Table::new("Before and after", &["", "before", "after"]);
        for line in self.lines() {
            sizes.push(line.map(Cell::from));
        }
        let mut tables = vec![sizes];
        for (report, _) in &self.reports {
            let title = format!("What {} did", report.method);
            let mut table = report::Table::new(title, &["module", "shape", "change", "note"]);
            for module in &report.modules {
                table.push([
                    Cell::from(module.path.as_str()),
                    format!("{}×{}", module.output, module.input).into(),
                    changed(&module.change).into(),
                    module.note.clone().unwrap_or_default().into(),
                ]);
            }
            tables.push(table);
        }
        let points = (0..)
            .map(f64::from)
            .zip(self.distance.block_errors.iter().copied());
        let plot = Plot {
            title: "Relative error of the residual stream".to_owned(),
            x: "block".to_owned(),
            y: "error".to_owned(),
            series: vec![Series {
                name: self.methods(),
                points: points.collect(),
            }],
        };
        let mut plots = Vec::new();
        if let Some(search) = &self.search {
            tables.push(search.table());
            plots.push(search.plot());
        }
        if !self.distance.block_errors.is_empty() {
            plots.push(plot);
        }
        if let Some(healing) = &self.healing {
            let series = |name: &str, points: &[(u64, f64)]| Series {
                name: name.to_owned(),
                points: points
                    .iter()
                    .map(|(step, loss)| (*step as f64, *loss))
                    .collect(),
            };
            plots.push(Plot {
                title: "Healing".to_owned(),
                x: "steps".to_owned(),
                y: "loss".to_owned(),
                series: vec![
                    series("trained on", &healing.training),
                    series("held out", &healing.validation),
                ],
            });
        }
        report::Report {
            title: format!("Compressed by {}", self.methods()),
            notes: [
                self.distance_lines(),
                self.stage_lines(),
                vec![self.written()],
            ]
            .concat(),
            tables,
            plots,
            ..report::Report::default()
        }
    }
}

/// A loss with digits that tell it from another, however small a distance it is.
fn loss(value: f64) -> String {
    match value.abs() < 0.1 && value != 0.0 {
        true => format!("{value:.3e}"),
        false => format!("{value:.4}"),
    }
}

/// What notes about a whole stage are about: zeros that it set, or shapes that it left.
fn subject(report: &Report) -> &'static str {
    let mut modules = report.modules.iter();
    match modules.any(|module| matches!(module.change, Change::Prune { .. })) {
        true => "zeros",
        false => "shape",
    }
}

/// A line about rounded activations.
fn rounded(measured: &Rounded) -> String {
    let mut line = format!(
        "activations {} bits {}, {} of {} inputs as they are",
        measured.bits,
        measured.range,
        output::grouped(measured.kept),
        output::grouped(measured.inputs)
    );
    if measured.functions {
        line += ", softmax, GELU and norms by integers";
    }
    if let Some(perplexity) = measured.perplexity {
        line += &format!(": perplexity {:.3}", perplexity.value);
    }
    if let Some(agreement) = measured.agreement {
        line += &format!(
            ", KL {:.4} nats, same first answer {:.1} %",
            agreement.divergence,
            100.0 * agreement.top1
        );
    }
    if let Some(likeness) = measured.likeness {
        line += &format!(
            ", cosine {:.4}, relative error {:.4}",
            likeness.cosine, likeness.relative_error
        );
    }
    line
}

/// The modules of one method's report.
fn modules(report: &Report) -> Table {
    let weighted = report.modules.iter().any(|module| module.chosen.is_some());
    let mut header = vec!["module", "shape", "change"];
    if weighted {
        header.extend(["weighted error", "plain SVD's"]);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for module in &report.modules {
        let mut row = vec![
            module.path.clone(),
            format!("{}×{}", module.output, module.input),
            changed(&module.change),
        ];
        if weighted {
            row.extend([&module.chosen, &module.plain].map(|errors| {
                errors.as_ref().map_or_else(
                    || "–".to_owned(),
                    |errors| format!("{:.4}", errors.weighted),
                )
            }));
        }
        table.add_row(row);
    }
    table
}
