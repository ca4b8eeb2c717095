"""Hidden geometry in NumPy: the two-way decomposition and its diagnostics, and the fixture.

An independent implementation of the decomposition of Song & Zhong (arXiv 2310.04861): means by
broadcasting, spectra by numpy's SVD of the stacked matrices themselves, ScreeNOT (Donoho, Gavish &
Romanov, arXiv 2009.12297) by a fine scan and secant steps, and the cosine transform from the FFT
of a mirrored signal. The states come from a linear congruential generator that any language can
repeat: `x <- (1664525 x + 1013904223) mod 2^32`, `x / 2^32 - 1/2`, to which an ellipse over
positions and a mean are added.

    python tests/oracles/geometry.py crates/explain/tests/fixtures

writes `geometry.json`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

CONTEXTS, POSITIONS, WIDTH, TOPICS = 12, 50, 46, 3
RANK_BOUND, LOW, COMPONENTS = 20, 10, 20


def uniform(count, seed):
    x, out = seed, []
    for _ in range(count):
        x = (1664525 * x + 1013904223) % 2**32
        out.append(x / 2**32 - 0.5)
    return np.array(out)


def states():
    h = uniform(CONTEXTS * POSITIONS * WIDTH, 7).reshape(CONTEXTS, POSITIONS, WIDTH)
    h = h + 0.25
    angle = 2 * math.pi * np.arange(POSITIONS) / POSITIONS
    h[:, :, 0] += 3 * np.cos(angle)
    h[:, :, 1] += 2 * np.sin(angle)
    for c in range(CONTEXTS):
        h[c, :, 2 + c % TOPICS] += 1.5
    return h


def screenot(s, shape, k):
    """The threshold: the root of y D'/D = -4, D = phi (gamma phi + (1 - gamma) / y)."""
    gamma = min(shape) / max(shape)
    z = np.sort(s)
    edge, inner = z[-k - 1], z[-2 * k - 1]
    for l in range(1, k + 1):
        z[-l] = edge + (1 - ((l - 1) / k) ** (2 / 3)) / (2 ** (2 / 3) - 1) * (edge - inner)

    def log_d(y):
        phi = np.mean(y / (y * y - z * z))
        return math.log(phi) + math.log(gamma * phi + (1 - gamma) / y)

    def slope(y):
        # y D'/D = d log D / d log y, by a five-point difference in log y.
        e = 1e-4 * (1 - z.max() / y)
        f = [log_d(y * math.exp(m * e)) for m in (-2, -1, 1, 2)]
        return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * e)

    low, high = z.max() * (1 + 1e-9), z.max() * 100
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < -4 else (low, middle)
    return middle


def dct(x):
    """Orthonormal DCT-II of the columns, from the FFT of the mirrored columns."""
    n = x.shape[0]
    spectrum = np.fft.fft(np.concatenate([x, x[::-1]]), axis=0)[:n]
    turn = np.exp(-1j * math.pi * np.arange(n) / (2 * n))[:, None]
    y = (spectrum * turn).real / 2
    y *= math.sqrt(2 / n)
    y[0] /= math.sqrt(2)
    return y


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def likeness(ctx):
    cos = np.abs(unit(ctx) @ unit(ctx).T)
    labels = np.arange(CONTEXTS) % TOPICS
    same = labels[:, None] == labels[None, :]
    other = ~np.eye(CONTEXTS, dtype=bool)
    return cos[same & other].mean(), cos[~same].mean()


def main(directory):
    h = states()
    mean = h.mean((0, 1))
    pos = h.mean(0) - mean
    ctx = h.mean(1) - mean
    resid = h - mean - pos - ctx[:, None]
    s = np.linalg.svd(pos, compute_uv=False)
    threshold = screenot(s, pos.shape, RANK_BOUND)
    rank = int((s > threshold).sum())
    stacked = h.reshape(-1, WIDTH)
    repeated = np.tile(pos, (CONTEXTS, 1))
    norm = lambda m: np.linalg.norm(m, 2)
    cos = np.abs(unit(pos) @ unit(ctx).T)
    gram = unit(pos) @ unit(pos).T
    f = dct(dct(gram).T).T
    cut = []
    k = 1
    while k < POSITIONS:
        rest = f.copy()
        rest[:k, :k] = 0
        cut.append([k, float(np.linalg.norm(rest) / np.linalg.norm(f))])
        k *= 2
    u, sc, vt = np.linalg.svd(ctx, full_matrices=False)
    within, between = likeness(ctx)
    within_projected, between_projected = likeness((u * sc)[:, :COMPONENTS])
    fixture = {
        "shape": [CONTEXTS, POSITIONS, WIDTH],
        "topics": TOPICS,
        "mean": mean.tolist(),
        "position_7": pos[7].tolist(),
        "context_3": ctx[3].tolist(),
        "residual_2_11": resid[2, 11].tolist(),
        "singular_values": s.tolist(),
        "screenot_threshold": threshold,
        "rank": rank,
        "stable_rank": float((s**2).sum() / s[0] ** 2),
        "explained_ratio": float(s[:rank].sum() / s.sum()),
        "relative_norm": float(norm(repeated) / norm(stacked)),
        "relative_norm_centred": float(norm(repeated) / norm(stacked - stacked.mean(0))),
        "incoherence": float(cos.mean()),
        "incoherence_most": float(cos.max()),
        "smoothness": float((f[:LOW, :LOW] ** 2).sum() / (f**2).sum()),
        "truncation": cut,
        "energy": [
            float(((h - mean) ** 2).sum()),
            float(CONTEXTS * (pos**2).sum()),
            float(POSITIONS * (ctx**2).sum()),
            float((resid**2).sum()),
        ],
        "topics_alike": [float(x) for x in (within, between, within_projected, between_projected)],
    }
    path = Path(directory) / "geometry.json"
    path.write_text(json.dumps(fixture, indent=1) + "\n")
    print(path, rank, threshold, s[:4])


if __name__ == "__main__":
    main(sys.argv[1])
