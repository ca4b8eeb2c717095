"""What `transformers` makes of text, of logits and of an empty config: golden values for
tokenizers, sampling and the defaults of every family.

    python tests/oracles/text.py        write tests/fixtures/text/
"""

import json
from pathlib import Path

import torch
import transformers
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TEXTS = [
    "the cat sees the dogs",
    "The stone, cut along its planes.",
    "  spaces   and\ttabs ",
    "naïve unknown words 123!",
    "a",
]
TOKENIZERS = {
    "gpt2": transformers.GPT2Tokenizer,
    "gpt2-old-names": transformers.GPT2Tokenizer,
    "bert": transformers.BertTokenizer,
    "bert-masked-lm-old-names": transformers.BertTokenizer,
}


def tokenization() -> dict:
    """Per fixture directory: ids, pair ids with types, and the decoded text."""
    cases = {}
    for name, tokenizer_class in TOKENIZERS.items():
        tokenizer = tokenizer_class.from_pretrained(FIXTURES / "families" / name)
        singles = [tokenizer(text)["input_ids"] for text in TEXTS]
        pair = tokenizer(TEXTS[0], TEXTS[1], return_token_type_ids=True)
        cases[name] = {
            "texts": TEXTS,
            "ids": singles,
            "pair_ids": pair["input_ids"],
            "pair_types": pair["token_type_ids"],
            "decoded": [
                tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for ids in singles
            ],
        }
    return cases


CONFIGS = [
    "GPT2", "OPT", "Llama", "Mistral", "Qwen2", "Mixtral", "Olmoe", "Bert", "Roberta", "ViT", "DeiT",
    "CLIP", "Mamba", "Mamba2", "Albert",
]  # fmt: skip
NOT_OF_THE_MODEL = {
    "transformers_version", "_name_or_path", "return_dict", "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "is_encoder_decoder", "problem_type",
}  # fmt: skip


def config_defaults() -> dict:
    """The fields of each family's config when config.json says nothing, by model_type."""
    defaults = {}
    for name in CONFIGS:
        fields = getattr(transformers, f"{name}Config")().to_dict()
        kept = {key: finite_or_named(value) for key, value in fields.items() if key not in NOT_OF_THE_MODEL}
        defaults[fields["model_type"]] = kept
    return defaults


def finite_or_named(value):
    """As transformers writes numbers that JSON has no word for."""
    if isinstance(value, (list, tuple)):
        return [finite_or_named(item) for item in value]
    return {"__float__": "Infinity"} if value == float("inf") else value


def sampling() -> dict:
    """Logits before and after each processor; a removed token is null (minus infinity)."""
    generator = torch.Generator().manual_seed(20)
    logits = torch.randn(3, 12, generator=generator) * 2
    history = torch.tensor([[0, 3, 3, 7], [1, 2, 11, 5], [4, 4, 4, 4]])
    processors = {
        "temperature 0.7": TemperatureLogitsWarper(0.7),
        "top_k 1": TopKLogitsWarper(1),
        "top_k 4": TopKLogitsWarper(4),
        "top_k 50": TopKLogitsWarper(50),
        "top_p 0.1": TopPLogitsWarper(0.1),
        "top_p 0.6": TopPLogitsWarper(0.6),
        "top_p 0.95": TopPLogitsWarper(0.95),
        "repetition_penalty 1.3": RepetitionPenaltyLogitsProcessor(1.3),
        "repetition_penalty 0.8": RepetitionPenaltyLogitsProcessor(0.8),
    }
    return {
        "logits": logits.tolist(),
        "history": history.tolist(),
        "processed": {
            name: finite(processor(history, logits.clone())) for name, processor in processors.items()
        },
    }


def finite(rows: torch.Tensor) -> list:
    return [[value if value > float("-inf") else None for value in row] for row in rows.tolist()]


def main() -> None:
    directory = FIXTURES / "text"
    directory.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    contents = {
        "tokenization": tokenization(),
        "sampling": sampling(),
        "config_defaults": config_defaults(),
    }
    for name, content in contents.items():
        text = json.dumps({"versions": versions} | content, ensure_ascii=False)
        (directory / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
