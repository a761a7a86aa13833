"""Cases of the equations in ``rewrite/algebra_complex.py``."""

from __future__ import annotations

from typing import Any

import torch

from .cases import Cases


def columns_of(z: Any) -> tuple[Any, Any]:
    """Real and imaginary parts, each with a dimension of size 1 behind."""
    pairs = torch.view_as_real(z)
    return pairs.split(1, -1)[0], pairs[..., 1:]


EQUAL: Cases = {
    "parts_as_complex": [
        (
            lambda x: torch.complex(x[..., ::2], x[..., 1::2].contiguous()),
            lambda x: torch.view_as_complex(x.unflatten(-1, (3, 2))),
        )
    ],
    "parts_as_pairs": [
        (
            lambda x, y: torch.stack((torch.complex(x, y).real, torch.complex(x, y).imag), -1).flatten(-2),
            lambda x, y: torch.view_as_real(torch.complex(x, y)).flatten(-2),
        )
    ],
    "parts_as_halves": [
        (
            lambda x, y: torch.cat(columns_of(torch.complex(x, y)), -2).reshape(2, 3, 12),
            lambda x, y: torch.cat((torch.complex(x, y).real, torch.complex(x, y).imag), -1),
        )
    ],
}  # fmt: skip
