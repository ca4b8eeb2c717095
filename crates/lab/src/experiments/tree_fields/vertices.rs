//! Communities of a random graph, named from words of its vertices by attention over the graph: under the
//! distances of shortest paths, of trees that stand for them, and under none.
//!
//! Citation graphs are not here. In a stochastic block model two vertices of a community are joined more often than
//! two of different ones; each vertex bears one word, more often one of its community's than chance would have it. What
//! a vertex cannot tell, its neighbours do.

use crate::experiments::jobs::means_by_seed;
use crate::experiments::sequences::{listed, of};
use crate::experiments::{after_learning, classifier, numbers};
use crate::{Claim, Result, Setting};
use lapidary_factor::trees::Graph;
use lapidary_kernels::{DType, Device};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, InputSpec, Model, ModelSpec, Pass, TokenInput,
};
use lapidary_parts::attention::mechanism::topological::{
    FeatureMap, GraphSpec, Mask, Metric, TopologicalSpec,
};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_train::data::{IGNORE, Vertices, VerticesFile};
use lapidary_train::{Generator, batch_loss, generator};
use rand::RngExt;
use std::collections::BTreeMap;

/// Communities, and words of each.
const COMMUNITIES: usize = 4;
const WORDS: usize = 4;
/// Neighbours of a vertex on average, in its own community and in all others.
const NEIGHBOURS: [f64; 2] = [6.0, 1.5];
/// Probability of a word of one's own; any other time it is any word.
const OWN_WORD: f64 = 0.3;
/// Share of vertices whose community is told.
const TOLD: f64 = 0.5;
/// Random trees.
const TREES: usize = 4;

const SHORTEST: &str = "shortest paths";
const RANDOM: &str = "four random trees";
const SPANNING: &str = "a spanning tree";
const NONE: &str = "no mask";

/// Names vertices in each way.
pub(super) fn run(
    setting: &Setting,
    (vertices, steps): (usize, u64),
    seeds: u64,
) -> Result<[Claim; 2]> {
    let trees = Metric::RandomTrees {
        count: TREES,
        seed: 0,
    };
    let ways = [
        (SHORTEST, Some(Metric::ShortestPaths)),
        (RANDOM, Some(trees)),
        (SPANNING, Some(Metric::SpanningTree)),
        (NONE, None),
    ];
    let found = means_by_seed(setting, "communities", &ways, seeds, |metric, seed| {
        let world = World::new(vertices, seed)?;
        let spec = spec(&world, *metric);
        let mut source = classifier::Narrow(Initialiser::new(seed, DType::F32, Device::Cpu));
        let model = Model::trainable(spec, &mut source)?;
        let told = world.vertices()?.sequence();
        let model = classifier::fit(&model, steps, 1e-2, |_| {
            Ok(batch_loss(&model, &told, Pass::default())?)
        })?;
        world.percent_named(&model)
    })?;
    let right = |name: &str| of(&found, name);
    let learned = right(SHORTEST) >= right(NONE) + 2.0;
    let told = listed(&found);
    let note = format!(
        "a stochastic block model of {vertices} vertices, {COMMUNITIES} communities, {} neighbours within and {} \
         without, half of the vertices told, the others asked about; {seeds} seed(s)",
        NEIGHBOURS[0], NEIGHBOURS[1]
    );
    Ok([
        Claim::new(
            "communities of a graph: the mean mask over four random trees names vertices within 5 points of \
             the mask of shortest paths, and better than no mask",
            "estimate; a tree's metric stands for the graph's, O(log n) off in expectation",
            told.clone(),
            after_learning(
                setting.scale,
                learned,
                right(RANDOM) >= right(SHORTEST) - 5.0 && right(RANDOM) > right(NONE),
            ),
        )
        .noted(note.clone()),
        Claim::new(
            "communities of a graph: so does the mask of one spanning tree",
            "estimate; the paper spans graphs by such a tree",
            told,
            after_learning(
                setting.scale,
                learned,
                right(SPANNING) >= right(SHORTEST) - 5.0 && right(SPANNING) > right(NONE),
            ),
        )
        .noted(note),
    ])
}

/// A graph, and what its vertices bear.
struct World {
    edges: Vec<(usize, usize, f64)>,
    communities: Vec<usize>,
    words: Vec<u32>,
    told: Vec<bool>,
}

impl World {
    fn new(vertices: usize, seed: u64) -> Result<Self> {
        let mut random = generator(seed ^ 0x5b3);
        let communities: Vec<usize> = (0..vertices)
            .map(|_| random.random_range(0..COMMUNITIES))
            .collect();
        let words = communities
            .iter()
            .map(|community| {
                let own = community * WORDS + random.random_range(0..WORDS);
                let any = random.random_range(0..COMMUNITIES * WORDS);
                let word = if random.random_bool(OWN_WORD) {
                    own
                } else {
                    any
                };
                word as u32
            })
            .collect();
        let told = (0..vertices).map(|_| random.random_bool(TOLD)).collect();
        Ok(Self {
            edges: joined(
                block_model(&communities, &mut random),
                vertices,
                &mut random,
            )?,
            communities,
            words,
            told,
        })
    }

    /// The vertices, to be trained on.
    fn vertices(&self) -> Result<Vertices> {
        let classes = self
            .communities
            .iter()
            .map(|community| Some(class(*community)));
        Ok(Vertices::new(VerticesFile {
            tokens: self.words.clone(),
            classes: classes.collect(),
            held_out: self.told.iter().map(|told| !told).collect(),
        })?)
    }

