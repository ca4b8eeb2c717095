//! Ways through the patches of an image.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Curves over an image whose patches follow each other row by row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LionImage {
    /// Patches in a row.
    pub columns: usize,
    /// The curves, each with a decay of its own.
    #[serde(default = "both")]
    pub curves: Vec<Curve>,
}

fn both() -> Vec<Curve> {
    vec![Curve::Rows, Curve::Columns]
}

/// A way through all patches that steps from neighbour to neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Curve {
    /// Along the rows, every other one backwards.
    Rows,
    /// Along the columns, every other one upwards.
    Columns,
}

impl Curve {
    /// The patches of an image in the order of the curve, where patch `r · columns + c` stands in
    /// row `r`; the last row may be short.
    pub fn order(self, patches: usize, columns: usize) -> Vec<usize> {
        let columns = columns.max(1);
        let rows = patches.div_ceil(columns);
        let (lines, length) = match self {
            Self::Rows => (rows, columns),
            Self::Columns => (columns, rows),
        };
        let all = (0..lines).flat_map(|line| {
            (0..length).map(move |along| {
                let along = if line % 2 == 0 {
                    along
                } else {
                    length - 1 - along
                };
                match self {
                    Self::Rows => line * columns + along,
                    Self::Columns => along * columns + line,
                }
            })
        });
        all.filter(|patch| *patch < patches).collect()
    }
}
