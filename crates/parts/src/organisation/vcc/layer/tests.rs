//! The same as with differences that are computed, stored, joined and put back one after the other.

use super::*;
use crate::attention::{MixerSpec, MultiHeadSpec};
use crate::block::{BlockSpec, Wiring};
use crate::feedforward::{DenseSpec, FeedforwardSpec};
use crate::norm::NormSpec;
use crate::organisation::vcc::{Vcc, VccOutput};
use crate::organisation::{Organised, Read};
use crate::parameters::{Init, ParameterSource, Parameters};
use lapidary_kernels::Var;
use lapidary_kernels::check::difference;
use lapidary_signal::Trace;
use std::collections::BTreeMap;

const WIDTH: usize = 6;
const BATCH: usize = 2;

fn numbers(shape: &[usize], phase: f64, dtype: DType) -> Tensor {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|i| (i as f64 * 1.37 + phase * 0.61 + (i as f64 * 0.11).cos()).sin())
        .collect();
    let values = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    values.to_dtype(dtype).unwrap()
}

/// Variables of irregular numbers.
struct Drawn(DType, Vec<Var>);

impl ParameterSource for Drawn {
    fn parameter(&mut self, _: &str, shape: &[usize], _: Init) -> Result<Tensor> {
        let drawn = numbers(shape, 1.0 + self.1.len() as f64, self.0);
        let variable = tensor(Var::from_tensor(&drawn))?;
        self.1.push(variable.clone());
        Ok(variable.as_tensor().clone())
    }
}

fn blocks(count: usize, dtype: DType) -> (Vec<Arc<Block>>, Vec<Var>) {
    let spec = BlockSpec {
        repeat: 1,
        shared: false,
        wiring: Wiring::PreNorm,
        norm: NormSpec::default(),
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        attention: MixerSpec::MultiHead(MultiHeadSpec::new(2)),
        cross_attention: None,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 8,
            activation: Default::default(),
            bias: true,
        })),
        shortcuts: false,
        dropout: 0.0,
    };
    let mut source = Drawn(dtype, Vec::new());
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let mut parameters = Parameters::new(&mut source, &ranks, &mut linears);
    let made = (0..count)
        .map(|index| Arc::new(Block::new(&spec, WIDTH, parameters.at(index)).unwrap()))
        .collect();
    (made, source.1)
}

fn listed(rows: impl IntoIterator<Item = usize>) -> Tensor {
    let rows: Vec<u32> = rows.into_iter().map(|row| row as u32).collect();
    let count = rows.len();
    Tensor::from_vec(rows, count, &Device::Cpu).unwrap()
}

/// `(c, c − x)` of `x` `[blocks, size, width]`, over real tokens.
fn coarsened(x: &Tensor, real: &Tensor) -> (Tensor, Tensor) {
    let counts = real.sum_keepdim(1).unwrap().maximum(1.0).unwrap();
    let shares = real.broadcast_div(&counts).unwrap();
    let means = x.broadcast_mul(&shares).unwrap().sum(1).unwrap();
    let differences = means.unsqueeze(1).unwrap().broadcast_sub(x).unwrap();
    (means, differences)
}

