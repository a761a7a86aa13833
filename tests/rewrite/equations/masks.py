"""Cases of the equations in ``rewrite/algebra_masks.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "comparison_from_the_left": [
        (lambda x, y: x < y, lambda x, y: torch.gt(y, x)),
        (lambda x, y: x.less_equal(y), lambda x, y: y >= x),
    ],
    "comparison_with_zero": [(lambda x: x > torch.zeros_like(x), lambda x: x.gt(0))],
    "choice": [
        (lambda x, y: torch.where(x > y, x, y), lambda x, y: x.where(y < x, y)),
        (lambda x, y: torch.where(x > y, x, torch.full_like(y, 0)), lambda x, y: x.where(x > y, 0)),
    ],
    "filled": [(lambda x, y: x.masked_fill(x >= y, 0.5), lambda x, y: torch.where(y <= x, 0.5, x))],
    "choice_by_a_sign": [
        (lambda x: torch.where(x <= 0, 0, x), lambda x: x.relu()),
        (lambda x: x.masked_fill(x <= 0.0, 0.0), lambda x: F.relu(x)),
        (lambda x: torch.where(x < 0, x.new_zeros(()), x), lambda x: x.clamp(min=0)),
        (lambda x, y: torch.where(~(x > y), y, 1.0), lambda x, y: torch.where(x > y, 1.0, y)),
    ],
    "relu_as_a_threshold": [(lambda x: F.threshold(x, 0.0, 0.0), lambda x: torch.relu(x))],
    "larger_of_two": [(lambda x, y: torch.max(x, y), lambda x, y: torch.maximum(x, y))],
    "larger_than_zero": [
        (lambda x: torch.maximum(x, torch.zeros_like(x)), lambda x: torch.maximum(x.new_full((), 0), x)),
        (lambda x: x.max(x.new_zeros(6)), lambda x: torch.maximum(x, x.new_zeros(1, 1).expand(2, 3, 6))),
    ],
    "bounded_by_zero": [(lambda x: x.clamp(min=torch.zeros_like(x)), lambda x: torch.clamp_min(x, 0.0))],
    "mask_as_a_number": [(lambda x, y: x * (x > y).double(), lambda x, y: x * (y < x))],
}  # fmt: skip
