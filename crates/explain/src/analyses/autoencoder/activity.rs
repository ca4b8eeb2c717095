//! Where in some text each feature is active.

use crate::autoencoder::Autoencoder;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{D, DType, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;

/// Tokens in one pass of the model.
const TOKENS_AT_A_TIME: usize = 1024;

/// A feature active at a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// Index of the window.
    pub window: usize,
    /// Position in it.
    pub position: usize,
    /// The feature's value.
    pub value: f32,
}

/// Every activation of every feature on some windows of tokens.
#[derive(Clone, Debug)]
pub struct Activity {
    windows: Vec<Vec<u32>>,
    /// The most probable next token at each position, where the model is a language model.
    predicted: Vec<Vec<u32>>,
    /// For each feature its events, largest first.
    events: Vec<Vec<Event>>,
    tokens: usize,
}

impl Activity {
    /// Runs `model` on `windows` and keeps where features are active: one event for each token
    /// and active feature.
    ///
    /// # Errors
    /// When the model does not write the autoencoder's site.
    pub fn collect(
        model: &Model,
        autoencoder: &Autoencoder,
        windows: Vec<Vec<u32>>,
    ) -> Result<Self> {
        let mut events: Vec<Vec<Event>> = vec![Vec::new(); autoencoder.features()];
        let (mut predicted, mut tokens) = (Vec::new(), 0);
        let mut start = 0;
        for group in crate::autoencoder::groups(&windows, TOKENS_AT_A_TIME) {
            let ids = crate::autoencoder::batch(model, group)?;
            let (rows, length) = engine(ids.dims2())?;
            let trace = Trace::new().capture(autoencoder.site())?;
            let pass = Pass {
                trace: Some(&trace),
                ..Pass::default()
            };
            let output = model.forward(&Input::tokens(ids), pass)?;
            let value = trace.signal(autoencoder.site())?.into_value();
            if value.dims() != [rows, length, autoencoder.width()] {
                return Err(Error::invalid(
                    format!("shape of {}", autoencoder.site()),
                    format!("{:?}", value.dims()),
                    format!("[{rows}, {length}, {}]", autoencoder.width()),
                ));
            }
            let features = engine(autoencoder.encode(&value)?.to_dtype(DType::F32))?;
            let features = engine(engine(features.flatten_all())?.to_vec1::<f32>())?;
            let count = autoencoder.features().max(1);
            for (token, active) in features.chunks(count).enumerate() {
                for (of_feature, value) in events.iter_mut().zip(active) {
                    if *value > 0.0 {
                        of_feature.push(Event {
                            window: start + token / length,
                            position: token % length,
                            value: *value,
                        });
                    }
                }
            }
            if let Some(logits) = output.logits.filter(|logits| logits.dims().len() == 3) {
                predicted.extend(most_probable(logits.value())?);
            }
            start += rows;
            tokens += rows * length;
        }
        for of_feature in &mut events {
            of_feature.sort_by(|a, b| b.value.total_cmp(&a.value));
        }
        Ok(Self {
            windows,
            predicted,
            events,
            tokens,
        })
    }

    /// The windows that were read.
    pub fn windows(&self) -> &[Vec<u32>] {
        &self.windows
    }

    /// Tokens that were read.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// A feature's events, largest value first.
    pub fn events(&self, feature: usize) -> &[Event] {
        self.events.get(feature).map_or(&[], Vec::as_slice)
    }

    /// Share of tokens that make a feature active.
    pub fn frequency(&self, feature: usize) -> f64 {
        self.events(feature).len() as f64 / self.tokens.max(1) as f64
    }

    /// Features that are active somewhere.
    pub fn live(&self) -> Vec<usize> {
        let each = self.events.iter().enumerate();
        each.filter(|(_, events)| !events.is_empty())
            .map(|(feature, _)| feature)
            .collect()
    }

    /// The token at a place.
    pub fn token(&self, window: usize, position: usize) -> Option<u32> {
        self.windows.get(window)?.get(position).copied()
    }

    /// What the model holds most probable after a place.
    pub fn prediction(&self, window: usize, position: usize) -> Option<u32> {
        self.predicted.get(window)?.get(position).copied()
    }

    /// Whether induction would say what the model says at a place: the token there occurred
    /// before, and what followed it then is what the model predicts now.
    pub fn repeats(&self, window: usize, position: usize) -> bool {
        let Some(tokens) = self.windows.get(window) else {
            return false;
        };
        let (Some(now), Some(predicted)) =
            (tokens.get(position), self.prediction(window, position))
        else {
            return false;
        };
        let earlier = tokens.windows(2).take(position);
        earlier
            .filter(|two| two.first() == Some(now))
            .any(|two| two.last() == Some(&predicted))
    }
}

/// The most probable token at each position of `logits` `[batch, length, vocabulary]`.
fn most_probable(logits: &Tensor) -> Result<Vec<Vec<u32>>> {
    engine(engine(logits.argmax(D::Minus1))?.to_vec2::<u32>())
}
