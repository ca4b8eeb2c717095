//! A model's spec and parameters while they are changed together.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_factor::{Matrix, matrix_to_tensor};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, ModelSpec};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::organisation::OrganisationSpec;

use crate::error::engine;
use crate::{Error, Result};

/// Spec and parameters of a model; its blocks are written out one by one.
#[derive(Clone)]
pub(crate) struct Edit {
    pub(crate) spec: ModelSpec,
    pub(crate) parameters: BTreeMap<String, Tensor>,
    dtype: DType,
}

impl Edit {
    pub(crate) fn of(model: &Model) -> Self {
        let spec = ModelSpec {
            blocks: model.spec().expanded_blocks(),
            ..model.spec().clone()
        };
        Self {
            spec,
            parameters: model.parameters().clone(),
            dtype: model.dtype(),
        }
    }

    /// As [`Edit::of`], but what is put is kept in double precision; the others stay as the model has them.
    pub(crate) fn wide(model: &Model) -> Self {
        Self {
            dtype: DType::F64,
            ..Self::of(model)
        }
    }

    /// The same spec with the parameters of one module alone.
    pub(crate) fn part(&self, path: &str) -> Self {
        let parameters = self.parameters.iter();
        Self {
            spec: self.spec.clone(),
            parameters: parameters
                .filter(|(name, _)| is_below(name, path))
                .map(|(name, tensor)| (name.clone(), tensor.clone()))
                .collect(),
            dtype: self.dtype,
        }
    }

    /// Puts the parameters of one module, changed elsewhere, in the place of those here.
    pub(crate) fn replace(&mut self, path: &str, part: Self) {
        self.parameters.retain(|name, _| !is_below(name, path));
        self.parameters.extend(part.parameters);
    }

    /// Where its parameters live.
    pub(crate) fn device(&self) -> Device {
        let one = self.parameters.values().next();
        one.map_or(Device::Cpu, |tensor| tensor.device().clone())
    }

    /// One block's spec.
    pub(crate) fn block(&mut self, index: usize) -> Result<&mut BlockSpec> {
        let blocks = self.spec.blocks.len();
        self.spec
            .blocks
            .get_mut(index)
            .ok_or_else(|| Error::invalid("block", index, format!("below {blocks}")))
    }

