"""Golden values for searches over additive processes, in NumPy alone.

Covariances are written out with exponentials, posteriors and likelihoods with inverses and
determinants, the gradient with traces, the least sum over a forest by trying everything.

    python tests/oracles/rducb.py crates/search/tests/fixtures/rducb.json

Made with NumPy 2, seed 82.
"""

import itertools
import json
import sys

import numpy as np

rng = np.random.default_rng(82)

places = [6, 11, 4, 9, 7]
dimensions = len(places)
points = np.array([[rng.integers(p) for p in places] for _ in range(13)])
values = rng.normal(size=len(points))
lengths = rng.uniform(0.1, 0.7, dimensions)
amplitudes = rng.uniform(0.3, 1.4, dimensions)
noise = 0.04
cliques = [[1, 3], [0, 3], [2], [4]]
unit = points / (np.array(places) - 1.0)


def distances(a, b, i):
    return (a[:, None, i] - b[None, :, i]) ** 2 / lengths[i] ** 2


def term(clique, a, b):
    variance = np.sqrt(np.sum(amplitudes[clique] ** 2))
    return variance * np.exp(-0.5 * sum(distances(a, b, i) for i in clique))


covariance = sum(term(c, unit, unit) for c in cliques) + noise * np.eye(len(points))
inverse = np.linalg.inv(covariance)
weights = inverse @ values
likelihood = (
    -0.5 * values @ weights
    - 0.5 * np.linalg.slogdet(covariance)[1]
    - 0.5 * len(points) * np.log(2 * np.pi)
)


def slope(change):
    return 0.5 * np.trace((np.outer(weights, weights) - inverse) @ change)


by_length, by_amplitude = [], []
for i in range(dimensions):
    own = [c for c in cliques if i in c]
    by_length.append(slope(sum(term(c, unit, unit) * distances(unit, unit, i) for c in own)))
    shares = [amplitudes[i] ** 2 / np.sum(amplitudes[c] ** 2) for c in own]
    by_amplitude.append(slope(sum(s * term(c, unit, unit) for s, c in zip(shares, own))))

queries = []
for number, clique in enumerate(cliques):
    for _ in range(4):
        at = np.array([[rng.integers(p) for p in places]])
        row = term(clique, at / (np.array(places) - 1.0), unit)[0]
        prior = np.sqrt(np.sum(amplitudes[clique] ** 2))
        queries.append(
            {
                "clique": number,
                "places": [int(at[0, i]) for i in clique],
                "mean": row @ weights,
                "variance": prior - row @ inverse @ row,
            }
        )

sizes = [3, 4, 2, 5, 3, 4]
edges = [(0, 2), (2, 5), (1, 3)]
single = [rng.normal(size=s) for s in sizes]
pair = [rng.normal(size=(sizes[i], sizes[j])) for i, j in edges]


def cost(choice):
    return sum(s[a] for s, a in zip(single, choice)) + sum(
        p[choice[i], choice[j]] for p, (i, j) in zip(pair, edges)
    )


least = min(itertools.product(*(range(s) for s in sizes)), key=cost)


def styblinski_tang(x):
    return np.sum(x**4 - 16 * x**2 + 5 * x) / 2


def rosenbrock(x):
    return np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def hartmann(x):
    alpha = np.array([1.0, 1.2, 3.0, 3.2])
    a = np.array(
        [
            [10, 3, 17, 3.5, 1.7, 8],
            [0.05, 10, 17, 0.1, 8, 14],
            [3, 3.5, 1.7, 10, 17, 8],
            [17, 8, 0.05, 10, 0.1, 14],
        ]
    )
    p = 1e-4 * np.array(
        [
            [1312, 1696, 5569, 124, 8283, 5886],
            [2329, 4135, 8307, 3736, 1004, 9991],
            [2348, 1451, 3522, 2883, 3047, 6650],
            [4047, 8828, 8732, 5743, 1091, 381],
        ]
    )
    return -np.sum(alpha * np.exp(-np.sum(a * (x - p) ** 2, axis=1)))


def plain(x):
    return [float(v) for v in np.ravel(x)]


functions = {}
for name, function, low, high, count in [
    ("styblinski_tang", styblinski_tang, -4, 4, 7),
    ("rosenbrock", rosenbrock, -2, 2, 5),
    ("hartmann", hartmann, 0, 1, 6),
]:
    xs = [rng.uniform(low, high, count) for _ in range(4)]
    functions[name] = [{"x": plain(x), "value": float(function(x))} for x in xs]

with open(sys.argv[1], "w") as file:
    json.dump(
        {
            "places": places,
            "points": points.tolist(),
            "values": plain(values),
            "lengths": plain(lengths),
            "amplitudes": plain(amplitudes),
            "noise": noise,
            "cliques": cliques,
            "likelihood": float(likelihood),
            "by_length": plain(by_length),
            "by_amplitude": plain(by_amplitude),
            "queries": [
                {k: float(v) if isinstance(v, np.floating) else v for k, v in q.items()}
                for q in queries
            ],
            "edges": edges,
            "single": [plain(s) for s in single],
            "pair": [plain(p) for p in pair],
            "choice": list(least),
            "least": float(cost(least)),
            "functions": functions,
        },
        file,
        indent=1,
    )
    file.write("\n")
