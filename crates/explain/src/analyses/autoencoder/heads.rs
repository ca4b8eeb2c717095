//! Whether the features of a head are about one thing.
//!
//! The paper labels the ten features of a head that have the largest share of their decoder in it
//! and calls the head polysemantic when they are about unrelated things. Here two features are
//! related when the tokens of their strongest examples overlap: the token at the place, and the
//! one after it.

use super::activity::Activity;
use crate::Result;
use crate::autoencoder::{Autoencoder, head_shares};
use lapidary_model::Model;
use serde::Serialize;
use std::collections::BTreeSet;

/// The features that belong most to one head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeadFeatures {
    /// Index of the head.
    pub head: usize,
    /// Live features and the head's share of their decoders, largest first.
    pub features: Vec<(usize, f64)>,
    /// Groups of related features among them.
    pub groups: Vec<Vec<usize>>,
}

impl HeadFeatures {
    /// Whether they are about at least two unrelated things.
    pub fn is_polysemantic(&self) -> bool {
        self.groups.len() >= 2
    }
}

/// The `most` live features with the largest share of each head, grouped: features whose
/// strongest `examples` share at least `overlap` of their tokens (Jaccard's index), directly or
/// through others, are in one group.
///
/// # Errors
/// When the autoencoder does not read the heads of an attention layer.
pub fn head_features(
    model: &Model,
    autoencoder: &Autoencoder,
    activity: &Activity,
    most: usize,
    examples: usize,
    overlap: f64,
) -> Result<Vec<HeadFeatures>> {
    let shares = head_shares(model, autoencoder)?;
    let live = activity.live();
    let heads = shares.first().map_or(0, Vec::len);
    let share = |feature: usize, head: usize| {
        let of_feature = shares.get(feature).and_then(|all| all.get(head));
        of_feature.copied().unwrap_or(0.0)
    };
    let of_head = |head: usize| {
        let mut features: Vec<(usize, f64)> = live
            .iter()
            .map(|feature| (*feature, share(*feature, head)))
            .collect();
        features.sort_by(|a, b| b.1.total_cmp(&a.1));
        features.truncate(most);
        let sets: Vec<_> = features
            .iter()
            .map(|(feature, _)| tokens_of(activity, *feature, examples))
            .collect();
        let groups = grouped(&sets, overlap)
            .into_iter()
            .map(|group| {
                let members = group.into_iter().filter_map(|index| features.get(index));
                members.map(|(feature, _)| *feature).collect()
            })
            .collect();
        HeadFeatures {
            head,
            features,
            groups,
        }
    };
    Ok((0..heads).map(of_head).collect())
}

/// Tokens at the strongest examples of a feature (`false`) and after them (`true`).
fn tokens_of(activity: &Activity, feature: usize, examples: usize) -> BTreeSet<(bool, u32)> {
    let strongest = activity.events(feature).iter().take(examples);
    strongest
        .flat_map(|event| {
            [(false, event.position), (true, event.position + 1)].map(|(after, position)| {
                let token = activity.token(event.window, position)?;
                Some((after, token))
            })
        })
        .flatten()
        .collect()
}

/// Indices of sets, those together that overlap, directly or through others.
fn grouped(sets: &[BTreeSet<(bool, u32)>], overlap: f64) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, set) in sets.iter().enumerate() {
        let is_related = |group: &Vec<usize>| {
            let mut members = group.iter().filter_map(|member| sets.get(*member));
            members.any(|member| jaccard(member, set) >= overlap)
        };
        let (related, mut others): (Vec<_>, Vec<_>) = groups.into_iter().partition(is_related);
        let mut merged: Vec<usize> = related.into_iter().flatten().collect();
        merged.push(index);
        others.push(merged);
        groups = others;
    }
    groups
}

fn jaccard(a: &BTreeSet<(bool, u32)>, b: &BTreeSet<(bool, u32)>) -> f64 {
    let both = a.intersection(b).count();
    let either = a.union(b).count();
    both as f64 / either.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_that_overlap_through_others_are_one_group() {
        let set = |tokens: &[u32]| tokens.iter().map(|token| (false, *token)).collect();
        let sets = [set(&[1, 2]), set(&[8, 9]), set(&[3, 4]), set(&[2, 3])];
        let mut groups = grouped(&sets, 0.3);
        groups.iter_mut().for_each(|group| group.sort_unstable());
        groups.sort();
        assert_eq!(groups, [vec![0, 2, 3], vec![1]]);
        assert_eq!(grouped(&sets, 0.9).len(), 4);
    }
}
