"""CLIP-PRS and TextSpan in NumPy, and the fixture made with them.

An independent implementation of Gandelsman et al., Interpreting CLIP's Image Representation via
Text-Based Decomposition (arXiv 2310.05916): a small vision tower is run in plain NumPy, the full
tensor of direct effects `[layers, tokens, heads, features]` is laid out with the shares of biases
and of the last norm as the authors' code has them, and TextSpan recomputes the whole products of
outputs and texts after every choice.

    python tests/oracles/clip.py crates/explain/tests/fixtures

writes `clip.{safetensors,json}`, after checking the forward pass against `transformers`'
`CLIPVisionModelWithProjection` on the same weights, where that is installed.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

WIDTH, LAYERS, HEADS, FEATURES, HIDDEN = 16, 3, 4, 10, 24
IMAGE, PATCH, EPSILON = 12, 4, 1e-5
IMAGES, TEXTS, CHOICES = 6, 30, 4
TOKENS = (IMAGE // PATCH) ** 2 + 1


def parameters(rng):
    """Named as the model's own parameters; weights are [output, input]."""
    p = {}

    def dense(name, rows, columns, bias=True):
        p[f"{name}.weight"] = rng.normal(0, 0.3, (rows, columns))
        if bias:
            p[f"{name}.bias"] = rng.normal(0, 0.3, rows)

    def norm(name):
        p[f"{name}.weight"] = 1 + rng.normal(0, 0.3, WIDTH)
        p[f"{name}.bias"] = rng.normal(0, 0.3, WIDTH)

    dense("embeddings.patches", WIDTH, 3 * PATCH * PATCH, bias=False)
    p["embeddings.class_tokens"] = rng.normal(0, 0.3, (1, WIDTH))
    p["embeddings.positions.weight"] = rng.normal(0, 0.3, (TOKENS, WIDTH))
    norm("embeddings.norm")
    for layer in range(LAYERS):
        path = f"blocks.{layer}"
        for name in ("query", "key", "value", "output"):
            dense(f"{path}.attention.{name}", WIDTH, WIDTH)
        norm(f"{path}.attention_norm")
        norm(f"{path}.feedforward_norm")
        dense(f"{path}.feedforward.up", HIDDEN, WIDTH)
        dense(f"{path}.feedforward.down", WIDTH, HIDDEN)
    norm("head.norm")
    dense("head.output", FEATURES, WIDTH, bias=False)
    # What is stored is what both sides compute with.
    return {name: value.astype(np.float32).astype(np.float64) for name, value in p.items()}


def normalise(x, p, name):
    mean = x.mean(-1, keepdims=True)
    deviation = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    return (x - mean) / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def patches_of(image):
    """[3, IMAGE, IMAGE] -> [patches, 3 * PATCH * PATCH], in the order of a convolution."""
    side = IMAGE // PATCH
    rows = []
    for r in range(side):
        for c in range(side):
            cut = image[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH]
            rows.append(cut.reshape(-1))
    return np.stack(rows)


def decompose(image, p):
    """Entries of attention [layers, tokens, heads, features], of the rest [layers + 1, features],
    and the embedding of length one."""
    x = patches_of(image) @ p["embeddings.patches.weight"].T
    x = np.concatenate([p["embeddings.class_tokens"], x]) + p["embeddings.positions.weight"]
    x = normalise(x, p, "embeddings.norm")
    head = WIDTH // HEADS
    attention = np.zeros((LAYERS, TOKENS, HEADS, WIDTH))
    direct = [x[0]]
    for layer in range(LAYERS):
        path = f"blocks.{layer}"
        y = normalise(x, p, f"{path}.attention_norm")
        q, k, v = (linear(y, p, f"{path}.attention.{n}") for n in ("query", "key", "value"))
        out = np.zeros_like(x)
        w, b = p[f"{path}.attention.output.weight"], p[f"{path}.attention.output.bias"]
        for h in range(HEADS):
            s = slice(h * head, (h + 1) * head)
            weights = softmax(q[:, s] @ k[:, s].T / math.sqrt(head))
            out += weights @ v[:, s] @ w[:, s].T
            for i in range(TOKENS):
                attention[layer, i, h] = weights[0, i] * (w[:, s] @ v[i, s]) + b / (TOKENS * HEADS)
        x = x + out + b
        y = normalise(x, p, f"{path}.feedforward_norm")
        mlp = linear(quick_gelu(linear(y, p, f"{path}.feedforward.up")), p, f"{path}.feedforward.down")
        x = x + mlp
        direct.append(mlp[0])
    direct = np.stack(direct)
    assert np.allclose(direct.sum(0) + attention.sum((0, 1, 2)), x[0])

    mean, deviation = x[0].mean(), math.sqrt(x[0].var() + EPSILON)
    gamma, beta = p["head.norm.weight"], p["head.norm.bias"]
    projection = p["head.output.weight"].T
    terms = 2 * LAYERS + 1
    inner = terms * TOKENS * HEADS
    direct = ((direct - mean / terms) * gamma / deviation + beta / terms) @ projection
    attention = ((attention - mean / inner) * gamma / deviation + beta / inner) @ projection
    embedding = normalise(x[:1], p, "head.norm")[0] @ projection
    length = np.linalg.norm(embedding)
    assert np.allclose(direct.sum(0) + attention.sum((0, 1, 2)), embedding)
    return attention / length, direct / length, embedding / length


