//! `lapidary explain --evaluate`: all methods on one model over a data set.

use super::{methods, options};
use crate::cli::{Explain, Global};
use crate::{datasets, loading, output, report};
use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use lapidary_explain::evaluation::{evaluate, evaluate_images};
use lapidary_explain::{Explainer, Options, Unit};
use lapidary_lab::experiments::glyphs;
use lapidary_model::{InputSpec, Package};

pub fn run(dataset: &str, arguments: &Explain, global: &Global) -> Result<()> {
    let options = options(&arguments.options, global)?;
    let methods = methods(&arguments.method)?;
    let package = loading::written_out(&arguments.model, global)?;
    if dataset == datasets::GLYPHS {
        return images(&package, &methods, &options, arguments, global);
    }
    let model = package.text_model()?;
    let data = datasets::examples(dataset, &package, model, arguments.limit, global.seed)?;
    let over_tokens = methods.iter().filter(|method| method.unit == Unit::Token);
    let progress = bar(over_tokens.count() * data.examples.len());
    let evaluation = evaluate(model, &data.examples, &methods, &options, |done| {
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    if global.json && arguments.html.is_none() {
        return output::print_json(&evaluation);
    }
    let mut found = evaluation.report(&format!("{} on {dataset}", arguments.model));
    if data.indistinguishable + data.unfit > 0 {
        found.notes.push(format!(
            "{} rows left out because target and foil begin alike, {} because they do not fit the model",
            data.indistinguishable, data.unfit
        ));
    }
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&found)?)?;
    }
    match global.json {
        true => output::print_json(&evaluation),
        false => output::print(&report::analysis_text(&found)),
    }
}

/// The same on images.
fn images(
    package: &Package,
    methods: &[&Explainer],
    options: &Options,
    arguments: &Explain,
    global: &Global,
) -> Result<()> {
    let model = package.single_model()?;
    let fits = matches!(&model.spec().input, InputSpec::Patches(patches)
        if patches.image == [glyphs::CANVAS; 2] && patches.channels == 1);
    ensure!(
        fits,
        "{} is of grey images of {1} by {1} pixels, which this model does not read; train one with `lapidary reproduce chefer --models DIR`",
        datasets::GLYPHS,
        glyphs::CANVAS
    );
    let examples = datasets::glyph_examples(arguments.limit, global.seed);
    let input = |images: &[Vec<f32>]| {
        glyphs::input(images).map_err(|error| lapidary_explain::Error::Invalid {
            what: "images".to_owned(),
            found: error.to_string(),
            expected: "those of the data set".to_owned(),
        })
    };
    let evaluation = evaluate_images(model, &examples, &input, methods, options)?;
    let found = evaluation.report(&format!("{} on {}", arguments.model, datasets::GLYPHS));
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&found)?)?;
    }
    match global.json {
        true => output::print_json(&evaluation),
        false => output::print(&report::analysis_text(&found)),
    }
}

/// How far it is, on a terminal only.
fn bar(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    let style = "{bar:30} {pos}/{len} explanations, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}
