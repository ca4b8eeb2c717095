//! Other forms of a factorised model.

use std::collections::BTreeMap;

use lapidary_kernels::Tensor;
use lapidary_model::{HeadSpec, InputSpec, Model, Projected};

use crate::error::engine;
use crate::factorisation::merged;
use crate::{Error, Result};

/// The model with every factorised layer multiplied out (in `f64`, rounded once): equal outputs
/// but for rounding, and nothing saved, for programs that know dense layers only.
///
/// A table of embeddings that is narrower than the model and read by no language-model head is
/// multiplied with the map that follows it.
pub fn export_dense(model: &Model) -> Result<Model> {
    let mut spec = model.spec().clone();
    let mut parameters: BTreeMap<String, Tensor> = model
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.detach()))
        .collect();
    for path in std::mem::take(&mut spec.low_rank).into_keys() {
        let down = take(&mut parameters, &format!("{path}.down"))?;
        let up = take(&mut parameters, &format!("{path}.up"))?;
        let weight = merged(&up, &down, up.dtype())?;
        parameters.insert(format!("{path}.weight"), weight);
    }
    let language_model = matches!(spec.head, HeadSpec::LanguageModel { .. });
    if let InputSpec::Tokens(tokens) = &mut spec.input
        && tokens
            .embedding_width
            .is_some_and(|width| width < spec.width)
        && tokens.projected == Projected::Token
        && !language_model
    {
        tokens.embedding_width = None;
        let table = take(&mut parameters, "embeddings.tokens.weight")?;
        let projection = take(&mut parameters, "embeddings.projection.weight")?;
        let whole = merged(&table, &engine(projection.t())?, table.dtype())?;
        parameters.insert("embeddings.tokens.weight".to_owned(), whole);
    }
    Ok(Model::new(spec, &mut parameters)?)
}

/// Every parameter, each factorised layer as two linear layers one after the other:
/// `{path}.lin0.weight` `[rank, input]`, then `{path}.lin1.weight` `[output, rank]` with
/// `{path}.lin1.bias`.
pub fn two_layer_parameters(model: &Model) -> Result<BTreeMap<String, Tensor>> {
    let mut parameters = model.parameters().clone();
    for path in model.spec().low_rank.keys() {
        let down = take(&mut parameters, &format!("{path}.down"))?;
        let up = take(&mut parameters, &format!("{path}.up"))?;
        parameters.insert(format!("{path}.lin0.weight"), down);
        parameters.insert(format!("{path}.lin1.weight"), up);
        if let Some(bias) = parameters.remove(&format!("{path}.bias")) {
            parameters.insert(format!("{path}.lin1.bias"), bias);
        }
    }
    Ok(parameters)
}

fn take(parameters: &mut BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    parameters.remove(name).ok_or_else(|| {
        Error::Model(lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason: "is missing".to_owned(),
        })
    })
}
