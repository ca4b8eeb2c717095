//! The interleaved network itself.

use super::exchange::Exchange;
use super::layout::Stage;
use super::{FitOutput, FitSpec, GroupPositions, LatentPositions, Tiles, tables};
use crate::block::Block;
use crate::error::tensor;
use crate::norm::{Norm, NormSpec};
use crate::organisation::fold::{fold, fold_mask, unfold};
use crate::organisation::{Organised, Run, Surroundings};
use crate::parameters::{Init, Parameters};
use crate::{Context, Error, Result};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_signal::{Linear, Signal};
use std::sync::Arc;

/// Groups of tokens and their latents, with their parameters.
#[derive(Debug)]
pub struct Fit {
    path: String,
    pub(super) spec: FitSpec,
    pub(super) stages: Vec<Stage>,
    width: usize,
    latent_width: usize,
    causal: bool,
    decodes: bool,
    /// `[n, width]`, where they are learned.
    positions: Option<Tensor>,
    /// `[t · m, latent_width]`, where they are learned.
    latents: Option<Tensor>,
    pub(super) globals: Vec<Arc<Block>>,
    pub(super) reads: Vec<Exchange>,
    pub(super) writes: Vec<Exchange>,
    /// What latents read of the conditions of a whole pass, after each read.
    contexts: Vec<Exchange>,
    latent_norm: Norm,
    condition: Option<(Linear, Norm)>,
}

/// What latents are given beside the tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Beside<'a> {
    /// Added to the latents' start, `[batch, t · m, latent_width]`.
    pub(super) start: Option<&'a Signal>,
    /// What they read after each read of their group, `[batch, tokens, latent_width]`.
    pub(super) context: Option<&'a Signal>,
}

/// The sizes of a pass.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    /// Tokens of a group.
    group: usize,
    groups: usize,
}

/// Latents, and which of them are of groups that have tokens; all when absent.
pub(super) type Latents = (Signal, Option<Tensor>);

