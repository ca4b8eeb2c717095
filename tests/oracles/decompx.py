"""DecompX in PyTorch, as its authors' code computes it, and the fixtures made with it.

An independent implementation of Modarressi et al., DecompX (arXiv 2306.02873), with the
authors' choices where paper and code differ: the bias of attention is split after the residual,
the value bias of the first layer stays with its own token, and the classifier's bias is split for
each class by itself. Streams are `[batch, position, stream, width]` and attention is decomposed
through the tensor `[batch, heads, query, stream, width]`, all vectorised. Two departures keep it
exact: the secant of an activation near zero is the derivative, and the weights of a bias are
normalised without an added 1e-12.

    python tests/oracles/decompx.py crates/explain/tests/fixtures

writes `decompx-{bert,roberta,gpt2}.{safetensors,json}`, after checking the plain forward pass
against `transformers` on the same weights.
"""

import json
import math
import sys
from pathlib import Path

import torch

BERT, ROBERTA, GPT2 = "bert", "roberta", "gpt2"


# ------------------------------------------------------------------ the rules


def share(raw):
    """Weights over the streams (second last dimension of `[.., stream, 1]`) that sum to one."""
    return raw / raw.sum(dim=-2, keepdim=True)


def split_bias(streams, bias):
    """Adds `bias` [width] to `streams` [.., stream, width] by |S · b| (AbsDot)."""
    weights = share(torch.einsum("...kd,d->...k", streams, bias).abs().unsqueeze(-1))
    return streams + weights * bias


def split_bias_of_scores(streams, bias):
    """As `split_bias`, each score a number of its own: by |S_c b_c|."""
    return streams + share_scores(streams * bias) * bias


def share_scores(raw):
    raw = raw.abs()
    return raw / raw.sum(dim=-2, keepdim=True)


def norm(streams, x, weight, bias, epsilon):
    """Layer norm with the deviation of the true `x` [.., width], each stream losing its mean."""
    deviation = (x.var(dim=-1, unbiased=False, keepdim=True) + epsilon).sqrt().unsqueeze(-2)
    streams = (streams - streams.mean(dim=-1, keepdim=True)) / deviation * weight
    return split_bias(streams, bias)


def activate(x, name):
    if name == "gelu":
        return torch.nn.functional.gelu(x)
    if name == "gelu-tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return torch.tanh(x)


def secant(x, name):
    at_zero = 1.0 if name == "tanh" else 0.5
    near = x.abs() < 1e-6
    safe = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, torch.full_like(x, at_zero), activate(safe, name) / safe)


def linear(x, p, path):
    return x @ p[f"{path}.weight"].T + p[f"{path}.bias"]


# ------------------------------------------------------------------ one block


