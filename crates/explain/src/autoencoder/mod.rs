//! Sparse autoencoders of what a model writes at a site, above all of the outputs of all heads of
//! one attention layer side by side (Kissane, Krzyzanowski, Bloom, Conmy, Nanda, Interpreting
//! Attention Layer Outputs with Sparse Autoencoders, 2024, arXiv 2406.17759; the autoencoder is
//! that of Bricken et al., Towards Monosemanticity, 2023).
//!
//! ```text
//! f = relu((x − b_d) Eᵀ + b_e)     x̂ = f D + b_d,     rows of D of length one
//! L = 1/B Σ ‖x̂ − x‖² + λ/B Σ |f|
//! ```
//!
//! * [`train`] learns one from windows of tokens; activations stream through an
//!   [`ActivationBuffer`] and are never stored.
//! * [`Quality`] says how good it is, [`Recovery`] what of the model's loss survives it.
//! * [`Attention::attribute`] and [`recursive_attribution`] say which heads, source tokens and
//!   earlier parts made a feature, [`logit_effects`] what it writes to the logits.
//! * [`splice`] changes features and nothing else.

mod attribution;
mod buffer;
mod files;
mod quality;
mod recursion;
mod resampling;
mod site;
mod splice;
mod train;
mod training;

pub use attribution::{
    Attention, FeatureAttribution, head_shares, logit_effects, with_value_biases,
};
pub use buffer::ActivationBuffer;
pub use files::{CONFIG_FILE, from_bytes, load, save};
pub use quality::{Quality, Recovery, recovery};
pub use recursion::{Components, Split, recursive_attribution};
pub use resampling::geometric_median;
pub use site::SiteReader;
pub(crate) use site::{batch, groups};
pub use splice::{Edit, Replacement, edited, splice};
pub use train::{Progress, TrainedAutoencoder, train};
pub use training::{Centre, Step, Training, TrainingOptions};

use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{
    Activation, AutoencoderWeights, DType, Device, Tensor, linear, linear_activation, unit_rows,
};
use rand::{Rng, RngExt};

/// Most features of a file or of a new autoencoder.
const MAX_FEATURES: usize = 1 << 22;
/// Widest site.
const MAX_WIDTH: usize = 1 << 17;

/// A sparse autoencoder and the site it reads.
#[derive(Clone, Debug)]
pub struct Autoencoder {
    site: String,
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    decoder_bias: Tensor,
}

impl Autoencoder {
    /// An autoencoder from its parameters: `encoder` and `decoder` `[features, width]`, their
    /// biases `[features]` and `[width]`.
    ///
    /// # Errors
    /// When the shapes do not fit each other.
    pub fn new(
        site: impl Into<String>,
        encoder: Tensor,
        encoder_bias: Tensor,
        decoder: Tensor,
        decoder_bias: Tensor,
    ) -> Result<Self> {
        let (features, width) = match encoder.dims() {
            [features, width] => (*features, *width),
            found => {
                let found = format!("{found:?}");
                return Err(Error::invalid("encoder", found, "[features, width]"));
            }
        };
        check_size(features, width)?;
        for (what, tensor, shape) in [
            ("encoder bias", &encoder_bias, vec![features]),
            ("decoder", &decoder, vec![features, width]),
            ("decoder bias", &decoder_bias, vec![width]),
        ] {
            if tensor.dims() != shape {
                let found = format!("{:?}", tensor.dims());
                return Err(Error::invalid(
                    format!("shape of the {what}"),
                    found,
                    format!("{shape:?}"),
                ));
            }
        }
        Ok(Self {
            site: site.into(),
            encoder,
            encoder_bias,
            decoder,
            decoder_bias,
        })
    }

    /// Initial values in `f32`: both matrices uniform within `±√(6 / fan-in)` (He et al., arXiv
    /// 1502.01852) with the authors' fan-in, the number of columns of their `[in, out]` matrices;
    /// rows of the decoder at length one; biases zero.
    pub fn initialised(
        site: impl Into<String>,
        width: usize,
        features: usize,
        generator: &mut impl Rng,
    ) -> Result<Self> {
        check_size(features, width)?;
        let mut uniform = |fan_in: usize| {
            let bound = (6.0 / fan_in as f32).sqrt();
            let values: Vec<f32> = (0..features * width)
                .map(|_| generator.random_range(-bound..bound))
                .collect();
            engine(Tensor::from_vec(values, (features, width), &Device::Cpu))
        };
        let encoder = uniform(features)?;
        let decoder = unit_rows(&uniform(width)?)?;
        let zeros = |count: usize| engine(Tensor::zeros(count, DType::F32, &Device::Cpu));
        Self::new(site, encoder, zeros(features)?, decoder, zeros(width)?)
    }

