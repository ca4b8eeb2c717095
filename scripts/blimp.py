#!/usr/bin/env python3
"""Splits minimal pairs with known evidence into text to train on and a data set to explain.

    python3 scripts/blimp.py DIRECTORY OUT

reads the CSV files of BLiMP with targets (columns one_prefix_prefix, one_prefix_word_good,
one_prefix_word_bad, target, and the good sentence) and writes `train.txt`, the good sentences of
four rows in five, and `held-out.csv`, the others as prefix, target, foil and evidence.
"""

import csv
import random
import re
import sys
from pathlib import Path


def spaced(text):
    """Punctuation as words of its own, as a word-level tokenizer wants it."""
    return re.sub(r"([.,?!])", r" \1", text.strip())


def main(directory, out):
    sentences, held_out = [], []
    for path in sorted(Path(directory).glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        split = len(rows) * 4 // 5
        good = next(name for name in rows[0] if name.lower() == "sentence_good")
        sentences += [spaced(row[good]) for row in rows[:split]]
        held_out += [
            (spaced(row["one_prefix_prefix"]), row["one_prefix_word_good"], row["one_prefix_word_bad"], row["target"])
            for row in rows[split:]
        ]
    random.Random(0).shuffle(sentences)
    random.Random(1).shuffle(held_out)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    with open(out / "held-out.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prefix", "target", "foil", "evidence"])
        writer.writerows(held_out)
    print(f"{len(sentences)} sentences to train on, {len(held_out)} examples held out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