def heads_of(x, heads):
    """[batch, position, heads * head] -> [batch, heads, position, head]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_probabilities(x, p, path, heads, causal):
    q = heads_of(linear(x, p, f"{path}.query"), heads)
    k = heads_of(linear(x, p, f"{path}.key"), heads)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1)


def attention(x, streams, p, path, heads, causal, first):
    """The value and the streams of attention, without its bias, and that bias [width]."""
    probabilities = attention_probabilities(x, p, path, heads, causal)
    values = heads_of(linear(x, p, f"{path}.value"), heads)
    mixed = (probabilities @ values).transpose(1, 2).flatten(2)
    out = linear(mixed, p, f"{path}.output")
    # [width, heads, head]
    output = p[f"{path}.output.weight"].unflatten(1, (heads, -1))
    if first:
        # Position j's vector, value bias included, is stream j.
        transformed = torch.einsum("bhsv,dhv->bhsd", values, output)
        weighted = torch.einsum("bhks,bhsd->bhksd", probabilities, transformed)
        bias = p[f"{path}.output.bias"]
    else:
        values = torch.einsum("bijd,vd->bijv", streams, p[f"{path}.value.weight"])
        values = values.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)
        transformed = torch.einsum("bhsqv,dhv->bhsqd", values, output)
        weighted = torch.einsum("bhks,bhsqd->bhkqd", probabilities, transformed)
        bias = p[f"{path}.value.bias"] @ p[f"{path}.output.weight"].T + p[f"{path}.output.bias"]
    return out, weighted.sum(dim=1), bias


def feedforward(x, streams, p, path, activation):
    before = linear(x, p, f"{path}.up")
    streams = torch.einsum("bikd,fd->bikf", streams, p[f"{path}.up.weight"])
    streams = split_bias(streams, p[f"{path}.up.bias"])
    streams = streams * secant(before, activation).unsqueeze(-2)
    streams = torch.einsum("bikf,df->bikd", streams, p[f"{path}.down.weight"])
    streams = split_bias(streams, p[f"{path}.down.bias"])
    return linear(activate(before, activation), p, f"{path}.down"), streams


def normalise(x, streams, p, path, epsilon):
    weight, bias = p[f"{path}.weight"], p[f"{path}.bias"]
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return y, norm(streams, x, weight, bias, epsilon)


def post_norm_block(x, streams, p, path, config, first):
    out, z, bias = attention(
        x, streams, p, f"{path}.attention", config["heads"], False, first
    )
    streams = split_bias(streams + z, bias)
    x, streams = normalise(x + out, streams, p, f"{path}.attention_norm", config["epsilon"])
    out, z = feedforward(x, streams, p, f"{path}.feedforward", "gelu")
    return normalise(x + out, streams + z, p, f"{path}.feedforward_norm", config["epsilon"])


def pre_norm_block(x, streams, p, path, config, first):
    y, normed = normalise(x, streams, p, f"{path}.attention_norm", config["epsilon"])
    out, z, bias = attention(
        y, normed, p, f"{path}.attention", config["heads"], True, first
    )
    streams = split_bias(streams + z, bias)
    x = x + out
    y, normed = normalise(x, streams, p, f"{path}.feedforward_norm", config["epsilon"])
    out, z = feedforward(y, normed, p, f"{path}.feedforward", "gelu-tanh")
    return x + out, streams + z


# ------------------------------------------------------------------ models


def embed(ids, p, config):
    x = p["embeddings.tokens.weight"][ids]
    first = config.get("position_offset", 0)
    x = x + p["embeddings.positions.weight"][first : first + ids.shape[1]]
    if "embeddings.token_types.weight" in p:
        x = x + p["embeddings.token_types.weight"][0]
    if "embeddings.norm.weight" in p:
        x = torch.nn.functional.layer_norm(
            x,
            x.shape[-1:],
            p["embeddings.norm.weight"],
            p["embeddings.norm.bias"],
            config["epsilon"],
        )
    return x


@torch.no_grad()
def decompx(ids, p, config):
    """Logits `[batch, classes]` and their streams `[batch, token, classes]`."""
    x = embed(ids, p, config)
    batch, length, width = x.shape
    streams = torch.zeros(batch, length, length, width, dtype=x.dtype)
    own = torch.arange(length)
    streams[:, own, own] = x
    block = pre_norm_block if config["kind"] == GPT2 else post_norm_block
    for layer in range(config["layers"]):
        x, streams = block(x, streams, p, f"blocks.{layer}", config, layer == 0)
    if config["kind"] == GPT2:
        x, streams = normalise(
            x[:, -1:], streams[:, -1:], p, "final_norm", config["epsilon"]
        )
        table = p["embeddings.tokens.weight"]
        return x[:, 0] @ table.T, streams[:, 0] @ table.T
    # BERT's pooler and RoBERTa's classification head are both dense + tanh + classifier.
    x, streams = x[:, 0], streams[:, 0]
    before = linear(x, p, "head.hidden")
    streams = split_bias(streams @ p["head.hidden.weight"].T, p["head.hidden.bias"])
    streams = streams * secant(before, "tanh").unsqueeze(-2)
    streams = streams @ p["head.output.weight"].T
    logits = linear(torch.tanh(before), p, "head.output")
    return logits, split_bias_of_scores(streams, p["head.output.bias"])


def shapes(config):
    """Every parameter's shape by its name in Lapidary."""
    d, f = config["width"], config["hidden"]
    offset = config.get("position_offset", 0)
    s = {
        "embeddings.tokens.weight": (config["vocabulary"], d),
        "embeddings.positions.weight": (config["length"] + offset, d),
    }
    if config["kind"] != GPT2:
        s["embeddings.token_types.weight"] = (config["token_types"], d)
        s |= {"embeddings.norm.weight": (d,), "embeddings.norm.bias": (d,)}
    for layer in range(config["layers"]):
        path = f"blocks.{layer}"
        for name in ("query", "key", "value", "output"):
            s[f"{path}.attention.{name}.weight"] = (d, d)
            s[f"{path}.attention.{name}.bias"] = (d,)
        s[f"{path}.feedforward.up.weight"] = (f, d)
        s[f"{path}.feedforward.up.bias"] = (f,)
        s[f"{path}.feedforward.down.weight"] = (d, f)
        s[f"{path}.feedforward.down.bias"] = (d,)
        for name in ("attention_norm", "feedforward_norm"):
            s |= {f"{path}.{name}.weight": (d,), f"{path}.{name}.bias": (d,)}
    if config["kind"] == GPT2:
        s |= {"final_norm.weight": (d,), "final_norm.bias": (d,)}
    else:
        s |= {"head.hidden.weight": (d, d), "head.hidden.bias": (d,)}
        s |= {
            "head.output.weight": (config["labels"], d),
            "head.output.bias": (config["labels"],),
        }
    return s


