//! Rounded activations, and weights that stay numbers where these are outliers, through whole models.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{DECODER, GATED, altered, close, model, scores, values, windows};
use lapidary_compress::quality::{
    Window, agreement, agreement_rounded, perplexity, perplexity_rounded,
};
use lapidary_compress::{
    ActivationRange, ActivationSettings, Budget, Calibration, CalibrationData, CalibrationOptions,
    Compressed, Content, Method, QuantiseSettings, RoundedActivations, Selection, Settings, Size,
    Task, export_dense, output_errors,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package};

const QUERY: &str = "blocks.0.attention.query";
/// Inputs of the first attention that [`with_outliers`] makes large.
const LARGE: [usize; 2] = [5, 40];

/// As [`GATED`], with rows of 64.
fn wide(seed: u64) -> Model {
    let spec = GATED
        .replace("width = 16", "width = 64")
        .replace("hidden = 24", "hidden = 96");
    model(&spec, seed)
}

/// A model of which two inputs of the first attention are sixty times as large as the others.
fn with_outliers(seed: u64) -> Model {
    altered(&wide(seed), "blocks.0.attention_norm.weight", |gain| {
        let mut factors = vec![1.0f64; 64];
        for column in LARGE {
            factors[column] = 60.0;
        }
        let factors = Tensor::from_vec(factors, 64, gain.device()).unwrap();
        (gain * factors).unwrap()
    })
}

fn settings(outliers: f64, range: Option<ActivationRange>, bits: u32) -> Settings {
    Settings {
        selection: Selection::layers([QUERY]),
        quantise: QuantiseSettings {
            outliers,
            ..QuantiseSettings::default()
        },
        activations: ActivationSettings {
            range,
            bits,
            ..ActivationSettings::default()
        },
        ..Settings::default()
    }
}

fn data() -> CalibrationData {
    windows(12, 7)
}

fn rounded(model: &Model, name: &str, settings: &Settings) -> Compressed {
    let method = Method::find(name).unwrap();
    let requirements = method.requirements(model, settings).unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, &data(), &requirements, options).unwrap();
    let task = Task {
        calibration: Some(&calibration),
        settings: Some(settings),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    method.apply(&task, &plan).unwrap()
}

fn simulated(model: &Model, settings: &Settings) -> RoundedActivations {
    let requirements = RoundedActivations::requirements(model, settings).unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, &data(), &requirements, options).unwrap();
    let found = RoundedActivations::new(model, settings, Some(&calibration));
    found.unwrap().unwrap()
}

#[test]
fn columns_of_outliers_are_exact_and_the_model_runs_as_written_out() {
    let model = with_outliers(3);
    let name = format!("{QUERY}.weight");
    for method in ["int8", "int4", "awq", "gptq"] {
        for minima in [false, true] {
            let mut told = settings(20.0, None, 8);
            told.quantise.minima = minima;
            let compressed = rounded(&model, method, &told).model;
            assert_eq!(compressed.spec().quantised[&name].columns, LARGE.len());
            assert_eq!(compressed.parameter_count(), model.parameter_count());
            let dense = export_dense(&compressed).unwrap();
            let [before, after] = [&model, &dense].map(|model| values(&model.parameters()[&name]));
            for column in LARGE {
                let of = |weights: &[f64]| -> Vec<f64> {
                    weights.iter().skip(column).step_by(64).copied().collect()
                };
                close(&of(&after), &of(&before), 1e-6);
            }
            let data = windows(4, 1);
            close(&scores(&compressed, &data), &scores(&dense, &data), 1e-10);
        }
    }
}

#[test]
fn weights_of_outliers_that_stay_lose_less() {
    let model = with_outliers(3);
    let error = |method: &str, outliers: f64| {
        let compressed = rounded(&model, method, &settings(outliers, None, 8)).model;
        output_errors(&model, &compressed, &data(), 4).unwrap()[QUERY]
    };
    for (method, share) in [("int8", 0.5), ("int4", 0.5), ("awq", 1.0), ("gptq", 1.0)] {
        let (kept, all) = (error(method, 20.0), error(method, 0.0));
        assert!(kept < share * all, "{method}: {kept} of {all}");
    }
    // No input is that large.
    let none = rounded(&model, "int8", &settings(1e6, None, 8)).model;
    assert_eq!(none.spec().quantised[&format!("{QUERY}.weight")].columns, 0);
}

