//! Integrators of trees, against all pairs of vertices.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use lapidary_factor::trees::{Function, Graph, IntegratorTree, RationalFit, Tree, hankel};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn field(count: usize, seed: u64) -> Vec<f64> {
    let mut random = random(seed);
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// Every vertex hangs from one before it, at a distance.
fn hung(
    vertices: usize,
    mut from: impl FnMut(usize) -> usize,
    mut weight: impl FnMut() -> f64,
) -> Tree {
    let edges = (1..vertices).map(|v| (from(v), v, weight())).collect();
    Tree::new(vertices, edges).unwrap()
}

/// Trees of all shapes, with weights of all kinds.
fn trees(vertices: usize) -> Vec<(String, Tree)> {
    let mut all = Vec::new();
    for weights in ["one", "whole", "any", "some zero"] {
        for shape in ["path", "star", "caterpillar", "random", "binary"] {
            let mut numbers = random(5);
            let weight = || match weights {
                "one" => 1.0,
                "whole" => f64::from(numbers.random_range(1..5)),
                "any" => numbers.random_range(0.1..1.0),
                _ => f64::from(numbers.random_range(0..2)) * 0.7,
            };
            let mut numbers = random(6);
            let from = |v: usize| match shape {
                "path" => v - 1,
                "star" => 0,
                "caterpillar" => (v - 1) / 2 * 2,
                "binary" => (v - 1) / 2,
                _ => numbers.random_range(0..v),
            };
            all.push((
                format!("{shape}, weights {weights}"),
                hung(vertices, from, weight),
            ));
        }
    }
    all
}

fn functions() -> Vec<Function> {
    vec![
        Function::Polynomial(vec![1.0]),
        Function::Polynomial(vec![1.0, 1.0]),
        Function::Polynomial(vec![0.3, -0.2, 0.05, 0.01]),
        Function::Exponential {
            rate: -1.0,
            polynomial: vec![1.0],
        },
        Function::Exponential {
            rate: -0.3,
            polynomial: vec![0.5, 0.2, -0.1],
        },
        Function::Wave {
            frequency: 0.7,
            phase: 0.4,
        },
        Function::Rational {
            numerator: vec![1.0, 0.5],
            denominator: vec![1.0, 0.2, 0.1],
        },
        Function::Quotient {
            rate: -0.2,
            shift: 0.8,
        },
        Function::Gaussian([-0.05, 0.1, 0.2]),
        Function::any(|x| 1.0 / (1.0 + x * x)),
        // One where a vertex meets itself.
        Function::any(|x| f64::from(u8::from(x == 0.0))),
    ]
}

/// `Σ_j f(dist(i, j)) X_j` over all pairs, along the tree.
fn brute(tree: &Tree, function: &Function, field: &[f64], width: usize) -> Vec<f64> {
    let mut sum = vec![0.0; field.len()];
    for i in 0..tree.vertices() {
        for (j, distance) in tree.distances(i).into_iter().enumerate() {
            for feature in 0..width {
                sum[i * width + feature] += function.value(distance) * field[j * width + feature];
            }
        }
    }
    sum
}

#[track_caller]
fn assert_near(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() < 1e-10 * largest, "{what}: {a} {b}");
    }
}

#[test]
fn integrators_equal_all_pairs_of_vertices() {
    for (name, tree) in trees(120) {
        for leaf in [6, 11, 200] {
            let integrator = IntegratorTree::with_leaves(&tree, leaf).unwrap();
            for function in functions() {
                // Any two vertices at no distance meet in full.
                for width in 1..=3 {
                    let x = field(120 * width, 7);
                    let found = integrator.integrate(&function, &x, width).unwrap();
                    let expected = brute(&tree, &function, &x, width);
                    assert_near(&found, &expected, &format!("{name}, {function:?}, {leaf}"));
                }
            }
        }
    }
}

/// Levels so many that products are transforms.
#[test]
fn long_paths_go_through_transforms() {
    for step in [1.0, 0.5] {
        let tree = hung(700, |v| v - 1, || step);
        let integrator = IntegratorTree::new(&tree);
        assert_eq!(integrator.lattice(), Some(step));
        for function in functions() {
            let x = field(700 * 2, 3);
            let found = integrator.integrate(&function, &x, 2).unwrap();
            let expected = brute(&tree, &function, &x, 2);
            assert_near(&found, &expected, &format!("{function:?}"));
        }
    }
}

