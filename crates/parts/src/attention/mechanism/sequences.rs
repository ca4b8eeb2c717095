//! The sequences of a pass as their real tokens.
//!
//! Pads are not there: a sequence is its real tokens, numbered from 0, so that nothing depends on
//! how much a batch was padded, or at which end.

use super::MechanismPass;
use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::Tensor;

/// A row of queries or keys, and where it stands when it is asked who sees whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    /// In `[batch · heads · length]`.
    pub(super) row: usize,
    pub(super) position: usize,
}

/// The real tokens of the sequences of a pass.
#[derive(Debug)]
pub(super) struct Sequences<'a> {
    /// `[batch, heads, queries, keys]`.
    pub(super) sizes: [usize; 4],
    /// Tokens so far, pads among them.
    all: usize,
    /// Where the real tokens of each sequence lie among all; nothing where there are no pads.
    real: Option<Vec<Vec<usize>>>,
    /// What is left of earlier tokens.
    left: Option<Left<'a>>,
}

/// Which columns of keys are those of tokens, where not all are there.
#[derive(Clone, Copy, Debug)]
struct Left<'a> {
    /// Columns of something else before them.
    before: usize,
    /// Where the tokens lie among all, rising.
    places: &'a [usize],
}

impl<'a> Sequences<'a> {
    /// Those of `q` and `k`, `[batch, heads, length, width]`: queries are the last of the keys'
    /// tokens.
    pub(super) fn new(q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Self> {
        let keys = tensor(k.dim(2))?;
        Self::among(q, [keys; 2], pass)
    }

    /// Those of keys of which only some are left of earlier tokens: those at `places`, rising, with
    /// `before` columns of something else before them.
    pub(super) fn kept(
        q: &Tensor,
        places: &'a [usize],
        before: usize,
        pass: &MechanismPass<'_>,
    ) -> Result<Self> {
        let all = places.last().map_or(0, |last| last + 1);
        Ok(Self {
            left: Some(Left { before, places }),
            ..Self::among(q, [before + places.len(), all], pass)?
        })
    }

    fn among(q: &Tensor, [keys, all]: [usize; 2], pass: &MechanismPass<'_>) -> Result<Self> {
        let (batch, heads, queries, _) = tensor(q.dims4())?;
        if queries > keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("at most {keys}, the keys: a token attends to its own sequence"),
            ));
        }
        let real = match pass.keep {
            None => None,
            Some(keep) => {
                let keep = tensor(keep.to_vec2::<u8>())?;
                let real = |keep: Vec<u8>| (0..all).filter(|&j| keep.get(j) == Some(&1)).collect();
                Some(keep.into_iter().map(real).collect())
            }
        };
        Ok(Self {
            sizes: [batch, heads, queries, keys],
            all,
            real,
            left: None,
        })
    }

    /// Numbers of real tokens.
    pub(super) fn lengths(&self) -> Vec<usize> {
        let [batch, ..] = self.sizes;
        match &self.real {
            None => vec![self.all; batch],
            Some(real) => real.iter().map(Vec::len).collect(),
        }
    }

    /// Every head of every sequence.
    pub(super) fn iter(&self) -> impl Iterator<Item = Sequence<'_>> {
        let [batch, heads, ..] = self.sizes;
        (0..batch * heads).map(move |index| Sequence {
            head: index % heads,
            index,
            real: match &self.real {
                None => None,
                Some(real) => real.get(index / heads).map(Vec::as_slice),
            },
            of: self,
        })
    }
}

/// One head of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence<'a> {
    pub(super) head: usize,
    /// In `[batch · heads]`.
    pub(super) index: usize,
    /// Nothing where all tokens are.
    real: Option<&'a [usize]>,
    of: &'a Sequences<'a>,
}

impl Sequence<'_> {
    /// Which sequence of the batch it is a head of.
    pub(super) fn batch(&self) -> usize {
        let [_, heads, ..] = self.of.sizes;
        self.index / heads.max(1)
    }

    /// Number of real tokens.
    pub(super) fn len(&self) -> usize {
        self.real.map_or(self.of.all, <[usize]>::len)
    }

    /// The first token that is a query too; all after it are.
    pub(super) fn first(&self) -> usize {
        let [_, _, queries, _] = self.of.sizes;
        let earlier = self.of.all - queries;
        match self.real {
            None => earlier,
            Some(real) => real.partition_point(|&j| j < earlier),
        }
    }

    /// The tokens that are queries too.
    pub(super) fn queries(&self) -> std::ops::Range<usize> {
        self.first()..self.len()
    }

    /// A token as a query.
    pub(super) fn query(&self, token: usize) -> At {
        let [_, _, queries, _] = self.of.sizes;
        At {
            row: self.index * queries + self.place(token) + queries - self.of.all,
            position: token,
        }
    }

    /// A token as a key.
    pub(super) fn key(&self, token: usize) -> At {
        At {
            row: self.row(self.lies(token)),
            position: token,
        }
    }

    /// The row of a column of keys.
    pub(super) fn row(&self, column: usize) -> usize {
        let [.., keys] = self.of.sizes;
        self.index * keys + column
    }

    /// Where a token lies among the keys, pads among them.
    pub(super) fn lies(&self, token: usize) -> usize {
        let place = self.place(token);
        let Some(Left { before, places }) = self.of.left else {
            return place;
        };
        let column = match places.get(place) {
            Some(here) if *here == place => place,
            _ => places.partition_point(|other| *other < place),
        };
        before + column
    }

    /// Where a token lies among all, pads among them.
    pub(super) fn place(&self, token: usize) -> usize {
        match self.real {
            None => token,
            Some(real) => real.get(token).copied().unwrap_or_default(),
        }
    }

    /// The token that lies there; none where it is a pad.
    pub(super) fn token(&self, place: usize) -> Option<usize> {
        match self.real {
            None => Some(place),
            Some(real) => real.binary_search(&place).ok(),
        }
    }
}