def text_span(outputs, texts, rank, count):
    _, _, v = np.linalg.svd(outputs, full_matrices=False)
    v = v[:rank]
    texts = texts @ v.T @ v
    mean = outputs.mean(0)
    left = outputs - mean
    rebuilt = np.tile(mean, (len(outputs), 1))
    chosen = []
    for _ in range(count):
        best = int((left @ texts.T).std(0).argmax())
        t = texts[best].copy()
        chosen.append(best)
        part = np.outer(left @ t / (t @ t), t)
        rebuilt += part
        left = left - part
        texts = texts - np.outer(texts @ t / (t @ t), t)
    return chosen, rebuilt


def check_against_transformers(images, p, embeddings):
    try:
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError:
        print("transformers is not installed: forward pass not checked")
        return
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, image_size=IMAGE, patch_size=PATCH, projection_dim=FEATURES,
        layer_norm_eps=EPSILON, hidden_act="quick_gelu",
    )
    model = CLIPVisionModelWithProjection(config).double().eval()
    names = {
        "embeddings.patches.weight": "embeddings.patch_embedding.weight",
        "embeddings.class_tokens": "embeddings.class_embedding",
        "embeddings.positions.weight": "embeddings.position_embedding.weight",
        "embeddings.norm": "pre_layrnorm",
        "head.norm": "post_layernorm",
        "head.output.weight": "visual_projection.weight",
    }
    for layer in range(LAYERS):
        there = f"encoder.layers.{layer}"
        names |= {
            f"blocks.{layer}.attention.query": f"{there}.self_attn.q_proj",
            f"blocks.{layer}.attention.key": f"{there}.self_attn.k_proj",
            f"blocks.{layer}.attention.value": f"{there}.self_attn.v_proj",
            f"blocks.{layer}.attention.output": f"{there}.self_attn.out_proj",
            f"blocks.{layer}.attention_norm": f"{there}.layer_norm1",
            f"blocks.{layer}.feedforward_norm": f"{there}.layer_norm2",
            f"blocks.{layer}.feedforward.up": f"{there}.mlp.fc1",
            f"blocks.{layer}.feedforward.down": f"{there}.mlp.fc2",
        }
    state = model.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    for name, value in p.items():
        stem, _, end = name.rpartition(".")
        there = names.get(name) or f"{names[stem]}.{end}"
        if there not in state:
            there = prefix + there
        state[there] = torch.from_numpy(value).reshape(state[there].shape)
    model.load_state_dict(state)
    with torch.no_grad():
        found = model(torch.from_numpy(images)).image_embeds.numpy()
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    assert np.abs(found - embeddings).max() < 1e-9, np.abs(found - embeddings).max()
    print("forward pass agrees with transformers")


def main(directory):
    rng = np.random.default_rng(11)
    p = parameters(rng)
    images = rng.normal(0, 1, (IMAGES, 3, IMAGE, IMAGE)).astype(np.float32).astype(np.float64)
    texts = rng.normal(0, 1, (TEXTS, FEATURES)).astype(np.float32).astype(np.float64)
    texts_used = texts
    found = [decompose(image, p) for image in images]
    attention = np.stack([one[0] for one in found])  # [images, layers, tokens, heads, features]
    direct = np.stack([one[1] for one in found])
    embeddings = np.stack([one[2] for one in found])
    check_against_transformers(images, p, embeddings)

    heads = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            outputs = attention[:, layer, :, head].sum(1)
            chosen, rebuilt = text_span(outputs, texts_used, WIDTH // HEADS, CHOICES)
            heads.append(
                {"layer": layer, "head": head, "texts": chosen, "rebuilt": rebuilt.tolist()}
            )

    from safetensors.numpy import save_file

    tensors = {f"model.{name}": value.astype(np.float32) for name, value in p.items()}
    tensors |= {"images": images.astype(np.float32), "texts": texts.astype(np.float32)}
    tensors |= {
        "expected.heads": attention.sum(2).astype(np.float64),
        "expected.tokens": attention.sum((1, 3)).astype(np.float64),
        "expected.first_image": attention[0].astype(np.float64),
        "expected.direct": direct.astype(np.float64),
        "expected.embeddings": embeddings.astype(np.float64),
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "clip.safetensors")
    spec = {
        "width": WIDTH,
        "input": {
            "kind": "patches", "image": [IMAGE, IMAGE], "patch": PATCH, "bias": False,
            "norm": {"kind": "layer", "epsilon": EPSILON},
        },
        "blocks": [{
            "repeat": LAYERS,
            "norm": {"kind": "layer", "epsilon": EPSILON},
            "attention": {"kind": "multi-head", "heads": HEADS},
            "feedforward": {"kind": "dense", "hidden": HIDDEN, "activation": "quick-gelu"},
        }],
        "head": {
            "kind": "pooled", "norm": {"kind": "layer", "epsilon": EPSILON},
            "labels": FEATURES, "bias": False,
        },
    }
    fixture = {"numpy": np.__version__, "spec": spec, "choices": CHOICES, "heads": heads}
    (directory / "clip.json").write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
