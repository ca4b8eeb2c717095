//! Rational functions of sums in blocks of low rank, roots, and trees over graphs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use lapidary_factor::polynomial::{Complex, roots};
use lapidary_factor::trees::{
    Blocked, Distortion, Function, Graph, IntegratorTree, TOLERANCE, Tree,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Rising numbers: uniform, or crowded towards zero.
fn rising(count: usize, longest: f64, crowded: bool, seed: u64) -> Vec<f64> {
    let mut random = random(seed);
    let mut all: Vec<f64> = (0..count)
        .map(|_| {
            let u: f64 = random.random();
            longest * if crowded { u.powi(5) } else { u }
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all
}

fn functions() -> Vec<Function> {
    let rational = |numerator: &[f64], denominator: &[f64]| Function::Rational {
        numerator: numerator.to_vec(),
        denominator: denominator.to_vec(),
    };
    vec![
        // Poles at ±i, at −1/2 twice, at −3 and −0.01, and none.
        rational(&[1.0], &[1.0, 0.0, 1.0]),
        rational(&[1.0, 2.0], &[0.25, 1.0, 1.0]),
        rational(&[0.3, -1.0, 0.2], &[0.03, 3.01, 1.0]),
        rational(&[1.0, 2.0, 3.0], &[2.0]),
        // As rational fits make them.
        rational(&[0.1, 0.9, -0.01], &[1.0, 0.02, 0.003]),
        Function::Quotient {
            rate: -0.4,
            shift: 0.7,
        },
        Function::Quotient {
            rate: 0.1,
            shift: 1e-3,
        },
    ]
}

#[test]
fn blocks_of_low_rank_are_off_by_no_more_than_they_say() {
    for (crowded, counts) in [(false, [500, 430]), (true, [500, 430]), (true, [90, 2000])] {
        for longest in [1.0, 40.0] {
            let x = rising(counts[0], longest, crowded, 1);
            let y = rising(counts[1], longest, crowded, 2);
            for function in functions() {
                let blocked = Blocked::new(&function, &x, &y).unwrap();
                // A field with the first, a middle and the last column alone, and a full one.
                let width = 4;
                let mut field = vec![0.0; y.len() * width];
                let alone = [0, y.len() / 2, y.len() - 1];
                for (feature, column) in alone.into_iter().enumerate() {
                    field[column * width + feature] = 1.0;
                }
                let mut numbers = random(3);
                for row in field.chunks_mut(width) {
                    row[3] = numbers.random_range(-1.0..1.0);
                }
                let found = blocked.multiply(&field, width);
                let value = |u: usize, w: usize| function.value(x[u] + y[w]);
                let mut largest = 0f64;
                let mut sums = vec![0.0; x.len()];
                let mut sizes = vec![0.0; x.len()];
                for u in 0..x.len() {
                    for w in 0..y.len() {
                        largest = largest.max(value(u, w).abs());
                        sums[u] += value(u, w) * field[w * width + 3];
                        sizes[u] += value(u, w).abs() * field[w * width + 3].abs();
                    }
                }
                for (u, row) in found.chunks(width).enumerate() {
                    for (feature, column) in alone.into_iter().enumerate() {
                        let off = (row[feature] - value(u, column)).abs();
                        // Rounding beside the bound.
                        assert!(off < (TOLERANCE + 2e-14) * largest, "{function:?}: {off:e}");
                    }
                    let off = (row[3] - sums[u]).abs();
                    let least = 1e-13 * largest * y.len() as f64;
                    assert!(off < 1e-12 * sizes[u] + least, "{function:?}: {off:e}");
                }
            }
        }
    }
}

/// A pole among the sums makes its neighbourhood dense and leaves the rest.
#[test]
fn a_pole_among_the_sums_is_gone_around() {
    let count = 2400;
    let x = rising(count, 1.0, false, 4);
    let function = Function::Rational {
        numerator: vec![1.0],
        denominator: vec![-0.912_345_678_9, 1.0],
    };
    let blocked = Blocked::new(&function, &x, &x).unwrap();
    let field = vec![1.0; count];
    let found = blocked.multiply(&field, 1);
    for (u, found) in found.iter().enumerate().step_by(7) {
        let terms = || x.iter().map(|y| function.value(x[u] + y));
        let (sum, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
        assert!((found - sum).abs() < 1e-11 * size, "{found} {sum}");
    }
    assert!(
        blocked.products() < count * count / 2,
        "{}",
        blocked.products()
    );
}

#[test]
fn products_are_few() {
    for function in functions() {
        let products = |count: usize| {
            let x = rising(count, 30.0, false, 5);
            let y = rising(count, 30.0, false, 6);
            Blocked::new(&function, &x, &y).unwrap().products() as f64
        };
        let exponent = (products(16_000) / products(4000)).log2() / 2.0;
        assert!(exponent < 1.25, "{function:?}: {exponent}");
        assert!(
            products(4000) < 16e6 / 8.0,
            "{function:?}: {}",
            products(4000)
        );
    }
}

#[test]
fn other_functions_have_no_poles_that_are_known() {
    let x = [0.0, 1.0];
    for function in [
        Function::any(|x| x),
        Function::Polynomial(vec![1.0]),
        Function::Gaussian([-1.0, 0.0, 0.0]),
        Function::Rational {
            numerator: vec![1.0],
            denominator: vec![0.0, 0.0],
        },
    ] {
        assert!(Blocked::new(&function, &x, &x).is_none(), "{function:?}");
    }
    // One vertex each, and none.
    let quotient = Function::Quotient {
        rate: -1.0,
        shift: 0.5,
    };
    let one = Blocked::new(&quotient, &x[..1], &x[1..]).unwrap();
    assert!((one.multiply(&[2.0], 1)[0] - 2.0 * (-1f64).exp() / 1.5).abs() < 1e-15);
    assert!(
        Blocked::new(&quotient, &[], &x)
            .unwrap()
            .multiply(&[1.0, 1.0], 1)
            .is_empty()
    );
}

/// The integrator takes that way where levels are many: a path of random weights, which no lattice holds.
#[test]
fn integrators_of_rational_functions_equal_all_pairs() {
    let mut numbers = random(7);
    let count = 1500;
    let edges = (1..count).map(|v| (v - 1, v, numbers.random_range(0.01..0.1)));
    let tree = Tree::new(count, edges.collect()).unwrap();
    let integrator = IntegratorTree::new(&tree);
    assert_eq!(integrator.lattice(), None);
    let x: Vec<f64> = (0..count)
        .map(|_| numbers.random_range(-1.0..1.0))
        .collect();
    for function in functions() {
        let found = integrator.integrate(&function, &x, 1).unwrap();
        for i in (0..count).step_by(37) {
            let distances = tree.distances(i);
            let terms = || {
                distances
                    .iter()
                    .zip(&x)
                    .map(|(d, x)| function.value(*d) * x)
            };
            let (sum, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
            assert!((found[i] - sum).abs() < 1e-11 * size, "{function:?}");
        }
    }
}

#[test]
fn roots_are_all_there() {
    // (x − 1)(x + 2)(x² + 4) x².
    let mut product = vec![1.0];
    for factor in [
        &[-1.0, 1.0][..],
        &[2.0, 1.0],
        &[4.0, 0.0, 1.0],
        &[0.0, 0.0, 1.0],
    ] {
        let mut next = vec![0.0; product.len() + factor.len() - 1];
        for (i, a) in product.iter().enumerate() {
            for (j, b) in factor.iter().enumerate() {
                next[i + j] += a * b;
            }
        }
        product = next;
    }
    // Nothing at the end is no degree.
    product.extend([0.0, 0.0]);
    let found = roots(&product);
    assert_eq!(found.len(), 6);
    let at = [(1.0, 0.0), (-2.0, 0.0), (0.0, 2.0), (0.0, -2.0), (0.0, 0.0)];
    for (re, im) in at {
        let near = found
            .iter()
            .filter(|z| (*z - Complex::new(re, im)).norm() < 1e-12);
        assert_eq!(near.count(), if (re, im) == (0.0, 0.0) { 2 } else { 1 });
    }
    assert!(roots(&[]).is_empty() && roots(&[0.0]).is_empty() && roots(&[3.0]).is_empty());
    // Twice the same, to the root of rounding.
    let twice = roots(&[0.25, 1.0, 1.0]);
    assert!(
        twice
            .iter()
            .all(|z| (z - Complex::new(-0.5, 0.0)).norm() < 1e-6),
        "{twice:?}"
    );
}

fn ring(count: usize) -> Graph {
    Graph::new(
        count,
        (0..count).map(|v| (v, (v + 1) % count, 1.0)).collect(),
    )
    .unwrap()
}

/// Connected, with weights of all sizes and some of none.
fn drawn(count: usize, seed: u64) -> Graph {
    let mut numbers = random(seed);
    let mut edges = Vec::new();
    for v in 1..count {
        edges.push((
            numbers.random_range(0..v),
            v,
            numbers.random_range(0.0..1.0f64).powi(4),
        ));
        let other = numbers.random_range(0..count);
        if other != v {
            edges.push((other, v, f64::from(numbers.random_range(0..3))));
        }
    }
    Graph::new(count, edges).unwrap()
}

#[test]
fn trees_over_a_graph_are_never_shorter() {
    for seed in 0..12 {
        let graph = drawn(60, seed);
        let tree = graph.hierarchical_tree(seed).unwrap();
        assert!((60..120).contains(&tree.vertices()), "{}", tree.vertices());
        assert_eq!(tree, graph.hierarchical_tree(seed).unwrap());
        for v in 0..60 {
            let (on_tree, on_graph) = (tree.distances(v), graph.distances(v));
            for (other, distance) in on_graph.iter().enumerate() {
                let found = on_tree[other];
                assert!(found >= distance * (1.0 - 1e-12), "{found} {distance}");
                // And what is at no distance stays there.
                assert!(*distance > 0.0 || found == 0.0, "{found}");
            }
        }
        let all: Vec<usize> = (0..60).collect();
        let distortion = Distortion::of(&tree, &graph, &all).unwrap();
        assert!(distortion.least >= 1.0 - 1e-12 && distortion.mean <= distortion.largest);
    }
    let trees: Vec<Tree> = (0..2)
        .map(|seed| ring(20).hierarchical_tree(seed).unwrap())
        .collect();
    assert_ne!(trees[0], trees[1]);
}

/// A ring of `n` loses an edge to any spanning tree, whose ends are then `n − 1` apart, seed or no seed. Here all
/// edges are alike, and each is some multiple of `ln n` long on average over seeds.
#[test]
fn on_average_no_edge_is_much_longer() {
    let (count, seeds) = (256, 60);
    let graph = ring(count);
    let lengths = |tree: &Tree| -> Vec<f64> {
        (0..count)
            .map(|v| tree.distances(v)[(v + 1) % count])
            .collect()
    };
    let spanning = lengths(&graph.spanning_tree().unwrap());
    assert_eq!(spanning.iter().copied().fold(0.0, f64::max), 255.0);
    let mut sum = 0.0;
    for seed in 0..seeds {
        let tree = graph.hierarchical_tree(seed).unwrap();
        sum += lengths(&tree).iter().sum::<f64>();
    }
    let mean = sum / (seeds as f64 * count as f64);
    assert!(mean < 8.0 * (count as f64).ln(), "{mean}");
}

#[test]
fn distortions_are_quotients_of_distances() {
    // A square: one edge is left out, whose ends are then three apart.
    let graph = ring(4);
    let tree = graph.spanning_tree().unwrap();
    let found = Distortion::of(&tree, &graph, &[0, 1, 2, 3]).unwrap();
    // Of twelve ordered pairs two have three for one, all others what they had.
    let mean = (10.0 + 2.0 * 3.0) / 12.0;
    assert!((found.mean - mean).abs() < 1e-12);
    assert_eq!((found.least, found.largest), (1.0, 3.0));
}

#[test]
fn what_no_tree_stands_over_is_refused() {
    let apart = Graph::new(3, vec![(0, 1, 1.0)]).unwrap();
    let said = apart.hierarchical_tree(0).unwrap_err().to_string();
    assert!(said.contains("is not connected"), "{said}");
    assert!(Distortion::of(&Tree::path(3), &apart, &[0]).is_err());
    assert!(Distortion::of(&Tree::path(2), &Graph::grid(3, 3), &[0]).is_err());
    let one = Graph::new(1, Vec::new())
        .unwrap()
        .hierarchical_tree(0)
        .unwrap();
    assert_eq!(one.vertices(), 1);
    let together = Graph::new(3, vec![(0, 1, 0.0), (1, 2, 0.0)]).unwrap();
    assert_eq!(
        together.hierarchical_tree(0).unwrap().distances(0),
        [0.0; 3]
    );
}

/// Vertices that are a whole number of levels apart are as far apart as that number says.
#[test]
fn a_hierarchy_by_level_has_the_distances_of_the_tree() {
    for seed in 0..6 {
        let mut random = random(seed);
        let count = 30;
        let mut edges: Vec<(usize, usize, f64)> = (1..count)
            .map(|v| (random.random_range(0..v), v, random.random_range(0.1..3.0)))
            .collect();
        // And two that are at no distance.
        edges.push((4, 9, 0.0));
        let graph = Graph::new(count, edges).unwrap();
        let hierarchy = graph.hierarchy(seed).unwrap();
        let (tree, levels) = (hierarchy.tree().unwrap(), hierarchy.by_level().unwrap());
        let lengths = hierarchy.lengths();
        assert!(lengths.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(tree, graph.hierarchical_tree(seed).unwrap());
        let (mut seen, mut apart) = (0, 0);
        for vertex in 0..count {
            let both = tree
                .distances(vertex)
                .into_iter()
                .zip(levels.distances(vertex));
            for (distance, levels) in both.take(count) {
                assert_eq!(levels % 2.0, 0.0);
                let said = lengths[levels as usize];
                assert!((distance - said).abs() <= 1e-12 * said, "{distance} {said}");
                seen += 1;
                apart += usize::from(levels > 0.0);
            }
        }
        // All pairs but each with itself, and the two.
        assert_eq!((seen, apart), (count * count, count * count - count - 2));
    }
}
