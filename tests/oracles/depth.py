"""Golden values for the methods that cut depth, by NumPy alone.

    python tests/oracles/depth.py

writes tests/fixtures/depth.json: rows drawn with a seed, the map of ReplaceMe by `lstsq` and by
ridge, linearity scores by residuals, anisotropy by singular values, the best rotation by SVD, and
the three estimators of entropy. Made with NumPy 2.4.6.
"""

import json
import math
from pathlib import Path

import numpy as np

rng = np.random.default_rng(5)
n, d = 60, 4
m = rng.normal(size=(n, d))
y = rng.normal(size=(n, d)) * 0.7
out = y + m @ rng.normal(size=(d, d)) + 0.3 * rng.normal(size=(n, d)) + 0.2


def score(x, z):
    design = np.c_[x, np.ones(len(x))]
    fit, *_ = np.linalg.lstsq(design, z, rcond=None)
    return 1 - np.sum((z - design @ fit) ** 2) / np.sum((z - z.mean(0)) ** 2)


def rotation(x, z):
    x, z = x - x.mean(0), z - z.mean(0)
    x, z = x / np.linalg.norm(x), z / np.linalg.norm(z)
    u, _, vt = np.linalg.svd(x.T @ z)
    turned = x @ (u @ vt)
    scale = np.sum(turned * z)
    return 1 - np.sum((scale * turned - z) ** 2)


def neighbours(z, k):
    count, width = z.shape
    distances = np.sort(np.linalg.norm(z[:, None] - z[None], axis=2), axis=1)[:, k]
    ball = width / 2 * math.log(math.pi) - math.lgamma(width / 2 + 1)
    return width * np.mean(np.log(distances)) + ball + math.log(count) - math.log(k)


def buckets(z, bins):
    total = 0.0
    for column in z.T:
        counts, _ = np.histogram(column, bins=bins, range=(column.min(), column.max()))
        p = counts / len(column)
        total -= np.sum(p * np.log(np.maximum(p, 1e-10)))
    return total


def renyi(z, order):
    z = (z - z.mean(0)) / z.std(0)
    squares = np.sum((z[:, None] - z[None]) ** 2, axis=2)
    pairs = np.sort(squares[np.tril_indices(len(z), -1)])
    kernel = np.exp(-squares / (2 * pairs[len(pairs) // 2]))
    return math.log(np.mean(kernel ** (order - 1))) / (1 - order)


ridge = 2.5
values = np.linalg.svd(out - out.mean(0), compute_uv=False) ** 2
document = {
    "added": m.tolist(),
    "stream": y.tolist(),
    "behind": out.tolist(),
    "map": np.linalg.lstsq(m, out - y, rcond=None)[0].tolist(),
    "ridge": ridge,
    "ridge_map": np.linalg.solve(m.T @ m + ridge * np.eye(d), m.T @ (out - y)).tolist(),
    "score": score(y, out),
    "residual_free": score(y, out - y),
    "rotation": rotation(y, out),
    "anisotropy": values[0] / values.sum(),
    "neighbours": neighbours(out, 5),
    "buckets": buckets(out, 10),
    "renyi": renyi(out, 4.0),
}
path = Path(__file__).parents[1] / "fixtures" / "depth.json"
path.write_text(json.dumps(document) + "\n")
print(path)
