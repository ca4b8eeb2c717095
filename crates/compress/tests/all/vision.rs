//! The recipes of text on a vision Transformer.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{model, scores};
use lapidary_compress::quality::{accuracy, agreement_rounded};
use lapidary_compress::{
    ActivationRange, ActivationSettings, Calibration, CalibrationData, CalibrationOptions, Content,
    Example, Fingerprint, HealData, HealSettings, Method, Recipe, RoundedActivations, Settings,
    Target, heal,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package};

const VISION: &str = r#"
width = 32
final_norm = { kind = "layer" }
[input]
kind = "patches"
image = [8, 8]
patch = 4
channels = 1
[[blocks]]
repeat = 4
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 128 }
[head]
kind = "pooled"
labels = 3
"#;

/// A block of four, then a quarter of the features of the rest.
const CUT: &str = r#"
[[stage]]
method = "block-influence"
ratio = 0.25
[[stage]]
method = "channel-magnitude"
ratio = 0.25
"#;

const ROUND: &str = r#"
[[stage]]
method = "gptq"
[stage.settings.quantise]
bits = 4
outliers = 6.0
"#;

fn images(count: usize, first: usize) -> CalibrationData {
    let example = |number: usize| {
        let brightness = |i: usize| ((i * 37 + number * 101) as f64 * 0.3).sin();
        let pixels = (0..64).map(brightness).collect::<Vec<f64>>();
        Example {
            content: Content::Pixels(Tensor::from_vec(pixels, (1, 8, 8), &Device::Cpu).unwrap()),
            target: Target::Label(number as u32 % 3),
        }
    };
    CalibrationData::new((first..first + count).map(example).collect()).unwrap()
}

fn last(recipe: &str, model: &Model, data: &CalibrationData) -> Model {
    let recipe: Recipe = toml::from_str(recipe).unwrap();
    let done = recipe.run(model, Some(data), &Settings::default()).unwrap();
    done.into_iter().next_back().unwrap().compressed.model
}

#[test]
fn it_is_cut_heals_is_rounded_and_loads_again() {
    let (original, data) = (model(VISION, 3), images(24, 0));
    let run = || {
        let cut = last(CUT, &original, &data);
        let learned = HealData {
            training: &data,
            validation: &data,
            teacher: Some(&original),
        };
        let settings = HealSettings {
            steps: 8,
            rate: 1e-3,
            distil: 0.5,
            hints: 0.5,
            rounding: Method::find("int4").unwrap().rounding(&Settings::default()),
            ..HealSettings::default()
        };
        let (healed, report) = heal(&cut, &learned, &settings, |_, _| ()).unwrap();
        assert!(report.after <= report.before, "{report:?}");
        (last(ROUND, &healed, &data), cut)
    };
    let (rounded, cut) = run();
    assert_eq!(cut.spec().expanded_blocks().len(), 3);
    for block in rounded.spec().expanded_blocks() {
        assert_eq!(block.feedforward.unwrap().hidden(), 96);
    }
    assert_eq!(rounded.spec().quantised.len(), 3 * 6);
    assert_eq!(
        Fingerprint::of(&rounded).unwrap(),
        Fingerprint::of(&run().0).unwrap()
    );
    let right = accuracy(&rounded, &data, 8).unwrap();
    assert!((0.0..=1.0).contains(&right));

    let told = Settings {
        activations: ActivationSettings {
            range: Some(ActivationRange::PerTensor),
            ..ActivationSettings::default()
        },
        ..Settings::default()
    };
    let requirements = RoundedActivations::requirements(&rounded, &told).unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(&rounded, &data, &requirements, options).unwrap();
    let by = RoundedActivations::new(&rounded, &told, Some(&calibration)).unwrap();
    let near = agreement_rounded(&rounded, &rounded, &data, 8, &by.unwrap()).unwrap();
    assert!(near.divergence > 0.0 && near.divergence < 0.1, "{near:?}");
    // With the functions between in integers too, it says something else again.
    let mut told = told;
    told.activations.functions = true;
    let by = RoundedActivations::new(&rounded, &told, Some(&calibration)).unwrap();
    let integers = agreement_rounded(&rounded, &rounded, &data, 8, &by.unwrap()).unwrap();
    assert!(integers.divergence.is_finite() && integers.divergence != near.divergence);

    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let before = scores(&rounded, &data);
    Package::new(rounded, None).save(&out, None).unwrap();
    let options = OpenOptions {
        dtype: DType::F64,
        ..OpenOptions::default()
    };
    let package = Package::open(&out, &options).unwrap();
    assert_eq!(scores(package.single_model().unwrap(), &data), before);
}
