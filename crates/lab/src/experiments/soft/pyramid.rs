//! A small pyramid of two stages for images of one channel: patches, a block whose attention is asked
//! about, neighbours joined, a block with softmax, the mean.
//!
//! As SOFT's backbone in small: norms behind the parts of the first stage, softmax in the last, positions that are
//! resized to the grid at hand. It has two stages instead of four, patches instead of three convolutions with
//! batch norm, and no class token.

use super::super::number;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_explain::faithfulness::masking::most_likely;
use lapidary_kernels::{
    AdamW, AdamWOptions, CrossEntropyOptions, DType, Device, Parameter, Tensor, Var, backward,
    cross_entropy, layer_norm, linear,
};
use lapidary_model::Initialiser;
use lapidary_parts::Context;
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};
use lapidary_train::generator;
use rand::RngExt;
use std::collections::BTreeMap;

/// Height and width of a patch, and of what is joined between the stages.
const PATCH: usize = 2;
/// Features of the stages.
const WIDTHS: [usize; 2] = [32, 64];
/// Heads of the stages.
pub const HEADS: [usize; 2] = [2, 4];
const CLASSES: usize = 10;

/// Square images of one channel, one after the other, with their classes.
#[derive(Clone, Debug)]
pub struct Images {
    /// Height and width.
    pub side: usize,
    /// `[image, side · side]`.
    pub pixels: Vec<Vec<f32>>,
    /// The class of each.
    pub labels: Vec<u32>,
}

impl Images {
    /// The same, each pixel a square of `times` by `times`.
    pub fn enlarged(&self, times: usize) -> Self {
        let side = self.side * times;
        let enlarge = |image: &Vec<f32>| {
            let pixel = |at: usize| {
                let (row, column) = (at / side / times, at % side / times);
                image.get(row * self.side + column).copied()
            };
            (0..side * side).filter_map(pixel).collect()
        };
        Self {
            side,
            pixels: self.pixels.iter().map(enlarge).collect(),
            labels: self.labels.clone(),
        }
    }

    /// Patches `[image, row · column, PATCH · PATCH]` and classes of some images.
    fn batch(&self, chosen: &[usize]) -> Result<(Tensor, Vec<u32>)> {
        let grid = self.side / PATCH;
        let (mut patches, mut labels) = (Vec::new(), Vec::new());
        for &image in chosen {
            let (Some(pixels), Some(label)) = (self.pixels.get(image), self.labels.get(image))
            else {
                continue;
            };
            labels.push(*label);
            for patch in 0..grid * grid {
                for place in 0..PATCH * PATCH {
                    let row = patch / grid * PATCH + place / PATCH;
                    let column = patch % grid * PATCH + place % PATCH;
                    patches.push(pixels.get(row * self.side + column).copied().unwrap_or(0.0));
                }
            }
        }
        let shape = (labels.len(), grid * grid, PATCH * PATCH);
        Ok((
            engine(Tensor::from_vec(patches, shape, &Device::Cpu))?,
            labels,
        ))
    }
}

/// Initial values that are kept as variables.
struct Variables {
    source: Initialiser,
    all: BTreeMap<String, Var>,
}

impl ParameterSource for Variables {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let value = self.source.parameter(name, shape, init)?;
        let variable = Var::from_tensor(&value).map_err(lapidary_kernels::Error::from)?;
        let tensor = variable.as_tensor().clone();
        self.all.insert(name.to_owned(), variable);
        Ok(tensor)
    }
}

/// The pyramid.
#[derive(Debug)]
pub struct Pyramid {
    /// Rows and columns of the grid of patches that it was built for.
    grid: usize,
    /// Weight and bias of the maps into each stage.
    embed: [[Tensor; 2]; 2],
    /// `[row · column, width]` of each stage.
    positions: [Tensor; 2],
    blocks: [Block; 2],
    norm: [Tensor; 2],
    head: [Tensor; 2],
    variables: BTreeMap<String, Var>,
}

fn block(wiring: Wiring, attention: MultiHeadSpec, width: usize) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        wiring,
        norm: NormSpec::default(),
        attention: MixerSpec::MultiHead(attention),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 4 * width,
            activation: ActivationSpec::GeluTanh,
            bias: true,
        })),
        dropout: 0.0,
    }
}