#[test]
fn columns_are_saved_in_as_many_bytes_as_it_says_and_load_with_equal_scores() {
    let directory = tempfile::tempdir().unwrap();
    let whole = with_outliers(8);
    let mut parameters = whole.parameters().clone();
    for tensor in parameters.values_mut() {
        *tensor = tensor.to_dtype(DType::F32).unwrap();
    }
    let single = Model::new(whole.spec().clone(), &mut parameters).unwrap();
    let compressed = rounded(&single, "int4", &settings(20.0, None, 8)).model;
    let (size, data) = (Size::of(&compressed), windows(4, 3));
    let before = scores(&compressed, &data);
    let out = directory.path().join("out");
    Package::new(compressed, None).save(&out, None).unwrap();
    let package = Package::open(&out, &OpenOptions::default()).unwrap();
    let loaded = package.single_model().unwrap();
    assert_eq!(scores(loaded, &data), before);
    assert_eq!(Size::of(loaded), size);
    let file = std::fs::read(out.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    assert_eq!(file.len() - 8 - header, size.bytes);
}

#[test]
fn fewer_bits_of_activations_say_less_of_the_same() {
    let model = wide(4);
    for range in [ActivationRange::PerToken, ActivationRange::PerTensor] {
        let divergence = |bits| {
            let told = Settings {
                selection: Selection::default(),
                ..settings(0.0, Some(range), bits)
            };
            let by = simulated(&model, &told);
            assert_eq!((by.range(), by.bits()), (range, bits));
            // Attention, its output, and the two sites of a feed-forward part, in two blocks.
            assert_eq!(by.counts(), [8, 2 * (64 + 64 + 64 + 96), 0]);
            agreement_rounded(&model, &model, &data(), 4, &by)
                .unwrap()
                .divergence
        };
        let [fine, usual, coarse] = [16, 8, 3].map(divergence);
        assert!(
            fine < usual && usual < coarse,
            "{range}: {fine} {usual} {coarse}"
        );
        assert!(fine < 1e-4, "{range}: {fine}");
    }
}

/// With integers of 16 bits what is left is what parabolas cost in the place of an exponential and an error
/// function, and roots of integers; with coarser ones more.
#[test]
fn functions_of_integers_are_near_those_of_numbers() {
    let spec = toml::from_str(DECODER).unwrap();
    let model = Model::initialised(spec, 5, DType::F64, &Device::Cpu).unwrap();
    let divergence = |functions: bool, bits: u32| {
        let mut told = Settings {
            selection: Selection::default(),
            ..settings(0.0, Some(ActivationRange::PerToken), bits)
        };
        told.activations.functions = functions;
        let by = simulated(&model, &told);
        assert_eq!(by.has_integer_functions(), functions);
        agreement_rounded(&model, &model, &data(), 4, &by)
            .unwrap()
            .divergence
    };
    let [numbers, integers, coarse] =
        [(false, 16), (true, 16), (true, 4)].map(|(functions, bits)| divergence(functions, bits));
    assert!(
        numbers < integers && integers < coarse,
        "{numbers} {integers} {coarse}"
    );
    assert!(integers < 0.01, "{integers}");
}

#[test]
fn outliers_that_are_left_make_finer_steps_for_the_others() {
    let model = with_outliers(3);
    for range in [ActivationRange::PerToken, ActivationRange::PerTensor] {
        let divergence = |outliers| {
            let by = simulated(&model, &settings(outliers, Some(range), 8));
            let kept = if outliers > 0.0 { LARGE.len() } else { 0 };
            assert_eq!(by.counts(), [1, 64, kept]);
            agreement_rounded(&model, &model, &data(), 4, &by)
                .unwrap()
                .divergence
        };
        let (left, all) = (divergence(20.0), divergence(0.0));
        assert!(left < 0.5 * all, "{range}: {left} of {all}");
    }
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let model = wide(5);
    let mut alone = settings(0.0, None, 8);
    alone.activations.functions = true;
    let wide_integers = settings(0.0, Some(ActivationRange::PerToken), 17);
    for (told, of) in [(alone, "functions"), (wide_integers, "bits")] {
        let error = told.activations.check().unwrap_err().to_string();
        assert!(error.contains(of), "{error}");
        assert!(RoundedActivations::requirements(&model, &told).is_err());
        assert!(RoundedActivations::new(&model, &told, None).is_err());
    }
}

#[test]
fn models_that_round_nothing_are_measured_as_before() {
    let model = wide(5);
    let told = settings(0.0, None, 8);
    assert!(
        RoundedActivations::requirements(&model, &told)
            .unwrap()
            .is_empty()
    );
    assert!(
        RoundedActivations::new(&model, &told, None)
            .unwrap()
            .is_none()
    );
    // 16 bits are next to nothing, for a perplexity as for predictions.
    let told = settings(0.0, Some(ActivationRange::PerToken), 16);
    assert!(
        RoundedActivations::requirements(&model, &told)
            .unwrap()
            .is_empty()
    );
    let by = RoundedActivations::new(&model, &told, None)
        .unwrap()
        .unwrap();
    let data = data();
    let windows: Vec<Window> = data
        .examples()
        .iter()
        .filter_map(|example| match &example.content {
            Content::Tokens { ids, .. } => Some(Window {
                tokens: ids.clone(),
                context: 1,
            }),
            Content::Pixels(_) => None,
        })
        .collect();
    let whole = perplexity(&model, &windows, 4).unwrap();
    let near = perplexity_rounded(&model, &windows, 4, &by).unwrap();
    assert_eq!((whole.tokens, whole.windows), (near.tokens, near.windows));
    assert_ne!(whole.value, near.value);
    close(&[near.value], &[whole.value], 1e-3);
    let same = agreement(&model, &model, &data, 4).unwrap();
    assert!(same.divergence.abs() < 1e-12);
}

#[test]
fn steps_of_sites_need_the_models_own_calibration() {
    let (model, other) = (wide(5), wide(6));
    let told = settings(0.0, Some(ActivationRange::PerTensor), 8);
    let error = RoundedActivations::new(&model, &told, None).unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
    let requirements = RoundedActivations::requirements(&other, &told).unwrap();
    let options = CalibrationOptions::default();
    let stale = Calibration::collect(&other, &data(), &requirements, options).unwrap();
    let error = RoundedActivations::new(&model, &told, Some(&stale)).unwrap_err();
    assert!(error.to_string().contains("calibrate it anew"), "{error}");
    for (outliers, bits, words) in [(0.0, 1, "bits"), (0.0, 17, "bits"), (-1.0, 8, "outliers")] {
        let told = settings(outliers, Some(ActivationRange::PerToken), bits);
        let error = RoundedActivations::new(&model, &told, None).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!("per-row".parse::<ActivationRange>().is_err());
    for range in [ActivationRange::PerToken, ActivationRange::PerTensor] {
        assert_eq!(range.to_string().parse::<ActivationRange>().unwrap(), range);
    }
}
