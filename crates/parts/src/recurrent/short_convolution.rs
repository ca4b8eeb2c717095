//! What stands before a recurrence: a short causal convolution, each channel with its own few taps,
//! its window between steps of decoding, and the padding that it must not see.

use crate::activation::ActivationSpec;
use crate::error::tensor;
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Context, Error, Result};
use lapidary_kernels::{Activation, Tensor};
use lapidary_signal::Signal;

/// A causal depthwise convolution and what follows it.
#[derive(Debug)]
pub(super) struct ShortConvolution {
    taps: usize,
    activation: Activation,
    /// `[channels, 1, taps]`, oldest tap first.
    kernel: Tensor,
    bias: Option<Tensor>,
}

impl ShortConvolution {
    /// Builds the convolution of `channels` channels.
    pub(super) fn new(
        [channels, taps]: [usize; 2],
        bias: bool,
        activation: ActivationSpec,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        // Deviation of the uniform distribution that the published code draws from.
        let deviation = (1.0 / (3.0 * taps as f64)).sqrt();
        let initial = Init::Normal { deviation };
        let kernel = parameters.tensor("weight", &[channels, 1, taps], initial)?;
        let bias = match bias {
            true => Some(parameters.tensor("bias", &[channels], Init::Zeros)?),
            false => None,
        };
        Ok(Self {
            taps,
            activation: activation.into(),
            kernel,
            bias,
        })
    }

    /// What earlier tokens left at `path`: the convolution's window, and the state where what follows
    /// is a recurrence.
    ///
    /// # Errors
    /// When it is the memory of another mixer, or of other sizes.
    pub(super) fn recall(
        &self,
        memory: Option<&MixerState>,
        recurrent: bool,
        batch: usize,
        path: &str,
    ) -> Result<Option<(Tensor, Option<Tensor>)>> {
        let (window, state) = match (memory, recurrent) {
            (None | Some(MixerState::Empty), _) => return Ok(None),
            (Some(MixerState::Recurrent { window, state }), true) => (window, Some(state)),
            (Some(MixerState::Window(window)), false) => (window, None),
            (Some(other), _) => {
                let expected = match recurrent {
                    true => "that of a recurrence",
                    false => "that of a convolution",
                };
                let what = format!("decode state at {path}");
                return Err(Error::spec(what, other.name(), expected));
            }
        };
        let expected = [batch, tensor(self.kernel.dim(0))?, self.taps - 1];
        if window.dims() != expected {
            return Err(Error::spec(
                format!("shape of the decode state at {path}"),
                window.dims(),
                format!("{expected:?}"),
            ));
        }
        Ok(Some((window.clone(), state.cloned())))
    }

    /// The activated convolution of `u` `[batch, length, channels]`, and the last `taps − 1` inputs
    /// `[batch, channels, taps − 1]` for the tokens to come.
    pub(super) fn forward(&self, u: &Signal, window: Option<&Tensor>) -> Result<(Signal, Tensor)> {
        let (batch, length, channels) = tensor(u.value().dims3())?;
        let before = self.taps - 1;
        let mut u = u.transpose(1, 2)?;
        let mut skipped = 0;
        if let Some(window) = window.filter(|_| before > 0) {
            u = Signal::concatenate(&[Signal::from(window.clone()), u], 2)?;
            skipped = before;
        }
        let seen = skipped + length;
        let past = u.value().detach();
        let past = if seen < before {
            let shape = (batch, channels, before - seen);
            let zeros = tensor(Tensor::zeros(shape, past.dtype(), past.device()))?;
            tensor(Tensor::cat(&[&zeros, &past], 2))?
        } else {
            tensor(tensor(past.narrow(2, seen - before, before))?.force_contiguous())?
        };
        let kernel = tensor(self.kernel.squeeze(1))?;
        let convolved = u
            .contiguous()?
            .depthwise_convolution(&kernel, self.bias.as_ref())?
            .narrow(2, skipped, length)?
            .transpose(1, 2)?;
        Ok((convolved.activate(self.activation)?, past))
    }
}

/// `[batch, length, 1]`, 1 = a real token, for the tokens `x` of a pass through the mixer at `path`.
pub(super) fn real_tokens(path: &str, x: &Signal, cx: &Context<'_>) -> Result<Option<Tensor>> {
    let Some(padding) = cx.key_padding else {
        return Ok(None);
    };
    let (batch, length, _) = tensor(x.value().dims3())?;
    let expected = [batch, cx.offset + length];
    if padding.dims() != expected {
        return Err(Error::spec(
            format!("shape of the padding at {path}"),
            padding.dims(),
            format!("{expected:?}: the earlier tokens and these"),
        ));
    }
    let here = tensor(padding.narrow(1, cx.offset, length))?;
    let here = tensor(tensor(here.unsqueeze(2))?.to_dtype(x.dtype()))?;
    Ok(Some(here))
}

/// `x`, zero where no real token is.
pub(super) fn masked(x: &Signal, real: Option<&Tensor>) -> Result<Signal> {
    match real {
        Some(real) => Ok(x.multiply_constant(real)?),
        None => Ok(x.clone()),
    }
}
