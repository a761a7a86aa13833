"""Cases of the equations in ``rewrite/algebra_activations.py``."""

from __future__ import annotations

import torch

from .cases import Cases

EQUAL: Cases = {
    "complement_of_an_error": [(lambda x: torch.erfc(x), lambda x: 1 - torch.special.erf(x))],
    "normal_distribution": [(lambda x: torch.special.ndtr(x), lambda x: (torch.erf(x * 0.5**0.5) + 1) * 0.5)],
    "error_of_a_negative": [
        (lambda x: torch.special.erfc(-x), lambda x: 1 + torch.erf(x)),
        (lambda x: torch.erf(x * -0.5), lambda x: -torch.erf(x / 2)),
        (lambda x: torch.erf(-x / 2), lambda x: -torch.erf(x / 2)),
    ],
    "factor_of_a_curve": [
        (lambda x, y: x * (0.5 * (1 + torch.erf(y))), lambda x, y: (x * 0.5) * (1 + torch.erf(y))),
        (lambda x, y: (1 + torch.tanh(y)) * 0.5 * x, lambda x, y: (x * 0.5) * (1 + torch.tanh(y))),
        (lambda x, y: x * (1 + torch.erf(y)) / 2, lambda x, y: (x * 0.5) * (1 + torch.erf(y))),
    ],
    "curve_of_a_half": [
        (lambda x, y: x / 2 + x / 2 * torch.tanh(y), lambda x, y: x / 2 * (torch.tanh(y) + 1)),
        (lambda x, y: torch.addcmul(x / 2, torch.erf(y), x / 2), lambda x, y: x / 2 * (torch.erf(y) + 1)),
    ],
    "cube": [
        (lambda x: x * x * x, lambda x: x**3),
        (lambda x: 0.5 * x * x * x, lambda x: x.pow(3) * 0.5),
        (lambda x: 0.5 * x * x, lambda x: x.square() * 0.5),
    ],
    "factored_cubic": [
        (lambda x: x * 3 * (1 + 0.5 * x * x), lambda x: (x + x**3 * 0.5) * 3),
        (lambda x: (0.5 * x * x + 1) * x, lambda x: x + x**3 * 0.5),
    ],
}  # fmt: skip
