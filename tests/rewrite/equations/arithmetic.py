"""Cases of the equations in ``rewrite/algebra_arithmetic.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "bias_added": [
        (lambda x, w, b: F.linear(x, w) + b, lambda x, w, b: F.linear(x, w, b)),
        (lambda x, w, b: b + x @ w.T, lambda x, w, b: F.linear(x, w, b)),
    ],
    "negative_addend": [
        (lambda x, y: x + (-y), lambda x, y: x - y),
        (lambda x, y: x - (-y), lambda x, y: x + y),
        (lambda x, y: (-y) + x, lambda x, y: x - y),
    ],
    "negative_product": [(lambda x: x * -1, lambda x: -x), (lambda x, y: x - y * -1.0, lambda x, y: x + y)],
    "product_added": [
        (lambda x, y: torch.addcmul(x, x, y), lambda x, y: x + x * y),
        (lambda x, y: torch.addcmul(x, x, y, value=0.5), lambda x, y: x + (x * y) * 0.5),
        (lambda x, y: torch.addcdiv(x, x, y, value=0.5), lambda x, y: x + (x / y) * 0.5),
    ],
    "scaled_addend": [
        (lambda x, y: torch.add(x, y, alpha=3), lambda x, y: x + y * 3),
        (lambda x, y: torch.sub(x, y, alpha=0.5), lambda x, y: x - y * 0.5),
    ],
    "joined_with_a_negative": [(lambda x, y: torch.cat((x, -y), -1), lambda x, y: -torch.cat((-x, y), -1))],
    "reversed_subtraction": [
        (lambda x, y: torch.rsub(x, y), lambda x, y: y - x),
        (lambda x: 1 - x, lambda x: torch.rsub(x, 1)),
    ],
    "square_of_itself": [(lambda x: x * x, lambda x: x**2), (lambda x: x * x.double(), lambda x: torch.square(x))],
    "square_of_a_magnitude": [
        (lambda x: x.abs() ** 2, lambda x: x * x),
        (lambda x, y: (y - x.double()).neg().square(), lambda x, y: (y - x) ** 2),
    ],
    "square_of_a_root": [
        (lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2, lambda x: (x * x).sum(-1, True)),
        (lambda x: (x.norm(dim=-1, keepdim=True) * 3) ** 2, lambda x: (x * x).sum(-1, True) * 9),
    ],
    "division": [
        (lambda x, y: x / y, lambda x, y: x * torch.reciprocal(y)),
        (lambda x: x.sum(-1, True) / 6, lambda x: x.mean(-1, True)),
        (lambda x: (x * x).sum(-1, True).sqrt() / 6**0.5, lambda x: (x * x).mean(-1, True).sqrt()),
        (lambda x: 1 / x, lambda x: torch.reciprocal(x)),
        (lambda x: x * 6 / 4, lambda x: x * 1.5),
        (lambda x: x / 3, lambda x: x * (1 / 3)),
    ],
    "two_factors": [(lambda x: x / 8 * 4, lambda x: x * 0.5), (lambda x: 2 * (x * 1.5), lambda x: x * 3.0)],
    "gated_halves": [(lambda x: F.glu(x, -1), lambda x: x[..., :3] * x.chunk(2, -1)[1].sigmoid())],
    "reciprocal_of_a_root": [
        (lambda x: 1 / (x * x).sqrt(), lambda x: torch.rsqrt(x * x)),
        (lambda x: 1 / torch.rsqrt(x * x), lambda x: torch.sqrt(x * x)),
        (lambda x, y: x / (1 / y), lambda x, y: x * y),
    ],
    "powers": [
        (lambda x: x.pow(2), lambda x: torch.square(x)),
        (lambda x: (x * x) ** 0.5, lambda x: (x * x).sqrt()),
        (lambda x: torch.pow(x * x, -0.5), lambda x: (x * x).rsqrt()),
        (lambda x: x**-1, lambda x: 1.0 / x),
    ],
    "lower_bound": [
        (lambda x: torch.clamp(x, min=0.25), lambda x: x.clamp_min(0.25)),
        (lambda x: torch.clip(x, 0.25, float("inf")), lambda x: x.clamp(0.25)),
    ],
    "functional": [(lambda x: F.silu(x.clone(), inplace=False), lambda x: F.silu(x))],
    "sigmoid_times_itself": [(lambda x: x * torch.sigmoid(x), lambda x: F.silu(x)), (lambda x: x.sigmoid() * x, F.silu)],
}  # fmt: skip
