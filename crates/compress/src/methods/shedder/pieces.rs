//! The pieces of a model that can be left out, and a model without some of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use lapidary_kernels::Device;
use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::recurrent::Mamba2Spec;

use super::MAMBA_SHEDDER;
use crate::edit::Edit;
use crate::error::engine;
use crate::methods::attention_cosine::weights_below;
use crate::methods::block_influence::removable;
use crate::methods::channels::{self, Unit};
use crate::{Error, Result};

/// What of a Mamba mixer its recurrence alone reads.
const SELECTION: [&str; 4] = ["selection", "step", "decay_log", "skip"];

/// The same of a Mamba-2 mixer, beside its rows of the input projection and of the convolution.
const STEPS: [&str; 3] = ["step_bias", "decay_log", "skip"];

/// A piece of a model that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shed {
    /// A block's mixer.
    Mixer(usize),
    /// A block's feed-forward part.
    Feedforward(usize),
    /// The recurrence of a block's mixer; convolution, gate and its norm stay.
    Scan(usize),
    /// A group of a feed-forward part's hidden features: of those ordered by the weights that write
    /// them, the ones at the end once all groups of smaller number are gone.
    Channels {
        /// The block.
        block: usize,
        /// Which group, counted from the end.
        group: usize,
        /// Hidden features of a group.
        size: usize,
    },
}

impl Shed {
    /// The mixers and feed-forward parts of a model, in order.
    pub fn parts(model: &Model) -> Vec<Self> {
        parts(&model.spec().expanded_blocks())
    }

    /// The scans of a model, in order.
    pub fn scans(model: &Model) -> Vec<Self> {
        scans(&model.spec().expanded_blocks())
    }

    /// The groups of `size` hidden features of a model, a tenth of each feed-forward part's when
    /// absent, as 1024 of the 10240 of Zamba2-2.7B are: block by block, and in a block from the end.
    /// One feature at least is in no group. Every expert of a mixture is narrowed alike.
    ///
    /// # Errors
    /// When `size` is zero.
    pub fn channels(model: &Model, size: Option<usize>) -> Result<Vec<Self>> {
        channels_of(&model.spec().expanded_blocks(), size)
    }

    /// The block that it is a piece of.
    pub fn block(self) -> usize {
        match self {
            Self::Mixer(block)
            | Self::Feedforward(block)
            | Self::Scan(block)
            | Self::Channels { block, .. } => block,
        }
    }

    /// The model without some pieces, in any mixture of granularities; a block of which nothing is left
    /// is no block.
    ///
    /// # Errors
    /// When a block, a scan or hidden features are not there, no block would be left, a feed-forward
    /// part that is narrowed is factorised, or the model is none that pieces can be left out of: one whose
    /// blocks are not additions to one stream, share their weights, or are quantised.
    pub fn cut(model: &Model, pieces: &BTreeSet<Self>) -> Result<Model> {
        additive(model)?;
        Cut::of(&model.spec().expanded_blocks(), pieces).apply(model)
    }

    /// Whether it can go next: it is there, its part is, and of groups of features those behind it
    /// are gone.
    pub fn is_next(self, gone: &BTreeSet<Self>) -> bool {
        let mut before = match self {
            Self::Channels { block, group, size } => {
                (0..group).map(move |group| Self::Channels { block, group, size })
            }
            Self::Mixer(_) | Self::Feedforward(_) | Self::Scan(_) => return self.is_there(gone),
        };
        self.is_there(gone) && before.all(|before| gone.contains(&before))
    }

    /// Whether neither it is gone nor the part that it is of.
    pub(super) fn is_there(self, gone: &BTreeSet<Self>) -> bool {
        let part = match self {
            Self::Mixer(_) | Self::Feedforward(_) => self,
            Self::Scan(block) => Self::Mixer(block),
            Self::Channels { block, .. } => Self::Feedforward(block),
        };
        !gone.contains(&self) && !gone.contains(&part)
    }
}

impl fmt::Display for Shed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mixer(block) => write!(f, "blocks.{block}.attention"),
            Self::Feedforward(block) => write!(f, "blocks.{block}.feedforward"),
            Self::Scan(block) => write!(f, "blocks.{block}.attention.scan"),
            Self::Channels { block, group, .. } => {
                write!(f, "blocks.{block}.feedforward.channels.{group}")
            }
        }
    }
}

/// Refuses models that pieces cannot be left out of.
pub(super) fn additive(model: &Model) -> Result<()> {
    MAMBA_SHEDDER.check_weights(model)?;
    removable(model, MAMBA_SHEDDER.name)
}

