//! A whole training step of small decoders, and the forward pass of a larger one, composed from
//! the kernels. `scripts` that time the same work elsewhere should use the same sizes.

#![allow(clippy::expect_used)] // A bench that cannot run should stop.

use criterion::{Criterion, criterion_group, criterion_main};
use lapidary_kernels::{
    Activation, AdamW, AdamWOptions, AttentionOptions, CrossEntropyOptions, DType, Device, Result,
    Tensor, Var, activate, backward, cross_entropy, embedding, layer_norm, linear,
    merged_attention,
};
use std::hint::black_box;

#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Clone, Copy)]
struct Sizes {
    vocabulary: usize,
    width: usize,
    layers: usize,
    heads: usize,
    length: usize,
    batch: usize,
}

struct Affine {
    weight: Var,
    bias: Var,
}

impl Affine {
    fn new(input: usize, output: usize) -> Result<Self> {
        let deviation = 0.02;
        Ok(Self {
            weight: Var::randn_f64(0.0, deviation, (output, input), DType::F32, &Device::Cpu)?,
            bias: Var::zeros(output, DType::F32, &Device::Cpu)?,
        })
    }

    fn norm(width: usize) -> Result<Self> {
        Ok(Self {
            weight: Var::ones(width, DType::F32, &Device::Cpu)?,
            bias: Var::zeros(width, DType::F32, &Device::Cpu)?,
        })
    }

    fn linear(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, Some(&self.bias))
    }

    fn layer_norm(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, Some(&self.weight), Some(&self.bias), 1e-5)
    }
}

struct Block {
    norms: [Affine; 2],
    projections: [Affine; 4],
    feedforward: [Affine; 2],
}

struct Decoder {
    sizes: Sizes,
    tokens: Var,
    positions: Var,
    blocks: Vec<Block>,
    norm: Affine,
    head: Var,
}

impl Decoder {
    fn new(sizes: Sizes) -> Result<Self> {
        let width = sizes.width;
        let random =
            |rows, columns| Var::randn_f64(0.0, 0.02, (rows, columns), DType::F32, &Device::Cpu);
        let block = || -> Result<Block> {
            let square = || Affine::new(width, width);
            Ok(Block {
                norms: [Affine::norm(width)?, Affine::norm(width)?],
                projections: [square()?, square()?, square()?, square()?],
                feedforward: [
                    Affine::new(width, 4 * width)?,
                    Affine::new(4 * width, width)?,
                ],
            })
        };
        Ok(Self {
            sizes,
            tokens: random(sizes.vocabulary, width)?,
            positions: random(sizes.length, width)?,
            blocks: (0..sizes.layers).map(|_| block()).collect::<Result<_>>()?,
            norm: Affine::norm(width)?,
            head: random(sizes.vocabulary, width)?,
        })
    }

    fn variables(&self) -> Vec<Var> {
        let mut all = vec![
            self.tokens.clone(),
            self.positions.clone(),
            self.head.clone(),
        ];
        let mut add = |affine: &Affine| all.extend([affine.weight.clone(), affine.bias.clone()]);
        add(&self.norm);
        for block in &self.blocks {
            block.norms.iter().for_each(&mut add);
            block.projections.iter().for_each(&mut add);
            block.feedforward.iter().for_each(&mut add);
        }
        all
    }

    fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let heads = self.sizes.heads;
        let options = AttentionOptions {
            causal: true,
            ..AttentionOptions::new(self.sizes.width / heads)
        };
        let mut x = embedding(&self.tokens, ids)?.broadcast_add(&self.positions)?;
        for block in &self.blocks {
            let [q, k, v, out] = &block.projections;
            let h = block.norms[0].layer_norm(&x)?;
            let (q, k, v) = (q.linear(&h)?, k.linear(&h)?, v.linear(&h)?);
            let mixed = merged_attention(&q, &k, &v, heads, heads, &options)?;
            x = (x + out.linear(&mixed)?)?;
            let [up, down] = &block.feedforward;
            let h = up.linear(&block.norms[1].layer_norm(&x)?)?;
            x = (x + down.linear(&activate(&h, Activation::Gelu)?)?)?;
        }
        linear(&self.norm.layer_norm(&x)?, &self.head, None)
    }
}

fn ids(sizes: Sizes) -> Result<Tensor> {
    let count = sizes.batch * sizes.length;
    let ids: Vec<u32> = (0..count)
        .map(|i| (i * i % sizes.vocabulary) as u32)
        .collect();
    Ok(Tensor::from_vec(
        ids,
        (sizes.batch, sizes.length),
        &Device::Cpu,
    )?)
}

fn step(decoder: &Decoder, optimiser: &mut AdamW, ids: &Tensor) -> Result<f32> {
    let logits = decoder.logits(ids)?.flatten(0, 1)?;
    let targets = ids.flatten_all()?;
    let loss = cross_entropy(&logits, &targets, &CrossEntropyOptions::default())?;
    optimiser.step(&backward(&loss)?, 1e-3, 1.0)?;
    Ok(loss.to_scalar::<f32>()?)
}

fn training(c: &mut Criterion) {
    let large = Sizes {
        vocabulary: 512,
        width: 256,
        layers: 4,
        heads: 4,
        length: 256,
        batch: 8,
    };
    let small = Sizes {
        width: 64,
        layers: 2,
        length: 64,
        ..large
    };
    let mut group = c.benchmark_group("training step");
    group.sample_size(10);
    for (name, sizes) in [("width 256", large), ("width 64", small)] {
        let run = || -> Result<_> {
            let decoder = Decoder::new(sizes)?;
            let optimiser = AdamW::new(decoder.variables(), AdamWOptions::default())?;
            Ok((decoder, optimiser, ids(sizes)?))
        };
        let (decoder, mut optimiser, ids) = run().expect("a decoder");
        group.bench_function(name, |b| {
            b.iter(|| black_box(step(&decoder, &mut optimiser, &ids).expect("a step")));
        });
    }
    group.finish();
}

fn inference(c: &mut Criterion) {
    let sizes = Sizes {
        vocabulary: 512,
        width: 768,
        layers: 12,
        heads: 12,
        length: 256,
        batch: 1,
    };
    let decoder = Decoder::new(sizes).expect("a decoder");
    let ids = ids(sizes).expect("ids");
    let mut group = c.benchmark_group("forward");
    group.sample_size(10);
    group.bench_function("12 layers, width 768", |b| {
        b.iter(|| black_box(decoder.logits(&ids).expect("logits")));
    });
    group.finish();
}

criterion_group!(benches, training, inference);
criterion_main!(benches);