    /// The site whose values it reads.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Width of the site.
    pub fn width(&self) -> usize {
        self.decoder_bias.elem_count()
    }

    /// Number of features.
    pub fn features(&self) -> usize {
        self.encoder_bias.elem_count()
    }

    /// The parameters.
    pub fn weights(&self) -> AutoencoderWeights<'_> {
        AutoencoderWeights {
            encoder: &self.encoder,
            encoder_bias: &self.encoder_bias,
            decoder: &self.decoder,
            decoder_bias: &self.decoder_bias,
        }
    }

    /// The same in another element type.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            site: self.site.clone(),
            encoder: engine(self.encoder.to_dtype(dtype))?,
            encoder_bias: engine(self.encoder_bias.to_dtype(dtype))?,
            decoder: engine(self.decoder.to_dtype(dtype))?,
            decoder_bias: engine(self.decoder_bias.to_dtype(dtype))?,
        })
    }

    /// `f`, `[.., features]`, of `x` `[.., width]`.
    ///
    /// ```
    /// use lapidary_explain::autoencoder::Autoencoder;
    /// use lapidary_kernels::{DType, Device, Tensor};
    /// use rand::SeedableRng;
    ///
    /// let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    /// let autoencoder =
    ///     Autoencoder::initialised("blocks.0.attention.mixed", 8, 32, &mut generator)?;
    /// let x = Tensor::ones((5, 8), DType::F32, &Device::Cpu).map_err(lapidary_kernels::Error::from)?;
    /// let features = autoencoder.encode(&x)?;
    /// assert_eq!(features.dims(), [5, 32]);
    /// assert_eq!(autoencoder.decode(&features)?.dims(), [5, 8]);
    /// # Ok::<(), lapidary_explain::Error>(())
    /// ```
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.encoded(x)?)
    }

    /// `x̂`, `[.., width]`, of `f` `[.., features]`.
    pub fn decode(&self, features: &Tensor) -> Result<Tensor> {
        Ok(self.decoded(features)?)
    }

    /// `x̂` of `x`, both `[.., width]`.
    pub fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        self.decode(&self.encode(x)?)
    }

    pub(crate) fn encoded(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let x = x.to_dtype(self.encoder.dtype())?;
        let centred = x.broadcast_sub(&self.decoder_bias)?;
        let bias = Some(&self.encoder_bias);
        linear_activation(&centred, &self.encoder, bias, Activation::Relu)
    }

    pub(crate) fn decoded(&self, features: &Tensor) -> lapidary_kernels::Result<Tensor> {
        linear(features, &self.decoder.t()?, Some(&self.decoder_bias))
    }

    /// `f D`: what changes in `x̂` when features change by `f`.
    pub(crate) fn decoded_change(&self, change: &Tensor) -> lapidary_kernels::Result<Tensor> {
        linear(change, &self.decoder.t()?, None)
    }

    /// Encoder row, decoder row and encoder bias of one feature.
    pub(crate) fn feature(&self, index: usize) -> Result<Feature> {
        if index >= self.features() {
            let expected = format!("below {}", self.features());
            return Err(Error::invalid("feature", index, expected));
        }
        let row = |matrix: &Tensor| numbers(&engine(matrix.narrow(0, index, 1))?);
        Ok(Feature {
            encoder: row(&self.encoder)?,
            decoder: row(&self.decoder)?,
            bias: row(&self.encoder_bias)?.first().copied().unwrap_or(0.0),
        })
    }
}

/// One feature's own parameters.
pub(crate) struct Feature {
    pub(crate) encoder: Vec<f64>,
    pub(crate) decoder: Vec<f64>,
    pub(crate) bias: f64,
}

fn check_size(features: usize, width: usize) -> Result<()> {
    for (what, found, most) in [
        ("number of features", features, MAX_FEATURES),
        ("width of the site", width, MAX_WIDTH),
    ] {
        if found == 0 || found > most {
            let expected = format!("between 1 and {most}");
            return Err(Error::invalid(what, found, expected));
        }
    }
    Ok(())
}

/// Every element, in order.
pub(crate) fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = engine(engine(tensor.to_dtype(DType::F64))?.flatten_all())?;
    engine(flat.to_vec1::<f64>())
}
