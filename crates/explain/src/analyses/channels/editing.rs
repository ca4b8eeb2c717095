//! Channels turned up, down or off in the weights.

use super::components::Components;
use super::folding::{output_layer, with_output};
use super::heads::{HeadId, Heads};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Model, ModelSpec};
use std::collections::BTreeMap;

/// One component and the factor of its singular value: 0 removes it, 1 leaves it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ComponentEdit {
    /// The head.
    pub head: HeadId,
    /// Which of its components, the strongest first.
    pub component: usize,
    /// What its singular value is multiplied by.
    pub factor: f64,
}

/// The edits that leave of a head only these components.
///
/// # Errors
/// When there is no such head.
pub fn keep_only(heads: &Heads<'_>, head: HeadId, kept: &[usize]) -> Result<Vec<ComponentEdit>> {
    let count = Components::of(&heads.head(head)?)?.count();
    let removed = (0..count).filter(|component| !kept.contains(component));
    Ok(removed
        .map(|component| ComponentEdit {
            head,
            component,
            factor: 0.0,
        })
        .collect())
}

/// A model in which `s_i` of each component named is `factor · s_i`; what a head adds whatever it
/// looks at, `(b_V + β W_V) W_O`, stays.
///
/// Since `W_OV v_i = s_i u_i`, the edit is `W_O ← W_O (1 + Σ_i (factor_i − 1) v_i v_iᵀ)`, which
/// leaves a value projection that several heads share alone, and the bias makes up for what this
/// does to the constant.
///
/// # Errors
/// When a head or component does not exist, is named twice, or a factor is not finite.
pub fn scale_components(model: &Model, edits: &[ComponentEdit]) -> Result<Model> {
    let heads = Heads::of(model)?;
    let mut by_head: BTreeMap<HeadId, BTreeMap<usize, f64>> = BTreeMap::new();
    for edit in edits {
        if !edit.factor.is_finite() {
            return Err(Error::invalid("factor", edit.factor, "a number"));
        }
        let of_head = by_head.entry(edit.head).or_default();
        if of_head.insert(edit.component, edit.factor).is_some() {
            return Err(Error::invalid(
                format!("component {} of head {}", edit.component, edit.head),
                "named twice",
                "named once",
            ));
        }
    }
    let mut spec = ModelSpec {
        blocks: model.spec().expanded_blocks(),
        ..model.spec().clone()
    };
    let mut parameters = model.parameters().clone();
    let edits: Vec<_> = by_head.into_iter().collect();
    for of_block in edits.chunk_by(|a, b| a.0.block == b.0.block) {
        let Some(block) = of_block.first().map(|(head, _)| head.block) else {
            continue;
        };
        let (weight, head_width) = output_layer(model, block)?;
        let (dtype, heads_in_layer) = (weight.dtype(), engine(weight.dim(1))? / head_width);
        // Each head's [width, head_width], in f64.
        let mut columns = (0..heads_in_layer)
            .map(|head| {
                engine(
                    engine(weight.narrow(1, head * head_width, head_width))?.to_dtype(DType::F64),
                )
            })
            .collect::<Result<Vec<_>>>()?;
        let mut shift = engine(Tensor::zeros(
            model.spec().width,
            DType::F64,
            weight.device(),
        ))?;
        for (id, factors) in of_block {
            let head = heads.head(*id)?;
            let components = Components::of(&head)?;
            let column = columns
                .get_mut(id.head)
                .ok_or_else(|| Error::invalid("head", id, "a head of the model"))?;
            let change = change(&components, factors, column)?; // [width, head_width]
            let constant = engine(Tensor::from_slice(
                &head.constant,
                (head_width, 1),
                weight.device(),
            ))?;
            let moved = engine(engine(change.matmul(&constant))?.squeeze(1))?;
            shift = engine(shift - moved)?;
            *column = engine(&*column + change)?;
        }
        let weight = engine(engine(Tensor::cat(&columns, 1))?.to_dtype(dtype))?;
        let shift = engine(shift.to_dtype(dtype))?;
        with_output(&mut spec, &mut parameters, block, weight, &shift)?;
    }
    Ok(Model::new(spec, &mut parameters)?)
}

/// `Σ_i (factor_i − 1) v_i (v_iᵀ W_Oᵀ)`, transposed as layers are stored: `[width, head_width]`.
fn change(
    components: &Components,
    factors: &BTreeMap<usize, f64>,
    column: &Tensor,
) -> Result<Tensor> {
    let mut change = engine(column.zeros_like())?;
    for (component, factor) in factors {
        let direction = components.direction(*component)?;
        let v = engine(Tensor::from_slice(
            &direction,
            (direction.len(), 1),
            column.device(),
        ))?;
        let along = engine(engine(v.t())?.matmul(column))?; // [1, head_width]
        let update = engine(engine(v.matmul(&along))?.affine(factor - 1.0, 0.0))?;
        change = engine(change + update)?;
    }
    Ok(change)
}
