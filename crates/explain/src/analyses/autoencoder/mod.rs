//! What the features of an attention layer's autoencoder are about (Kissane et al. 2024, arXiv
//! 2406.17759): when they are active, what they read, which heads they belong to, and what they
//! do. The paper labels features by hand; the proxies here are automatic, and a
//! [`report`] shows what a person needs to judge.

mod ablation;
mod activity;
mod dashboard;
mod families;
mod heads;
mod over_prompts;

pub use ablation::{Ablation, Against, FeatureEffect, Score, ablation_effects};
pub use activity::{Activity, Event};
pub use dashboard::{Choice, report};
pub use families::{Family, FeatureFamily, feature_families};
pub use heads::{HeadFeatures, head_features};
pub use over_prompts::{RankedFeature, RankedFeatures, rank_features};
