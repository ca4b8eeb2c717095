"""ALTI, ALTI-Logit and GlobEnc in PyTorch, and the fixture made with it.

A straightforward implementation of Ferrando et al. (arXiv 2203.04212, 2305.12535) and Modarressi
et al. (arXiv 2205.03286): every share `T_t(x_j)` is laid out as `[query, key, width]`. The GPT-2-
and BERT-like weights are those of the DecompX fixtures; a Llama-like model is made here, whose
forward pass is checked against `transformers`. Everything is computed in `f64`.

    python tests/oracles/alti.py crates/explain/tests/fixtures

writes `alti.json` and `alti-llama.safetensors`.
"""

import json
import math
import sys
from pathlib import Path

import torch
from decompx import (
    activate,
    attention_probabilities,
    embed,
    heads_of,
    linear,
    spec,
    CONFIGS,
)
from safetensors.torch import load_file, save_file

IDS = [3, 11, 5, 0, 19, 7, 3, 14]
TARGET, FOIL = 4, 9

LLAMA = {
    "width": 16,
    "heads": 4,
    "groups": 2,
    "hidden": 24,
    "layers": 3,
    "vocabulary": 20,
    "length": 12,
    "epsilon": 1e-6,
}


# ------------------------------------------------------------------ taking a block apart


def shares(probabilities, values, output):
    """T_t(x_j) `[query, key, width]` from `[heads, query, key]`, `[heads, key, head]` and W_O."""
    by_head = output.unflatten(1, (values.shape[0], -1))  # [width, heads, head]
    return torch.einsum("htj,hjv,dhv->tjd", probabilities, values, by_head)


def row_normalised(c):
    return c / c.sum(-1, keepdim=True)


def nearer(reference, parts):
    """max(0, |y|_1 - |y - T|_1), row-normalised."""
    lengths = reference.abs().sum(-1, keepdim=True)
    return row_normalised((lengths - (reference[:, None] - parts).abs().sum(-1)).clamp(min=0))


def with_own(parts, x):
    own = torch.arange(x.shape[0])
    parts = parts.clone()
    parts[own, own] += x
    return parts


def rollout(matrices):
    result = torch.eye(matrices[0].shape[0], dtype=torch.float64)
    for c in matrices:
        result = c @ result
    return result


def rms(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def layer_norm(x, p, path, epsilon):
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], p[f"{path}.weight"], p[f"{path}.bias"], epsilon
    )


