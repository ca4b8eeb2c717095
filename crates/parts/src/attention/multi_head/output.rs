//! What maps the heads' values to the stream: a matrix of its own, the queries' transposed, or nothing.

use super::{MultiHeadAttention, MultiHeadSpec, QueryKeySharing};
use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::{D, Tensor};
use lapidary_signal::{Lens, Linear, Matrix, Signal, Weight};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What maps the heads' values to the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OutputProjection {
    /// A matrix of its own.
    #[default]
    Own,
    /// That of the queries, transposed, without a bias: tokens are written by the bases that they are read by, `Σ_k U_k
    /// (U_kᵀ Z) softmax(…)`, as the step of CRATE is derived (Yu et al., arXiv 2306.01129). Where queries are values.
    Tied,
    /// Nothing: what the heads give, side by side, is written as it is, which has to be as wide as the stream; as in
    /// CRATE's program with one head of the whole width.
    Absent,
}

impl OutputProjection {
    /// Whether there is a matrix of its own.
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    pub fn is_own(&self) -> bool {
        *self == Self::Own
    }

    /// Its name in a spec.
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Tied => "tied",
            Self::Absent => "absent",
        }
    }
}

impl MultiHeadSpec {
    pub(super) fn validate_output(&self, width: usize, field: &str) -> Result<()> {
        let refuse = |found: &str, expected: String| {
            Err(Error::spec(format!("{field}.output"), found, expected))
        };
        let name = self.output.name();
        match self.output {
            OutputProjection::Own => return Ok(()),
            OutputProjection::Tied if self.sharing != QueryKeySharing::All => {
                let expected = "own, or sharing = \"all\" beside it: values are written by the \
                                matrix of the queries";
                return refuse(name, expected.to_owned());
            }
            OutputProjection::Tied => {}
            OutputProjection::Absent => {
                let mixed = self.heads * self.value_width(width);
                if mixed != width {
                    let expected = format!(
                        "own where heads give {mixed} features and tokens have {width}, or as many"
                    );
                    return refuse(name, expected);
                }
            }
        }
        match self.output_bias {
            Some(true) => Err(Error::spec(
                format!("{field}.output_bias"),
                true,
                format!("false or absent where the output is {name}"),
            )),
            Some(false) | None => Ok(()),
        }
    }
}

/// The layer that writes by what `query` of the attention at `path` reads by.
pub(super) fn tied(query: &Linear, path: &str) -> Result<Linear> {
    // Views: what is trained is the queries' own.
    let across = |matrix: &Matrix| -> Result<Matrix> {
        match matrix {
            Matrix::Dense(weight) => Ok(Matrix::Dense(tensor(weight.t())?)),
            Matrix::Quantised { .. } => Err(Error::spec(
                format!("quantised.{path}.query.weight"),
                "given",
                "absent where the output is tied to the queries",
            )),
        }
    };
    let weight = match query.weight() {
        Weight::Whole(matrix) => Weight::Whole(across(matrix)?),
        Weight::LowRank { down, up } => Weight::LowRank {
            down: across(up)?,
            up: across(down)?,
        },
    };
    Ok(Linear::from_weight(weight, None)?)
}

impl MultiHeadAttention {
    /// What is written of what the heads give, `[batch, query, heads · value_width]`.
    pub(super) fn written(&self, mixed: Signal) -> Result<Signal> {
        let numbers = matches!(
            mixed.lens(),
            Lens::Plain | Lens::Meter(..) | Lens::Rounded(_) | Lens::Integers(_)
        );
        match &self.output {
            Some(output) => Ok(mixed.linear_output(output)?),
            None if numbers => Ok(mixed),
            // What a lens keeps back until the output, such as the bias of values, has its place here too.
            None => {
                let width = tensor(mixed.value().dim(D::Minus1))?;
                let same = tensor(Tensor::eye(width, mixed.dtype(), mixed.device()))?;
                Ok(mixed.linear_output(&Linear::new(same, None)?)?)
            }
        }
    }
}
