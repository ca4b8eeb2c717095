//! Fast tree-field integrators: exactness and time on random trees, metrics of graphs by functions of a
//! tree's, fields on a mesh and spectra of graphs, and a mask by distance in linear attention on digits and on
//! graphs of communities.
//!
//! The paper integrates on meshes and citation graphs that are not here and trains on ImageNet. Here trees,
//! graphs and a sphere are generated, and digits are printed.

mod vertices;

use super::jobs::means_by_seed;
use super::sequences::{
    Course, LEVELS, Measures, SIDE, digits, exponent, percent_right, quickest, train,
};
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_factor::trees::{Distortion, Function, Graph, IntegratorTree, RationalFit, Tree};
use lapidary_factor::{Matrix, symmetric_eigen};
use lapidary_parts::attention::MechanismSpec;
use lapidary_parts::attention::mechanism::topological::{FeatureMap, Mask, TopologicalSpec};
use lapidary_train::{Generator, generator};
use rand::RngExt;

/// How much is done.
struct Size {
    trees: &'static [usize],
    path: (usize, usize),
    mesh: usize,
    graphs: usize,
    digits: (usize, u64),
    /// Vertices of a graph whose communities are named, and steps.
    communities: (usize, u64),
    seeds: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                trees: &[200, 400],
                path: (80, 60),
                mesh: 12,
                graphs: 4,
                digits: (40, 2),
                communities: (24, 2),
                seeds: 1,
            },
            Scale::Small | Scale::Full => Self {
                trees: &[1000, 2000, 4000, 8000],
                path: (800, 600),
                mesh: 40,
                graphs: 40,
                digits: match scale {
                    Scale::Full => (20_000, 4000),
                    Scale::Smoke | Scale::Small => (4000, 400),
                },
                communities: match scale {
                    Scale::Full => (600, 600),
                    Scale::Smoke | Scale::Small => (160, 240),
                },
                seeds: match scale {
                    Scale::Full => 5,
                    Scale::Smoke | Scale::Small => 3,
                },
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let (mut claims, plots) = on_random_trees(setting, &size)?;
    setting.tell(|| "a graph's metric".to_owned());
    claims.push(of_a_graph(setting, &size)?);
    claims.push(over_a_graph(setting, &size)?);
    setting.tell(|| "rational functions on a path".to_owned());
    claims.push(by_poles(setting, &size)?);
    setting.tell(|| "fields on a mesh".to_owned());
    claims.push(on_a_mesh(setting, &size)?);
    setting.tell(|| "spectra of graphs".to_owned());
    claims.push(spectra(setting, &size)?);
    claims.push(on_digits(setting, &size)?);
    claims.extend(vertices::run(setting, size.communities, size.seeds)?);
    Ok(Reproduction {
        setting: format!(
            "random trees of {:?} vertices, weights 1; a path of {} vertices and {} chords; a sphere of {} \
             by {} vertices; {} graphs of either kind; printed digits as {} pixels, 3 blocks, {} steps of \
             32, {} seed(s); communities of {} vertices, {} steps",
            size.trees,
            size.path.0,
            size.path.1,
            size.mesh,
            2 * size.mesh,
            size.graphs,
            SIDE * SIDE,
            size.digits.1,
            size.seeds,
            size.communities.0,
            size.communities.1
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

/// Each vertex hangs from one before it.
fn random_tree(vertices: usize, random: &mut Generator) -> Result<Tree> {
    let edges = (1..vertices).map(|v| (random.random_range(0..v), v, 1.0));
    Ok(Tree::new(vertices, edges.collect())?)
}

fn numbers(count: usize, random: &mut Generator) -> Vec<f64> {
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// All pairs of vertices, distances along the tree.
fn brute(tree: &Tree, function: &Function, field: &[f64]) -> Vec<f64> {
    let of = |i: usize| {
        let distances = tree.distances(i);
        let each = distances.iter().zip(field);
        each.map(|(distance, x)| function.value(*distance) * x)
            .sum()
    };
    (0..tree.vertices()).map(of).collect()
}

/// The largest difference, relative to the largest number.
fn off(found: &[f64], expected: &[f64]) -> f64 {
    let largest = expected
        .iter()
        .fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / largest
}

fn on_random_trees(setting: &Setting, size: &Size) -> Result<(Vec<Claim>, Vec<Plot>)> {
    let functions = [
        (
            "e^−x",
            Function::Exponential {
                rate: -1.0,
                polynomial: vec![1.0],
            },
        ),
        ("x² + 2x", Function::Polynomial(vec![0.0, 2.0, 1.0])),
        ("1 / (1 + x²)", Function::any(|x| 1.0 / (1.0 + x * x))),
    ];
    let mut random = generator(setting.seed ^ 0x7ee);
    let (mut worst, mut ratios, mut exponents) = (0f64, Vec::new(), Vec::new());
    let mut series = Vec::new();
    for (name, function) in &functions {
        let (mut fast, mut slow) = (Vec::new(), Vec::new());
        for &vertices in size.trees {
            setting.tell(|| format!("{name} on a tree of {vertices} vertices"));
            let tree = random_tree(vertices, &mut random)?;
            let field = numbers(vertices, &mut random);
            let integrator = IntegratorTree::new(&tree);
            let found = integrator.integrate(function, &field, 1)?;
            let seconds = quickest(3, || {
                integrator.integrate(function, &field, 1)?;
                Ok(())
            })?;
            let mut expected = Vec::new();
            let all = quickest(1, || {
                expected = brute(&tree, function, &field);
                Ok(())
            })?;
            worst = worst.max(off(&found, &expected));
            fast.push((vertices as f64, seconds * 1e3));
            slow.push((vertices as f64, all * 1e3));
            if vertices == 4000 || vertices == size.trees.last().copied().unwrap_or(0) {
                ratios.push((*name, vertices, all / seconds));
            }
        }
        exponents.push((*name, exponent(&fast), exponent(&slow)));
        series.extend(
            [("integrator", fast), ("all pairs", slow)].map(|(way, points)| Series {
                name: format!("{name}, {way}"),
                points,
            }),
        );
    }
    let at_four: Vec<f64> = ratios
        .iter()
        .filter(|(name, vertices, _)| *vertices == 4000 && !name.starts_with('1'))
        .map(|(.., ratio)| *ratio)
        .collect();
    let least = at_four.iter().copied().fold(f64::INFINITY, f64::min);
    let told: Vec<String> = ratios
        .iter()
        .map(|(name, vertices, ratio)| format!("{name} {ratio:.0} times at {vertices}"))
        .collect();
    let slopes: Vec<String> = exponents
        .iter()
        .map(|(name, fast, slow)| format!("{name} {fast:.2}, all pairs {slow:.2}"))
        .collect();
    let gentle = exponents
        .iter()
        .filter(|(name, ..)| !name.starts_with('1'))
        .all(|(_, fast, _)| *fast < 1.3);
    let claims = vec![
        Claim::new(
            "integrators equal all pairs of vertices to 1e-9",
            "exact",
            format!("largest relative difference {worst:.1e}"),
            Verdict::of(worst < 1e-9),
        ),
        Claim::new(
            "with 4000 vertices they are at least 5 times as fast as all pairs",
            "5.7 times on synthetic graphs of thousands of nodes, 13 on meshes",
            told.join(", "),
            after_training(setting.scale, least >= 5.0),
        )
        .noted("the tree cut beforehand; all pairs with distances found on the way"),
        Claim::new(
            "their time grows with an exponent below 1.3 for polynomials and exponentials",
            "N log N",
            format!("exponents: {}", slopes.join("; ")),
            after_training(setting.scale, gentle),
        ),
    ];
    let plot = Plot {
        title: "Time of a field on a random tree".to_owned(),
        x: "vertices".to_owned(),
        y: "milliseconds".to_owned(),
        series,
    };
    Ok((claims, vec![plot]))
}

/// A path and chords, weights uniform in (0, 1).
fn with_chords((vertices, chords): (usize, usize), random: &mut Generator) -> Result<Graph> {
    let mut edges = Vec::new();
    for v in 1..vertices {
        edges.push((v - 1, v, random.random_range(0.0..1.0)));
    }
    for _ in 0..chords {
        let (a, b) = (
            random.random_range(0..vertices),
            random.random_range(0..vertices),
        );
        if a != b {
            edges.push((a, b, random.random_range(0.0..1.0)));
        }
    }
    Ok(Graph::new(vertices, edges)?)
}

/// Relative errors of a tree's distances for those of its graph, as they are and by a fitted function,
/// on pairs that the function was not fitted to.
fn metric_errors(graph: &Graph, random: &mut Generator) -> Result<[f64; 2]> {
    let tree = graph.spanning_tree()?;
    let mut pairs = [Vec::new(), Vec::new()];
    for (place, pairs) in pairs.iter_mut().enumerate() {
        for _ in 0..20 {
            let from = random.random_range(0..graph.vertices());
            let both = tree.distances(from).into_iter().zip(graph.distances(from));
            // Every other vertex to fit, the others to ask.
            pairs.extend(both.skip(place).step_by(2));
        }
    }
    let [fitted, asked] = pairs;
    let (function, _) = RationalFit::default().fit(&fitted);
    let norm: f64 = asked.iter().map(|pair| pair.1 * pair.1).sum();
    let error = |f: &dyn Fn(f64) -> f64| {
        let squares = asked.iter().map(|(tree, graph)| (f(*tree) - graph).powi(2));
        (squares.sum::<f64>() / norm).sqrt()
    };
    Ok([error(&|x| x), error(&|x| function.value(x))])
}

fn of_a_graph(setting: &Setting, size: &Size) -> Result<Claim> {
    let mut random = generator(setting.seed ^ 0x9a7);
    let graph = with_chords(size.path, &mut random)?;
    let [plain, fitted] = metric_errors(&graph, &mut random)?;
    Ok(Claim::new(
        "a quadratic over a quadratic of the tree's distance has an error for the graph's that is at least \
         20 % lower than that distance itself",
        "learned functions of few coefficients approach the graph's metric",
        format!("relative Frobenius error {fitted:.3} against {plain:.3}, on pairs not fitted to"),
        Verdict::of(fitted <= 0.8 * plain),
    ))
}

/// Random trees over a graph beside the spanning one.
fn over_a_graph(setting: &Setting, size: &Size) -> Result<Claim> {
    const SEEDS: u64 = 20;
    let mut random = generator(setting.seed ^ 0x9a7);
    let graph = with_chords(size.path, &mut random)?;
    let from: Vec<usize> = (0..20)
        .map(|_| random.random_range(0..graph.vertices()))
        .collect();
    let spanning = Distortion::of(&graph.spanning_tree()?, &graph, &from)?;
    let (mut means, mut least, mut largest) = (Vec::new(), f64::INFINITY, 0f64);
    for seed in setting.seed..setting.seed + SEEDS {
        let tree = graph.hierarchical_tree(seed)?;
        let found = Distortion::of(&tree, &graph, &from)?;
        means.push(found.mean);
        least = least.min(found.least);
        largest = largest.max(found.largest);
    }
    let (stretch, bound) = (mean(means), 4.0 * (graph.vertices() as f64).ln());
    Ok(Claim::new(
        "random trees of clusters never shorten a distance and stretch it by at most 4 ln n on average",
        "O(log n) in expectation",
        format!(
            "by {stretch:.2} on average, {bound:.1} allowed; least {least:.3}, largest {largest:.0}; a spanning \
             tree by {:.2}, largest {:.0}",
            spanning.mean, spanning.largest
        ),
        Verdict::of(least >= 1.0 - 1e-12 && stretch <= bound),
    )
    .noted(format!(
        "a path with chords, pairs of 20 vertices with all others, {SEEDS} seeds; a bound in expectation for every \
         graph is not the best tree of this one"
    )))
}

/// Rational functions of distances that no lattice holds, in blocks of low rank and laid out.
fn by_poles(setting: &Setting, size: &Size) -> Result<Claim> {
    let vertices = size.trees.last().copied().unwrap_or(0);
    let mut random = generator(setting.seed ^ 0xb10c);
    let edges = (1..vertices).map(|v| (v - 1, v, random.random_range(0.0..1.0)));
    let integrator = IntegratorTree::new(&Tree::new(vertices, edges.collect())?);
    let field = numbers(vertices, &mut random);
    let functions = [
        (
            "1 / (1 + x²)",
            Function::Rational {
                numerator: vec![1.0],
                denominator: vec![1.0, 0.0, 1.0],
            },
        ),
        (
            "e^−x/100 / (x + 1/2)",
            Function::Quotient {
                rate: -0.01,
                shift: 0.5,
            },
        ),
    ];
    let (mut worst, mut least, mut told) = (0f64, f64::INFINITY, Vec::new());
    for (name, function) in functions {
        let laid_out = function.clone();
        let laid_out = Function::any(move |x| laid_out.value(x));
        let timed = |function: &Function| -> Result<(f64, Vec<f64>)> {
            let mut found = Vec::new();
            let seconds = quickest(3, || {
                found = integrator.integrate(function, &field, 1)?;
                Ok(())
            })?;
            Ok((seconds, found))
        };
        let ((fast, found), (slow, expected)) = (timed(&function)?, timed(&laid_out)?);
        worst = worst.max(off(&found, &expected));
        least = least.min(slow / fast);
        told.push(format!("{name} {:.1} times", slow / fast));
    }
    Ok(Claim::new(
        "a path of random weights: blocks of low rank take rational functions at least 3 times as fast as \
         their matrices laid out, and differ by less than 1e-11",
        "N log³ N by fast multiplication of matrices such as Cauchy's",
        format!(
            "{} at {vertices} vertices, largest relative difference {worst:.1e}",
            told.join(", ")
        ),
        match worst < 1e-11 {
            true => after_training(setting.scale, least >= 3.0),
            false => Verdict::DoesNotHold,
        },
    ))
}

/// A sphere of rings of vertices: its mesh, and the normals, which are the places.
fn sphere(rings: usize) -> Result<(Graph, Vec<f64>)> {
    let around = 2 * rings;
    let point = |ring: usize, step: usize| {
        let polar = std::f64::consts::PI * (ring as f64 + 0.5) / rings as f64;
        let turn = std::f64::consts::TAU * step as f64 / around as f64;
        let (sin, cos) = polar.sin_cos();
        [sin * turn.cos(), sin * turn.sin(), cos]
    };
    let at = |ring: usize, step: usize| ring * around + step % around;
    let (mut edges, mut normals) = (Vec::new(), Vec::new());
    for ring in 0..rings {
        for step in 0..around {
            let here = point(ring, step);
            normals.extend(here);
            let beside = [(ring, step + 1), (ring + 1, step)];
            for (ring_of, step_of) in beside.into_iter().filter(|(ring, _)| *ring < rings) {
                let squares = here.iter().zip(point(ring_of, step_of));
                let squares: f64 = squares.map(|(a, b)| (a - b) * (a - b)).sum();
                edges.push((at(ring, step), at(ring_of, step_of), squares.sqrt()));
            }
        }
    }
    Ok((Graph::new(rings * around, edges)?, normals))
}

/// The mean cosine between normals and what was found of them, where they were hidden.
fn cosine(found: &[f64], normals: &[f64], known: &[bool]) -> f64 {
    let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let rows = found.chunks(3).zip(normals.chunks(3)).zip(known);
    mean(
        rows.filter(|(_, known)| !**known)
            .map(|((found, normal), _)| {
                let product: f64 = found.iter().zip(normal).map(|(a, b)| a * b).sum();
                product / (length(found) * length(normal)).max(f64::MIN_POSITIVE)
            }),
    )
}

/// Normals of a mesh of which four fifths are hidden, by what spreads of the rest, along a spanning tree
/// and along shortest paths.
fn on_a_mesh(setting: &Setting, size: &Size) -> Result<Claim> {
    let mut random = generator(setting.seed ^ 0x3e5);
    let (mesh, normals) = sphere(size.mesh)?;
    let integrator = IntegratorTree::new(&mesh.spanning_tree()?);
    let known: Vec<bool> = (0..mesh.vertices())
        .map(|_| random.random_bool(0.2))
        .collect();
    let mut field = normals.clone();
    for (row, known) in field.chunks_mut(3).zip(&known) {
        if !known {
            row.fill(0.0);
        }
    }
    let (mut on_tree, mut on_mesh) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    let distances: Vec<Vec<f64>> = (0..mesh.vertices()).map(|v| mesh.distances(v)).collect();
    for rate in [4.0, 8.0, 16.0, 32.0] {
        let fades = Function::Exponential {
            rate: -rate,
            polynomial: vec![1.0],
        };
        let found = integrator.integrate(&fades, &field, 3)?;
        on_tree = on_tree.max(cosine(&found, &normals, &known));
        let mut all = vec![0.0; field.len()];
        for (row, distances) in all.chunks_mut(3).zip(&distances) {
            for (x, distance) in field.chunks(3).zip(distances) {
                for (sum, x) in row.iter_mut().zip(x) {
                    *sum += fades.value(*distance) * x;
                }
            }
        }
        on_mesh = on_mesh.max(cosine(&all, &normals, &known));
    }
    Ok(Claim::new(
        "normals of a mesh of which four fifths are hidden are found along a spanning tree with a mean cosine \
         within 0.05 of that along shortest paths",
        "as accurate as exact integrators, 13 times as fast on meshes",
        format!(
            "{on_tree:.3} against {on_mesh:.3}, {} vertices, the best of four rates for each",
            mesh.vertices()
        ),
        after_training(setting.scale, on_tree >= on_mesh - 0.05),
    ))
}

/// Vertices of a graph that is to be named by its spectrum, and eigenvalues that are looked at.
const VERTICES: usize = 40;
const VALUES: usize = 10;

/// A ring with chords, between near vertices or between any.
fn ring(near: bool, random: &mut Generator) -> Result<Graph> {
    let mut edges: Vec<(usize, usize, f64)> = (0..VERTICES)
        .map(|v| (v, (v + 1) % VERTICES, 1.0))
        .collect();
    for _ in 0..VERTICES / 2 {
        let a = random.random_range(0..VERTICES);
        let b = match near {
            true => (a + random.random_range(2..5)) % VERTICES,
            false => random.random_range(0..VERTICES),
        };
        if a != b {
            edges.push((a, b, random.random_range(0.2..1.0)));
        }
    }
    Ok(Graph::new(VERTICES, edges)?)
}

/// The smallest eigenvalues of a matrix of distances, row by row.
fn smallest(distances: &[f64]) -> Result<Vec<f64>> {
    let of = |at: usize| distances.get(at).copied().unwrap_or(0.0);
    // As symmetric as it is but for rounding.
    let matrix = Matrix::from_fn(VERTICES, VERTICES, |i, j| {
        (of(i * VERTICES + j) + of(j * VERTICES + i)) / 2.0
    });
    let mut values = symmetric_eigen("distances", matrix.as_ref())?.values;
    values.truncate(VALUES);
    Ok(values)
}

/// The share that is named rightly by the three nearest of the others.
fn named(graphs: &[(bool, Vec<f64>)]) -> f64 {
    let apart =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum() };
    let right = graphs.iter().enumerate().filter(|(index, (kind, values))| {
        let others = graphs
            .iter()
            .enumerate()
            .filter(|(other, _)| other != index);
        let mut others: Vec<(f64, bool)> = others
            .map(|(_, (kind, other))| (apart(values, other), *kind))
            .collect();
        others.sort_by(|a, b| a.0.total_cmp(&b.0));
        others
            .iter()
            .take(3)
            .filter(|(_, other)| other == kind)
            .count()
            >= 2
    });
    right.count() as f64 / graphs.len().max(1) as f64
}

/// Graphs of two kinds, told apart by the spectra of distances in a tree and in the graph.
fn spectra(setting: &Setting, size: &Size) -> Result<Claim> {
    let mut random = generator(setting.seed ^ 0x5bec);
    let (mut on_trees, mut on_graphs) = (Vec::new(), Vec::new());
    for index in 0..2 * size.graphs {
        let near = index % 2 == 0;
        let graph = ring(near, &mut random)?;
        let integrator = IntegratorTree::new(&graph.spanning_tree()?);
        let distances = integrator.matrix(&Function::Polynomial(vec![0.0, 1.0]))?;
        on_trees.push((near, smallest(&distances)?));
        let distances: Vec<f64> = (0..VERTICES).flat_map(|v| graph.distances(v)).collect();
        on_graphs.push((near, smallest(&distances)?));
    }
    let (tree, graph) = (named(&on_trees), named(&on_graphs));
    Ok(Claim::new(
        "eigenvalues of distances in a tree tell two kinds of graphs apart as well as those of shortest \
         paths, within 5 points",
        "the accuracy of the kernel of shortest paths at up to 90 % less time for features",
        format!(
            "{:.0} % against {:.0} % of {} graphs, by their three nearest",
            100.0 * tree,
            100.0 * graph,
            on_trees.len()
        ),
        after_training(setting.scale, tree >= graph - 0.05),
    )
    .noted("the paper has random forests on published collections of graphs"))
}

fn on_digits(setting: &Setting, size: &Size) -> Result<Claim> {
    let measures = Measures {
        vocabulary: LEVELS,
        length: SIDE * SIDE,
        labels: 10,
        width: 32,
        heads: 4,
        blocks: 3,
    };
    let tree = |columns| {
        MechanismSpec::Topological(TopologicalSpec {
            columns,
            features: FeatureMap::Square,
            mask: Mask::Exponential,
            unit: SIDE as f64,
            ..TopologicalSpec::default()
        })
    };
    let plain = MechanismSpec::Topological(TopologicalSpec {
        features: FeatureMap::Square,
        // So far apart that all distances are none.
        unit: 1e9,
        ..TopologicalSpec::default()
    });
    let ways = [
        ("masked by a grid's tree", tree(Some(SIDE))),
        ("masked by a path", tree(None)),
        ("without a mask", plain),
    ];
    let found = means_by_seed(setting, "digits", &ways, size.seeds, |mechanism, seed| {
        let training = digits(size.digits.0, seed);
        let held_out = digits(size.digits.0 / 4, seed ^ 0xd161);
        let course = Course {
            steps: size.digits.1,
            batch: 32,
            rate: 3e-3,
            seed,
        };
        let model = train(measures.spec(mechanism.clone(), true), &training, &course)?;
        percent_right(&model, &held_out)
    })?;
    let of = |name: &str| super::sequences::of(&found, name);
    let better = of("masked by a grid's tree") >= of("without a mask") + 0.5;
    Ok(Claim::new(
        "digits: a mask of three numbers a layer is worth at least half a point of accuracy",
        "1.0 to 1.5 points over Performers on ImageNet and Places365",
        super::sequences::listed(&found),
        after_training(setting.scale, better),
    )
    .noted(format!(
        "features x², {} seed(s), a table of positions for all",
        size.seeds
    )))
}
