//! The order in which methods do best.
//!
//! ```text
//! depth → stream, parts, directions → ranks → single weights → storage
//! ```
//!
//! What goes as a whole goes first: nothing is calibrated, cut or healed that is taken out after. What
//! turns or splits matrices comes before what sets weights to zero, since of a matrix that is multiplied
//! or decomposed the zeros are gone. Rounding comes last, or has to be done again. Between stream, parts
//! and directions there is no preference: these keep the order in which they are given, as do several
//! methods of one effect.

use crate::Result;
use crate::method::{Effect, Method};
use crate::recipe::{Recipe, Stage};

/// A recipe in the better order.
#[derive(Clone, Debug, PartialEq)]
pub struct Reordered {
    /// The recipe.
    pub recipe: Recipe,
    /// Why, one sentence for each pair of stages that changed places; none when the order was good.
    pub reasons: Vec<String>,
}

impl Effect {
    /// How early methods of this effect come: the lower the earlier.
    fn place(self) -> usize {
        match self {
            Self::Depth => 0,
            Self::Stream | Self::Parts | Self::Directions => 1,
            Self::Ranks => 2,
            Self::Weights => 3,
            Self::Storage => 4,
        }
    }
}

impl Recipe {
    /// The stages in the better order, each with its ratio and settings, and why it is better.
    ///
    /// ```
    /// use lapidary_compress::Recipe;
    /// let given = Recipe::as_given("wanda+int4+whitened+block-influence", "0.1")?;
    /// let better = given.reordered()?;
    /// let methods: Vec<_> = better.recipe.stages.iter().map(|stage| &stage.method[..]).collect();
    /// assert_eq!(methods, ["block-influence", "whitened", "wanda", "int4"]);
    /// assert_eq!(better.reasons.len(), 5);
    /// assert!(better.recipe.reordered()?.reasons.is_empty());
    /// # Ok::<(), lapidary_compress::Error>(())
    /// ```
    ///
    /// # Errors
    /// When a stage names no method.
    pub fn reordered(&self) -> Result<Reordered> {
        let mut stages = self
            .stages
            .iter()
            .map(|stage| Ok((stage.method()?, stage)))
            .collect::<Result<Vec<(&Method, &Stage)>>>()?;
        let mut reasons = Vec::new();
        for (index, (first, _)) in stages.iter().enumerate() {
            let later = stages.iter().skip(index + 1);
            reasons.extend(later.filter_map(|(second, _)| reason(first, second)));
        }
        stages.sort_by_key(|(method, _)| method.effect.place());
        let stages = stages.into_iter().map(|(_, stage)| stage.clone());
        Ok(Reordered {
            recipe: Self {
                stages: stages.collect(),
            },
            reasons,
        })
    }
}

/// Why the second method should come before the first, when it should.
fn reason(first: &Method, second: &Method) -> Option<String> {
    if first.effect.place() <= second.effect.place() {
        return None;
    }
    let (one, other) = (first.name, second.name);
    Some(match (first.effect, second.effect) {
        (Effect::Storage, _) => format!("what {one} rounds is not cut by {other} any more"),
        (_, Effect::Depth) => {
            format!("what {other} takes out as a whole need not be worked on by {one} before")
        }
        (Effect::Weights, Effect::Parts) => {
            format!("a part of the zeros that {one} chooses goes with what {other} takes out")
        }
        (Effect::Weights, _) => {
            format!("{other} makes new matrices, in which the zeros of {one} are gone")
        }
        _ => format!("{other} works on whole matrices, which {one} splits into factors"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recipe(indices: &[usize]) -> Recipe {
        let all = Method::all();
        Recipe {
            stages: indices
                .iter()
                .enumerate()
                .map(|(number, index)| Stage {
                    method: all[index % all.len()].name.to_owned(),
                    // Tells stages apart.
                    ratio: Some(0.01 * (number + 1) as f64),
                    settings: None,
                })
                .collect(),
        }
    }

    proptest! {
        #[test]
        fn a_better_order_has_the_same_stages_and_is_found_once(
            indices in prop::collection::vec(0usize..100, 0..7),
        ) {
            let given = recipe(&indices);
            let better = given.reordered().unwrap();
            let sorted = |recipe: &Recipe| {
                let mut ratios: Vec<f64> =
                    recipe.stages.iter().filter_map(|stage| stage.ratio).collect();
                ratios.sort_by(f64::total_cmp);
                ratios
            };
            prop_assert_eq!(sorted(&better.recipe), sorted(&given));
            prop_assert_eq!(better.reasons.is_empty(), better.recipe == given);
            let again = better.recipe.reordered().unwrap();
            prop_assert!(again.reasons.is_empty());
            prop_assert_eq!(again.recipe, better.recipe);
        }
    }

    #[test]
    fn methods_that_round_are_those_that_change_storage() {
        for method in Method::all() {
            let stores = method.effect == Effect::Storage;
            assert_eq!(method.rounds(), stores, "{}", method.name);
        }
    }

    #[test]
    fn an_order_is_repaired_that_is_refused() {
        assert!(Recipe::of("int8+slicegpt", "0.2").is_err());
        let given = Recipe::as_given("int8+slicegpt", "0.2").unwrap();
        let better = given.reordered().unwrap();
        assert_eq!(better.recipe, Recipe::of("slicegpt+int8", "0.2").unwrap());
        assert!(
            better.reasons[0].contains("not cut"),
            "{:?}",
            better.reasons
        );
        // Two roundings have no good order.
        let twice = Recipe::as_given("int8+int4", "0.2").unwrap();
        assert!(twice.reordered().unwrap().recipe.check().is_err());
    }
}
