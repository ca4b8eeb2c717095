"""Over-squashing in NumPy and PyTorch: path sums, the bound, frozen Jacobians, and bf16 rounding.

An independent implementation of what Barbero et al. (arXiv 2406.04267) bound: a small pre-norm
decoder with two heads is run in NumPy, its path sums are formed by walking every path by
recursion, not by products of matrices, and the Jacobian with attention weights and the deviations
of norms held fixed comes from PyTorch's autograd with both detached. Rounding to bf16 is done on
the bits. Parameters come from a linear congruential generator, as float64 rounded to float32.

    python tests/oracles/squashing.py crates/explain/tests/fixtures

writes `squashing.json`.
"""

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import torch

WIDTH, HEADS, HIDDEN, VOCABULARY, BLOCKS = 8, 2, 12, 6, 2
IDS = [3, 1, 4, 1, 5, 0, 2]
EPSILON = 1e-5


class Numbers:
    """`x <- (1664525 x + 1013904223) mod 2^32`, `x / 2^32 - 1/2`."""

    def __init__(self, seed):
        self.x = seed

    def draw(self, *shape):
        out = []
        for _ in range(math.prod(shape)):
            self.x = (1664525 * self.x + 1013904223) % 2**32
            out.append(np.float32((self.x / 2**32 - 0.5) * 1.2))
        return np.array(out, dtype=np.float64).reshape(shape)


def parameters():
    numbers, p = Numbers(2024), {}
    p["embeddings.tokens.weight"] = numbers.draw(VOCABULARY, WIDTH)
    for b in range(BLOCKS):
        at = f"blocks.{b}."
        for norm in ("attention_norm", "feedforward_norm"):
            p[at + norm + ".weight"] = 1 + numbers.draw(WIDTH)
            p[at + norm + ".bias"] = numbers.draw(WIDTH)
        for name in ("query", "key", "value", "output"):
            p[at + f"attention.{name}.weight"] = numbers.draw(WIDTH, WIDTH)
            p[at + f"attention.{name}.bias"] = numbers.draw(WIDTH)
        p[at + "feedforward.up.weight"] = numbers.draw(HIDDEN, WIDTH)
        p[at + "feedforward.up.bias"] = numbers.draw(HIDDEN)
        p[at + "feedforward.down.weight"] = numbers.draw(WIDTH, HIDDEN)
        p[at + "feedforward.down.bias"] = numbers.draw(WIDTH)
    p["final_norm.weight"] = 1 + numbers.draw(WIDTH)
    p["final_norm.bias"] = numbers.draw(WIDTH)
    return p


def forward(p, x, frozen=True):
    """The last vector, and everything that the bound reads; torch tensors throughout."""
    seen = []

    def norm(x, at):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()
        deviation = deviation.detach() if frozen else deviation
        return centred / deviation * p[at + ".weight"] + p[at + ".bias"], deviation[:, 0]

    def linear(x, at):
        return x @ p[at + ".weight"].T + p[at + ".bias"]

    n, half = x.shape[0], WIDTH // HEADS
    hidden_keys = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
    for b in range(BLOCKS):
        at = f"blocks.{b}."
        read, beta1 = norm(x, at + "attention_norm")
        q, k, v = (linear(read, at + f"attention.{name}") for name in ("query", "key", "value"))
        mixed, weights = [], []
        for h in range(HEADS):
            cut = slice(h * half, (h + 1) * half)
            scores = (q[:, cut] @ k[:, cut].T / math.sqrt(half)).masked_fill(hidden_keys, -math.inf)
            alpha = scores.softmax(-1)
            alpha = alpha.detach() if frozen else alpha
            weights.append(alpha)
            mixed.append(alpha @ v[:, cut])
        x = x + linear(torch.cat(mixed, -1), at + "attention.output")
        read, beta2 = norm(x, at + "feedforward_norm")
        before = linear(read, at + "feedforward.up")
        x = x + linear(torch.nn.functional.gelu(before), at + "feedforward.down")
        seen.append((weights, beta1, beta2, before))
    y, beta3 = norm(x, "final_norm")
    return y[-1], seen, beta3[-1]


