"""Relevance propagation in PyTorch, each rule in the closed form that its paper prints, and the
fixture made with it.

An independent implementation of AttnLRP (Achtibat et al., arXiv 2402.05602), CP-LRP (Ali et al.,
arXiv 2202.07304) and the relevancy of attention maps (Chefer et al., arXiv 2012.09838), on small
random models built as BERT, GPT-2, Llama and ViT. What flows through `autograd` is relevance: each
rule is a function whose backward pass is its formula. Two departures from the authors' code: the
stabiliser has the sign of what it stabilises, and sums are balanced for each sample.

    python tests/oracles/relevance.py crates/explain/tests/fixtures

writes `relevance.{safetensors,json}`.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch.autograd import Function

BERT, GPT2, LLAMA, VIT = "bert", "gpt2", "llama", "vit"
ATTNLRP, CP_LRP, CHEFER, PLAIN = "attnlrp", "cp-lrp", "chefer", "plain"
EPSILON = {ATTNLRP: 1e-6, CP_LRP: 1e-6, CHEFER: 1e-9}


def stable(z, epsilon):
    return z + epsilon * torch.where(z < 0, -1.0, 1.0)


def safe_divide(a, b):
    """a / b with b pushed from zero by 1e-9, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(b), a / stable(b, 1e-9))


# ------------------------------------------------------------------ the rules


