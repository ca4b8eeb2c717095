#!/usr/bin/env python3
"""Times mechanisms of attention in PyTorch, written as their papers say them, and in Lapidary, in turns.

    python3 -m venv .venv && .venv/bin/pip install torch
    cargo build --release
    .venv/bin/python scripts/bench_mixers.py [--length 4096] [--rounds 3]
    .venv/bin/python scripts/bench_mixers.py --sweep 256,1024,4096,16384,65536 [--plot docs/mixers.svg]

Queries, keys and values of one sequence with 4 heads of 64. `softmax` is PyTorch's fused attention; the others are
what a reader of the paper writes first: masks where patterns are meant, cumulative sums of outer products where
recurrences are. Forward, and forward with backward; medians over rounds, a process for each. A sweep goes through
lengths, leaves off where a call would take longer than `--limit` seconds, and says from which of them on a mechanism is
faster than dense attention of Lapidary's own.
"""

import argparse
import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time

LAPIDARY = os.environ.get("LAPIDARY", "target/release/lapidary")
HEADS, WIDTH = 4, 64
# Swept without a version in PyTorch.
OURS_ALONE = ["combiner, log-sparse"]


def versions(n):
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    scale = WIDTH**-0.5

    # Made where they are used: n² numbers weigh on nobody else.
    @functools.cache
    def causal():
        return torch.ones(n, n, dtype=torch.bool).tril()

    @functools.cache
    def distance():
        return (positions[:, None] - positions[None]).abs()

    stride = int(n**0.5)

    def masked(q, k, v, mask):
        scores = (q @ k.transpose(-1, -2)) * scale
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    def prefix(fq, fk, v):
        """Causal linear attention by cumulative sums of outer products."""
        sums = torch.einsum("bhnf,bhnd->bhnfd", fk, v).cumsum(2)
        return torch.einsum("bhnf,bhnfd->bhnd", fq, sums) / (fq * fk.cumsum(2)).sum(-1, keepdim=True)

    projection = torch.randn(min(128, n // 4), n) / n**0.5
    directions = torch.randn(WIDTH, 512)
    rotation = torch.randn(HEADS, WIDTH, max(n // 64, 2))
    positions = torch.arange(n)
    decay = torch.tensor([0.9, 0.95, 0.98, 0.995]).view(1, HEADS, 1, 1)

    def linformer(q, k, v):
        return ((q @ (projection @ k).transpose(-1, -2)) * scale).softmax(-1) @ (projection @ v)

    def lion(q, k, v):
        phi = lambda x: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.silu(x) + 0.5)
        weights = (phi(q) @ phi(k).transpose(-1, -2)) * decay**distance()
        return weights / weights.sum(-1, keepdim=True) @ v

    def lion_causal(q, k, v):
        # A selective decay has no shorter form than its mask.
        phi = lambda x: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.silu(x) + 0.5)
        logs = F.logsigmoid(q.mean(-1)).cumsum(-1)
        mask = (logs[..., :, None] - logs[..., None, :]).masked_fill(~causal(), float("-inf")).exp()
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
        weights = (1 + s + s * s / 2) * causal()
        return weights / weights.sum(-1, keepdim=True) @ v

    def kernelized(q, k, v):
        features = lambda x: (x * WIDTH**-0.25 @ directions - (x * x).sum(-1, keepdim=True) * WIDTH**-0.5).exp()
        return prefix(features(q), features(k), v)

    def sparse(q, k, v):
        near = distance() < stride
        far = distance() % stride == 0
        return masked(q, k, v, causal() & (near | far))

    def sparse_fixed(q, k, v):
        own = positions[:, None] // stride == positions[None] // stride
        columns = (positions % stride == stride - 1)[None]
        return masked(q, k, v, causal() & (own | columns))

    def reformer(q, k, v):
        k = F.normalize(q, dim=-1)
        outs, sums = [], []
        for _ in range(2):
            turned = torch.einsum("bhnd,hdr->bhnr", q, rotation)
            buckets = torch.cat([turned, -turned], -1).argmax(-1)
            mask = (buckets[..., :, None] == buckets[..., None, :]) & causal()
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

    def sinkhorn(q, k, v):
        scores = (q @ k.transpose(-1, -2)) * scale
        for along in (-1, -2, -1):
            scores = scores - scores.logsumexp(along, keepdim=True)
        return scores.exp() @ v

    def topological(q, k, v):
        s = distance() / n
        weights = (q.relu() @ k.relu().transpose(-1, -2)) * (0.0 + 0.0 * s + 0.0 * s * s).exp()
        return weights / weights.sum(-1, keepdim=True) @ v

    def subsampled(q, k, v):
        kept = torch.randperm(n)[: n // 4]
        return F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept])

    def subsampled_local(q, k, v):
        # Windows of an eighth, each with the one before, over locally shuffled keys.
        order = (positions + n / 8 * (2 * torch.rand(n) - 1)).argsort()
        window = n // 8
        near = (positions[:, None] // window - positions[None] // window).abs() <= 1
        near = near & (positions[:, None] // window >= positions[None] // window)
        own = torch.eye(n, dtype=torch.bool)
        mask = torch.zeros(n, n, dtype=torch.bool)
        mask[:, order] = near
        return masked(q, k, v, (mask & causal()) | own)

    def soft(q, k, v):
        m = 64
        q = q * WIDTH**-0.25
        points = q.unflatten(2, (m, n // m)).mean(3)
        gauss = lambda a, b: (-torch.cdist(a, b) ** 2 / 2).exp()
        inner, rows = gauss(points, points), gauss(q, points)
        with torch.no_grad():
            raised = inner + 0.01 * torch.eye(m)
            y = 1.8 / inner.sum(-1).amax(-1)[..., None, None] ** 2 * raised
            for _ in range(20):
                y = 2 * y - y @ raised @ y
        y = y - y @ (inner - inner.detach()) @ y
        degrees = inner.sum(-1) ** -0.5
        middle = degrees[..., :, None] * y * degrees[..., None, :]
        return rows @ (middle @ (rows.transpose(-1, -2) @ v))

    bits = 16
    anchors = F.normalize(torch.randn(1, HEADS, 25, WIDTH), dim=-1)
    hashes = torch.randn(1, HEADS, 25, bits)

    def codes(q):
        distances = torch.cdist(F.normalize(q, dim=-1), anchors) ** 2
        kernels = (-distances / (2 * distances.mean((2, 3), keepdim=True))).exp()
        x = (kernels - 0.6065) @ hashes
        passed = x * (x.detach().abs() < 1)
        return torch.where(x >= 0, 1.0, -1.0) + passed - passed.detach()

    def ecoformer(q, k, v):
        b = codes(q)
        sums = b @ (b.transpose(-1, -2) @ v) + (bits + 1) * v.sum(2, keepdim=True)
        return sums / ((b * b.sum(2, keepdim=True)).sum(-1, keepdim=True) + n * (bits + 1))

    def ecoformer_causal(q, k, v):
        b, one = codes(q), torch.ones(*q.shape[:-1], 1)
        return prefix(torch.cat([b, (bits + 1) * one], -1), torch.cat([b, one], -1), v)

    def coarse_and_fine(q, k, v, causal):
        # The chosen blocks are gathered; what is coarse is a softmax over means.
        block, blocks = 32, n // 32
        cut = lambda x: x.unflatten(2, (blocks, block))
        qs, ks, vs = cut(q), cut(k), cut(v)
        heads = qs[:, :, :, 0] if causal else qs.mean(3)
        low = heads @ ks.mean(3).transpose(-1, -2) * scale
        before = torch.ones(blocks, blocks, dtype=torch.bool).tril() if causal else torch.ones(blocks, blocks, dtype=torch.bool)
        low = low.masked_fill(~before, float("-inf"))
        with torch.no_grad():
            values = low - low.amax(-1, keepdim=True)
            if causal:
                values = values.masked_fill(torch.eye(blocks, dtype=torch.bool), 1e4)
                picked = values.topk(min(4, blocks)).indices
                high = torch.zeros_like(low, dtype=torch.bool).scatter(-1, picked, True) & before
            else:
                picked = values.flatten(2).topk(4 * blocks).indices
                high = torch.zeros_like(low, dtype=torch.bool).flatten(2).scatter(-1, picked, True).view_as(low)
        b, h, x, y = high.nonzero(as_tuple=True)
        fine = torch.einsum("cid,cjd->cij", qs[b, h, x], ks[b, h, y]) * scale
        if causal:
            later = ~torch.ones(block, block, dtype=torch.bool).tril()
            fine = fine.masked_fill((x == y)[:, None, None] & later, float("-inf"))
        rows = (b * HEADS + h) * blocks + x
        left = low.masked_fill(high, float("-inf"))
        # One maximum for every row of blocks is enough here.
        most = torch.full((HEADS * blocks,), float("-inf"))
        most = most.scatter_reduce(0, rows, fine.detach().amax((1, 2)), "amax")
        most = torch.maximum(most, left.detach().amax(-1).flatten())
        weights = (fine - most[rows][:, None, None]).exp()
        sums = torch.zeros(HEADS * blocks, block, WIDTH).index_add(0, rows, weights @ vs[b, h, y])
        total = torch.zeros(HEADS * blocks, block).index_add(0, rows, weights.sum(-1))
        others = (left.flatten(0, 2) - most[:, None]).exp() * block
        means = vs.mean(3).squeeze(0).repeat_interleave(blocks, 0)
        sums = sums + torch.einsum("ry,ryd->rd", others, means)[:, None]
        total = total + others.sum(-1)[:, None]
        return (sums / total[..., None]).view(1, HEADS, n, WIDTH)

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
        "linformer, up to 128 slots": linformer,
        "lion, constant decay": lion,
        "lion, selective decay, causal": lion_causal,
        "fastmax of degree 1": fastmax1,
        "fastmax of degree 2": fastmax2,
        "kernelized, positive features": kernelized,
        "sparse, strided by the root": sparse,
        "sparse, fixed by the root": sparse_fixed,
        "reformer, 2 rounds of chunks of 64": reformer,
        "combiner, segments of the root": combiner,
        "doubly stochastic, sinkhorn": sinkhorn,
        "topological, on a path": topological,
        "subsampled, a quarter of the keys": subsampled,
        "subsampled, local, causal": subsampled_local,
        "soft, 64 landmarks": soft,
        "ecoformer, 16 bits": ecoformer,
        "ecoformer, 16 bits, causal": ecoformer_causal,
        "mra, 4 blocks of 32 in a row": lambda q, k, v: coarse_and_fine(q, k, v, False),
        "mra, 4 blocks of 32 in a row, causal": lambda q, k, v: coarse_and_fine(q, k, v, True),
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
    # What would not fit fails by itself, not by the machine.
    resource.setrlimit(resource.RLIMIT_AS, (18 << 30, 18 << 30))
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
    return dict(forward=row["forward"], both=row["forward_and_backward"], peak=found["peak_bytes"], causal=row["causal"])


def theirs(name, n, repeat):
    out = subprocess.run(
        [sys.executable, __file__, "--child", name, "--length", str(n), "--repeat", str(repeat)],
        check=True, capture_output=True, text=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def swept(measure, name, lengths, limit, options):
    """Measurements by length, as far as a call takes less than `limit` seconds."""
    found, times = {}, []
    for length in lengths:
        if times:
            # It grows as it did last; at first as the square.
            ratio = length / times[-1][0]
            before, after = times[-2:] if len(times) > 1 else (None, times[-1])
            exponent = math.log(after[1] / before[1], after[0] / before[0]) if before else 2
            # What does not grow yet is all overhead.
            if after[1] * ratio ** min(max(exponent, 1), 2) > limit:
                break
        try:
            row = measure(name, length, options.repeat)
        except subprocess.CalledProcessError as error:
            print(f"{name} at {length}: {(error.stderr or '').strip().splitlines()[-1:]}", file=sys.stderr)
            break
        found[length] = row
        times.append((length, row["both"]))
    return found


def sweep(names, lengths, options):
    found = {}
    for name in names:
        found[name] = dict(ours=swept(ours, name, lengths, options.limit, options))
        found[name]["theirs"] = swept(theirs, name, lengths, options.limit, options) if name not in OURS_ALONE else {}
        print(f"{name} done", file=sys.stderr, flush=True)
        if options.save:
            with open(options.save, "w") as out:
                json.dump(found, out)
    return found


def tabulate(found, lengths):
    def cell(row, key):
        return "" if row is None else f"{row[key] * 1e3:.3g}"

    for key, title in (("forward", "forward"), ("both", "forward and backward")):
        print(f"\n| {title}, ms: ours / PyTorch | " + " | ".join(map(str, lengths)) + " | faster than dense from |")
        print("|---|" + "---|" * (len(lengths) + 1))
        for name, rows in found.items():
            cells = []
            for length in lengths:
                own, peer = (cell(rows[side].get(length), key) for side in ("ours", "theirs"))
                cells.append(f"{own} / {peer}" if own or peer else "")
            causal = any(row["causal"] for row in rows["ours"].values())
            dense = found.get("softmax, causal" if causal else "softmax", {}).get("ours", {})
            both = [n for n in lengths if n in dense and n in rows["ours"]]
            # The first length from which on it stays faster.
            crossover = None
            for length in reversed(both):
                if rows["ours"][length][key] >= dense[length][key]:
                    break
                crossover = length
            cells.append("" if name.startswith("softmax") else str(crossover or "not measured"))
            print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| peak memory, MiB: ours / PyTorch | " + " | ".join(map(str, lengths)) + " |")
    print("|---|" + "---|" * len(lengths))
    for name, rows in found.items():
        mib = lambda row: "" if row is None else f"{row['peak'] / 2**20:.0f}"
        cells = [f"{mib(rows['ours'].get(n))} / {mib(rows['theirs'].get(n))}" for n in lengths]
        print(f"| {name} | " + " | ".join(cells) + " |")


def plot(found, lengths, path):
    """Forward and backward against the length, both axes logarithmic."""
    width, height, left, bottom, right = 920, 560, 70, 50, 300
    times = [row["both"] for rows in found.values() for row in rows["ours"].values()]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    x = lambda n: left + (width - left - right) * math.log(n / lengths[0]) / math.log(lengths[-1] / lengths[0])
    y = lambda t: 20 + (height - 20 - bottom) * (high - math.log10(t)) / (high - low)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    for n in lengths:
        out.append(f'<path d="M{x(n):.1f} 20V{height - bottom}" stroke="#ddd"/>'
                   f'<text x="{x(n):.1f}" y="{height - bottom + 18}" text-anchor="middle">{n}</text>')
    for e in range(low, high + 1):
        out.append(f'<path d="M{left} {y(10**e):.1f}H{width - right}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{y(10**e) + 4:.1f}" text-anchor="end">{10**(e + 3):g} ms</text>')
    for index, (name, rows) in enumerate(found.items()):
        dense = name.startswith("softmax")
        colour = "#000" if dense else f"hsl({index * 137 % 360} 65% 45%)"
        dash = "" if dense else f' stroke-dasharray="{("none", "6 3", "2 2")[index % 3]}"'
        points = " ".join(f"{x(n):.1f},{y(row['both']):.1f}" for n, row in rows["ours"].items())
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{2.5 if dense else 1.5}"{dash}/>')
        at = 24 + 16 * index
        out.append(f'<path d="M{width - right + 16} {at}h22" stroke="{colour}" stroke-width="2"{dash}/>'
                   f'<text x="{width - right + 44}" y="{at + 4}">{name}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">tokens</text></svg>')
    with open(path, "w") as file:
        file.write("\n".join(out) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--child")
    parser.add_argument("--sweep", help="lengths, separated by commas")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of the longest call of a sweep")
    parser.add_argument("--save", help="file for the measurements of a sweep, as JSON")
    parser.add_argument("--plot", help="file for a picture of the sweep")
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.length, options.repeat)
    names = [name for name in versions(16) if not options.only or name.startswith(options.only)]
    if options.sweep:
        lengths = [int(length) for length in options.sweep.split(",")]
        names += [name for name in OURS_ALONE if not options.only or name.startswith(options.only)]
        found = sweep(names, lengths, options)
        tabulate(found, lengths)
        if options.plot:
            plot(found, lengths, options.plot)
        return
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
