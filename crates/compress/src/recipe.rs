//! Methods one after another, as data.
//!
//! Each stage is calibrated on what the one before it left. Sums that the stage before it cannot have
//! changed are not taken again ([`Calibration::carried_over`]). Orders that make no sense are refused
//! before anything is run: what is rounded is not cut any more, and what a method is sure to leave may be
//! what a later one cannot be run on ([`Recipe::check_model`]). Of those that are allowed some are
//! better than others: [`Recipe::reordered`] has the better one, and why.
//!
//! ```
//! use lapidary_compress::Recipe;
//! let recipe: Recipe = toml::from_str(r#"
//!     [[stage]]
//!     method = "block-influence"
//!     ratio = 0.25
//!     [[stage]]
//!     method = "gptq"
//!     [stage.settings.quantise]
//!     group = 64
//! "#)?;
//! assert_eq!(recipe.stages.len(), 2);
//! recipe.check()?;
//! let wrong = Recipe::of("int4+whitened", "0.2").unwrap_err();
//! assert!(wrong.to_string().contains("last"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::time::Instant;

use lapidary_model::Model;
use serde::{Deserialize, Serialize};

use crate::method::{Method, Settings, Task};
use crate::plan::{Budget, Plan};
use crate::report::Compressed;
use crate::{Calibration, CalibrationData, CalibrationOptions, Error, Result};

/// One method of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Its name.
    pub method: String,
    /// The share of the weights that it takes away: above 0 and below 1, and none for a method that
    /// rounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Its choices, where they are not those of the whole recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
}

/// Methods in their order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The stages.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

/// Where a stage's time went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Of the calibration.
    pub calibration: f64,
    /// Of planning and cutting.
    pub cut: f64,
}

/// What one stage did.
#[derive(Debug)]
pub struct Done {
    /// The model after it, and the report.
    pub compressed: Compressed,
    /// What it had planned.
    pub plan: Plan,
    /// How long it took.
    pub seconds: Seconds,
}

impl Stage {
    /// The method.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn method(&self) -> Result<&'static Method> {
        Method::find(&self.method)
    }

    /// What it may leave.
    ///
    /// # Errors
    /// When the ratio is missing, out of range, or given to a method that rounds.
    pub fn budget(&self) -> Result<Budget> {
        let wrong = |found: String, expected: &str| {
            Error::invalid(format!("ratio of {}", self.method), found, expected)
        };
        match (self.ratio, self.method()?.rounds()) {
            (None, true) => Ok(Budget::Keep(1.0)),
            (Some(ratio), true) => Err(wrong(
                ratio.to_string(),
                "left out: it rounds weights and takes none away",
            )),
            (Some(ratio), false) if ratio > 0.0 && ratio < 1.0 => Ok(Budget::Keep(1.0 - ratio)),
            (Some(ratio), false) => Err(wrong(
                ratio.to_string(),
                "above 0 and below 1: the share of weights to remove",
            )),
            (None, false) => Err(wrong(
                "missing".to_owned(),
                "given: the share of weights to remove",
            )),
        }
    }
}

impl Recipe {
    /// Of `a+b` at `0.2` or `0.1+0.2`: a single ratio is shared, so that together the methods that
    /// cut take as much away.
    ///
    /// # Errors
    /// As [`Recipe::check`], and when there are neither one nor as many ratios as cutting methods.
    pub fn of(methods: &str, ratios: &str) -> Result<Self> {
        let recipe = Self::as_given(methods, ratios)?;
        recipe.check()?;
        Ok(recipe)
    }

