"""Golden values for the methods that cut depth, by NumPy alone.

    python tests/oracles/depth.py

writes tests/fixtures/depth.json: rows drawn with a seed, the map of ReplaceMe by `lstsq` and by
ridge, linearity scores by residuals, anisotropy by singular values, the best rotation by SVD, and
the three estimators of entropy, macro influence, and a fused matrix with the gradients of its gate. Made with NumPy 2.4.6.
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


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def fused(own, gone, b, a, p, q, cotangent):
    """The sum of `cotangent * W_eff` has these gradients by `p` and `q`, entry by entry."""
    by_p, by_q = np.zeros_like(p), np.zeros_like(q)
    for o in range(own.shape[0]):
        for i in range(own.shape[1]):
            by_p[o] += cotangent[o, i] * gone[o, i] * q[:, i]
            by_q[:, i] += cotangent[o, i] * gone[o, i] * p[o]
    return own + b @ a + (p @ q) * gone, by_p, by_q


cosines = np.sum(out * y, 1) / np.linalg.norm(out, axis=1) / np.linalg.norm(y, axis=1)
divergence = np.mean(np.sum(softmax(out) * np.log(softmax(out) / softmax(y)), 1))
shapes = {"own": (5, 4), "gone": (5, 4), "b": (5, 2), "a": (2, 4), "p": (5, 3), "q": (3, 4)}
shapes["cotangent"] = (5, 4)
matrices = {name: rng.normal(size=shape) for name, shape in shapes.items()}
effective, by_p, by_q = fused(**matrices)

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
    "influence": 1 - np.mean(cosines),
    "divergence": divergence,
    "fused": {name: matrix.tolist() for name, matrix in matrices.items()},
    "effective": effective.tolist(),
    "by_p": by_p.tolist(),
    "by_q": by_q.tolist(),
}
path = Path(__file__).parents[1] / "fixtures" / "depth.json"
path.write_text(json.dumps(document) + "\n")
print(path)
