//! A search of the mix as data.

use lapidary_model::Model;
use lapidary_search::{Optimiser, Point, Rducb};
use serde::{Deserialize, Serialize};

use super::AutomaticSettings;
use crate::{CalibrationData, Error, Fingerprint, Result};

/// One mix that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// The point of the search that it was projected from.
    pub point: Point,
    /// Parameters of the whole model.
    pub parameters: usize,
    /// Its score.
    pub loss: f64,
}

/// All that a search has to know to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutomaticState {
    /// The weights that are cut.
    pub weights: Fingerprint,
    /// What they are calibrated on.
    pub data: Fingerprint,
    /// What mixes are scored on.
    pub held_out: Fingerprint,
    /// What the search was told.
    pub settings: AutomaticSettings,
    /// The mixes that were tried, in order.
    pub evaluations: Vec<Evaluation>,
    /// Where the search is.
    pub search: Rducb,
}

impl AutomaticState {
    pub(super) fn new(
        model: &Model,
        data: &CalibrationData,
        held_out: &CalibrationData,
        settings: AutomaticSettings,
        search: Rducb,
    ) -> Result<Self> {
        Ok(Self {
            weights: Fingerprint::of(model)?,
            data: Fingerprint::of_data(data)?,
            held_out: Fingerprint::of_data(held_out)?,
            settings,
            evaluations: Vec::new(),
            search,
        })
    }

    /// Refuses a state that is not one of the search which `fresh` begins.
    pub(super) fn check_continues(&self, fresh: &Self) -> Result<()> {
        for (what, found, expected) in [
            ("weights", self.weights, fresh.weights),
            ("calibration data", self.data, fresh.data),
            ("held-out data", self.held_out, fresh.held_out),
        ] {
            if found != expected {
                return Err(Error::invalid(
                    format!("{what} of the search's state"),
                    found,
                    format!("{expected}, or it is the state of another search"),
                ));
            }
        }
        for ((what, found), (_, expected)) in
            told(&self.settings).into_iter().zip(told(&fresh.settings))
        {
            if found != expected {
                return Err(Error::invalid(
                    format!("{what} of the search's state"),
                    found,
                    format!("{expected}, or it is the state of another search"),
                ));
            }
        }
        let history = self.search.history();
        let tried = self.evaluations.iter();
        let same = history.len() == self.evaluations.len()
            && history
                .points
                .iter()
                .eq(tried.clone().map(|one| &one.point))
            && history.values.iter().eq(tried.map(|one| &one.loss));
        if !same || self.search.domain() != fresh.search.domain() {
            return Err(Error::invalid(
                "the search's state",
                "one whose parts do not fit together",
                "as it was written",
            ));
        }
        Ok(())
    }
}

/// All that a search was told and cannot be told anew while it goes on, in words.
fn told(settings: &AutomaticSettings) -> [(&'static str, String); 6] {
    let AutomaticSettings {
        parameters,
        methods,
        evaluations: _,
        levels,
        removable,
        batch,
        seed,
    } = settings;
    [
        ("parameters", parameters.to_string()),
        ("methods", methods.join(",")),
        ("levels", levels.to_string()),
        ("blocks that may go", removable.to_string()),
        ("batch", batch.to_string()),
        ("seed", seed.to_string()),
    ]
}
