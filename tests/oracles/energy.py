"""Energies of stored patterns in NumPy, and the fixture made with it.

Energies and steps are written from their definitions; gradients are central differences; the
incomplete gamma function is an integral by Simpson's rule.

    python tests/oracles/energy.py crates/explain/tests/fixtures

writes `energy.json`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np


def energy(x, patterns):
    return -np.log(np.exp(-np.linalg.norm(patterns - x, axis=1)).sum())


def hopfield(x, patterns, beta):
    raw = np.exp(beta * patterns @ x).sum()
    longest = max(p @ p for p in patterns)
    return -np.log(raw) / beta + x @ x / 2 + np.log(len(patterns)) / beta + longest / 2


def gradient(x, patterns, step=1e-6):
    moved = []
    for axis in range(len(x)):
        e = np.zeros_like(x)
        e[axis] = step
        moved.append((energy(x + e, patterns) - energy(x - e, patterns)) / (2 * step))
    return np.array(moved)


def weiszfeld(x, patterns):
    distances = np.linalg.norm(patterns - x, axis=1)
    shares = np.exp(-distances) / np.exp(-distances).sum()
    weights = shares / distances
    return weights @ patterns / weights.sum()


def read(x, patterns, beta):
    raw = np.exp(beta * patterns @ x)
    return raw @ patterns / raw.sum()


def log_lower_gamma(s, x, count=200_001):
    t = np.linspace(0.0, x, count)[1:]
    logarithm = (s - 1) * np.log(t) - t
    highest = logarithm.max()
    values = np.concatenate([[0.0 if s > 1 else 1.0], np.exp(logarithm - highest)])
    weights = np.ones(count)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return highest + math.log((weights * values).sum() * x / (count - 1) / 3)


def main(directory):
    random = np.random.default_rng(75)
    patterns = random.normal(size=(7, 4))
    x, at = random.normal(size=(2, 4))
    stored, asked = random.normal(size=(60, 5)), random.normal(size=(9, 5))
    distances = np.linalg.norm(stored[None] - asked[:, None], axis=2)
    fixture = {
        "dimension": 4, "patterns": patterns.ravel().tolist(), "x": x.tolist(), "beta": 1.3,
        "energy": energy(x, patterns), "gradient": gradient(x, patterns).tolist(),
        "descended": weiszfeld(x, patterns).tolist(),
        "hopfield_energy": hopfield(x, patterns, 1.3),
        "hopfield_step": read(x, patterns, 1.3).tolist(),
        "stored": stored.ravel().tolist(), "asked": asked.ravel().tolist(),
        "nearest": np.argsort(distances, axis=1)[:, :3].tolist(),
        "gamma": [[s, x, log_lower_gamma(s, x)] for s, x in
                  [(2.0, 0.7), (3.0, 9.0), (40.0, 25.0), (64.0, 90.0), (1024.0, 10.0), (1024.0, 1100.0)]],
    }
    (Path(directory) / "energy.json").write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
