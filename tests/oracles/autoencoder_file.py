"""A small autoencoder as PyTorch's `torch.save` writes a state dict, with features of it.

    python tests/oracles/autoencoder_file.py crates/explain/tests/fixtures

writes `public-autoencoder.pt` (`W_enc` saved as a transposed view, as it is after some training programs),
`public-autoencoder_cfg.json` in the authors' format (Kissane et al., arXiv 2406.17759), and
`public-autoencoder-values.json`: an input, its features and its reconstruction.
"""

import json
import sys
from pathlib import Path

import torch

WIDTH, FEATURES, ROWS = 16, 24, 5


def main():
    torch.manual_seed(7)
    state = {
        "W_enc": torch.nn.Parameter(torch.randn(FEATURES, WIDTH).t()),
        "W_dec": torch.nn.Parameter(torch.randn(FEATURES, WIDTH)),
        "b_enc": torch.randn(FEATURES),
        "b_dec": torch.randn(WIDTH),
    }
    x = torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        features = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
        reconstruction = features @ state["W_dec"] + state["b_dec"]
    out = Path(sys.argv[1])
    torch.save(state, out / "public-autoencoder.pt")
    config = {
        "seed": 49,
        "l1_coeff": 1,
        "model_name": "small",
        "site": "z",
        "layer": 1,
        "act_name": "blocks.1.attn.hook_z",
        "act_size": WIDTH,
        "dict_size": FEATURES,
    }
    (out / "public-autoencoder_cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    found = {"x": x, "features": features, "reconstruction": reconstruction}
    found = {name: value.tolist() for name, value in found.items()}
    (out / "public-autoencoder-values.json").write_text(json.dumps(found) + "\n")


main()
