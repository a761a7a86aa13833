"""Cases of the equations in ``rewrite/algebra_reductions.py``."""

from __future__ import annotations

import torch

from .cases import Cases

EQUAL: Cases = {
    "dot_product": [
        (lambda x, y: torch.linalg.vecdot(x, y), lambda x, y: (x * y).sum(-1)),
        (lambda x: torch.linalg.vecdot(x, x, dim=2).unsqueeze(-1), lambda x: (x * x).sum(-1, True)),
    ],
    "root_of_a_mean": [(lambda x: (x * x).sum(-1, True).sqrt() * 6**-0.5, lambda x: (x * x).mean(-1, True).sqrt())],
    "mean_of_a_sum": [(lambda x: (x * x).sum(-1, True) * (1 / 6), lambda x: (x * x).mean(-1, True))],
    "one_dimension": [
        (lambda x: torch.mean(x, dim=[2], keepdim=True), lambda x: x.mean(-1, True)),
        (lambda x: x.sum(axis=2), lambda x: torch.sum(x, -1)),
    ],
    "variance": [
        (lambda x: x.var(-1, unbiased=False, keepdim=True), lambda x: (x - x.mean(-1, True)).pow(2).mean(-1, True)),
        (lambda x: torch.std(x, -1, correction=0, keepdim=True), lambda x: x.var(2, correction=0, keepdim=True).sqrt()),
        (lambda x: x.var(-1, correction=0), lambda x: (x - x.mean(-1, True)).square().mean(-1)),
        (lambda x: x.std(-1, keepdim=True), lambda x: x.std(-1, correction=0, keepdim=True) * 1.2**0.5),
        (lambda x: torch.std(x, 2, correction=2), lambda x: x.std(-1, unbiased=False) * 1.5**0.5),
    ],
    "centred_again": [
        (lambda x: (x - x.mean(-1, True)) - (x - x.mean(-1, True)).mean(-1, True), lambda x: x - x.mean(-1, True)),
    ],
    "variance_from_moments": [
        (lambda x: (x * x).mean(-1, True) - x.mean(-1, True) ** 2, lambda x: x.var(-1, correction=0, keepdim=True)),
    ],
    "one_of_two_moments": [
        (lambda x: torch.var_mean(x, -1, unbiased=False, keepdim=True)[0], lambda x: x.var(-1, False, True)),
        (lambda x: torch.std_mean(x, dim=-1, correction=0)[0], lambda x: x.std(-1, correction=0)),
        (lambda x: torch.var_mean(x, dim=-1)[1], lambda x: x.mean(-1)),
    ],
    "dimension_put_back": [
        (lambda x: (x * x).mean(-1).unsqueeze(-1), lambda x: (x * x).mean(-1, True)),
        (lambda x: torch.rsqrt(x.square().mean(-1) + 1e-3)[..., None], lambda x: (x.square().mean(-1, True) + 1e-3).rsqrt()),
        (lambda x: (x * x).sum(-1).sqrt()[:, :, None], lambda x: x.square().sum(-1, True).sqrt()),
        (lambda x: x.logsumexp(-1).unsqueeze(2), lambda x: x.logsumexp(-1, keepdim=True)),
    ],
    "euclidean_norm": [
        (lambda x: x.norm(2, dim=-1, keepdim=True), lambda x: (x * x).sum(-1, True).sqrt()),
        (lambda x: torch.linalg.vector_norm(x, dim=2, keepdim=True), lambda x: x.norm(dim=-1, keepdim=True)),
        (lambda x: torch.linalg.norm(x, dim=-1, keepdim=True), lambda x: x.norm(dim=-1, keepdim=True)),
    ],
}  # fmt: skip
