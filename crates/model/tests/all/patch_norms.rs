//! Patches that pass a norm before their map and one behind it, and tables that begin as the spec says.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput};
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_signal::Trace;

/// CRATE for images of `image` pixels a side.
fn spec(width: usize, heads: usize, blocks: usize, image: usize, patch: usize) -> ModelSpec {
    toml::from_str(&format!(
        "width = {width}
        final_norm = {{ kind = 'layer' }}
        head = {{ kind = 'pooled', labels = 1000 }}
        [input]
        kind = 'patches'
        image = [{image}, {image}]
        patch = {patch}
        around = {{}}
        deviation = 1.0
        [[blocks]]
        repeat = {blocks}
        wiring = 'replacing'
        attention = {{ kind = 'multi-head', heads = {heads}, sharing = 'all', bias = false, output_bias = true }}
        feedforward = {{ kind = 'sparse-code' }}"
    ))
    .unwrap()
}

#[test]
fn models_have_as_many_parameters_as_are_published() {
    for (width, heads, blocks, millions) in [
        (384, 6, 12, 6.09),
        (576, 12, 12, 13.12),
        (768, 12, 12, 22.80),
        (1024, 16, 24, 77.64),
    ] {
        let own = spec(width, heads, blocks, 224, 16)
            .parameter_count()
            .unwrap();
        let found = own as f64 / 1e6;
        assert!((found - millions).abs() < 0.005, "{width}: {found}");
    }
}

/// Normal numbers where others are all zeros or all ones, so that no scale and no shift goes unseen.
struct Scattered(Initialiser);

impl ParameterSource for Scattered {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match init {
            Init::Zeros | Init::Ones => Init::Uniform {
                low: 0.2,
                high: 1.4,
            },
            other => other,
        };
        self.0.parameter(name, shape, init)
    }
}

type Rows = Vec<Vec<f64>>;

fn normed(rows: &[Vec<f64>], weight: &[f64], bias: &[f64]) -> Rows {
    let each = rows.iter().map(|row| {
        let count = row.len() as f64;
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        let scaled = row.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt());
        let both = weight.iter().zip(bias);
        scaled.zip(both).map(|(x, (w, b))| x * w + b).collect()
    });
    each.collect()
}

/// `N₂(W N₁(p) + b)`, a class token before, and positions.
#[test]
fn patches_pass_both_norms() {
    let mut source = Scattered(Initialiser::new(3, DType::F64, Device::Cpu));
    let model = Model::new(spec(8, 2, 1, 6, 2), &mut source).unwrap();
    let of = |name: &str| -> Vec<f64> {
        let parameter = &model.parameters()[&format!("embeddings.{name}")];
        parameter.flatten_all().unwrap().to_vec1().unwrap()
    };
    let pixels: Vec<f64> = (0..108)
        .map(|at| (1.0 + f64::from(at) * 0.7).sin())
        .collect();
    let image = Tensor::from_vec(pixels, (1, 3, 6, 6), &Device::Cpu).unwrap();
    let InputSpec::Patches(patches) = &model.spec().input else {
        unreachable!("the spec reads patches")
    };
    let cut: Vec<Rows> = patches.cut(&image).unwrap().to_vec3().unwrap();
    let rows = normed(&cut[0], &of("pixel_norm.weight"), &of("pixel_norm.bias"));
    let (weight, bias) = (of("patches.weight"), of("patches.bias"));
    let mapped = rows.iter().map(|row| {
        let outputs = weight.chunks(12).zip(&bias);
        let sum = |w: &[f64]| w.iter().zip(row).map(|(w, x)| w * x).sum::<f64>();
        outputs.map(|(w, b)| sum(w) + b).collect()
    });
    let mapped: Rows = mapped.collect();
    let mut expected = vec![of("class_tokens")];
    expected.extend(normed(
        &mapped,
        &of("patch_norm.weight"),
        &of("patch_norm.bias"),
    ));

    let trace = Trace::new()
        .capture("embeddings")
        .unwrap()
        .capture("embeddings.normed_pixels")
        .unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::Pixels(image), pass).unwrap();
    let at = |site: &str| -> Vec<Rows> { trace.signal(site).unwrap().value().to_vec3().unwrap() };
    let positions = of("positions.weight");
    let found = at("embeddings");
    assert_eq!((found[0].len(), expected.len()), (10, 10));
    for ((found, expected), positions) in found[0].iter().zip(&expected).zip(positions.chunks(8)) {
        for ((found, expected), position) in found.iter().zip(expected).zip(positions) {
            assert!((found - expected - position).abs() < 1e-12);
        }
    }
    // What the map reads has a site of its own: it is what statistics of the layer are of.
    for (found, expected) in at("embeddings.normed_pixels")[0].iter().zip(&rows) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12);
        }
    }
    let map = model
        .linears()
        .iter()
        .find(|l| l.path == "embeddings.patches");
    assert_eq!(map.unwrap().input_site, "embeddings.normed_pixels");
}