impl Fit {
    /// Builds the network around the model's blocks. With `conditioned`, latents read from a context
    /// too.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    pub fn new(
        spec: &FitSpec,
        model: &Surroundings<'_>,
        conditioned: bool,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let stages = spec.stages()?;
        let (width, latent_width) = (model.width, spec.latent_width(model.width));
        let narrow = Init::Normal { deviation: 0.02 };
        let positions = match spec.positions {
            GroupPositions::Learned => {
                let mut own = parameters.at("positions");
                Some(own.tensor("weight", &[spec.group, width], narrow)?)
            }
            GroupPositions::Sinusoidal | GroupPositions::Grid => None,
        };
        let latents = match spec.latent_positions {
            LatentPositions::Learned if spec.latents > 0 => {
                let shape = [spec.groups * spec.latents, latent_width];
                Some(parameters.at("latents").tensor("weight", &shape, narrow)?)
            }
            _ => None,
        };
        let exchange = spec.exchange(model);
        let norm = spec
            .block
            .as_deref()
            .map_or(NormSpec::None, |block| block.norm);
        let feedforward = spec.read_feedforward.as_ref();
        let (mut globals, mut reads, mut writes) = (Vec::new(), Vec::new(), Vec::new());
        let mut contexts = Vec::new();
        for (index, stage) in stages.iter().enumerate() {
            let Some(block) = spec.block.as_deref().filter(|_| stage.global > 0) else {
                continue;
            };
            let how = (&exchange, &norm);
            let mut at = |name: &str| -> Result<Exchange> {
                let (feedforward, widths) = match name {
                    "read" => (feedforward, [latent_width, width]),
                    "write" => (None, [width, latent_width]),
                    _ => (None, [latent_width, latent_width]),
                };
                let mut own = parameters.at(name);
                Exchange::new(how, feedforward, widths, own.at(index))
            };
            reads.push(at("read")?);
            if conditioned {
                contexts.push(at("context")?);
            }
            if index + 1 < stages.len() {
                writes.push(at("write")?);
            }
            for _ in 0..stage.global {
                let mut own = parameters.at("global");
                let own = own.at(globals.len());
                globals.push(Arc::new(Block::new(block, latent_width, own)?));
            }
        }
        let latent_norm = match globals.is_empty() {
            true => Norm::None,
            false => Norm::new(&norm, latent_width, parameters.at("latent_norm"))?,
        };
        let condition = match spec.condition {
            0 => None,
            _ => Some((
                parameters.linear("condition", "condition.in", width, width, true)?,
                Norm::new(&NormSpec::default(), width, parameters.at("condition_norm"))?,
            )),
        };
        Ok(Self {
            path: parameters.path().to_owned(),
            causal: FitSpec::is_causal(model.blocks),
            decodes: spec.decodes(model.blocks.iter().all(|b| b.attention.is_causal())),
            spec: spec.clone(),
            stages,
            width,
            latent_width,
            positions,
            latents,
            globals,
            reads,
            writes,
            contexts,
            latent_norm,
            condition,
        })
    }

    /// The whole pass of a model.
    pub(in crate::organisation) fn organise(
        &self,
        x: Signal,
        blocks: &[Arc<Block>],
        run: &Run<'_>,
        cx: &Context<'_>,
    ) -> Result<Organised> {
        let (x, z) = self.forward(x, blocks, run, Beside::default(), cx)?;
        let output = z.filter(|_| self.spec.output == FitOutput::Latents);
        Ok(match output {
            None => Organised {
                hidden: x,
                padding: cx.key_padding.cloned(),
            },
            Some((latents, padding)) => Organised {
                hidden: latents,
                padding,
            },
        })
    }

    /// Tokens `[batch, length, width]`, and the latents `[batch, groups · m, latent_width]` after
    /// their norm, where there are any, with which of them are of groups that have tokens.
    pub(super) fn forward(
        &self,
        x: Signal,
        blocks: &[Arc<Block>],
        run: &Run<'_>,
        beside: Beside<'_>,
        cx: &Context<'_>,
    ) -> Result<(Signal, Option<Latents>)> {
        let (batch, length, _) = tensor(x.value().dims3())?;
        let sizes = Sizes {
            batch,
            // One group alone is as long as the input.
            group: self.spec.group.min(length.max(1)),
            groups: length.div_ceil(self.spec.group),
        };
        self.check_length(length)?;
        let order = match self.spec.tiles {
            Some(tiles) => Some(order(tiles, length, x.device())?),
            None => None,
        };
        let (x, keep) = match &order {
            Some([into, _]) => (x.select(1, into)?, in_order(cx.key_padding, into)?),
            None => (x, cx.key_padding.cloned()),
        };
        let own = fold_mask(keep.as_ref(), [batch, length, sizes.group], &x)?;
        let positions = self.group_positions(sizes.group, x.dtype(), x.device())?;
        let x = fold(&x, sizes.group)?.add_constant(&positions)?;
        let (x, keep) = self.conditioned(x, own.as_ref(), sizes, cx)?;
        let latents = LatentMasks::new(own.as_ref(), sizes, self, x.device())?;
        let masks = (keep.as_ref(), &latents);
        let (x, z) = self.through(x, blocks, run, (sizes, masks), beside, cx)?;
        let x = match self.spec.condition {
            0 => x,
            condition => x.narrow(1, condition, sizes.group)?,
        };
        let x = unfold(&x, batch, length)?;
        let x = match &order {
            Some([_, back]) => x.select(1, back)?,
            None => x,
        };
        let Some(z) = z else {
            return Ok((x, None));
        };
        let z = self.latent_norm.forward(&z)?;
        let z = cx.trace.site(format_args!("{}.latents", self.path), z)?;
        Ok((x, Some((z, latents.all))))
    }

    /// The groups `x` `[batch · groups, tokens, width]` through all stages, and the latents.
    fn through(
        &self,
        mut x: Signal,
        blocks: &[Arc<Block>],
        run: &Run<'_>,
        (sizes, (keep, masks)): (Sizes, (Option<&Tensor>, &LatentMasks)),
        beside: Beside<'_>,
        cx: &Context<'_>,
    ) -> Result<(Signal, Option<Signal>)> {
        let local = Context {
            key_padding: keep,
            memory: None,
            ..*cx
        };
        let global = Context {
            key_padding: masks.all.as_ref(),
            places: masks.places.as_ref(),
            ..local
        };
        let mut z = match self.globals.is_empty() {
            true => None,
            false => Some(self.start(sizes, beside.start, x.dtype(), x.device())?),
        };
        let (mut local_blocks, mut global_blocks) = (blocks.iter(), self.globals.iter());
        let (mut reads, mut writes) = (self.reads.iter(), self.writes.iter());
        let mut contexts = self.contexts.iter();
        for stage in &self.stages {
            for block in local_blocks.by_ref().take(stage.local) {
                x = run(block, x, &local)?;
            }
            if stage.global == 0 {
                continue;
            }
            let (Some(latent), Some(read)) = (z.take(), reads.next()) else {
                continue;
            };
            // What is said of tokens is not said of latents.
            let of_latents = Context {
                key_padding: None,
                ..local
            };
            let latent = read.forward(&self.grouped(&latent)?, &x, keep, &of_latents)?;
            let mut latent = unfold(&latent, sizes.batch, sizes.groups * self.spec.latents)?;
            if let (Some(context), Some(exchange)) = (beside.context, contexts.next()) {
                latent = exchange.forward(&latent, context, None, &of_latents)?;
            }
            for block in global_blocks.by_ref().take(stage.global) {
                latent = run(block, latent, &global)?;
            }
            if let Some(write) = writes.next() {
                let memory = self.grouped(&self.shifted(&latent)?)?;
                x = write.forward(&x, &memory, masks.written.as_ref(), &local)?;
            }
            z = Some(latent);
        }
        Ok((x, z))
    }

    /// Whether sequences can be gone on with.
    pub(in crate::organisation) fn decodes(&self) -> bool {
        self.decodes
    }

    pub(super) fn check_length(&self, length: usize) -> Result<()> {
        let longest = self.spec.group * self.spec.groups;
        let whole = self.spec.tiles.is_some();
        if length > longest || (whole && length != longest) {
            let expected = match whole {
                true => format!("{longest}, all tiles"),
                false => format!("at most {longest}, the groups that there are latents for"),
            };
            return Err(Error::spec("number of tokens", length, expected));
        }
        Ok(())
    }

    /// Positions of the first `count` tokens of a group, `[count, width]`.
    pub(super) fn group_positions(
        &self,
        count: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if let Some(learned) = &self.positions {
            return tensor(learned.narrow(0, 0, count));
        }
        if self.spec.positions == GroupPositions::Sinusoidal {
            return tables::line(0..count, self.width, dtype, device);
        }
        let sides = match self.spec.tiles {
            Some(tiles) => [tiles.height, tiles.width],
            None => [self.spec.group.isqrt(); 2],
        };
        let all = tables::grid(sides, self.width, dtype, device)?;
        tensor(all.narrow(0, 0, count))
    }

    /// Latents before they have read anything, `[batch, groups · m, latent_width]`.
    fn start(
        &self,
        sizes: Sizes,
        added: Option<&Signal>,
        dtype: DType,
        device: &Device,
    ) -> Result<Signal> {
        let count = sizes.groups * self.spec.latents;
        let start = self.latents(sizes.batch, (0, count), dtype, device)?;
        match added {
            Some(added) => Ok(start.add(added)?),
            None => Ok(start),
        }
    }

    /// So many latents from the `first` on as they start, `[batch, count, latent_width]`.
    pub(super) fn latents(
        &self,
        batch: usize,
        (first, count): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Signal> {
        let table = match &self.latents {
            Some(learned) => tensor(learned.narrow(0, first, count))?,
            // Decoding asks for one group's at a time: those before it are not laid out again.
            None => tables::line(first..first + count, self.latent_width, dtype, device)?,
        };
        let shape = (batch, count, self.latent_width);
        let start = tensor(table.broadcast_as(shape))?;
        Ok(Signal::from(tensor(start.contiguous())?))
    }

    /// What is written into a first group, `[batch, m, latent_width]`.
    pub(super) fn nothing(&self, batch: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = (batch, self.spec.latents, self.latent_width);
        tensor(Tensor::zeros(shape, dtype, device))
    }

    /// The groups with the memory's tokens before their own, and the mask of both.
    fn conditioned(
        &self,
        x: Signal,
        own: Option<&Tensor>,
        sizes: Sizes,
        cx: &Context<'_>,
    ) -> Result<(Signal, Option<Tensor>)> {
        let Some((map, norm)) = &self.condition else {
            return Ok((x, own.cloned()));
        };
        let count = self.spec.condition;
        let Some((memory, padding)) = cx.memory else {
            let expected = "given: every group has conditions";
            return Err(Error::spec("memory", "absent", expected));
        };
        let expected = [sizes.batch, sizes.groups * count, self.width];
        if memory.dims() != expected {
            let expected = format!("{expected:?}, {count} conditions for every group");
            return Err(Error::spec("shape of the memory", memory.dims(), expected));
        }
        let memory = cx
            .trace
            .site(format_args!("{}.condition.in", self.path), memory.clone())?;
        let conditions = fold(&norm.forward(&memory.linear(map)?)?, count)?;
        let rows = sizes.batch * sizes.groups;
        let all = |length: usize| tensor(Tensor::ones((rows, length), DType::U8, x.device()));
        let shape = [sizes.batch, sizes.groups * count, count];
        let keep = match (fold_mask(padding, shape, &x)?, own) {
            (None, None) => None,
            (conditions, own) => {
                let conditions = conditions.map_or_else(|| all(count), Ok)?;
                let own = own.cloned().map_or_else(|| all(sizes.group), Ok)?;
                Some(tensor(Tensor::cat(&[&conditions, &own], 1))?)
            }
        };
        Ok((Signal::concatenate(&[conditions, x], 1)?, keep))
    }

    /// Latents `[batch, groups · m, latent_width]` group by group.
    fn grouped(&self, z: &Signal) -> Result<Signal> {
        fold(z, self.spec.latents)
    }

    /// What is written: in a causal model each group's latents are written into the next.
    fn shifted(&self, z: &Signal) -> Result<Signal> {
        if !self.causal {
            return Ok(z.clone());
        }
        let (batch, count, _) = tensor(z.value().dims3())?;
        let latents = self.spec.latents;
        let first = Signal::from(self.nothing(batch, z.dtype(), z.device())?);
        match count - latents {
            0 => Ok(first),
            others => Ok(Signal::concatenate(&[first, z.narrow(1, 0, others)?], 1)?),
        }
    }
}

