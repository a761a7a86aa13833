"""Cases of the equations in ``rewrite/algebra_exponentials.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cases import Cases

EQUAL: Cases = {
    "logistic_of_half": [
        (lambda x: 0.5 * (1 + torch.tanh(x / 2)), lambda x: torch.sigmoid(x)),
        (lambda x, y: y * 0.5 * (torch.tanh(0.5 * x) + 1), lambda x, y: y * torch.sigmoid(x)),
    ],
    "power_by_logarithm": [
        (lambda x: torch.exp(-0.5 * torch.log(x.abs())), lambda x: torch.rsqrt(x.abs())),
        (lambda x: torch.exp(torch.log(x.abs()) * 0.5), lambda x: torch.sqrt(x.abs())),
        (lambda x: torch.exp(F.logsigmoid(x)), lambda x: torch.sigmoid(x)),
    ],
    "largest_added_again": [
        (
            lambda x: (m := x.amax(-1, keepdim=True)) + (x - m).exp().sum(-1, keepdim=True).log(),
            lambda x: x.logsumexp(-1, keepdim=True),
        ),
        (
            lambda x: torch.log(torch.exp(x - (m := x.max(-1, keepdim=True)[0].detach())).sum(-1)) + m.squeeze(-1),
            lambda x: x.logsumexp(2),
        ),
        (lambda x: (x - x.amax(2, True)).exp().sum(2).log() + torch.amax(x, -1), lambda x: x.logsumexp(-1)),
    ],
    "largest_taken_off_both": [
        (
            lambda x: (y := x - x.max(dim=-1, keepdim=True)[0]) - y.exp().sum(-1, keepdim=True).log(),
            lambda x: x.log_softmax(-1),
        ),
    ],
    "logistic": [
        (lambda x: 1 / (1 + torch.exp(-x)), lambda x: x.sigmoid()),
        (lambda x, y: y / ((-x).exp() + 1.0), lambda x, y: y * torch.sigmoid(x)),
    ],
}  # fmt: skip