def walk(layers, node, layer):
    """Sum over all paths from `node` of layer `layer` down to each token of the input."""
    if layer < 0:
        out = np.zeros(layers[0].shape[0])
        out[node] = 1
        return out
    total = np.zeros(layers[0].shape[0])
    for j in range(node + 1):
        total += layers[layer][node, j] * walk(layers, j, layer - 1)
    return total


def bound(p, seen, beta3):
    p = {name: tensor.detach().numpy() for name, tensor in p.items()}
    centre = np.eye(WIDTH) - 1 / WIDTH
    norm = lambda m: np.linalg.norm(m, 2)
    layers, half = [], WIDTH // HEADS
    for b, (weights, beta1, beta2, before) in enumerate(seen):
        at = f"blocks.{b}."
        through = np.diag(p[at + "attention_norm.weight"]) @ centre
        n = weights[0].shape[0]
        layer = np.eye(n)
        for h in range(HEADS):
            cut = slice(h * half, (h + 1) * half)
            value = p[at + "attention.value.weight"][cut]
            output = p[at + "attention.output.weight"][:, cut]
            factor = norm(output @ value @ through)
            layer += weights[h].detach().numpy() * factor / beta1.detach().numpy()[None, :]
        u = before.detach().numpy()
        cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))(u)
        slopes = np.abs(cdf + u * np.exp(-u * u / 2) / math.sqrt(2 * math.pi)).max(1)
        through = np.diag(p[at + "feedforward_norm.weight"]) @ centre
        up = norm(p[at + "feedforward.up.weight"] @ through)
        down = norm(p[at + "feedforward.down.weight"])
        layer *= (1 + down * slopes * up / beta2.detach().numpy())[:, None]
        layers.append(layer)
    final = norm(np.diag(p["final_norm.weight"]) @ centre) / float(beta3.detach())
    return final * walk(layers, layers[0].shape[0] - 1, BLOCKS - 1)


def bf16(x):
    """Nearest bf16 of a float32, ties to even, on the bits."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def jacobian(p, x, frozen):
    x = x.clone().requires_grad_()
    y, _, _ = forward(p, x, frozen)
    rows = [torch.autograd.grad(y[k], x, retain_graph=True)[0] for k in range(WIDTH)]
    return torch.stack(rows, 1)  # [token, output, input]


def main(directory):
    p = {name: torch.tensor(value) for name, value in parameters().items()}
    x = p["embeddings.tokens.weight"][IDS]
    y, seen, beta3 = forward(p, x)
    frozen, whole = jacobian(p, x, True), jacobian(p, x, False)
    operator = [float(np.linalg.norm(j.numpy(), 2)) for j in frozen]
    limit = bound(p, seen, beta3)
    assert all(o <= b for o, b in zip(operator, limit))
    # Uniform attention: paths by hand through three layers.
    uniform = [np.tril(1 / np.arange(1, 10)[:, None] * np.ones((9, 9))) / 1.5 + np.eye(9)] * 3
    rounded = [float(np.float32(v)) for v in Numbers(5).draw(200)]
    fixture = {
        "ids": IDS,
        "last": y.tolist(),
        "bound": limit.tolist(),
        "frozen_operator": operator,
        "whole_frobenius": [float(j.norm()) for j in whole],
        "uniform_paths": walk(uniform, 8, 2).tolist(),
        "numbers": rounded,
        "bf16": [bf16(v) for v in rounded],
    }
    path = Path(directory) / "squashing.json"
    path.write_text(json.dumps(fixture, indent=1) + "\n")
    print(path, fixture["bound"], operator)


if __name__ == "__main__":
    main(sys.argv[1])
