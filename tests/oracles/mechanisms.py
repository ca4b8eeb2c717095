"""Golden values for mechanisms of attention and biases of positions, in NumPy alone.

Each is written as its equations say it, pair by pair, on the real tokens of each head of each sequence: weights
are laid out, decays multiplied one by one, blocks and spans listed. Nothing is shared with the program under
test but the parameters. What is compared are the heads' mixed values, before the output.

    python tests/oracles/mechanisms.py crates/parts/tests/fixtures/mechanisms.json

Made with NumPy 2, seed 66.
"""

import itertools
import json
import sys

import numpy as np

WIDTH, HEADS, LENGTH = 6, 2, 11
HEAD = WIDTH // HEADS


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def rows(weights, v):
    """Rows of weights over their sum; nothing where the sum is nothing."""
    total = weights.sum(1, keepdims=True)
    return np.divide(weights @ v, total, out=np.zeros((len(weights), v.shape[1])), where=total != 0)


# Each takes the queries, keys, values and tokens of one head of one sequence, that head's number, its
# parameters, what the spec says, and whether it is causal.


def lion(q, k, v, x, head, p, spec, causal):
    n, decay = len(q), spec["decay"]
    silu = lambda z: z * sigmoid(z)
    if decay == "none":
        q, k = (np.where(z > 0, z + 1, np.exp(np.minimum(z, 0))) for z in (q, k))
    else:
        q, k = (silu(z) + 0.5 for z in (q, k))
        q, k = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (q, k))
    features = HEAD if spec.get("per_feature") else 1
    orders = [list(range(n))]
    if "image" in spec:
        orders = [curve(n, spec["image"]["columns"], name) for name in spec["image"]["curves"]]
    weights = np.zeros((n, n))
    for number, order in enumerate(orders):
        at = (number * HEADS + head) * features
        if decay == "none":
            factors = np.ones((n, features))
        elif decay == "constant":
            factors = np.tile(sigmoid(p["decay"].ravel()[at : at + features]), (n, 1))
        else:
            rates = x @ p["decay.weight"].T + p["decay.bias"]
            factors = (1 - sigmoid(rates))[:, at : at + features]
        if spec.get("class_token"):
            factors[0] = 1
        place = np.argsort(order)
        for i, j in itertools.product(range(n), repeat=2):
            a, b = place[i], place[j]
            between = order[b:a] if a > b else order[a + 1 : b + 1]
            mask = np.prod(factors[between], axis=0) / len(orders)
            weights[i, j] += np.sum(q[i] * k[j] * mask)
    if causal:
        weights = np.tril(weights)
    return weights @ v / (weights.sum(1, keepdims=True) + 1e-6)


