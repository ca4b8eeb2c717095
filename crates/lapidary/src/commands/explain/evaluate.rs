//! `lapidary explain --evaluate`: all methods on one model over a data set.

use super::{methods, options};
use crate::cli::{Explain, Global, TextUnit};
use crate::{datasets, loading, output, report};
use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use lapidary_explain::clip::ZeroShot;
use lapidary_explain::evaluation::{ImageEvaluation, evaluate, evaluate_images};
use lapidary_explain::{Explainer, Options, Unit};
use lapidary_kernels::Tensor;
use lapidary_lab::experiments::{attributes, glyphs};
use lapidary_model::{HeadSpec, Input, InputSpec, Package};

pub fn run(dataset: &str, arguments: &Explain, global: &Global) -> Result<()> {
    let options = options(&arguments.options, global)?;
    let methods = methods(&arguments.method)?;
    let package = loading::written_out(&arguments.model, global)?;
    if dataset == datasets::GLYPHS {
        return glyph_images(&package, &methods, &options, arguments, global);
    }
    if dataset == datasets::ATTRIBUTES {
        return attribute_images(&package, &methods, &options, arguments, global);
    }
    let model = package.text_model()?;
    let mut data = datasets::examples(dataset, &package, model, arguments.limit, global.seed)?;
    if arguments.unit == TextUnit::Word {
        let tokenizer = package.tokenizer()?;
        for example in &mut data.examples {
            example.words = tokenizer.words(&example.ids);
        }
    }
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
    if arguments.unit == TextUnit::Word {
        found
            .notes
            .push("words are scored, judged and hidden, not tokens".to_owned());
    }
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

/// The same on images of glyphs.
fn glyph_images(
    package: &Package,
    methods: &[&Explainer],
    options: &Options,
    arguments: &Explain,
    global: &Global,
) -> Result<()> {
    ensure!(
        arguments.unit == TextUnit::Token,
        "an image has no words; leave --unit out"
    );
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
    print_images(&evaluation, datasets::GLYPHS, arguments, global)
}

/// The same on pictures of shapes, for a classifier of them, or for two towers whose classes are
/// said in words.
fn attribute_images(
    package: &Package,
    methods: &[&Explainer],
    options: &Options,
    arguments: &Explain,
    global: &Global,
) -> Result<()> {
    let shapes: Vec<String> = attributes::values(attributes::SHAPE)
        .into_iter()
        .map(str::to_owned)
        .collect();
    let named;
    let model = match package.single_model() {
        Ok(model) => model,
        Err(_) => {
            let mut models = package.towers.iter().map(|tower| &tower.model);
            let image = models
                .find(|model| model.spec().vocabulary().is_none())
                .context("the model reads no images")?;
            let templates = [TEMPLATE.to_owned()];
            let (text, tokenizer) = (package.text_model()?, package.tokenizer()?);
            let classes = ZeroShot::from_templates(text, tokenizer, &shapes, &templates)?;
            named = classes.classifier(image)?;
            &named
        }
    };
    let labels = match &model.spec().head {
        HeadSpec::Pooled { labels, .. } => *labels,
        _ => None,
    };
    let side = match &model.spec().input {
        InputSpec::Patches(patches) if patches.channels == 3 => match patches.image {
            [height, width] if height == width && labels == Some(shapes.len()) => Some(height),
            _ => None,
        },
        _ => None,
    };
    let side = side.with_context(|| {
        format!(
            "{} is for classifiers of square pictures in three channels into {} shapes, which this model is not; train one with `lapidary reproduce clip-text-decomposition --models DIR`",
            datasets::ATTRIBUTES,
            shapes.len()
        )
    })?;
    let examples = datasets::attribute_examples(arguments.limit, side, global.seed);
    let device = model.device();
    let input = |images: &[Vec<f32>]| {
        let shape = (images.len(), 3, side, side);
        let pixels = Tensor::from_vec(images.concat(), shape, &device);
        let pixels = pixels.map_err(lapidary_kernels::Error::from);
        Ok(Input::Pixels(pixels.map_err(lapidary_parts::Error::from)?))
    };
    let evaluation = evaluate_images(model, &examples, &input, methods, options)?;
    print_images(&evaluation, datasets::ATTRIBUTES, arguments, global)
}

/// What a shape is said in.
const TEMPLATE: &str = "a {}";

fn print_images(
    evaluation: &ImageEvaluation,
    dataset: &str,
    arguments: &Explain,
    global: &Global,
) -> Result<()> {
    let found = evaluation.report(&format!("{} on {dataset}", arguments.model));
    if let Some(html) = &arguments.html {
        output::write_text(html, &report::analysis_page(&found)?)?;
    }
    match global.json {
        true => output::print_json(evaluation),
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
