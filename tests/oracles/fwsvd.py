"""Golden values for weighted low-rank factorisation, in NumPy alone.

A small classifier (mean of embeddings, a tanh layer, an output layer) is written out with its
derivatives by hand. Statistics and factorisations follow the papers' own orientation, z = x W
with W [input, output], and their own back-substitution, so that nothing is shared with the
program under test but the parameters and examples.

    python tests/oracles/fwsvd.py crates/compress/tests/fixtures/fwsvd.json
"""

import json
import sys

import numpy as np

WIDTH, VOCABULARY, LABELS, LENGTH, EXAMPLES, RANK = 6, 7, 4, 5, 14, 2


def draw(rng):
    parameters = {
        "embeddings.tokens.weight": rng.normal(size=(VOCABULARY, WIDTH)),
        "head.hidden.weight": rng.normal(size=(WIDTH, WIDTH)) * 0.6,
        "head.hidden.bias": rng.normal(size=WIDTH) * 0.2,
        "head.output.weight": rng.normal(size=(LABELS, WIDTH)),
        "head.output.bias": rng.normal(size=LABELS) * 0.3,
    }
    # Six figures are enough, and keep the file small.
    parameters = {name: np.round(value, 6) for name, value in parameters.items()}
    examples = []
    for _ in range(EXAMPLES):
        length = int(rng.integers(2, LENGTH + 1))
        ids = rng.integers(0, VOCABULARY, size=length)
        examples.append((ids, int(rng.integers(0, LABELS))))
    return parameters, examples


def forward(p, ids):
    x = p["embeddings.tokens.weight"][ids].mean(axis=0)
    h = np.tanh(p["head.hidden.weight"] @ x + p["head.hidden.bias"])
    return x, h, p["head.output.weight"] @ h + p["head.output.bias"]


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def gradients(p, ids, label):
    """Loss of one example and its derivatives, as [output, input]."""
    x, h, z = forward(p, ids)
    q = softmax(z)
    dz = q.copy()
    dz[label] -= 1
    dh = p["head.output.weight"].T @ dz
    da = dh * (1 - h**2)
    dx = p["head.hidden.weight"].T @ da
    table = np.zeros((WIDTH, VOCABULARY))
    for token in ids:
        table[:, token] += dx / len(ids)
    found = {
        "head.output": np.outer(dz, h),
        "head.hidden": np.outer(da, x),
        "embeddings.tokens": table,
    }
    return -np.log(q[label]), found


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def factorise(weight, left, right):
    """`left⁻¹ svd_r(left W right) right⁻¹` of W [input, output]; back to [output, input]."""
    inner = truncated(left @ weight.T @ right, RANK)
    return (np.linalg.solve(left, inner) @ np.linalg.inv(right)).T


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def nearest_kronecker(stack):
    """The best A ⊗ B for E[vec(G) vec(G)ᵀ], by an SVD of the rearranged matrix."""
    _, output, input_ = stack.shape
    moment = np.einsum("doi,dpj->oipj", stack, stack) / len(stack)
    rearranged = moment.transpose(1, 3, 0, 2).reshape(input_ * input_, output * output)
    u, s, vt = np.linalg.svd(rearranged)
    a, b = u[:, 0].reshape(input_, input_), vt[0].reshape(output, output)
    return a * np.sign(np.trace(a)), b * np.sign(np.trace(b))


def with_traces(a, b, total):
    """Scales so that tr A tr B is the trace of the information, and tr B is the size of B."""
    return a * total / np.trace(a) / len(b), b / np.trace(b) * len(b)


def main(path):
    p, examples = draw(np.random.default_rng(91))
    losses, stacks = [], {}
    for ids, label in examples:
        loss, found = gradients(p, ids, label)
        losses.append(loss)
        for layer, gradient in found.items():
            stacks.setdefault(layer, []).append(gradient)
    stacks = {layer: np.array(stack) for layer, stack in stacks.items()}
    inputs = np.array([forward(p, ids)[0] for ids, _ in examples])
    weights = {
        "head.output": p["head.output.weight"],
        "head.hidden": p["head.hidden.weight"],
        "embeddings.tokens": p["embeddings.tokens.weight"].T,
    }
    tokens = np.concatenate([ids for ids, _ in examples])
    frequency = np.bincount(tokens, minlength=VOCABULARY) / len(tokens)

    layers = {}
    for layer, stack in stacks.items():
        fisher = (stack**2).mean(axis=0)
        rows, columns = fisher.sum(axis=0), fisher.sum(axis=1)
        weight = weights[layer]
        identity = np.eye(len(columns))
        batched = stack[: EXAMPLES // 2 * 2].reshape(-1, 2, *weight.shape).mean(axis=1)
        products = {
            "svd": truncated(weight, RANK),
            "fwsvd": factorise(weight, np.diag(np.sqrt(rows)), identity),
            "row-column-fisher": factorise(
                weight, np.diag(np.sqrt(rows)), np.diag(np.sqrt(columns))
            ),
        }
        entry = {
            "fisher": fisher.tolist(),
            "inputs": rows.tolist(),
            "outputs": columns.tolist(),
            "inputs_of_pairs": (batched**2).mean(axis=0).sum(axis=0).tolist(),
        }
        if layer == "embeddings.tokens":
            products["activation-weighted"] = factorise(
                weight, np.diag(np.sqrt(frequency)), identity
            )
            entry["squares"] = frequency.tolist()
        if layer == "head.hidden":
            squares = (inputs**2).mean(axis=0)
            covariance = inputs.T @ inputs / len(inputs)
            total = fisher.sum()
            first_a = np.einsum("doi,doj->ij", stack, stack)
            first_b = np.einsum("doi,dpi->op", stack, stack)
            a, b = with_traces(first_a, first_b, total)
            best_a, best_b = with_traces(*nearest_kronecker(stack), total)
            products["generalised-fisher"] = factorise(
                weight, np.linalg.cholesky(a).T, np.linalg.cholesky(b)
            )
            products["activation-weighted"] = factorise(
                weight, np.diag(np.sqrt(squares)), identity
            )
            products["whitened"] = factorise(weight, root(covariance), identity)
            entry |= {
                "squares": squares.tolist(),
                "covariance": covariance.tolist(),
                "kronecker": [a.tolist(), b.tolist()],
                "nearest_kronecker": [best_a.tolist(), best_b.tolist()],
            }
        entry["products"] = {name: product.tolist() for name, product in products.items()}
        layers[layer] = entry

    compressed = dict(p)
    for layer in ["head.hidden", "head.output"]:
        compressed[f"{layer}.weight"] = np.array(layers[layer]["products"]["fwsvd"])
    logits = [forward(compressed, ids)[2].tolist() for ids, _ in examples]

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [rounded(entry) for entry in value]
        return float(f"{value:.13g}") if isinstance(value, float) else value

    result = {
        "numpy": np.__version__,
        "rank": RANK,
        "parameters": {name: value.tolist() for name, value in p.items()},
        "examples": [[ids.tolist(), label] for ids, label in examples],
        "mean_loss": float(np.mean(losses)),
        "layers": layers,
        "logits": logits,
    }
    with open(path, "w") as file:
        json.dump(rounded(result), file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