/// The blocks of the stages.
fn stages(attention: &MultiHeadSpec) -> [BlockSpec; 2] {
    let ([first, second], [_, heads]) = (WIDTHS, HEADS);
    [
        block(Wiring::PostNorm, attention.clone(), first),
        block(Wiring::PreNorm, MultiHeadSpec::new(heads), second),
    ]
}

/// Square neighbours of a grid `[image, row · column, width]` as one row each.
fn joined(x: &Tensor, grid: usize) -> lapidary_kernels::Result<Tensor> {
    let (batch, _, width) = x.dims3()?;
    let half = grid / PATCH;
    let x = x.reshape(&[batch, half, PATCH, half, PATCH, width][..])?;
    let x = x.permute(vec![0, 1, 3, 2, 4, 5])?.contiguous()?;
    Ok(x.reshape((batch, half * half, PATCH * PATCH * width))?)
}

/// Positions of a grid on another one, bilinearly.
fn resized(positions: &Tensor, from: usize, to: usize) -> lapidary_kernels::Result<Tensor> {
    if from == to {
        return Ok(positions.clone());
    }
    let width = positions.dim(1)?;
    let image = positions
        .t()?
        .contiguous()?
        .reshape((1, width, from, from))?;
    let image = image.upsample_bilinear2d(to, to, false)?;
    Ok(image.reshape((width, to * to))?.t()?.contiguous()?)
}

impl Pyramid {
    /// For images of a side of `side`, with `attention` in the first stage.
    pub fn new(side: usize, attention: &MultiHeadSpec, seed: u64) -> Result<Self> {
        let grid = side / PATCH;
        let [first, second] = WIDTHS;
        let mut source = Variables {
            source: Initialiser::new(seed, DType::F32, Device::Cpu),
            all: BTreeMap::new(),
        };
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let mut parameters = Parameters::new(&mut source, &ranks, &mut linears);
        let mut map = |name: &str, input: usize, output: usize| -> Result<[Tensor; 2]> {
            let mut here = parameters.at(name);
            let start = Init::Normal {
                deviation: 1.0 / (input as f64).sqrt(),
            };
            Ok([
                here.tensor("weight", &[output, input], start)?,
                here.tensor("bias", &[output], Init::Zeros)?,
            ])
        };
        let pixels = PATCH * PATCH;
        let embed = [
            map("stem", pixels, first)?,
            map("join", pixels * first, second)?,
        ];
        let head = map("head", second, CLASSES)?;
        let small = Init::Normal { deviation: 0.02 };
        let half = grid / PATCH;
        let [one, two] = stages(attention);
        one.validate(first, "stage.0")?;
        let positions = [
            parameters.tensor("positions.0", &[grid * grid, first], small)?,
            parameters.tensor("positions.1", &[half * half, second], small)?,
        ];
        let norm = [
            parameters.tensor("norm.weight", &[second], Init::Ones)?,
            parameters.tensor("norm.bias", &[second], Init::Zeros)?,
        ];
        let blocks = [
            Block::new(&one, first, parameters.at("stage.0"))?,
            Block::new(&two, second, parameters.at("stage.1"))?,
        ];
        Ok(Self {
            grid,
            embed,
            positions,
            blocks,
            norm,
            head,
            variables: source.all,
        })
    }

    /// The same weights behind another attention in the first stage, that has as many.
    pub fn on_another_grid(&self, attention: &MultiHeadSpec) -> Result<Self> {
        let [first, second] = WIDTHS;
        let mut known: BTreeMap<String, Tensor> = self
            .variables
            .iter()
            .map(|(name, variable)| (name.clone(), variable.as_tensor().detach()))
            .collect();
        let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
        let mut parameters = Parameters::new(&mut known, &ranks, &mut linears);
        let [one, two] = stages(attention);
        Ok(Self {
            grid: self.grid,
            embed: self.embed.clone(),
            positions: self.positions.clone(),
            blocks: [
                Block::new(&one, first, parameters.at("stage.0"))?,
                Block::new(&two, second, parameters.at("stage.1"))?,
            ],
            norm: self.norm.clone(),
            head: self.head.clone(),
            variables: BTreeMap::new(),
        })
    }