/// `[batch, length, width]` and the VIPs, by differences.
fn by_differences(
    x: &Tensor,
    blocks: &[Arc<Block>],
    spec: &VccSpec,
    order: &Order,
    cx: &Context<'_>,
) -> [Tensor; 2] {
    let [batch, vips, count, size] = order.sizes();
    let (_, length, _) = x.dims3().unwrap();
    let dtype = x.dtype();
    let fixed = Fixed::new(order, dtype, x.device()).unwrap();
    let real: Vec<f64> = order.real().iter().map(|kept| f64::from(*kept)).collect();
    let real = Tensor::from_vec(real, (batch * count, size, 1), x.device()).unwrap();
    let real = real.to_dtype(dtype).unwrap();
    // Zeros behind the last token stand where there is none.
    let zeros = Tensor::zeros((1, WIDTH), dtype, x.device()).unwrap();
    let flat = Tensor::cat(&[&x.reshape(((), WIDTH)).unwrap(), &zeros], 0).unwrap();
    let of = order.block_rows().iter();
    let into = of.map(|row| row.map_or(batch * length, |row| row as usize));
    let tokens = flat.index_select(&listed(into), 0).unwrap();
    let tokens = tokens.reshape((batch * count, size, WIDTH)).unwrap();
    let own = order.vip_rows().iter().map(|row| *row as usize);
    let vip = flat.index_select(&listed(own), 0).unwrap();
    let mut vip = vip.reshape((batch, vips, WIDTH)).unwrap();
    let (mut means, mut differences) = coarsened(&tokens, &real);
    let fine_count = spec.fine.min(count);
    for block in blocks {
        let each = Signal::from(means.reshape((batch, count, WIDTH)).unwrap());
        let seen = (&Signal::from(vip.clone()), &fixed.shares);
        let chosen = match count - fine_count {
            0 => Chosen::all(&fixed.keep, dtype).unwrap(),
            _ => choose(block, spec, seen, (&each, &fixed.keep), cx).unwrap(),
        };
        let short = Short::new(&chosen.ranking, fine_count, order, &fixed).unwrap();
        let fine = listed(short.fine.iter().map(|(block, _)| *block));
        let old = means.index_select(&fine, 0).unwrap().unsqueeze(1).unwrap();
        let refined = old.broadcast_sub(&differences.index_select(&fine, 0).unwrap());
        let refined = refined.unwrap().reshape((batch, fine_count * size, WIDTH));
        let mut parts = vec![refined.unwrap()];
        let coarse = listed(short.coarse.iter().map(|(block, _)| *block));
        if count > fine_count {
            let shape = (batch, count - fine_count, WIDTH);
            let coarse = means.index_select(&coarse, 0).unwrap();
            parts.push(coarse.reshape(shape).unwrap());
        }
        parts.push(vip.clone());
        let u = Tensor::cat(&parts, 1).unwrap();
        let weights = short.weights(&chosen.importance, x.device()).unwrap();
        let logarithms = short.log_counts(batch, dtype, x.device()).unwrap();
        let bias = (weights.log().unwrap() + logarithms).unwrap();
        let shape = (batch, short.length);
        let keep = Tensor::from_slice(&short.keep, shape, x.device()).unwrap();
        let places = Tensor::from_slice(&short.positions, shape, x.device()).unwrap();
        let inside = Context {
            key_padding: Some(&keep),
            key_bias: Some(&bias),
            places: Some(&places),
            ..*cx
        };
        let y = block.forward(Signal::from(u.clone()), &inside, None);
        let y = y.unwrap().into_value();
        let change = (&y - &u).unwrap().detach();
        let gain = (weights - 1.0).unwrap().unsqueeze(2).unwrap();
        let y = (y + change.broadcast_mul(&gain).unwrap()).unwrap();
        let written = y.narrow(1, 0, fine_count * size).unwrap();
        let written = written.reshape((batch * fine_count, size, WIDTH)).unwrap();
        let (fresh, apart) = coarsened(&written, &real.index_select(&fine, 0).unwrap());
        // The others' stay, and their means move.
        let others = y.narrow(1, fine_count * size, count - fine_count).unwrap();
        let others = others
            .reshape((batch * (count - fine_count), WIDTH))
            .unwrap();
        let joined = Tensor::cat(&[&fresh, &others], 0).unwrap();
        let stay = differences.index_select(&coarse, 0);
        let all = match count - fine_count {
            0 => apart,
            _ => Tensor::cat(&[&apart, &stay.unwrap()], 0).unwrap(),
        };
        let mut back = vec![0; batch * count];
        for (place, (block, _)) in short.fine.iter().chain(&short.coarse).enumerate() {
            back[*block] = place;
        }
        means = joined
            .index_select(&listed(back.iter().copied()), 0)
            .unwrap();
        differences = all.index_select(&listed(back), 0).unwrap();
        vip = y.narrow(1, short.length - vips, vips).unwrap();
    }
    let tokens = means.unsqueeze(1).unwrap().broadcast_sub(&differences);
    let tokens = tokens
        .unwrap()
        .reshape((batch, count * size, WIDTH))
        .unwrap();
    let all = Tensor::cat(&[&vip, &tokens], 1).unwrap();
    let places = vips + count * size;
    let at = |(sequence, own): (usize, &[usize])| -> Vec<usize> {
        own.iter().map(|place| sequence * places + place).collect()
    };
    let back = order.back().enumerate().flat_map(at);
    let all = all.reshape((batch * places, WIDTH)).unwrap();
    let y = all.index_select(&listed(back), 0).unwrap();
    [y.reshape(x.shape()).unwrap(), vip]
}

