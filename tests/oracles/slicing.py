"""Golden values for narrower residual streams (SliceGPT, DOTResize), in NumPy alone.

A pre-norm decoder with layer norms and biases is written out in row vectors, x W with W
[input, output]. It is cut layer by layer as published: the stream is carried at its narrow width,
each layer's new directions come from what the layer, whose input is cut already, gives at full
width. Nothing is shared with the program under test but the parameters and the texts.

    python tests/oracles/slicing.py crates/compress/tests/fixtures/slicing.json
"""

import json
import sys

import numpy as np

WIDTH, HEADS, HIDDEN, VOCABULARY, LENGTH, BLOCKS, NARROW = 8, 2, 12, 11, 7, 2, 5
EPSILON, TEMPERATURE = 1e-5, 0.1


def draw(rng):
    p = {
        "embeddings.tokens.weight": rng.normal(size=(VOCABULARY, WIDTH)),
        "embeddings.positions.weight": rng.normal(size=(LENGTH, WIDTH)) * 0.5,
    }
    for block in range(BLOCKS):
        for part, layers in {
            "attention": dict.fromkeys(["query", "key", "value", "output"], (WIDTH, WIDTH)),
            "feedforward": {"up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)},
        }.items():
            for name, shape in layers.items():
                p[f"blocks.{block}.{part}.{name}.weight"] = rng.normal(size=shape) * 0.4
                p[f"blocks.{block}.{part}.{name}.bias"] = rng.normal(size=shape[0]) * 0.3
            p[f"blocks.{block}.{part}_norm.weight"] = 1 + rng.normal(size=WIDTH) * 0.3
            p[f"blocks.{block}.{part}_norm.bias"] = rng.normal(size=WIDTH) * 0.3
    p["final_norm.weight"] = 1 + rng.normal(size=WIDTH) * 0.3
    p["final_norm.bias"] = rng.normal(size=WIDTH) * 0.3
    return {name: np.round(value, 6) for name, value in p.items()}


def norm(x):
    """Over the original width, however wide x is."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) / WIDTH + EPSILON)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Layer:
    """Weights [input, output] with the norm before the layer taken in."""

    def __init__(self, p, path, gain=None, shift=None, centre=False):
        self.w, self.b = p[f"{path}.weight"].T.copy(), p[f"{path}.bias"].copy()
        if gain is not None:
            self.b = self.b + shift @ self.w
            self.w = gain[:, None] * self.w
        if centre:
            self.w = self.w - self.w.mean(1, keepdims=True)
            self.b = self.b - self.b.mean()

    def __call__(self, x):
        return x @ self.w + self.b


def fold(p):
    centred = lambda table: table - table.mean(1, keepdims=True)
    blocks = []
    for block in range(BLOCKS):
        at = f"blocks.{block}"
        gains = {
            part: (p[f"{at}.{part}_norm.weight"], p[f"{at}.{part}_norm.bias"])
            for part in ["attention", "feedforward"]
        }
        blocks.append(
            {
                **{
                    name: Layer(p, f"{at}.attention.{name}", *gains["attention"])
                    for name in ["query", "key", "value"]
                },
                "output": Layer(p, f"{at}.attention.output", centre=True),
                "up": Layer(p, f"{at}.feedforward.up", *gains["feedforward"]),
                "down": Layer(p, f"{at}.feedforward.down", centre=True),
            }
        )
    table = p["embeddings.tokens.weight"]
    head = (p["final_norm.weight"][:, None] * table.T, p["final_norm.bias"] @ table.T)
    return centred(table), centred(p["embeddings.positions.weight"]), blocks, head


def attention(layers, x):
    n, size = len(x), WIDTH // HEADS
    split = lambda y: y.reshape(n, HEADS, size).transpose(1, 0, 2)
    q, k, v = (split(layers[name](x)) for name in ["query", "key", "value"])
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(size)
    scores = np.where(np.tril(np.ones((n, n))) > 0, scores, -np.inf)
    mixed = (softmax(scores) @ v).transpose(1, 0, 2).reshape(n, WIDTH)
    return layers["output"](mixed)


def feedforward(layers, x):
    return layers["down"](np.maximum(layers["up"](x), 0))


def principal(rows):
    _, vectors = np.linalg.eigh(sum(x.T @ x for x in rows))
    return vectors[:, ::-1][:, :NARROW]


def transport(rows):
    h = np.concatenate(rows)
    targets = np.argsort(-(h**2).sum(0))[:NARROW]
    distances = np.abs(h[:, :, None] - h[:, None, :]).sum(0)
    apart = np.sort(distances[np.tril_indices(WIDTH, -1)])
    kernel = np.exp(-distances[:, targets] / apart[len(apart) // 2] / TEMPERATURE)
    v = np.ones(NARROW)
    for _ in range(1000):
        u = 1 / WIDTH / (kernel @ v)
        columns = v * (kernel.T @ u)
        if np.abs(columns * NARROW - 1).max() < 1e-6:
            break
        v = 1 / NARROW / (kernel.T @ u)
    q, _ = np.linalg.qr(WIDTH * u[:, None] * kernel * v[None, :])
    return q


def sliced(p, texts, choose):
    tokens, positions, blocks, head = fold(p)
    stream = [tokens[ids] + positions[: len(ids)] for ids in texts]
    q = choose(stream)
    stream = [x @ q for x in stream]
    for layers in blocks:
        for readers, writer, part in [
            (["query", "key", "value"], "output", attention),
            (["up"], "down", feedforward),
        ]:
            for reader in readers:
                layers[reader].w = q.T @ layers[reader].w
            full = [x @ q.T + part(layers, norm(x)) for x in stream]
            new = choose(full)
            layers[writer].w, layers[writer].b = layers[writer].w @ new, layers[writer].b @ new
            shortcut = q.T @ new
            stream = [x @ shortcut + part(layers, norm(x)) for x in stream]
            q = new
    return [norm(x) @ (q.T @ head[0]) + head[1] for x in stream]


def main(path):
    rng = np.random.default_rng(78)
    p = draw(rng)
    texts = [rng.integers(0, VOCABULARY, size=int(rng.integers(3, LENGTH + 1))) for _ in range(6)]
    figures = lambda rows: [[float(f"{v:.12g}") for v in row.ravel()] for row in rows]
    result = {
        "numpy": np.__version__,
        "width": NARROW,
        "parameters": {name: value.tolist() for name, value in p.items()},
        "texts": [ids.tolist() for ids in texts],
        "slicegpt": figures(sliced(p, texts, principal)),
        "dotresize": figures(sliced(p, texts, transport)),
    }
    with open(path, "w") as file:
        json.dump(result, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
