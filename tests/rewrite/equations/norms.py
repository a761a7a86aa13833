"""Cases of the equations in ``rewrite/algebra_norms.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "normalized_of_three": [
        (
            lambda x, y: torch.native_layer_norm(x, (6,), y[0, 0], None, 1e-3)[0],
            lambda x, y: F.layer_norm(x, (6,), y[0, 0], None, 1e-3),
        )
    ],
    "one_group": [
        (lambda m: F.group_norm(m, 1), lambda m: F.layer_norm(m, (6,))),
        (lambda m: F.group_norm(m, 1, m[0], m[1], 1e-3), lambda m: F.layer_norm(m, (6,), m[0], m[1], 1e-3)),
    ],
    "mean_taken_off_last": [
        (
            lambda x, y: x * (x.abs().rsqrt() * y) + (y - x.mean(-1, True) * y * x.abs().rsqrt()),
            lambda x, y: (x - x.mean(-1, True)) * x.abs().rsqrt() * y + y,
        ),
    ],
    "scaled_mean_taken_off": [
        (lambda x, y: x * y - y * x.mean(-1, keepdim=True), lambda x, y: (x - x.mean(-1, True)) * y),
        (
            lambda x, y: y + x * y - x.double().mean(-1, keepdim=True) * y,
            lambda x, y: (x - x.mean(-1, True)) * y + y,
        ),
    ],
    "length_by_mean": [  # of four numbers: their root, and ε times it, are exact
        (
            lambda x, y: (z := x[..., :4]) / z.norm(2, -1, keepdim=True).clamp_min(0.5) * y[..., :4] * 2,
            lambda x, y: (z := x[..., :4]) / (z * z).mean(-1, True).sqrt().clamp(min=0.25) * y[..., :4],
        ),
        (
            lambda x, y: 2 * y[..., :4] * ((z := x[..., :4]) / (0.5 + torch.linalg.vector_norm(z, dim=-1, keepdim=True))),
            lambda x, y: (z := x[..., :4]) / ((z * z).mean(-1, True).sqrt() + 0.25) * y[..., :4],
        ),
        (
            lambda x, y: (z := x[..., :4]) * 2.0 * (torch.rsqrt((z * z).sum(-1, keepdim=True) + 0.5) * y[..., :4]),
            lambda x, y: (z := x[..., :4]) * torch.rsqrt((z * z).mean(-1, True) + 0.125) * y[..., :4],
        ),
        (lambda x: x.norm(dim=-1, keepdim=True).reciprocal() * 6**0.5, lambda x: (x * x).mean(-1, True).rsqrt()),
    ],
    "root_of_size_first": [
        (lambda x, y: F.normalize(x, dim=-1) * y * 6**0.5, lambda x, y: F.normalize(x, dim=-1) * 6**0.5 * y),
    ],
}  # fmt: skip
