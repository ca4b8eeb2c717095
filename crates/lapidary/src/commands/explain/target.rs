//! What a model predicts, and what of it is explained.

use super::{Named, Prediction, readable};
use crate::cli::Explain;
use crate::loading;
use crate::subject::Subject;
use anyhow::{Context, Result, ensure};
use lapidary_explain::Target;
use lapidary_kernels::DType;
use lapidary_model::{HeadSpec, Model, Package, Pass};

/// The scores by descending probability, with their indices; none for a model without scores.
pub fn predictions(
    package: &Package,
    subject: &Subject<'_>,
    position: usize,
) -> Result<Vec<(usize, Prediction)>> {
    let model = subject.model;
    let pass = Pass {
        padding: subject.padding.as_ref(),
        ..Pass::default()
    };
    let output = model.forward(&subject.input, pass)?;
    let Some(logits) = output.logits else {
        return Ok(Vec::new());
    };
    let logits = logits.into_value().get(0)?;
    let logits = match logits.rank() {
        2 => {
            let length = logits.dim(0)?;
            ensure!(
                position < length,
                "position is {position}, but must be below {length}"
            );
            logits.get(position)?
        }
        _ => logits,
    };
    let scores = logits.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let is_language_model = matches!(model.spec().head, HeadSpec::LanguageModel { .. });
    Ok(order
        .into_iter()
        .map(|index| {
            let name = match (is_language_model, &package.tokenizer) {
                (true, Some(tokenizer)) => tokenizer.token_of(index as u32),
                (false, _) => package.labels.get(index).cloned(),
                _ => None,
            };
            let name = name.map_or_else(|| index.to_string(), |name| readable(&name));
            let score = scores[index];
            (
                index,
                Prediction {
                    name,
                    probability: (score - largest).exp() / total,
                    score,
                },
            )
        })
        .collect())
}

/// What is explained, and how it is called: every target that is named, or what the model
/// predicts.
pub fn targets(
    arguments: &Explain,
    package: &Package,
    model: &Model,
    position: usize,
    predictions: &[(usize, Prediction)],
) -> Result<Vec<Named>> {
    let foil = arguments.foil.as_deref();
    let of = |target| one(target, foil, package, model, position, predictions);
    match arguments.target.as_slice() {
        [] => Ok(vec![of(None)?]),
        names => names.iter().map(|name| of(Some(name))).collect(),
    }
}

/// The target of that name, or what the model predicts.
pub fn one(
    target: Option<&str>,
    foil: Option<&str>,
    package: &Package,
    model: &Model,
    position: usize,
    predictions: &[(usize, Prediction)],
) -> Result<Named> {
    let Some((best, prediction)) = predictions.first() else {
        ensure!(
            target.is_none() && foil.is_none(),
            "this model has no scores; leave --target and --foil out to explain its representation"
        );
        return Ok(Named {
            target: Target::Representation,
            name: "representation".to_owned(),
            foil: None,
        });
    };
    let names = Names {
        package,
        predictions,
        is_language_model: matches!(model.spec().head, HeadSpec::LanguageModel { .. }),
    };
    let (class, name) = match target {
        Some(target) => names.find("target", target)?,
        None => (*best, prediction.name.clone()),
    };
    let foil = foil.map(|foil| names.find("foil", foil)).transpose()?;
    Ok(Named {
        target: Target::Score {
            class,
            foil: foil.as_ref().map(|(index, _)| *index),
            position: Some(position),
        },
        name,
        foil: foil.map(|(_, name)| name),
    })
}

/// What the scores of a model are called.
struct Names<'a> {
    package: &'a Package,
    predictions: &'a [(usize, Prediction)],
    is_language_model: bool,
}

impl Names<'_> {
    /// The class or token that a user names, by word or number.
    fn find(&self, what: &str, name: &str) -> Result<(usize, String)> {
        let count = self.predictions.len();
        if let Ok(number) = name.parse::<usize>() {
            ensure!(
                number < count,
                "{what} is {number}, but must be below {count}"
            );
            let found = self.predictions.iter().find(|(index, _)| *index == number);
            let name = found.map_or_else(|| number.to_string(), |(_, p)| p.name.clone());
            return Ok((number, name));
        }
        let index = match self.is_language_model {
            true => self.token(what, name)?,
            false => self.class(what, name)?,
        };
        Ok((index, name.to_owned()))
    }

    fn class(&self, what: &str, name: &str) -> Result<usize> {
        let labels = &self.package.labels;
        let index = labels.iter().position(|label| label == name);
        index.with_context(|| {
            format!(
                "{what} {name:?} is not a class; the classes are {}",
                labels.join(", ")
            )
        })
    }

    fn token(&self, what: &str, name: &str) -> Result<usize> {
        Ok(loading::single_token(self.package, what, name)? as usize)
    }
}
