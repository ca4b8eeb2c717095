//! Compresses a model directory and writes it beside what it gives: `narrow METHOD RATIO FROM TO`.
//!
//! Heads and attention stay, and feed-forward parts are narrowed alike, where the method has the
//! choice; `modegpt-heads` is `modegpt` with heads narrowed alike too. `TO/case.safetensors` holds two rows of token ids, or images, and the scores or hidden
//! vectors that the saved directory gives for them here.
//! `tests/oracles/families.py --narrow` compares them with those of `transformers`.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Content, Example, FuseSettings,
    Method, Settings, Task,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::checkpoint::{WriteOptions, write_checkpoint};
use lapidary_model::{Input, InputSpec, ModelSpec, OpenOptions, Package, Pass, SavedAs};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [method, ratio, from, to] = arguments.as_slice() else {
        eprintln!("usage: narrow METHOD RATIO FROM TO");
        return ExitCode::from(2);
    };
    match run(method, ratio, Path::new(from), Path::new(to)) {
        Ok(saved) => {
            println!("{saved:?}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(method: &str, ratio: &str, from: &Path, to: &Path) -> Result<SavedAs, Box<dyn Error>> {
    let heads = method == "modegpt-heads";
    let method = Method::find(if heads { "modegpt" } else { method })?;
    let keep = 1.0 - ratio.parse::<f64>()?;
    let package = Package::open(from, &OpenOptions::default())?;
    let model = package.single_model()?;
    let mut settings = Settings {
        fuse: FuseSettings {
            gate_rate: 1e-2,
            ..FuseSettings::default()
        },
        ..Settings::default()
    };
    settings.modegpt.smoothing = f64::INFINITY;
    settings.modegpt.heads = heads;
    settings.modegpt.stock = heads;
    settings.lorap.attention = false;
    let examples = (0..16).map(|seed| example(model.spec(), seed));
    let data = CalibrationData::new(examples.collect::<Result<_, _>>()?)?;
    let requirements = method.requirements(model, &settings)?;
    let options = CalibrationOptions::default();
    let calibration = match requirements.is_empty() {
        true => None,
        false => Some(Calibration::collect(model, &data, &requirements, options)?),
    };
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data: Some(&data),
        settings: Some(&settings),
    };
    let plan = method.plan(&task, &Budget::Keep(keep))?;
    let compressed = method.apply(&task, &plan)?;
    let saved = package.with_model(compressed.model).save(to, None)?;
    let again = Package::open(to, &OpenOptions::default())?;
    let model = again.single_model()?;
    let (name, stored, input) = shown(&data)?;
    let output = model.forward(&input, Pass::default())?;
    let (what, found) = match output.logits {
        Some(logits) => ("expected.logits", logits),
        None => ("expected.last_hidden_state", output.hidden),
    };
    let found = found.into_value().to_dtype(DType::F32)?;
    let tensors = [(name, &stored), (what, &found)];
    // One file, under the name that the fixtures have.
    let case = to.join("case");
    std::fs::create_dir(&case)?;
    write_checkpoint(&case, tensors, &WriteOptions::default())?;
    std::fs::rename(case.join("model.safetensors"), to.join("case.safetensors"))?;
    std::fs::remove_dir_all(&case)?;
    Ok(saved)
}

/// Token ids or an image, made of a number.
fn example(spec: &ModelSpec, seed: usize) -> Result<Example, Box<dyn Error>> {
    Ok(match &spec.input {
        InputSpec::Tokens(tokens) => {
            let id = |at: usize| {
                (3 + (at * 7 + seed * 13 + at * at * 5) % (tokens.vocabulary - 3)) as u32
            };
            Example::window((0..10).map(id).collect::<Vec<u32>>())
        }
        InputSpec::Patches(patches) => {
            let shape = (patches.channels, patches.image[0], patches.image[1]);
            let count = shape.0 * shape.1 * shape.2;
            let number =
                |at: usize| ((at * 37 + seed * 101 + at * at % 13) % 29) as f32 / 14.0 - 1.0;
            let pixels = (0..count).map(number).collect::<Vec<f32>>();
            Example {
                content: Content::Pixels(Tensor::from_vec(pixels, shape, &Device::Cpu)?),
                target: Default::default(),
            }
        }
    })
}

/// The first two examples as `transformers` calls and reads them, and as they are read here.
fn shown(data: &CalibrationData) -> Result<(&'static str, Tensor, Input), Box<dyn Error>> {
    let (mut ids, mut images) = (Vec::new(), Vec::new());
    for example in data.examples().iter().take(2) {
        match &example.content {
            Content::Tokens { ids: own, .. } => {
                ids.push(Tensor::from_slice(own, own.len(), &Device::Cpu)?)
            }
            Content::Pixels(pixels) => images.push(pixels.clone()),
        }
    }
    Ok(match images.is_empty() {
        true => {
            let ids = Tensor::stack(&ids, 0)?;
            ("input_ids", ids.to_dtype(DType::I64)?, Input::tokens(ids))
        }
        false => {
            let images = Tensor::stack(&images, 0)?;
            ("pixel_values", images.clone(), Input::Pixels(images))
        }
    })
}
