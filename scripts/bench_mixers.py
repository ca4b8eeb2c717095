#!/usr/bin/env python3
"""Times mechanisms of attention in PyTorch, written as their papers say them, and in Lapidary, in turns.

    python3 -m venv .venv && .venv/bin/pip install torch
    cargo build --release
    .venv/bin/python scripts/bench_mixers.py [--length 4096] [--rounds 3]
    .venv/bin/python scripts/bench_mixers.py --sweep 256,1024,4096,16384,65536 [--plot docs/mixers.svg]

Queries, keys and values of one sequence with 4 heads of 64, or its tokens of width 256 where a row has projections of
its own, which then are learned. Dense attention is PyTorch's fused one; the others are what a reader of the paper
writes first: masks where patterns are meant, cumulative sums of outer products where recurrences are. Forward, and
forward with backward; medians over rounds, a process for each. A sweep goes through lengths, leaves off where a call
would take longer than `--limit` seconds, and says from which of them on a mechanism is faster than the dense row of
Lapidary's own that is given the same: `softmax`, `softmax, causal`, `softmax, with projections` or `softmax block`.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

from layers_in_pytorch import BIASES, OF_TOKENS
from mixers_in_pytorch import HEADS, WIDTH, mechanisms

LAPIDARY = os.environ.get("LAPIDARY", "target/release/lapidary")
# Swept without a version in PyTorch.
OURS_ALONE = ["combiner, log-sparse"]


def names():
    return [*mechanisms(16), *BIASES, *OF_TOKENS]


def version(name, n):
    """What PyTorch runs, what it is given, and what it learns."""
    if name in OF_TOKENS:
        run = OF_TOKENS[name](n)
        return run, [torch.randn(1, n, HEADS * WIDTH)], list(run.parameters())
    given = [torch.randn(1, HEADS, n, WIDTH) for _ in range(3)]
    if name in BIASES:
        run = BIASES[name](n)
        return run, given, list(run.parameters())
    return mechanisms(n)[name], given, []


def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return None


def child(name, n, repeat):
    torch.set_num_threads(2)
    # What would not fit fails by itself, not by the machine.
    resource.setrlimit(resource.RLIMIT_AS, (18 << 30, 18 << 30))
    run, given, learned = version(name, n)

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
            run(*given)

    def both():
        for parameter in learned:
            parameter.grad = None
        inputs = [x.clone().requires_grad_() for x in given]
        run(*inputs).sum().backward()

    print(json.dumps(dict(forward=median(forward), both=median(both), peak=peak())))


def ours(name, n, repeat):
    """Nothing where the length is beyond what is measured of it."""
    out = subprocess.run(
        [LAPIDARY, "--json", "bench", "mixers", "--method", name, "--width", str(HEADS * WIDTH), "--heads", str(HEADS),
         "--batch", "1", "--length", str(n), "--least", str(n), "--repeat", str(repeat)],
        check=True, capture_output=True, text=True,
    )
    found = json.loads(out.stdout)
    for row in found["rows"]:
        return dict(
            forward=row["forward"], both=row["forward_and_backward"], peak=found["peak_bytes"], dense=row["dense"]
        )
    return None


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
        if row is None:
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
            kind = next((row["dense"] for row in rows["ours"].values()), None)
            dense = found.get(kind, {}).get("ours", {})
            both = [n for n in lengths if n in dense and n in rows["ours"]]
            # The first length from which on it stays faster.
            crossover = None
            for length in reversed(both):
                if rows["ours"][length][key] >= dense[length][key]:
                    break
                crossover = length
            cells.append("" if name == kind else str(crossover or "not measured"))
            print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| peak memory, MiB: ours / PyTorch | " + " | ".join(map(str, lengths)) + " |")
    print("|---|" + "---|" * len(lengths))
    for name, rows in found.items():
        mib = lambda row: "" if row is None else f"{row['peak'] / 2**20:.0f}"
        cells = [f"{mib(rows['ours'].get(n))} / {mib(rows['theirs'].get(n))}" for n in lengths]
        print(f"| {name} | " + " | ".join(cells) + " |")


def plot(found, lengths, path):
    """Forward and backward against the length, both axes logarithmic."""
    width, height, left, bottom, right = 920, max(560, 48 + 16 * len(found)), 70, 50, 300
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
    wanted = lambda name: not options.only or name.startswith(options.only)
    chosen = [name for name in names() if wanted(name)]
    if options.sweep:
        lengths = [int(length) for length in options.sweep.split(",")]
        chosen += [name for name in OURS_ALONE if wanted(name)]
        found = sweep(chosen, lengths, options)
        tabulate(found, lengths)
        if options.plot:
            plot(found, lengths, options.plot)
        return
    print(f"| {options.length} tokens | forward | PyTorch | ratio | and backward | PyTorch | ratio | memory | PyTorch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in chosen:
        rounds = []
        for _ in range(options.rounds):
            own = ours(name, options.length, options.repeat)
            rounds += [] if own is None else [(own, theirs(name, options.length, options.repeat))]
        if not rounds:
            print(f"{name} is not measured at {options.length}", file=sys.stderr)
            continue
        median = lambda which, key: statistics.median(r[which][key] for r in rounds)
        cells = [name]
        for key in ("forward", "both"):
            own, peer = median(0, key), median(1, key)
            cells += [f"{own * 1e3:.1f} ms", f"{peer * 1e3:.1f} ms", f"{own / peer:.2f}"]
        cells += [f"{median(which, 'peak') / 2**20:.0f} MiB" for which in (0, 1)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
