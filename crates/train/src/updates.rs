//! One step of the variables of a model: clipping, masks, optimiser and moving average, whatever
//! the loss was.

use std::collections::BTreeMap;

use lapidary_kernels::{
    AdamW, AdamWOptions, GradStore, Lion, LionOptions, OptimiserState, Parameter, Sgd, SgdOptions,
    Tensor, Var, global_gradient_norm,
};
use lapidary_model::Model;

use crate::spec::{GroupSpec, OptimiserSpec};
use crate::{Error, Masks, MovingAverage, Result};

enum Optimiser {
    AdamW(AdamW),
    Lion(Lion),
    Sgd(Sgd),
}

impl Optimiser {
    fn new(spec: &OptimiserSpec, learning_rate: f64, parameters: Vec<Parameter>) -> Result<Self> {
        Ok(match *spec {
            OptimiserSpec::Adamw {
                beta1,
                beta2,
                epsilon,
                weight_decay,
            } => {
                let options = AdamWOptions {
                    learning_rate,
                    beta1,
                    beta2,
                    epsilon,
                    weight_decay,
                };
                Self::AdamW(AdamW::new(parameters, options)?)
            }
            OptimiserSpec::Lion {
                beta1,
                beta2,
                weight_decay,
            } => {
                let options = LionOptions {
                    learning_rate,
                    beta1,
                    beta2,
                    weight_decay,
                };
                Self::Lion(Lion::new(parameters, options)?)
            }
            OptimiserSpec::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => {
                let options = SgdOptions {
                    learning_rate,
                    momentum,
                    nesterov,
                    weight_decay,
                };
                Self::Sgd(Sgd::new(parameters, options)?)
            }
        })
    }
}

/// How variables are moved.
#[derive(Clone, Debug, Default)]
pub struct UpdateOptions {
    /// The optimiser.
    pub optimiser: OptimiserSpec,
    /// The rate that a schedule starts from.
    pub peak: f64,
    /// Largest norm of a step's gradient.
    pub clip: Option<f64>,
    /// Decay of a moving average of the parameters.
    pub average: Option<f64>,
    /// Parameters that are trained otherwise than the rest.
    pub groups: Vec<GroupSpec>,
}

/// The variables of a trainable model, and what moves them.
pub struct Updates {
    names: Vec<String>,
    variables: Vec<Var>,
    optimiser: Optimiser,
    clip: Option<f64>,
    average: Option<MovingAverage>,
    masks: Masks,
}

impl Updates {
    /// Of the variables of `model`, at rest. Norms and biases are not decayed.
    ///
    /// # Errors
    /// When a variable is neither `f32` nor `f64` on the CPU, or a group is of none of them.
    pub fn new(model: &Model, options: &UpdateOptions) -> Result<Self> {
        Self::of(model.variables(), options)
    }

    /// Of variables by name, such as those of a model and of a head beside it, at rest. Vectors are not decayed.
    ///
    /// # Errors
    /// When a variable is neither `f32` nor `f64` on the CPU, or a group is of none of them.
    pub fn of(variables: &BTreeMap<String, Var>, options: &UpdateOptions) -> Result<Self> {
        let (names, variables): (Vec<String>, Vec<Var>) = variables
            .iter()
            .map(|(name, variable)| (name.clone(), variable.clone()))
            .unzip();
        check_groups(&options.groups, &names)?;
        let parameters = parameters(options, &names, &variables);
        let optimiser = Optimiser::new(&options.optimiser, options.peak, parameters)?;
        let average = match options.average {
            Some(decay) => Some(MovingAverage::new(&variables, decay, true)?),
            None => None,
        };
        Ok(Self {
            names,
            variables,
            optimiser,
            clip: options.clip,
            average,
            masks: Masks::default(),
        })
    }

    /// The variables, in the order of their names.
    pub(crate) fn variables(&self) -> &[Var] {
        &self.variables
    }

    /// Their names.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// One of them by its name.
    pub(crate) fn variable(&self, name: &str) -> Option<&Var> {
        let place = self.names.iter().position(|other| other == name)?;
        self.variables.get(place)
    }

    /// The masks in force.
    pub fn masks(&self) -> &Masks {
        &self.masks
    }

