//! Gradient checking by central finite differences.

use crate::{DType, Result, Tensor, Var, backward};

/// The largest disagreement between the backward pass of `function` and central finite
/// differences at `inputs`, as `|analytic - numeric| / (1 + |numeric|)`.
///
/// The result of `function` is contracted with fixed pseudo-random numbers, so that every
/// element of it counts. Inputs are taken in `f64`; a function that differentiates only some
/// of its arguments should capture the others.
///
/// # Errors
/// Whatever `function` returns, or an error when an input receives no gradient at all.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, check::gradient_error};
/// let x = Tensor::new(&[0.3f64, -1.2, 2.0], &Device::Cpu)?;
/// let error = gradient_error(|x| Ok(x[0].sqr()?), &[x])?;
/// assert!(error < 1e-8);
/// # Ok::<(), lapidary_kernels::Error>(())
/// ```
pub fn gradient_error(
    function: impl Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
) -> Result<f64> {
    const STEP: f64 = 1e-5;
    let variables = inputs
        .iter()
        .map(|x| Ok(Var::from_tensor(&x.to_dtype(DType::F64)?)?))
        .collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let loss = |tensors: &[Tensor]| -> Result<Tensor> {
        let y = function(tensors)?;
        Ok((&y * pseudo_random(&y)?)?.sum_all()?)
    };
    let gradients = backward(&loss(&tensors)?)?;
    let mut worst = 0f64;
    for (index, variable) in variables.iter().enumerate() {
        let values = variable.flatten_all()?.to_vec1::<f64>()?;
        if values.is_empty() {
            continue;
        }
        let analytic = match gradients.get(variable) {
            Some(gradient) => gradient.flatten_all()?.to_vec1::<f64>()?,
            None => {
                return Err(crate::Error::argument(
                    "gradient_error",
                    "gradient of an input",
                    format!("missing for input {index}"),
                    "present",
                ));
            }
        };
        for element in 0..values.len() {
            let shifted = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[element] += delta;
                let mut all: Vec<Tensor> = tensors.iter().map(Tensor::detach).collect();
                all[index] = Tensor::from_vec(moved, variable.shape(), variable.device())?;
                Ok(loss(&all)?.to_scalar::<f64>()?)
            };
            let numeric = (shifted(STEP)? - shifted(-STEP)?) / (2.0 * STEP);
            let error = (analytic[element] - numeric).abs() / (1.0 + numeric.abs());
            // NaN must not hide behind a comparison.
            worst = if error <= worst { worst } else { error };
        }
    }
    Ok(worst)
}

/// Fixed numbers in `[-1, 1]` of the shape of `like`.
fn pseudo_random(like: &Tensor) -> Result<Tensor> {
    let values: Vec<f64> = (0..like.elem_count())
        .map(|i| ((i as f64 + 1.0) * 12.9898).sin())
        .collect();
    Ok(Tensor::from_vec(values, like.shape(), like.device())?.to_dtype(like.dtype())?)
}

/// The largest absolute difference between two tensors of one shape; not-a-number when either
/// holds one that the other doesn't.
pub fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.dims() != b.dims() {
        return Err(crate::Error::argument(
            "difference",
            "shape",
            a.dims(),
            format!("{:?}", b.dims()),
        ));
    }
    let a = a.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let b = b.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let mut worst = 0f64;
    for (a, b) in a.iter().zip(&b) {
        let same = a == b || (a.is_nan() && b.is_nan());
        let error = if same { 0.0 } else { (a - b).abs() };
        worst = if error <= worst { worst } else { error };
    }
    Ok(worst)
}
