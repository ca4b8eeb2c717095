//! `lapidary train`: from a spec to a model.

use crate::cli::{Global, Train};
use crate::datasets;
use crate::images::{self, Picture, Preprocessing};
use crate::{loading, output};
use anyhow::{Context, Result, bail, ensure};
use lapidary_kernels::Device;
use lapidary_model::InputSpec;
use lapidary_train::self_distillation::{Image, Images};
use lapidary_train::spec::{DataSpec, Keep};
use lapidary_train::{Finished, TrainSpec};
use serde_json::json;
use std::path::Path;

const SPEC_BYTES: u64 = 16 << 20;

pub fn run(arguments: &Train, global: &Global) -> Result<()> {
    let text = lapidary_model::files::read_text(&arguments.spec, SPEC_BYTES)?;
    let mut spec: TrainSpec = toml::from_str(&text)
        .map_err(|error| loading::misread(&arguments.spec, &text, &error))
        .with_context(|| "the training spec cannot be read")?;
    if let Some(data) = &arguments.data {
        match &mut spec.data {
            DataSpec::Text { file, .. } => *file = Some(data.clone()),
            DataSpec::Images { directory } => *directory = Some(data.clone()),
            _ => bail!("--data is for specs whose data.kind is text or images"),
        }
    }
    if let Some(steps) = arguments.steps {
        spec.steps = steps as u64;
    }
    if let Some(seed) = global.given_seed {
        spec.seed = seed;
    }
    let device = loading::device(global)?;
    if spec.self_distillation.is_some() {
        spec.validate()?;
        // Before what may be many pictures are read.
        lapidary_train::check_directory(&spec, &arguments.out, arguments.resume)?;
        let images = images_of(&spec)?;
        let finished = lapidary_train::run_on_images(
            &spec,
            images,
            &arguments.out,
            arguments.resume,
            &device,
        )?;
        return tell_distilled(&finished, &spec, global);
    }
    let finished = lapidary_train::run(&spec, &arguments.out, arguments.resume, &device)?;
    if global.json {
        return output::print_json(&json!({
            "steps": finished.steps,
            "loss": finished.loss,
            "validation_loss": finished.validation_loss,
            "validation_perplexity": finished.validation_loss.exp(),
            "kept_step": finished.kept_step,
            "last_validation_loss": finished.last_validation_loss,
            "tokens_per_second": finished.tokens_per_second,
            "model": finished.model,
            "seed": spec.seed,
        }));
    }
    let kept = match spec.validation.keep {
        Keep::Last => String::new(),
        Keep::Best => format!(
            " at step {}, the least, and {:.4} at the end",
            finished.kept_step, finished.last_validation_loss
        ),
    };
    output::print(&format!(
        "{} steps, validation loss {:.4} (perplexity {:.3}){kept}, {:.0} tokens/s; the model is in {}\n",
        finished.steps,
        finished.validation_loss,
        finished.validation_loss.exp(),
        finished.tokens_per_second,
        finished.model.display()
    ))
}

/// What a run of self-distillation left.
fn tell_distilled(finished: &Finished, spec: &TrainSpec, global: &Global) -> Result<()> {
    let spread = finished
        .spread
        .context("the teacher was not asked about the validation images")?;
    if global.json {
        return output::print_json(&json!({
            "steps": finished.steps,
            "loss": finished.loss,
            "validation_loss": finished.validation_loss,
            "teacher_entropy": spread.entropy,
            "teacher_information": spread.information(),
            "tokens_per_second": finished.tokens_per_second,
            "model": finished.model,
            "seed": spec.seed,
        }));
    }
    output::print(&format!(
        "{} steps, validation loss {:.4}; the mean of what the teacher says has an entropy of {:.3} nats, of which \
         images decide {:.3}; {:.0} tokens/s; the model is in {}\n",
        finished.steps,
        finished.validation_loss,
        spread.entropy_of_mean,
        spread.information(),
        finished.tokens_per_second,
        finished.model.display()
    ))
}

/// The images that a spec names, those for validation last.
fn images_of(spec: &TrainSpec) -> Result<Images> {
    let InputSpec::Patches(input) = &spec.model.input else {
        bail!("model.input is of tokens, but self_distillation needs a model that reads patches");
    };
    ensure!(
        input.channels == 3,
        "model.input.channels is {}, but pictures have 3",
        input.channels
    );
    let all = match &spec.data {
        DataSpec::Images { directory } => {
            let directory = directory
                .as_ref()
                .context("data.directory is absent; name one in the spec or by --data")?;
            pictures(directory, input.image)?
        }
        DataSpec::Shapes { seed, count } => {
            let [height, width] = input.image;
            ensure!(
                height == width,
                "model.input.image is {height} by {width}, but shapes are drawn on squares"
            );
            let examples = datasets::attribute_examples(*count, height, *seed);
            let images = examples
                .into_iter()
                .map(|example| Image::new([3, height, width], example.image));
            images.collect::<lapidary_train::Result<Vec<Image>>>()?
        }
        _ => bail!("data.kind is one of tokens, but self_distillation reads images or shapes"),
    };
    let held_out = (spec.validation.fraction * all.len() as f64).ceil() as usize;
    ensure!(
        held_out > 0 && held_out < all.len(),
        "{} images cannot be parted by validation.fraction = {}: at least one has to be on either side",
        all.len(),
        spec.validation.fraction
    );
    let mut training = all;
    let validation = training.split_off(training.len() - held_out);
    Ok(Images {
        training,
        validation,
    })
}

/// The pictures of a directory as every vision model takes them, of the size that the model reads.
fn pictures(directory: &Path, size: [usize; 2]) -> Result<Vec<Image>> {
    let preprocessing = Preprocessing::of(directory, size)?;
    let files = images::list(directory)?;
    let read = files.iter().map(|file| {
        let pixels = preprocessing.pixels(&Picture::read(file)?, &Device::Cpu)?;
        let pixels = pixels.flatten_all()?.to_vec1::<f32>()?;
        Ok(Image::new([3, size[0], size[1]], pixels)?)
    });
    read.collect()
}