    /// Sets what is masked to zero, in the weights, in the optimiser's moments and in the moving
    /// average, and keeps it there from now on. Masks that were in force before are not any more.
    ///
    /// # Errors
    /// When a mask is of no parameter, or of another shape; nothing has changed then.
    pub fn set_masks(&mut self, masks: Masks) -> Result<()> {
        let unknown = masks
            .tensors()
            .keys()
            .find(|name| !self.names.contains(name));
        if let Some(name) = unknown {
            return Err(Error::Tensor {
                name: name.clone(),
                detail: "the mask is of no parameter of the model".into(),
            });
        }
        // A variable cannot be set to itself, so that only those with a mask are.
        let masked = self.names.iter().zip(&self.variables);
        let masked = masked.filter(|(name, _)| masks.tensors().contains_key(*name));
        let weights = masked
            .map(|(name, variable)| {
                let weight = masks.masked(name, &variable.as_tensor().detach())?;
                Ok((variable.clone(), weight))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut state = self.state()?;
        for (name, moments) in self.names.iter().zip(&mut state.moments) {
            for moment in moments {
                *moment = masks.masked(name, moment)?;
            }
        }
        if let Some(average) = &mut self.average {
            let shadow = self.names.iter().zip(average.shadow());
            let shadow = shadow.map(|(name, shadow)| masks.masked(name, shadow));
            average.resume(shadow.collect::<Result<_>>()?, average.updates())?;
        }
        self.load_state(&state)?;
        for (variable, weight) in &weights {
            set(variable, weight)?;
        }
        self.masks = masks;
        Ok(())
    }

    /// Does one step along gradients that were summed `1 / scale` times, and returns their norm before
    /// clipping. What is masked has no gradient.
    ///
    /// # Errors
    /// When the norm is not finite: nothing has changed then.
    pub fn step(&mut self, gradients: &mut GradStore, rate: f64, scale: f64) -> Result<f64> {
        for (name, variable) in self.names.iter().zip(&self.variables) {
            if let Some(gradient) = gradients.get(variable.as_tensor())
                && self.masks.tensors().contains_key(name)
            {
                let masked = self.masks.masked(name, &gradient.detach())?;
                gradients.insert(variable.as_tensor(), masked);
            }
        }
        let all: Vec<&Tensor> = self
            .variables
            .iter()
            .filter_map(|variable| gradients.get(variable.as_tensor()))
            .collect();
        let norm = scale * global_gradient_norm(&all)?;
        if !norm.is_finite() {
            return Err(Error::Setting {
                name: "norm of the gradient",
                found: norm.to_string(),
                expected: "finite; lower the learning rate, or clip",
            });
        }
        let scale = match self.clip {
            Some(limit) if norm > limit => scale * (limit / norm),
            _ => scale,
        };
        match &mut self.optimiser {
            Optimiser::AdamW(optimiser) => optimiser.step(gradients, rate, scale)?,
            Optimiser::Lion(optimiser) => optimiser.step(gradients, rate, scale)?,
            Optimiser::Sgd(optimiser) => optimiser.step(gradients, rate, scale)?,
        }
        if let Some(average) = &mut self.average {
            average.update(&self.variables)?;
        }
        Ok(norm)
    }

    /// Puts the averages in the place of the parameters; a second call undoes it.
    pub(crate) fn swap_average(&mut self) -> Result<()> {
        if let Some(average) = &mut self.average {
            average.swap(&self.variables)?;
        }
        Ok(())
    }

    /// Copies of the parameters as they are.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn parameters(&self) -> Result<BTreeMap<String, Tensor>> {
        let pairs = self.names.iter().zip(&self.variables);
        pairs
            .map(|(name, variable)| {
                let copy = variable.as_tensor().copy();
                Ok((
                    name.clone(),
                    copy.map_err(lapidary_kernels::Error::from)?.detach(),
                ))
            })
            .collect()
    }

    fn state(&self) -> Result<OptimiserState> {
        Ok(match &self.optimiser {
            Optimiser::AdamW(optimiser) => optimiser.state()?,
            Optimiser::Lion(optimiser) => optimiser.state()?,
            Optimiser::Sgd(optimiser) => optimiser.state()?,
        })
    }

    fn load_state(&mut self, state: &OptimiserState) -> Result<()> {
        match &mut self.optimiser {
            Optimiser::AdamW(optimiser) => optimiser.load_state(state)?,
            Optimiser::Lion(optimiser) => optimiser.load_state(state)?,
            Optimiser::Sgd(optimiser) => optimiser.load_state(state)?,
        }
        Ok(())
    }

    /// Everything that is needed to go on from here: tensors and counters by name.
    pub(crate) fn save(
        &self,
        tensors: &mut BTreeMap<String, Tensor>,
        positions: &mut BTreeMap<String, u64>,
    ) -> Result<()> {
        for (name, variable) in self.names.iter().zip(&self.variables) {
            tensors.insert(format!("parameter.{name}"), variable.as_tensor().detach());
        }
        for (name, mask) in self.masks.tensors() {
            tensors.insert(format!("{MASK}{name}"), mask.clone());
        }
        let state = self.state()?;
        for (name, moments) in self.names.iter().zip(state.moments) {
            for (index, moment) in moments.into_iter().enumerate() {
                tensors.insert(format!("moment.{index}.{name}"), moment);
            }
        }
        positions.insert("optimiser".to_owned(), state.step);
        if let Some(average) = &self.average {
            positions.insert("average".to_owned(), average.updates());
            for (name, shadow) in self.names.iter().zip(average.shadow()) {
                tensors.insert(format!("average.{name}"), shadow.clone());
            }
        }
        Ok(())
    }

    /// Goes on from what [`Self::save`] gave; `step` where no counter of the optimiser was saved.
    pub(crate) fn restore(
        &mut self,
        tensors: &BTreeMap<String, Tensor>,
        positions: &BTreeMap<String, u64>,
        step: u64,
    ) -> Result<()> {
        let take = |key: String| {
            tensors.get(&key).cloned().ok_or(Error::Setting {
                name: "tensor of the saved run",
                found: format!("no {key}"),
                expected: "one for each parameter",
            })
        };
        let all = |prefix: &str| -> Result<Vec<Tensor>> {
            let names = self.names.iter();
            names.map(|name| take(format!("{prefix}.{name}"))).collect()
        };
        let moments_of = match self.optimiser {
            Optimiser::AdamW(_) => 2,
            Optimiser::Lion(_) | Optimiser::Sgd(_) => 1,
        };
        let mut moments = vec![Vec::new(); self.names.len()];
        for index in 0..moments_of {
            let found = all(&format!("moment.{index}"))?;
            for (moments, moment) in moments.iter_mut().zip(found) {
                moments.push(moment);
            }
        }
        let weights = all("parameter")?;
        let shadow = match self.average {
            Some(_) => all("average")?,
            None => Vec::new(),
        };
        let masks = tensors.iter().filter_map(|(key, tensor)| {
            let name = key.strip_prefix(MASK)?;
            Some((name.to_owned(), tensor.clone()))
        });
        self.masks = Masks::new(masks.collect())?;
        let step = positions.get("optimiser").copied().unwrap_or(step);
        self.load_state(&OptimiserState { step, moments })?;
        if let Some(average) = &mut self.average {
            average.resume(shadow, positions.get("average").copied().unwrap_or(0))?;
        }
        let mut pairs = self.variables.iter().zip(&weights);
        pairs.try_for_each(|(variable, weight)| set(variable, weight))
    }
}

fn set(variable: &Var, value: &Tensor) -> Result<()> {
    Ok(variable.set(value).map_err(lapidary_kernels::Error::from)?)
}

/// What the names of masks begin with in a saved state.
const MASK: &str = "mask.";

/// How many beginnings of names an error lists.
const LISTED: usize = 16;

/// Refuses a group that no parameter is in.
fn check_groups(groups: &[GroupSpec], names: &[String]) -> Result<()> {
    let is_empty = |group: &&GroupSpec| !names.iter().any(|name| name.starts_with(&group.path));
    let Some(group) = groups.iter().find(is_empty) else {
        return Ok(());
    };
    // `blocks.10.attention.query.weight` begins with `blocks.10.`.
    let beginning = |name: &String| -> String {
        let mut parts = name.split_inclusive('.');
        let first = parts.next().unwrap_or_default();
        let numbered = parts.next().filter(|part| {
            let number = part.trim_end_matches('.');
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        });
        format!("{first}{}", numbered.unwrap_or_default())
    };
    let mut beginnings: Vec<String> = names.iter().map(beginning).collect();
    beginnings.dedup();
    let more = beginnings.len().saturating_sub(LISTED);
    beginnings.truncate(LISTED);
    let mut listed = beginnings.join(", ");
    if more > 0 {
        listed += &format!(" and {more} more");
    }
    Err(Error::Setting {
        name: "groups.path",
        found: format!("{:?}, where parameters begin with {listed}", group.path),
        expected: "the beginning of at least one name",
    })
}

/// Every variable with its group's settings; norms and biases without decay.
fn parameters(options: &UpdateOptions, names: &[String], variables: &[Var]) -> Vec<Parameter> {
    names
        .iter()
        .zip(variables)
        .map(|(name, variable)| {
            let group = options
                .groups
                .iter()
                .find(|group| name.starts_with(&group.path));
            let usual = if variable.rank() < 2 {
                0.0
            } else {
                options.optimiser.weight_decay()
            };
            Parameter {
                variable: variable.clone(),
                weight_decay: Some(group.and_then(|group| group.weight_decay).unwrap_or(usual)),
                rate_factor: group.map_or(1.0, |group| group.rate_factor),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    fn told(paths: &[&str]) -> Result<Updates> {
        let names = [
            "blocks.0.attention.bias",
            "blocks.0.norm",
            "blocks.10.norm",
            "embeddings.tokens",
        ];
        let variables = names.map(|name| {
            let variable = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
            (name.to_owned(), variable)
        });
        let groups = paths.iter().map(|path| GroupSpec {
            path: (*path).to_owned(),
            rate_factor: 0.0,
            weight_decay: None,
        });
        let options = UpdateOptions {
            peak: 1e-3,
            groups: groups.collect(),
            ..UpdateOptions::default()
        };
        Updates::of(&BTreeMap::from(variables), &options)
    }

    #[test]
    fn a_group_of_no_parameter_is_refused_with_what_there_is() {
        for paths in [
            &[""][..],
            &[],
            &["blocks.1", "embeddings.tokens", "blocks.0."],
        ] {
            assert!(told(paths).is_ok(), "{paths:?}");
        }
        for wrong in ["embedding.", "blocks.2", "embeddings.tokens.weight"] {
            let Err(error) = told(&["blocks.", wrong]) else {
                panic!("{wrong} was accepted");
            };
            assert_eq!(
                error.to_string(),
                format!(
                    "groups.path is {wrong:?}, where parameters begin with blocks.0., blocks.10., embeddings., \
                     but must be the beginning of at least one name"
                )
            );
        }
    }
}