#[test]
fn sums_itself_and_symmetry() {
    for (name, tree) in trees(90) {
        let integrator = IntegratorTree::with_leaves(&tree, 8).unwrap();
        let (u, w) = (field(90, 1), field(90, 2));
        let all = integrator
            .integrate(&Function::Polynomial(vec![1.0]), &u, 1)
            .unwrap();
        let sum: f64 = u.iter().sum();
        assert!(all.iter().all(|y| (y - sum).abs() < 1e-11), "{name}");
        if !name.contains("zero") {
            let own = Function::any(|x| f64::from(u8::from(x == 0.0)));
            assert_near(&integrator.integrate(&own, &u, 1).unwrap(), &u, &name);
        }
        for function in functions() {
            let apply = |x: &[f64]| integrator.integrate(&function, x, 1).unwrap();
            let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let (one, other) = (dot(&u, &apply(&w)), dot(&apply(&u), &w));
            assert!((one - other).abs() < 1e-9 * (1.0 + one.abs()), "{name}");
            let both: Vec<f64> = u.iter().zip(&w).map(|(u, w)| 2.0 * u - 3.0 * w).collect();
            let sum: Vec<f64> = apply(&u)
                .iter()
                .zip(apply(&w))
                .map(|(u, w)| 2.0 * u - 3.0 * w)
                .collect();
            assert_near(&apply(&both), &sum, &name);
        }
    }
}

/// On a path `λ^distance` is two recurrences, one from each end.
#[test]
fn on_a_path_a_decay_is_two_recurrences() {
    let (count, factor) = (300, 0.93f64);
    let integrator = IntegratorTree::new(&Tree::path(count));
    let decay = Function::Exponential {
        rate: factor.ln(),
        polynomial: vec![1.0],
    };
    let x = field(count, 9);
    let found = integrator.integrate(&decay, &x, 1).unwrap();
    let mut expected: Vec<f64> = x.iter().map(|x| -x).collect();
    for order in [(0..count).collect::<Vec<_>>(), (0..count).rev().collect()] {
        let mut state = 0.0;
        for at in order {
            state = factor * state + x[at];
            expected[at] += state;
        }
    }
    assert_near(&found, &expected, "two recurrences");
}

#[test]
fn every_cut_leaves_a_quarter_on_both_sides() {
    for (name, tree) in trees(1000) {
        let integrator = IntegratorTree::with_leaves(&tree, 6).unwrap();
        for split in integrator.splits() {
            let [left, right] = [0, 1].map(|side| split.sides[side].vertices.len() + 1);
            // Both have the vertex that was cut at.
            let all = left + right - 1;
            assert!(left.min(right) >= all / 4, "{name}: {left} and {right}");
        }
        let bound = 1000f64.ln() / (4.0f64 / 3.0).ln() + 3.0;
        assert!(
            (integrator.depth() as f64) < bound,
            "{name}: {}",
            integrator.depth()
        );
    }
}

#[test]
fn spanning_trees_are_lightest_and_the_same_each_time() {
    let mut numbers = random(4);
    let mut edges = Vec::new();
    for b in 1..40usize {
        edges.push((
            numbers.random_range(0..b),
            b,
            f64::from(numbers.random_range(1..4)),
        ));
    }
    for _ in 0..80 {
        let (a, b) = (
            numbers.random_range(0..40usize),
            numbers.random_range(0..40usize),
        );
        if a != b {
            edges.push((a, b, f64::from(numbers.random_range(1..4))));
        }
    }
    let graph = Graph::new(40, edges.clone()).unwrap();
    let tree = graph.spanning_tree().unwrap();
    // Prim's, from the first vertex.
    let mut inside = [false; 40];
    inside[0] = true;
    let mut least = 0.0;
    for _ in 1..40 {
        let crossing = edges.iter().filter(|(a, b, _)| inside[*a] != inside[*b]);
        let next = crossing.min_by(|a, b| a.2.total_cmp(&b.2)).unwrap();
        least += next.2;
        inside[next.0] = true;
        inside[next.1] = true;
    }
    let weight: f64 = tree.graph().edges().iter().map(|edge| edge.2).sum();
    assert_eq!(weight, least);
    edges.reverse();
    let again = Graph::new(40, edges.clone())
        .unwrap()
        .spanning_tree()
        .unwrap();
    for v in 0..40 {
        assert_eq!(tree.distances(v), again.distances(v));
    }
    // A grid's is its first row and the columns from there.
    for (vertices, columns) in [(12, 4), (10, 4), (7, 1), (5, 9)] {
        let tree = Tree::of_grid(vertices, columns);
        let spanned = Graph::grid(vertices, columns).spanning_tree().unwrap();
        for v in 0..vertices {
            assert_eq!(tree.distances(v), spanned.distances(v));
            for (w, distance) in tree.distances(v).into_iter().enumerate() {
                let (a, b) = ((v / columns, v % columns), (w / columns, w % columns));
                let expected = match a.1 == b.1 {
                    true => a.0.abs_diff(b.0),
                    false => a.0 + b.0 + a.1.abs_diff(b.1),
                };
                assert_eq!(distance, expected as f64);
            }
        }
    }
}

