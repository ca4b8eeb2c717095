"""Keeps what `transformers` computes for single parts, as golden values.

Run from the root of the repository with torch, transformers and safetensors installed:

    python crates/parts/tests/oracles/parts.py

Every parameter is drawn anew from a fixed seed. The tests read the files this writes and do not
need Python.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.t5.modeling_t5 import T5Attention

FOLDER = Path(__file__).parent.parent / "fixtures"
WIDTH = 16


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim > 1 and "A_log" not in name
        parameter.data = drawn * (parameter.shape[-1] ** -0.5 if is_matrix else 0.3)


def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    save_file(tensors, FOLDER / f"{name}.safetensors", metadata=versions)


@torch.no_grad()
def mamba(name: str, **options) -> None:
    generator = torch.Generator().manual_seed(1)
    config = transformers.MambaConfig(
        hidden_size=WIDTH, state_size=5, num_hidden_layers=1, expand=2, conv_kernel=4,
        time_step_rank=3, **options,
    )  # fmt: skip
    save_mixer(name, MambaMixer(config, layer_idx=0).eval(), generator)


@torch.no_grad()
def mamba2(name: str, **options) -> None:
    generator = torch.Generator().manual_seed(3)
    config = transformers.Mamba2Config(
        hidden_size=WIDTH, state_size=5, num_hidden_layers=1, expand=2, conv_kernel=4, num_heads=4,
        head_dim=8, chunk_size=4, **options,
    )  # fmt: skip
    save_mixer(name, Mamba2Mixer(config, layer_idx=0).eval(), generator)


def save_mixer(name: str, mixer: torch.nn.Module, generator: torch.Generator) -> None:
    randomise(mixer, generator)
    x = torch.randn(2, 9, WIDTH, generator=generator)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    save(
        name,
        dict(mixer.named_parameters())
        | {
            "x": x,
            "mask": mask.to(torch.uint8),
            "expected": mixer(x),
            "expected_masked": mixer(x, attention_mask=mask),
        },
    )


@torch.no_grad()
def mixture(name: str, block: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    block = block.eval()
    randomise(block, generator)
    x = torch.randn(2, 7, WIDTH, generator=generator)
    gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
    save(
        name,
        {
            "router.weight": block.gate.weight,
            "gate": gate,
            "up": up,
            "down": block.experts.down_proj,
            "x": x,
            "expected": block(x),
        },
    )


@torch.no_grad()
def positions() -> None:
    tensors = {}
    for heads in (4, 6, 8, 12):
        mask = torch.ones(1, 7, dtype=torch.int64)
        alibi = build_alibi_tensor(mask, heads, torch.float32)
        tensors[f"alibi.{heads}"] = alibi.reshape(heads, 7)
    distances = torch.arange(-600, 601)
    for buckets, longest in ((32, 128), (8, 20), (16, 256), (10, 50)):
        for direction in ("causal", "both"):
            found = T5Attention._relative_position_bucket(
                distances, direction == "both", buckets, longest
            )
            tensors[f"buckets.{direction}.{buckets}.{longest}"] = found.to(torch.uint8)
    save("positions", tensors)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    mamba("mamba")
    mamba("mamba_biased", use_bias=True, use_conv_bias=False, hidden_act="gelu")
    mamba2("mamba2", n_groups=2)
    mamba2(
        "mamba2_biased", n_groups=1, use_bias=True, use_conv_bias=False, time_step_limit=(0.6, 0.9)
    )
    mixtral = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2
    )
    mixture("mixtral", MixtralSparseMoeBlock(mixtral))
    olmoe = transformers.OlmoeConfig(
        hidden_size=WIDTH, intermediate_size=12, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=False,
    )  # fmt: skip
    mixture("olmoe", OlmoeSparseMoeBlock(olmoe))
    positions()


if __name__ == "__main__":
    main()
