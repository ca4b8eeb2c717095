//! Where in an image a text is: heat maps from what attention at each patch adds.

use super::decomposition::Decomposition;
use super::zero_shot::ZeroShot;
use crate::error::engine;
use crate::faithfulness::image::{interpolated, min_max};
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};

/// Numbers over the rows and columns of an image or its patches.
#[derive(Clone, Debug, PartialEq)]
pub struct HeatMap {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Row by row.
    pub values: Vec<f64>,
}

/// The heat of a class at each patch of each image of a decomposition, of the class that `chosen`
/// has for the image:
/// `heat_i = Σ_lh entry_i · t_class − mean over classes of Σ_lh entry_i · t_class'`.
///
/// # Errors
/// When there is not one class for each image, or no such class.
pub fn heat_maps(
    decomposition: &Decomposition<'_, '_>,
    classes: &ZeroShot,
    chosen: &[usize],
) -> Result<Vec<HeatMap>> {
    let tower = decomposition.tower();
    let [rows, columns] = tower.grid();
    let tokens = decomposition.tokens()?;
    let images = engine(tokens.dim(0))?;
    if chosen.len() != images {
        let expected = format!("{images}, one for each image");
        return Err(Error::invalid("classes", chosen.len(), expected));
    }
    let of_image = |(image, class): (usize, &usize)| {
        let tokens = engine(tokens.get(image))?;
        let heat = token_heat(&tokens, classes.vectors(), *class)?;
        Ok(HeatMap {
            rows,
            columns,
            values: heat.into_iter().skip(tower.class_tokens()).collect(),
        })
    };
    chosen.iter().enumerate().map(of_image).collect()
}

/// Heat of a class at each of `tokens` `[tokens, features]`, for classes `[classes, features]`.
pub(super) fn token_heat(tokens: &Tensor, classes: &Tensor, class: usize) -> Result<Vec<f64>> {
    let count = engine(classes.dim(0))?;
    if class >= count {
        return Err(Error::invalid("class", class, format!("below {count}")));
    }
    let classes = engine(classes.to_dtype(tokens.dtype()))?;
    let mean = engine(classes.mean(0))?;
    let direction = engine(engine(classes.get(class))? - mean)?;
    let heat = engine(tokens.matmul(&engine(direction.unsqueeze(1))?))?;
    engine(engine(engine(heat.squeeze(1))?.to_dtype(DType::F64))?.to_vec1())
}

impl HeatMap {
    /// Bilinear interpolation to `rows × columns`, pixel centres aligned as PyTorch does without
    /// `align_corners`; beyond the outermost centres the map is level.
    pub fn upsampled(&self, rows: usize, columns: usize) -> Self {
        let values = interpolated(&self.values, [self.rows, self.columns], [rows, columns]);
        Self {
            rows,
            columns,
            values,
        }
    }

    /// Clipped at zero, then stretched to reach from 0 to 1; all zero when the map is level.
    pub fn normalised(&self) -> Self {
        let clipped: Vec<f64> = self.values.iter().map(|value| value.max(0.0)).collect();
        Self {
            values: min_max(&clipped),
            ..*self
        }
    }

    /// Where the map is above its mean.
    pub fn mask(&self) -> Vec<bool> {
        let mean = self.values.iter().sum::<f64>() / self.values.len().max(1) as f64;
        self.values.iter().map(|value| *value > mean).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    #[test]
    fn interpolation_is_bilinear_between_centres_and_level_beyond() {
        let map = HeatMap {
            rows: 1,
            columns: 2,
            values: vec![0.0, 1.0],
        };
        // What torch.nn.functional.interpolate gives for a doubled width.
        assert_eq!(map.upsampled(2, 4).values, [0.0, 0.25, 0.75, 1.0].repeat(2));
        let whole = HeatMap {
            rows: 2,
            columns: 2,
            values: vec![-1.0, 1.0, 3.0, 2.0],
        };
        assert_eq!(whole.upsampled(2, 2), whole);
        assert_eq!(whole.normalised().values, [0.0, 1.0 / 3.0, 1.0, 2.0 / 3.0]);
        assert_eq!(whole.normalised().mask(), [false, false, true, true]);
        let level = HeatMap {
            values: vec![2.0; 4],
            ..whole
        };
        assert_eq!(level.normalised().mask(), [false; 4]);
    }

    #[test]
    fn one_class_has_no_heat_and_a_shift_of_all_classes_changes_none() {
        let tokens = Tensor::new(&[[1.0, -2.0], [0.5, 3.0]], &Device::Cpu).unwrap();
        let one = Tensor::new(&[[0.3, 0.7]], &Device::Cpu).unwrap();
        assert_eq!(token_heat(&tokens, &one, 0).unwrap(), [0.0, 0.0]);
        let classes = Tensor::new(&[[0.3, 0.7], [-1.0, 2.0]], &Device::Cpu).unwrap();
        let shifted = (&classes + 5.0).unwrap();
        let heat = token_heat(&tokens, &classes, 1).unwrap();
        for (a, b) in heat.iter().zip(token_heat(&tokens, &shifted, 1).unwrap()) {
            assert!(a.abs() > 0.1 && (a - b).abs() < 1e-12);
        }
        assert!(token_heat(&tokens, &classes, 2).is_err());
    }
}
