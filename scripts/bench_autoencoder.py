"""Trains a sparse autoencoder in PyTorch and here, on the same work, and prints the ratio.

The peer is straightforward PyTorch in f32: the loss by autograd, the decoder's gradient projected,
`torch.optim.Adam`, rows normalised, activations streamed from a GPT-2-like model of the same shape
through a shuffled buffer of 16 batches. The same is done by `lapidary inspect sae-train` on a
checkpoint that this script writes. Both stream: nothing is stored on disk.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python scripts/bench_autoencoder.py --lapidary target/release/lapidary
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lapidary", required=True)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


VOCABULARY = 256


def make_model(options, directory):
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=options.window,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    # Activations of a random model with default deviations are tiny: make them count.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return model


class Buffer:
    """Shuffled activations, refilled when half used."""

    def __init__(self, model, options, text):
        self.model, self.options = model, options
        self.windows = text[: len(text) // options.window * options.window].view(-1, options.window)
        self.next_window, self.capacity = 0, 16 * options.batch
        self.store = torch.empty(0, options.width)
        self.captured = None
        attention = model.transformer.h[options.layer].attn
        attention.c_proj.register_forward_pre_hook(self.capture)

    def capture(self, _, inputs):
        self.captured = inputs[0]

    @torch.no_grad()
    def refill(self):
        parts, count = [self.store], len(self.store)
        while count < self.capacity:
            rows = torch.arange(self.next_window, self.next_window + 16) % len(self.windows)
            self.next_window += 16
            self.model.transformer(self.windows[rows])
            parts.append(self.captured.reshape(-1, self.options.width))
            count += len(parts[-1])
        store = torch.cat(parts)
        self.store = store[torch.randperm(len(store))]

    def batch(self):
        if len(self.store) <= self.capacity // 2:
            self.refill()
        batch, self.store = self.store[: self.options.batch], self.store[self.options.batch :]
        return batch


def train(model, options, text):
    n, m = options.width, options.width * options.expansion
    # Layers after the site are not needed.
    model.transformer.h = model.transformer.h[: options.layer + 1]
    encoder = torch.nn.Parameter(torch.nn.init.kaiming_uniform_(torch.empty(n, m)))
    decoder = torch.nn.init.kaiming_uniform_(torch.empty(m, n))
    decoder = torch.nn.Parameter(decoder / decoder.norm(dim=-1, keepdim=True))
    encoder_bias = torch.nn.Parameter(torch.zeros(m))
    decoder_bias = torch.nn.Parameter(torch.zeros(n))
    parameters = [encoder, encoder_bias, decoder, decoder_bias]
    optimiser = torch.optim.Adam(parameters, lr=1.2e-3, betas=(0.0, 0.9999))
    buffer = Buffer(model, options, text)
    warm_up = options.steps // 20
    started, active = time.perf_counter(), []
    for step in range(options.steps):
        x = buffer.batch()
        features = torch.relu((x - decoder_bias) @ encoder + encoder_bias)
        reconstruction = features @ decoder + decoder_bias
        loss = (reconstruction - x).pow(2).sum(-1).mean()
        loss = loss + options.sparsity * features.abs().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            rows = decoder / decoder.norm(dim=-1, keepdim=True)
            decoder.grad -= (decoder.grad * rows).sum(-1, keepdim=True) * rows
        rate = 1.2e-3 if step >= warm_up else 1.2e-4 + 1.08e-3 * step / max(warm_up, 1)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=-1, keepdim=True)
            active.append((features > 0).float().sum(-1).mean().item())
    seconds = time.perf_counter() - started
    return options.steps * options.batch / seconds, active


def main():
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        model = make_model(options, directory / "model")
        generator = torch.Generator().manual_seed(0)
        words = ["the", "of", "and", "a", "heads", "see", "tokens", "again", "before", "where"]
        picks = torch.randint(len(words), (200_000,), generator=generator).tolist()
        text = " ".join(words[pick] for pick in picks)
        (directory / "text").write_text(text)
        alphabet = {chr(code): code for code in range(256)}
        ids = torch.tensor([alphabet[c] for c in text[:1_000_000]])
        load = os.getloadavg()[0]
        theirs, their_active = train(model, options, ids)
        command = [options.lapidary, "inspect", "sae-train", str(directory / "model")]
        command += ["--text", str(directory / "text"), "--out", str(directory / "sae")]
        for name in ("layer", "expansion", "batch", "steps", "window", "sparsity"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--resample-every", str(options.steps + 1)]
        command += ["--threads", str(options.threads), "--json"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    rows = {row[0]: row[1] for row in found["tables"][0]["rows"]}
    ours = rows["tokens per second"]
    print(
        json.dumps(
            {
                "width": options.width,
                "features": options.width * options.expansion,
                "batch": options.batch,
                "steps": options.steps,
                "threads": options.threads,
                "load_before": load,
                "load_after": os.getloadavg()[0],
                "pytorch_tokens_per_second": round(theirs),
                "lapidary_tokens_per_second": round(ours),
                "ratio": round(ours / theirs, 2),
                "pytorch_active_at_end": round(their_active[-1], 1),
                "lapidary_active_at_end": round(rows["active features per token (L0)"], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
