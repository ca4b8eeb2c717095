"""What MoDeGPT's three decompositions give on one small layer, by NumPy alone.

Row vectors, `y = x W`, as in the paper; inverses and square roots are taken outright. Writes
crates/compress/tests/fixtures/modegpt.json. Made with NumPy 2, seed 7.
"""

import json
import pathlib

import numpy as np

generator = np.random.default_rng(7)
tokens, width, hidden, heads, groups, head = 50, 6, 8, 4, 2, 6
x = generator.normal(size=(tokens, width)) * np.linspace(0.3, 2.0, width)


def root(c, power):
    values, vectors = np.linalg.eigh(c)
    return vectors @ np.diag(values**power) @ vectors.T


# Type I: hidden features that are far from independent.
h = np.maximum(generator.normal(size=(tokens, 4)) @ generator.normal(size=(4, hidden)), 0)
c = h.T @ h / tokens
down = generator.normal(size=(hidden, width))
ridge = 1.0
penalty = ridge * np.trace(c) / hidden
leverage = np.diag(c @ np.linalg.inv(c + penalty * np.eye(hidden)))
kept = np.sort(np.argsort(-leverage)[:5])
select = np.eye(hidden)[:, kept]
refit = np.linalg.lstsq(h @ select, h @ down, rcond=None)[0]

# Type II: pairs (i, i + head / 2), two query heads for each key head.
q = generator.normal(size=(tokens, heads, head)) * generator.uniform(0.2, 2, size=(heads, head))
k = generator.normal(size=(tokens, groups, head)) * generator.uniform(0.2, 2, size=(groups, head))
pairs = []
for group in range(groups):
    score = np.zeros(head // 2)
    ck = k[:, group].T @ k[:, group] / tokens
    for query in range(heads // groups):
        own = q[:, group * (heads // groups) + query]
        cq = own.T @ own / tokens
        for i in range(head // 2):
            for j in (i, i + head // 2):
                length = np.linalg.norm(root(cq, 0.5)[:, j]) * np.linalg.norm(root(ck, 0.5)[:, j])
                score[i] += length**2
    pairs.append(sorted(np.argsort(-score)[:2].tolist()))

# Type III: one value matrix, two output matrices side by side.
cx = x.T @ x / tokens
value = generator.normal(size=(width, 4))
outputs = generator.normal(size=(2, 4, width))
side = np.concatenate(list(outputs), axis=1)
u, s, vt = np.linalg.svd(root(cx, 0.5) @ value @ side, full_matrices=False)
joint = root(cx, -0.5) @ u[:, :2] @ np.diag(s[:2]) @ vt[:2]

fixture = {
    "hidden_moment": c.tolist(),
    "down": down.T.tolist(),
    "ridge": ridge,
    "kept": kept.tolist(),
    "refit": refit.T.tolist(),
    "query_squares": (q**2).mean(0).reshape(-1).tolist(),
    "key_squares": (k**2).mean(0).reshape(-1).tolist(),
    "pairs": pairs,
    "input_moment": cx.tolist(),
    "value": value.T.tolist(),
    "outputs": [output.T.tolist() for output in outputs],
    # (W_V' W_O')ᵀ of each head, at two features.
    "products": [joint[:, i * width : (i + 1) * width].T.tolist() for i in range(2)],
    "discarded": float((s[2:] ** 2).sum()),
}
to = pathlib.Path(__file__).parents[2] / "crates/compress/tests/fixtures/modegpt.json"
to.write_text(json.dumps(fixture) + "\n")
