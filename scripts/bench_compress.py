#!/usr/bin/env python3
"""Times SliceGPT and MoDeGPT in PyTorch and in Lapidary on the same work, in turns.

    python3 -m venv .venv && .venv/bin/pip install torch
    cargo build --release
    .venv/bin/python scripts/bench_compress.py [--rounds 1] [--windows 128] [--method slicegpt,modegpt]

The work: a random pre-norm decoder (12 blocks of width 768, 12 heads, feed-forward width 3072), windows of 512
tokens, 30 % cut. PyTorch's versions are written as the papers say them: one pass over the windows that sums the
covariances a method needs in double precision, then a decomposition for each site or module, and products that
fold the result into the weights. Each run is a process of its own; the median over rounds is printed, with the most
memory that a process held.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

LAPIDARY = os.environ.get("LAPIDARY", "target/release/lapidary")
WIDTH, BLOCKS, HEADS, LENGTH, VOCABULARY, KEEP = 768, 12, 12, 512, 512, 0.7


def build():
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.v, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    return Decoder()


def run_forward(model, windows, see):
    """One pass over the windows; `see(site, x)` looks at `[tokens, features]`."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        for start in range(0, windows, 8):
            batch = min(8, windows - start)
            ids = torch.randint(0, VOCABULARY, (batch, LENGTH))
            x = model.tokens(ids) + model.positions.weight
            for index, block in enumerate(model.blocks):
                see(f"{index}.attention", x)
                h = block.norm1(x)
                split = lambda y: y.view(batch, LENGTH, HEADS, -1).transpose(1, 2)
                q, k, v = split(block.q(h)), split(block.k(h)), split(block.v(h))
                see(f"{index}.normed", h)
                see(f"{index}.query", q)
                see(f"{index}.key", k)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + block.out(y.transpose(1, 2).reshape(batch, LENGTH, WIDTH))
                see(f"{index}.feedforward", x)
                hidden = F.gelu(block.up(block.norm2(x)))
                see(f"{index}.hidden", hidden)
                x = x + block.down(hidden)
            see("last", x)
            model.head(model.norm(x))


def covariances(model, windows, wanted):
    import torch

    sums = {}

    def see(site, x):
        kind = site.split(".")[-1]
        if kind not in wanted:
            return
        x = x.double()
        if x.dim() == 4:
            rows = x.transpose(0, 1).reshape(HEADS, -1, x.shape[-1])
            product = rows.transpose(1, 2) @ rows
        else:
            rows = x.reshape(-1, x.shape[-1])
            product = rows.T @ rows
        sums[site] = product if site not in sums else sums[site] + product

    run_forward(model, windows, see)
    return sums


def slicegpt(model, windows):
    import torch

    sums = covariances(model, windows, {"attention", "feedforward", "last"})
    kept = int(KEEP * WIDTH)
    with torch.no_grad():
        bases = {site: torch.linalg.eigh(c)[1].flip(1)[:, :kept] for site, c in sums.items()}
        for index, block in enumerate(model.blocks):
            a, f = bases[f"{index}.attention"], bases[f"{index}.feedforward"]
            after = bases.get(f"{index + 1}.attention", bases["last"])
            for layer in (block.q, block.k, block.v):
                layer.weight = torch.nn.Parameter((layer.weight.double() @ a).float())
            block.out.weight = torch.nn.Parameter((f.T @ block.out.weight.double()).float())
            block.up.weight = torch.nn.Parameter((block.up.weight.double() @ f).float())
            block.down.weight = torch.nn.Parameter((after.T @ block.down.weight.double()).float())
            block.shortcuts = (a.T @ f).float(), (f.T @ after).float()