def fixed_layer_norm(v, at, weight, epsilon):
    """The norm of vectors `v` [.., width] with the deviation of `at` [rows, width], no bias."""
    deviation = (at.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
    while deviation.dim() < v.dim():
        deviation = deviation.unsqueeze(1)
    return (v - v.mean(-1, keepdim=True)) / deviation * weight


# ------------------------------------------------------------------ decoders


def alti_logit(blocks, final, read):
    """`read(v)`: what vectors `[.., width]` write to the explained number. Gives the token scores,
    the feed-forward updates and the last mixing."""
    t = final.shape[0] - 1
    before = torch.eye(t + 1, dtype=torch.float64)
    scores = torch.zeros(t + 1, dtype=torch.float64)
    mlp, bias = [], []
    for block in blocks:
        scores += read(block["shares"][t]) @ before
        mlp.append(read(block["mlp"][t]).item())
        bias.append(read(block["bias"]).item() if block["bias"] is not None else 0.0)
        y = block["x"] + block["out"]
        before = nearer(y, with_own(block["shares"], block["x"])) @ before
    return {
        "scores": scores.tolist(),
        "embedding": read(blocks[0]["x"][t]).item(),
        "feedforward": mlp,
        "output_bias": bias,
        "alti": before[t].tolist(),
    }


def gpt2(p, config):
    x = embed(torch.tensor([IDS]), p, config)[0]
    blocks = []
    for layer in range(config["layers"]):
        path = f"blocks.{layer}"
        read = layer_norm(x, p, f"{path}.attention_norm", config["epsilon"])
        a = attention_probabilities(read[None], p, f"{path}.attention", config["heads"], True)[0]
        v = heads_of(linear(read, p, f"{path}.attention.value")[None], config["heads"])[0]
        t = shares(a, v, p[f"{path}.attention.output.weight"])
        out = t.sum(1) + p[f"{path}.attention.output.bias"]
        y = x + out
        read = layer_norm(y, p, f"{path}.feedforward_norm", config["epsilon"])
        up = activate(linear(read, p, f"{path}.feedforward.up"), "gelu-tanh")
        mlp = linear(up, p, f"{path}.feedforward.down")
        bias = p[f"{path}.attention.output.bias"]
        blocks.append({"x": x, "shares": t, "out": out, "mlp": mlp, "bias": bias})
        x = y + mlp
    table = p["embeddings.tokens.weight"]
    u = table[TARGET] - table[FOIL]
    at = x[-1:]
    read = lambda v: fixed_layer_norm(v, at, p["final_norm.weight"], config["epsilon"]) @ u
    result = alti_logit(blocks, x, read)
    result["norm_bias"] = (p["final_norm.bias"] @ u).item()
    result["explained"] = (layer_norm(at, p, "final_norm", config["epsilon"]) @ u).item()
    return result


def rotated(x):
    """Rotary positions of `[heads, position, head]`, feature i paired with i + head / 2."""
    positions, width = x.shape[1], x.shape[2]
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    first, second = x[..., : width // 2], x[..., width // 2 :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def llama(p, config):
    x = p["embeddings.tokens.weight"][torch.tensor(IDS)]
    heads, groups = config["heads"], config["groups"]
    split = lambda v, n: v.unflatten(-1, (n, -1)).transpose(0, 1)
    later = torch.ones(len(IDS), len(IDS), dtype=torch.bool).triu(1)
    blocks = []
    for layer in range(config["layers"]):
        path = f"blocks.{layer}"
        w = lambda name: p[f"{path}.{name}.weight"]
        read = rms(x, w("attention_norm"), config["epsilon"])
        q = rotated(split(read @ w("attention.query").T, heads))
        k = rotated(split(read @ w("attention.key").T, groups))
        v = split(read @ w("attention.value").T, groups)
        k, v = (z.repeat_interleave(heads // groups, 0) for z in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        a = scores.masked_fill(later, float("-inf")).softmax(-1)
        t = shares(a, v, w("attention.output"))
        out = t.sum(1)
        y = x + out
        read = rms(y, w("feedforward_norm"), config["epsilon"])
        gate = torch.nn.functional.silu(read @ w("feedforward.gate").T)
        mlp = (gate * (read @ w("feedforward.up").T)) @ w("feedforward.down").T
        blocks.append({"x": x, "shares": t, "out": out, "mlp": mlp, "bias": None})
        x = y + mlp
    table = p["head.output.weight"]
    u = table[TARGET] - table[FOIL]
    at = x[-1]
    deviation = (at.square().mean() + config["epsilon"]).sqrt()
    read = lambda v: (v / deviation * p["final_norm.weight"]) @ u
    result = alti_logit(blocks, x, read)
    result["norm_bias"] = 0.0
    result["explained"] = (rms(at, p["final_norm.weight"], config["epsilon"]) @ u).item()
    check_llama(p, config, result["explained"])
    return result


def check_llama(p, config, explained):
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config["vocabulary"],
            hidden_size=config["width"],
            intermediate_size=config["hidden"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            num_key_value_heads=config["groups"],
            rms_norm_eps=config["epsilon"],
            max_position_embeddings=config["length"],
            tie_word_embeddings=False,
        )
    ).double()
    names = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "feedforward_norm": "post_attention_layernorm",
        "feedforward.gate": "mlp.gate_proj",
        "feedforward.up": "mlp.up_proj",
        "feedforward.down": "mlp.down_proj",
    }
    state = {
        "model.embed_tokens.weight": p["embeddings.tokens.weight"],
        "model.norm.weight": p["final_norm.weight"],
        "lm_head.weight": p["head.output.weight"],
    }
    for layer in range(config["layers"]):
        for ours, theirs in names.items():
            state[f"model.layers.{layer}.{theirs}.weight"] = p[f"blocks.{layer}.{ours}.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, -1]
    # The rotary tables of `transformers` are f32.
    assert abs((logits[TARGET] - logits[FOIL]).item() - explained) < 1e-5


# ------------------------------------------------------------------ encoders


def bert(p, config):
    x = embed(torch.tensor([IDS]), p, config)[0]
    alti, globenc = [], []
    for layer in range(config["layers"]):
        path = f"blocks.{layer}"
        a = attention_probabilities(x[None], p, f"{path}.attention", config["heads"], False)[0]
        v = heads_of(linear(x, p, f"{path}.attention.value")[None], config["heads"])[0]
        t = shares(a, v, p[f"{path}.attention.output.weight"])
        total = x + t.sum(1) + p[f"{path}.attention.output.bias"]
        gamma = p[f"{path}.attention_norm.weight"]
        parts = fixed_layer_norm(with_own(t, x), total, gamma, config["epsilon"])
        y = layer_norm(total, p, f"{path}.attention_norm", config["epsilon"])
        alti.append(nearer(y, parts))
        up = activate(linear(y, p, f"{path}.feedforward.up"), "gelu")
        total = y + linear(up, p, f"{path}.feedforward.down")
        gamma = p[f"{path}.feedforward_norm.weight"]
        parts = fixed_layer_norm(parts, total, gamma, config["epsilon"])
        globenc.append(row_normalised(parts.norm(dim=-1)))
        x = layer_norm(total, p, f"{path}.feedforward_norm", config["epsilon"])
    pooled = torch.tanh(linear(x[:1], p, "head.hidden"))
    logits = linear(pooled, p, "head.output")[0]
    return {
        "logits": logits.tolist(),
        "alti": rollout(alti)[0].tolist(),
        "globenc": rollout(globenc)[0].tolist(),
    }


# ------------------------------------------------------------------ the fixture


def llama_parameters(config):
    generator = torch.Generator().manual_seed(7)
    d, f, key = config["width"], config["hidden"], config["groups"] * 4
    shapes = {
        "embeddings.tokens.weight": (config["vocabulary"], d),
        "final_norm.weight": (d,),
        "head.output.weight": (config["vocabulary"], d),
    }
    for layer in range(config["layers"]):
        path = f"blocks.{layer}"
        shapes |= {
            f"{path}.attention_norm.weight": (d,),
            f"{path}.feedforward_norm.weight": (d,),
            f"{path}.attention.query.weight": (d, d),
            f"{path}.attention.key.weight": (key, d),
            f"{path}.attention.value.weight": (key, d),
            f"{path}.attention.output.weight": (d, d),
            f"{path}.feedforward.gate.weight": (f, d),
            f"{path}.feedforward.up.weight": (f, d),
            f"{path}.feedforward.down.weight": (d, f),
        }
    parameters = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        noise = 1 + 0.3 * noise if len(shape) == 1 else noise * 1.5 / math.sqrt(shape[1])
        parameters[name] = noise.double()
    return parameters


def llama_spec(config):
    norm = {"kind": "rms", "epsilon": config["epsilon"]}
    return {
        "width": config["width"],
        "input": {
            "kind": "tokens",
            "vocabulary": config["vocabulary"],
            "length": config["length"],
        },
        "blocks": [
            {
                "repeat": config["layers"],
                "norm": norm,
                "attention": {
                    "kind": "multi-head",
                    "heads": config["heads"],
                    "groups": config["groups"],
                    "causal": True,
                    "bias": False,
                    "position": {"kind": "rotary"},
                },
                "feedforward": {"kind": "gated", "hidden": config["hidden"]},
            }
        ],
        "final_norm": norm,
        "head": {"kind": "language-model", "tied": False},
    }


def main():
    directory = Path(sys.argv[1])
    stored = lambda kind: {
        name: value.double()
        for name, value in load_file(directory / f"decompx-{kind}.safetensors").items()
    }
    parameters = llama_parameters(LLAMA)
    save_file(
        {name: value.float().contiguous() for name, value in parameters.items()},
        directory / "alti-llama.safetensors",
    )
    # What is stored is what both sides compute with.
    parameters = {name: value.float().double() for name, value in parameters.items()}
    fixture = {
        "made_by": f"tests/oracles/alti.py, torch {torch.__version__.split('+')[0]}",
        "input_ids": IDS,
        "target": TARGET,
        "foil": FOIL,
        "decoders": {
            "decompx-gpt2": {"spec": spec(CONFIGS["gpt2"])}
            | gpt2(stored("gpt2"), CONFIGS["gpt2"]),
            "alti-llama": {"spec": llama_spec(LLAMA)} | llama(parameters, LLAMA),
        },
        "encoder": {"spec": spec(CONFIGS["bert"])} | bert(stored("bert"), CONFIGS["bert"]),
    }
    for name, one in fixture["decoders"].items():
        total = sum(one["scores"]) + one["embedding"] + one["norm_bias"]
        total += sum(one["feedforward"]) + sum(one["output_bias"])
        assert abs(total - one["explained"]) < 1e-9, (name, total, one["explained"])
    (directory / "alti.json").write_text(json.dumps(fixture, indent=1) + "\n")


if __name__ == "__main__":
    main()
