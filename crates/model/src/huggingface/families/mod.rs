//! What each family's `config.json` and tensor names mean.
//!
//! A family is a function from its config to a [`Tower`]: the spec of the model, and for every
//! tensor of the checkpoint which parameters of the model it holds and how they are laid out in
//! it. The same table reads a checkpoint and writes it back.

mod albert;
mod bert;
mod clip;
mod gpt2;
mod llama;
mod mamba;
mod mamba2;
mod opt;
mod recurrent;
mod table;
mod vit;

pub use table::{Layout, NameTable, StoredTensor};

use std::collections::BTreeMap;

use super::config::{Config, Family};
use crate::spec::ModelSpec;
use crate::{Error, Result};
use lapidary_kernels::Activation;
use lapidary_parts::activation::ActivationSpec;

/// One model of a checkpoint: nearly always the only one; CLIP has two.
#[derive(Clone, Debug)]
pub struct Tower {
    /// Empty, or which of several (`text`, `vision`).
    pub name: &'static str,
    /// The model.
    pub spec: ModelSpec,
    /// Where its parameters are stored.
    pub table: NameTable,
}

/// The shape of each stored tensor, by name.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// The towers that `config` describes. `stored` is only asked which optional heads there are.
pub fn towers(config: &Config, stored: &Shapes) -> Result<Vec<Tower>> {
    let architecture = Architecture::new(config, stored);
    match &config.family {
        Family::Albert(family) => albert::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Gpt2(family) => gpt2::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Opt(family) => opt::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Llama(family) => llama::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Bert(family) => bert::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Vit(family) => vit::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Mamba(family) => mamba::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Mamba2(family) => mamba2::tower(family, &architecture).map(|tower| vec![tower]),
        Family::Clip(family) => clip::towers(family),
    }
}

/// What a family asks about the checkpoint at hand.
struct Architecture<'a> {
    config: &'a Config,
    stored: &'a Shapes,
    name: &'a str,
}

impl<'a> Architecture<'a> {
    fn new(config: &'a Config, stored: &'a Shapes) -> Self {
        let name = config.architectures.first().map_or("", String::as_str);
        Self {
            config,
            stored,
            name,
        }
    }

    /// Whether some tensor's name ends with `suffix`.
    fn holds(&self, suffix: &str) -> bool {
        self.stored.keys().any(|name| name.ends_with(suffix))
    }

    /// Rows of the stored matrix whose name ends with `suffix`: how many classes a classifier
    /// has.
    fn rows(&self, suffix: &str) -> Result<usize> {
        let missing = || self.wrong(&format!("one whose checkpoint has a tensor {suffix}"));
        let (_, shape) = self
            .stored
            .iter()
            .find(|(name, _)| name.ends_with(suffix))
            .ok_or_else(missing)?;
        shape.first().copied().ok_or_else(missing)
    }

    fn wrong(&self, expected: &str) -> Error {
        lapidary_parts::Error::spec(
            "architectures of config.json",
            &self.config.architectures,
            expected,
        )
        .into()
    }
}

fn activation(activation: Activation, field: &str) -> Result<ActivationSpec> {
    Ok(match activation {
        Activation::Identity => ActivationSpec::Identity,
        Activation::Relu => ActivationSpec::Relu,
        Activation::Gelu => ActivationSpec::Gelu,
        Activation::GeluTanh => ActivationSpec::GeluTanh,
        Activation::QuickGelu => ActivationSpec::QuickGelu,
        Activation::Silu => ActivationSpec::Silu,
        Activation::Tanh => ActivationSpec::Tanh,
        Activation::Sigmoid => ActivationSpec::Sigmoid,
        other @ (Activation::Exp | Activation::Softplus) => {
            let expected = "an activation of feed-forward parts, such as gelu, relu or silu";
            return Err(lapidary_parts::Error::spec(field, other, expected).into());
        }
    })
}