    /// A parameter in `f64`, when the model has it.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Tensor>> {
        self.parameters
            .get(name)
            .map(|tensor| engine(tensor.detach().to_dtype(DType::F64)))
            .transpose()
    }

    /// A parameter in `f64`.
    pub(crate) fn get(&self, name: &str) -> Result<Tensor> {
        self.find(name)?.ok_or_else(|| {
            Error::invalid(
                format!("parameter {name}"),
                "absent",
                "a parameter of the model; factorised and quantised layers have to be written out first",
            )
        })
    }

    /// Puts a parameter, rounded once to the model's type.
    pub(crate) fn put(&mut self, name: impl Into<String>, tensor: &Tensor) -> Result<()> {
        let tensor = engine(engine(tensor.to_dtype(self.dtype))?.contiguous())?;
        self.parameters.insert(name.into(), tensor);
        Ok(())
    }

    /// Puts a matrix, rounded once to the model's type.
    pub(crate) fn put_matrix(&mut self, name: impl Into<String>, matrix: &Matrix) -> Result<()> {
        let tensor = matrix_to_tensor(matrix.as_ref(), DType::F64, &self.device())?;
        self.put(name, &tensor)
    }

    /// Rounds every parameter of the module at `path` to `dtype`, however wide the others still are: what is
    /// finished need not wait in double precision.
    pub(crate) fn round(&mut self, path: &str, dtype: DType) -> Result<()> {
        for (name, tensor) in &mut self.parameters {
            if is_below(name, path) {
                *tensor = engine(tensor.to_dtype(dtype))?;
            }
        }
        Ok(())
    }

    /// Takes blocks out and numbers the others anew, also where an organisation says which of them see what.
    pub(crate) fn remove_blocks(&mut self, removed: &BTreeSet<usize>) -> Result<()> {
        let blocks = self.spec.blocks.len();
        if let Some(index) = removed.iter().find(|index| **index >= blocks) {
            return Err(Error::invalid("block", index, format!("below {blocks}")));
        }
        if removed.len() == blocks {
            return Err(Error::invalid(
                "number of removed blocks",
                removed.len(),
                format!("below {blocks}, so that one is left"),
            ));
        }
        let mut index = 0;
        self.spec.blocks.retain(|_| {
            index += 1;
            !removed.contains(&(index - 1))
        });
        let renamed = |name: &str| -> Option<String> {
            let Some((number, rest)) = block_of(name) else {
                return Some(name.to_owned());
            };
            let before = removed.iter().filter(|index| **index < number).count();
            (!removed.contains(&number)).then(|| format!("blocks.{}.{rest}", number - before))
        };
        let parameters = std::mem::take(&mut self.parameters).into_iter();
        self.parameters = parameters
            .filter_map(|(name, tensor)| renamed(&name).map(|name| (name, tensor)))
            .collect();
        let ranks = std::mem::take(&mut self.spec.low_rank).into_iter();
        self.spec.low_rank = ranks
            .filter_map(|(path, rank)| renamed(&path).map(|path| (path, rank)))
            .collect();
        let quantised = std::mem::take(&mut self.spec.quantised).into_iter();
        self.spec.quantised = quantised
            .filter_map(|(name, form)| renamed(&name).map(|name| (name, form)))
            .collect();
        if let Some(OrganisationSpec::VipCentric(vcc)) = &mut self.spec.organisation {
            vcc.remove_blocks(removed);
        }
        Ok(())
    }

    /// Leaves out a block's mixer, the norm before it and the scale behind it.
    pub(crate) fn remove_mixer(&mut self, index: usize) -> Result<()> {
        self.block(index)?.attention = MixerSpec::Absent;
        self.remove_parameters(&format!("blocks.{index}.attention"));
        self.remove_parameters(&format!("blocks.{index}.attention_norm"));
        self.remove_parameters(&format!("blocks.{index}.attention_scale"));
        Ok(())
    }

    /// Leaves out a block's feed-forward part, the norm before it and the scale behind it.
    pub(crate) fn remove_feedforward(&mut self, index: usize) -> Result<()> {
        self.block(index)?.feedforward = None;
        self.remove_parameters(&format!("blocks.{index}.feedforward"));
        self.remove_parameters(&format!("blocks.{index}.feedforward_norm"));
        self.remove_parameters(&format!("blocks.{index}.feedforward_scale"));
        Ok(())
    }

    /// Takes out every parameter and rank of the module at `path`.
    pub(crate) fn remove_parameters(&mut self, path: &str) {
        let below = |name: &String| match name.strip_prefix(path) {
            Some(rest) => rest.is_empty() || rest.starts_with('.'),
            None => false,
        };
        self.parameters.retain(|name, _| !below(name));
        self.spec.low_rank.retain(|layer, _| !below(layer));
        self.spec.quantised.retain(|name, _| !below(name));
    }

    /// The changed model up to and with this block: what shows what the block reads. All of it where an
    /// organisation counts the blocks.
    pub(crate) fn through(&self, index: usize) -> Result<Model> {
        let counted = match &self.spec.organisation {
            Some(OrganisationSpec::Interleaved(_) | OrganisationSpec::VipCentric(_)) => true,
            Some(OrganisationSpec::Reversible(_)) | None => false,
        };
        if counted {
            return self.clone().finish();
        }
        let mut spec = self.spec.clone();
        spec.blocks.truncate(index + 1);
        let here = |path: &String| block_of(path).is_none_or(|(block, _)| block <= index);
        spec.low_rank.retain(|path, _| here(path));
        Ok(Model::new(spec, &mut self.parameters.clone())?)
    }

    /// The changed model.
    pub(crate) fn finish(mut self) -> Result<Model> {
        Ok(Model::new(self.spec, &mut self.parameters)?)
    }
}

/// Whether a parameter belongs to the module at `path`.
fn is_below(name: &str, path: &str) -> bool {
    let rest = name.strip_prefix(path);
    rest.is_some_and(|rest| rest.starts_with('.'))
}

/// The block in a path, and the rest of the path: `blocks.3.attention` is of block 3.
pub(crate) fn block_of(path: &str) -> Option<(usize, &str)> {
    let (number, rest) = path.strip_prefix("blocks.")?.split_once('.')?;
    number.parse().ok().map(|number| (number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_found_in_a_path() {
        assert_eq!(
            block_of("blocks.12.attention.query"),
            Some((12, "attention.query"))
        );
        assert_eq!(block_of("head.output"), None);
        assert_eq!(block_of("blocks.x.in"), None);
    }
}