def curve(n, columns, name):
    down, across = range(-(-n // columns)), range(columns)
    turned = lambda line, cells: list(cells)[:: 1 if line % 2 == 0 else -1]
    if name == "rows":
        cells = [(r, c) for r in down for c in turned(r, across)]
    else:
        cells = [(r, c) for c in across for r in turned(c, down)]
    return [r * columns + c for r, c in cells if r * columns + c < n]


def fastmax(q, k, v, x, head, p, spec, causal):
    kind = spec["normalisation"]["kind"]
    if kind == "token":
        q, k = (z - z.mean(1, keepdims=True) for z in (q, k))
        q, k = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (q, k))
    elif kind == "max":
        q, k = (z / np.linalg.norm(z, axis=1).max() for z in (q, k))
    s = q @ k.T / (np.sqrt(HEAD) if kind == "none" else 1)
    weights = 1 + s + (s**2 / 2 if spec["degree"] == 2 else 0)
    return rows(np.tril(weights) if causal else weights, v)


def topological(q, k, v, x, head, p, spec, causal):
    columns, n = spec.get("columns", 1), len(q)

    def distance(i, j):
        """Along the first row, and along columns from there."""
        (a, b), (c, d) = divmod(i, columns), divmod(j, columns)
        return abs(a - c) if b == d else a + c + abs(b - d)

    s = np.array([[distance(i, j) for j in range(n)] for i in range(n)]) / spec["unit"]
    a = p["mask"][head % len(p["mask"])]
    z = a[0] + a[1] * s + a[2] * s**2
    mask = {"exponential": np.exp(z), "identity": 1 + z, "inverse-quadratic": 2 / (1 + (1 + z) ** 2)}
    feature = {"relu": lambda y: np.maximum(y, 0), "square": np.square}[spec["features"]["kind"]]
    return rows(mask[spec["mask"]] * (feature(q) @ feature(k).T), v)


def ecoformer(q, k, v, x, head, p, spec, causal):
    bits = spec["bits"]
    unit = q / np.linalg.norm(q, axis=1, keepdims=True)
    squares = ((unit[:, None] - p["anchors"][head][None]) ** 2).sum(2)
    width = p["bandwidths"][head] if spec["bandwidth"] == "fitted" else squares.mean()
    kernels = np.exp(-squares / (2 * width)) - p["means"][head]
    codes = np.where(kernels @ p["hashes"][head].T >= 0, 1, -1)
    alike = codes @ codes.T
    if spec.get("released"):
        total = (alike + bits + 1).sum(1, keepdims=True)
        return (alike @ v + (bits + 1) * v) / total
    weights = alike + bits + 1
    return rows(np.tril(weights) if causal else weights, v)


def mra(q, k, v, x, head, p, spec, causal):
    n, sizes = len(q), spec["scales"]
    cut = lambda z, size: [z[i : i + size] for i in range(0, n, size)]
    logits = np.full((n, n), -np.inf)
    for level, size in enumerate(sizes):
        mean_q = np.array([block[0] if causal else block.mean(0) for block in cut(q, size)])
        mean_k = np.array([block.mean(0) for block in cut(k, size)])
        scores, count = mean_q @ mean_k.T / np.sqrt(HEAD), len(mean_q)
        if level == 0:
            square = itertools.product(range(count), repeat=2)
            there = [(a, b) for a, b in square if b <= a or not causal]
            most = [max(scores[a, b] for a, b in there if a == row) for row in range(count)]
        refined = []
        if level + 1 < len(sizes):
            worth = {
                (a, b): np.inf if causal and a == b else scores[a, b] - most[a * size // sizes[0]]
                for a, b in there
            }
            best = lambda some, count: sorted(some, key=lambda pair: -worth[pair])[:count]
            each = spec["per_row"][level]
            if causal:
                by_row = [[pair for pair in there if pair[0] == row] for row in range(count)]
                refined = [pair for some in by_row for pair in best(some, each)]
            else:
                refined = best(there, each * count)
        for a, b in there:
            left_out = spec.get("sparse") and level + 1 < len(sizes)
            if (a, b) not in refined and not left_out:
                logits[a * size : (a + 1) * size, b * size : (b + 1) * size] = scores[a, b]
        if level + 1 < len(sizes):
            parts, last = size // sizes[level + 1], -(-n // sizes[level + 1])
            inside = lambda a: range(a * parts, min(last, (a + 1) * parts))
            pairs = [pair for a, b in refined for pair in itertools.product(inside(a), inside(b))]
            there = [(a, b) for a, b in pairs if b <= a or not causal]
    seen = np.isfinite(logits)
    return rows(np.where(seen, np.exp(logits), 0), v)


def divisions(form, n, i, causal):
    """Tokens that are met directly and spans, each with the token that sums it up or none, of each division."""
    kind, m = form["kind"], form.get("segment", form.get("columns", 1))
    if kind == "fixed":
        starts = range(0, n, m)
        spans = [list(range(a, min(n, a + m))) for a in starts]
        own = spans.pop(i // m)
        if causal:
            own, spans = [j for j in own if j <= i], spans[: i // m]
        return [(own, [(span, None) for span in spans])]
    if kind == "log-sparse":

        def before(i):
            levels = [level for level in range(i.bit_length()) if i >> level & 1]
            starts = [((i >> level) - 1 << level, 1 << level) for level in levels]
            return [list(range(start, start + size)) for start, size in starts]

        behind = [] if causal else [[n - 1 - j for j in span] for span in before(n - 1 - i)]
        return [([i], [(span, None) for span in before(i) + behind])]
    row, column = divmod(i, m)
    earlier = [list(range(r * m, (r + 1) * m)) for r in range(row)]
    if kind == "row-major":
        own = list(range(row * m, i + 1))
        return [(own, [(span, span[column]) for span in earlier])]
    direct = [span[column] for span in earlier] + list(range(row * m, i + 1))
    others = [c for c in range(m) if c != column]
    vertical = [([span[c] for span in earlier], None) for c in others if row]
    sides = [side for span in earlier for side in (span[:column], span[column + 1 :])]
    horizontal = [(side, None) for side in sides if side]
    both = {"vertical": [vertical], "horizontal": [horizontal], "mixture": [vertical, horizontal]}[kind]
    return [(direct, spans) for spans in both]


def combiner(q, k, v, x, head, p, spec, causal):
    n, result = len(q), np.zeros_like(v)
    for i in range(n):
        of = divisions(spec["form"], n, i, causal)
        for direct, spans in of:
            scores = [q[i] @ k[j] for j in direct]
            values = [v[j] for j in direct]
            for span, token in spans:
                query = q[span].max(0) if token is None else q[token]
                inside = softmax(k[span] @ query / np.sqrt(HEAD))
                key = k[span].max(0) if token is None else inside @ k[span]
                count = np.log(len(span)) * np.sqrt(HEAD) if spec.get("log_count") else 0
                scores.append(q[i] @ key + count)
                values.append(inside @ v[span])
            result[i] += softmax(np.array(scores) / np.sqrt(HEAD)) @ np.array(values) / len(of)
    return result


def bias(position, p, head, i, j, causal):
    """What is added to the score of a query at `i` and a key at `j`."""
    kind, apart = position["kind"], abs(i - j)
    if kind == "alibi":
        return -(2.0 ** (-8 * (head + 1) / HEADS)) * apart
    if kind == "relative-buckets":
        count, longest, bucket = position["buckets"], position["max_distance"], 0
        if not causal:
            count //= 2
            bucket = count if j > i else 0
        near = count // 2
        if apart < near:
            return p["buckets"][bucket + apart, head]
        far = near + int(np.log(apart / near) / np.log(longest / near) * (count - near))
        return p["buckets"][bucket + min(far, count - 1), head]
    if kind.startswith("kerple"):
        r1, r2 = np.log1p(np.exp(p["coefficients"]))[:, head]
        return -r1 * (np.log(1 + r2 * apart) if kind == "kerple-logarithmic" else float(apart) ** r2)
    if kind == "sandwich":
        width = position["width"]
        return sum(np.cos(apart / 10_000 ** (2 * m / width)) for m in range(1, width // 2 + 1))
    psi = lambda d: np.log(abs(p["stretch"][0] * d) + 1)
    longest = max(abs(p["length"][0]) * position["initial_length"], i if causal else max(i, j))
    y = np.array([psi(apart) / (psi(longest) + 1e-6)])
    for layer in range(position["layers"]):
        y = np.maximum(p[f"layers.{layer}.weight"] @ y + p[f"layers.{layer}.bias"], 0)
    last = f"layers.{position['layers']}"
    later = HEADS if j > i else 0
    return (p[f"{last}.weight"] @ y + p[f"{last}.bias"])[later + head]


def positioned(q, k, v, head, p, spec, places):
    causal, n, result = spec["causal"], len(q), np.zeros_like(v)
    for i in range(n):
        sees = [j for j in range(n) if j <= i or not causal]
        added = [bias(spec["position"], p, head, places[i], places[j], causal) for j in sees]
        result[i] = softmax(k[sees] @ q[i] / np.sqrt(HEAD) + np.array(added)) @ v[sees]
    return result


MECHANISMS = {
    "lion": lion,
    "fastmax": fastmax,
    "topological": topological,
    "ecoformer": ecoformer,
    "mra": mra,
    "combiner": combiner,
}


def mixed(spec, shared, own, x, keep):
    """`[batch, length, width]`, zeros at pads."""
    result = np.zeros_like(x)
    part = "mechanism" if "mechanism" in spec else "position"
    p = {name.removeprefix(f"{part}."): value for name, value in own.items()}
    for sequence, kept in enumerate(keep):
        places = np.nonzero(kept)[0]
        tokens = x[sequence, places]
        project = lambda name: tokens @ shared[f"{name}.weight"].T + shared[f"{name}.bias"]
        keys = "query" if spec.get("sharing") == "query-key" else "key"
        for head in range(HEADS):
            features = slice(head * HEAD, (head + 1) * HEAD)
            q, k, v = (project(name)[:, features] for name in ("query", keys, "value"))
            if part == "mechanism":
                how = spec["mechanism"]
                found = MECHANISMS[how["kind"]](q, k, v, tokens, head, p, how, spec["causal"])
            else:
                found = positioned(q, k, v, head, p, spec, places)
            result[sequence, places, features] = found
    return result


def cases():
    """Specs with the shapes of parameters of their own."""
    ways = (False, True)
    for decay, per_feature in itertools.product(("none", "constant", "selective"), ways):
        if decay == "none" and per_feature:
            continue
        each = HEADS * (HEAD if per_feature else 1)
        for causal, extra in [(False, {}), (True, {}), (False, {"class_token": True})] + [
            (False, {"image": {"columns": 4, "curves": ["rows", "columns"]}})
        ]:
            count = each * (2 if "image" in extra else 1)
            constant = [count // each, HEADS] + ([HEAD] if per_feature else [])
            shapes = {"constant": {"decay": constant}, "none": {}}
            selective = {"decay.weight": [count, WIDTH], "decay.bias": [count]}
            how = {"kind": "lion", "decay": decay, "per_feature": per_feature, **extra}
            yield causal, "mechanism", how, shapes.get(decay, selective)
    for degree, kind, causal in itertools.product((1, 2), ("token", "max"), ways):
        if not (causal and kind == "max"):
            how = {"kind": "fastmax", "degree": degree, "normalisation": {"kind": kind}}
            yield causal, "mechanism", how, {}
    for mask, feature, columns in [
        ("exponential", "relu", None),
        ("identity", "square", 4),
        ("inverse-quadratic", "square", 3),
    ]:
        how = {"kind": "topological", "mask": mask, "features": {"kind": feature}, "unit": 3.0}
        how |= {"columns": columns, "per_head": True} if columns else {}
        yield False, "mechanism", how, {"mask": [HEADS if columns else 1, 3]}
    for bandwidth, released, causal in [
        ("sample", False, False),
        ("sample", True, False),
        ("fitted", False, True),
    ]:
        how = {"kind": "ecoformer", "bits": 5, "anchors": 4, "bandwidth": bandwidth, "released": released}
        shapes = {"anchors": [HEADS, 4, HEAD], "means": [HEADS, 4], "hashes": [HEADS, 5, 4]}
        yield causal, "mechanism", how, shapes | ({"bandwidths": [HEADS]} if causal else {})
    for scales, per_row, sparse in [([4, 1], [1], False), ([4, 2, 1], [1, 1], False), ([2, 1], [1], True)]:
        for causal in ways:
            how = {"kind": "mra", "scales": scales, "per_row": per_row, "sparse": sparse}
            yield causal, "mechanism", how, {}
    for form in [{"kind": "fixed", "segment": 3}, {"kind": "log-sparse"}]:
        for causal in ways:
            yield causal, "mechanism", {"kind": "combiner", "form": form, "log_count": causal}, {}
    for kind in ("vertical", "horizontal", "row-major", "mixture"):
        yield True, "mechanism", {"kind": "combiner", "form": {"kind": kind, "columns": 3}}, {}
    for causal in ways:
        yield causal, "position", {"kind": "alibi"}, {}
        buckets = {"kind": "relative-buckets", "buckets": 8, "max_distance": 9}
        yield causal, "position", buckets, {"buckets": [8, HEADS]}
        for kind in ("kerple-logarithmic", "kerple-power"):
            yield causal, "position", {"kind": kind}, {"coefficients": [2, HEADS]}
        yield causal, "position", {"kind": "sandwich", "width": 8}, {}
        for layers in (1, 2):
            fire = {"kind": "fire", "hidden": 5, "layers": layers, "initial_length": 4}
            sizes = [1] + [5] * layers + [HEADS if causal else 2 * HEADS]
            shapes = {"stretch": [1], "length": [1]}
            for layer, (read, written) in enumerate(zip(sizes, sizes[1:])):
                shapes |= {f"layers.{layer}.weight": [written, read], f"layers.{layer}.bias": [written]}
            yield causal, "position", fire, shapes


def array(values, digits=None):
    flat = np.asarray(values).ravel()
    return {
        "shape": list(np.shape(values)),
        "values": [float(f"{v:.{digits}g}") if digits else float(v) for v in flat],
    }


def main(path):
    rng = np.random.default_rng(66)
    draw = lambda shape: np.round(rng.normal(size=shape), 3)
    shared = {}
    for name in ("query", "key", "value", "output"):
        shared[f"{name}.weight"], shared[f"{name}.bias"] = draw([WIDTH, WIDTH]), draw([WIDTH])
    x = draw([2, LENGTH, WIDTH])
    everywhere = np.ones((2, LENGTH), int)
    behind, among = everywhere.copy(), everywhere.copy()
    behind[1, -4:] = 0
    among[1, [0, 1, 5, 10]] = 0
    listed = []
    for causal, part, how, shapes in cases():
        own = {f"{part}.{name}": draw(shape) for name, shape in shapes.items()}
        for name in ("mechanism.bandwidths", "position.length"):
            if name in own:
                own[name] = np.round(1 + np.abs(own[name]), 3)
        spec = {"heads": HEADS, "causal": causal, part: how}
        if how["kind"] == "ecoformer":
            spec["sharing"] = "query-key"
        # Places, on a grid or in a row, and a class token are those of a sequence that begins at the first token.
        placed = {"unit", "image", "class_token"} & set(how) or part == "position"
        keep = behind if placed else among
        found = mixed(spec, shared, own, x, keep)
        listed.append(
            {
                "spec": spec,
                "parameters": {name: array(value) for name, value in own.items()},
                "keep": keep.tolist(),
                "mixed": array(found, 12),
            }
        )
    golden = {
        "parameters": {name: array(value) for name, value in shared.items()},
        "x": array(x),
        "cases": listed,
    }
    with open(path, "w") as file:
        json.dump(golden, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