/// Everything that has a gradient, and the result, both ways.
fn compared(length: usize, fine: usize, depth: usize, pads: bool, dtype: DType) -> f64 {
    let (blocks, variables) = blocks(depth, dtype);
    let x = Var::from_tensor(&numbers(&[BATCH, length, WIDTH], 0.0, dtype)).unwrap();
    let keep: Vec<u8> = (0..BATCH * length)
        .map(|token| u8::from(!pads || token % 5 != 3 && token < 2 * length - 4))
        .collect();
    let keep = Tensor::from_vec(keep, (BATCH, length), &Device::Cpu).unwrap();
    let trace = Trace::new();
    let cx = Context {
        key_padding: pads.then_some(&keep),
        ..Context::new(&trace)
    };
    let slopes = numbers(&[BATCH, length, WIDTH], 5.0, dtype);
    let mut worst = 0f64;
    for output in [VccOutput::Tokens, VccOutput::Vips] {
        let spec = VccSpec {
            size: 3,
            output,
            ..VccSpec::new(2, fine)
        };
        let read = Read::default();
        let order = Order::new(&spec, read, cx.key_padding, [BATCH, length], x.device()).unwrap();
        let vcc = Vcc {
            path: "organisation".to_owned(),
            spec: spec.clone(),
        };
        let run = |block: &Arc<Block>, x: Signal, cx: &Context<'_>| block.forward(x, cx, None);
        let input = Signal::from(x.as_tensor().clone());
        let Organised { hidden, .. } = vcc.organise(input, &blocks, &run, read, &cx).unwrap();
        let [tokens, vips] = by_differences(x.as_tensor(), &blocks, &spec, &order, &cx);
        let plain = match output {
            VccOutput::Tokens => tokens,
            VccOutput::Vips => vips,
        };
        worst = worst.max(difference(hidden.value(), &plain).unwrap());
        let [ours, plain] = [hidden.into_value(), plain].map(|y| {
            let slopes = slopes.narrow(1, 0, y.dims()[1]).unwrap();
            (y * slopes).unwrap().sum_all().unwrap().backward().unwrap()
        });
        for variable in variables.iter().chain([&x]) {
            let [a, b] = [&ours, &plain].map(|found| found.get(variable));
            match (a, b) {
                (Some(a), Some(b)) => worst = worst.max(difference(a, b).unwrap()),
                (None, None) => {}
                _ => panic!("only one way has this gradient"),
            }
        }
    }
    worst
}

#[test]
fn rows_in_single_passes_are_differences_and_means() {
    // Whole blocks and ones that are not full, few tokens, nothing to choose, one block and several of the model.
    for (length, fine, depth) in [(17, 2, 3), (18, 1, 2), (19, 5, 2), (3, 1, 2), (4, 9, 1)] {
        for pads in [false, true] {
            let error = compared(length, fine, depth, pads, DType::F64);
            assert!(error < 1e-9, "{length} tokens, {fine} fine: {error:e}");
        }
    }
    let error = compared(17, 2, 2, true, DType::F32);
    assert!(error < 2e-3, "single precision: {error:e}");
}
