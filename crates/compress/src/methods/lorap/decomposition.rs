//! How a matrix of attention becomes two.

use lapidary_factor::{Matrix, Metric, WeightedSvd, matrix_to_tensor, symmetric_eigen};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::MixerSpec;
use serde::{Deserialize, Serialize};

use crate::edit::{Edit, block_of};
use crate::error::engine;
use crate::requirements::Statistic;
use crate::{Calibration, Error, Result};

/// A variance of at most this share of the mean square is the rounding of sums in single precision.
const CONSTANT: f64 = 1e-6;

/// What a factorisation of attention's matrices makes small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LorapDecomposition {
    /// `Σ_j c_j ‖(W − L R)_{:,j}‖²`, `c_j` the mean square of input `j`: the error of the outputs if inputs
    /// were not correlated (AWSVD).
    #[default]
    Weighted,
    /// `‖W − L R‖²`: plain SVD.
    Plain,
    /// The variance of the outputs that is lost (atomic feature mimicking: Yu & Wu 2023, AAAI 37). With the
    /// eigenvectors `U` of the largest eigenvalues of `E[y yᵀ] − ȳ ȳᵀ`,
    ///
    /// ```text
    /// ŷ = U Uᵀ (y − ȳ) + ȳ,   L = U,   R = Uᵀ W,   b' = b + (W − L R) x̄
    /// ```
    ///
    /// which no other affine map of that rank comes nearer to. Queries, keys and values get biases, and
    /// the output one of its own, where there are none.
    Features,
}

impl LorapDecomposition {
    /// What has to be known of what a matrix reads at `site`.
    pub(super) fn statistics(self, site: &str) -> Vec<Statistic> {
        let site = || site.to_owned();
        match self {
            Self::Weighted => vec![Statistic::InputSquares { site: site() }],
            Self::Plain => Vec::new(),
            Self::Features => vec![
                Statistic::Covariance { site: site() },
                Statistic::InputMeans { site: site() },
            ],
        }
    }
}

/// Puts two factors of `rank` in the place of the matrix at `path`, which reads `site`, and says how much of
/// its energy they hold.
pub(super) fn factorise(
    edit: &mut Edit,
    path: &str,
    rank: usize,
    way: LorapDecomposition,
    site: &str,
    calibration: &Calibration,
) -> Result<String> {
    let name = format!("{path}.weight");
    let weight = edit.get(&name)?;
    let site = || site.to_owned();
    let decomposed = match way {
        LorapDecomposition::Plain => WeightedSvd::new(&weight, &Metric::Plain),
        LorapDecomposition::Weighted => {
            let squares = calibration.vector(&Statistic::InputSquares { site: site() })?;
            match squares.iter().all(|square| *square == 0.0) {
                true => WeightedSvd::new(&weight, &Metric::Plain),
                false => WeightedSvd::new(&weight, &Metric::InputSquares(&squares)),
            }
        }
        LorapDecomposition::Features => match centred(calibration, path, site)? {
            Some(covariance) => WeightedSvd::new(&weight, &Metric::Covariance(&covariance)),
            None => WeightedSvd::new(&weight, &Metric::Plain),
        },
    };
    let layer = |reason| Error::Layer {
        layer: path.to_owned(),
        reason,
    };
    let found = decomposed
        .and_then(|svd| svd.truncate(rank))
        .map_err(layer)?;
    edit.parameters.remove(&name);
    let factors = found.factors;
    if way == LorapDecomposition::Features {
        let mean = calibration.tensor(&Statistic::InputMeans { site: site() })?;
        let mean = engine(engine(mean.to_device(weight.device()))?.unsqueeze(1))?;
        let lost = engine(&weight - engine(factors.up.matmul(&factors.down))?)?;
        let constant = engine(engine(lost.matmul(&mean))?.squeeze(1))?;
        add_bias(edit, path, &constant)?;
    }
    edit.put(format!("{path}.down"), &factors.down)?;
    edit.put(format!("{path}.up"), &factors.up)?;
    edit.spec.low_rank.insert(path.to_owned(), rank);
    let (input, output) = (engine(weight.dim(1))?, engine(weight.dim(0))?);
    let lost = match found.total_energy > 0.0 {
        true => found.discarded_energy / found.total_energy,
        false => 0.0,
    };
    Ok(format!(
        "{rank} of {} directions hold {:.2} % of the squared singular values",
        input.min(output),
        100.0 * (1.0 - lost)
    ))
}

/// `E[x xᵀ] − x̄ x̄ᵀ` of what is read at a site; nothing where all of it is constant but for rounding.
///
/// The difference of two sums that are nearly the same has negative eigenvalues where a mean is large beside what
/// varies. They are rounding, and count as zero.
fn centred(
    calibration: &Calibration,
    path: &str,
    site: impl Fn() -> String,
) -> Result<Option<Tensor>> {
    let second = Statistic::Covariance { site: site() };
    let second = calibration.matrix("second moment of inputs", &second)?;
    let mean = calibration.vector(&Statistic::InputMeans { site: site() })?;
    let size = second.nrows();
    let covariance = Matrix::from_fn(size, size, |i, j| second[(i, j)] - mean[i] * mean[j]);
    if (0..size).all(|i| covariance[(i, i)] <= CONSTANT * second[(i, i)]) {
        return Ok(None);
    }
    let eigen = symmetric_eigen("covariance of inputs", covariance.as_ref());
    let eigen = eigen.map_err(|reason| Error::Layer {
        layer: path.to_owned(),
        reason,
    })?;
    let positive = eigen.map(|value| value.max(0.0));
    let positive = matrix_to_tensor(positive.as_ref(), DType::F64, &Device::Cpu)?;
    Ok(Some(positive))
}

/// Adds to a matrix's bias, which is made where there is none; queries, keys and values have one each or
/// none.
fn add_bias(edit: &mut Edit, path: &str, constant: &Tensor) -> Result<()> {
    let name = format!("{path}.bias");
    if let Some(bias) = edit.find(&name)? {
        return edit.put(name, &engine(bias + constant)?);
    }
    edit.put(name, constant)?;
    let Some((index, matrix)) = block_of(path) else {
        return Ok(());
    };
    let device = edit.device();
    let attention = path.strip_suffix(matrix).unwrap_or_default();
    let MixerSpec::MultiHead(spec) = &mut edit.block(index)?.attention else {
        return Ok(());
    };
    if matrix == "attention.output" {
        spec.output_bias = Some(true);
        return Ok(());
    }
    spec.output_bias.get_or_insert(spec.bias);
    spec.bias = true;
    for other in ["query", "key", "value"] {
        let own = format!("{attention}attention.{other}");
        if edit.find(&format!("{own}.bias"))?.is_some() {
            continue;
        }
        let rows = match edit.find(&format!("{own}.weight"))? {
            Some(weight) => engine(weight.dim(0))?,
            None => engine(edit.get(&format!("{own}.up"))?.dim(0))?,
        };
        let none = engine(Tensor::zeros(rows, DType::F64, &device))?;
        edit.put(format!("{own}.bias"), &none)?;
    }
    Ok(())
}
