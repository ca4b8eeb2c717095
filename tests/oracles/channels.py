"""Composition scores of attention heads with dense matrices in NumPy, and the fixture made with them.

Everything is done the long way: `W_OV` and `W_QK` are formed as `width x width` matrices, taken
apart by a dense SVD, and every score is a ratio of Frobenius norms of dense products.

    python tests/oracles/channels.py crates/explain/tests/fixtures

writes `channels.json`: for a GPT-2-like and a Llama-like model the spec, the parameters, and the
scores of every component and whole head for every later reader.
"""

import json
import sys
from pathlib import Path

import numpy as np

WIDTH, HEADS, HEAD_WIDTH, BLOCKS, VOCABULARY, LENGTH = 12, 3, 4, 3, 7, 6


def layer_spec():
    return {
        "width": WIDTH,
        "final_norm": {"kind": "layer"},
        "input": {"kind": "tokens", "vocabulary": VOCABULARY, "length": LENGTH,
                  "position": {"kind": "learned"}},
        "blocks": [{"repeat": BLOCKS, "norm": {"kind": "layer"},
                    "attention": {"kind": "multi-head", "heads": HEADS, "causal": True}}],
        "head": {"kind": "language-model"},
    }


def grouped_spec():
    return {
        "width": WIDTH,
        "final_norm": {"kind": "rms"},
        "input": {"kind": "tokens", "vocabulary": VOCABULARY, "length": LENGTH},
        "blocks": [{"repeat": BLOCKS, "norm": {"kind": "rms"},
                    "attention": {"kind": "multi-head", "heads": 4, "groups": 2, "head_width": 4,
                                  "causal": True, "bias": False,
                                  "position": {"kind": "rotary"}}}],
        "head": {"kind": "language-model"},
    }


def parameters(spec, random):
    attention = spec["blocks"][0]["attention"]
    heads = attention["heads"]
    groups = attention.get("groups", heads)
    head_width = attention.get("head_width", WIDTH // heads)
    layer = spec["final_norm"]["kind"] == "layer"
    made = {"embeddings.tokens.weight": random.normal(size=(VOCABULARY, WIDTH))}
    if layer:
        made["embeddings.positions.weight"] = random.normal(size=(LENGTH, WIDTH))
    for block in range(BLOCKS):
        at = f"blocks.{block}"
        made[f"{at}.attention_norm.weight"] = 1 + 0.3 * random.normal(size=WIDTH)
        if layer:
            made[f"{at}.attention_norm.bias"] = 0.3 * random.normal(size=WIDTH)
        sizes = {"query": (heads * head_width, WIDTH), "key": (groups * head_width, WIDTH),
                 "value": (groups * head_width, WIDTH), "output": (WIDTH, heads * head_width)}
        for name, shape in sizes.items():
            made[f"{at}.attention.{name}.weight"] = random.normal(size=shape)
            if layer:
                made[f"{at}.attention.{name}.bias"] = 0.3 * random.normal(size=shape[0])
    made["final_norm.weight"] = 1 + 0.3 * random.normal(size=WIDTH)
    if layer:
        made["final_norm.bias"] = 0.3 * random.normal(size=WIDTH)
    return made, heads, groups, head_width, layer


def dense_heads(made, heads, groups, head_width, layer):
    """`(block, head) -> (W_OV, W_QK)`, norms folded, layer norms' means taken out."""
    centre = np.eye(WIDTH) - np.ones((WIDTH, WIDTH)) / WIDTH if layer else np.eye(WIDTH)
    found = {}
    for block in range(BLOCKS):
        at = f"blocks.{block}"
        read = centre @ np.diag(made[f"{at}.attention_norm.weight"])
        for head in range(heads):
            group = head // (heads // groups)
            own = slice(head * head_width, (head + 1) * head_width)
            shared = slice(group * head_width, (group + 1) * head_width)
            query = read @ made[f"{at}.attention.query.weight"].T[:, own]
            key = read @ made[f"{at}.attention.key.weight"].T[:, shared]
            value = read @ made[f"{at}.attention.value.weight"].T[:, shared]
            output = made[f"{at}.attention.output.weight"].T[own, :] @ centre
            found[block, head] = (value @ output, query @ key.T)
    return found


def scores(found, head_width):
    norm = np.linalg.norm
    readers = []
    for (block, head), (ov, qk) in found.items():
        if block == 0:
            continue
        for name, matrix in [("query", qk), ("key", qk.T), ("value", ov)]:
            components, whole = [], []
            for (earlier, _), (written, _) in found.items():
                if earlier >= block:
                    continue
                left, strengths, right = np.linalg.svd(written)
                whole.append(norm(written @ matrix) / norm(written) / norm(matrix))
                for i in range(head_width):
                    one = strengths[i] * np.outer(left[:, i], right[i])
                    components.append(norm(one @ matrix) / norm(one) / norm(matrix))
            readers.append({"block": block, "head": head, "composition": name,
                            "components": components, "heads": whole})
    return readers


def main(directory):
    fixture = {}
    for name, spec in [("gpt2", layer_spec()), ("llama", grouped_spec())]:
        random = np.random.default_rng(116)
        made, heads, groups, head_width, layer = parameters(spec, random)
        made = {key: np.round(value, 5) for key, value in made.items()}
        found = dense_heads(made, heads, groups, head_width, layer)
        fixture[name] = {
            "spec": spec,
            "parameters": {key: {"shape": list(value.shape), "values": value.ravel().tolist()}
                           for key, value in made.items()},
            "readers": scores(found, head_width),
        }
    path = Path(directory) / "channels.json"
    path.write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