/// A tree may reach all from one vertex and from another go beyond the largest number.
#[test]
fn distances_beyond_the_largest_number_are_infinite() {
    let edges = vec![(0, 1, 1e308), (0, 2, 1e308), (2, 3, 1.0)];
    let tree = Tree::new(4, edges).unwrap();
    assert_eq!(tree.distances(0), [0.0, 1e308, 1e308, 1e308]);
    let infinite = f64::INFINITY;
    assert_eq!(tree.distances(1), [1e308, 0.0, infinite, infinite]);
}

#[test]
fn what_is_no_tree_is_refused() {
    let refused = |vertices, edges: &[(usize, usize, f64)]| {
        Tree::new(vertices, edges.to_vec()).unwrap_err().to_string()
    };
    assert!(refused(3, &[(0, 1, 1.0)]).contains("is no tree"));
    assert!(refused(3, &[(0, 1, 1.0), (1, 0, 1.0)]).contains("reaches 2"));
    assert!(refused(2, &[(0, 2, 1.0)]).contains("edge 0 – 2"));
    assert!(refused(2, &[(0, 1, -1.0)]).contains("weight -1"));
    assert!(refused(2, &[(0, 1, f64::NAN)]).contains("weight NaN"));
    assert!(
        Graph::new(3, vec![(0, 1, 1.0)])
            .unwrap()
            .spanning_tree()
            .is_err()
    );
    assert!(IntegratorTree::with_leaves(&Tree::path(4), 5).is_err());
    let integrator = IntegratorTree::new(&Tree::path(4));
    let constant = Function::Polynomial(vec![1.0]);
    assert!(integrator.integrate(&constant, &[0.0; 7], 2).is_err());
}

#[test]
fn distances_follow_the_shortest_way() {
    let edges = vec![(0, 1, 4.0), (0, 2, 1.0), (2, 1, 2.0), (1, 3, 1.0)];
    let graph = Graph::new(5, edges).unwrap();
    assert_eq!(graph.distances(0), [0.0, 3.0, 1.0, 4.0, f64::INFINITY]);
}

#[test]
fn gradients_of_coefficients_equal_central_differences() {
    let tree = hung(60, |v| (v - 1) / 2, || 0.5);
    let integrator = IntegratorTree::with_leaves(&tree, 6).unwrap();
    let (x, g) = (field(120, 1), field(120, 2));
    let value = |function: &Function| -> f64 {
        let y = integrator.integrate(function, &x, 2).unwrap();
        y.iter().zip(&g).map(|(y, g)| y * g).sum()
    };
    type Make = fn(&[f64]) -> Function;
    let make: Vec<(Vec<f64>, Make)> = vec![
        (vec![0.3, -0.2, 0.1], |c| Function::Polynomial(c.to_vec())),
        (vec![-0.4, 1.0, 0.3], |c| Function::Exponential {
            rate: c[0],
            polynomial: c[1..].to_vec(),
        }),
        (vec![0.6, 0.2], |c| Function::Wave {
            frequency: c[0],
            phase: c[1],
        }),
        (vec![1.0, 0.4, 1.0, 0.3, 0.2], |c| Function::Rational {
            numerator: c[..2].to_vec(),
            denominator: c[2..].to_vec(),
        }),
        (vec![-0.3, 0.9], |c| Function::Quotient {
            rate: c[0],
            shift: c[1],
        }),
        (vec![-0.1, 0.2, 0.1], |c| {
            Function::Gaussian([c[0], c[1], c[2]])
        }),
    ];
    for (c, make) in make {
        let function = make(&c);
        let found = integrator.gradient(&function, &x, 2, &g).unwrap();
        assert_eq!(found.len(), c.len());
        for (place, found) in found.iter().enumerate() {
            let moved = |by: f64| {
                let mut c = c.clone();
                c[place] += by;
                value(&make(&c))
            };
            let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            assert!(
                (found - numeric).abs() < 1e-5 * (1.0 + numeric.abs()),
                "{function:?}"
            );
        }
    }
}

