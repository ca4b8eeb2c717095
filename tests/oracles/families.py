"""Small random checkpoints of every family that Lapidary loads, with the outputs that
`transformers` computes for them.

    python tests/oracles/families.py                      write tests/fixtures/families/
    python tests/oracles/families.py gpt2 llama           only these
    python tests/oracles/families.py --verify DIR         does transformers load DIR, and agree?
    python tests/oracles/families.py --verify DIR --case tests/fixtures/families/gpt2/case.safetensors
    python tests/oracles/families.py --round-trip target/debug/examples/copy
    python tests/oracles/families.py --narrow target/debug/examples/narrow

The last two have fixtures loaded and saved by Lapidary (`cargo build -p lapidary-model --example copy`,
`cargo build -p lapidary-compress --example narrow`), the last one compressed in every way that leaves a
stock shape, and load what was saved with transformers.

Each fixture is a Hugging Face directory (`config.json`, `model.safetensors` or shards, tokenizer
files) beside `case.safetensors`, which holds inputs under their Hugging Face names and the f32
outputs under `expected.*`:

    expected.logits, expected.last_hidden_state, expected.pooler_output, ...
    expected.hidden_states.I      the residual stream, I = 0 being the embeddings
    expected.attentions.I         the attention weights, [batch, heads, query, key]
    expected.router_logits.I      the expert router's logits, [tokens, experts]

Positions whose `attention_mask` is 0 hold whatever transformers computed there: compare the rest.
The fixtures are kept in the repository, so that no test needs Python.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import fixture_tokenizers

ROOT = Path(__file__).resolve().parents[1] / "fixtures" / "families"
VOCABULARY = 128
WIDTH, LAYERS, HEADS, GROUPS, HIDDEN = 32, 2, 4, 2, 48
LENGTH = 12
TOLERANCE = 1e-4

Tensors = dict[str, torch.Tensor]


@dataclass
class Family:
    """One fixture: how the model is made, fed and stored."""

    architecture: str
    config: Callable[[], transformers.PretrainedConfig]
    inputs: Callable[[torch.Generator], Tensors]
    dtype: torch.dtype = torch.float32
    shard: str | None = None
    rename: Callable[[Tensors], Tensors] = lambda tensors: tensors
    edit_config: Callable[[dict], None] = lambda config: None
    tokenizer: str | None = None
    extra_outputs: list[str] = field(default_factory=list)


# Inputs


def token_inputs(generator, first=10, pad=1, side="right", types=False):
    """Two rows of token ids, the second with four positions of padding."""
    input_ids = torch.randint(first, VOCABULARY, (2, LENGTH), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    padding = slice(LENGTH - 4, LENGTH) if side == "right" else slice(0, 4)
    input_ids[1, padding] = pad
    attention_mask[1, padding] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if types:
        inputs["token_type_ids"] = (torch.arange(LENGTH) >= 5).long().expand(2, -1).contiguous()
    return inputs


def image_inputs(generator):
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def clip_inputs(generator):
    """Rows that end with the end-of-text id, where CLIP pools its text."""
    inputs = token_inputs(generator, first=3, pad=1)
    inputs["input_ids"].clamp_(max=VOCABULARY - 2)
    inputs["input_ids"][0, LENGTH - 1] = VOCABULARY - 1
    inputs["input_ids"][1, LENGTH - 5] = VOCABULARY - 1
    return inputs | image_inputs(generator)


# Older key names


def old_gpt2_names(tensors: Tensors) -> Tensors:
    """The names of the original `gpt2` checkpoint: no prefix, no head, mask buffers inside."""
    renamed = {
        name.removeprefix("transformer."): value
        for name, value in tensors.items()
        if name != "lm_head.weight"
    }
    for layer in range(LAYERS):
        mask = torch.tril(torch.ones(64, 64))
        renamed[f"h.{layer}.attn.bias"] = mask.view(1, 1, 64, 64)
    return renamed


def old_bert_names(tensors: Tensors) -> Tensors:
    """The names of the original `bert-base-uncased`: gamma and beta, a tied decoder stored twice,
    a buffer of positions, and the next-sentence head that a masked LM doesn't use."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    renamed.pop("cls.predictions.decoder.bias", None)
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    renamed["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    renamed["cls.seq_relationship.weight"] = torch.zeros(2, WIDTH)
    renamed["cls.seq_relationship.bias"] = torch.zeros(2)
    return renamed


def old_roberta_names(tensors: Tensors) -> Tensors:
    """The tied decoder stored again, and the position buffer of older versions."""
    renamed = dict(tensors)
    renamed["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"].clone()
    renamed["lm_head.decoder.bias"] = tensors["lm_head.bias"].clone()
    renamed["roberta.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    return renamed


def old_clip_names(tensors: Tensors) -> Tensors:
    renamed = dict(tensors)
    renamed["text_model.embeddings.position_ids"] = torch.arange(32).unsqueeze(0)
    renamed["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    return renamed


def old_llama_config(config: dict) -> None:
    """`rope_theta` and `rope_scaling` with `type`, as before transformers 5."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters["rope_theta"]
    config["rope_scaling"] = {"type": parameters["rope_type"], "factor": parameters["factor"]}
    config["torch_dtype"] = config.pop("dtype")


# The families


def llama(config_class=transformers.LlamaConfig, **changes):
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return config_class(**(settings | changes))


def bert(config_class=transformers.BertConfig, **changes):
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return config_class(**(settings | changes))


def albert(**changes):
    return bert(transformers.AlbertConfig, embedding_size=24, **changes)


def roberta(**changes):
    return bert(
        transformers.RobertaConfig, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        layer_norm_eps=1e-5, **changes,
    )  # fmt: skip


def opt(**changes):
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=64, word_embed_proj_dim=WIDTH,
        bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return transformers.OPTConfig(**(settings | changes))


def vit(config_class=transformers.ViTConfig):
    return config_class(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip


def clip():
    tower = dict(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS
    )
    return transformers.CLIPConfig(
        text_config=tower
        | dict(
            vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=1, bos_token_id=0,
            eos_token_id=VOCABULARY - 1,
        ),
        vision_config=tower | dict(image_size=16, patch_size=4),
        projection_dim=24,
    )  # fmt: skip


def right_padded(generator):
    return token_inputs(generator)


def left_padded(generator):
    return token_inputs(generator, side="left")


def unpadded(generator):
    """Recurrent models run over padding: transformers only masks it in part, so there is none."""
    inputs = token_inputs(generator)
    return {"input_ids": torch.randint(10, VOCABULARY, inputs["input_ids"].shape, generator=generator)}


def typed(generator):
    return token_inputs(generator, pad=0, types=True)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MOE_OUTPUTS = ["output_router_logits"]

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
            bos_token_id=2, eos_token_id=2,
        ),  # fmt: skip
        right_padded,
        tokenizer="byte_level",
    ),
    "gpt2-old-names": Family(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
            n_inner=HIDDEN, bos_token_id=2, eos_token_id=2, scale_attn_by_inverse_layer_idx=True,
        ),  # fmt: skip
        right_padded,
        rename=old_gpt2_names,
        tokenizer="byte_level_files",
    ),
    "opt": Family("OPTForCausalLM", opt, left_padded, tokenizer="byte_level"),
    "opt-projected": Family(
        "OPTForCausalLM",
        lambda: opt(word_embed_proj_dim=24, do_layer_norm_before=False),
        right_padded,
        dtype=torch.float16,
        tokenizer="byte_level",
    ),
    "opt-projected-pre-norm": Family(
        "OPTForCausalLM",
        lambda: opt(word_embed_proj_dim=24, do_layer_norm_before=True),
        right_padded,
        tokenizer="byte_level",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        lambda: llama(rope_parameters=LLAMA3, tie_word_embeddings=False),
        right_padded,
        shard="40KB",
        tokenizer="byte_level",
    ),
    "llama-tied": Family(
        "LlamaForCausalLM",
        lambda: llama(rope_parameters=LINEAR, tie_word_embeddings=True, head_dim=16, attention_bias=True),
        left_padded,
        dtype=torch.bfloat16,
        edit_config=old_llama_config,
        tokenizer="byte_level",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda: llama(transformers.MistralConfig, sliding_window=4),
        right_padded,
        tokenizer="byte_level",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda: llama(transformers.Qwen2Config, tie_word_embeddings=True),
        right_padded,
        tokenizer="byte_level",
    ),
    "albert": Family("AlbertModel", lambda: albert(num_hidden_layers=5, num_hidden_groups=2), typed),
    "albert-masked-lm": Family("AlbertForMaskedLM", albert, typed),
    "bert-masked-lm": Family("BertForMaskedLM", bert, typed, tokenizer="word_piece"),
    "bert-masked-lm-old-names": Family(
        "BertForMaskedLM", bert, typed, rename=old_bert_names, tokenizer="word_piece_files"
    ),
    "bert-classifier": Family(
        "BertForSequenceClassification", lambda: bert(num_labels=3), typed, tokenizer="word_piece"
    ),
    "bert": Family("BertModel", bert, typed, tokenizer="word_piece"),
    "roberta-masked-lm": Family(
        "RobertaForMaskedLM", roberta, right_padded, rename=old_roberta_names, tokenizer="byte_level"
    ),
    "roberta-classifier": Family(
        "RobertaForSequenceClassification", lambda: roberta(num_labels=3), right_padded, tokenizer="byte_level"
    ),
    "vit": Family("ViTForImageClassification", vit, image_inputs),
    "deit": Family(
        "DeiTForImageClassificationWithTeacher", lambda: vit(transformers.DeiTConfig), image_inputs
    ),
    "clip": Family("CLIPModel", clip, clip_inputs, rename=old_clip_names, tokenizer="byte_level"),
    "mamba": Family(
        "MambaForCausalLM",
        lambda: transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=8, num_hidden_layers=LAYERS,
            conv_kernel=4, time_step_rank=4, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        ),  # fmt: skip
        unpadded,
        tokenizer="byte_level",
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        lambda: transformers.Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=8, num_hidden_layers=LAYERS,
            num_heads=4, head_dim=16, n_groups=2, conv_kernel=4, chunk_size=8, bos_token_id=0,
            eos_token_id=2, pad_token_id=1,
        ),  # fmt: skip
        unpadded,
        tokenizer="byte_level",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        lambda: llama(
            transformers.MixtralConfig, intermediate_size=WIDTH, num_local_experts=4,
            num_experts_per_tok=2, sliding_window=None,
        ),  # fmt: skip
        right_padded,
        extra_outputs=MOE_OUTPUTS,
        tokenizer="byte_level",
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        lambda: llama(
            transformers.OlmoeConfig, intermediate_size=WIDTH, num_experts=4, num_experts_per_tok=2,
        ),  # fmt: skip
        right_padded,
        extra_outputs=MOE_OUTPUTS,
        tokenizer="byte_level",
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew, wide enough that a wrong bias, scale or transpose shows."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("A_log"):
                parameter.copy_(parameter + 0.2 * noise)
            elif "logit_scale" in name:
                parameter.copy_(parameter)
            elif name.endswith(".D") or ("norm" in name.lower() and name.endswith("weight")) or (
                name.endswith("weight") and parameter.dim() == 1
            ):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def load_model(directory: Path) -> torch.nn.Module:
    """The model of a directory in f32 with plain attention, and nothing missing."""
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        sys.exit(f"{directory}: missing {missing}, mismatched {report['mismatched_keys']}")
    return model.eval()


def flatten(name: str, value, into: Tensors) -> None:
    """Output fields as tensors; a tuple of tensors as `name.0`, `name.1`, ..."""
    if isinstance(value, torch.Tensor):
        into[name] = value.detach().float().contiguous().clone()
    elif isinstance(value, transformers.utils.ModelOutput):
        for key, inner in value.items():
            flatten(f"{name}.{key}", inner, into)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            flatten(f"{name}.{index}", inner, into)


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: Tensors, extra: list[str]) -> Tensors:
    """Everything the model computes for the inputs, under `expected.*`."""
    if isinstance(model, transformers.CLIPModel):
        result = clip_outputs(model, inputs)
    else:
        options = {"output_hidden_states": True} | {name: True for name in extra}
        if model.config.model_type not in ("mamba", "mamba2"):
            options["output_attentions"] = True
        result = model(**inputs, **options)
    expected: Tensors = {}
    for name, value in result.items():
        if name not in ("past_key_values", "cache_params", "loss", "aux_loss"):
            flatten(f"expected.{name}", value, expected)
    return expected


def clip_outputs(model, inputs: Tensors) -> dict:
    """CLIP's towers report their layers only when asked one by one."""
    every = {"output_hidden_states": True, "output_attentions": True}
    joint = model(**inputs)
    text = model.text_model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **every
    )
    vision = model.vision_model(pixel_values=inputs["pixel_values"], **every)
    fields = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
    return {name: joint[name] for name in fields} | {
        "text_model_output": text, "vision_model_output": vision
    }  # fmt: skip


def save(family: Family, model: torch.nn.Module, directory: Path) -> None:
    """Writes the directory as transformers would, then gives it the names and type asked for."""
    model.save_pretrained(directory, max_shard_size=family.shard or "5GB")
    if family.shard is None:
        weights = directory / "model.safetensors"
        tensors = family.rename(load_file(weights))
        save_file({k: v.contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    (directory / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((directory / "config.json").read_text())
    family.edit_config(config)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if family.tokenizer:
        fixture_tokenizers.write(family.tokenizer, directory, VOCABULARY)


def make(name: str) -> None:
    """One fixture. Its seed comes from its name, so that adding another changes nothing here."""
    family, directory = FAMILIES[name], ROOT / name
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

    model = getattr(transformers, family.architecture)(family.config()).eval()
    randomise(model, generator)
    model.tie_weights()
    save(family, model.to(family.dtype), directory)

    inputs = family.inputs(generator)
    expected = outputs(load_model(directory), inputs, family.extra_outputs)
    save_file(inputs | expected, directory / "case.safetensors", metadata={"seed": str(seed)})
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{name:28} {size / 1000:7.1f} kB  {len(expected)} outputs")


def write_versions() -> None:
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
        "numerics": "f32, eager attention, one thread",
    }
    (ROOT / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def compare(directory: Path, case: Path) -> dict[str, float]:
    """Loads a directory with transformers; how far each output is from that of a stored case."""
    stored = load_file(case)
    inputs = {name: value for name, value in stored.items() if not name.startswith("expected.")}
    routers = any(name.startswith("expected.router_logits") for name in stored)
    found = outputs(load_model(directory), inputs, MOE_OUTPUTS if routers else [])
    differences = {}
    for name, expected in sorted(stored.items()):
        if name.startswith("expected."):
            if name not in found:
                sys.exit(f"{directory}: transformers computes no {name}")
            differences[name] = (found[name] - expected).abs().max().item()
    return differences


def verify(directory: Path, case: Path) -> None:
    """Prints how far the outputs of a directory are from those of a case, and fails if too far."""
    differences = compare(directory, case)
    for name, difference in differences.items():
        print(f"{difference:12.3e}  {name}")
    worst = max(differences.values())
    print(f"largest difference {worst:.3e}, tolerance {TOLERANCE:.0e}")
    if not worst <= TOLERANCE:
        sys.exit(1)


def round_trip(copy: Path, names: list[str]) -> None:
    """Has each fixture loaded and saved by `copy FROM TO`, and loads that with transformers."""
    failed = False
    print(f"{'fixture':28} {'outputs':>7} {'largest difference':>20}")
    for name in names:
        with tempfile.TemporaryDirectory() as parent:
            saved = Path(parent) / "saved"
            subprocess.run([copy, ROOT / name, saved], check=True, stdout=subprocess.DEVNULL)
            differences = compare(saved, ROOT / name / "case.safetensors")
        worst = max(differences.values())
        failed |= not worst <= TOLERANCE
        print(f"{name:28} {len(differences):7} {worst:20.3e}")
    if failed:
        sys.exit(f"some are further than {TOLERANCE:.0e}")


# What leaves a shape that a config of the family can say.
STREAM = ["slicegpt-shared", "dotresize-shared", "coordinate-magnitude"]
HIDDEN = ["channel-magnitude", "modegpt", "lorap"]
MERGED = ["dotresize-hidden"]
HEADS = ["modegpt-heads"]
DEPTH = ["macro-influence", "fusegpt"]
NARROW = {
    "bert-masked-lm": HIDDEN + MERGED + DEPTH,
    "gpt2": HIDDEN + MERGED + DEPTH,
    "llama": STREAM + HIDDEN + MERGED + HEADS + DEPTH,
    "llama-tied": STREAM + HIDDEN + MERGED + HEADS,
    "mamba": DEPTH,
    "mamba2": DEPTH,
    "mistral": STREAM + HIDDEN + MERGED + HEADS + DEPTH,
    "mixtral": STREAM + HIDDEN + HEADS + DEPTH,
    "olmoe": HIDDEN + DEPTH,
    "opt": HIDDEN + MERGED + DEPTH,
    "opt-projected": HIDDEN + DEPTH,
    "qwen2": STREAM + HIDDEN + MERGED + DEPTH,
    "roberta-masked-lm": HIDDEN + DEPTH,
    "vit": HIDDEN + MERGED + DEPTH,
}


def narrow(program: Path, names: list[str]) -> None:
    """Has each fixture compressed by `narrow METHOD RATIO FROM TO`, and loads that with transformers."""
    failed = False
    print(f"{'fixture':20} {'method':22} {'saved as':12} {'largest difference':>20}")
    for name in names:
        for method in NARROW.get(name, []):
            ratio = "0.5" if method in DEPTH else "0.25"
            with tempfile.TemporaryDirectory() as parent:
                saved = Path(parent) / "saved"
                command = [program, method, ratio, ROOT / name, saved]
                form = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                stock = form.strip() == "HuggingFace"
                worst = float("inf")
                if stock:
                    worst = max(compare(saved, saved / "case.safetensors").values())
            failed |= not worst <= TOLERANCE
            print(f"{name:20} {method:22} {form.strip():12} {worst:20.3e}")
    if failed:
        sys.exit(f"some are not stock, or further than {TOLERANCE:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="fixtures to write (all)")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="a directory to load and compare")
    parser.add_argument("--case", type=Path, help="the case to compare with (DIR/case.safetensors)")
    parser.add_argument("--round-trip", type=Path, metavar="COPY", help="a program that loads and saves")
    parser.add_argument("--narrow", type=Path, metavar="NARROW", help="a program that compresses")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.verify:
        verify(arguments.verify, arguments.case or arguments.verify / "case.safetensors")
        return
    unknown = set(arguments.names) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; there are {', '.join(FAMILIES)}")
    names = arguments.names or list(FAMILIES)
    if arguments.round_trip:
        round_trip(arguments.round_trip, names)
        return
    if arguments.narrow:
        narrow(arguments.narrow, names)
        return
    for name in names:
        make(name)
    write_versions()


if __name__ == "__main__":
    main()
