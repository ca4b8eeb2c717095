"""Times a straightforward PyTorch DecompX and prints its median time and peak memory as JSON.

The algorithm is that of tests/oracles/decompx.py: vectorised, in f32, through the five-index
tensor [batch, heads, query, stream, width], as the authors' code does it. The model is a BERT of
random weights.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python scripts/bench_decompx.py [--tokens N]
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "oracles"))
import decompx as oracle  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = {
        "kind": oracle.BERT,
        "width": options.width,
        "heads": options.heads,
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": 1000,
        "length": options.tokens,
        "token_types": 2,
        "labels": 2,
        "epsilon": 1e-12,
    }
    p = {name: value.float() for name, value in oracle.random_parameters(config, 0).items()}
    ids = torch.arange(options.tokens).unsqueeze(0) * 7 % 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, cpu_seconds = [], []
    for run in range(options.runs + 1):
        start, cpu = time.perf_counter(), time.process_time()
        logits, streams = oracle.decompx(ids, p, config)
        if run > 0:  # the first warms up
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)
    error = (streams.sum(1) - logits).abs().max().item()
    print(
        json.dumps(
            {
                "program": f"pytorch {torch.__version__}",
                "tokens": options.tokens,
                "threads": options.threads,
                "seconds": statistics.median(seconds),
                "cpu_seconds": statistics.median(cpu_seconds),
                "all_seconds": [round(s, 3) for s in seconds],
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "rss_before_mib": before / 1024,
                "completeness_error": error,
            }
        )
    )


if __name__ == "__main__":
    main()
