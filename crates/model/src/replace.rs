//! The same weights behind another mechanism of attention.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Tensor};
use lapidary_parts::attention::{MechanismSpec, MixerSpec};
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_parts::{Error, Result};

use crate::{Initialiser, Model};

impl Model {
    /// A model with the parameters of this one, in which every multi-head attention mixes by
    /// `mechanism`. Parameters that the mechanism has of its own start from `seed`, but where the model has them already:
    /// for a mechanism of the same kind in every such attention, and of the same shape.
    ///
    /// ```
    /// # use lapidary_kernels::{DType, Device};
    /// # use lapidary_model::{Model, ModelSpec};
    /// # use lapidary_parts::attention::MechanismSpec;
    /// # let spec: ModelSpec = toml::from_str(r#"
    /// # width = 8
    /// # input = { kind = "tokens", vocabulary = 11, length = 16 }
    /// # blocks = [{ attention = { kind = "multi-head", heads = 2 } }]
    /// # head = { kind = "none" }
    /// # "#)?;
    /// # let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu)?;
    /// let mechanism: MechanismSpec = toml::from_str("kind = 'linformer'\nslots = 4\nlongest = 16")?;
    /// let linear = model.with_mechanism(&mechanism, 0)?;
    /// assert_eq!(linear.parameter_count(), model.parameter_count() + 2 * 4 * 16);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// When no block has such attention, or one asks for something that the mechanism cannot do; and when the
    /// mechanism has more parameters than are given initial values (4 294 967 296).
    pub fn with_mechanism(&self, mechanism: &MechanismSpec, seed: u64) -> Result<Self> {
        let mut spec = self.spec().clone();
        let (mut replaced, mut alike) = (0, true);
        for block in &mut spec.blocks {
            if let MixerSpec::MultiHead(attention) = &mut block.attention {
                alike &= attention.mechanism.kind() == mechanism.kind();
                attention.mechanism = mechanism.clone();
                if mechanism
                    .spec()
                    .is_some_and(|described| !described.is_scaled())
                {
                    attention.scale = None;
                }
                replaced += 1;
            }
        }
        if replaced == 0 {
            return Err(Error::spec(
                "mechanism of attention",
                mechanism.kind(),
                "asked for where a block has multi-head attention",
            ));
        }
        spec.check_rest_can_be_made(self.spec())?;
        let mut source = Known {
            parameters: self.parameters(),
            alike,
            fresh: Initialiser::new(seed, self.dtype(), self.device()),
        };
        Self::new(spec, &mut source)
    }
}

/// Ready parameters, and initial values where there are none.
struct Known<'a> {
    parameters: &'a BTreeMap<String, Tensor>,
    /// Whether mechanisms are of the kind that they were of.
    alike: bool,
    fresh: Initialiser,
}

impl Known<'_> {
    /// The parameter `name`, unless it was that of another mechanism.
    fn known(&self, name: &str, shape: &[usize]) -> Option<&Tensor> {
        let parameter = self.parameters.get(name)?;
        let same = parameter.dims() == shape;
        let kept = match name {
            // Only Linformer's projections are there.
            _ if name.starts_with("linformer.") => same,
            _ if name.starts_with("blocks.") && name.contains(".attention.mechanism.") => {
                same && self.alike
            }
            _ => true,
        };
        kept.then_some(parameter)
    }
}

impl ParameterSource for Known<'_> {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        match self.known(name, shape) {
            Some(parameter) => Ok(parameter.clone()),
            None => self.fresh.parameter(name, shape, init),
        }
    }

    fn packed(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        match self.parameters.get(name) {
            Some(parameter) => Ok(parameter.clone()),
            None => self.fresh.packed(name, shape, dtype),
        }
    }

    fn dtype(&self) -> DType {
        self.fresh.dtype()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelSpec;
    use lapidary_kernels::Device;

    fn mechanism(text: &str) -> MechanismSpec {
        toml::from_str(text).unwrap()
    }

    /// What a mechanism has learned is kept for another setting of it, and never taken for what another one has learned.
    #[test]
    fn parameters_of_a_mechanism_are_not_those_of_another() {
        let spec: ModelSpec = toml::from_str(
            "width = 8
            input = { kind = 'tokens', vocabulary = 11, length = 16 }
            head = { kind = 'none' }
            [[blocks]]
            repeat = 2
            attention = { kind = 'multi-head', heads = 2, mechanism = { kind = 'lion', decay = 'constant' } }",
        )
        .unwrap();
        let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu).unwrap();
        let name = "blocks.1.attention.mechanism.decay";
        let numbers = |model: &Model, name: &str| {
            let flat = model.parameters()[name].flatten_all().unwrap();
            flat.to_vec1::<f32>().unwrap()
        };
        let of = |model: &Model, text: &str| model.with_mechanism(&mechanism(text), 5).unwrap();
        let scaled = model.parameters()[name].affine(0.5, 0.25).unwrap();
        let mut trained = model.parameters().clone();
        trained.insert(name.to_owned(), scaled);
        let trained = Model::new(model.spec().clone(), &mut trained).unwrap();
        let recurrent = "kind = 'lion'\ndecay = 'constant'\nform = { kind = 'recurrent' }";
        let same = of(&trained, recurrent);
        assert_eq!(numbers(&same, name), numbers(&trained, name));
        // A decay of each feature is of another shape.
        let fresh = of(
            &trained,
            "kind = 'lion'\ndecay = 'constant'\nper_feature = true",
        );
        assert_eq!(fresh.parameters()[name].dims(), [1, 2, 4]);
        let linformer = "kind = 'linformer'\nslots = 4\nlongest = 16\nsharing = 'layerwise'";
        let linear = of(&trained, linformer);
        let wider = of(&linear, &linformer.replace("slots = 4", "slots = 6"));
        assert_eq!(wider.parameters()["linformer.both"].dims(), [1, 6, 16]);
        let again = of(&linear, linformer);
        assert_eq!(
            numbers(&again, "linformer.both"),
            numbers(&linear, "linformer.both")
        );
        let other = of(&of(&trained, "kind = 'softmax'"), linformer);
        assert_eq!(
            numbers(&other, "linformer.both"),
            numbers(&linear, "linformer.both")
        );
    }

    #[test]
    fn more_new_parameters_than_can_be_made_are_refused() {
        let spec: ModelSpec = toml::from_str(
            "width = 8\ninput = { kind = 'tokens', vocabulary = 11, length = 16 }\nhead = { kind = 'none' }\n\
             blocks = [{ attention = { kind = 'multi-head', heads = 2 } }]",
        )
        .unwrap();
        let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu).unwrap();
        let text = "kind = 'linformer'\nslots = 4096\nlongest = 16777216";
        let mechanism: MechanismSpec = toml::from_str(text).unwrap();
        let refused = model.with_mechanism(&mechanism, 0).err();
        assert_eq!(
            refused.map(|error| error.to_string()).as_deref(),
            Some("number of new parameters is 137438953472, but must be at most 4294967296")
        );
    }
}
