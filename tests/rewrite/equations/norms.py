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
}  # fmt: skip
