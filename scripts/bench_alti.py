"""Times a straightforward PyTorch ALTI-Logit and prints its median time as JSON.

The algorithm is that of the authors' code: in each layer the weighted vectors of all heads, pairs
of tokens and features are one tensor [heads, query, key, width], which is summed over heads. With
`--merged` the heads are summed within the product instead, which lays out [query, key, width]
only. The model is a GPT-2 of random weights, in f32.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python scripts/bench_alti.py [--tokens N]
"""

import argparse
import json
import math
import statistics
import time

import torch


@torch.no_grad()
def alti_logit(p, ids, heads, merged):
    n = ids.shape[0]
    x = p["tokens"][ids] + p["positions"][:n]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    before = torch.eye(n)
    pieces, mlps, biases = [], [], []
    start = x
    for w in p["layers"]:
        d = x.shape[1]
        read = torch.nn.functional.layer_norm(x, (d,), w["g1"], w["b1"])
        q, k, v = (read @ w["qkv"].T + w["b_qkv"]).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(0, 1) for z in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        a = scores.masked_fill(later, float("-inf")).softmax(-1)
        by_head = w["o"].unflatten(1, (heads, -1))
        f = torch.einsum("hjv,dhv->hjd", v, by_head)
        if merged:
            t = torch.einsum("htj,hjd->tjd", a, f)
        else:
            t = torch.einsum("htj,hjd->htjd", a, f).sum(0)
        out = t.sum(1) + w["b_o"]
        y = x + out
        pieces.append((t[-1].clone(), before))
        biases.append(w["b_o"])
        own = torch.arange(n)
        t[own, own] += x
        lengths = y.abs().sum(-1, keepdim=True)
        c = (lengths - (y[:, None] - t).abs().sum(-1)).clamp(min=0)
        before = c / c.sum(-1, keepdim=True) @ before
        read = torch.nn.functional.layer_norm(y, (d,), w["g2"], w["b2"])
        up = torch.nn.functional.gelu(read @ w["up"].T + w["b_up"], approximate="tanh")
        mlp = up @ w["down"].T + w["b_down"]
        mlps.append(mlp[-1])
        x = y + mlp
    last = x[-1]
    u = p["tokens"][1] * p["g"]
    u = (u - u.mean()) / (last.var(unbiased=False) + 1e-5).sqrt()
    scores = sum((t @ u) @ m for t, m in pieces)
    rest = sum((v @ u) for v in mlps + biases) + start[-1] @ u + p["b"] @ p["tokens"][1]
    logit = torch.nn.functional.layer_norm(last, last.shape, p["g"], p["b"]) @ p["tokens"][1]
    return (scores.sum() + rest - logit).item()


def parameters(width, layers, vocabulary):
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator) * 0.02
    layer = lambda: {
        "g1": torch.ones(width),
        "b1": torch.zeros(width),
        "g2": torch.ones(width),
        "b2": torch.zeros(width),
        "qkv": new(3 * width, width),
        "b_qkv": torch.zeros(3 * width),
        "o": new(width, width),
        "b_o": torch.zeros(width),
        "up": new(4 * width, width),
        "b_up": torch.zeros(4 * width),
        "down": new(width, 4 * width),
        "b_down": torch.zeros(width),
    }
    return {
        "tokens": new(vocabulary, width),
        "positions": new(1024, width),
        "layers": [layer() for _ in range(layers)],
        "g": torch.ones(width),
        "b": torch.zeros(width),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--merged", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    p = parameters(768, 12, 50257)
    ids = torch.arange(options.tokens) * 7 % 1000
    seconds = []
    for run in range(options.runs + 1):
        start = time.perf_counter()
        error = alti_logit(p, ids, 12, options.merged)
        if run > 0:  # the first warms up
            seconds.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "program": f"pytorch {torch.__version__}",
                "tokens": options.tokens,
                "threads": options.threads,
                "merged": options.merged,
                "seconds": statistics.median(seconds),
                "all_seconds": [round(s, 3) for s in seconds],
                "unattributed": error,
            }
        )
    )


if __name__ == "__main__":
    main()
