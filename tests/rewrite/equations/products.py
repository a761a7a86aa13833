"""Cases of the equations in ``rewrite/algebra_products.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "negative_operand": [(lambda x, w: F.linear(-x, w), lambda x, w: -F.linear(x, w))],
    "joined_operands": [
        (
            lambda x, y, w, b: F.linear(torch.cat((x, y), -1), torch.cat((w, w * 2), 1), b),
            lambda x, y, w, b: F.linear(x, w, b) + F.linear(y, w * 2),
        )
    ],
    "tensor_product": [
        (lambda x, w: torch.tensordot(x, w.T, 1), lambda x, w: F.linear(x, w)),
        (lambda x, w: torch.tensordot(x, w, dims=([-1], [1])), lambda x, w: F.linear(x, w)),
        (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), lambda x, w: F.linear(x, w)),
    ],
    "product_of_row_and_column": [
        (lambda x: (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1), lambda x: (x * x).sum(-1, True)),
        (lambda x: torch.matmul(x.unsqueeze(2), x.unsqueeze(3)).squeeze(3), lambda x: (x * x).sum(-1, True)),
    ],
    "product_and_sum": [
        (lambda m, w, b: torch.addmm(b, m, w.T), lambda m, w, b: F.linear(m, w, b)),
        (lambda m, w, b: torch.addmm(b, m, w.T, beta=2, alpha=0.5), lambda m, w, b: F.linear(m, w) * 0.5 + b * 2),
        (
            lambda x, w: torch.baddbmm(x @ w.T, x, w.T.expand(2, -1, -1), alpha=0.5),
            lambda x, w: F.linear(x, w) * 0.5 + x @ w.T,
        ),
    ],
    "summed_products": [
        (lambda x, w: torch.einsum("bti,oi->bto", x, w), lambda x, w: F.linear(x, w)),
        (lambda x, v: torch.einsum("...i, io -> ...o", x, v), lambda x, v: x @ v),
        (lambda x, y: torch.einsum("...d,...d->...", x, y), lambda x, y: (x * y).sum(-1)),
        (lambda x, y: torch.einsum("btd,btd->btd", x, y), lambda x, y: x * y),
        (lambda x, p, q: torch.einsum("bti,ri,or->bto", x, p, q), lambda x, p, q: x @ p.T @ q.T),
        (lambda x, p, q: torch.einsum("... i, o r, r i -> ... o", x, q, p), lambda x, p, q: x @ p.T @ q.T),
    ],
    "matrix_product": [
        (lambda x, w: x @ w.T, lambda x, w: F.linear(x, w)),
        (lambda x, v: torch.matmul(x, v), lambda x, v: x @ v),
        (lambda x, w: torch.bmm(x, w.T.expand(2, -1, -1)), lambda x, w: F.linear(x, w)),
        (lambda x, v: x @ v.unsqueeze(0).repeat(2, 1, 1), lambda x, v: x @ v),
        (lambda x, v: x @ v[None].expand(2, 6, 4), lambda x, v: x @ v),
    ],
    "linear_on_rows": [
        (lambda x, w: F.linear(x.view(-1, 6), w).view(2, 3, 4), lambda x, w: F.linear(x, w)),
        (lambda x, v: (x.reshape(6, 6) @ v).reshape(2, 3, -1), lambda x, v: x @ v),
    ],
}  # fmt: skip
