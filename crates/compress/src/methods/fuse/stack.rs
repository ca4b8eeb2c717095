//! The blocks that are left, and what is learned in them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lapidary_kernels::{Tensor, Var};
use lapidary_model::{Model, ModelSpec};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::FuseSettings;
use super::influence::headless;
use super::weights::{Fused, working};
use crate::edit::{Edit, block_of};
use crate::error::engine;
use crate::{Error, Result};

/// A model while its blocks go. Blocks keep their numbers; parameters that are learned are functions
/// of variables until the end.
pub(super) struct Stack {
    whole: Edit,
    left: Vec<usize>,
    learned: BTreeMap<String, Fused>,
    /// Paths of the linear layers.
    linears: BTreeSet<String>,
    generator: ChaCha8Rng,
}

impl Stack {
    pub(super) fn of(model: &Model, seed: u64) -> Result<Self> {
        let mut whole = headless(Edit::of(model));
        for tensor in whole.parameters.values_mut() {
            *tensor = engine(tensor.detach().to_dtype(working(model.dtype())))?;
        }
        let linears = model.linears().iter();
        Ok(Self {
            left: (0..whole.spec.blocks.len()).collect(),
            whole,
            learned: BTreeMap::new(),
            linears: linears.map(|linear| linear.path.clone()).collect(),
            generator: ChaCha8Rng::seed_from_u64(seed),
        })
    }

    /// The blocks that are left, by their numbers.
    pub(super) fn left(&self) -> &[usize] {
        &self.left
    }

    /// Leaves a block out.
    pub(super) fn remove(&mut self, block: usize) {
        self.left.retain(|left| *left != block);
    }

    /// These blocks as a model of their own behind the embeddings. Where they are learned, what it
    /// computes can be differentiated by the variables.
    pub(super) fn model(&self, blocks: &[usize]) -> Result<Model> {
        let place = |index: usize| blocks.iter().position(|block| *block == index);
        let renamed = |name: &str| match block_of(name) {
            None => Some(name.to_owned()),
            Some((index, rest)) => Some(format!("blocks.{}.{rest}", place(index)?)),
        };
        let mut parameters = BTreeMap::new();
        for (name, tensor) in &self.whole.parameters {
            if let Some(here) = renamed(name) {
                let value = match self.learned.get(name) {
                    Some(fused) => fused.value()?,
                    None => tensor.clone(),
                };
                parameters.insert(here, value);
            }
        }
        let specs = &self.whole.spec;
        let ranks = specs.low_rank.iter();
        let spec = ModelSpec {
            blocks: blocks
                .iter()
                .filter_map(|block| specs.blocks.get(*block).cloned())
                .collect(),
            low_rank: ranks
                .filter_map(|(path, rank)| Some((renamed(path)?, *rank)))
                .collect(),
            ..specs.clone()
        };
        Ok(Model::new(spec, &mut parameters)?)
    }

    /// Makes what `survivors` have variable, and has it take in what `gone` has in the same places.
    pub(super) fn fuse(
        &mut self,
        gone: usize,
        survivors: &[usize],
        recycle: bool,
        settings: &FuseSettings,
    ) -> Result<()> {
        let taken: BTreeMap<String, Tensor> = self
            .of_block(gone)
            .map(|(rest, name, tensor)| {
                let value = match self.learned.get(name) {
                    Some(fused) => fused.value()?,
                    None => tensor.clone(),
                };
                Ok((rest.to_owned(), value))
            })
            .collect::<Result<_>>()?;
        let (rank, gate) = (settings.rank, settings.gate);
        for survivor in survivors {
            let own: Vec<(String, String, Tensor)> = self
                .of_block(*survivor)
                .map(|(rest, name, tensor)| (rest.to_owned(), name.to_owned(), tensor.clone()))
                .collect();
            for (rest, name, tensor) in own {
                let layer = name.rsplit_once('.');
                let linear = layer.is_some_and(|(path, _)| self.linears.contains(path));
                let generator = &mut self.generator;
                let mut fused = match self.learned.remove(&name) {
                    Some(fused) => fused,
                    None if linear && rest.ends_with(".weight") => {
                        Fused::matrix(&tensor, rank, generator)?
                    }
                    None => Fused::free(&tensor)?,
                };
                if let Some(value) = taken.get(&rest).filter(|_| linear && recycle) {
                    fused.take_in(value, gate, rank, generator)?;
                }
                self.learned.insert(name, fused);
            }
        }
        Ok(())
    }

