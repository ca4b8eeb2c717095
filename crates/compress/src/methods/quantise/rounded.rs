//! A whole matrix on its grids.

use half::f16;
use lapidary_kernels::QuantisedMatrix;
use rayon::prelude::*;

use super::grid::{Grid, GridKind};
use crate::Result;
use crate::error::engine;

/// A matrix `[output, input]` row by row, each group of a row on its own grid.
#[derive(Clone, Debug)]
pub(crate) struct Rounded {
    kind: GridKind,
    group: usize,
    dims: [usize; 2],
    codes: Vec<u32>,
    grids: Vec<Grid>,
}

impl Rounded {
    /// Every weight to the nearest number of its group's grid.
    ///
    /// # Errors
    /// When a group fits no grid.
    pub(crate) fn to_nearest(
        kind: GridKind,
        group: usize,
        dims: [usize; 2],
        weights: &[f64],
    ) -> Result<Self> {
        let size = group.max(1);
        let fitted = weights.par_chunks(size).map(|weights| kind.fit(weights));
        let fitted: Vec<Result<Grid>> = fitted.collect();
        // The first group that fits none is the one that is told, whoever came to it first.
        let grids = fitted.into_iter().collect::<Result<Vec<Grid>>>()?;
        let mut codes = vec![0; weights.len()];
        let groups = codes.par_chunks_mut(size).zip(weights.par_chunks(size));
        groups.zip(&grids).for_each(|((codes, weights), grid)| {
            let places = grid.places();
            for (code, weight) in codes.iter_mut().zip(weights) {
                *code = places.code(*weight);
            }
        });
        Ok(Self {
            kind,
            group,
            dims,
            codes,
            grids,
        })
    }

    /// From integers and grids found otherwise.
    pub(crate) fn from_parts(
        kind: GridKind,
        group: usize,
        dims: [usize; 2],
        codes: Vec<u32>,
        grids: Vec<Grid>,
    ) -> Self {
        Self {
            kind,
            group,
            dims,
            codes,
            grids,
        }
    }

    /// The numbers, row by row.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        let groups = self.codes.chunks(self.group.max(1)).zip(&self.grids);
        groups
            .flat_map(|(codes, grid)| {
                let places = grid.places();
                codes.iter().map(move |code| places.number(*code))
            })
            .collect()
    }

    /// As it is stored.
    ///
    /// # Errors
    /// When bits or group are not those of a stored matrix.
    pub(crate) fn pack(&self) -> Result<QuantisedMatrix> {
        // Bits above 8 exist for comparison only, and the matrix refuses them.
        let codes: Vec<u8> = self.codes.iter().map(|code| *code as u8).collect();
        let each = |part: fn(&Grid) -> f16| self.grids.iter().map(part).collect::<Vec<f16>>();
        let minima = (!self.kind.symmetric).then(|| each(|grid| grid.minimum));
        engine(QuantisedMatrix::pack(
            self.kind.bits,
            self.group,
            self.dims,
            &codes,
            each(|grid| grid.scale),
            minima,
        ))
    }
}