#[test]
fn hankel_products_are_sums_over_places() {
    for (rows, columns) in [(5, 7), (150, 90)] {
        let mut numbers = random(8);
        let mut places = |count: usize| -> Vec<usize> {
            (0..count)
                .map(|_| numbers.random_range(0..200usize))
                .collect()
        };
        let (rows, columns) = (places(rows), places(columns));
        let values = field(300, 3);
        let width = 2;
        let b = field(columns.len() * width, 5);
        let found = hankel(&values, &rows, &columns, &b, width);
        let mut expected = vec![0.0; found.len()];
        for (u, row) in rows.iter().enumerate() {
            for (w, column) in columns.iter().enumerate() {
                for feature in 0..width {
                    // Beyond the last there is nothing.
                    let Some(value) = values.get(row + column) else {
                        continue;
                    };
                    expected[u * width + feature] += value * b[w * width + feature];
                }
            }
        }
        assert_near(&found, &expected, "product");
    }
}

#[test]
fn steps_are_common_divisors() {
    let of = |weights: &[f64]| {
        let edges = weights
            .iter()
            .enumerate()
            .map(|(v, w)| (v, v + 1, *w))
            .collect();
        Tree::new(weights.len() + 1, edges).unwrap().step()
    };
    assert_eq!(of(&[4.0, 6.0, 10.0]), Some(2.0));
    assert_eq!(of(&[0.5, 1.5, 0.0]), Some(0.5));
    assert_eq!(of(&[0.3, 0.7]), None);
    assert_eq!(of(&[0.0]), Some(1.0));
    // Quotients beyond what can be counted, which have no fraction left to show.
    assert_eq!(of(&[1e-300, 0.3, 0.7]), None);
    assert_eq!(of(&[0.5, 2f64.powi(60)]), None);
    // Large and alike.
    assert_eq!(of(&[1e20, 1e20]), Some(1e20));
}

/// An edge that is next to nothing makes no lattice of the others, on which places could not be counted.
#[test]
fn a_tiny_edge_among_others_leaves_products_exact() {
    let mut numbers = random(9);
    let weight = |v: usize| {
        if v == 150 {
            1e-300
        } else {
            numbers.random_range(0.1..1.0)
        }
    };
    let edges: Vec<(usize, usize, f64)> = (1..400)
        .zip((1..400).map(weight))
        .map(|(v, w)| (v - 1, v, w))
        .collect();
    let tree = Tree::new(400, edges).unwrap();
    let integrator = IntegratorTree::new(&tree);
    assert_eq!(integrator.lattice(), None);
    let function = Function::any(|x| 1.0 / (1.0 + x));
    let field = field(400, 10);
    let found = integrator.integrate(&function, &field, 1).unwrap();
    assert_near(&found, &brute(&tree, &function, &field, 1), "a tiny edge");
}

#[test]
fn rational_functions_find_what_they_can_be() {
    // A function of the class, which is not the start.
    let pairs: Vec<(f64, f64)> = (0..200)
        .map(|i| {
            let x = f64::from(i) / 10.0;
            (x, (0.2 + 1.5 * x) / (1.0 + 0.1 * x))
        })
        .collect();
    let fit = RationalFit::default();
    let (function, error) = fit.fit(&pairs);
    let norm: f64 = pairs.iter().map(|pair| pair.1 * pair.1).sum();
    let off: f64 = pairs
        .iter()
        .map(|(x, y)| (function.value(*x) - y).powi(2))
        .sum();
    assert!((error - (off / norm).sqrt()).abs() < 1e-9);
    let start: f64 = pairs.iter().map(|(x, y)| (x - y).powi(2)).sum();
    assert!(
        error < 0.02 && error < 0.1 * (start / norm).sqrt(),
        "{error}"
    );
    // Without anything to fit it is where it starts.
    let start = fit.fit(&[]).0.value(3.0);
    assert!((start - 3.0 / (1.0 + 0.01 * 3.0 + 0.01 * 9.0)).abs() < 1e-12);
}
