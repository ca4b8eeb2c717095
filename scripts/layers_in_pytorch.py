"""Biases of scores, attention with its projections and whole blocks in PyTorch, as their papers say them.

For `bench_mixers.py`; mechanisms between projections are in `mixers_in_pytorch.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mixers_in_pytorch import HEADS, WIDTH

FEATURES = HEADS * WIDTH


class Biased(nn.Module):
    """Causal softmax with `bias() [heads, n, n]` added to the scores, made anew in each pass."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def distance(self):
        positions = torch.arange(self.n)
        return (positions[:, None] - positions[None]).clamp(min=0)

    def forward(self, q, k, v):
        later = torch.ones(self.n, self.n, dtype=torch.bool).triu(1)
        mask = self.bias().masked_fill(later, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Fire(Biased):
    def __init__(self, n):
        super().__init__(n)
        self.network = nn.Sequential(
            nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, HEADS)
        )
        self.stretch = nn.Parameter(torch.tensor(0.1))
        self.length = nn.Parameter(torch.tensor(1.0))

    def bias(self):
        log = lambda x: ((self.stretch * x).abs() + 1).log()
        farthest = torch.maximum(torch.arange(self.n).float(), (512 * self.length).abs())
        relative = log(self.distance()) / (log(farthest)[:, None] + 1e-6)
        return self.network(relative[..., None]).permute(2, 0, 1)


class Alibi(Biased):
    def bias(self):
        slopes = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
        return -slopes[:, None, None] * self.distance()


class Buckets(Biased):
    """T5's: half of 32 buckets for a distance each, the others by its logarithm up to 128."""

    def __init__(self, n):
        super().__init__(n)
        self.table = nn.Embedding(32, HEADS)

    def bias(self):
        distance = self.distance()
        far = 16 + (distance.clamp(min=1) / 16).log() / math.log(128 / 16) * 16
        bucket = torch.where(distance < 16, distance, far.long().clamp(max=31))
        return self.table(bucket).permute(2, 0, 1)


class Kerple(Biased):
    def __init__(self, n):
        super().__init__(n)
        self.first, self.second = (nn.Parameter(torch.rand(HEADS, 1, 1)) for _ in range(2))

    def bias(self):
        return -F.softplus(self.first) * (1 + F.softplus(self.second) * self.distance()).log()


class Sandwich(Biased):
    def bias(self):
        angles = torch.arange(self.n)[:, None] / 10000 ** (torch.arange(64) / 64)
        table = torch.cat([angles.sin(), angles.cos()], -1)
        return (table @ table.T).expand(HEADS, -1, -1)


def split(x):
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Of `x` over itself or over a memory; `bias` is one of keys."""

    def __init__(self, n=None):
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(FEATURES, FEATURES) for _ in range(4))

    def forward(self, x, memory=None, bias=None):
        memory = x if memory is None else memory
        q, k, v = split(self.query(x)), split(self.key(memory)), split(self.value(memory))
        return self.output(merged(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class SubspaceAttention(nn.Module):
    """CRATE's: one projection is queries, keys and values."""

    def __init__(self, n):
        super().__init__()
        self.subspaces = nn.Linear(FEATURES, FEATURES, bias=False)
        self.output = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        w = split(self.subspaces(x))
        weights = (w @ w.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
        return self.output(merged(weights @ w))


class Block(nn.Module):
    def __init__(self, n=None):
        super().__init__()
        self.first, self.second = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.attention = Attention()
        self.feedforward = nn.Sequential(
            nn.Linear(FEATURES, 4 * FEATURES), nn.GELU(), nn.Linear(4 * FEATURES, FEATURES)
        )

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.feedforward(self.second(x))


class Exchange(nn.Module):
    """What one side reads of the other."""

    def __init__(self):
        super().__init__()
        self.own, self.other, self.attention = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES), Attention()

    def forward(self, x, memory):
        return x + self.attention(self.own(x), self.other(memory))


class FitBlock(nn.Module):
    """A local block on groups of 64, a read by 4 latents of each, a global block on all latents, a write."""

    def __init__(self, n):
        super().__init__()
        self.group = min(64, n)
        self.positions = nn.Parameter(0.02 * torch.randn(self.group, FEATURES))
        self.latents = nn.Parameter(0.02 * torch.randn(n // self.group, 4, FEATURES))
        self.around, self.across = Block(), Block()
        self.read, self.write = Exchange(), Exchange()

    def forward(self, x):
        groups = x.unflatten(1, (-1, self.group)).squeeze(0)
        groups = self.around(groups + self.positions)
        latents = self.read(self.latents, groups)
        latents = self.across(latents.flatten(0, 1)[None]).squeeze(0).unflatten(0, (-1, 4))
        return self.write(groups, latents).flatten(0, 1)[None]


class VccBlock(nn.Module):
    """16 VIP tokens and blocks of 16, of which the 8 that these look at most are seen in full."""

    VIPS, SIZE, FINE = 16, 16, 8

    def __init__(self, n):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        block, attention = self.block, self.block.attention
        vips, others = x[:, : self.VIPS], x[:, self.VIPS :].unflatten(1, (-1, self.SIZE))
        means = others.mean(2)
        differences = means[:, :, None] - others
        blocks = means.shape[1]

        # How much VIPs look at each block.
        q, k = split(attention.query(block.first(vips))), split(attention.key(block.first(means)))
        share = (q @ k.transpose(-1, -2) * WIDTH**-0.5).softmax(-1).mean((0, 1, 2))
        with torch.no_grad():
            ranking = share.argsort(descending=True)
            fine, coarse = (ranking[: self.FINE].sort().values, ranking[self.FINE :].sort().values)
        moved = share - share.detach()
        weights = torch.cat(
            [(1 + moved[fine]).repeat_interleave(self.SIZE), 1 - moved[coarse], torch.ones(self.VIPS)]
        )
        counts = torch.ones(len(weights))
        counts[len(fine) * self.SIZE : -self.VIPS] = self.SIZE

        # Refine, and see: a mean counts as often as it has tokens.
        seen = (means[:, fine, None] - differences[:, fine]).flatten(1, 2)
        seen = torch.cat([seen, means[:, coarse], vips], 1)
        h = attention(block.first(seen), bias=(weights.log() + counts.log())[None, None, None])
        h = h + block.feedforward(block.second(seen + h))
        seen = seen + h * weights[:, None]

        # Write back: differences of coarse blocks stay.
        tokens, coarse_means, vips = seen.split([len(fine) * self.SIZE, len(coarse), self.VIPS], 1)
        tokens = tokens.unflatten(1, (-1, self.SIZE))
        fine_means = tokens.mean(2)
        means = torch.zeros(1, blocks, FEATURES).index_copy(1, fine, fine_means).index_copy(1, coarse, coarse_means)
        differences = differences.index_copy(1, fine, fine_means[:, :, None] - tokens)
        return torch.cat([vips, (means[:, :, None] - differences).flatten(1, 2)], 1)


# Given queries, keys and values.
BIASES = {
    "fire, causal": Fire,
    "alibi, causal": Alibi,
    "relative buckets, causal": Buckets,
    "kerple, logarithmic, causal": Kerple,
    "sandwich, causal": Sandwich,
}

# Given tokens.
OF_TOKENS = {
    "softmax, with projections": Attention,
    "crate, subspace attention": SubspaceAttention,
    "softmax block": Block,
    "fit block, 4 latents of 64 tokens": FitBlock,
    "vcc block, 8 of 16 tokens in full": VccBlock,
}