def random_parameters(config, seed, deviation=None):
    """Weights large enough that nonlinearities bend and biases count, `f32` values in `f64`."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        if len(shape) == 2 and not name.startswith("embeddings"):
            noise = noise / math.sqrt(shape[1])
        elif len(shape) == 1:
            noise = 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
        parameters[name] = noise.double()
    return parameters


# ------------------------------------------------------------------ transformers, as a check


def reference_logits(ids, p, config):
    """Logits of the same weights in `transformers`."""
    import transformers

    common = {
        "vocab_size": config["vocabulary"],
        "hidden_size": config["width"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "intermediate_size": config["hidden"],
        "num_labels": config.get("labels", 2),
        "layer_norm_eps": config["epsilon"],
        "hidden_act": "gelu",
        "type_vocab_size": config.get("token_types", 1),
        "max_position_embeddings": config["length"] + config.get("position_offset", 0),
    }
    if config["kind"] == BERT:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**common))
        rename = bert_names("bert", {"head.hidden": "bert.pooler.dense", "head.output": "classifier"})
    elif config["kind"] == ROBERTA:
        model = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(pad_token_id=1, **common)
        )
        rename = bert_names(
            "roberta", {"head.hidden": "classifier.dense", "head.output": "classifier.out_proj"}
        )
    else:
        return gpt2_logits(ids, p, config)
    state = {rename(name): value for name, value in p.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and not [m for m in missing if "position_ids" not in m], (missing, surplus)
    model = model.double().eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def bert_names(prefix, heads):
    parts = {
        "embeddings.tokens": "embeddings.word_embeddings",
        "embeddings.positions": "embeddings.position_embeddings",
        "embeddings.token_types": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "feedforward.up": "intermediate.dense",
        "feedforward.down": "output.dense",
        "feedforward_norm": "output.LayerNorm",
    }

    def rename(name):
        path, leaf = name.rsplit(".", 1)
        if path in heads:
            return f"{heads[path]}.{leaf}"
        if path.startswith("blocks."):
            _, layer, part = path.split(".", 2)
            return f"{prefix}.encoder.layer.{layer}.{parts[part]}.{leaf}"
        return f"{prefix}.{parts[path]}.{leaf}"

    return rename


def gpt2_logits(ids, p, config):
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config["vocabulary"],
            n_embd=config["width"],
            n_layer=config["layers"],
            n_head=config["heads"],
            n_inner=config["hidden"],
            n_positions=config["length"],
            layer_norm_epsilon=config["epsilon"],
        )
    )
    state = {
        "transformer.wte.weight": p["embeddings.tokens.weight"],
        "lm_head.weight": p["embeddings.tokens.weight"],
        "transformer.wpe.weight": p["embeddings.positions.weight"],
        "transformer.ln_f.weight": p["final_norm.weight"],
        "transformer.ln_f.bias": p["final_norm.bias"],
    }
    for layer in range(config["layers"]):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for leaf in ("weight", "bias"):
            merged = [p[f"{ours}.attention.{n}.{leaf}"] for n in ("query", "key", "value")]
            state[f"{theirs}.attn.c_attn.{leaf}"] = torch.cat(merged)
            state[f"{theirs}.attn.c_proj.{leaf}"] = p[f"{ours}.attention.output.{leaf}"]
            state[f"{theirs}.mlp.c_fc.{leaf}"] = p[f"{ours}.feedforward.up.{leaf}"]
            state[f"{theirs}.mlp.c_proj.{leaf}"] = p[f"{ours}.feedforward.down.{leaf}"]
            state[f"{theirs}.ln_1.{leaf}"] = p[f"{ours}.attention_norm.{leaf}"]
            state[f"{theirs}.ln_2.{leaf}"] = p[f"{ours}.feedforward_norm.{leaf}"]
    # The linear layers of GPT-2 keep their matrices transposed.
    for name, value in state.items():
        if value.dim() == 2 and ".h." in name:
            state[name] = value.T.contiguous()
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not missing and not surplus, (missing, surplus)
    model = model.double().eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1]


# ------------------------------------------------------------------ fixtures

SMALL = {"width": 16, "heads": 4, "hidden": 24, "layers": 3, "vocabulary": 20, "length": 12}
CONFIGS = {
    BERT: SMALL | {"kind": BERT, "epsilon": 1e-12, "token_types": 2, "labels": 3},
    ROBERTA: SMALL
    | {"kind": ROBERTA, "epsilon": 1e-5, "token_types": 1, "labels": 2, "position_offset": 2},
    GPT2: SMALL | {"kind": GPT2, "epsilon": 1e-5},
}


def spec(config):
    """The same model as a Lapidary spec."""
    layer_norm = {"kind": "layer", "epsilon": config["epsilon"]}
    gpt2 = config["kind"] == GPT2
    model = {
        "width": config["width"],
        "input": {
            "kind": "tokens",
            "vocabulary": config["vocabulary"],
            "length": config["length"],
            "position": {"kind": "learned", "offset": config.get("position_offset", 0)},
        },
        "blocks": [
            {
                "repeat": config["layers"],
                "wiring": "pre-norm" if gpt2 else "post-norm",
                "norm": layer_norm,
                "attention": {
                    "kind": "multi-head",
                    "heads": config["heads"],
                    "causal": gpt2,
                },
                "feedforward": {
                    "kind": "dense",
                    "hidden": config["hidden"],
                    "activation": "gelu-tanh" if gpt2 else "gelu",
                },
            }
        ],
    }
    if gpt2:
        model["final_norm"] = layer_norm
        model["head"] = {"kind": "language-model"}
    else:
        model["input"] |= {"token_types": config["token_types"], "norm": layer_norm}
        model["head"] = {"kind": "pooled", "hidden": "tanh", "labels": config["labels"]}
    return model


def main():
    from safetensors.torch import save_file

    directory = Path(sys.argv[1])
    ids = torch.tensor([[3, 11, 5, 0, 19, 7, 3, 14]])
    for seed, (kind, config) in enumerate(CONFIGS.items()):
        p = random_parameters(config, seed)
        logits, streams = decompx(ids, p, config)
        assert torch.allclose(streams.sum(1), logits, rtol=0, atol=1e-10)
        reference = reference_logits(ids, p, config)
        assert torch.allclose(logits, reference, rtol=0, atol=1e-10), (logits, reference)
        stored = {name: value.float().contiguous() for name, value in p.items()}
        save_file(stored, directory / f"decompx-{kind}.safetensors")
        fixture = {
            "made_by": f"tests/oracles/decompx.py, torch {torch.__version__.split('+')[0]}",
            "spec": spec(config),
            "input_ids": ids[0].tolist(),
            "logits": logits[0].tolist(),
            "streams": streams[0].tolist(),
        }
        path = directory / f"decompx-{kind}.json"
        path.write_text(json.dumps(fixture, indent=1) + "\n")
        print(path, "logits", [round(v, 4) for v in logits[0].tolist()[:3]])


if __name__ == "__main__":
    main()
