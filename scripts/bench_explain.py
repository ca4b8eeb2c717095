#!/usr/bin/env python3
"""Times explanations in PyTorch and Lapidary on the same random models, in turns.

    python3 -m venv .venv && .venv/bin/pip install torch safetensors
    cargo build --release
    .venv/bin/python scripts/bench_explain.py [--rounds 3] [--only alti-logit,chefer]

The models are an encoder as BERT (6 layers, width 384) and a decoder as GPT-2 (12 layers, width
768), 128 tokens, two threads, f32. The PyTorch side is straightforward: relevance is propagated
rule by rule through `autograd` (tests/oracles/relevance.py), both parts of contextual
decomposition are carried side by side (tests/oracles/contextual.py), the shares of ALTI-Logit are
laid out as [query, key, width]. `gradient` is the other way to AttnLRP and CP-LRP, one ordinary
backward pass through a rewritten network, which is what Lapidary does.

Each side is a process of its own; peak memory is the most it held, the interpreter included. The
scores of both sides are compared: the largest difference, relative to the largest score.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "oracles"))
LAPIDARY = os.environ.get("LAPIDARY", str(ROOT / "target/release/lapidary"))
TOKENS, TARGET = 128, 1
COMMON = {"vocabulary": 1000, "length": TOKENS, "labels": 3, "epsilon": 1e-5}
MODELS = {
    "encoder": COMMON | {"kind": "bert", "width": 384, "heads": 12, "hidden": 1536, "layers": 6},
    "decoder": COMMON | {"kind": "gpt2", "width": 768, "heads": 12, "hidden": 3072, "layers": 12},
}
# (method of Lapidary, way of PyTorch)
WORKS = {
    "attnlrp": ("attnlrp", "rules"),
    "attnlrp-gradient": ("attnlrp", "gradient"),
    "cp-lrp": ("cp-lrp", "rules"),
    "cp-lrp-gradient": ("cp-lrp", "gradient"),
    "chefer": ("chefer", "rules"),
    "alti-logit": ("alti-logit", "shares"),
    "contextual-decomposition": ("contextual-decomposition", "parts"),
}


def ids():
    return [(7 * index + 3) % 1000 for index in range(TOKENS)]


def make(name, directory):
    """Writes the model as a Lapidary directory and gives its parameters."""
    import relevance
    import torch
    from safetensors.torch import save_file

    config = MODELS[name]
    p = relevance.random_parameters(config, torch.Generator().manual_seed(0))
    p = {name: value.float().contiguous() for name, value in p.items()}
    (directory / "lapidary.json").write_text(json.dumps(relevance.spec(config)))
    save_file(p, directory / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------ PyTorch


def rules(method, config, p, inputs):
    import relevance
    import torch

    def run(method):
        x = relevance.embed(config, p, inputs).clone().requires_grad_()
        run = relevance.Run(config, p, method)
        return x, run, run.forward(x)

    if method != "chefer":
        x, _, logits = run(method)
        seed = torch.zeros_like(logits)
        seed[TARGET] = logits.detach()[TARGET]
        (logits * seed).sum().backward()
        return x.grad.sum(-1)[0]
    _, of, logits = run(relevance.CHEFER)
    logits[TARGET].backward()
    _, by, logits = run(relevance.PLAIN)
    logits[TARGET].backward()
    product = None
    for of, by in zip(of.weights, by.weights):
        layer = (of.grad * by.grad).clamp(min=0).mean(1)[0]
        layer = layer + torch.eye(layer.shape[0])
        layer = layer / layer.sum(-1, keepdim=True)
        product = layer if product is None else layer @ product
    if config["kind"] == "gpt2":
        return product[-1]
    heat = product[0].clone()
    heat[0] = heat[1:].min()
    return heat


def gradient(method, config, p, inputs):
    """One backward pass through a network whose gradient is the rules."""
    import relevance
    import torch
    import torch.nn.functional as F

    heads, causal, epsilon = config["heads"], config["kind"] == "gpt2", config["epsilon"]
    form = "tanh" if causal else "none"
    linear = lambda x, path: F.linear(x, p[f"{path}.weight"], p[f"{path}.bias"])
    part = lambda x, factor: x * factor + (x * (1 - factor)).detach()

    def secant(x, y):
        return x * (y / torch.where(x == 0, torch.ones_like(x), x)).detach()

    def norm(x, path):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt().detach()
        return centred / deviation * p[f"{path}.weight"] + p[f"{path}.bias"]

    def attention(x, path):
        q, k, v = (linear(x, f"{path}.{name}").unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        if method == "attnlrp":
            q, k, v = part(q, 0.25), part(k, 0.25), part(v, 0.5)
        else:
            q, k = q.detach(), k.detach()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return linear(y.transpose(1, 2).flatten(2), f"{path}.output")

    def feedforward(x, path):
        x = linear(x, f"{path}.up")
        return linear(secant(x, F.gelu(x, approximate=form)), f"{path}.down")

    x = leaf = relevance.embed(config, p, inputs).clone().requires_grad_()
    for layer in range(config["layers"]):
        a, f = f"blocks.{layer}.attention", f"blocks.{layer}.feedforward"
        if causal:
            x = x + attention(norm(x, f"{a}_norm"), a)
            x = x + feedforward(norm(x, f"{f}_norm"), f)
        else:
            x = norm(x + attention(x, a), f"{a}_norm")
            x = norm(x + feedforward(x, f), f"{f}_norm")
    if causal:
        logits = norm(x[:, -1], "final_norm")[0] @ p["embeddings.tokens.weight"].T
    else:
        hidden = linear(x[:, 0], "head.hidden")
        logits = linear(secant(hidden, hidden.tanh()), "head.output")[0]
    logits[TARGET].backward()
    return (leaf * leaf.grad).sum(-1)[0].detach()


def shares(method, config, p, inputs):
    """ALTI-Logit with every share laid out."""
    import relevance
    import torch
    import torch.nn.functional as F

    heads, epsilon = config["heads"], config["epsilon"]
    linear = lambda x, path: F.linear(x, p[f"{path}.weight"], p[f"{path}.bias"])
    norm = lambda x, path: F.layer_norm(x, x.shape[-1:], p[f"{path}.weight"], p[f"{path}.bias"], epsilon)
    with torch.no_grad():
        x = relevance.embed(config, p, inputs)[0]
        mask = torch.full((TOKENS, TOKENS), -math.inf).triu(1)
        updates, mixings = [], []
        for layer in range(config["layers"]):
            path = f"blocks.{layer}.attention"
            read = norm(x, f"{path}_norm")
            q, k, v = (linear(read, f"{path}.{name}").unflatten(-1, (heads, -1)).transpose(0, 1) for name in ("query", "key", "value"))
            weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
            by_head = p[f"{path}.output.weight"].unflatten(1, (heads, -1))
            share = torch.einsum("htj,hjd->tjd", weights, torch.einsum("hjv,dhv->hjd", v, by_head))
            updates.append(share[-1].clone())
            y = x + share.sum(1) + p[f"{path}.output.bias"]
            index = torch.arange(TOKENS)
            share[index, index] += x
            c = (y.abs().sum(-1, keepdim=True) - (y[:, None] - share).abs().sum(-1)).clamp(min=0)
            mixings.append(c / c.sum(-1, keepdim=True))
            path = f"blocks.{layer}.feedforward"
            x = y + linear(F.gelu(linear(norm(y, f"{path}_norm"), f"{path}.up"), approximate="tanh"), f"{path}.down")
        last = x[-1]
        deviation = (last.var(unbiased=False) + epsilon).sqrt()
        direction = p["embeddings.tokens.weight"][TARGET] * p["final_norm.weight"]
        read = lambda v: ((v - v.mean(-1, keepdim=True)) / deviation) @ direction
        before, scores = torch.eye(TOKENS), torch.zeros(TOKENS)
        for update, mixing in zip(updates, mixings):
            scores = scores + read(update) @ before
            before = mixing @ before
        return scores


def parts(method, config, p, inputs, at_once=32):
    """Every token a source, `at_once` of them side by side."""
    import contextual
    import relevance
    import torch

    c = {name: config[name] for name in ("heads", "layers", "width", "epsilon")}
    c["causal"] = config["kind"] == "gpt2"
    rules = {"split": False, "stabilise": False}
    scores = []
    with torch.no_grad():
        x = relevance.embed(config, p, inputs)
        for first in range(0, TOKENS, at_once):
            relevant = torch.zeros(at_once, *x.shape[1:])
            index = torch.arange(at_once)
            relevant[index, first + index] = x[0, first : first + at_once]
            pair, _ = contextual.decompose((relevant, x - relevant), p, c, rules)
            scores.append(pair[0][:, TARGET])
    return torch.cat(scores)


def peer(work, name, directory, repeat):
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(2)
    p = load_file(directory / "model.safetensors")
    inputs = torch.tensor([ids()])
    method, way = WORKS[work]
    run = lambda: globals()[way](method, MODELS[name], p, inputs)
    scores = run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    print(json.dumps({"median_seconds": statistics.median(times), "peak_bytes": peak(), "scores": scores.tolist()}))


def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ------------------------------------------------------------------ both


def call(command):
    environment = dict(os.environ)
    # Settings that make old builds of OpenBLAS safe and new ones slow.
    environment.pop("OPENBLAS_CORETYPE", None)
    environment.pop("OPENBLAS_L2_SIZE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1] if "--peer" in command else done.stdout)


def lapidary(work, directory, repeat):
    method = WORKS[work][0]
    common = ["--json", "--threads", "2", "--method", method]
    timed = call([LAPIDARY, "bench", "explain", "--model", str(directory), "--length", str(TOKENS), "--repeat", str(repeat), *common])
    tokens = ",".join(map(str, ids()))
    said = call([LAPIDARY, "explain", str(directory), "--tokens", tokens, "--target", str(TARGET), *common])
    timed["scores"] = said["explanations"][0]["explanation"]["scores"]
    return timed


def difference(ours, theirs):
    largest = max(map(abs, theirs))
    return max(abs(a - b) for a, b in zip(ours, theirs)) / largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default=",".join(WORKS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        work, name, directory = arguments.peer
        peer(work, name, Path(directory), arguments.repeat)
        return
    print("| method | model | Lapidary | PyTorch | time ratio | Lapidary memory | PyTorch memory | memory ratio | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.models.split(","):
            place = Path(directory) / name
            place.mkdir()
            make(name, place)
            for work in arguments.only.split(","):
                if work == "alti-logit" and name == "encoder":
                    continue
                ours, theirs = [], []
                for _ in range(arguments.rounds):
                    ours.append(lapidary(work, place, arguments.repeat))
                    theirs.append(call([sys.executable, __file__, "--repeat", str(arguments.repeat), "--peer", work, name, str(place)]))
                median = lambda runs, key: statistics.median(run[key] for run in runs)
                a, b = median(ours, "median_seconds"), median(theirs, "median_seconds")
                c, d = median(ours, "peak_bytes"), median(theirs, "peak_bytes")
                apart = difference(ours[0]["scores"], theirs[0]["scores"])
                print(f"| {work} | {name} | {a:.3f} s | {b:.3f} s | {a / b:.2f} | {c / 2**20:.0f} MiB | {d / 2**20:.0f} MiB | {c / d:.2f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