class LinearEpsilon(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        z = x @ weight.T + (0 if bias is None else bias)
        ctx.save_for_backward(x, weight, z)
        ctx.epsilon = epsilon
        return z

    @staticmethod
    def backward(ctx, relevance):
        x, weight, z = ctx.saved_tensors
        share = relevance / stable(z, ctx.epsilon)
        return torch.einsum("...i,ji,...j->...i", x, weight, share), None, None, None


class LinearPositive(Function):
    """alpha = 1, beta = 0."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + (0 if bias is None else bias)

    @staticmethod
    def backward(ctx, relevance):
        x, weight = ctx.saved_tensors
        # [.., input, output]
        products = (x.unsqueeze(-1) * weight.T).clamp(min=0)
        share = safe_divide(relevance, products.sum(-2))
        return (products * share.unsqueeze(-2)).sum(-1), None, None


class AddEpsilon(Function):
    @staticmethod
    def forward(ctx, a, b, epsilon):
        ctx.save_for_backward(a, b)
        ctx.epsilon = epsilon
        return a + b

    @staticmethod
    def backward(ctx, relevance):
        a, b = ctx.saved_tensors
        share = relevance / stable(a + b, ctx.epsilon)
        return a * share, b * share, None


class AddBalanced(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx, relevance):
        a, b = ctx.saved_tensors
        share = safe_divide(relevance, a + b)
        parts, sums = [a * share, b * share], []
        dims = tuple(range(1, a.dim()))
        for part in parts:
            sums.append(part.sum(dims, keepdim=True))
        total = relevance.sum(dims, keepdim=True)
        magnitude = sums[0].abs() + sums[1].abs()
        return tuple(
            part * safe_divide(of.abs(), magnitude) * safe_divide(total, of)
            for part, of in zip(parts, sums)
        )


class Passed(Function):
    """The value `y`, whose relevance goes to `x`."""

    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, relevance):
        return relevance, None


class Halved(Function):
    @staticmethod
    def forward(ctx, a, b):
        return a * b

    @staticmethod
    def backward(ctx, relevance):
        return relevance / 2, relevance / 2


class LayerNormEpsilon(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm_epsilon, epsilon):
        deviation = (x.var(-1, unbiased=False, keepdim=True) + norm_epsilon).sqrt()
        y = (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
        ctx.save_for_backward(x, weight, deviation, y)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx, relevance):
        x, weight, deviation, y = ctx.saved_tensors
        width = x.shape[-1]
        centring = torch.eye(width, dtype=x.dtype) - 1 / width
        share = relevance / stable(y, ctx.epsilon) * weight / deviation
        return x * (share @ centring), None, None, None, None


class ProductOfSignals(Function):
    """`a @ b`, each side `1 / factors` of the relevance."""

    @staticmethod
    def forward(ctx, a, b, epsilon, factors):
        z = a @ b
        ctx.save_for_backward(a, b, z)
        ctx.epsilon, ctx.factors = epsilon, factors
        return z

    @staticmethod
    def backward(ctx, relevance):
        a, b, z = ctx.saved_tensors
        if ctx.epsilon is None:
            share = safe_divide(relevance, z) / ctx.factors
        else:
            share = relevance / stable(ctx.factors * z, ctx.epsilon)
        of_a = torch.einsum("...ij,...jk,...ik->...ij", a, b, share)
        of_b = torch.einsum("...ij,...jk,...ik->...jk", a, b, share)
        return of_a, of_b, None, None


class SoftmaxTaylor(Function):
    @staticmethod
    def forward(ctx, scores, mask):
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        ctx.save_for_backward(scores.masked_fill(~mask, 0.0), probabilities)
        return probabilities

    @staticmethod
    def backward(ctx, relevance):
        scores, probabilities = ctx.saved_tensors
        total = relevance.sum(-1, keepdim=True)
        return scores * (relevance - probabilities * total), None


class RotaryEpsilon(Function):
    @staticmethod
    def forward(ctx, x, rotation, epsilon):
        """`rotation` is [position, width, width]."""
        z = torch.einsum("...pi,pij->...pj", x, rotation)
        ctx.save_for_backward(x, rotation, z)
        ctx.epsilon = epsilon
        return z

    @staticmethod
    def backward(ctx, relevance):
        x, rotation, z = ctx.saved_tensors
        share = relevance / stable(z, ctx.epsilon)
        return torch.einsum("...pi,pij,...pj->...pi", x, rotation, share), None, None


# ------------------------------------------------------------------ a model under a method


class Run:
    def __init__(self, config, parameters, method):
        self.config, self.p, self.method = config, parameters, method
        self.epsilon = EPSILON.get(method)
        self.weights = []

    def linear(self, x, path):
        return self.times(x, self.p[f"{path}.weight"], self.p.get(f"{path}.bias"))

    def times(self, x, weight, bias=None):
        if self.method == PLAIN:
            return torch.nn.functional.linear(x, weight, bias)
        if self.method == CHEFER:
            return LinearPositive.apply(x, weight, bias)
        return LinearEpsilon.apply(x, weight, bias, self.epsilon)

    def add(self, a, b):
        if self.method == PLAIN:
            return a + b
        if self.method == CHEFER:
            return AddBalanced.apply(a, b)
        return AddEpsilon.apply(a, b, self.epsilon)

    def activate(self, x, function):
        if self.method == PLAIN:
            return function(x)
        return Passed.apply(x, function(x.detach()))

    def norm(self, x, path):
        weight, epsilon = self.p[f"{path}.weight"], self.config["epsilon"]
        if self.config["kind"] == LLAMA:
            def rms(x):
                return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight

            return rms(x) if self.method == PLAIN else Passed.apply(x, rms(x.detach()))
        bias = self.p[f"{path}.bias"]
        shape = x.shape[-1:]
        if self.method == PLAIN:
            return torch.nn.functional.layer_norm(x, shape, weight, bias, epsilon)
        if self.method == CHEFER:
            y = torch.nn.functional.layer_norm(x.detach(), shape, weight, bias, epsilon)
            return Passed.apply(x, y)
        return LayerNormEpsilon.apply(x, weight, bias, epsilon, self.epsilon)

    def rotate(self, x):
        length, width = x.shape[-2:]
        half = width // 2
        rotation = torch.zeros(length, width, width, dtype=x.dtype)
        for position in range(length):
            for i in range(half):
                angle = position * 10000.0 ** (-2 * i / width)
                cos, sin = math.cos(angle), math.sin(angle)
                # Feature i becomes cos x_i - sin x_{i+half}, and so on: rows are inputs.
                rotation[position, i, i] = cos
                rotation[position, i + half, i] = -sin
                rotation[position, i + half, i + half] = cos
                rotation[position, i, i + half] = sin
        if self.method == PLAIN:
            return torch.einsum("...pi,pij->...pj", x, rotation)
        return RotaryEpsilon.apply(x, rotation, self.epsilon)

    def attention(self, x, path):
        config = self.config
        heads, groups = config["heads"], config.get("groups", config["heads"])
        causal = config["kind"] in (GPT2, LLAMA)
        constant_weights = self.method == CP_LRP

        def split(x, count):
            return x.unflatten(-1, (count, -1)).transpose(1, 2)

        source = x.detach() if constant_weights else x
        q = split(self.linear(source, f"{path}.query"), heads)
        k = split(self.linear(source, f"{path}.key"), groups)
        v = split(self.linear(x, f"{path}.value"), groups)
        if config["kind"] == LLAMA:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        length = q.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool)
        mask = mask.tril() if causal else mask
        if self.method in (PLAIN, CP_LRP):
            scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
            weights = scores.softmax(-1)
        else:
            epsilon = None if self.method == CHEFER else self.epsilon
            scores = ProductOfSignals.apply(q, k.transpose(-1, -2), epsilon, 2)
            scores = Passed.apply(scores, scores.detach() * scale)
            if self.method == CHEFER:
                y = scores.detach().masked_fill(~mask, float("-inf")).softmax(-1)
                weights = Passed.apply(scores, y)
            else:
                weights = SoftmaxTaylor.apply(scores, mask)
        if constant_weights:
            weights = weights.detach()
        else:
            weights.retain_grad()
        self.weights.append(weights)
        if self.method == PLAIN:
            mixed = weights @ v
        else:
            epsilon = None if self.method == CHEFER else self.epsilon
            mixed = ProductOfSignals.apply(weights, v, epsilon, 1 if constant_weights else 2)
        return self.linear(mixed.transpose(1, 2).flatten(2), f"{path}.output")

    def feedforward(self, x, path):
        kind = self.config["kind"]
        if kind == LLAMA:
            gate = self.activate(self.linear(x, f"{path}.gate"), torch.nn.functional.silu)
            up = self.linear(x, f"{path}.up")
            hidden = up * gate if self.method == PLAIN else Halved.apply(up, gate)
            return self.linear(hidden, f"{path}.down")
        approximate = "tanh" if kind == GPT2 else "none"
        gelu = lambda x: torch.nn.functional.gelu(x, approximate=approximate)
        hidden = self.activate(self.linear(x, f"{path}.up"), gelu)
        return self.linear(hidden, f"{path}.down")

    def forward(self, x):
        """Scores `[labels]` of the explained position of `x` [1, position, width]."""
        kind = self.config["kind"]
        for layer in range(self.config["layers"]):
            path = f"blocks.{layer}"
            for part, norm in (
                (self.attention, "attention"),
                (self.feedforward, "feedforward"),
            ):
                if kind == BERT:
                    x = self.add(x, part(x, f"{path}.{norm}"))
                    x = self.norm(x, f"{path}.{norm}_norm")
                else:
                    y = self.norm(x, f"{path}.{norm}_norm")
                    x = self.add(x, part(y, f"{path}.{norm}"))
        if kind != BERT:
            x = self.norm(x, "final_norm")
        if kind in (GPT2, LLAMA):
            table = self.p.get("head.output.weight", self.p["embeddings.tokens.weight"])
            return self.times(x[0, -1], table)
        x = x[0, 0]
        if kind == BERT:
            x = self.activate(self.linear(x, "head.hidden"), torch.tanh)
        return self.linear(x, "head.output")


def embed(config, p, inputs):
    if config["kind"] == VIT:
        size, patch = config["image"], config["patch"]
        side = size // patch
        cut = inputs.reshape(1, config["channels"], side, patch, side, patch)
        cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = cut @ p["embeddings.patches.weight"].T + p["embeddings.patches.bias"]
        x = torch.cat([p["embeddings.class_tokens"].unsqueeze(0), x], dim=1)
        return x + p["embeddings.positions.weight"]
    x = p["embeddings.tokens.weight"][inputs]
    if config["kind"] == LLAMA:
        return x
    x = x + p["embeddings.positions.weight"][: inputs.shape[1]]
    if config["kind"] == BERT:
        x = x + p["embeddings.token_types.weight"][0]
        weight, bias = p["embeddings.norm.weight"], p["embeddings.norm.bias"]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, config["epsilon"])
    return x


def explain(config, p, inputs, target):
    """The scores of every method for one target."""
    found = {}
    embedded = embed(config, p, inputs)

    def run(method):
        x = embedded.clone().requires_grad_()
        run = Run(config, p, method)
        logits = run.forward(x)
        return x, run, logits

    for method in (ATTNLRP, CP_LRP):
        x, _, logits = run(method)
        seed = torch.zeros_like(logits)
        seed[target] = logits.detach()[target]
        (logits * seed).sum().backward()
        found[method] = x.grad.sum(-1)[0].tolist()
    x, relevance, logits = run(CHEFER)
    logits[target].backward()
    found["full-lrp"] = x.grad.sum(-1)[0].tolist()
    _, plain, logits = run(PLAIN)
    logits[target].backward()
    text = config["kind"] != VIT
    product = None
    for of, by in zip(relevance.weights, plain.weights):
        layer = (of.grad * by.grad).clamp(min=0).mean(1)[0]
        layer = layer + torch.eye(layer.shape[0], dtype=layer.dtype)
        if text:
            layer = layer / layer.sum(-1, keepdim=True)
        product = layer if product is None else layer @ product
    causal = config["kind"] in (GPT2, LLAMA)
    heat = product[-1 if causal else 0].clone()
    if not causal:
        heat[0] = heat[1:].min()
    found[CHEFER] = heat.tolist()
    last = relevance.weights[-1].grad.clamp(min=0).mean(1)[0]
    found["partial-lrp"] = last[-1 if causal else 0].tolist()
    if not causal:
        found["partial-lrp"][0] = min(found["partial-lrp"][1:])
    return logits.tolist(), found


# ------------------------------------------------------------------ small models


def shapes(config):
    d, f, kind = config["width"], config["hidden"], config["kind"]
    bias = kind != LLAMA
    s = {}

    def linear(path, out, inp, bias=bias):
        s[f"{path}.weight"] = (out, inp)
        if bias:
            s[f"{path}.bias"] = (out,)

    def norm(path):
        s[f"{path}.weight"] = (d,)
        if bias:
            s[f"{path}.bias"] = (d,)

    if kind == VIT:
        linear("embeddings.patches", d, config["channels"] * config["patch"] ** 2)
        s["embeddings.class_tokens"] = (1, d)
        s["embeddings.positions.weight"] = ((config["image"] // config["patch"]) ** 2 + 1, d)
    else:
        s["embeddings.tokens.weight"] = (config["vocabulary"], d)
    if kind in (BERT, GPT2):
        s["embeddings.positions.weight"] = (config["length"], d)
    if kind == BERT:
        s["embeddings.token_types.weight"] = (2, d)
        norm("embeddings.norm")
    groups = config.get("groups", config["heads"])
    for layer in range(config["layers"]):
        path = f"blocks.{layer}"
        for name in ("query", "key", "value", "output"):
            rows = d * groups // config["heads"] if name in ("key", "value") else d
            linear(f"{path}.attention.{name}", rows, d)
        for name in ("gate", "up") if kind == LLAMA else ("up",):
            linear(f"{path}.feedforward.{name}", f, d)
        linear(f"{path}.feedforward.down", d, f)
        norm(f"{path}.attention_norm")
        norm(f"{path}.feedforward_norm")
    if kind != BERT:
        norm("final_norm")
    if kind == LLAMA:
        linear("head.output", config["vocabulary"], d)
    if kind == BERT:
        linear("head.hidden", d, d)
    if kind in (BERT, VIT):
        linear("head.output", config["labels"], d)
    return s


def random_parameters(config, generator):
    parameters = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        if len(shape) == 2 and not name.startswith("embeddings"):
            noise = noise / math.sqrt(shape[1])
        elif len(shape) == 1:
            noise = 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
        parameters[name] = noise.double()
    return parameters


def spec(config):
    kind, epsilon = config["kind"], config["epsilon"]
    norm = {"kind": "rms" if kind == LLAMA else "layer", "epsilon": epsilon}
    attention = {"kind": "multi-head", "heads": config["heads"], "causal": kind in (GPT2, LLAMA)}
    feedforward = {"kind": "dense", "hidden": config["hidden"]}
    if kind == GPT2:
        feedforward["activation"] = "gelu-tanh"
    if kind == LLAMA:
        attention |= {"groups": config["groups"], "bias": False, "position": {"kind": "rotary"}}
        feedforward = {"kind": "gated", "hidden": config["hidden"]}
    found = {
        "width": config["width"],
        "blocks": [
            {
                "repeat": config["layers"],
                "wiring": "post-norm" if kind == BERT else "pre-norm",
                "norm": norm,
                "attention": attention,
                "feedforward": feedforward,
            }
        ],
    }
    if kind == VIT:
        found["input"] = {
            "kind": "patches",
            "image": [config["image"]] * 2,
            "patch": config["patch"],
            "channels": config["channels"],
        }
    else:
        found["input"] = {
            "kind": "tokens",
            "vocabulary": config["vocabulary"],
            "length": config["length"],
        }
    if kind in (BERT, GPT2):
        found["input"]["position"] = {"kind": "learned"}
    if kind == BERT:
        found["input"] |= {"token_types": 2, "norm": norm}
        found["head"] = {"kind": "pooled", "hidden": "tanh", "labels": config["labels"]}
    else:
        found["final_norm"] = norm
    if kind == VIT:
        found["head"] = {"kind": "pooled", "labels": config["labels"]}
    if kind in (GPT2, LLAMA):
        found["head"] = {"kind": "language-model", "tied": kind == GPT2}
    return found


SMALL = {
    "width": 12,
    "hidden": 16,
    "layers": 2,
    "heads": 2,
    "vocabulary": 14,
    "length": 8,
    "labels": 3,
    "epsilon": 1e-5,
    "image": 6,
    "patch": 2,
    "channels": 2,
}


def main(directory):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    models, tensors = {}, {}
    for kind in (BERT, GPT2, LLAMA, VIT):
        config = SMALL | {"kind": kind}
        if kind == LLAMA:
            config |= {"heads": 3, "groups": 1}
        p = random_parameters(config, generator)
        if kind == VIT:
            shape = (1, config["channels"], config["image"], config["image"])
            inputs = torch.rand(shape, generator=generator, dtype=torch.float32).double()
            stored = inputs.flatten().tolist()
        else:
            inputs = torch.randint(0, config["vocabulary"], (1, 6), generator=generator)
            stored = inputs[0].tolist()
        targets = []
        for target in (0, 2):
            logits, found = explain(config, p, inputs, target)
            targets.append({"class": target, "scores": found})
        models[kind] = {
            "spec": spec(config),
            "input": stored,
            "logits": logits,
            "targets": targets,
        }
        tensors |= {f"{kind}/{name}": value.float() for name, value in p.items()}
    made_by = f"tests/oracles/relevance.py, torch {torch.__version__.split('+')[0]}"
    document = {"made_by": made_by, "models": models}
    (directory / "relevance.json").write_text(json.dumps(document, indent=1) + "\n")
    save_file(tensors, directory / "relevance.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