/// Which latents are of groups with tokens, and where they stand.
#[derive(Debug, Default)]
struct LatentMasks {
    /// `[batch, groups · m]`.
    all: Option<Tensor>,
    /// `[batch · groups, m]`, of the latents that are written into each group.
    written: Option<Tensor>,
    /// The group of each, `[batch, groups · m]`, where they may not see later ones.
    places: Option<Tensor>,
}

impl LatentMasks {
    fn new(own: Option<&Tensor>, sizes: Sizes, fit: &Fit, device: &Device) -> Result<Self> {
        let latents = fit.spec.latents;
        if fit.globals.is_empty() {
            return Ok(Self::default());
        }
        let Sizes { batch, groups, .. } = sizes;
        let places = match fit.causal {
            false => None,
            true => {
                let one = (0..groups as u32).flat_map(|group| std::iter::repeat_n(group, latents));
                let row: Vec<u32> = one.collect();
                let all = (0..batch).flat_map(|_| row.iter().copied()).collect();
                Some(tensor(Tensor::from_vec(
                    all,
                    (batch, groups * latents),
                    device,
                ))?)
            }
        };
        let Some(own) = own else {
            return Ok(Self {
                places,
                ..Self::default()
            });
        };
        let real: Vec<u8> = tensor(own.to_vec2::<u8>())?
            .iter()
            .map(|tokens| u8::from(tokens.iter().any(|kept| *kept != 0)))
            .collect();
        let spread = |groups: &[u8]| -> Vec<u8> {
            let each = groups.iter();
            each.flat_map(|kept| std::iter::repeat_n(*kept, latents))
                .collect()
        };
        let mut written = real.clone();
        if fit.causal {
            for sequence in written.chunks_exact_mut(groups.max(1)) {
                sequence.rotate_right(1);
                // The zeros that the first group hears are no group's.
                if let Some(first) = sequence.first_mut() {
                    *first = 1;
                }
            }
        }
        let shape = (batch, groups * latents);
        Ok(Self {
            all: Some(tensor(Tensor::from_vec(spread(&real), shape, device))?),
            written: Some(tensor(Tensor::from_vec(
                spread(&written),
                (batch * groups, latents),
                device,
            ))?),
            places,
        })
    }
}

/// The token that stands at each place when tiles lie one behind the other, and the place of each
/// token.
fn order(tiles: Tiles, tokens: usize, device: &Device) -> Result<[Tensor; 2]> {
    let across = tiles.columns / tiles.width.max(1);
    let size = tiles.height * tiles.width;
    let mut into = Vec::with_capacity(tokens);
    let mut back = vec![0u32; tokens];
    for place in 0..tokens {
        let (tile, inside) = (place / size, place % size);
        let row = tile / across * tiles.height + inside / tiles.width;
        let column = tile % across * tiles.width + inside % tiles.width;
        let token = row * tiles.columns + column;
        into.push(token as u32);
        if let Some(back) = back.get_mut(token) {
            *back = place as u32;
        }
    }
    let listed = |list: Vec<u32>| tensor(Tensor::from_vec(list, tokens, device));
    Ok([listed(into)?, listed(back)?])
}

/// A mask of tokens in another order.
fn in_order(keep: Option<&Tensor>, order: &Tensor) -> Result<Option<Tensor>> {
    let Some(keep) = keep else {
        return Ok(None);
    };
    let keep = tensor(tensor(keep.to_dtype(DType::U8))?.contiguous())?;
    Ok(Some(tensor(keep.index_select(order, 1))?))
}
