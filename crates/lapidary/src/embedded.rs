//! The model that comes with the program.

use std::path::Path;

use lapidary_kernels::DType;
use lapidary_model::{Checkpoint, Limits, Model, ModelSpec, Package, Tokenizer};
use lapidary_parts::parameters::{Init, ParameterSource};

const SPEC: &str = include_str!("../embedded/lapidary.json");
const WEIGHTS: &[u8] = include_bytes!("../embedded/model.safetensors");
const TOKENIZER: &str = include_str!("../embedded/tokenizer.json");

/// The spec and seed that the embedded model was trained from, for `lapidary train`.
pub const EMBEDDED_TRAINING: &str = include_str!("../embedded/train.toml");

/// A small decoder of the English-like language of
/// [`lapidary_train::language`], trained by `lapidary train` from
/// [`EMBEDDED_TRAINING`].
pub fn embedded() -> lapidary_model::Result<Package> {
    let spec: ModelSpec = serde_json::from_str(SPEC).map_err(|error| {
        lapidary_parts::Error::spec("embedded spec", error.to_string(), "a model spec")
    })?;
    let limits = Limits::default();
    let checkpoint = Checkpoint::from_bytes("embedded model", WEIGHTS, &limits)?;
    let model = Model::new(spec, &mut Source(checkpoint))?;
    let tokenizer = Tokenizer::from_json(Path::new("embedded tokenizer"), TOKENIZER)?;
    Ok(Package::new(model, Some(tokenizer)))
}

struct Source(Checkpoint);

impl ParameterSource for Source {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        _: Init,
    ) -> lapidary_parts::Result<lapidary_kernels::Tensor> {
        self.0
            .tensor_of_shape(name, shape, DType::F32)
            .map_err(|error| lapidary_parts::Error::Parameter {
                name: name.to_owned(),
                reason: error.to_string(),
            })
    }
}