    /// Logits `[image, class]` of patches.
    fn forward(
        &self,
        patches: &Tensor,
        trace: &Trace,
        meter: Option<&std::sync::Arc<Meter>>,
    ) -> Result<Tensor> {
        let tokens = engine(patches.dim(1))?;
        let mut grid = tokens.isqrt();
        let mut built = self.grid;
        let mut x = patches.clone();
        let cx = Context::new(trace);
        let stages = self.embed.iter().zip(&self.positions).zip(&self.blocks);
        for (stage, (([weight, bias], positions), block)) in stages.enumerate() {
            if stage > 0 {
                x = joined(&x, grid)?;
                (grid, built) = (grid / PATCH, built / PATCH);
            }
            x = linear(&x, weight, Some(bias))?;
            x = engine(x.broadcast_add(&resized(positions, built, grid)?))?;
            let signal = match meter {
                None => Signal::from(x),
                Some(meter) => Signal::from(x).into_metered(meter.clone()),
            };
            x = block.forward(signal, &cx, None)?.into_value();
        }
        let [scale, shift] = &self.norm;
        let x = layer_norm(&engine(x.mean(1))?, Some(scale), Some(shift), 1e-5)?;
        let [weight, bias] = &self.head;
        Ok(linear(&x, weight, Some(bias))?)
    }

    /// Trains on random batches of 32; the rate falls to zero along a line.
    pub fn train(&self, images: &Images, steps: u64, rate: f64, seed: u64) -> Result<()> {
        let parameters = self.variables.values().map(|variable| Parameter {
            variable: variable.clone(),
            weight_decay: Some(if variable.rank() < 2 { 0.0 } else { 0.01 }),
            rate_factor: 1.0,
        });
        let mut optimiser = AdamW::new(parameters.collect(), AdamWOptions::default())?;
        let mut random = generator(seed);
        let trace = Trace::new();
        for step in 0..steps {
            let chosen: Vec<usize> = (0..32)
                .map(|_| random.random_range(0..images.labels.len().max(1)))
                .collect();
            let (patches, labels) = images.batch(&chosen)?;
            let logits = self.forward(&patches, &trace, None)?;
            let count = labels.len();
            let labels = engine(Tensor::from_vec(labels, count, &Device::Cpu))?;
            let loss = cross_entropy(&logits, &labels, &CrossEntropyOptions::default())?;
            if !number(&loss)?.is_finite() {
                return Err(Error::Experiment(format!(
                    "the loss is no number at step {step}"
                )));
            }
            let gradients = engine(backward(&loss))?;
            // Gentle for a tenth of the steps, as the weights are not yet anywhere.
            let warm = ((step + 1) as f64 / (steps as f64 / 10.0).max(1.0)).min(1.0);
            let rate = rate * warm * (1.0 - step as f64 / steps as f64);
            optimiser.step(&gradients, rate, 1.0)?;
        }
        Ok(())
    }

    /// Percent of images that it names, and the mean length of what the first stage's attention mixes.
    pub fn measure(&self, images: &Images) -> Result<[f64; 2]> {
        let (mut right, mut lengths) = (0usize, Vec::new());
        let all: Vec<usize> = (0..images.labels.len()).collect();
        for chosen in all.chunks(32) {
            let (patches, labels) = images.batch(chosen)?;
            let trace = Trace::new().capture("stage.0.attention.mixed")?;
            let logits = self.forward(&patches.detach(), &trace, None)?;
            let said = super::super::numbers(&logits)?;
            let named = said.chunks(CLASSES).zip(labels);
            right += named
                .filter(|(said, label)| most_likely(said) == *label as usize)
                .count();
            let mixed = trace.signal("stage.0.attention.mixed")?;
            let squares = engine(engine(mixed.value().detach().sqr())?.sum(2))?;
            lengths.push(number(&engine(engine(squares.sqrt())?.mean_all())?)?);
        }
        let share = right as f64 / images.labels.len().max(1) as f64;
        Ok([100.0 * share, super::super::mean(lengths)])
    }

    /// Most bytes that a pass over one image holds.
    pub fn peak(&self, images: &Images) -> Result<u64> {
        let meter = Meter::new();
        let (patches, _) = images.batch(&[0])?;
        self.forward(&patches, &Trace::new(), Some(&meter))?;
        Ok(meter.peak_live_bytes())
    }
}
