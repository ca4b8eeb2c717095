"""Mechanisms of attention in PyTorch, between projections, written as their papers say them.

For `bench_mixers.py`; what has parameters of its own is in `layers_in_pytorch.py`.
"""

import functools

import torch
import torch.nn.functional as F

HEADS, WIDTH = 4, 64


def mechanisms(n):
    """By name, functions of queries, keys and values `[1, heads, n, width]`."""
    torch.manual_seed(0)
    scale = WIDTH**-0.5

    # Made where they are used: n² numbers weigh on nobody else.
    @functools.cache
    def causal():
        return torch.ones(n, n, dtype=torch.bool).tril()

    @functools.cache
    def distance():
        return (positions[:, None] - positions[None]).abs()

    stride = int(n**0.5)

    def masked(q, k, v, mask):
        scores = (q @ k.transpose(-1, -2)) * scale
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    def prefix(fq, fk, v):
        """Causal linear attention by cumulative sums of outer products."""
        sums = torch.einsum("bhnf,bhnd->bhnfd", fk, v).cumsum(2)
        return torch.einsum("bhnf,bhnfd->bhnd", fq, sums) / (fq * fk.cumsum(2)).sum(-1, keepdim=True)

    projection = torch.randn(min(128, n // 4), n) / n**0.5
    directions = torch.randn(WIDTH, 512)
    rotation = torch.randn(HEADS, WIDTH, max(n // 64, 2))
    positions = torch.arange(n)
    decay = torch.tensor([0.9, 0.95, 0.98, 0.995]).view(1, HEADS, 1, 1)

    def linformer(q, k, v):
        return ((q @ (projection @ k).transpose(-1, -2)) * scale).softmax(-1) @ (projection @ v)

    def lion(q, k, v):
        phi = lambda x: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.silu(x) + 0.5)
        weights = (phi(q) @ phi(k).transpose(-1, -2)) * decay**distance()
        return weights / weights.sum(-1, keepdim=True) @ v

    def lion_causal(q, k, v):
        # A selective decay has no shorter form than its mask.
        phi = lambda x: (lambda y: y / y.norm(dim=-1, keepdim=True))(F.silu(x) + 0.5)
        logs = F.logsigmoid(q.mean(-1)).cumsum(-1)
        mask = (logs[..., :, None] - logs[..., None, :]).masked_fill(~causal(), float("-inf")).exp()
        weights = (phi(q) @ phi(k).transpose(-1, -2)) * mask
        return weights / weights.sum(-1, keepdim=True) @ v

    def centred(x):
        x = x - x.mean(-1, keepdim=True)
        return x / x.norm(dim=-1, keepdim=True)

    def fastmax1(q, k, v):
        one = torch.ones(*q.shape[:-1], 1)
        return prefix(torch.cat([one, centred(q)], -1), torch.cat([one, centred(k)], -1), v)

    def fastmax2(q, k, v):
        s = centred(q) @ centred(k).transpose(-1, -2)
        weights = (1 + s + s * s / 2) * causal()
        return weights / weights.sum(-1, keepdim=True) @ v

    def kernelized(q, k, v):
        features = lambda x: (x * WIDTH**-0.25 @ directions - (x * x).sum(-1, keepdim=True) * WIDTH**-0.5).exp()
        return prefix(features(q), features(k), v)

    def sparse(q, k, v):
        near = distance() < stride
        far = distance() % stride == 0
        return masked(q, k, v, causal() & (near | far))

    def sparse_fixed(q, k, v):
        own = positions[:, None] // stride == positions[None] // stride
        columns = (positions % stride == stride - 1)[None]
        return masked(q, k, v, causal() & (own | columns))

    def reformer(q, k, v):
        k = F.normalize(q, dim=-1)
        outs, sums = [], []
        for _ in range(2):
            turned = torch.einsum("bhnd,hdr->bhnr", q, rotation)
            buckets = torch.cat([turned, -turned], -1).argmax(-1)
            mask = (buckets[..., :, None] == buckets[..., None, :]) & causal()
            scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9)
            scores = scores - 1e5 * torch.eye(n)
            total = scores.logsumexp(-1, keepdim=True)
            outs.append((scores - total).exp() @ v)
            sums.append(total)
        weights = torch.stack(sums).softmax(0)
        return sum(w * o for w, o in zip(weights, outs))

    def combiner(q, k, v):
        segments = n // stride
        cut = lambda x: x[:, :, : segments * stride].reshape(1, HEADS, segments, stride, WIDTH)
        q, k, v = cut(q), cut(k), cut(v)
        sq, sk = q.amax(3), k.amax(3)
        inner = (torch.einsum("bhsd,bhsjd->bhsj", sq, k) * scale).softmax(-1)
        sv = torch.einsum("bhsj,bhsjd->bhsd", inner, v)
        direct = torch.einsum("bhsid,bhsjd->bhsij", q, k) * scale
        direct = direct.masked_fill(~torch.ones(stride, stride, dtype=torch.bool).tril(), float("-inf"))
        spans = torch.einsum("bhsid,bhtd->bhsit", q, sk) * scale
        earlier = torch.ones(segments, segments, dtype=torch.bool).tril(-1)[None, None, :, None]
        spans = spans.masked_fill(~earlier, float("-inf"))
        weights = torch.cat([direct, spans], -1).softmax(-1)
        first, rest = weights.split([stride, segments], -1)
        return torch.einsum("bhsij,bhsjd->bhsid", first, v) + torch.einsum("bhsit,bhtd->bhsid", rest, sv)

    def sinkhorn(q, k, v):
        scores = (q @ k.transpose(-1, -2)) * scale
        for along in (-1, -2, -1):
            scores = scores - scores.logsumexp(along, keepdim=True)
        return scores.exp() @ v

    def circuit(q, k, v):
        """A unitary of as many rows as there are tokens, by one gate after the other; `|W|²` are the weights."""
        qubits = n.bit_length() - 1
        angles = 3 * qubits + 4 * (qubits - 1) * 4
        theta = 2 * torch.rand(angles, generator=torch.Generator().manual_seed(0)) - 1
        scores = (q @ k.transpose(-1, -2)).flatten(2)
        phi = theta * scores.repeat(1, 1, -(-angles // n**2))[..., :angles]
        left = iter(phi.unbind(-1))
        state = torch.eye(n, dtype=torch.complex64).expand(1, HEADS, n, n)

        def turn(state, axis, qubit):
            half = next(left) / 2
            c, s, zero = half.cos(), half.sin(), torch.zeros_like(half)
            real, imaginary = {
                "x": ([c, zero, zero, c], [zero, -s, -s, zero]),
                "y": ([c, -s, s, c], [zero] * 4),
                "z": ([c, zero, zero, c], [-s, zero, zero, s]),
            }[axis]
            gate = torch.complex(torch.stack(real, -1), torch.stack(imaginary, -1)).unflatten(-1, (2, 2))
            state = state.reshape(1, HEADS, 2**qubit, 2, -1, n)
            return torch.einsum("bhij,bhajcn->bhaicn", gate, state).reshape(1, HEADS, n, n)

        def controlled_not(state, qubit):
            control, target = 1 << (qubits - 1 - qubit), 1 << (qubits - 2 - qubit)
            return state[:, :, torch.where(positions & control > 0, positions ^ target, positions)]

        for qubit in range(qubits):
            for axis in "zyz":
                state = turn(state, axis, qubit)
        for _ in range(4):
            for qubit in [*range(0, qubits - 1, 2), *range(1, qubits - 1, 2)]:
                state = controlled_not(state, qubit)
                state = turn(turn(state, "x", qubit), "z", qubit + 1)
                state = controlled_not(state, qubit)
                state = turn(turn(state, "y", qubit), "y", qubit + 1)
        return (state.real**2 + state.imag**2).transpose(-1, -2) @ v

    def topological(q, k, v):
        s = distance() / n
        weights = (q.relu() @ k.relu().transpose(-1, -2)) * (0.0 + 0.0 * s + 0.0 * s * s).exp()
        return weights / weights.sum(-1, keepdim=True) @ v

    def subsampled(q, k, v):
        kept = torch.randperm(n)[: n // 4]
        return F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept])

    def subsampled_local(q, k, v):
        # Windows of an eighth, each with the one before, over locally shuffled keys.
        order = (positions + n / 8 * (2 * torch.rand(n) - 1)).argsort()
        window = n // 8
        near = (positions[:, None] // window - positions[None] // window).abs() <= 1
        near = near & (positions[:, None] // window >= positions[None] // window)
        own = torch.eye(n, dtype=torch.bool)
        mask = torch.zeros(n, n, dtype=torch.bool)
        mask[:, order] = near
        return masked(q, k, v, (mask & causal()) | own)

    def soft(q, k, v):
        m = 64
        q = q * WIDTH**-0.25
        points = q.unflatten(2, (m, n // m)).mean(3)
        gauss = lambda a, b: (-torch.cdist(a, b) ** 2 / 2).exp()
        inner, rows = gauss(points, points), gauss(q, points)
        with torch.no_grad():
            raised = inner + 0.01 * torch.eye(m)
            y = 1.8 / inner.sum(-1).amax(-1)[..., None, None] ** 2 * raised
            for _ in range(20):
                y = 2 * y - y @ raised @ y
        y = y - y @ (inner - inner.detach()) @ y
        degrees = inner.sum(-1) ** -0.5
        middle = degrees[..., :, None] * y * degrees[..., None, :]
        return rows @ (middle @ (rows.transpose(-1, -2) @ v))

    bits = 16
    anchors = F.normalize(torch.randn(1, HEADS, 25, WIDTH), dim=-1)
    hashes = torch.randn(1, HEADS, 25, bits)

    def codes(q):
        distances = torch.cdist(F.normalize(q, dim=-1), anchors) ** 2
        kernels = (-distances / (2 * distances.mean((2, 3), keepdim=True))).exp()
        x = (kernels - 0.6065) @ hashes
        passed = x * (x.detach().abs() < 1)
        return torch.where(x >= 0, 1.0, -1.0) + passed - passed.detach()

    def ecoformer(q, k, v):
        b = codes(q)
        sums = b @ (b.transpose(-1, -2) @ v) + (bits + 1) * v.sum(2, keepdim=True)
        return sums / ((b * b.sum(2, keepdim=True)).sum(-1, keepdim=True) + n * (bits + 1))

    def ecoformer_causal(q, k, v):
        b, one = codes(q), torch.ones(*q.shape[:-1], 1)
        return prefix(torch.cat([b, (bits + 1) * one], -1), torch.cat([b, one], -1), v)

    def coarse_and_fine(q, k, v, causal):
        # The chosen blocks are gathered; what is coarse is a softmax over means.
        block, blocks = 32, n // 32
        cut = lambda x: x.unflatten(2, (blocks, block))
        qs, ks, vs = cut(q), cut(k), cut(v)
        heads = qs[:, :, :, 0] if causal else qs.mean(3)
        low = heads @ ks.mean(3).transpose(-1, -2) * scale
        before = torch.ones(blocks, blocks, dtype=torch.bool).tril() if causal else torch.ones(blocks, blocks, dtype=torch.bool)
        low = low.masked_fill(~before, float("-inf"))
        with torch.no_grad():
            values = low - low.amax(-1, keepdim=True)
            if causal:
                values = values.masked_fill(torch.eye(blocks, dtype=torch.bool), 1e4)
                picked = values.topk(min(4, blocks)).indices
                high = torch.zeros_like(low, dtype=torch.bool).scatter(-1, picked, True) & before
            else:
                picked = values.flatten(2).topk(4 * blocks).indices
                high = torch.zeros_like(low, dtype=torch.bool).flatten(2).scatter(-1, picked, True).view_as(low)
        b, h, x, y = high.nonzero(as_tuple=True)
        fine = torch.einsum("cid,cjd->cij", qs[b, h, x], ks[b, h, y]) * scale
        if causal:
            later = ~torch.ones(block, block, dtype=torch.bool).tril()
            fine = fine.masked_fill((x == y)[:, None, None] & later, float("-inf"))
        rows = (b * HEADS + h) * blocks + x
        left = low.masked_fill(high, float("-inf"))
        # One maximum for every row of blocks is enough here.
        most = torch.full((HEADS * blocks,), float("-inf"))
        most = most.scatter_reduce(0, rows, fine.detach().amax((1, 2)), "amax")
        most = torch.maximum(most, left.detach().amax(-1).flatten())
        weights = (fine - most[rows][:, None, None]).exp()
        sums = torch.zeros(HEADS * blocks, block, WIDTH).index_add(0, rows, weights @ vs[b, h, y])
        total = torch.zeros(HEADS * blocks, block).index_add(0, rows, weights.sum(-1))
        others = (left.flatten(0, 2) - most[:, None]).exp() * block
        means = vs.mean(3).squeeze(0).repeat_interleave(blocks, 0)
        sums = sums + torch.einsum("ry,ryd->rd", others, means)[:, None]
        total = total + others.sum(-1)[:, None]
        return (sums / total[..., None]).view(1, HEADS, n, WIDTH)

    low = torch.tensor(
        [0.23037781, 0.71484657, 0.63088077, -0.02798377, -0.18703481, 0.03084138, 0.03288301, -0.01059740]
    )
    high = low.flip(0) * torch.tensor([-1.0, 1.0] * 4)
    bank = torch.stack([low, high]).repeat(HEADS * WIDTH, 1)[:, None]

    def wavelets(q, k, v):
        """Attention in the averages and in the details of every channel, on a circle."""

        def analyse(x):
            x = x.transpose(2, 3).reshape(1, HEADS * WIDTH, n)
            y = F.conv1d(F.pad(x, (0, 7), mode="circular")[..., : n + 6], bank, stride=2, groups=HEADS * WIDTH)
            y = y.view(1, HEADS, WIDTH, 2, n // 2)
            return [y[:, :, :, band].transpose(2, 3) for band in (0, 1)]

        bands = zip(analyse(q), analyse(k), analyse(v))
        mixed = [F.scaled_dot_product_attention(q, k, v).transpose(2, 3) for q, k, v in bands]
        mixed = torch.stack(mixed, 3).reshape(1, 2 * HEADS * WIDTH, n // 2)
        y = F.conv_transpose1d(mixed, bank, stride=2, groups=HEADS * WIDTH)
        y = torch.cat([y[..., :6] + y[..., n:], y[..., 6:n]], -1)
        return y.view(1, HEADS, WIDTH, n).transpose(2, 3)

    return {
        "softmax": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "softmax, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "linformer, up to 128 slots": linformer,
        "lion, constant decay": lion,
        "lion, selective decay, causal": lion_causal,
        "fastmax of degree 1": fastmax1,
        "fastmax of degree 2": fastmax2,
        "kernelized, positive features": kernelized,
        "sparse, strided by the root": sparse,
        "sparse, fixed by the root": sparse_fixed,
        "reformer, 2 rounds of chunks of 64": reformer,
        "combiner, segments of the root": combiner,
        "doubly stochastic, sinkhorn": sinkhorn,
        "doubly stochastic, circuit": circuit,
        "topological, on a path": topological,
        "subsampled, a quarter of the keys": subsampled,
        "subsampled, local, causal": subsampled_local,
        "soft, 64 landmarks": soft,
        "ecoformer, 16 bits": ecoformer,
        "ecoformer, 16 bits, causal": ecoformer_causal,
        "mra, 4 blocks of 32 in a row": lambda q, k, v: coarse_and_fine(q, k, v, False),
        "mra, 4 blocks of 32 in a row, causal": lambda q, k, v: coarse_and_fine(q, k, v, True),
        "wavelets, softmax in two bands": wavelets,
    }
