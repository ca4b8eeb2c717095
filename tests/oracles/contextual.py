"""Contextual decomposition in PyTorch, by its published rules, and the fixtures made with it.

An independent implementation of Hsu et al., Efficient Automated Circuit Discovery in Transformers
using Contextual Decomposition (arXiv 2407.00886). Both parts of every activation are carried, as
pairs `(relevant, irrelevant)` of tensors `[batch, position, width]`; nothing is computed as a
difference from the true value but the irrelevant context of split attention, as published. Two
departures keep the sum exact: the weights of a bias have no added 1e-8, and a bias of which
neither part has a trace is irrelevant.

The models are those of `decompx.py`, whose weights are read from its fixtures:

    python tests/oracles/contextual.py crates/explain/tests/fixtures

writes `contextual-{bert,gpt2}.json`, after checking that each pair sums to the plain pass.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def total(pair):
    return pair[0] + pair[1]


def share_bias(pair, bias, weights):
    r, g = weights[0].abs(), weights[1].abs()
    portion = torch.where(r + g == 0, torch.zeros_like(r), r / (r + g))
    return pair[0] + bias * portion, pair[1] + bias * (1 - portion)


def settle(pair, on):
    if not on:
        return pair
    r, g = pair
    opposed = r * g < 0
    r_wins = opposed & (r.abs() >= g.abs())
    g_wins = opposed & ~r_wins
    zero = torch.zeros_like(r)
    return (
        torch.where(r_wins, r + g, torch.where(g_wins, zero, r)),
        torch.where(g_wins, r + g, torch.where(r_wins, zero, g)),
    )


def linear(pair, p, path):
    pair = tuple(part @ p[f"{path}.weight"].T for part in pair)
    return share_bias(pair, p[f"{path}.bias"], pair)


def norm(pair, p, path, epsilon):
    deviation = (total(pair).var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
    weight, bias = p[f"{path}.weight"], p[f"{path}.bias"]
    out = tuple((x - x.mean(-1, keepdim=True)) / deviation * weight for x in pair)
    return share_bias(out, bias, pair)


def activate(pair, f):
    rest = f(pair[1])
    return f(total(pair)) - rest, rest


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def weights_of(q, k, heads, causal):
    q, k = heads_of(q, heads), heads_of(k, heads)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1)


def mix(weights, v, heads):
    return (weights @ heads_of(v, heads)).transpose(1, 2).flatten(2)


def attention(pair, p, path, c, rules, layer, sources, seen):
    q, k, v = (linear(pair, p, f"{path}.{name}") for name in ("query", "key", "value"))
    causal, heads = c["causal"], c["heads"]
    true = weights_of(total(q), total(k), heads, causal)
    if rules["split"]:
        own = mix(weights_of(q[0], k[0], heads, causal), v[0], heads)
        context = (own, mix(true, total(v), heads) - own)
    else:
        context = tuple(mix(true, part, heads) for part in v)
        context = settle(context, rules["stabilise"])
    for node in sources:
        if node["block"] == layer:
            context = start_at(context, node, c)
    seen[layer] = context
    out = linear(context, p, f"{path}.output")
    return settle(out, rules["stabilise"] and not rules["split"])


def start_at(context, node, c):
    """Makes what a head writes, less its mean over positions, relevant."""
    width = c["width"] // c["heads"]
    own = slice(node["head"] * width, (node["head"] + 1) * width)
    z = total(context)
    mean = z.mean(1, keepdim=True)[..., own].squeeze(1)
    r, g = (part.clone() for part in context)
    r[:, node["position"], own] = z[:, node["position"], own] - mean
    g[:, node["position"], own] = mean
    return r, g


def add(a, b, rules):
    return settle((a[0] + b[0], a[1] + b[1]), rules["stabilise"])


def normalise(pair, p, path, c, rules):
    return settle(norm(pair, p, path, c["epsilon"]), rules["stabilise"] and not rules["split"])


def feedforward(pair, p, path, c, rules):
    pair = settle(linear(pair, p, f"{path}.up"), rules["stabilise"])
    form = "tanh" if c["causal"] else "none"
    pair = activate(pair, lambda x: torch.nn.functional.gelu(x, approximate=form))
    return settle(linear(pair, p, f"{path}.down"), rules["stabilise"])


def decompose(pair, p, c, rules, sources=()):
    """The pair of logits, and the pair of contexts of each layer."""
    seen = {}
    for layer in range(c["layers"]):
        path = f"blocks.{layer}"
        a, f = f"{path}.attention", f"{path}.feedforward"
        if c["causal"]:
            x = normalise(pair, p, f"{a}_norm", c, rules)
            pair = add(pair, attention(x, p, a, c, rules, layer, sources, seen), rules)
            x = normalise(pair, p, f"{f}_norm", c, rules)
            pair = add(pair, feedforward(x, p, f, c, rules), rules)
        else:
            out = attention(pair, p, a, c, rules, layer, sources, seen)
            pair = normalise(add(pair, out, rules), p, f"{a}_norm", c, rules)
            out = feedforward(pair, p, f, c, rules)
            pair = normalise(add(pair, out, rules), p, f"{f}_norm", c, rules)
    if c["causal"]:
        pair = normalise(pair, p, "final_norm", c, rules)
        table = p["embeddings.tokens.weight"]
        return tuple(x[:, -1] @ table.T for x in pair), seen
    pair = tuple(x[:, 0] for x in pair)
    pair = settle(linear(pair, p, "head.hidden"), rules["stabilise"])
    pair = activate(pair, torch.tanh)
    return linear(pair, p, "head.output"), seen


def embed(ids, p, c):
    x = p["embeddings.tokens.weight"][ids] + p["embeddings.positions.weight"][: ids.shape[1]]
    if "embeddings.token_types.weight" in p:
        x = x + p["embeddings.token_types.weight"][0]
    if "embeddings.norm.weight" in p:
        weight, bias = p["embeddings.norm.weight"], p["embeddings.norm.bias"]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, c["epsilon"])
    return x


RULES = [
    {"split": split, "stabilise": stabilise}
    for split in (False, True)
    for stabilise in (False, True)
]
SOURCES = [[0], [3], [2, 3, 4], [0, 5, 7]]
NODES = [
    [{"block": 0, "head": 1, "position": 2}],
    [{"block": 1, "head": 2, "position": 7}],
    [{"block": 0, "head": 3, "position": 0}, {"block": 1, "head": 0, "position": 5}],
]
READ = {"block": 2, "head": 1}


def share_at(context, node, c):
    width = c["width"] // c["heads"]
    own = slice(node["head"] * width, (node["head"] + 1) * width)
    r, g = (part[0, :, own].abs().mean() for part in context)
    return (r / (r + g)).item()


@torch.no_grad()
def main():
    directory = Path(sys.argv[1])
    for kind in ("bert", "gpt2"):
        stored = json.loads((directory / f"decompx-{kind}.json").read_text())
        p = load_file(directory / f"decompx-{kind}.safetensors")
        p = {name: value.double() for name, value in p.items()}
        block = stored["spec"]["blocks"][0]
        c = {
            "causal": kind == "gpt2",
            "heads": block["attention"]["heads"],
            "layers": block["repeat"],
            "width": stored["spec"]["width"],
            "epsilon": block["norm"]["epsilon"],
        }
        ids = torch.tensor([stored["input_ids"]])
        x = embed(ids, p, c)
        logits = torch.tensor(stored["logits"], dtype=torch.float64)
        runs = []
        for rules in RULES:
            run = dict(rules, tokens=[], nodes=[])
            for source in SOURCES:
                relevant = torch.zeros_like(x)
                relevant[:, source] = x[:, source]
                pair, _ = decompose((relevant, x - relevant), p, c, rules)
                assert torch.allclose(total(pair)[0], logits, rtol=0, atol=1e-9)
                run["tokens"].append({"source": source, "relevant": pair[0][0].tolist()})
            for source in NODES:
                nothing = torch.zeros_like(x)
                pair, seen = decompose((nothing, x), p, c, rules, source)
                assert torch.allclose(total(pair)[0], logits, rtol=0, atol=1e-9)
                share = share_at(seen[READ["block"]], READ, c)
                run["nodes"].append(
                    {"source": source, "relevant": pair[0][0].tolist(), "share": share}
                )
            runs.append(run)
        made_by = f"tests/oracles/contextual.py, torch {torch.__version__.split('+')[0]}"
        fixture = {"made_by": made_by, "read": READ, "runs": runs}
        path = directory / f"contextual-{kind}.json"
        path.write_text(json.dumps(fixture) + "\n")
        print(path, [round(v, 4) for v in runs[3]["nodes"][0]["relevant"][:3]])


if __name__ == "__main__":
    main()
