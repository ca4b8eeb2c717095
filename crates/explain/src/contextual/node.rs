//! Heads of attention as nodes, and where their features lie.

use std::fmt;

use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use serde::{Serialize, Serializer};

/// A head of attention, at one position or at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Index of the block.
    pub block: usize,
    /// Index of the head.
    pub head: usize,
    /// The position; all of them when absent.
    pub position: Option<usize>,
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.block, self.head)?;
        match self.position {
            Some(position) => write!(f, "@{position}"),
            None => Ok(()),
        }
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where a head can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Its output before the output projection, `z`.
    Mixed,
    /// Its queries.
    Query,
    /// Its keys, which it may share with other heads.
    Key,
    /// Its values, which it may share with other heads.
    Value,
}

impl Place {
    /// Every place.
    pub const ALL: [Self; 4] = [Self::Mixed, Self::Query, Self::Key, Self::Value];

    /// The place's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
        }
    }

    /// The place of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|place| place.name() == name);
        found.ok_or_else(|| Error::invalid("place", name, "mixed, query, key or value"))
    }

    /// The site in a block.
    pub(super) fn site(self, block: usize) -> String {
        format!("blocks.{block}.attention.{}", self.name())
    }
}

/// The attention of each block.
///
/// # Errors
/// When a block has another mixer, or the model an organisation.
pub(super) fn attentions(model: &Model) -> Result<Vec<MultiHeadSpec>> {
    crate::error::require_one_stream(model, "circuits of heads")?;
    let blocks = model.spec().expanded_blocks().into_iter().enumerate();
    let attention =
        |(index, block): (usize, lapidary_parts::block::BlockSpec)| match block.attention {
            MixerSpec::MultiHead(spec) => Ok(spec),
            other => Err(Error::invalid(
                format!("mixer of block {index}"),
                other.kind(),
                "multi-head: circuits are made of heads; for other mixers see decompx and attnlrp",
            )),
        };
    blocks.map(attention).collect()
}

/// Every head of `model`, at all positions, in order.
///
/// # Errors
/// When a block has no heads.
pub fn heads(model: &Model) -> Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for (block, attention) in attentions(model)?.iter().enumerate() {
        nodes.extend((0..attention.heads).map(|head| Node {
            block,
            head,
            position: None,
        }));
    }
    Ok(nodes)
}

/// Every head of `model` at each position of sequences of `length`, in order.
///
/// # Errors
/// When a block has no heads.
pub fn heads_by_position(model: &Model, length: usize) -> Result<Vec<Node>> {
    let at = |node: Node| {
        (0..length).map(move |position| Node {
            position: Some(position),
            ..node
        })
    };
    Ok(heads(model)?.into_iter().flat_map(at).collect())
}

/// The features of `node` at a place, as a range of those that lie side by side.
pub(super) fn features(
    node: &Node,
    place: Place,
    attentions: &[MultiHeadSpec],
    width: usize,
) -> Result<std::ops::Range<usize>> {
    let attention = attentions.get(node.block).ok_or_else(|| {
        let expected = format!("below {}, the number of blocks", attentions.len());
        Error::invalid("block of a node", node.block, expected)
    })?;
    if node.head >= attention.heads {
        let expected = format!("below {} in block {}", attention.heads, node.block);
        return Err(Error::invalid("head of a node", node.head, expected));
    }
    let head = match place {
        Place::Mixed | Place::Query => node.head,
        Place::Key | Place::Value => node.head * attention.groups() / attention.heads,
    };
    let size = match place {
        Place::Query | Place::Key => attention.head_width(width),
        Place::Mixed | Place::Value => attention.value_width(width),
    };
    Ok(head * size..(head + 1) * size)
}

/// One where a set of nodes is, for the sets' nodes in `block`: `[sets, 1, length, features]`.
pub(super) fn masks(
    sets: &[Vec<Node>],
    block: usize,
    model: &Model,
    length: usize,
    (dtype, device): (DType, &Device),
) -> Result<Tensor> {
    let (attentions, width) = (attentions(model)?, model.spec().width);
    let inner = attentions.get(block).map_or(0, |attention| {
        attention.heads * attention.value_width(width)
    });
    let mut mask = vec![0f32; sets.len() * length * inner];
    let rows = mask.chunks_mut((length * inner).max(1)).zip(sets);
    for (row, set) in rows {
        for node in set.iter().filter(|node| node.block == block) {
            let range = features(node, Place::Mixed, &attentions, width)?;
            if node.position.is_some_and(|position| position >= length) {
                let expected = format!("below {length}, the number of tokens");
                return Err(Error::invalid("position of a node", node, expected));
            }
            for (position, features) in row.chunks_mut(inner.max(1)).enumerate() {
                if node.position.is_none_or(|only| only == position)
                    && let Some(own) = features.get_mut(range.clone())
                {
                    own.fill(1.0);
                }
            }
        }
    }
    let mask = engine(Tensor::from_vec(
        mask,
        (sets.len(), 1, length, inner),
        device,
    ))?;
    engine(mask.to_dtype(dtype))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_named_by_block_head_and_position() {
        let node = Node {
            block: 3,
            head: 1,
            position: None,
        };
        assert_eq!(node.to_string(), "3.1");
        let there = Node {
            position: Some(7),
            ..node
        };
        assert_eq!(there.to_string(), "3.1@7");
        for place in Place::ALL {
            assert_eq!(Place::from_name(place.name()).unwrap(), place);
        }
        let said = Place::from_name("z").unwrap_err().to_string();
        assert_eq!(said, "place is z, but must be mixed, query, key or value");
    }
}
