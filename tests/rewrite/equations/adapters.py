"""Cases of the equations in ``rewrite/algebra_adapters.py``."""

from __future__ import annotations

import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "merged_adapter": [
        (
            lambda x, s, b, p, q: F.linear(x, s + 0.5 * (q @ p), b),
            lambda x, s, b, p, q: F.linear(x, s, b) + F.linear(F.linear(x, p), q) * 0.5,
        ),
        (
            lambda x, s, p, q: x @ (q @ p + s).T,
            lambda x, s, p, q: F.linear(x, s) + F.linear(F.linear(x, p), q),
        ),
        (
            lambda x, s, b, p, q: F.linear(x, s - (q @ p) / 4, b),
            lambda x, s, b, p, q: F.linear(x, s, b) - F.linear(F.linear(x, p), q) * 0.25,
        ),
        (
            lambda x, s, p, q, n: F.linear(x, s + n * (q @ p)),
            lambda x, s, p, q, n: F.linear(x, s) + F.linear(F.linear(x, p), q) * n,
        ),
        (
            lambda x, s, p, q, n: F.linear(x, s - (q @ p) / n),
            lambda x, s, p, q, n: F.linear(x, s) - F.linear(F.linear(x, p), q) / n,
        ),
        (
            lambda x, v, p, q, b: x @ (v + p.T @ q.T * 2) + b,
            lambda x, v, p, q, b: x @ v + F.linear(F.linear(x, p), q) * 2 + b,
        ),
        (
            lambda x, s, p, q: x @ (s.T - (q @ p).T),
            lambda x, s, p, q: F.linear(x, s) - F.linear(F.linear(x, p), q),
        ),
        (
            lambda x, s, p, q, b: F.linear(x, s + (p.T @ q.T * 0.5).T, b),
            lambda x, s, p, q, b: F.linear(x, s, b) + F.linear(F.linear(x, p), q) * 0.5,
        ),
        (
            lambda x, v, m, w, b: x @ (v + m[:2].T.contiguous() @ w[:2, :4].contiguous()),
            lambda x, v, m, w, b: x @ v + x @ m[:2].T.contiguous() @ w[:2, :4].contiguous(),
        ),
    ],
    "adapter_of_one_matrix": [
        (lambda x, s, p, q: F.linear(x, s) + F.linear(x, q @ p), lambda x, s, p, q: F.linear(x, s) + x @ p.T @ q.T),
        (
            lambda x, s, p, q: F.linear(x, s) - 0.5 * (x @ (p.T @ q.T)),
            lambda x, s, p, q: F.linear(x, s) - x @ p.T @ q.T * 0.5,
        ),
    ],
    "scaled_factor": [
        (lambda x, p, q: F.linear(F.linear(x, p * 0.5), q), lambda x, p, q: F.linear(F.linear(x, p), q) * 0.5),
        (lambda x, p, q: x @ (2 * p.T) @ q.T, lambda x, p, q: F.linear(F.linear(x, p), q) * 2),
        (lambda x, p, q: F.linear(x @ p.T, q / 4), lambda x, p, q: F.linear(F.linear(x, p), q) / 4),
        (lambda x, p, q: F.linear(x, p * 0.5) @ (q.T * -3), lambda x, p, q: F.linear(F.linear(x, p), q) * -1.5),
    ],
    "bias_of_an_adapter": [
        (
            lambda x, s, p, q, b: F.linear(F.linear(x, p), q, b) + F.linear(x, s),
            lambda x, s, p, q, b: F.linear(x, s, b) + F.linear(F.linear(x, p), q),
        )
    ],
}  # fmt: skip
