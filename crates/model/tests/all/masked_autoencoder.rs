//! A model of patches that draws what it was not shown.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Output, Pass};
use lapidary_signal::Trace;

/// CRATE-MAE of so many blocks in each half.
fn spec(width: usize, heads: usize, blocks: usize, image: usize, patch: usize) -> ModelSpec {
    let attention = format!(
        "{{ kind = 'multi-head', heads = {heads}, sharing = 'all', bias = false, output_bias = true }}"
    );
    toml::from_str(&format!(
        "width = {width}
        final_norm = {{ kind = 'layer' }}
        head = {{ kind = 'pixels' }}
        [input]
        kind = 'patches'
        image = [{image}, {image}]
        patch = {patch}
        position = 'sine-cosine'
        mask_token = true
        [[blocks]]
        repeat = {blocks}
        wiring = 'replacing'
        attention = {attention}
        feedforward = {{ kind = 'sparse-code' }}
        [[blocks]]
        repeat = {blocks}
        wiring = 'reversed'
        attention = {attention}
        feedforward = {{ kind = 'linear', bias = false }}"
    ))
    .unwrap()
}

fn model() -> Model {
    Model::initialised(spec(8, 2, 1, 6, 2), 3, DType::F64, &Device::Cpu).unwrap()
}

/// Numbers that are not the same twice, `[1, 3, 6, 6]`.
fn image(from: f64) -> Tensor {
    let pixels = (0..108)
        .map(|at| (from + f64::from(at) * 0.7).sin())
        .collect();
    Tensor::from_vec::<_, f64>(pixels, (1, 3, 6, 6), &Device::Cpu).unwrap()
}

