//! What several blocks share stands once beside them, and has to be the same for all.

use lapidary_parts::attention::mechanism::linformer::{LinformerSpec, Longer, Project, Sharing};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_parts::position::{FireSpec, PositionSpec};
use lapidary_parts::{Error, Result};

use crate::spec::ModelSpec;

/// What has the parameters that layers share.
#[derive(PartialEq)]
enum Shared {
    /// FIRE's network, and what its outputs are for: how many heads, looking back or both ways.
    Network(Box<FireSpec>, usize, bool),
    Projections(LinformerSpec),
}

impl Shared {
    /// Those of an attention, with the field that says so.
    fn of(attention: &MultiHeadSpec) -> Vec<(&'static str, Self)> {
        let mut all = Vec::new();
        if let PositionSpec::Fire(fire) = &attention.position
            && fire.shared
        {
            // These are each layer's own.
            let network = FireSpec {
                randomised: None,
                rotary: None,
                ..fire.clone()
            };
            let network = Self::Network(Box::new(network), attention.heads, attention.causal);
            all.push(("position.shared", network));
        }
        if let MechanismSpec::Linformer(linformer) = &attention.mechanism
            && linformer.sharing == Sharing::Layerwise
        {
            let projections = LinformerSpec {
                longer: Longer::default(),
                project: Project::default(),
                ..linformer.clone()
            };
            all.push(("mechanism.sharing", Self::Projections(projections)));
        }
        all
    }

    /// Whether it is of the same kind.
    fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    fn must_be(&self) -> &'static str {
        match self {
            Self::Network(..) => {
                "attention with the same network, heads and direction, since there is one network"
            }
            Self::Projections(_) => {
                "attention with the same slots, longest and projection, since there is one projection"
            }
        }
    }
}

/// The attention of a block.
fn attention(block: &BlockSpec) -> Option<&MultiHeadSpec> {
    match &block.attention {
        MixerSpec::MultiHead(attention) => Some(attention),
        _ => None,
    }
}

/// Refuses blocks that are to share what differs.
pub(crate) fn validate(spec: &ModelSpec) -> Result<()> {
    let mut known: Vec<(usize, Shared)> = Vec::new();
    for (index, block) in spec.blocks.iter().enumerate() {
        for (field, shared) in attention(block).map_or_else(Vec::new, Shared::of) {
            let Some((first, other)) = known.iter().find(|(_, one)| one.is_like(&shared)) else {
                known.push((index, shared));
                continue;
            };
            if *other != shared {
                return Err(Error::spec(
                    format!("blocks.{index}.attention.{field}"),
                    format!("another than that of blocks.{first}"),
                    shared.must_be(),
                ));
            }
        }
    }
    Ok(())
}
