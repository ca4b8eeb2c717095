//! The integer lens: softmax, GELU and norms as integers compute them, everything else as it is.
//!
//! What it is for is measuring: what a model would say on an accelerator without floating point, whose
//! products are integers too where their inputs are rounded. Other activations than GELU and its tanh form,
//! recurrences, and attention by other weights than a softmax stay as they are. There is no gradient.

use crate::error::tensor;
use crate::rounding::scores;
use crate::{Lens, Result, Signal};
use lapidary_kernels::{Activation, AttentionOptions, IntegerFunctions, Tensor, activate};

/// Weights `[batch, heads, query, key]` of queries `[batch, heads, query, width]` for keys
/// `[batch, groups, key, width]`.
pub(crate) fn attention_weights(
    functions: IntegerFunctions,
    q: &Tensor,
    k: &Tensor,
    options: &AttentionOptions,
) -> Result<Tensor> {
    Ok(functions.softmax(&scores(q, k, options, Ok)?)?)
}

/// An activation, by integers where they have one.
pub(crate) fn activation(
    functions: IntegerFunctions,
    x: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    Ok(match activation {
        Activation::Gelu | Activation::GeluTanh => functions.gelu(x)?,
        _ => activate(x, activation)?,
    })
}

impl Signal {
    /// Puts the integer lens on.
    ///
    /// ```
    /// use lapidary_kernels::{Activation, Device, IntegerFunctions, Tensor};
    /// use lapidary_signal::Signal;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let x = Tensor::new(&[[-1f64, 0.0, 2.0]], &Device::Cpu)?;
    /// let plain = Signal::from(x.clone()).activate(Activation::Gelu)?;
    /// let integers = Signal::from(x).into_integers(IntegerFunctions::new(8)?);
    /// let integers = integers.activate(Activation::Gelu)?;
    /// let apart = (plain.value() - integers.value())?.abs()?.max_all()?.to_scalar::<f64>()?;
    /// assert!(apart > 0.0 && apart < 0.03);
    /// # Ok(()) }
    /// ```
    pub fn into_integers(self, functions: IntegerFunctions) -> Self {
        Self {
            value: self.value,
            lens: Lens::Integers(functions),
        }
    }

    /// Softmax of scores with a mask added to them.
    pub(crate) fn integer_softmax(
        &self,
        functions: IntegerFunctions,
        mask: &lapidary_kernels::SoftmaxMask,
    ) -> Result<Tensor> {
        // The logarithm of a softmax differs from the masked scores by a number of each row, which a softmax
        // does not see.
        let masked = lapidary_kernels::log_softmax(&self.value, mask)?;
        Ok(functions.softmax(&tensor(masked.contiguous())?)?)
    }
}
