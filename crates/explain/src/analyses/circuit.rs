//! The circuit of heads behind a behaviour, by contextual decomposition (Hsu et al., arXiv
//! 2407.00886).

use crate::Result;
use crate::contextual::{
    Ablation, Case, Circuit, Control, Means, Method, Metric, Node, Scorer, Search, discover,
};
use crate::report::{Graph, GraphEdge, GraphNode, Plot, Report, Series, Table};
use lapidary_model::Model;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// How a circuit is searched for and judged.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How contributions are found.
    pub method: Method,
    /// The search.
    pub search: Search,
    /// What the circuit is to be faithful to.
    pub metric: Metric,
    /// Whether nodes that the circuit is as faithful without are dropped.
    pub prune: bool,
    /// Random circuits of each size to compare with.
    pub draws: usize,
    /// Seed of the random circuits.
    pub seed: u64,
}

/// A circuit with its measures.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The search.
    pub circuit: Circuit,
    /// Its nodes, after pruning.
    pub nodes: Vec<Node>,
    /// The metric of the whole model.
    pub full: f64,
    /// The metric when every head is set to its mean.
    pub empty: f64,
    /// The faithfulness of `nodes`.
    pub faithfulness: f64,
    /// Random circuits.
    pub controls: Vec<Control>,
}

/// Searches for the circuit behind the targets of `cases` among `candidates`, and measures it.
///
/// # Errors
/// As [`Scorer::new`], [`discover`] and [`Ablation::new`].
pub fn judged_circuit(
    model: &Model,
    cases: &[Case],
    means: &Means,
    candidates: &[Node],
    settings: &Settings,
) -> Result<Judged> {
    let scorer = Scorer::new(model, cases, means.clone(), settings.method)?;
    let circuit = discover(&scorer, &settings.search, candidates)?;
    let ablation = Ablation::new(model, cases, means.clone(), settings.metric)?;
    let nodes = match settings.prune {
        // What was found last is tried first.
        true => {
            let order: Vec<Node> = circuit.nodes.iter().rev().copied().collect();
            let kept = ablation.pruned(&order)?;
            let is_kept = |node: &Node| kept.contains(node);
            circuit.nodes.iter().copied().filter(is_kept).collect()
        }
        false => circuit.nodes.clone(),
    };
    let faithfulness = ablation.faithfulness(std::slice::from_ref(&nodes))?;
    let faithfulness = faithfulness.first().copied().unwrap_or(f64::NAN);
    let mut generator = ChaCha8Rng::seed_from_u64(settings.seed);
    let controls = ablation.controls(faithfulness, candidates, settings.draws, &mut generator)?;
    Ok(Judged {
        circuit,
        nodes,
        full: ablation.full(),
        empty: ablation.empty(),
        faithfulness,
        controls,
    })
}

/// Rows of the table of ranked nodes.
const RANKED: usize = 24;

/// A circuit as tables, a plot and a graph; `notes` say what it was searched on.
pub fn report(found: &Judged, notes: Vec<String>) -> Report {
    let mut report = Report {
        title: "The circuit behind a behaviour".to_owned(),
        notes,
        ..Report::default()
    };
    report.notes.push(format!(
        "{} heads carry {:.1} % of the difference between the whole model ({:.4}) and the model \
         with every head at its mean ({:.4})",
        found.nodes.len(),
        100.0 * found.faithfulness,
        found.full,
        found.empty
    ));
    report.tables = vec![ranking(found), circuit(found), controls(found)];
    report.plots = vec![plot(found)];
    report.graphs = vec![graph(found)];
    report
}

fn ranking(found: &Judged) -> Table {
    let mut table = Table::new(
        "Contributions to the scores, the largest first",
        &["head", "score", "in the circuit"],
    );
    let mut ranked = match found.circuit.rounds.first() {
        Some(round) => round.scores.clone(),
        None => Vec::new(),
    };
    ranked.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    for (node, score) in ranked.into_iter().take(RANKED) {
        let place = if found.nodes.contains(&node) {
            "yes"
        } else {
            ""
        };
        table.push([node.to_string().into(), score.into(), place.into()]);
    }
    table
}

fn circuit(found: &Judged) -> Table {
    let mut table = Table::new("The circuit", &["head", "found in round", "for"]);
    for node in &found.nodes {
        let rounds = found.circuit.rounds.iter().enumerate();
        let first = rounds
            .filter(|(_, round)| round.found.contains(node))
            .map(|(index, round)| (index + 1, &round.targets))
            .next();
        let (round, targets) = match first {
            Some((round, targets)) => (round.to_string(), named(targets)),
            None => (String::new(), String::new()),
        };
        table.push([node.to_string().into(), round.into(), targets.into()]);
    }
    table
}

fn named(targets: &[Node]) -> String {
    match targets {
        [] => "the scores".to_owned(),
        targets => {
            let names: Vec<String> = targets.iter().map(ToString::to_string).collect();
            names.join(", ")
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn controls(found: &Judged) -> Table {
    let mut table = Table::new(
        "Random circuits",
        &[
            "share of the heads",
            "mean faithfulness",
            "share that this circuit beats",
        ],
    );
    for control in &found.controls {
        table.push([
            format!("{:.0} %", 100.0 * control.share).into(),
            mean(&control.faithfulness).into(),
            control.beaten.into(),
        ]);
    }
    table
}

fn plot(found: &Judged) -> Plot {
    let line = |name: &str, y: &dyn Fn(&Control) -> f64| Series {
        name: name.to_owned(),
        points: found
            .controls
            .iter()
            .map(|control| (100.0 * control.share, y(control)))
            .collect(),
    };
    Plot {
        title: "Faithfulness beside random circuits".to_owned(),
        x: "heads in a random circuit, %".to_owned(),
        y: "faithfulness".to_owned(),
        series: vec![
            line("the circuit", &|_| found.faithfulness),
            line("random circuits, mean", &|control| {
                mean(&control.faithfulness)
            }),
        ],
    }
}

/// The circuit's heads in rows by block, the scores above them.
fn graph(found: &Judged) -> Graph {
    let mut nodes: Vec<Node> = found.nodes.clone();
    nodes.sort();
    let top = nodes.last().map_or(0, |node| node.block + 1);
    let index = |node: &Node| nodes.iter().position(|other| other == node);
    let mut graph = Graph {
        title: "The circuit, from the first block upwards".to_owned(),
        ..Graph::default()
    };
    graph.nodes = nodes
        .iter()
        .map(|node| GraphNode {
            name: node.to_string(),
            row: node.block,
        })
        .collect();
    let scores = graph.nodes.len();
    graph.nodes.push(GraphNode {
        name: "scores".to_owned(),
        row: top,
    });
    for edge in &found.circuit.edges {
        let to = match &edge.to {
            Some(node) => index(node),
            None => Some(scores),
        };
        if let (Some(from), Some(to)) = (index(&edge.from), to) {
            graph.edges.push(GraphEdge {
                from,
                to,
                weight: edge.score,
            });
        }
    }
    graph
}