def modegpt(model, windows):
    import torch

    sums = covariances(model, windows, {"normed", "query", "key", "hidden"})
    head = WIDTH // HEADS
    rank, hidden_kept = int(KEEP * head), int(KEEP * 4 * WIDTH)
    root = lambda c: torch.linalg.cholesky(c + 1e-6 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype))
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            # Feed-forward part: ridge leverage scores, and the second matrix refitted (Nyström).
            c = sums[f"{index}.hidden"]
            ridge = 1e-2 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
            scores = torch.linalg.solve(c + ridge, c).diagonal()
            keep = scores.topk(hidden_kept).indices
            fit = torch.linalg.solve(c[keep][:, keep] + 1e-9 * ridge[keep][:, keep], c[keep])
            block.up.weight = torch.nn.Parameter(block.up.weight[keep])
            block.down.weight = torch.nn.Parameter((block.down.weight.double() @ fit.T).float())
            # Queries and keys: columns of largest norm under both covariances (CR).
            rows = []
            for h in range(HEADS):
                cq, ck = sums[f"{index}.query"][h], sums[f"{index}.key"][h]
                norms = (root(cq).norm(dim=1)) * (root(ck).norm(dim=1))
                rows.append(h * head + norms.topk(rank).indices)
            rows = torch.cat(rows)
            block.q.weight = torch.nn.Parameter(block.q.weight[rows])
            block.k.weight = torch.nn.Parameter(block.k.weight[rows])
            # Values and output: SVD of each head's product under the input's covariance.
            r = root(sums[f"{index}.normed"])
            v, o = block.v.weight.double(), block.out.weight.double()
            new_v, new_o = [], []
            for h in range(HEADS):
                part = slice(h * head, (h + 1) * head)
                u, s, w = torch.linalg.svd(r.T @ v[part].T, full_matrices=False)
                left, middle = u * s, w @ o[:, part].T
                p, t, z = torch.linalg.svd(torch.diag(s) @ middle, full_matrices=False)
                del left
                new_v.append(torch.linalg.solve_triangular(r.T, u @ p[:, :rank], upper=True).T)
                new_o.append((t[:rank, None] * z[:rank]).T)
            block.v.weight = torch.nn.Parameter(torch.cat(new_v).float())
            block.out.weight = torch.nn.Parameter(torch.cat(new_o, 1).float())


def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return None


def child(method, windows):
    import torch

    torch.set_num_threads(2)
    model = build()
    run_forward(model, 1, lambda *_: None)
    started = time.perf_counter()
    run_forward(model, windows, lambda *_: None)
    forward = time.perf_counter() - started
    started = time.perf_counter()
    {"slicegpt": slicegpt, "modegpt": modegpt}[method](model, windows)
    whole = time.perf_counter() - started
    print(json.dumps(dict(forward=forward, whole=whole, peak=peak())))


def ours(method, windows):
    out = subprocess.run(
        [LAPIDARY, "--json", "bench", "compress", "--method", method, "--width", str(WIDTH), "--blocks", str(BLOCKS),
         "--heads", str(HEADS), "--length", str(LENGTH), "--batch", str(windows), "--vocabulary", str(VOCABULARY),
         "--repeat", "3"],
        check=True, capture_output=True, text=True,
    )
    found = json.loads(out.stdout)
    return dict(
        forward=found["forward_seconds"],
        calibration=found["calibration_seconds"],
        whole=found["calibration_seconds"] + found["cut_seconds"],
        peak=found["peak_bytes"],
        weights=found["weights_bytes"],
        speeds=found["speeds"],
    )


def theirs(method, windows):
    out = subprocess.run(
        [sys.executable, __file__, "--child", method, "--windows", str(windows)],
        check=True, capture_output=True, text=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--method", default="slicegpt,modegpt")
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.windows)
    for method in options.method.split(","):
        rounds = [(ours(method, options.windows), theirs(method, options.windows)) for _ in range(options.rounds)]
        median = lambda which, key: statistics.median(r[which][key] for r in rounds)
        print(f"{method}, {options.windows} windows of {LENGTH}")
        print(f"  forward      {median(0, 'forward'):8.2f} s   PyTorch {median(1, 'forward'):8.2f} s")
        ratio = median(0, "calibration") / median(0, "forward")
        print(f"  calibration  {median(0, 'calibration'):8.2f} s   {ratio:.2f} of the forward passes")
        ratio = median(0, "whole") / median(1, "whole")
        print(f"  all          {median(0, 'whole'):8.2f} s   PyTorch {median(1, 'whole'):8.2f} s   ratio {ratio:.2f}")
        over = (median(0, "peak") - median(0, "weights")) / 2**20
        print(f"  peak memory  {median(0, 'peak') / 2**20:8.0f} MiB, {over:.0f} above the weights; "
              f"PyTorch {median(1, 'peak') / 2**20:.0f} MiB")
        before, after = rounds[0][0]["speeds"]
        for key in before:
            print(f"  {key}: {before[key]:.1f} -> {after[key]:.1f}, {after[key] / before[key]:.2f} times")


if __name__ == "__main__":
    main()
