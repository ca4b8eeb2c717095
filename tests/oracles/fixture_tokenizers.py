"""Tiny tokenizers for the fixtures, each of exactly the vocabulary size of its model."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.normalizers import BertNormalizer

SENTENCES = [
    "the cat near the dogs sees the bird and the birds see the cats",
    "a stone is cut along its natural planes and each facet is shown",
    "what the model says is split into the contributions of its parts",
    "the birds that the cat sees are singing near the old stone house",
]
PRINTABLE = [chr(code) for code in range(33, 127)] + ["Ġ"]


def byte_level(size: int) -> Tokenizer:
    """Byte-level BPE over printable ASCII with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=PRINTABLE, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def word_piece(size: int) -> Tokenizer:
    """BERT's tokenizer: lower case, WordPiece, [CLS] ... [SEP] ... [SEP].

    The vocabulary is listed, not trained: the WordPiece trainer's choice among equals varies.
    """
    letters = sorted(set("".join(SENTENCES)) - {" "})
    suffixes = [f"##{suffix}" for suffix in letters + ["ing", "ed", "ly", "ion"]]
    words = sorted({word for sentence in SENTENCES for word in sentence.split() if len(word) > 1})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = (special + letters + suffixes + words)[:size]
    tokens += [f"[unused{index}]" for index in range(size - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer


def write(kind: str, directory: Path, size: int) -> None:
    """`kind` with `_files` at its end writes the older files in place of tokenizer.json."""
    tokenizer = {"byte_level": byte_level, "word_piece": word_piece}[kind.removesuffix("_files")](size)
    if tokenizer.get_vocab_size() > size:
        raise ValueError(f"{kind}: {tokenizer.get_vocab_size()} tokens for a vocabulary of {size}")
    if not kind.endswith("_files"):
        tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    elif kind == "word_piece_files":
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
        (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    else:
        tokenizer.model.save(str(directory))
    write_settings(kind, directory)


def write_settings(kind: str, directory: Path) -> None:
    if kind.startswith("byte_level"):
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64} | tokens
    else:
        settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64, "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