/// Mixers and feed-forward parts, in order.
pub(super) fn parts(blocks: &[BlockSpec]) -> Vec<Shed> {
    let of = |(index, block): (usize, &BlockSpec)| {
        let mixer = (block.attention != MixerSpec::Absent).then_some(Shed::Mixer(index));
        let feedforward = block
            .feedforward
            .is_some()
            .then_some(Shed::Feedforward(index));
        [mixer, feedforward].into_iter().flatten()
    };
    blocks.iter().enumerate().flat_map(of).collect()
}

/// Scans, in order.
pub(super) fn scans(blocks: &[BlockSpec]) -> Vec<Shed> {
    let of = |(index, block): (usize, &BlockSpec)| has_scan(block).then_some(Shed::Scan(index));
    blocks.iter().enumerate().filter_map(of).collect()
}

fn has_scan(block: &BlockSpec) -> bool {
    match &block.attention {
        MixerSpec::Mamba(mamba) => mamba.scan,
        MixerSpec::Mamba2(mamba) => mamba.scan,
        MixerSpec::MultiHead(_) | MixerSpec::Wavelet(_) | MixerSpec::Absent => false,
    }
}

/// Groups of hidden features, in order.
pub(super) fn channels_of(blocks: &[BlockSpec], size: Option<usize>) -> Result<Vec<Shed>> {
    if size == Some(0) {
        let expected = "at least 1 hidden feature";
        return Err(Error::invalid("shedder.channel_group", 0, expected));
    }
    let of = |(block, spec): (usize, &BlockSpec)| {
        let units = Unit::of(block, spec);
        let hidden = units.first().map_or(0, |unit| unit.hidden);
        let size = size.unwrap_or(hidden / 10).max(1);
        let groups = hidden.saturating_sub(1) / size;
        (0..groups).map(move |group| Shed::Channels { block, group, size })
    };
    Ok(blocks.iter().enumerate().flat_map(of).collect())
}

/// What is cut from a model.
#[derive(Clone, Debug, Default)]
pub(super) struct Cut {
    /// Mixers, feed-forward parts and scans that go.
    pub(super) gone: BTreeSet<Shed>,
    /// Hidden features that are left of a block's feed-forward part.
    pub(super) features: BTreeMap<usize, usize>,
}

impl Cut {
    /// Everything of `shed`, of a model with these blocks.
    pub(super) fn of(blocks: &[BlockSpec], shed: &BTreeSet<Shed>) -> Self {
        let mut cut = Self::default();
        for piece in shed {
            let Shed::Channels { block, size, .. } = *piece else {
                cut.gone.insert(*piece);
                continue;
            };
            let part = blocks
                .get(block)
                .and_then(|block| block.feedforward.as_ref());
            let hidden = part.map_or(0, |part| part.hidden());
            let left = cut.features.entry(block).or_insert(hidden);
            *left = left.saturating_sub(size);
        }
        cut
    }

    /// The model without it.
    ///
    /// # Errors
    /// As [`Shed::cut`].
    pub(super) fn apply(&self, model: &Model) -> Result<Model> {
        let mut edit = Edit::of(model);
        let mut empty = BTreeSet::new();
        for (block, features) in &self.features {
            narrow(&mut edit, *block, *features)?;
        }
        for shed in &self.gone {
            let index = shed.block();
            match shed {
                Shed::Mixer(_) => edit.remove_mixer(index)?,
                Shed::Feedforward(_) => edit.remove_feedforward(index)?,
                Shed::Scan(_) => remove_scan(&mut edit, index)?,
                Shed::Channels { .. } => {}
            }
            let block = edit.block(index)?;
            if block.attention == MixerSpec::Absent && block.feedforward.is_none() {
                empty.insert(index);
            }
        }
        edit.remove_blocks(&empty)?;
        edit.finish()
    }
}

/// Leaves `features` of a feed-forward part's hidden features: the end is cut off the order that
/// [`magnitudes`] give.
fn narrow(edit: &mut Edit, index: usize, features: usize) -> Result<()> {
    let units = Unit::of(index, edit.block(index)?);
    if units.is_empty() {
        let what = format!("hidden features of block {index}");
        return Err(Error::invalid(what, 0, "at least 1, to be narrowed"));
    }
    for unit in units {
        let scores = magnitudes(edit, &unit)?;
        unit.keep(edit, &channels::largest(&scores, features))?;
    }
    channels::set_hidden(edit, index, features)
}

/// `‖gate row‖₁ + ‖up row‖₁` of each hidden feature, by which the published program orders them.
fn magnitudes(edit: &Edit, unit: &Unit) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; unit.hidden];
    for writer in unit.writers() {
        let weight = edit.get(&format!("{writer}.weight"))?;
        let rows = engine(engine(weight.abs())?.sum(1))?;
        let rows = engine(engine(rows.to_device(&Device::Cpu))?.to_vec1::<f64>())?;
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum += row;
        }
    }
    Ok(sums)
}

