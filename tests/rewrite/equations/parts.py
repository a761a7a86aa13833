"""Cases of the equations in ``rewrite/algebra_parts.py``."""

from __future__ import annotations

import torch

from .cases import Cases

EQUAL: Cases = {
    "indexed": [
        (lambda x: x[..., :3], lambda x: x.chunk(2, -1)[0]),
        (lambda x: x[:, :, 3:], lambda x: x.split(3, 2)[1]),
        (lambda x: x[..., 1::2], lambda x: x.view(2, 3, 3, 2)[..., 1]),
        (lambda x: x[..., 2:5], lambda x: x.split([2, 3, 1], -1)[1]),
        (lambda x: x.view(2, 3, 3, 2).unbind(-1)[0], lambda x: x[..., ::2]),
        (lambda x: x.view(2, 3, 2, 3)[..., 1, :], lambda x: x[..., 3:]),
        (lambda x: x.unflatten(-1, (3, 2))[:, :, -1, :], lambda x: x[..., 4:]),
        (lambda x: x.unflatten(-1, (2, 3)).unbind(-2)[0], lambda x: x.chunk(2, -1)[0]),
        (lambda x: x.view(2, 3, 2, 3)[..., 1], lambda x: x[..., 1::3]),
        (lambda x: x.view(2, 3, 2, 3).movedim(-2, 0)[1], lambda x: x[..., 3:]),
        (lambda x: x.view(2, 3, 3, 2).permute(3, 0, 1, 2).unbind(0)[1], lambda x: x[..., 1::2]),
        (lambda x: torch.view_as_real(torch.complex(x, x))[..., 0], lambda x: torch.complex(x, x).real),
    ],
    "selected": [
        (lambda x: x.view(2, 3, 3, 2).select(-1, 0), lambda x: x[..., ::2]),
        (lambda x: x.view(2, 3, 2, 3).select(2, -1), lambda x: x[..., 3:]),
        (lambda x: x.view(2, 3, 3, 2).movedim(3, 0).select(0, 1), lambda x: x[..., 1::2]),
        (lambda x: torch.view_as_real(torch.complex(x, x)).select(-1, 1), lambda x: torch.complex(x, x).imag),
    ],
    "narrowed": [(lambda x: x.narrow(-1, 2, 3), lambda x: x[..., 2:5])],
}  # fmt: skip