#[test]
fn tables_begin_with_the_deviation_that_is_asked_for() {
    let deviation = |spec: ModelSpec, name: &str| -> f64 {
        let model = Model::initialised(spec, 5, DType::F64, &Device::Cpu).unwrap();
        let table = &model.parameters()[name];
        let squares = table.sqr().unwrap().mean_all().unwrap();
        squares.to_scalar::<f64>().unwrap().sqrt()
    };
    let of = |wide: f64| {
        let mut spec = spec(64, 2, 1, 32, 4);
        if let InputSpec::Patches(patches) = &mut spec.input {
            patches.deviation = wide;
            patches.mask_token = true;
        }
        spec
    };
    for wide in [1.0, PatchInput::DEVIATION] {
        let positions = deviation(of(wide), "embeddings.positions.weight");
        assert!((positions / wide - 1.0).abs() < 0.05, "{positions}");
        let class = deviation(of(wide), "embeddings.class_tokens");
        assert!((class / wide - 1.0).abs() < 0.3, "{class}");
        // What stands for hidden patches is small in either.
        let mask = deviation(of(wide), "embeddings.mask_token");
        assert!((mask / 0.02 - 1.0).abs() < 0.3, "{mask}");
    }
    let said = of(f64::NAN).validate().unwrap_err().to_string();
    assert!(said.starts_with("input.deviation is NaN"), "{said}");
}

/// A spec that says nothing of norms and deviations is written as before.
#[test]
fn what_is_usual_need_not_be_said() {
    let mut usual = spec(8, 2, 1, 6, 2);
    if let InputSpec::Patches(patches) = &mut usual.input {
        (patches.around, patches.deviation) = (None, PatchInput::DEVIATION);
    }
    let written = toml::to_string(&usual).unwrap();
    assert!(!written.contains("around") && !written.contains("deviation"));
    assert_eq!(toml::from_str::<ModelSpec>(&written).unwrap(), usual);
}

/// An image of another size has as many tokens as patches, and positions that are as near as patches lie; only where the
/// spec lets it.
#[test]
fn images_of_other_sizes_are_read_where_the_spec_lets_them() {
    let pixels = |height: usize, width: usize| {
        let count = 3 * height * width;
        let numbers = (0..count).map(|at| (at as f64 * 0.3).cos()).collect();
        let shape = (1, 3, height, width);
        Input::Pixels(Tensor::from_vec::<_, f64>(numbers, shape, &Device::Cpu).unwrap())
    };
    let mut wide = spec(8, 2, 1, 6, 2);
    let InputSpec::Patches(patches) = &mut wide.input else {
        unreachable!("the spec reads patches")
    };
    patches.resized = true;
    let strict = Model::initialised(spec(8, 2, 1, 6, 2), 3, DType::F64, &Device::Cpu).unwrap();
    let model = Model::initialised(wide, 3, DType::F64, &Device::Cpu).unwrap();
    let embedded = |model: &Model, height, width| -> Result<Rows, String> {
        let trace = Trace::new().capture("embeddings").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let output = model.forward(&pixels(height, width), pass);
        output.map_err(|error| error.to_string())?;
        let all: Vec<Rows> = trace
            .signal("embeddings")
            .unwrap()
            .value()
            .to_vec3()
            .unwrap();
        Ok(all[0].clone())
    };
    // Of its own size it is the same model.
    assert_eq!(embedded(&model, 6, 6), embedded(&strict, 6, 6));
    let found = embedded(&model, 2, 4).unwrap();
    assert_eq!(found.len(), 1 + 2);
    // The class token stands where it stood.
    assert_eq!(found[0], embedded(&model, 6, 6).unwrap()[0]);
    assert_eq!(
        embedded(&strict, 2, 4).unwrap_err(),
        "pixel_values shape is [1, 3, 2, 4], but must be [batch, 3, 6, 6]"
    );
    let said = embedded(&model, 2, 3).unwrap_err();
    assert!(said.ends_with("of whole patches of 2 by 2"), "{said}");
}