/// Leaves out the recurrence of a block's mixer and what selects for it.
fn remove_scan(edit: &mut Edit, index: usize) -> Result<()> {
    let width = edit.spec.width;
    let path = channels::attention(index);
    let left = match &mut edit.block(index)?.attention {
        MixerSpec::Mamba(mamba) => {
            mamba.scan = false;
            None
        }
        MixerSpec::Mamba2(mamba) => {
            mamba.scan = false;
            Some(mamba.clone())
        }
        // Its mixer may have gone altogether.
        MixerSpec::Absent => return Ok(()),
        other @ (MixerSpec::MultiHead(_) | MixerSpec::Wavelet(_)) => {
            let what = format!("mixer of block {index}");
            let expected = "mamba or mamba2, which have a scan";
            return Err(Error::invalid(what, other.kind(), expected));
        }
    };
    let names = match &left {
        None => SELECTION.as_slice(),
        Some(left) => {
            keep_gate_and_content(edit, &path, left, width)?;
            STEPS.as_slice()
        }
    };
    for name in names {
        edit.remove_parameters(&format!("{path}.{name}"));
    }
    Ok(())
}

/// Of a Mamba-2 mixer's input projection the rows of the gate and of what is remembered, and of its
/// convolution the channels of the latter: `B`, `C` and the steps, which come behind, are not computed
/// any more. `left` is the mixer without its scan.
fn keep_gate_and_content(
    edit: &mut Edit,
    path: &str,
    left: &Mamba2Spec,
    width: usize,
) -> Result<()> {
    let (rows, channels) = (left.projected(width), left.convolved(width));
    for (name, kept) in selected_rows(path, rows, channels) {
        if let Some(tensor) = edit.parameters.get_mut(&name) {
            // Of its own memory, so that the rows that go are not kept by a view.
            *tensor = engine(engine(tensor.narrow(0, 0, kept))?.force_contiguous())?;
        }
    }
    Ok(())
}

/// The parameters of a Mamba-2 mixer whose rows go with its scan, and how many stay.
fn selected_rows(path: &str, rows: usize, channels: usize) -> [(String, usize); 5] {
    [
        ("input.weight", rows),
        // A factorised projection.
        ("input.up", rows),
        ("input.bias", rows),
        ("convolution.weight", channels),
        ("convolution.bias", channels),
    ]
    .map(|(name, kept)| (format!("{path}.{name}"), kept))
}

/// Parameters that go with a piece, or of hidden features all that are there.
pub(super) fn weights_of(model: &Model, piece: Shed) -> usize {
    match piece {
        Shed::Mixer(_) | Shed::Feedforward(_) => weights_below(model, &piece.to_string()),
        Shed::Channels { block, .. } => weights_below(model, &channels::feedforward(block)),
        Shed::Scan(block) => {
            let path = channels::attention(block);
            let own = |name: &str| {
                let path = format!("{path}.{name}");
                let own = model.parameters().get(&path);
                own.map_or(0, |tensor| tensor.elem_count()) + weights_below(model, &path)
            };
            let blocks = model.spec().expanded_blocks();
            match blocks.get(block).map(|block| &block.attention) {
                Some(MixerSpec::Mamba2(mamba)) => {
                    STEPS.into_iter().map(own).sum::<usize>() + selecting(model, &path, mamba)
                }
                _ => SELECTION.into_iter().map(own).sum(),
            }
        }
    }
}

/// Numbers in the rows that go with a Mamba-2 mixer's scan.
fn selecting(model: &Model, path: &str, mamba: &Mamba2Spec) -> usize {
    let width = model.spec().width;
    let left = Mamba2Spec {
        scan: false,
        ..mamba.clone()
    };
    let rows = selected_rows(path, left.projected(width), left.convolved(width));
    let lost = |(name, kept): (String, usize)| {
        let tensor = model.parameters().get(&name)?;
        let rows = tensor.dims().first().copied().filter(|rows| *rows > 0)?;
        Some(tensor.elem_count() / rows * rows.saturating_sub(kept))
    };
    rows.into_iter().filter_map(lost).sum()
}

/// Parameters of one hidden feature in every unit of a block's feed-forward part.
pub(super) fn weights_of_feature(model: &Model, index: usize, block: &BlockSpec) -> usize {
    let elements = |name: String| {
        let tensor = model.parameters().get(&name);
        tensor.map_or(0, |tensor| tensor.elem_count())
    };
    let of = |unit: &Unit| {
        let writers = unit.writers().into_iter();
        let written: usize = writers
            .map(|path| elements(format!("{path}.weight")) + elements(format!("{path}.bias")))
            .sum();
        (written + elements(format!("{}.weight", unit.reader()))) / unit.hidden.max(1)
    };
    Unit::of(index, block).iter().map(of).sum()
}
