//! Everything about an autoencoder on one page.

use super::activity::{Activity, Event};
use super::families::{FeatureFamily, attention_on, feature_families};
use super::heads::head_features;
use crate::autoencoder::{Attention, Autoencoder, Quality, head_shares, logit_effects};
use crate::error::engine;
use crate::report::{Plot, Report, Section, Series, Table, TokenExample};
use crate::{Question, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model};

/// Tokens shown before and after a feature's place.
const BEFORE: usize = 24;
const AFTER: usize = 6;
/// Tokens whose logits a feature raises or lowers most.
const LOGITS: usize = 8;
/// Features of a head, and examples and overlap that relate them.
const OF_HEAD: (usize, usize, f64) = (10, 10, 0.1);
/// Above this share of tokens, features are chosen last.
const COMMON: f64 = 0.1;

/// Which features get a section of their own.
#[derive(Clone, Debug)]
pub struct Choice {
    /// These; when absent, those most often active, ones active on more than a tenth of all
    /// tokens last.
    pub features: Option<Vec<usize>>,
    /// How many, when they are not given.
    pub most: usize,
    /// Examples of each.
    pub examples: usize,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            features: None,
            most: 24,
            examples: 8,
        }
    }
}

/// Quality, heads, families, and a section for each chosen feature: contexts in which it is most
/// active, what it reads there, its heads, and the logits that it moves. `name` says how tokens
/// read.
///
/// # Errors
/// When the autoencoder does not read the heads of an attention layer of a causal language model.
pub fn report(
    model: &Model,
    autoencoder: &Autoencoder,
    windows: Vec<Vec<u32>>,
    choice: &Choice,
    name: &dyn Fn(u32) -> String,
) -> Result<Report> {
    let quality = Quality::of(model, autoencoder, &windows)?;
    let activity = Activity::collect(model, autoencoder, windows)?;
    let chosen = chosen(&activity, choice);
    let families = feature_families(model, autoencoder, &activity, &chosen, choice.examples)?;
    let page = Page {
        model,
        autoencoder,
        activity: &activity,
        shares: head_shares(model, autoencoder)?,
        name,
    };
    let sections = families
        .iter()
        .map(|family| page.section(family, choice.examples))
        .collect::<Result<Vec<_>>>()?;
    Ok(Report {
        title: format!("Features of {}", autoencoder.site()),
        notes: vec![
            format!("{} tokens", quality.tokens),
            format!(
                "{} features on a width of {}",
                autoencoder.features(),
                autoencoder.width()
            ),
        ],
        tables: vec![
            quality_table(&quality),
            heads_table(model, autoencoder, &activity)?,
            families_table(&activity, &families),
        ],
        plots: vec![histogram(&quality)],
        sections,
        ..Report::default()
    })
}

fn chosen(activity: &Activity, choice: &Choice) -> Vec<usize> {
    if let Some(features) = &choice.features {
        return features.clone();
    }
    let mut live = activity.live();
    live.sort_by_key(|feature| {
        let common = activity.frequency(*feature) > COMMON;
        (common, std::cmp::Reverse(activity.events(*feature).len()))
    });
    live.truncate(choice.most);
    live
}

fn quality_table(quality: &Quality) -> Table {
    let mut table = Table::new("Quality", &["measure", "value"]);
    let recovery = &quality.recovery;
    for (measure, value) in [
        ("active features per token (L0)", quality.l0),
        ("loss recovered", recovery.recovered()),
        ("loss, nats per token", recovery.clean),
        ("loss with the reconstruction", recovery.replaced),
        ("increase", recovery.increase()),
        ("loss with zeros", recovery.zero),
        ("variance unexplained", quality.unexplained),
        ("dead features", quality.dead),
    ] {
        table.push([measure.into(), value.into()]);
    }
    table
}

fn histogram(quality: &Quality) -> Plot {
    let bins = quality.histogram().into_iter();
    Plot {
        title: "How often features are active".to_owned(),
        x: "log10 of the share of tokens".to_owned(),
        y: "features in half a decade".to_owned(),
        series: vec![Series {
            name: "features".to_owned(),
            points: bins
                .map(|(edge, count)| (edge + 0.25, count as f64))
                .collect(),
        }],
    }
}

fn heads_table(model: &Model, autoencoder: &Autoencoder, activity: &Activity) -> Result<Table> {
    let (most, examples, overlap) = OF_HEAD;
    let mut table = Table::new(
        "The ten features that belong most to each head, related ones in brackets",
        &[
            "head",
            "largest share",
            "groups",
            "polysemantic",
            "features",
        ],
    );
    for head in head_features(model, autoencoder, activity, most, examples, overlap)? {
        let groups = head.groups.iter().map(|group| {
            let members: Vec<String> = group.iter().map(usize::to_string).collect();
            format!("[{}]", members.join(" "))
        });
        table.push([
            head.head.into(),
            head.features
                .first()
                .map_or(0.0, |(_, share)| *share)
                .into(),
            head.groups.len().into(),
            if head.is_polysemantic() { "yes" } else { "no" }.into(),
            groups.collect::<Vec<_>>().join(" ").into(),
        ]);
    }
    Ok(table)
}