    /// How many of a hundred vertices that were not told get their community.
    fn percent_named(&self, model: &Model) -> Result<f64> {
        let asked = self.vertices()?.asked()?.sequence();
        let (inputs, _) = asked.tensors(&Device::Cpu)?;
        let output = model.forward(&lapidary_model::Input::tokens(inputs), Pass::default())?;
        let logits = numbers(&output.into_logits()?.into_value())?;
        let width = logits.len() / asked.length.max(1);
        let rows = logits.chunks(width.max(1)).zip(&asked.targets);
        let (mut right, mut count) = (0usize, 0usize);
        for (row, target) in rows.filter(|(_, target)| **target != IGNORE) {
            let logit = |community: &usize| {
                let place = class(*community) as usize;
                row.get(place).copied().unwrap_or(f64::NEG_INFINITY)
            };
            let said = (0..COMMUNITIES).max_by(|a, b| logit(a).total_cmp(&logit(b)));
            right += usize::from(said.map(class) == Some(*target));
            count += 1;
        }
        Ok(100.0 * right as f64 / count.max(1) as f64)
    }
}

/// The token that stands for a community, behind all words.
fn class(community: usize) -> u32 {
    (COMMUNITIES * WORDS + community) as u32
}

/// Edges between vertices of a community, and fewer between those of different ones.
fn block_model(communities: &[usize], random: &mut Generator) -> Vec<(usize, usize, f64)> {
    let each = communities.len() as f64 / COMMUNITIES as f64;
    let [within, without] = NEIGHBOURS;
    let probability = |same: bool| match same {
        true => (within / each).min(1.0),
        false => (without / (each * (COMMUNITIES - 1) as f64)).min(1.0),
    };
    let mut edges = Vec::new();
    for (a, community) in communities.iter().enumerate() {
        for (b, other) in communities.iter().enumerate().skip(a + 1) {
            if random.random_bool(probability(community == other)) {
                edges.push((a, b, 1.0));
            }
        }
    }
    edges
}

/// The same with an edge from each part that nothing joins to the first vertex's to any vertex of that.
fn joined(
    mut edges: Vec<(usize, usize, f64)>,
    vertices: usize,
    random: &mut Generator,
) -> Result<Vec<(usize, usize, f64)>> {
    loop {
        let graph = Graph::new(vertices, edges.clone())?;
        let distances = graph.distances(0);
        let Some(apart) = distances.iter().position(|d| d.is_infinite()) else {
            return Ok(edges);
        };
        let reached = distances.iter().enumerate();
        let reached: Vec<usize> = reached
            .filter(|(_, distance)| distance.is_finite())
            .map(|(vertex, _)| vertex)
            .collect();
        let to = reached.get(random.random_range(0..reached.len().max(1)));
        edges.push((to.copied().unwrap_or(0), apart, 1.0));
    }
}

/// An encoder over the vertices of a graph, which has no other positions; without a metric, one in which all
/// distances are none.
fn spec(world: &World, metric: Option<Metric>) -> ModelSpec {
    let vertices = world.words.len();
    let mechanism = TopologicalSpec {
        graph: Some(GraphSpec::new(vertices, world.edges.clone())),
        metric: metric.unwrap_or_default(),
        features: FeatureMap::Square,
        mask: Mask::Exponential,
        per_head: true,
        unit: if metric.is_some() { 3.0 } else { 1e9 },
        ..TopologicalSpec::default()
    };
    let width = 32;
    ModelSpec {
        width,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: COMMUNITIES * (WORDS + 1),
            length: vertices,
            position: AbsolutePosition::None,
            token_types: 0,
            norm: None,
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks: vec![BlockSpec {
            repeat: 2,
            wiring: Wiring::PreNorm,
            norm: NormSpec::default(),
            attention: MixerSpec::MultiHead(MultiHeadSpec {
                mechanism: MechanismSpec::Topological(mechanism),
                ..MultiHeadSpec::new(4)
            }),
            cross_attention: None,
            shared: false,
            layer_scale: None,
            drop_path: 0.0,
            dropout_by_feature: false,
            coding_step: None,
            shortcuts: false,
            feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                hidden: 2 * width,
                activation: Default::default(),
                bias: true,
            })),
            dropout: 0.0,
        }],
        final_norm: Some(NormSpec::default()),
        head: HeadSpec::LanguageModel {
            tied: false,
            bias: true,
            transform: None,
        },
        low_rank: BTreeMap::new(),
        quantised: BTreeMap::new(),
        organisation: None,
        initial: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worlds_are_joined_and_split_into_told_and_asked() {
        let world = World::new(60, 3).unwrap();
        let graph = Graph::new(60, world.edges.clone()).unwrap();
        assert!(graph.distances(0).iter().all(|d| d.is_finite()));
        let training = world.vertices().unwrap();
        let (told, asked) = (training.sequence(), training.asked().unwrap().sequence());
        assert_eq!(told.inputs, asked.inputs);
        for (a, b) in told.targets.iter().zip(&asked.targets) {
            assert!((*a == IGNORE) != (*b == IGNORE));
        }
        // Neighbours share a community more often than one time in four.
        let same = world.edges.iter();
        let same = same.filter(|(a, b, _)| world.communities[*a] == world.communities[*b]);
        assert!(2 * same.count() > world.edges.len());
    }

    #[test]
    fn specs_are_valid_in_every_way() {
        let world = World::new(24, 1).unwrap();
        for metric in [
            None,
            Some(Metric::ShortestPaths),
            Some(Metric::SpanningTree),
        ] {
            spec(&world, metric).validate().unwrap();
        }
    }
}
