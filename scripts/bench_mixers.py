#!/usr/bin/env python3
"""Times mechanisms of attention in PyTorch, written as their papers say them, and in Lapidary, in turns.

    python3 -m venv .venv && .venv/bin/pip install torch
    cargo build --release
    .venv/bin/python scripts/bench_mixers.py [--length 4096] [--rounds 3]

Queries, keys and values of one sequence with 4 heads of 64. `softmax` is PyTorch's fused attention; the others are
what a reader of the paper writes first: masks where patterns are meant, cumulative sums of outer products where
recurrences are. Forward, and forward with backward; medians over rounds, a process for each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

LAPIDARY = os.environ.get("LAPIDARY", "target/release/lapidary")
HEADS, WIDTH = 4, 64


def versions(n):
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    scale = WIDTH**-0.5
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    stride = int(n**0.5)

    def masked(q, k, v, mask):
        scores = (q @ k.transpose(-1, -2)) * scale
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    def prefix(fq, fk, v):
        """Causal linear attention by cumulative sums of outer products."""
        sums = torch.einsum("bhnf,bhnd->bhnfd", fk, v).cumsum(2)
        return torch.einsum("bhnf,bhnfd->bhnd", fq, sums) / (fq * fk.cumsum(2)).sum(-1, keepdim=True)

    projection = torch.randn(128, n) / n**0.5
    directions = torch.randn(WIDTH, 256)
    rotation = torch.randn(HEADS, WIDTH, max(n // 64, 2))
    positions = torch.arange(n)
    distance = (positions[:, None] - positions[None]).abs()
    decay = torch.tensor([0.9, 0.95, 0.98, 0.995]).view(1, HEADS, 1, 1)

    def linformer(q, k, v):
        return ((q @ (projection @ k).transpose(-1, -2)) * scale).softmax(-1) @ (projection @ v)

    def lion(q, k, v):
        phi = lambda x: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.silu(x) + 0.5)
        weights = (phi(q) @ phi(k).transpose(-1, -2)) * decay**distance
        return weights / weights.sum(-1, keepdim=True) @ v

    def lion_causal(q, k, v):
        # A selective decay has no shorter form than its mask.
        phi = lambda x: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.silu(x) + 0.5)
        logs = F.logsigmoid(q.mean(-1)).cumsum(-1)
        mask = (logs[..., :, None] - logs[..., None, :]).masked_fill(~causal, float("-inf")).exp()
        weights = (phi(q) @ phi(k).transpose(-1, -2)) * mask
        return weights / weights.sum(-1, keepdim=True) @ v

    def centred(x):
        x = x - x.mean(-1, keepdim=True)
        return x / x.norm(dim=-1, keepdim=True)

    def fastmax1(q, k, v):
        one = torch.ones(*q.shape[:-1], 1)
        return prefix(torch.cat([one, centred(q)], -1), torch.cat([one, centred(k)], -1), v)

    def fastmax2(q, k, v):
        s = centred(q) @ centred(k).transpose(-1, -2)
        weights = (1 + s + s * s / 2) * causal
        return weights / weights.sum(-1, keepdim=True) @ v

    def kernelized(q, k, v):
        features = lambda x: (x * WIDTH**-0.25 @ directions - (x * x).sum(-1, keepdim=True) * WIDTH**-0.5).exp()
        return prefix(features(q), features(k), v)

    def sparse(q, k, v):
        near = distance < stride
        far = distance % stride == 0
        return masked(q, k, v, causal & (near | far))

    def sparse_fixed(q, k, v):
        own = positions[:, None] // stride == positions[None] // stride
        columns = (positions % stride == stride - 1)[None]
        return masked(q, k, v, causal & (own | columns))

    def reformer(q, k, v):
        k = F.normalize(q, dim=-1)
        outs, sums = [], []
        for _ in range(2):
            turned = torch.einsum("bhnd,hdr->bhnr", q, rotation)
            buckets = torch.cat([turned, -turned], -1).argmax(-1)
            mask = (buckets[..., :, None] == buckets[..., None, :]) & causal
            scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9)
            scores = scores - 1e5 * torch.eye(n)
            total = scores.logsumexp(-1, keepdim=True)
            outs.append((scores - total).exp() @ v)
            sums.append(total)
        weights = torch.stack(sums).softmax(0)
        return sum(w * o for w, o in zip(weights, outs))

    def combiner(q, k, v):
        segments = n // stride
        cut = lambda x: x[:, :, : segments * stride].reshape(1, HEADS, segments, stride, WIDTH)
        q, k, v = cut(q), cut(k), cut(v)
        sq, sk = q.amax(3), k.amax(3)
        inner = (torch.einsum("bhsd,bhsjd->bhsj", sq, k) * scale).softmax(-1)
        sv = torch.einsum("bhsj,bhsjd->bhsd", inner, v)
        direct = torch.einsum("bhsid,bhsjd->bhsij", q, k) * scale
        direct = direct.masked_fill(~torch.ones(stride, stride, dtype=torch.bool).tril(), float("-inf"))
        spans = torch.einsum("bhsid,bhtd->bhsit", q, sk) * scale
        earlier = torch.ones(segments, segments, dtype=torch.bool).tril(-1)[None, None, :, None]
        spans = spans.masked_fill(~earlier, float("-inf"))
        weights = torch.cat([direct, spans], -1).softmax(-1)
        first, rest = weights.split([stride, segments], -1)
        return torch.einsum("bhsij,bhsjd->bhsid", first, v) + torch.einsum("bhsit,bhtd->bhsid", rest, sv)

    low = torch.tensor(
        [0.23037781, 0.71484657, 0.63088077, -0.02798377, -0.18703481, 0.03084138, 0.03288301, -0.01059740]
    )
    high = low.flip(0) * torch.tensor([-1.0, 1.0] * 4)
    bank = torch.stack([low, high]).repeat(HEADS * WIDTH, 1)[:, None]

    def wavelets(q, k, v):
        """Attention in the averages and in the details of every channel, on a circle."""

        def analyse(x):
            x = x.transpose(2, 3).reshape(1, HEADS * WIDTH, n)
            y = F.conv1d(F.pad(x, (0, 7), mode="circular")[..., : n + 6], bank, stride=2, groups=HEADS * WIDTH)
            y = y.view(1, HEADS, WIDTH, 2, n // 2)
            return [y[:, :, :, band].transpose(2, 3) for band in (0, 1)]

        bands = zip(analyse(q), analyse(k), analyse(v))
        mixed = [F.scaled_dot_product_attention(q, k, v).transpose(2, 3) for q, k, v in bands]
        mixed = torch.stack(mixed, 3).reshape(1, 2 * HEADS * WIDTH, n // 2)
        y = F.conv_transpose1d(mixed, bank, stride=2, groups=HEADS * WIDTH)
        y = torch.cat([y[..., :6] + y[..., n:], y[..., 6:n]], -1)
        return y.view(1, HEADS, WIDTH, n).transpose(2, 3)

    return {
        "softmax": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "softmax, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linformer, 128 slots": linformer,
        "lion, constant decay": lion,
        "lion, selective decay, causal": lion_causal,
        "fastmax of degree 1": fastmax1,
        "fastmax of degree 2": fastmax2,
        "kernelized, positive features": kernelized,
        "sparse, strided by the root": sparse,
        "sparse, fixed by the root": sparse_fixed,
        "reformer, 2 rounds of chunks of 64": reformer,
        "combiner, segments of the root": combiner,
        "wavelets, softmax in two bands": wavelets,
    }


def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return None


def child(name, n, repeat):
    import torch

    torch.set_num_threads(2)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH) for _ in range(3))
    run = versions(n)[name]

    def median(work):
        work()
        times = []
        for _ in range(repeat):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def forward():
        with torch.no_grad():
            run(q, k, v)

    def both():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        run(*inputs).sum().backward()

    print(json.dumps(dict(forward=median(forward), both=median(both), peak=peak())))


def ours(name, n, repeat):
    out = subprocess.run(
        [LAPIDARY, "--json", "bench", "mixers", "--method", name, "--width", str(HEADS * WIDTH), "--heads", str(HEADS),
         "--batch", "1", "--length", str(n), "--least", str(n), "--repeat", str(repeat)],
        check=True, capture_output=True, text=True,
    )
    found = json.loads(out.stdout)
    row = next(row for row in found["rows"] if row["mechanism"] == name and row["length"] == n)
    return dict(forward=row["forward"], both=row["forward_and_backward"], peak=found["peak_bytes"])


def theirs(name, n, repeat):
    out = subprocess.run(
        [sys.executable, __file__, "--child", name, "--length", str(n), "--repeat", str(repeat)],
        check=True, capture_output=True, text=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.length, options.repeat)
    names = [name for name in versions(16) if not options.only or name.startswith(options.only)]
    print(f"| {options.length} tokens | forward | PyTorch | ratio | and backward | PyTorch | ratio | memory | PyTorch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        rounds = [
            (ours(name, options.length, options.repeat), theirs(name, options.length, options.repeat))
            for _ in range(options.rounds)
        ]
        median = lambda which, key: statistics.median(r[which][key] for r in rounds)
        cells = [name]
        for key in ("forward", "both"):
            own, peer = median(0, key), median(1, key)
            cells += [f"{own * 1e3:.1f} ms", f"{peer * 1e3:.1f} ms", f"{own / peer:.2f}"]
        cells += [f"{median(which, 'peak') / 2**20:.0f} MiB" for which in (0, 1)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