    /// As [`Recipe::of`], in any order: for one that is put in order after
    /// ([`Recipe::reordered`]).
    ///
    /// # Errors
    /// When a method does not exist, there are neither one nor as many ratios as cutting methods, or the
    /// one is none that several can share.
    pub fn as_given(methods: &str, ratios: &str) -> Result<Self> {
        if methods.contains(',') {
            let expected = "one, or several joined by +, which run one after another";
            return Err(Error::invalid("method", format!("{methods:?}"), expected));
        }
        let methods = methods
            .split('+')
            .map(|name| Method::find(name.trim()))
            .collect::<Result<Vec<_>>>()?;
        let found = ratios
            .split('+')
            .map(|text| {
                let ratio = text.trim().parse::<f64>();
                ratio.map_err(|_| {
                    let expected =
                        "a number above 0 and below 1, or one for each method, joined by +";
                    Error::invalid("ratio", format!("{text:?}"), expected)
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let cutting = methods.iter().filter(|method| !method.rounds()).count();
        let ratios = match found.as_slice() {
            // Its root would be told in its place, or no number.
            [one] if cutting > 1 && !(*one > 0.0 && *one < 1.0) => {
                let expected = "above 0 and below 1: the share of weights to remove together";
                return Err(Error::invalid("ratio", one, expected));
            }
            // As it was written, for the sentence that refuses it.
            [one] if cutting <= 1 => vec![*one; cutting],
            [one] => vec![1.0 - (1.0 - one).powf(1.0 / cutting as f64); cutting],
            several => several.to_vec(),
        };
        if ratios.len() != cutting {
            return Err(Error::invalid(
                "number of ratios",
                ratios.len(),
                match cutting {
                    0 | 1 => "one: no more than one of the methods cuts".to_owned(),
                    _ => format!("one, or one for each of the {cutting} methods that cut"),
                },
            ));
        }
        let mut ratios = ratios.into_iter();
        Ok(Self {
            stages: methods
                .into_iter()
                .map(|method| Stage {
                    method: method.name.to_owned(),
                    ratio: if method.rounds() { None } else { ratios.next() },
                    settings: None,
                })
                .collect(),
        })
    }

    /// Refuses methods that do not exist, ratios that mean nothing, and orders that make no sense.
    ///
    /// # Errors
    /// Says which stage and why.
    pub fn check(&self) -> Result<()> {
        if self.stages.is_empty() {
            return Err(Error::invalid("stages of a recipe", 0, "at least one"));
        }
        for (index, stage) in self.stages.iter().enumerate() {
            stage.budget()?;
            if stage.method()?.rounds() && index + 1 < self.stages.len() {
                return Err(Error::invalid(
                    format!("place of {}", stage.method),
                    format!("{} of {}", index + 1, self.stages.len()),
                    "the last: what is rounded is not cut any more",
                ));
            }
        }
        Ok(())
    }

    /// The settings of a stage: its own, or else those of the whole run.
    pub fn settings<'a>(stage: &'a Stage, whole: &'a Settings) -> &'a Settings {
        stage.settings.as_ref().unwrap_or(whole)
    }

    /// Runs the stages one after another and returns what each did. `data` may be absent when no
    /// method looks at any.
    ///
    /// # Errors
    /// As [`Recipe::check`] and [`Recipe::check_model`], and when a method is not defined for what the
    /// stage before it left.
    pub fn run(
        &self,
        model: &Model,
        data: Option<&CalibrationData>,
        settings: &Settings,
    ) -> Result<Vec<Done>> {
        self.check()?;
        self.check_model(model, settings)?;
        let mut done: Vec<Done> = Vec::with_capacity(self.stages.len());
        let mut earlier: Option<(usize, Calibration)> = None;
        for (index, stage) in self.stages.iter().enumerate() {
            let (method, budget) = (stage.method()?, stage.budget()?);
            let settings = Self::settings(stage, settings);
            let current = model_before(index, model, &done);
            let started = Instant::now();
            let requirements = method
                .requirements(current, settings)
                .map_err(|reason| self.later(index, reason))?;
            let options = CalibrationOptions::default();
            let calibration = match (data, &earlier) {
                _ if requirements.is_empty() => None,
                (None, _) => None,
                (Some(data), None) => {
                    Some(Calibration::collect(current, data, &requirements, options)?)
                }
                (Some(data), Some((at, earlier))) => {
                    let original = model_before(*at, model, &done);
                    Some(earlier.carried_over(original, current, data, &requirements, options)?)
                }
            };
            let calibrated = started.elapsed().as_secs_f64();
            let task = Task {
                model: current,
                calibration: calibration.as_ref(),
                data,
                settings: Some(settings),
            };
            let (plan, compressed) = method.cut(&task, &budget)?;
            let seconds = Seconds {
                calibration: calibrated,
                cut: started.elapsed().as_secs_f64() - calibrated,
            };
            earlier = calibration.map(|found| (index, found)).or(earlier);
            done.push(Done {
                compressed,
                plan,
                seconds,
            });
        }
        Ok(done)
    }

    /// What a stage says of the model that those before it left.
    fn later(&self, stage: usize, reason: Error) -> Error {
        let mut names = self.stages.iter().map(|stage| stage.method.as_str());
        let before: Vec<&str> = names.by_ref().take(stage).collect();
        match (names.next(), before.is_empty()) {
            (Some(method), false) => Error::Later {
                method: method.to_owned(),
                before: before.join("+"),
                reason: Box::new(reason),
            },
            _ => reason,
        }
    }
}

/// What a stage starts from.
fn model_before<'a>(stage: usize, original: &'a Model, done: &'a [Done]) -> &'a Model {
    let before = stage.checked_sub(1).and_then(|at| done.get(at));
    before.map_or(original, |done| &done.compressed.model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_that_several_share_is_told_as_it_was_given() {
        for ratio in ["1.5", "-0.2", "NaN", "1", "0"] {
            let error = Recipe::of("svd+magnitude", ratio).unwrap_err().to_string();
            let start = format!("ratio is {ratio}, but must be above 0 and below 1");
            assert!(error.starts_with(&start), "{error}");
        }
        let recipe = Recipe::of("svd+magnitude", "0.36").unwrap();
        for stage in recipe.stages {
            assert!((stage.ratio.unwrap() - 0.2).abs() < 1e-12);
        }
    }
}
