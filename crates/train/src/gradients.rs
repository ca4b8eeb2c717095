//! Gradients beside their parameters: accumulation over micro-batches and clipping by norm.

use lapidary_kernels::{DType, GradStore, Result, Tensor, Var};

/// One gradient per parameter, in the order of the parameters; `None` where the loss does not
/// depend on the parameter.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    tensors: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Takes the gradients of `parameters` out of what a backward pass returned.
    pub fn take(store: &mut GradStore, parameters: &[Var]) -> Self {
        let tensors = parameters
            .iter()
            .map(|parameter| store.remove(parameter.as_tensor()).map(|g| g.detach()))
            .collect();
        Self { tensors }
    }

    /// The gradients, in the order of the parameters.
    pub fn tensors(&self) -> &[Option<Tensor>] {
        &self.tensors
    }

    /// Adds the gradients of another micro-batch over the same parameters.
    pub fn accumulate(&mut self, other: Self) -> Result<()> {
        if self.tensors.is_empty() {
            *self = other;
            return Ok(());
        }
        for (sum, term) in self.tensors.iter_mut().zip(other.tensors) {
            *sum = match (sum.take(), term) {
                (Some(a), Some(b)) => Some((a + b)?),
                (a, b) => a.or(b),
            };
        }
        Ok(())
    }

    /// Multiplies every gradient: by `1 / n` after `n` micro-batches of equal weight.
    pub fn scale(&mut self, factor: f64) -> Result<()> {
        for gradient in self.tensors.iter_mut().flatten() {
            *gradient = gradient.affine(factor, 0.0)?;
        }
        Ok(())
    }

    /// The Euclidean norm of all gradients as one vector. The squares of a tensor are summed in its
    /// own type and the tensors in `f64`, in their order, so that the result is reproducible.
    pub fn norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for gradient in self.tensors.iter().flatten() {
            sum += gradient
                .sqr()?
                .sum_all()?
                .to_dtype(DType::F64)?
                .to_scalar::<f64>()?;
        }
        Ok(sum.sqrt())
    }

    /// Scales all gradients down together so that their norm is at most `limit`, and returns the
    /// norm before (Pascanu, Mikolov, Bengio, arXiv 1211.5063). A norm that is not finite is
    /// returned and the gradients are left alone: the caller decides whether to skip the step.
    pub fn clip(&mut self, limit: f64) -> Result<f64> {
        let norm = self.norm()?;
        if norm.is_finite() && norm > limit {
            self.scale(limit / norm)?;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use lapidary_kernels::Device;

    use super::*;

    fn parameters() -> Vec<Var> {
        [[3f64, 0.0], [0.0, 4.0], [1.0, 1.0]]
            .iter()
            .map(|values| Var::new(values, &Device::Cpu).unwrap())
            .collect()
    }

    /// `½ (scale · |a|² + |b|²)`, which the third parameter is not part of.
    fn gradients(parameters: &[Var], scale: f64) -> Gradients {
        let a = parameters[0].sqr().unwrap().sum_all().unwrap();
        let b = parameters[1].sqr().unwrap().sum_all().unwrap();
        let loss = (a.affine(scale, 0.0).unwrap() + b).unwrap();
        let mut store = loss.affine(0.5, 0.0).unwrap().backward().unwrap();
        Gradients::take(&mut store, parameters)
    }

    fn values(gradients: &Gradients) -> Vec<Option<Vec<f64>>> {
        gradients
            .tensors()
            .iter()
            .map(|g| g.as_ref().map(|g| g.to_vec1().unwrap()))
            .collect()
    }

    #[test]
    fn accumulation_adds_and_keeps_what_is_missing_missing() {
        let parameters = parameters();
        let mut sum = Gradients::default();
        sum.accumulate(gradients(&parameters, 1.0)).unwrap();
        sum.accumulate(gradients(&parameters, 3.0)).unwrap();
        sum.scale(0.5).unwrap();
        assert_eq!(
            values(&sum),
            [Some(vec![6.0, 0.0]), Some(vec![0.0, 4.0]), None]
        );
    }

    #[test]
    fn clipping_scales_to_the_limit_and_leaves_small_gradients_alone() {
        let mut gradients = gradients(&parameters(), 1.0);
        assert_eq!(gradients.norm().unwrap(), 5.0);
        assert_eq!(gradients.clip(10.0).unwrap(), 5.0);
        assert_eq!(gradients.norm().unwrap(), 5.0);
        assert_eq!(gradients.clip(1.0).unwrap(), 5.0);
        assert!((gradients.norm().unwrap() - 1.0).abs() < 1e-12);
        let clipped = values(&gradients);
        assert!((clipped[0].as_ref().unwrap()[0] - 0.6).abs() < 1e-12);
    }

    #[test]
    fn a_norm_that_is_not_finite_is_reported_and_not_divided_by() {
        let parameters = parameters();
        let mut gradients = gradients(&parameters, f64::INFINITY);
        let before = values(&gradients)[1].clone();
        assert!(!gradients.clip(1.0).unwrap().is_finite());
        assert_eq!(values(&gradients)[1], before);
    }
}
