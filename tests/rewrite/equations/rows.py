"""Cases of the equations in ``rewrite/algebra_rows.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "over_rows": [
        (lambda x: F.log_softmax(x.view(-1, 6), -1), lambda x: F.log_softmax(x.flatten(0, 1), dim=-1)),
        (
            lambda x, t: F.nll_loss(F.log_softmax(x[:, 1:].flatten(0, 1), -1), t[:, 1:].flatten()),
            lambda x, t: F.nll_loss(x.log_softmax(-1)[:, 1:].reshape(-1, 6), t[:, 1:].flatten()),
        ),
        (lambda x: F.log_softmax(x[:, 1], -1), lambda x: x.view(2, 3, 6)[:, 1].log_softmax(1)),
        (
            lambda x, t: F.cross_entropy(x[:, 1:].reshape(-1, 6) / 2, t[:, 1:].flatten()),
            lambda x, t: F.cross_entropy((0.5 * x[:, 1:]).flatten(0, 1), t[:, 1:].flatten()),
        ),
        (
            lambda x: F.log_softmax((3 * torch.tanh(x[:, 1:] / 3)).reshape(-1, 6), -1),
            lambda x: F.log_softmax((x.view(2, 3, 6)[:, 1:].flatten(0, 1) / 3).tanh() * 3, 1),
        ),
        (
            lambda x: (x[:, 1:] * x[0, 0, 0]).log_softmax(-1).reshape(-1, 6),
            lambda x: F.log_softmax(x[:, 1:].flatten(0, 1) * x[0, 0, 0], 1),
        ),
    ],
    "part_of_permuted": [
        (
            lambda x, t: F.cross_entropy(x.transpose(1, 2)[..., :-1], t[:, 1:]),
            lambda x, t: F.cross_entropy(x.movedim(-1, 1)[:, :, :-1], t[:, 1:]),
        ),
        (
            lambda x, t: F.cross_entropy(x.permute(1, 2, 0)[1:], t.t()[1:]),
            lambda x, t: F.cross_entropy(x[:, 1:].permute(1, 2, 0), t.t()[1:]),
        ),
    ],
    "over_rows_of_matrices": [
        (
            lambda x, t: F.cross_entropy(x.transpose(1, 2), t, reduction="sum"),
            lambda x, t: F.cross_entropy(x.movedim(-1, 1), t, reduction="sum"),
        ),
        (
            lambda x, t: F.cross_entropy(x.permute(1, 2, 0), t.t()),
            lambda x, t: F.cross_entropy(torch.moveaxis(x, (2, 0), (1, -1)), t.t()),
        ),
        (
            lambda x, t: F.nll_loss(x.log_softmax(-1).mT, t),
            lambda x, t: F.nll_loss(x.permute(0, 2, 1).log_softmax(1), t),
        ),
    ],
    "probabilities_permuted": [
        (lambda x: x.transpose(0, 1).log_softmax(-1).view(6, 6), lambda x: x.log_softmax(-1).permute(1, 0, 2).reshape(6, 6)),
        (lambda x: x.mT.log_softmax(1), lambda x: torch.log_softmax(x.permute(0, 2, 1), -2)),
    ],
    "rows_of_log_probabilities": [
        (lambda x: F.log_softmax(x, -1).reshape(-1, 6), lambda x: F.log_softmax(x.view(-1, 6), -1)),
    ],
    "probabilities_of_one_dimension": [
        (lambda x: torch.log_softmax(x, 1), lambda x: F.log_softmax(x, dim=-2)),
    ],
}  # fmt: skip
