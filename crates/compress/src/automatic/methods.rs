//! Which methods can be mixed, as far as it is known before one of them has looked at the model: a
//! plan may take a search.

use lapidary_model::Model;

use crate::method::{Effect, Method, Schedule, Settings};
use crate::methods::block_influence::BLOCK_INFLUENCE;
use crate::methods::entropy::ENTROPY_BLOCKS;
use crate::methods::fuse::MACRO_INFLUENCE;
use crate::methods::linearise::DELETE_LINEAR;
use crate::methods::shedder::MAMBA_SHEDDER_WIDTH;
use crate::{CalibrationData, Error, Objective, Requirements, Result};

/// Whether a method leaves out whole blocks, each by itself.
pub(super) fn leaves_out_blocks(method: &Method) -> bool {
    let names = [
        BLOCK_INFLUENCE.name,
        DELETE_LINEAR.name,
        ENTROPY_BLOCKS.name,
        MACRO_INFLUENCE.name,
    ];
    names.contains(&method.name)
}

/// Whether some plan of a method may change what is mixed: ranks, widths of feed-forward parts, whole
/// blocks.
fn may_be_mixed(method: &Method) -> bool {
    match method.effect {
        Effect::Parts | Effect::Ranks => true,
        // Others take pieces of blocks, or put maps in their places.
        Effect::Depth => leaves_out_blocks(method) || method.name == MAMBA_SHEDDER_WIDTH.name,
        Effect::Stream | Effect::Directions | Effect::Weights | Effect::Storage => false,
    }
}

/// Why a method is left out that changes nothing of what is mixed.
pub(super) fn not_mixed(method: &Method) -> Error {
    Error::invalid(
        format!("what {} changes", method.name),
        "neither the rank of a matrix nor the width of a feed-forward part of a block",
        "one of these, or whole blocks, for a mix",
    )
}

/// The methods of these names that the model allows, and why not of the others.
pub(super) type Applicable = (Vec<&'static Method>, Vec<(String, String)>);

/// Refuses two methods that leave out blocks.
pub(super) fn applicable(
    model: &Model,
    names: &[String],
    settings: &Settings,
) -> Result<Applicable> {
    let mut methods: Vec<&'static Method> = Vec::new();
    let mut left_out = Vec::new();
    for name in names {
        let method = Method::find(name)?;
        // One that is named twice has one plan.
        if methods.iter().any(|known| known.name == method.name) {
            continue;
        }
        match method.requirements(model, settings) {
            Ok(_) if method.schedule == Schedule::Training => {
                let reason = "it trains while it cuts, and modules of a mix are cut apart";
                left_out.push((name.clone(), reason.to_owned()));
            }
            Ok(_) if !may_be_mixed(method) => {
                left_out.push((name.clone(), not_mixed(method).to_string()));
            }
            Ok(_) => methods.push(method),
            Err(error) => left_out.push((name.clone(), error.to_string())),
        }
    }
    let mut depth = methods.iter().filter(|method| leaves_out_blocks(method));
    if let (Some(first), Some(second)) = (depth.next(), depth.next()) {
        return Err(Error::invalid(
            "methods to mix",
            format!(
                "{} and {}, which both leave out blocks",
                first.name, second.name
            ),
            "with at most one such method",
        ));
    }
    Ok((methods, left_out))
}

/// The same without the methods that need gradients, where the data has nothing to ask for.
pub(super) fn answerable(
    model: &Model,
    data: &CalibrationData,
    (methods, mut left_out): Applicable,
    settings: &Settings,
) -> Result<Applicable> {
    let Err(reason) = Objective::of(model, data) else {
        return Ok((methods, left_out));
    };
    let mut kept = Vec::new();
    for method in methods {
        match method.requirements(model, settings)?.gradients().is_empty() {
            true => kept.push(method),
            false => left_out.push((method.name.to_owned(), reason.to_string())),
        }
    }
    Ok((kept, left_out))
}

/// What all of them have to find out.
pub(super) fn requirements(
    model: &Model,
    methods: &[&'static Method],
    settings: &Settings,
) -> Result<Requirements> {
    methods
        .iter()
        .try_fold(Requirements::default(), |all, method| {
            Ok(all.union(method.requirements(model, settings)?))
        })
}
