"""Cases of the equations in ``rewrite/algebra_lengths.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "bounded_length": [
        (lambda x: x.norm(dim=-1, keepdim=True) + 0.5, lambda x: ((x * x).mean(-1, True).sqrt() + 0.5 / 6**0.5) * 6**0.5),
        (
            lambda x: 0.25 + 3 * (x * x).mean(-1, keepdim=True).sqrt(),
            lambda x: ((x * x).mean(-1, True).sqrt() + 0.25 / 3) * 3,
        ),
        (
            lambda x: torch.linalg.norm(x, dim=-1, keepdim=True).clamp(min=0.5),
            lambda x: (x * x).mean(-1, True).sqrt().clamp_min(0.5 / 6**0.5) * 6**0.5,
        ),
    ],
    "reciprocal_of_a_scaled_length": [
        (
            lambda x: 1 / (x.norm(dim=-1, keepdim=True) + 0.5),
            lambda x: 1 / ((x * x).mean(-1, True).sqrt() + 0.5 / 6**0.5) * (1 / 6**0.5),
        ),
        (
            lambda x: 1 / x.std(-1, keepdim=True).clamp(min=0.5),
            lambda x: (1 / x.std(-1, correction=0, keepdim=True).clamp(0.5 / 1.2**0.5)) * (1 / 1.2**0.5),
        ),
    ],
    "reciprocal_root_of_a_sum": [
        (lambda x: 1 / x.norm(dim=-1, keepdim=True), lambda x: (x * x).mean(-1, True).rsqrt() * 6**-0.5),
        (
            lambda x: torch.rsqrt((x * x).sum(-1, keepdim=True) + 0.5),
            lambda x: ((x * x).mean(-1, True) + 0.5 / 6).rsqrt() * 6**-0.5,
        ),
        (
            lambda x: x.square().sum(-1, True).clamp(min=0.5).sqrt().reciprocal(),
            lambda x: x.square().mean(-1, True).clamp_min(0.5 / 6).rsqrt() * 6**-0.5,
        ),
        (lambda x, y: x / x.norm(dim=-1, keepdim=True) * y * 6**0.5, lambda x, y: x * (x * x).mean(-1, True).rsqrt() * y),
    ],
    "root_of_size_first": [
        (lambda x, y: F.normalize(x, dim=-1) * y * 6**0.5, lambda x, y: F.normalize(x, dim=-1) * 6**0.5 * y),
    ],
    "factors_that_cancel": [
        (
            lambda x, y: y * x / (x.norm(dim=-1, keepdim=True) + 0.5) * 6**0.5,
            lambda x, y: y * x / ((x * x).mean(-1, True).sqrt() + 0.5 / 6**0.5),
        ),
        (
            lambda x, y: 6**0.5 * x / (x.norm(dim=-1, keepdim=True) + 0.5) * y,
            lambda x, y: x / ((x * x).mean(-1, True).sqrt() + 0.5 / 6**0.5) * y,
        ),
        (
            lambda x, y: x / (x.norm(dim=-1, keepdim=True) + 0.5) * (y * 6**0.5),
            lambda x, y: x / ((x * x).mean(-1, True).sqrt() + 0.5 / 6**0.5) * y,
        ),
    ],
}  # fmt: skip
