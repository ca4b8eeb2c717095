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
        let (field, mechanism) = match &attention.mechanism {
            MechanismSpec::Subsampled(spec) => ("mechanism.inner.sharing", spec.inner.as_ref()),
            other => ("mechanism.sharing", other),
        };
        if let MechanismSpec::Linformer(linformer) = mechanism
            && linformer.sharing == Sharing::Layerwise
        {
            let projections = LinformerSpec {
                longer: Longer::default(),
                project: Project::default(),
                ..linformer.clone()
            };
            all.push((field, Self::Projections(projections)));
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

/// The attentions of a block, with the fields that they stand in.
fn attentions(block: &BlockSpec) -> Vec<(&'static str, &MultiHeadSpec)> {
    let (field, mixer) = match &block.attention {
        MixerSpec::Wavelet(wavelet) => ("attention.inner", wavelet.inner.as_ref()),
        mixer => ("attention", mixer),
    };
    let own = match mixer {
        MixerSpec::MultiHead(attention) => Some((field, attention)),
        _ => None,
    };
    let cross = block.cross_attention.as_ref();
    let cross = cross.map(|attention| ("cross_attention", attention));
    own.into_iter().chain(cross).collect()
}

/// Refuses blocks that are to share what differs, that of an organisation's own layers too.
pub(crate) fn validate(spec: &ModelSpec) -> Result<()> {
    let mut known: Vec<(String, Shared)> = Vec::new();
    let organisation = spec.organisation.as_ref();
    let own = organisation.and_then(|organisation| organisation.own().0);
    let own = own.map(|block| ("organisation.block".to_owned(), block));
    let blocks = spec.blocks.iter().enumerate();
    let blocks = blocks.map(|(index, block)| (format!("blocks.{index}"), block));
    for (path, block) in blocks.chain(own) {
        for (place, attention) in attentions(block) {
            for (field, shared) in Shared::of(attention) {
                let Some((first, other)) = known.iter().find(|(_, one)| one.is_like(&shared))
                else {
                    known.push((path.clone(), shared));
                    continue;
                };
                if *other != shared {
                    return Err(Error::spec(
                        format!("{path}.{place}.{field}"),
                        format!("another than that of {first}"),
                        shared.must_be(),
                    ));
                }
            }
        }
    }
    Ok(())
}
