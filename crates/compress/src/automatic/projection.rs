//! From densities that mean nothing by themselves to numbers of parameters.
//!
//! The density of place `p` becomes `min(1, λ s_p)`, its matrices get the largest step of at most
//! that share of their weights, or the least there is. `λ` is the largest at which the whole model fits the budget.
//! Steps are coarse, so that something is left over; it is spent from the first place to the last, a
//! step at a time, as long as one fits.

use super::candidates::{Candidates, Place, Proposal, Step, removed_blocks};
use crate::plan::Plan;

/// Halvings of the interval that `λ` is in: beyond these no step changes.
const HALVINGS: usize = 60;

impl Candidates {
    /// The step of each place that stays, with the name of its method.
    pub(super) fn steps_of(
        &self,
        proposal: &Proposal,
        removal: Option<&Plan>,
    ) -> Vec<(&'static str, &Step)> {
        let gone = removal.map(removed_blocks).unwrap_or_default();
        let taken = removal.map_or(0, |plan| self.removed_weights(plan));
        let room = self.limit;
        let places: Vec<(&Place, f64, usize)> = self
            .places
            .iter()
            .zip(proposal.densities.iter().zip(&proposal.ways))
            .filter(|(place, _)| !gone.contains(&place.block))
            .map(|(place, (density, way))| (place, *density, *way))
            .collect();
        let total = |chosen: &[usize]| -> usize {
            let saved = places.iter().zip(chosen).map(|((place, _, way), step)| {
                let steps = place.ways.get(*way).map(|way| &way.steps);
                steps
                    .and_then(|steps| steps.get(*step))
                    .map_or(0, |step| step.saved)
            });
            self.whole - taken - saved.sum::<usize>()
        };
        let at = |scale: f64| -> Vec<usize> {
            places
                .iter()
                .map(|(place, density, way)| step_at(place, *way, scale * density))
                .collect()
        };
        let sparsest = proposal.densities.iter().copied().fold(1.0, f64::min);
        let (mut low, mut high) = (0.0, 1.0 / sparsest.max(1e-6));
        if total(&at(high)) <= room {
            low = high;
        }
        for _ in 0..HALVINGS {
            let middle = 0.5 * (low + high);
            match total(&at(middle)) <= room {
                true => low = middle,
                false => high = middle,
            }
        }
        let mut chosen = at(low);
        let left = room.saturating_sub(total(&chosen));
        spend(&places, &mut chosen, left);
        places
            .iter()
            .zip(chosen)
            .filter_map(|((place, _, way), step)| {
                let way = place.ways.get(*way)?;
                Some((way.method, way.steps.get(step)?))
            })
            .collect()
    }
}

/// The step that leaves at most `share` of a place's weights; the least one when none does.
fn step_at(place: &Place, way: usize, share: f64) -> usize {
    let Some(way) = place.ways.get(way) else {
        return 0;
    };
    let allowed = (share.min(1.0) * place.weights as f64).round() as usize;
    let fits = |step: &Step| place.weights - step.saved.min(place.weights) <= allowed;
    // The more a step saves the earlier it comes.
    way.steps
        .iter()
        .take_while(|step| fits(step))
        .count()
        .saturating_sub(1)
}

/// Raises steps while one fits into what is left over.
fn spend(places: &[(&Place, f64, usize)], chosen: &mut [usize], mut left: usize) {
    loop {
        let mut raised = false;
        for ((place, _, way), step) in places.iter().zip(chosen.iter_mut()) {
            let Some(steps) = place.ways.get(*way).map(|way| &way.steps) else {
                continue;
            };
            if let (Some(here), Some(next)) = (steps.get(*step), steps.get(*step + 1))
                && here.saved - next.saved <= left
            {
                left -= here.saved - next.saved;
                *step += 1;
                raised = true;
            }
        }
        if !raised {
            return;
        }
    }
}
