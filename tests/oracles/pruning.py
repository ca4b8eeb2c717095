"""Golden values for weight pruning, in NumPy alone.

One linear layer with weights W [output, input] reads the rows of X. Second-order pruning is checked
against the constrained least-squares problem itself: at every step each candidate's optimum is solved
for by its normal equations, with what is frozen (columns to the left of the block) and what is zero
given, so that no inverse is ever updated.

    python tests/oracles/pruning.py crates/compress/tests/fixtures/pruning.json
"""

import json
import sys

import numpy as np

WIDTH, VOCABULARY, TOKENS, DAMPING, SHARE = 8, 12, 40, 0.01, 0.5


def best(w, current, hessian, frozen, zero):
    """The least (v - w)' H (v - w) with v as `current` in `frozen` and 0 in `zero`."""
    size = len(w)
    fixed = sorted(set(frozen) | set(zero))
    free = [i for i in range(size) if i not in fixed]
    v = current.copy()
    v[list(zero)] = 0.0
    if free:
        right = hessian[np.ix_(free, range(size))] @ w
        if fixed:
            right = right - hessian[np.ix_(free, fixed)] @ v[fixed]
        v[free] = np.linalg.solve(hessian[np.ix_(free, free)], right)
    return v, float((v - w) @ hessian @ (v - w))


def order(w, current, hessian, start, width, zero, pattern):
    """The columns of a block in the order in which a row gives them up, with each one's rise."""
    frozen = list(range(start))
    gone, rises = [], []
    _, cost = best(w, current, hessian, frozen, zero)
    while True:
        candidates = [c for c in range(start, start + width) if c not in gone]
        if pattern:
            n, m = pattern
            left = lambda c: [k for k in candidates if (k - start) // m == (c - start) // m]
            candidates = [c for c in candidates if len(left(c)) > n]
        if not candidates:
            return gone, rises
        costs = [best(w, current, hessian, frozen, zero + gone + [c])[1] for c in candidates]
        chosen = int(np.argmin(costs))
        rise = costs[chosen] - cost
        rises.append(max(rise, rises[-1] if rises else 0.0))
        cost = costs[chosen]
        gone.append(candidates[chosen])


def second_order(weight, hessian, block, by_row, pattern=None):
    rows, columns = weight.shape
    result = weight.copy()
    zero = [[] for _ in range(rows)]
    for start in range(0, columns, block):
        width = min(block, columns - start)
        orders = [
            order(weight[r], result[r], hessian, start, width, zero[r], pattern) for r in range(rows)
        ]
        if pattern:
            counts = [len(gone) for gone, _ in orders]
        elif by_row:
            counts = [int(SHARE * (start + width)) - len(zero[r]) for r in range(rows)]
        else:
            count = int(SHARE * rows * (start + width)) - sum(map(len, zero))
            ranked = sorted((rise, r) for r, (_, rises) in enumerate(orders) for rise in rises)
            counts = [sum(1 for _, row in ranked[:count] if row == r) for r in range(rows)]
        for r in range(rows):
            zero[r] += orders[r][0][: counts[r]]
            result[r], _ = best(weight[r], result[r], hessian, list(range(start)), zero[r])
    return result


def smallest(scores, count):
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores.ravel(), kind="stable")[:count]] = False
    return keep.reshape(scores.shape)


def main(path):
    rng = np.random.default_rng(39)
    mixing = rng.normal(size=(WIDTH, WIDTH)) * 0.6 + np.eye(WIDTH)
    table = np.round(rng.normal(size=(VOCABULARY, WIDTH)) @ mixing, 5)
    weight = np.round(rng.normal(size=(WIDTH, WIDTH)), 5)
    tokens = rng.integers(0, VOCABULARY, size=TOKENS)
    x = table[tokens]
    moment = x.T @ x / TOKENS
    hessian = moment + DAMPING * np.trace(moment) / WIDTH * np.eye(WIDTH)
    count = int(SHARE * weight.size)
    lengths = np.sqrt((x**2).mean(axis=0))
    aware = np.stack([smallest(np.abs(row) * lengths, WIDTH // 2) for row in weight])
    golden = {
        "table": table.tolist(),
        "weight": weight.tolist(),
        "tokens": tokens.tolist(),
        "magnitude": (weight * smallest(np.abs(weight), count)).tolist(),
        "wanda": (weight * aware).tolist(),
        "second-order": {
            "layer": second_order(weight, hessian, WIDTH, False).tolist(),
            "row": second_order(weight, hessian, WIDTH, True).tolist(),
            "layer-blocks": second_order(weight, hessian, 4, False).tolist(),
            "row-blocks": second_order(weight, hessian, 4, True).tolist(),
            "two-of-four": second_order(weight, hessian, 4, False, (2, 4)).tolist(),
        },
    }
    with open(path, "w") as file:
        json.dump(golden, file)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
