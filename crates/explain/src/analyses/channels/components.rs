//! The rank-one components of what heads write, and how strongly later heads read them.
//!
//! With `W_OV = W_V W_O = Σ_i s_i u_i v_iᵀ`, component `i` reads `u_i` and writes `v_i`. A later
//! head reads through `W`: for its queries `W = W_QK = W_Q W_Kᵀ`, for its keys `W = W_QKᵀ`, for
//! its values `W = W_OV`. The composition score (Elhage et al., A Mathematical Framework for
//! Transformer Circuits, 2021) `‖W_1 W‖_F / (‖W_1‖_F ‖W‖_F)` of one component is
//! `‖v_iᵀ W‖ / ‖W‖_F` (Merullo, Eickhoff & Pavlick, Talking Heads, 2024, arXiv 2406.09519).
//!
//! No `width × width` matrix is formed: `W = A Bᵀ` with thin factors, and with `B = Q R` both
//! norms are those of the thin `A Rᵀ`.

use super::heads::{Head, HeadId};
use crate::Result;
use lapidary_factor::{Matrix, MatrixView, Svd, frobenius_norm, qr, thin_svd};
use serde::Serialize;
use std::fmt;

/// A head's `W_OV` as a sum of rank-one components.
#[derive(Clone, Debug)]
pub struct Components {
    /// The head that writes them.
    pub head: HeadId,
    /// `u_i`, a column each: `[width, components]`.
    pub reads: Matrix,
    /// `s_i`, largest first.
    pub strengths: Vec<f64>,
    /// `v_i`, a row each: `[components, width]`.
    pub writes: Matrix,
}

impl Components {
    /// The components of a head: QR of both thin factors, SVD of the `head_width × head_width`
    /// core between them.
    pub fn of(head: &Head) -> Result<Self> {
        let values = qr(head.value.as_ref());
        let outputs = qr(head.output.transpose());
        let core = &values.r * outputs.r.transpose();
        let Svd { u, s, vt } = thin_svd(core.as_ref())?;
        Ok(Self {
            head: head.id,
            reads: &values.q * u,
            strengths: s,
            writes: vt * outputs.q.transpose(),
        })
    }

    /// Number of components.
    pub fn count(&self) -> usize {
        self.strengths.len()
    }

    /// `‖W_OV‖_F`.
    pub fn norm(&self) -> f64 {
        self.strengths.iter().map(|s| s * s).sum::<f64>().sqrt()
    }

    /// The unit direction `v_i` that a component writes, `[width]`.
    ///
    /// # Errors
    /// When there is no such component.
    pub fn direction(&self, component: usize) -> Result<Vec<f64>> {
        if component >= self.count() {
            return Err(crate::Error::invalid(
                format!("component of head {}", self.head),
                component,
                format!("below {}", self.count()),
            ));
        }
        Ok(self.writes.row(component).iter().copied().collect())
    }
}

/// Which input of a later head is composed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Composition {
    /// What it looks for.
    Query,
    /// Where it is found.
    Key,
    /// What it moves.
    Value,
}

impl Composition {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Query, Self::Key, Self::Value];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
        }
    }
}

impl fmt::Display for Composition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One way in which a head reads the residual stream.
#[derive(Clone, Debug)]
pub struct Reader {
    /// The head that reads.
    pub head: HeadId,
    /// What for.
    pub composition: Composition,
    /// Orthonormal columns that span what is read, `[width, head_width]`.
    basis: Matrix,
    /// `W = basis · core · (orthonormal)ᵀ`.
    core: Matrix,
    norm: f64,
}

impl Reader {
    /// How `head` reads for `composition`.
    pub fn of(head: &Head, composition: Composition) -> Self {
        let (left, right) = match composition {
            Composition::Query => (head.query.as_ref(), head.key.as_ref()),
            Composition::Key => (head.key.as_ref(), head.query.as_ref()),
            Composition::Value => (head.value.as_ref(), head.output.transpose()),
        };
        let (left, right) = (qr(left), qr(right));
        let core = &left.r * right.r.transpose();
        Self {
            head: head.id,
            composition,
            norm: frobenius_norm(core.as_ref()),
            basis: left.q,
            core,
        }
    }

    /// `‖W‖_F`.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// `‖xᵀ W‖ / ‖W‖_F` for each row `x` of `directions` `[count, width]`: the composition scores
    /// of components when the rows are their unit directions.
    pub fn scores(&self, directions: MatrixView<'_>) -> Vec<f64> {
        let read = directions * &self.basis * &self.core;
        let norm = if self.norm > 0.0 { self.norm } else { 1.0 };
        (0..read.nrows())
            .map(|row| read.row(row).norm_l2() / norm)
            .collect()
    }

    /// The composition score of a whole head, `‖W_OV W‖_F / (‖W_OV‖_F ‖W‖_F)`: components are
    /// orthogonal, so that their squares add up.
    pub fn score_of_head(&self, writer: &Components) -> f64 {
        let scores = self.scores(writer.writes.as_ref());
        let squares = writer.strengths.iter().zip(scores);
        let sum: f64 = squares.map(|(s, score)| (s * score).powi(2)).sum();
        match writer.norm() {
            0.0 => 0.0,
            norm => sum.sqrt() / norm,
        }
    }

    /// The orthonormal directions that are read, a column each `[width, head_width]`, and their
    /// singular values in `W`, largest first. The squared score of a unit vector `v` is
    /// `Σ_j (v · a_j)² σ_j² / Σ_j σ_j²`.
    pub fn directions(&self) -> Result<(Matrix, Vec<f64>)> {
        let svd = thin_svd(self.core.as_ref())?;
        Ok((&self.basis * svd.u, svd.s))
    }

    /// `|v_i · a_j| σ_j / ‖W‖_F`, a row for each component of `writer` and a column for each
    /// direction read: both heads taken apart.
    pub fn alignments(&self, writer: &Components) -> Result<Matrix> {
        let (directions, strengths) = self.directions()?;
        let products = &writer.writes * directions;
        let norm = if self.norm > 0.0 { self.norm } else { 1.0 };
        Ok(Matrix::from_fn(
            products.nrows(),
            products.ncols(),
            |i, j| products[(i, j)].abs() * strengths.get(j).copied().unwrap_or(0.0) / norm,
        ))
    }

    /// Singular values of `W`, largest first.
    pub fn strengths(&self) -> Result<Vec<f64>> {
        Ok(thin_svd(self.core.as_ref())?.s)
    }
}
