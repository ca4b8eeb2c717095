"""Attention as moving particles in NumPy, and the fixture made with it.

Velocities are written with explicit loops over pairs; the flow without a norm is integrated in the
tokens themselves and rescaled by an eigendecomposition at the end, where the library integrates the
rescaled tokens.

    python tests/oracles/clustering.py crates/explain/tests/fixtures

writes `clustering.json`.
"""

import json
import sys
from pathlib import Path

import numpy as np


def weights(x, beta, query, key):
    raw = np.array([[np.exp(beta * (query @ a) @ (key @ b)) for b in x] for a in x])
    return raw, raw.sum(axis=1)


def velocity(x, beta, query, key, value, normalised):
    raw, sums = weights(x, beta, query, key)
    moved = []
    for i, a in enumerate(x):
        written = sum(raw[i, j] * (value @ b) for j, b in enumerate(x))
        written = written / (sums[i] if normalised else len(x))
        moved.append(written - (a @ written) * a)
    return np.array(moved)


def euler(x, steps, step, *arguments):
    for _ in range(steps):
        x = x + step * velocity(x, *arguments)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x


def free(x, time, steps, query, key, value):
    """Runge-Kutta on `x' = A V x`, then `e^{-tV} x`."""
    def slope(x):
        raw, sums = weights(x, 1.0, query, key)
        return (raw / sums[:, None]) @ x @ value.T

    step = time / steps
    for _ in range(steps):
        a = slope(x)
        b = slope(x + step / 2 * a)
        c = slope(x + step / 2 * b)
        d = slope(x + step * c)
        x = x + step / 6 * (a + 2 * b + 2 * c + d)
    values, vectors = np.linalg.eig(value)
    shrink = (vectors @ np.diag(np.exp(-time * values)) @ np.linalg.inv(vectors)).real
    return x @ shrink.T


def main(directory):
    random = np.random.default_rng(76)
    count, dimension, beta = 6, 3, 2.0
    x = random.normal(size=(count, dimension))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    query, key, value = 0.6 * random.normal(size=(3, dimension, dimension))
    one = np.eye(dimension)
    raw, sums = weights(x, beta, one, one)
    gram = x @ x.T
    shares = np.linalg.eigvalsh(gram) / count
    shares = shares[shares > 1e-12]
    matrices = (query, key, value)
    fixture = {
        "dimension": dimension, "beta": beta, "points": x.ravel().tolist(),
        "query": query.ravel().tolist(), "key": key.ravel().tolist(),
        "value": value.ravel().tolist(),
        "self_attention": velocity(x, beta, *matrices, True).ravel().tolist(),
        "unnormalised": velocity(x, beta, *matrices, False).ravel().tolist(),
        "after_euler": euler(x, 40, 0.1, beta, one, one, one, True).ravel().tolist(),
        "energy": raw.sum() / (2 * beta * count**2),
        "log_normalisers": np.log(sums).tolist(),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "mean_cosine": float((gram.sum() - count) / (count * (count - 1))),
        "free_time": 1.5,
        "free": free(x, 1.5, 600, *matrices).ravel().tolist(),
    }
    (Path(directory) / "clustering.json").write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
