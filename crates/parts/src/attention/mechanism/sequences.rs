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
pub(super) struct Sequences {
    /// `[batch, heads, queries, keys]`.
    pub(super) sizes: [usize; 4],
    /// Tokens so far, pads among them.
    all: usize,
    /// Where the real tokens of each sequence lie among all.
    real: Vec<Vec<usize>>,
    /// Where each of all lies among the keys; itself where all are there.
    rows: Option<Vec<usize>>,
}

impl Sequences {
    /// Those of `q` and `k`, `[batch, heads, length, width]`: queries are the last of the keys'
    /// tokens.
    pub(super) fn new(q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Self> {
        let all = tensor(k.dim(2))?;
        Self::among(q, k, all, pass)
    }

    /// Those of keys of which only some are left of earlier tokens: those at `places`, rising.
    pub(super) fn kept(
        q: &Tensor,
        k: &Tensor,
        places: &[usize],
        pass: &MechanismPass<'_>,
    ) -> Result<Self> {
        let all = places.last().map_or(0, |last| last + 1);
        let mut rows = vec![0; all];
        for (row, &place) in places.iter().enumerate() {
            if let Some(at) = rows.get_mut(place) {
                *at = row;
            }
        }
        Ok(Self {
            rows: Some(rows),
            ..Self::among(q, k, all, pass)?
        })
    }

    fn among(q: &Tensor, k: &Tensor, all: usize, pass: &MechanismPass<'_>) -> Result<Self> {
        let (batch, heads, queries, _) = tensor(q.dims4())?;
        let keys = tensor(k.dim(2))?;
        if queries > keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("at most {keys}, the keys: a token attends to its own sequence"),
            ));
        }
        let real = match pass.keep {
            None => vec![(0..all).collect(); batch],
            Some(keep) => {
                let keep = tensor(keep.to_vec2::<u8>())?;
                let real = |keep: Vec<u8>| (0..all).filter(|&j| keep.get(j) == Some(&1)).collect();
                keep.into_iter().map(real).collect()
            }
        };
        Ok(Self {
            sizes: [batch, heads, queries, keys],
            all,
            real,
            rows: None,
        })
    }

    /// Numbers of real tokens.
    pub(super) fn lengths(&self) -> Vec<usize> {
        self.real.iter().map(Vec::len).collect()
    }

    /// Every head of every sequence.
    pub(super) fn iter(&self) -> impl Iterator<Item = Sequence<'_>> {
        let [_, heads, ..] = self.sizes;
        self.real.iter().enumerate().flat_map(move |(batch, real)| {
            (0..heads).map(move |head| Sequence {
                head,
                index: batch * heads + head,
                real,
                of: self,
            })
        })
    }
}

/// One head of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence<'a> {
    pub(super) head: usize,
    /// In `[batch · heads]`.
    pub(super) index: usize,
    real: &'a [usize],
    of: &'a Sequences,
}

impl Sequence<'_> {
    /// Number of real tokens.
    pub(super) fn len(&self) -> usize {
        self.real.len()
    }

    /// The first token that is a query too; all after it are.
    pub(super) fn first(&self) -> usize {
        let [_, _, queries, _] = self.of.sizes;
        self.real.partition_point(|&j| j < self.of.all - queries)
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
        let [.., keys] = self.of.sizes;
        At {
            row: self.index * keys + self.lies(token),
            position: token,
        }
    }

    /// Where a token lies among the keys, pads among them.
    pub(super) fn lies(&self, token: usize) -> usize {
        let place = self.place(token);
        match &self.of.rows {
            None => place,
            Some(rows) => rows.get(place).copied().unwrap_or_default(),
        }
    }

    /// Where a token lies among all, pads among them.
    pub(super) fn place(&self, token: usize) -> usize {
        self.real.get(token).copied().unwrap_or_default()
    }
}
