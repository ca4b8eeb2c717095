"""Training steps of a sparse autoencoder in PyTorch, and the fixture made with them.

An independent implementation of the training step of Kissane et al., Interpreting Attention Layer
Outputs with Sparse Autoencoders (arXiv 2406.17759): the loss by autograd, the gradient of the
decoder projected, `torch.optim.Adam`, rows of the decoder normalised after the step. One resampling
is made between steps, its examples given.

    python tests/oracles/autoencoder.py crates/explain/tests/fixtures

writes `autoencoder.json`: the start, the batches, and what each step gives, in f64.
"""

import json
import math
import sys
from pathlib import Path

import torch

WIDTH, FEATURES, ROWS, STEPS, RESAMPLE_AFTER = 6, 20, 32, 8, 4
OPTIONS = {"sparsity": 0.13, "rate": 0.004, "beta1": 0.3, "beta2": 0.97, "warm_up": 5}
DEAD = [3, 11]


def rate_after(since):
    if since >= OPTIONS["warm_up"]:
        return OPTIONS["rate"]
    way = since / OPTIONS["warm_up"]
    return OPTIONS["rate"] * (0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * way)))


def loss_of(x, p):
    features = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    reconstruction = features @ p["W_dec"] + p["b_dec"]
    squared_error = (reconstruction - x).pow(2).sum(-1).mean()
    activation = features.abs().sum(-1).mean()
    return squared_error, activation, features


def resample(x, p, optimiser):
    """The first of the dead features takes the one example there is; the other stays."""
    with torch.no_grad():
        living = [i for i in range(FEATURES) if i not in DEAD]
        length = p["W_enc"][:, living].norm(dim=0).mean() * 0.2
        direction = x[0] - p["b_dec"]
        direction = direction / direction.norm()
        for feature in DEAD[: len(x)]:
            p["W_dec"][feature] = direction
            p["W_enc"][:, feature] = direction * length
            p["b_enc"][feature] = 0
            for moment in ("exp_avg", "exp_avg_sq"):
                optimiser.state[p["W_dec"]][moment][feature] = 0
                optimiser.state[p["W_enc"]][moment][:, feature] = 0
                optimiser.state[p["b_enc"]][moment][feature] = 0


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    p = {
        "W_enc": torch.randn(WIDTH, FEATURES) * 0.4,
        "b_enc": torch.randn(FEATURES) * 0.1,
        "W_dec": torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH), dim=-1),
        "b_dec": torch.randn(WIDTH) * 0.1,
    }
    fixture = {
        "width": WIDTH,
        "features": FEATURES,
        "options": OPTIONS,
        "dead": DEAD,
        "resample_after": RESAMPLE_AFTER,
        "start": {name: value.flatten().tolist() for name, value in p.items()},
        "batches": [],
        "steps": [],
    }
    p = {name: torch.nn.Parameter(value) for name, value in p.items()}
    optimiser = torch.optim.Adam(
        p.values(), lr=OPTIONS["rate"], betas=(OPTIONS["beta1"], OPTIONS["beta2"]), eps=1e-8
    )
    since = 0
    # One example for one feature: with a single row there is nothing to draw.
    example = torch.randn(1, WIDTH)
    fixture["example"] = example.flatten().tolist()
    for step in range(STEPS):
        if step == RESAMPLE_AFTER:
            resample(example, p, optimiser)
            since = 0
        x = torch.randn(ROWS, WIDTH)
        squared_error, activation, features = loss_of(x, p)
        optimiser.zero_grad()
        (squared_error + OPTIONS["sparsity"] * activation).backward()
        with torch.no_grad():
            rows = p["W_dec"] / p["W_dec"].norm(dim=-1, keepdim=True)
            gradient = p["W_dec"].grad
            gradient -= (gradient * rows).sum(-1, keepdim=True) * rows
        for group in optimiser.param_groups:
            group["lr"] = rate_after(since)
        optimiser.step()
        with torch.no_grad():
            p["W_dec"] /= p["W_dec"].norm(dim=-1, keepdim=True)
        since += 1
        fixture["batches"].append(x.flatten().tolist())
        fixture["steps"].append(
            {
                "squared_error": squared_error.item(),
                "activation": activation.item(),
                "active": (features > 0).double().sum(-1).mean().item(),
                **{name: value.detach().flatten().tolist() for name, value in p.items()},
            }
        )
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    (out / "autoencoder.json").write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main()
