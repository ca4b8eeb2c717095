//! Changing features of a running model, and nothing else.
//!
//! With `f` the features of the true value `x`, and `f'` those wanted, the site gets
//! `x̂(f') + (x − x̂(f))`: the reconstruction and the error that it leaves. The error cancels all
//! but the change, so that it is computed as `x + (f' − f) D`, which gives back the very bits of
//! `x` when nothing changes. The true value is detached: gradients pass through `f'` alone.

use super::Autoencoder;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::{Signal, Trace};

/// What a feature is set to.
#[derive(Clone, Debug)]
pub enum Replacement {
    /// A number; zero ablates the feature.
    Constant(f64),
    /// Its values in another run, `[batch, length, features]`: noising, when that run's prompt is
    /// corrupted.
    From(Tensor),
}

/// One feature at some positions.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Which feature.
    pub feature: usize,
    /// Where; everywhere when absent.
    pub positions: Option<Vec<usize>>,
    /// What to.
    pub value: Replacement,
}

impl Edit {
    /// Ablates a feature everywhere.
    pub fn zero(feature: usize) -> Self {
        Self::pin(feature, 0.0)
    }

    /// Sets a feature to a number everywhere.
    pub fn pin(feature: usize, value: f64) -> Self {
        Self {
            feature,
            positions: None,
            value: Replacement::Constant(value),
        }
    }

    /// The same at these positions only.
    pub fn at(mut self, positions: impl Into<Vec<usize>>) -> Self {
        self.positions = Some(positions.into());
        self
    }
}

/// A trace that gives the autoencoder's site the value with its features passed through `change`
/// (`[batch, length, features]` to the same), its error kept.
///
/// ```
/// use lapidary_explain::autoencoder::{Autoencoder, Edit, edited, splice};
/// use lapidary_signal::Trace;
/// use rand::SeedableRng;
///
/// let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(0);
/// let autoencoder = Autoencoder::initialised("blocks.0.attention.mixed", 8, 32, &mut generator)?;
/// let edits = vec![Edit::zero(3).at([5])];
/// let trace = splice(Trace::new(), &autoencoder, move |features| edited(features, &edits))?;
/// # let _ = trace;
/// # Ok::<(), lapidary_explain::Error>(())
/// ```
pub fn splice(
    trace: Trace,
    autoencoder: &Autoencoder,
    change: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Trace> {
    let autoencoder = autoencoder.clone();
    let site = autoencoder.site().to_owned();
    Ok(trace.replace(&site, move |_, signal| {
        let x = signal.value();
        let features = autoencoder.encoded(x)?;
        let wanted = change(&features).map_err(as_signal_error)?;
        let changed = || -> lapidary_kernels::Result<Tensor> {
            let difference = (wanted - features.detach())?;
            let written = autoencoder.decoded_change(&difference)?;
            Ok((x.detach() + written.to_dtype(x.dtype())?)?)
        };
        Ok(Signal::from(changed()?))
    })?)
}

fn as_signal_error(error: Error) -> lapidary_signal::Error {
    match error {
        Error::Signal(error) => error,
        Error::Kernel(error) => error.into(),
        other => {
            lapidary_kernels::Error::argument("splice", "change", other, "one that succeeds").into()
        }
    }
}

/// `features` `[batch, length, features]` with edits made, in order.
///
/// # Errors
/// When a feature or a position does not exist, or another run's features have another shape.
pub fn edited(features: &Tensor, edits: &[Edit]) -> Result<Tensor> {
    let (batch, length, count) = engine(features.dims3())?;
    let mut features = features.clone();
    for edit in edits {
        if edit.feature >= count {
            return Err(Error::invalid(
                "feature",
                edit.feature,
                format!("below {count}"),
            ));
        }
        let mut keep = vec![0u8; length * count];
        let everywhere: Vec<usize> = (0..length).collect();
        for position in edit.positions.as_ref().unwrap_or(&everywhere) {
            let place = keep.get_mut(position * count + edit.feature);
            let place = place.filter(|_| *position < length);
            *place
                .ok_or_else(|| Error::invalid("position", position, format!("below {length}")))? =
                1;
        }
        let mask = engine(Tensor::from_vec(
            keep,
            (1, length, count),
            features.device(),
        ))?;
        let mask = engine(mask.broadcast_as((batch, length, count)))?;
        let wanted = match &edit.value {
            Replacement::Constant(value) => engine(features.affine(0.0, *value))?,
            Replacement::From(other) if other.dims() == features.dims() => {
                engine(other.to_dtype(features.dtype()))?
            }
            Replacement::From(other) => {
                return Err(Error::invalid(
                    "shape of another run's features",
                    format!("{:?}", other.dims()),
                    format!("{:?}", features.dims()),
                ));
            }
        };
        features = engine(mask.where_cond(&wanted, &features))?;
    }
    Ok(features)
}
