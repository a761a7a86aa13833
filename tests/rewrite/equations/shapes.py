"""Cases of the equations in ``rewrite/algebra_shapes.py``."""

from __future__ import annotations

import torch

from weft.rewrite.rule import call
from weft.rewrite.written import written

from .cases import Cases

EQUAL: Cases = {
    "repeated_entries": [
        (lambda x: x[:, :, None].expand(2, 3, 4, 6).reshape(2, 12, 6), lambda x: x.repeat_interleave(4, 1)),
        (lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1).flatten(0, 1), lambda x: x.repeat_interleave(5, dim=-3)),
        (lambda x: x[:, :1].expand(2, 4, 6), lambda x: x[:, :1].repeat_interleave(4, 1)),
    ],
    "same_values": [(lambda x: x.clone().contiguous(), lambda x: x.contiguous())],
    "transposed": [
        (lambda w: w.t(), lambda w: w.transpose(0, 1)),
        (lambda w: w.T, lambda w: w.mT),
        (lambda w: w.T.t().T, lambda w: w.permute(1, 0)),
        (lambda x: x.transpose(1, 2), lambda x: x.transpose(-1, -2)),
    ],
    "permuted": [
        (lambda w: w.permute(1, 0), lambda w: w.t()),
        (lambda x: x.permute(0, 2, 1), lambda x: x.transpose(1, 2)),
        (lambda x: x.permute(0, -1, 1), lambda x: x.mT),
    ],
    "reshaped": [
        (lambda x: x.view(2, 3, 6), lambda x: x.contiguous()),
        (lambda x, y: torch.stack((x, y), -1).flatten(-2), lambda x, y: torch.stack((x, y), 3).view(2, 3, 12)),
        (lambda x, y: torch.stack((x, y, x), -2).flatten(-2), lambda x, y: torch.cat((x, y, x), -1)),
    ],
    "reshaped_as": [(lambda x: x.flatten().view_as(x), lambda x: x.flatten().reshape(2, 3, 6))],
    "stacked_elsewhere": [
        (lambda x, y: torch.stack((x, y)).movedim(0, -1), lambda x, y: torch.stack((x, y), -1)),
        (lambda x, y: torch.stack((x, y, x)).permute(1, 2, 0, 3), lambda x, y: torch.stack((x, y, x), -2)),
    ],
    "halves_flipped": [
        (lambda x: x.view(2, 3, 2, 3).flip(-2).flatten(-2), lambda x: torch.roll(x, 3, -1)),
        (lambda x: torch.flip(x.unflatten(2, (2, 3)), (2,)).reshape(2, 3, 6), lambda x: x.roll(3, 2)),
    ],
    "rolled": [(lambda x: torch.roll(x, (4,), (2,)), lambda x: x.roll(4, -1))],
    "joined_by_writing": [
        (
            lambda x, y: call(written, (x, y), ((0, 6, 1), (6, 12, 1)), 12, (1, 0, 2), torch.float64),
            lambda x, y: torch.cat((x, y), 2),
        ),
        (
            lambda x, y: call(written, (x, y), ((0, 11, 2), (1, 12, 2)), 12, (0, 1, 2), torch.float64),
            lambda x, y: torch.stack((x, y), -1).flatten(-2),
        ),
        (lambda x, y: call(written, (x, y), (0, 1), 2, (0, 1, 2, 3), torch.float64), lambda x, y: torch.stack((x, y), 3)),
        (
            lambda x, y: call(written, (x, y.float()), ((0, 6, 1), (6, 12, 1)), 12, (0, 1, 2), torch.float64),
            lambda x, y: torch.cat((x, y.float().double()), -1),
        ),
    ],
    "joined": [(lambda x, y: torch.cat((x, y), 2), lambda x, y: torch.cat([x, y], dim=-1))],
}  # fmt: skip