fn families_table(activity: &Activity, families: &[FeatureFamily]) -> Table {
    let mut table = Table::new(
        "What features read",
        &[
            "feature",
            "share of tokens",
            "family",
            "near",
            "distance (tokens)",
            "induction",
            "specificity",
            "sensitivity",
        ],
    );
    for one in families {
        table.push([
            one.feature.into(),
            activity.frequency(one.feature).into(),
            one.family.name().into(),
            one.near.into(),
            one.distance.into(),
            one.induction.into(),
            one.specificity.into(),
            one.sensitivity.into(),
        ]);
    }
    table
}

struct Page<'a> {
    model: &'a Model,
    autoencoder: &'a Autoencoder,
    activity: &'a Activity,
    /// `[feature][head]`.
    shares: Vec<Vec<f64>>,
    name: &'a dyn Fn(u32) -> String,
}

impl Page<'_> {
    fn section(&self, family: &FeatureFamily, examples: usize) -> Result<Section> {
        let feature = family.feature;
        let events = self.activity.events(feature);
        let mut section = Section {
            title: format!("Feature {feature}"),
            notes: vec![
                format!(
                    "{}: active on {} tokens",
                    family.family.name(),
                    family.events
                ),
                format!(
                    "{:.0} % of what it reads is at most three tokens back",
                    100.0 * family.near
                ),
            ],
            ..Section::default()
        };
        // One example of each window.
        let mut seen = std::collections::BTreeSet::new();
        let strongest = events.iter().filter(|event| seen.insert(event.window));
        for event in strongest.take(examples) {
            section.examples.push(self.context(feature, event));
        }
        if let Some(event) = events.first()
            && let Some(tokens) = self.activity.windows().get(event.window)
        {
            let attention = attention_on(self.model, self.autoencoder, tokens)?;
            section
                .examples
                .push(self.sources(&attention, feature, event)?);
            section.tables.push(self.heads(&attention, feature, event)?);
            section.tables.push(self.logits(tokens, feature, event)?);
        }
        Ok(section)
    }

    fn names(&self, window: usize, range: std::ops::Range<usize>) -> Vec<String> {
        let tokens = range.filter_map(|position| self.activity.token(window, position));
        tokens.map(|token| (self.name)(token)).collect()
    }

    fn context(&self, feature: usize, event: &Event) -> TokenExample {
        let length = self
            .activity
            .windows()
            .get(event.window)
            .map_or(0, Vec::len);
        let start = event.position.saturating_sub(BEFORE);
        let end = (event.position + 1 + AFTER).min(length);
        let mut scores = vec![0.0; end.saturating_sub(start)];
        let here = self.activity.events(feature).iter();
        for other in here.filter(|other| other.window == event.window) {
            let place = other.position.checked_sub(start);
            if let Some(score) = place.and_then(|place| scores.get_mut(place)) {
                *score = f64::from(other.value);
            }
        }
        TokenExample {
            title: format!("window {}, value {:.3}", event.window, event.value),
            tokens: self.names(event.window, start..end),
            scores,
        }
    }

    fn sources(
        &self,
        attention: &Attention,
        feature: usize,
        event: &Event,
    ) -> Result<TokenExample> {
        let found = attention.attribute(self.autoencoder, feature, event.position)?;
        let scores = found.by_source().into_iter().take(event.position + 1);
        Ok(TokenExample {
            title: "what it reads at its strongest: attribution by source token".to_owned(),
            tokens: self.names(event.window, 0..event.position + 1),
            scores: scores.collect(),
        })
    }

    fn heads(&self, attention: &Attention, feature: usize, event: &Event) -> Result<Table> {
        let mut table = Table::new(
            "Heads",
            &[
                "head",
                "share of the decoder",
                "attribution at its strongest",
            ],
        );
        let by_head = attention
            .attribute(self.autoencoder, feature, event.position)?
            .by_head();
        for (head, score) in by_head.into_iter().enumerate() {
            let share = self.shares.get(feature).and_then(|all| all.get(head));
            let share = share.copied().unwrap_or(0.0);
            table.push([head.into(), share.into(), score.into()]);
        }
        Ok(table)
    }

    fn logits(&self, tokens: &[u32], feature: usize, event: &Event) -> Result<Table> {
        let shape = (1, tokens.len());
        let ids = engine(Tensor::from_slice(tokens, shape, &self.model.device()))?;
        let input = Input::tokens(ids);
        let question = Question::new(self.model, &input);
        let effects = logit_effects(&question, self.autoencoder, feature, event.position)?;
        let mut order: Vec<(u32, f64)> = (0u32..).zip(effects).collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut table = Table::new(
            "What it writes to the logits at its strongest",
            &["raised", "by", "lowered", "by "],
        );
        let pairs = order.iter().zip(order.iter().rev()).take(LOGITS);
        for ((up, raise), (down, lower)) in pairs {
            table.push([
                (self.name)(*up).into(),
                (*raise).into(),
                (self.name)(*down).into(),
                (*lower).into(),
            ]);
        }
        Ok(table)
    }
}
