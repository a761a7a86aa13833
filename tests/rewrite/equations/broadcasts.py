"""Cases of the equations in ``rewrite/algebra_broadcasts.py``."""

from __future__ import annotations

import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "broadcast_by_hand": [
        (lambda x: x[0, 0].view(1, 1, -1) * x, lambda x: x[0, 0] * x),
        (lambda x: x + x[0, 0][None, None, :] * 3, lambda x: x + x[0, 0] * 3),
        (lambda x: x - (1 + x[0, 0].unsqueeze(0).unsqueeze(0)), lambda x: x - (1 + x[0, 0])),
        (lambda m, w, b: F.linear(m, w) + b[None], lambda m, w, b: F.linear(m, w, b)),
        (lambda x, y: x * x.sum(-1, True).expand_as(y), lambda x, y: x * x.sum(-1, True)),
        (lambda x, y: x * y[:1].expand(2, -1, -1).float(), lambda x, y: x * y[:1].float()),
        (lambda x, y: y[0].broadcast_to(2, 3, 6) + x, lambda x, y: y[0] + x),
    ],
}  # fmt: skip
