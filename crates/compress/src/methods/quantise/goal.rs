//! The rounding that a model is to get, for those who want to know it beforehand.

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Model;
use serde::{Deserialize, Serialize};

use super::grid::GridKind;
use super::rounded::Rounded;
use super::target::writes_too;
use super::{QuantiseSettings, ROUNDINGS, Target};
use crate::error::engine;
use crate::method::{Method, Settings};
use crate::{Error, Result, Selection};

/// Which matrices become integers, and of which kind: each weight the nearest number of its group's
/// grid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundingGoal {
    /// Bits, groups and grids.
    pub quantise: QuantiseSettings,
    /// The layers.
    pub selection: Selection,
}

impl Method {
    /// What it rounds to, if it rounds: for `awq` and `gptq`, the nearest numbers of the same grids.
    ///
    /// ```
    /// use lapidary_compress::{Method, Settings};
    /// let settings = Settings::default();
    /// assert_eq!(Method::find("int8")?.rounding(&settings).map(|goal| goal.quantise.bits), Some(8));
    /// assert!(Method::find("svd")?.rounding(&settings).is_none());
    /// # Ok::<(), lapidary_compress::Error>(())
    /// ```
    pub fn rounding(&self, settings: &Settings) -> Option<RoundingGoal> {
        let rounding = ROUNDINGS.iter().find(|other| other.name == self.name)?;
        Some(RoundingGoal {
            quantise: QuantiseSettings {
                bits: rounding.bits(settings),
                ..settings.quantise
            },
            selection: settings.selection.clone(),
        })
    }
}

impl RoundingGoal {
    fn kind(&self) -> GridKind {
        GridKind {
            bits: self.quantise.bits,
            symmetric: !self.quantise.minima,
            search: self.quantise.search && self.quantise.bits <= 4,
        }
    }

    /// The parameters that are rounded: those of layers whose rows are whole groups, and no output tied to them.
    ///
    /// # Errors
    /// When bits or group are none that can be stored, or no layer is selected.
    pub(crate) fn matrices(&self, model: &Model) -> Result<Vec<String>> {
        let QuantiseSettings { bits, group, .. } = self.quantise;
        if !matches!(bits, 4 | 8) {
            return Err(Error::invalid("bits to be rounded to", bits, "4 or 8"));
        }
        if group == 0 || !group.is_multiple_of(32) {
            return Err(Error::invalid("group", group, "a multiple of 32"));
        }
        let layers = self.selection.chosen(model)?.into_iter();
        let layers = layers.filter(|layer| !(layer.is_table() || writes_too(model, layer)));
        let targets = layers.map(|layer| Target::of(&layer));
        Ok(targets
            .filter(|targets| {
                let whole = |target: &Target| target.dims[1].is_multiple_of(group);
                targets.iter().all(whole)
            })
            .flatten()
            .map(|target| target.name)
            .collect())
    }

    /// The numbers that `weight` `[output, input]` becomes, in its type.
    ///
    /// # Errors
    /// When a group fits no grid.
    pub(crate) fn nearest(&self, weight: &Tensor) -> Result<Tensor> {
        let (output, input) = engine(weight.dims2())?;
        let values = engine(weight.to_dtype(DType::F64))?;
        let values = engine(engine(values.flatten_all())?.to_vec1::<f64>())?;
        let group = self.quantise.group;
        let rounded = Rounded::to_nearest(self.kind(), group, [output, input], &values)?;
        let numbers = Tensor::from_vec(rounded.numbers(), (output, input), &Device::Cpu);
        let numbers = engine(engine(numbers)?.to_dtype(weight.dtype()))?;
        engine(numbers.to_device(weight.device()))
    }
}