fn run(model: &Model, image: &Tensor, keep: Option<&Tensor>, trace: &Trace) -> Output {
    let pass = Pass {
        visible: keep,
        trace: Some(trace),
        ..Pass::default()
    };
    model.forward(&Input::Pixels(image.clone()), pass).unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn farthest(a: &Tensor, b: &Tensor) -> f64 {
    let pairs = values(a).into_iter().zip(values(b));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// What the authors' program counts, less a linear layer that it never calls, a norm before another and
/// two tables that are not learned.
#[test]
fn it_has_as_many_parameters_as_are_published() {
    for (width, published) in [(576, 25_405_824), (768, 44_638_464)] {
        let own = spec(width, 12, 12, 224, 16).parameter_count().unwrap();
        let unused = width * width + width;
        let rest = 2 * width + 2 * 197 * width;
        assert_eq!(own + (unused + rest) as u64, published);
    }
}

#[test]
fn hidden_patches_are_not_seen() {
    let model = model();
    let keep = Tensor::new(&[[1u8, 0, 0, 1, 0, 0, 0, 1, 0]], &Device::Cpu).unwrap();
    let silent = Trace::new();
    let (one, other) = (image(0.0), image(5.0));
    // The patches that are seen are those of the first image in both.
    let Ways { cut, join } = Ways::new(&model);
    let (a, b) = (cut(&one), cut(&other));
    let shown = keep.to_dtype(DType::F64).unwrap().unsqueeze(2).unwrap();
    let hidden = shown.affine(-1.0, 1.0).unwrap();
    let mixed = (a.broadcast_mul(&shown).unwrap() + b.broadcast_mul(&hidden).unwrap()).unwrap();
    let mixed = join(&mixed);
    assert!(farthest(&cut(&mixed), &a) > 0.1);
    let pixels = |image: &Tensor, keep: Option<&Tensor>| {
        run(&model, image, keep, &silent)
            .pixels
            .unwrap()
            .into_value()
    };
    assert_eq!(pixels(&one, Some(&keep)).dims(), [1, 9, 12]);
    assert_eq!(
        farthest(&pixels(&one, Some(&keep)), &pixels(&mixed, Some(&keep))),
        0.0
    );
    assert!(farthest(&pixels(&one, None), &pixels(&mixed, None)) > 1e-6);
    // Nothing hidden is the same as nothing said.
    let all = Tensor::ones((1, 9), DType::U8, &Device::Cpu).unwrap();
    assert!(farthest(&pixels(&one, None), &pixels(&one, Some(&all))) < 1e-12);
}

/// The two ways between images of three channels of 6 by 6 and their patches, written out.
struct Ways {
    cut: fn(&Tensor) -> Tensor,
    join: fn(&Tensor) -> Tensor,
}

impl Ways {
    fn new(model: &Model) -> Self {
        assert_eq!(model.spec().length(), 10);
        fn place(patch: usize, entry: usize) -> usize {
            let (channel, row, column) = (entry / 4, entry / 2 % 2, entry % 2);
            channel * 36 + (patch / 3 * 2 + row) * 6 + patch % 3 * 2 + column
        }
        Self {
            cut: |image| {
                let pixels = values(image);
                let each = (0..9).flat_map(|patch| (0..12).map(move |entry| place(patch, entry)));
                let cut = each.map(|at| pixels[at]).collect::<Vec<f64>>();
                Tensor::from_vec(cut, (1, 9, 12), &Device::Cpu).unwrap()
            },
            join: |patches| {
                let mut pixels = vec![0.0; 108];
                for (at, value) in values(patches).into_iter().enumerate() {
                    pixels[place(at / 12, at % 12)] = value;
                }
                Tensor::from_vec(pixels, (1, 3, 6, 6), &Device::Cpu).unwrap()
            },
        }
    }
}

#[test]
fn images_are_cut_as_a_convolution_reads_them() {
    let model = model();
    let ways = Ways::new(&model);
    let lapidary_model::InputSpec::Patches(patches) = &model.spec().input else {
        panic!("patches");
    };
    let image = image(1.0);
    let cut = patches.cut(&image).unwrap();
    assert_eq!(farthest(&cut, &(ways.cut)(&image)), 0.0);
    assert_eq!(farthest(&(ways.join)(&cut), &image), 0.0);
    assert!(patches.cut(&image.narrow(2, 0, 4).unwrap()).is_err());
}

/// Embeddings of hidden patches are the mask token and where they stand: columns in the first half of the
/// features, rows in the second.
#[test]
fn positions_are_waves_of_columns_and_rows() {
    let model = model();
    let trace = Trace::new().capture("embeddings").unwrap();
    let none = Tensor::zeros((1, 9), DType::U8, &Device::Cpu).unwrap();
    run(&model, &image(2.0), Some(&none), &trace);
    let found: Vec<Vec<Vec<f64>>> = trace
        .signal("embeddings")
        .unwrap()
        .value()
        .to_vec3()
        .unwrap();
    let of = |name: &str| values(&model.parameters()[name]);
    let class = of("embeddings.class_tokens");
    assert_eq!(found[0][0], class);
    let token = of("embeddings.mask_token");
    for (patch, row) in found[0][1..].iter().enumerate() {
        let wave = |place: usize, rate: f64| {
            let angle = place as f64 * rate;
            [angle.sin(), angle.cos()]
        };
        let (column, line) = (patch % 3, patch / 3);
        let [c0, c1] = [wave(column, 1.0), wave(column, 0.01)];
        let [r0, r1] = [wave(line, 1.0), wave(line, 0.01)];
        let expected = [c0[0], c1[0], c0[1], c1[1], r0[0], r1[0], r0[1], r1[1]];
        for ((found, token), wave) in row.iter().zip(&token).zip(expected) {
            assert!((found - token - wave).abs() < 1e-7, "{patch}: {row:?}");
        }
    }
    assert!(
        !model
            .parameters()
            .contains_key("embeddings.positions.weight")
    );
}

#[test]
fn what_cannot_be_is_refused() {
    let said = |change: &dyn Fn(&mut toml::Table)| {
        let spec = toml::to_string(&spec(8, 2, 1, 6, 2)).unwrap();
        let mut table: toml::Table = spec.parse().unwrap();
        change(&mut table);
        let spec: ModelSpec = table.try_into().unwrap();
        spec.validate().unwrap_err().to_string()
    };
    assert_eq!(
        said(&|table| {
            table["width"] = 6.into();
        }),
        "width is 6, but must be a multiple of 4 for sines and cosines of rows and columns"
    );
    let tokens = "{ kind = 'tokens', vocabulary = 4, length = 4 }";
    assert_eq!(
        said(&|table| {
            let tokens: toml::Table = format!("input = {tokens}").parse().unwrap();
            table.extend(tokens);
        }),
        "head.kind is \"pixels\", but must be another for a model that reads tokens"
    );
    let pass = |model: &Model, input: &Input, shape: (usize, usize)| {
        let keep = Tensor::ones(shape, DType::U8, &Device::Cpu).unwrap();
        let pass = Pass {
            visible: Some(&keep),
            ..Pass::default()
        };
        model.forward(input, pass).unwrap_err().to_string()
    };
    let image = Input::Pixels(image(0.0));
    assert_eq!(
        pass(&model(), &image, (1, 8)),
        "shape of visible patches is [1, 8], but must be [1, 9]"
    );
    let mut unmasked = spec(8, 2, 1, 6, 2);
    if let lapidary_model::InputSpec::Patches(patches) = &mut unmasked.input {
        patches.mask_token = false;
    }
    let unmasked = Model::initialised(unmasked, 3, DType::F64, &Device::Cpu).unwrap();
    assert_eq!(
        pass(&unmasked, &image, (1, 9)),
        "visible patches is \"given\", but must be absent for a model without input.mask_token"
    );
}
