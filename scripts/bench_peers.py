#!/usr/bin/env python3
"""Times PyTorch and Lapidary on the same work, in turns, and prints ratios.

    python3 -m venv .venv && .venv/bin/pip install torch
    cargo build --release
    .venv/bin/python scripts/bench_peers.py [--rounds 5] [--only step,forward]

Each round runs one after the other in a process of its own, so that a machine whose speed drifts
moves both alike; the median over rounds is what is printed. Peak memory is the most that the
process held (VmHWM), the interpreter and libraries included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

LAPIDARY = os.environ.get("LAPIDARY", "target/release/lapidary")

WORKS = {
    "step": dict(work="step", width=256, blocks=4, heads=4, length=256, batch=8, vocabulary=512, repeat=5),
    "small-step": dict(work="step", width=64, blocks=2, heads=4, length=64, batch=8, vocabulary=512, repeat=40),
    "forward": dict(work="forward", width=768, blocks=12, heads=12, length=256, batch=1, vocabulary=512, repeat=5),
}


def peer(options, compiled):
    """The same work in PyTorch: fused attention, AdamW, gradients clipped to norm 1."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(2)
    torch.manual_seed(0)
    width, heads, length = options["width"], options["heads"], options["length"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch = x.shape[0]
            qkv = self.qkv(self.norm1(x)).view(batch, length, 3, heads, width // heads)
            q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(options["vocabulary"], width)
            self.positions = nn.Embedding(length, width)
            self.blocks = nn.ModuleList(Block() for _ in range(options["blocks"]))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, options["vocabulary"], bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    model = Decoder()
    ids = torch.randint(0, options["vocabulary"], (options["batch"], length))
    run = torch.compile(model) if compiled else model
    if options["work"] == "forward":

        def once():
            with torch.no_grad():
                run(ids)
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        targets = torch.randint(0, options["vocabulary"], (options["batch"] * length,))

        def once():
            optimiser.zero_grad(set_to_none=True)
            loss = F.cross_entropy(run(ids).view(-1, options["vocabulary"]), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            loss.item()

    once()
    times = []
    for _ in range(options["repeat"]):
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
    print(json.dumps(dict(median_seconds=statistics.median(times), peak_bytes=peak_bytes(), torch=torch.__version__)))


def peak_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def lapidary(options):
    command = [LAPIDARY, "bench", options["work"], "--json", "--threads", "2"]
    for name in ["width", "blocks", "heads", "length", "batch", "vocabulary", "repeat"]:
        command += [f"--{name}", str(options[name])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def in_own_process(name, compiled):
    command = [sys.executable, __file__, "--peer", name] + (["--compiled"] if compiled else [])
    environment = dict(os.environ)
    # Settings that make old builds of OpenBLAS safe and new ones slow.
    environment.pop("OPENBLAS_CORETYPE", None)
    environment.pop("OPENBLAS_L2_SIZE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(WORKS))
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(WORKS[arguments.peer], arguments.compiled)
        return
    print("| work | Lapidary | PyTorch | time ratio | Lapidary memory | PyTorch memory | memory ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.only.split(","):
        ours, theirs, compiled = [], [], []
        for _ in range(arguments.rounds):
            ours.append(lapidary(WORKS[name]))
            theirs.append(in_own_process(name, False))
            if arguments.compile:
                compiled.append(in_own_process(name, True))
        row(name, ours, theirs)
        if arguments.compile and all(compiled):
            row(f"{name} (torch.compile)", ours, compiled)


def row(name, ours, theirs):
    median = lambda runs, key: statistics.median(run[key] for run in runs)
    mine, other = median(ours, "median_seconds"), median(theirs, "median_seconds")
    my_peak, other_peak = median(ours, "peak_bytes"), median(theirs, "peak_bytes")
    print(
        f"| {name} | {mine * 1e3:.1f} ms | {other * 1e3:.1f} ms | {mine / other:.2f} "
        f"| {my_peak / 2**20:.0f} MiB | {other_peak / 2**20:.0f} MiB | {my_peak / other_peak:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