    /// What a block's parameters are called in it and in the whole, and what they were.
    fn of_block(&self, block: usize) -> impl Iterator<Item = (&str, &str, &Tensor)> {
        let parameters = self.whole.parameters.iter();
        parameters.filter_map(move |(name, tensor)| match block_of(name) {
            Some((index, rest)) if index == block => Some((rest, name.as_str(), tensor)),
            _ => None,
        })
    }

    /// The variables of these blocks: those of gates, and all others.
    pub(super) fn variables(&self, blocks: &[usize]) -> [Vec<Var>; 2] {
        let mut variables = [Vec::new(), Vec::new()];
        let [gates, corrections] = &mut variables;
        for (name, fused) in &self.learned {
            if block_of(name).is_some_and(|(index, _)| blocks.contains(&index)) {
                gates.extend(fused.gates());
                corrections.extend(fused.corrections());
            }
        }
        variables
    }

    /// Puts what was learned into the model that the stack was made of, and takes out what went.
    pub(super) fn fold(&self, model: &Model) -> Result<Model> {
        let mut edit = Edit::of(model);
        for (name, fused) in &self.learned {
            edit.put(name, &fused.value()?.detach())?;
        }
        let gone = (0..self.whole.spec.blocks.len()).filter(|block| !self.left.contains(block));
        edit.remove_blocks(&gone.collect())?;
        edit.finish()
    }
}

/// The places of a group: `size` blocks in a row of `blocks`, the one that goes behind its middle,
/// moved so that they lie inside.
pub(super) fn group(gone: usize, size: usize, blocks: usize) -> Range<usize> {
    let size = size.min(blocks);
    let start = gone.saturating_sub(size / 2).min(blocks - size);
    start..start + size
}

/// Refuses blocks whose matrices have no counterpart in each other.
pub(super) fn alike(model: &Model, method: &str) -> Result<()> {
    let mut blocks: Vec<BTreeMap<&str, [usize; 2]>> =
        vec![BTreeMap::new(); model.spec().expanded_blocks().len()];
    for linear in model.linears() {
        let Some((index, rest)) = block_of(&linear.path) else {
            continue;
        };
        if let Some(rank) = linear.rank {
            return Err(Error::invalid(
                format!("rank of {}", linear.path),
                rank,
                format!("none for {method}: multiply factorised layers out first"),
            ));
        }
        if let Some(block) = blocks.get_mut(index) {
            block.insert(rest, [linear.output, linear.input]);
        }
    }
    let Some((first, others)) = blocks.split_first() else {
        return Ok(());
    };
    for (index, block) in others.iter().enumerate() {
        let differs = |name: &&&str| first.get(**name) != block.get(**name);
        let Some(name) = first.keys().chain(block.keys()).find(differs) else {
            continue;
        };
        let shape = |shapes: &BTreeMap<&str, [usize; 2]>| match shapes.get(name) {
            Some([output, input]) => format!("{output}×{input}"),
            None => "absent".to_owned(),
        };
        return Err(Error::invalid(
            format!("blocks.{}.{name}", index + 1),
            shape(block),
            format!(
                "{} as in block 0 for {method}, which adds matrices of one block to those of \
                 another",
                shape(first)
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_lie_around_what_goes_and_inside() {
        assert_eq!(group(10, 8, 32), 6..14);
        assert_eq!(group(0, 8, 32), 0..8);
        assert_eq!(group(2, 8, 32), 0..8);
        assert_eq!(group(31, 8, 32), 24..32);
        assert_eq!(group(29, 8, 32), 24..32);
        assert_eq!(group(3, 8, 5), 0..5);
        assert_eq!(group(3, 2, 5), 2..4);
        for gone in 0..7 {
            assert!(group(gone, 3, 7).contains(&gone), "{gone}");
        }
    }
}
