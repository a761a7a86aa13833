"""Cases of the equations in ``rewrite/algebra_losses.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...graphs import here
from .cases import Cases

EQUAL: Cases = {
    "number_at_a_label": [
        (
            lambda x, k: x.log_softmax(-1).gather(-1, k),
            lambda x, k: F.log_softmax(x, 2).gather(2, k, sparse_grad=False),
        ),
        (lambda x, k: x.gather(-1, k), lambda x, k: torch.gather(x, dim=2, index=k)),
    ],
    "number_of_each_row": [
        (
            lambda x, k: x.view(6, 6)[here(x, torch.arange, 6), k.view(6)],
            lambda x, k: x.reshape(-1, 6)[here(x, torch.arange, 0, 6), k.view(6)],
        ),
        (
            lambda x, k: x[here(x, torch.arange, 2)[:, None], here(x, torch.arange, 3), k[..., 0]],
            lambda x, k: x[here(x, torch.arange, 2).view(-1, 1), here(x, torch.arange, 0, 3).unsqueeze(0), k[..., 0]],
        ),
    ],
    "picked_without_its_dimension": [
        (lambda x, k: x.gather(-1, k).squeeze(2), lambda x, k: x.gather(-1, k)[..., 0]),
        (lambda x, k: x.gather(-1, k).view(2, 3), lambda x, k: x.gather(-1, k).select(2, -1)),
        (lambda x, k: x.gather(-1, k)[:, :, -1], lambda x, k: x.gather(-1, k).flatten(1, 2)),
    ],
    "product_with_one_hot": [
        (
            lambda x, k: (F.one_hot(k[..., 0], 6) * x).sum(-1),
            lambda x, k: torch.einsum("btv,btv->bt", x, F.one_hot(k[..., 0], 6).double()),
        ),
        (
            lambda x, k: (F.one_hot(k[..., 0], 6) * x.log_softmax(-1)).sum(-1),
            lambda x, k: (x.log_softmax(2) * F.one_hot(k[..., 0], 6)).sum(2),
        ),
        (
            lambda x, k: torch.where(F.one_hot(k[..., 0], 6).bool(), x, 0.0).sum(-1),
            lambda x, k: x.masked_fill(~F.one_hot(k[..., 0], 6).to(torch.bool), 0).sum(2),
        ),
    ],
    "sum_of_one_dimension": [(lambda x: torch.logsumexp(x, (2,)), lambda x: x.logsumexp(dim=-1))],
    "log_probabilities": [
        (lambda x: x - x.logsumexp(-1, keepdim=True), lambda x: x.log_softmax(-1)),
        (lambda x: x - x.logsumexp(2)[..., None], lambda x: F.log_softmax(x, dim=2)),
        (
            lambda x, k: x.logsumexp(-1) - x.gather(-1, k).squeeze(-1),
            lambda x, k: -x.log_softmax(-1).gather(-1, k)[..., 0],
        ),
        (
            lambda x, k: x.view(6, 6).gather(-1, k.view(6, 1)) - x.view(6, 6).logsumexp(1, True),
            lambda x, k: x.view(6, 6).log_softmax(-1).gather(1, k.view(6, 1)),
        ),
    ],
    "smoothed": [
        (
            lambda x, k: 0.9 * -x.log_softmax(-1).gather(-1, k).squeeze(-1) + 0.1 * -x.log_softmax(-1).mean(-1),
            lambda x, k: (p := x.log_softmax(-1)).mean(-1) * -0.1 - p.gather(-1, k)[..., 0] * 0.9,
        ),
        (
            lambda x, k: 0.75 * (p := x.log_softmax(-1)).gather(-1, k) + p.sum(-1, keepdim=True) * 0.25 / 6,
            lambda x, k: (p := x.log_softmax(-1)).mean(-1, True) / 4 + p.gather(-1, k) * 0.75,
        ),
    ],
}  # fmt: skip
