"""Every equation on random tensors: both spellings get one expression, and what an expression says is what its node computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx

from weft.rewrite import algebra
from weft.rewrite.expr import Expr, View, strip_casts
from weft.rewrite.rule import call
from weft.rewrite.written import written

from ..graphs import cases, here, normal, trace
from ..programs import function_of, inputs, programs

SQUARES = (lambda x: (x * x).sum(-1, keepdim=True), lambda x: x.pow(2).mean(-1, keepdim=True))


def columns_of(z: Any) -> tuple[Any, Any]:
    """Real and imaginary parts, each with a dimension of size 1 behind."""
    pairs = torch.view_as_real(z)
    return pairs.split(1, -1)[0], pairs[..., 1:]


EQUAL: dict[str, list[tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "bias_added": [
        (lambda x, w, b: F.linear(x, w) + b, lambda x, w, b: F.linear(x, w, b)),
        (lambda x, w, b: b + x @ w.T, lambda x, w, b: F.linear(x, w, b)),
    ],
    "broadcast_by_hand": [
        (lambda x: x[0, 0].view(1, 1, -1) * x, lambda x: x[0, 0] * x),
        (lambda x: x + x[0, 0][None, None, :] * 3, lambda x: x + x[0, 0] * 3),
        (lambda x: x - (1 + x[0, 0].unsqueeze(0).unsqueeze(0)), lambda x: x - (1 + x[0, 0])),
        (lambda m, w, b: F.linear(m, w) + b[None], lambda m, w, b: F.linear(m, w, b)),
        (lambda x, y: x * x.sum(-1, True).expand_as(y), lambda x, y: x * x.sum(-1, True)),
        (lambda x, y: x * y[:1].expand(2, -1, -1).float(), lambda x, y: x * y[:1].float()),
        (lambda x, y: y[0].broadcast_to(2, 3, 6) + x, lambda x, y: y[0] + x),
    ],
    "negative_addend": [
        (lambda x, y: x + (-y), lambda x, y: x - y),
        (lambda x, y: x - (-y), lambda x, y: x + y),
        (lambda x, y: (-y) + x, lambda x, y: x - y),
    ],
    "negative_product": [(lambda x: x * -1, lambda x: -x), (lambda x, y: x - y * -1.0, lambda x, y: x + y)],
    "product_added": [
        (lambda x, y: torch.addcmul(x, x, y), lambda x, y: x + x * y),
        (lambda x, y: torch.addcmul(x, x, y, value=0.5), lambda x, y: x + (x * y) * 0.5),
    ],
    "scaled_addend": [
        (lambda x, y: torch.add(x, y, alpha=3), lambda x, y: x + y * 3),
        (lambda x, y: torch.sub(x, y, alpha=0.5), lambda x, y: x - y * 0.5),
    ],
    "repeated_entries": [
        (lambda x: x[:, :, None].expand(2, 3, 4, 6).reshape(2, 12, 6), lambda x: x.repeat_interleave(4, 1)),
        (lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1).flatten(0, 1), lambda x: x.repeat_interleave(5, dim=-3)),
        (lambda x: x[:, :1].expand(2, 4, 6), lambda x: x[:, :1].repeat_interleave(4, 1)),
    ],
    "joined_with_a_negative": [(lambda x, y: torch.cat((x, -y), -1), lambda x, y: -torch.cat((-x, y), -1))],
    "reversed_subtraction": [
        (lambda x, y: torch.rsub(x, y), lambda x, y: y - x),
        (lambda x: 1 - x, lambda x: torch.rsub(x, 1)),
    ],
    "square_of_itself": [(lambda x: x * x, lambda x: x**2), (lambda x: x * x.double(), lambda x: torch.square(x))],
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
    "square_of_a_magnitude": [
        (lambda x: x.abs() ** 2, lambda x: x * x),
        (lambda x, y: (y - x.double()).neg().square(), lambda x, y: (y - x) ** 2),
    ],
    "dot_product": [
        (lambda x, y: torch.linalg.vecdot(x, y), lambda x, y: (x * y).sum(-1)),
        (lambda x: torch.linalg.vecdot(x, x, dim=2).unsqueeze(-1), lambda x: (x * x).sum(-1, True)),
    ],
    "normalized_of_three": [
        (
            lambda x, y: torch.native_layer_norm(x, (6,), y[0, 0], None, 1e-3)[0],
            lambda x, y: F.layer_norm(x, (6,), y[0, 0], None, 1e-3),
        )
    ],
    "one_group": [
        (lambda m: F.group_norm(m, 1), lambda m: F.layer_norm(m, (6,))),
        (lambda m: F.group_norm(m, 1, m[0], m[1], 1e-3), lambda m: F.layer_norm(m, (6,), m[0], m[1], 1e-3)),
    ],
    "mean_taken_off_last": [
        (
            lambda x, y: x * (x.abs().rsqrt() * y) + (y - x.mean(-1, True) * y * x.abs().rsqrt()),
            lambda x, y: (x - x.mean(-1, True)) * x.abs().rsqrt() * y + y,
        ),
    ],
    "scaled_mean_taken_off": [
        (lambda x, y: x * y - y * x.mean(-1, keepdim=True), lambda x, y: (x - x.mean(-1, True)) * y),
        (
            lambda x, y: y + x * y - x.double().mean(-1, keepdim=True) * y,
            lambda x, y: (x - x.mean(-1, True)) * y + y,
        ),
    ],
    "root_of_a_mean": [(lambda x: (x * x).sum(-1, True).sqrt() * 6**-0.5, lambda x: (x * x).mean(-1, True).sqrt())],
    "negative_operand": [(lambda x, w: F.linear(-x, w), lambda x, w: -F.linear(x, w))],
    "joined_operands": [
        (
            lambda x, y, w, b: F.linear(torch.cat((x, y), -1), torch.cat((w, w * 2), 1), b),
            lambda x, y, w, b: F.linear(x, w, b) + F.linear(y, w * 2),
        )
    ],
    "tensor_product": [
        (lambda x, w: torch.tensordot(x, w.T, 1), lambda x, w: F.linear(x, w)),
        (lambda x, w: torch.tensordot(x, w, dims=([-1], [1])), lambda x, w: F.linear(x, w)),
        (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), lambda x, w: F.linear(x, w)),
    ],
    "square_of_a_root": [
        (lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2, lambda x: (x * x).sum(-1, True)),
        (lambda x: (x.norm(dim=-1, keepdim=True) * 3) ** 2, lambda x: (x * x).sum(-1, True) * 9),
    ],
    "product_of_row_and_column": [
        (lambda x: (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1), lambda x: (x * x).sum(-1, True)),
        (lambda x: torch.matmul(x.unsqueeze(2), x.unsqueeze(3)).squeeze(3), lambda x: (x * x).sum(-1, True)),
    ],
    "logistic_of_half": [
        (lambda x: 0.5 * (1 + torch.tanh(x / 2)), lambda x: torch.sigmoid(x)),
        (lambda x, y: y * 0.5 * (torch.tanh(0.5 * x) + 1), lambda x, y: y * torch.sigmoid(x)),
    ],
    "power_by_logarithm": [
        (lambda x: torch.exp(-0.5 * torch.log(x.abs())), lambda x: torch.rsqrt(x.abs())),
        (lambda x: torch.exp(torch.log(x.abs()) * 0.5), lambda x: torch.sqrt(x.abs())),
        (lambda x: torch.exp(F.logsigmoid(x)), lambda x: torch.sigmoid(x)),
    ],
    "mean_of_a_sum": [(lambda x: (x * x).sum(-1, True) * (1 / 6), lambda x: (x * x).mean(-1, True))],
    "division": [
        (lambda x, y: x / y, lambda x, y: x * torch.reciprocal(y)),
        (lambda x: x.sum(-1, True) / 6, lambda x: x.mean(-1, True)),
        (lambda x: (x * x).sum(-1, True).sqrt() / 6**0.5, lambda x: (x * x).mean(-1, True).sqrt()),
        (lambda x: 1 / x, lambda x: torch.reciprocal(x)),
        (lambda x: x * 6 / 4, lambda x: x * 1.5),
        (lambda x: x / 3, lambda x: x * (1 / 3)),
    ],
    "two_factors": [(lambda x: x / 8 * 4, lambda x: x * 0.5), (lambda x: 2 * (x * 1.5), lambda x: x * 3.0)],
    "logistic": [
        (lambda x: 1 / (1 + torch.exp(-x)), lambda x: x.sigmoid()),
        (lambda x, y: y / ((-x).exp() + 1.0), lambda x, y: y * torch.sigmoid(x)),
    ],
    "gated_halves": [(lambda x: F.glu(x, -1), lambda x: x[..., :3] * x.chunk(2, -1)[1].sigmoid())],
    "reciprocal_of_a_root": [
        (lambda x: 1 / (x * x).sqrt(), lambda x: torch.rsqrt(x * x)),
        (lambda x: 1 / torch.rsqrt(x * x), lambda x: torch.sqrt(x * x)),
        (lambda x, y: x / (1 / y), lambda x, y: x * y),
    ],
    "powers": [
        (lambda x: x.pow(2), lambda x: torch.square(x)),
        (lambda x: (x * x) ** 0.5, lambda x: (x * x).sqrt()),
        (lambda x: torch.pow(x * x, -0.5), lambda x: (x * x).rsqrt()),
        (lambda x: x**-1, lambda x: 1.0 / x),
    ],
    "one_dimension": [
        (lambda x: torch.mean(x, dim=[2], keepdim=True), lambda x: x.mean(-1, True)),
        (lambda x: x.sum(axis=2), lambda x: torch.sum(x, -1)),
    ],
    "variance": [
        (lambda x: x.var(-1, unbiased=False, keepdim=True), lambda x: (x - x.mean(-1, True)).pow(2).mean(-1, True)),
        (lambda x: torch.std(x, -1, correction=0, keepdim=True), lambda x: x.var(2, correction=0, keepdim=True).sqrt()),
        (lambda x: x.var(-1, correction=0), lambda x: (x - x.mean(-1, True)).square().mean(-1)),
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
    ],
    "lower_bound": [
        (lambda x: torch.clamp(x, min=0.25), lambda x: x.clamp_min(0.25)),
        (lambda x: torch.clip(x, 0.25, float("inf")), lambda x: x.clamp(0.25)),
    ],
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
    "reshaped_as": [(lambda x: x.flatten().view_as(x), lambda x: x.flatten().reshape(2, 3, 6))],
    "stacked_elsewhere": [
        (lambda x, y: torch.stack((x, y)).movedim(0, -1), lambda x, y: torch.stack((x, y), -1)),
        (lambda x, y: torch.stack((x, y, x)).permute(1, 2, 0, 3), lambda x, y: torch.stack((x, y, x), -2)),
    ],
    "halves_flipped": [
        (lambda x: x.view(2, 3, 2, 3).flip(-2).flatten(-2), lambda x: torch.roll(x, 3, -1)),
        (lambda x: torch.flip(x.unflatten(2, (2, 3)), (2,)).reshape(2, 3, 6), lambda x: x.roll(3, 2)),
    ],
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
    "narrowed": [(lambda x: x.narrow(-1, 2, 3), lambda x: x[..., 2:5])],
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
    "product_and_sum": [
        (lambda m, w, b: torch.addmm(b, m, w.T), lambda m, w, b: F.linear(m, w, b)),
        (lambda m, w, b: torch.addmm(b, m, w.T, beta=2, alpha=0.5), lambda m, w, b: F.linear(m, w) * 0.5 + b * 2),
        (
            lambda x, w: torch.baddbmm(x @ w.T, x, w.T.expand(2, -1, -1), alpha=0.5),
            lambda x, w: F.linear(x, w) * 0.5 + x @ w.T,
        ),
    ],
    "merged_adapter": [
        (
            lambda x, s, b, p, q: F.linear(x, s + 0.5 * (q @ p), b),
            lambda x, s, b, p, q: F.linear(x, s, b) + F.linear(F.linear(x, p), q) * 0.5,
        ),
        (
            lambda x, s, p, q: x @ (q @ p + s).T,
            lambda x, s, p, q: F.linear(x, s) + F.linear(F.linear(x, p), q),
        ),
        (
            lambda x, s, b, p, q: F.linear(x, s - (q @ p) / 4, b),
            lambda x, s, b, p, q: F.linear(x, s, b) - F.linear(F.linear(x, p), q) * 0.25,
        ),
        (
            lambda x, s, p, q, n: F.linear(x, s + n * (q @ p)),
            lambda x, s, p, q, n: F.linear(x, s) + F.linear(F.linear(x, p), q) * n,
        ),
        (
            lambda x, s, p, q, n: F.linear(x, s - (q @ p) / n),
            lambda x, s, p, q, n: F.linear(x, s) - F.linear(F.linear(x, p), q) / n,
        ),
        (
            lambda x, v, p, q, b: x @ (v + p.T @ q.T * 2) + b,
            lambda x, v, p, q, b: x @ v + F.linear(F.linear(x, p), q) * 2 + b,
        ),
        (
            lambda x, s, p, q: x @ (s.T - (q @ p).T),
            lambda x, s, p, q: F.linear(x, s) - F.linear(F.linear(x, p), q),
        ),
        (
            lambda x, s, p, q, b: F.linear(x, s + (p.T @ q.T * 0.5).T, b),
            lambda x, s, p, q, b: F.linear(x, s, b) + F.linear(F.linear(x, p), q) * 0.5,
        ),
        (
            lambda x, v, m, w, b: x @ (v + m[:2].T.contiguous() @ w[:2, :4].contiguous()),
            lambda x, v, m, w, b: x @ v + x @ m[:2].T.contiguous() @ w[:2, :4].contiguous(),
        ),
    ],
    "adapter_of_one_matrix": [
        (lambda x, s, p, q: F.linear(x, s) + F.linear(x, q @ p), lambda x, s, p, q: F.linear(x, s) + x @ p.T @ q.T),
        (
            lambda x, s, p, q: F.linear(x, s) - 0.5 * (x @ (p.T @ q.T)),
            lambda x, s, p, q: F.linear(x, s) - x @ p.T @ q.T * 0.5,
        ),
    ],
    "bias_of_an_adapter": [
        (
            lambda x, s, p, q, b: F.linear(F.linear(x, p), q, b) + F.linear(x, s),
            lambda x, s, p, q, b: F.linear(x, s, b) + F.linear(F.linear(x, p), q),
        )
    ],
    "summed_products": [
        (lambda x, w: torch.einsum("bti,oi->bto", x, w), lambda x, w: F.linear(x, w)),
        (lambda x, v: torch.einsum("...i, io -> ...o", x, v), lambda x, v: x @ v),
        (lambda x, y: torch.einsum("...d,...d->...", x, y), lambda x, y: (x * y).sum(-1)),
        (lambda x, y: torch.einsum("btd,btd->btd", x, y), lambda x, y: x * y),
        (lambda x, p, q: torch.einsum("bti,ri,or->bto", x, p, q), lambda x, p, q: x @ p.T @ q.T),
        (lambda x, p, q: torch.einsum("... i, o r, r i -> ... o", x, q, p), lambda x, p, q: x @ p.T @ q.T),
    ],
    "functional": [(lambda x: F.silu(x.clone(), inplace=False), lambda x: F.silu(x))],
    "sigmoid_times_itself": [(lambda x: x * torch.sigmoid(x), lambda x: F.silu(x)), (lambda x: x.sigmoid() * x, F.silu)],
    "matrix_product": [
        (lambda x, w: x @ w.T, lambda x, w: F.linear(x, w)),
        (lambda x, v: torch.matmul(x, v), lambda x, v: x @ v),
        (lambda x, w: torch.bmm(x, w.T.expand(2, -1, -1)), lambda x, w: F.linear(x, w)),
        (lambda x, v: x @ v.unsqueeze(0).repeat(2, 1, 1), lambda x, v: x @ v),
        (lambda x, v: x @ v[None].expand(2, 6, 4), lambda x, v: x @ v),
    ],
    "linear_on_rows": [
        (lambda x, w: F.linear(x.view(-1, 6), w).view(2, 3, 4), lambda x, w: F.linear(x, w)),
        (lambda x, v: (x.reshape(6, 6) @ v).reshape(2, 3, -1), lambda x, v: x @ v),
    ],
    "over_rows": [
        (lambda x: F.log_softmax(x.view(-1, 6), -1), lambda x: F.log_softmax(x.flatten(0, 1), dim=-1)),
        (
            lambda x, t: F.nll_loss(F.log_softmax(x[:, 1:].flatten(0, 1), -1), t[:, 1:].flatten()),
            lambda x, t: F.nll_loss(x.log_softmax(-1)[:, 1:].reshape(-1, 6), t[:, 1:].flatten()),
        ),
        (lambda x: F.log_softmax(x[:, 1], -1), lambda x: x.view(2, 3, 6)[:, 1].log_softmax(1)),
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
    "rows_of_log_probabilities": [
        (lambda x: F.log_softmax(x, -1).reshape(-1, 6), lambda x: F.log_softmax(x.view(-1, 6), -1)),
    ],
    "probabilities_of_one_dimension": [
        (lambda x: torch.log_softmax(x, 1), lambda x: F.log_softmax(x, dim=-2)),
    ],
}  # fmt: skip
"""By the name of the equation, two spellings of one value each."""

ELSEWHERE = {
    "interleaved_with_a_negative": "tests/passes/test_rope.py",
    "pairs_as_complex": "test_pairs_as_complex_numbers_and_back",
    "complex_as_pairs": "test_pairs_as_complex_numbers_and_back",
    "product_inside_autograd_function": "tests/passes/test_quant_linear.py",
    "packed_bytes": "tests/passes/test_quant_linear.py",
}
"""Where the other equations are tested."""

INPUTS: dict[str, Tensor] = {
    "x": normal(0, 2, 3, 6), "y": normal(1, 2, 3, 6), "w": normal(2, 4, 6), "v": normal(3, 6, 4), "b": normal(4, 4),
    "m": normal(5, 3, 6), "s": normal(6, 4, 6), "p": normal(7, 2, 6), "q": normal(8, 4, 2),
    "t": torch.tensor([[1, 0, 5], [2, -100, 3]]), "k": torch.tensor([[[1], [0], [5]], [[2], [4], [3]]]),
    "n": torch.tensor(3.0),
}  # fmt: skip
NAMED = {name: value.double() if value.is_floating_point() else value for name, value in INPUTS.items()}


class _Valued(fx.Interpreter):
    """Keeps the real value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values = dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        """As it is, and noted."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def rows_chosen(x: Tensor, steps: tuple[Any, ...]) -> Tensor:
    """What ``steps`` choose of x, as rows."""
    for name, *arguments in steps:
        x = x[arguments[0]] if name in ("getitem", "other") else getattr(x, name)(*arguments)
    return x.flatten(0, -2)


MEANINGS: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "neg": torch.neg, "square": torch.square,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": lambda x: 1 / x, "clamp_min": torch.clamp_min,
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y, "chosen": torch.where, "logsumexp": torch.logsumexp,
    "relu": torch.relu, "silu": F.silu, "linear": F.linear, "sigmoid": torch.sigmoid,
    "erf": torch.erf, "tanh": torch.tanh, "pow": torch.pow,
    "maximum": lambda x, y: torch.maximum(x, torch.as_tensor(y, dtype=x.dtype)),
    "transposed": lambda x: x.transpose(-1, -2),
    "mean": lambda x, dim=None, keepdim=False, *_: x.mean() if dim is None else x.mean(dim, keepdim),
    "sum": lambda x, dim=None, keepdim=False, *_: x.sum() if dim is None else x.sum(dim, keepdim),
    "linear_columns": lambda x, w, b: x @ w if b is None else x @ w + b,
    "part": lambda x, start, stop, step: x[..., start:stop:step],
    "interleave": lambda a, b: torch.stack((a, b), -1).flatten(-2),
    "as_complex": lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()),
    "from_complex": lambda z: torch.view_as_real(z).flatten(-2),
    "real": torch.real, "imag": torch.imag, "complex": torch.complex,
    "cat": torch.cat, "stack": torch.stack, "roll": torch.roll,
    "rows": rows_chosen, "permuted": torch.permute,
    "picked": lambda x, index, how, smoothing: (
        ((1 - smoothing) * x.gather(-1, index.reshape(-1, 1) % x.shape[-1]) + smoothing * x.mean(-1, keepdim=True))
        .view(index.shape[:-1] if how == "squeezed" else index.shape)
    ),
    "cast": lambda x, dtype: x.to(dtype),
    "log_softmax": lambda x, dim, *_: torch.log_softmax(x, dim),
}  # fmt: skip
"""What canonical operations stand for."""


def meaning(expr: Any, values: dict[fx.Node, Any]) -> Any:
    """What ``expr`` says, computed anew down to the graph's inputs where its operations are known."""
    if isinstance(expr, tuple | list):
        return type(expr)(meaning(e, values) for e in expr)
    if not isinstance(expr, Expr):
        return expr
    if expr.op in MEANINGS:
        return MEANINGS[expr.op](*(meaning(a, values) for a in expr.args))
    assert expr.node is not None
    return values[expr.node]


def assert_sound(module: fx.GraphModule, arguments: list[Tensor]) -> None:
    """The expression of every node means what the node computes."""
    run, view = _Valued(module), View()
    run.run(*arguments)
    for node in module.graph.nodes:
        expr, value = view.of(node), run.values.get(node)
        if node.op == "output" or not isinstance(value, Tensor) or not isinstance(expr, Expr):
            continue
        found = meaning(expr, run.values)
        assert found.shape == value.shape, f"{node.format_node()} is seen as {expr}"
        torch.testing.assert_close(
            found.to(value.dtype), value, rtol=1e-9, atol=1e-9, msg=lambda t, n=node: f"{n}: {t}"
        )


def _arguments(*functions: Callable[..., Any]) -> dict[str, Tensor]:
    names = dict.fromkeys(n for f in functions for n in f.__code__.co_varnames[: f.__code__.co_argcount])
    return {name: NAMED[name] for name in names} if names.keys() <= NAMED.keys() else {"x": NAMED["x"]}


def both(left: Callable[..., Any], right: Callable[..., Any]) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """One graph that computes both spellings of the same inputs."""
    left, right = (
        f if hasattr(f, "__code__") and f.__module__ == __name__ else (lambda x, f=f: f(x)) for f in (left, right)
    )
    given = _arguments(left, right)

    def run(*values: Any) -> Any:
        named = dict(zip(given, values, strict=True))
        return tuple(f(**{n: named[n] for n in _arguments(f)}) for f in (left, right))

    source = f"lambda {', '.join(given)}: run({', '.join(given)})"
    return trace(eval(source, {"run": run}), given), given


def pairs() -> Iterator[Any]:
    """Every equation with each of its cases."""
    for name, cases_of in EQUAL.items():
        for i, (left, right) in enumerate(cases_of):
            yield pytest.param(name, left, right, id=f"{name}-{i}")


@pytest.mark.parametrize(("name", "left", "right"), pairs())
def test_two_spellings_are_one_expression(
    name: str, left: Callable[..., Any], right: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fired = set[str]()

    def noting(equation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = equation(*args)
            fired.update([equation.__name__] if found is not None else [])
            return found

        return run

    monkeypatch.setattr(algebra, "EQUATIONS", {op: [noting(e) for e in es] for op, es in algebra.EQUATIONS.items()})
    module, given = both(left, right)
    view, (a, b) = View(), next(n for n in module.graph.nodes if n.op == "output").args[0]
    seen = [strip_casts(view.of(n), only_widening=False) for n in (a, b)]
    assert seen[0] is seen[1], f"{seen[0]}\n{seen[1]}"
    assert name in fired
    torch.testing.assert_close(*module(*given.values()))
    assert_sound(module, list(given.values()))


def test_every_equation_has_a_case() -> None:
    names = {e.__name__ for equations in algebra.EQUATIONS.values() for e in equations}
    assert names == EQUAL.keys() | ELSEWHERE.keys()


def test_pairs_as_complex_numbers_and_back() -> None:
    def turned(x: Any, y: Any) -> Any:
        z = torch.view_as_complex(x.reshape(2, 3, 3, 2)) * torch.view_as_complex(y.view(2, 3, -1, 2))
        return torch.view_as_real(z).flatten(-2)

    given = {"x": NAMED["x"], "y": NAMED["y"]}
    module = trace(turned, given)
    last = next(n for n in module.graph.nodes if n.op == "output").args[0]
    expr = View().of(last)
    assert expr.op == "from_complex" and expr.args[0].op == "mul"
    assert [a.op for a in expr.args[0].args] == ["as_complex", "as_complex"]
    assert_sound(module, list(given.values()))


NEAR: dict[str, Callable[..., Any]] = {
    "a bias for each row": lambda m, w: F.linear(m, w) + m[:, :1],
    "broadcasts that make the result larger": lambda x: (
        x[:1] * x[:, :1].expand_as(x) + x[0, 0].view(1, 1, -1) * x[0, :1, 0] + x[0, 0][None] * x[0, :1, 0]
    ),
    "rows of other numbers": lambda x, k: (
        x * x[0, :, :2].reshape(1, 6) + x * x[0, :, 0].view(1, -1, 1) + (x[..., :3] * x[0, 0][k[:1].mT]).sum()
    ),
    "no curves": lambda x, y: (
        x * (0.5 * (2 + torch.erf(y))) + x * (y * (1 + torch.erf(y))) + (x + y * torch.tanh(x)) + (x / 2 + x * torch.erf(y))
        + (1 + torch.erf(x)) * ((1 + torch.erf(y)) * 0.5) + 0.5 * ((1 + torch.tanh(x)) * (1 + torch.erf(x)))
        + (0.5 * (1 + torch.tanh(x))) * (1 + torch.tanh(x)) + (x - x / 2 * torch.erf(y))
    ),
    "other cubics": lambda x, y: (
        x * x * y + (0.5 * x * y) * x + x * (2 + 0.5 * x * x) + y * (1 + 0.5 * x * x) + x * (1 + x * x) + (x * x) * (x * x)
    ),
    "products of diagonals": lambda x: torch.einsum("tt,tt->t", x[0, :, :3], x[1, :, :3]),
    "other means taken off": lambda x, y: (
        (x * y - x.mean(-1, True) * x) + (x * y - y * x.mean(1, True)) + (x * y + (y - y.mean(-1, True) * y))
        + torch.sub(x * y, y * x.mean(-1, True), alpha=2) + (x * y - 2 * y * x.mean(-1, True)) + (x - x.mean(-1, True))
    ),
    "groups of others": lambda x, m: F.group_norm(x.mT, 1).sum() + F.group_norm(m, 2) + F.group_norm(m[..., None], 1)[..., 0],
    "moments of a norm": lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-3)[1] + x,
    "dot products over another dimension": lambda x, y: (
        torch.linalg.vecdot(x, y, dim=1).sum() + torch.linalg.vecdot(x, y[0], dim=0)
    ),
    "squares of complex magnitudes": lambda x, y: torch.complex(x, y).abs() ** 2 + torch.complex(x, y).neg().square().real,
    "a scaled bias": lambda m, w, b: torch.add(F.linear(m, w), b, alpha=2),
    "a bias of another size": lambda m, w: F.linear(m, w[:1]) + w[:, 0],
    "a merged update of full rank": lambda x, s, w, v: F.linear(x, s + w @ v @ w),
    "a merged update taken off": lambda x, s, p, q: F.linear(x, s - q @ p),
    "another order of letters": lambda x, w: torch.einsum("bti,oi->tbo", x, w) + torch.einsum("bti,ci->tbc", x, w),
    "a contraction in front": lambda x, y: torch.einsum("btd,btd->d", x, y) + torch.einsum("btd,bsd->bts", x, y).sum(),
    "moments of others": lambda x, y: (x * x).mean(-1, True) - y.mean(-1, True) ** 2,
    "moments without the dimension": lambda x: (x * x).mean(-1) - x.mean(-1) ** 2,
    "another mean taken off": lambda x, y: (x - y.mean(-1, True)) - (x - y.mean(-1, True)).mean(-1, True),
    "dimensions put back elsewhere": lambda x: x.mean(-1)[:, None].sum() + x.mean(1)[..., None] + x.mean()[None],
    "halves of another dimension": lambda x: F.glu(x.transpose(1, 2), 1) + F.glu(x.mT, -2),
    "no logistic": lambda x: 1 / (1 + torch.exp(x)) + 1 / (2 + torch.exp(-x)),
    "a sum over another count": lambda x: x.sum(-1, True) / 5,
    "a sum over two dimensions": lambda x: x.sum((1, 2), True) / 6,
    "a sum over another dimension": lambda x: x.sum(1, True) * (1 / 6),
    "rounded division": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "one divided by a number": lambda x: x * 0 + 1 / 3,
    "unbiased variance": lambda x: x.var(-1, keepdim=True) + x.std(-1, correction=1, keepdim=True),
    "variance without the dimension": lambda x: x.var(-1, correction=0),
    "another norm": lambda x: x.norm(1, dim=-1, keepdim=True) + x.norm(),
    "other choices": lambda x, y: (
        torch.where(x <= 0, 1, x) + torch.where(x <= 0, 0, y) + torch.where(x <= y, 0, x) + torch.where(x > 0, 0, x)
        + torch.where(x.float() <= 0, 0, x) + F.threshold(x, 0, 1) + F.threshold(x, 1, 0)
    ),
    "choices among more": lambda x: (
        torch.where(x[..., :1] > 0, x[..., :1], torch.zeros_like(x)) + torch.maximum(x[:1], torch.zeros_like(x))
        + x[:1, :1].clamp(min=torch.zeros_like(x)) + x[..., :1].masked_fill(x[..., :1] * torch.ones_like(x) > 0, 0)
    ),
    "zeros and no zeros": lambda x: (
        torch.maximum(x, torch.ones_like(x)) + torch.maximum(x, torch.full_like(x, 0.5)) + x.max() + x.max(-1)[0].sum()
    ),
    "picked otherwise": lambda x, k: (
        x.gather(1, k % 3) + x.gather(-1, k.expand(2, 3, 2))[..., :1] + x.view(6, 6).gather(-1, k.view(6, 1))[k.view(6), 0].sum()
        + x[:1, :1].gather(-1, k[:1, :1])[0]
        + x.view(6, 6)[here(x, torch.arange, 5, -1, -1), k.view(6)] + x.view(6, 6)[k.view(6), here(x, torch.arange, 6)]
        + x[0][here(x, torch.arange, 3), :6].sum() + x[0][here(x, torch.arange, 2), k[0, :1, 0]].sum()
        + x.view(6, 6)[here(x, torch.arange, 6), k.view(6).int()] + x.view(3, 12)[here(x, torch.arange, 3), -k[0, :, 0]].sum()
    ),
    "products with other encodings": lambda x, k: (
        (F.one_hot(k[..., 0], 6) * x).sum(-1, keepdim=True) + (F.one_hot(k[..., 0], 6) * x).sum(1, keepdim=True)
        + (F.one_hot(k[:1, :, 0], 6) * x).sum(-1)[..., None] + (F.one_hot(k[..., 0], 6) * x).sum()
    ),
    "other differences": lambda x, y, k: (
        (x - y.logsumexp(-1, True)) + (x - x.logsumexp(1, True)) + (x.logsumexp(-1, True) - x)
        + (y.logsumexp(-1) - x.gather(-1, k)[..., 0])[..., None] + torch.sub(x, x.logsumexp(-1, True), alpha=2)
        + (x.view(6, 6) - x.view(6, 6).logsumexp(-1)).sum() + (x[0].logsumexp(-1, True) - x[0].gather(-1, k[0])[:, 0]).sum()
    ),
    "smoothed otherwise": lambda x, y, k: (
        0.9 * (p := x.log_softmax(-1)).gather(-1, k)[..., 0] + 0.2 * p.mean(-1) + 1.1 * p.gather(-1, k)[..., 0] - 0.1 * p.mean(-1)
        + (0.9 * p.gather(-1, k)[..., 0] + 0.1 * y.log_softmax(-1).mean(-1)) + (0.9 * p.gather(-1, k)[..., 0] + 0.1 * x.mean(-1))
        + (0.9 * p.gather(-1, k) + 0.1 * p.mean(-1)[:, :1, None])[..., 0] + (0.9 * p.gather(-1, k)[..., 0] - 0.1 * p.mean(-1))
        + (0.9 * x.gather(-1, k)[..., 0] + 0.1 * x.mean(-1)) + (0.9 * p.gather(-1, k)[..., 0] + 0.1 * p.sum(-1))
        + (0.5 * (0.9 * p.gather(-1, k)[..., 0] + 0.1 * p.mean(-1)) + 0.5 * p.mean(-1))
        + (0.9 * p.gather(-1, k)[..., 0] + 0.1 * p.mean())
    ),
    "adapters of full rank": lambda x, s, p, q, w: (
        F.linear(x, s) + F.linear(x, w @ w.T @ s) + x @ (w.T @ w)[:, :4] - F.linear(x, q @ q.T @ s)
    ),
    "a product of low rank and its bias": lambda x, p, q, b: F.linear(x, q @ p) + b,
    "an adapter that something is taken off": lambda x, s, p, q: F.linear(x, q @ p) - F.linear(x, s),
    "biases of others": lambda x, s, p, q, b: (
        F.linear(x, s, b) + F.linear(F.linear(x, p), q, b) + (F.linear(x, s[:1]) + F.linear(F.linear(x, p), q, b))
    ),
    "another matrix for each": lambda x, y, v: (
        x @ y.mT @ v[:3].expand(2, 3, 4) + x[:1] @ v.expand(2, 6, 4) + x @ v[here(x, torch.tensor, [[0] * 6, [1] * 6])]
        + x @ v.unsqueeze(1).expand(6, 6, 4)[:2] + x @ v[:, None].expand(6, 6, 4)[1:3] + x @ v[:1].expand(2, 6, 4)
        + x[..., :4] @ v[:4].unsqueeze(1).expand(4, 4, 4)[:2]
    ),
    "operands that are broadcast": lambda x, w, p, q: (
        torch.einsum("bti,oi->bto", x, w[:, :1]) + torch.einsum("bti,oi->bto", x[..., :1], w)
        + torch.einsum("...i,ri,or->...o", x, p[:, :1], q) + torch.einsum("bti,ri,or->bto", x, p, q[:, :1])
    ),
    "three operands otherwise": lambda x, p, q: (
        torch.einsum("bti,ri,ri->bt", x, p, p).sum() + torch.einsum("bti,ri,ir->bti", x, p, p.T).sum()
        + torch.einsum(x, [0, 1, 2], p, [3, 2]).sum()
        + torch.einsum("bti,ri,or->bot", x, p, q).sum() + torch.einsum("bti,ri,or->btro", x, p, q).sum(2)
    ),
    "merged updates of the other sign": lambda x, s, p, q: F.linear(x, q @ p - s) + F.linear(x, s + s[:, :1] * (q @ p)),
    "clamped on both sides": lambda x: x.clamp(-0.5, 0.5) + x.clamp(max=0.1),
    "other powers": lambda x: x**3 + 2.0**x + x.pow(0),
    "a transpose of leading dimensions": lambda x: x.transpose(0, 1).transpose(0, 2),
    "log probabilities permuted otherwise": lambda x: (
        x.mT.log_softmax(-1).sum() + x.mT.log_softmax(1).reshape(6, 6) + x.log_softmax(-1).mT.reshape(6, 6)
        + x.transpose(0, 1).log_softmax(0).view(6, 6) + x.log_softmax(-1)[:, [2, 0]].sum() + x.log_softmax(-1)[[1, 0]].view(6, 6)
        + x.log_softmax(-1)[1, [2, 0]].sum() + x.permute(1, 2, 0)[:, :, 0].log_softmax(-1).sum()
    ),
    "a permutation": lambda x: x.permute(1, 0, 2) @ x.permute(1, 2, 0),
    "parts of leading dimensions": lambda x: x[:1] + x[1:] * x[:, 1:2] + x[0],
    "chunks of another dimension": lambda x: x.chunk(3, 1)[2] - x.split(1, 1)[0],
    "uneven chunks": lambda x: x.chunk(4, -1)[2] + x.split(4, -1)[1],
    "from the end": lambda x: x[..., -3:-1] + x[..., -100:2] + x[..., 4:100],
    "rolled otherwise": lambda x: x.roll(1, 1) + x.roll(2, -1) * x.roll((1, 2), (0, 2)) + x.roll(4),
    "three parts written": lambda x, y: call(
        written, (y[..., 0], x[..., :2], x[..., 2:]), (0, (1, 3, 1), (3, 7, 1)), 7, (2, 1, 0), torch.float64
    ),
    "an odd number of elements written": lambda x, y: call(
        written, (x, y[..., :5]), ((0, 11, 2), (1, 11, 2)), 11, (0, 1, 2), torch.float64
    ),
    "written in whole numbers": lambda x, y: call(written, (x, y), ((0, 6, 1), (6, 12, 1)), 12, (0, 1, 2), torch.int64).double(),
    "no pairs": lambda x: x.view(2, 3, 2, 3)[..., 1] * x.view(6, 2, 3).select(-1, 0).view(2, 3, 2),
    "pairs among other leading dimensions": lambda x: (
        x.view(6, 3, 2)[..., 1].sum() + x.view(6, 3, 2).select(-1, 0) + x.view(2, 9, 2).unbind(-1)[0].view(6, 3)
    ),
    "entries of other dimensions": lambda x: (
        x.view(2, 3, 2, 3)[:, 1, :, :].flatten(1) + x.view(2, 3, 2, 3)[:, 1].reshape(2, 6) + x.view(3, 2, 6)[..., 1, :].sum()
        + x.view(2, 3, 2, 3).permute(2, 1, 0, 3)[0].reshape(2, 9)[:, :6] + x.view(36)[3] + x.view(12, 3)[2].sum()
        + x.movedim(1, 0)[1] + x.view(2, 3, 2, 3).movedim(-1, 1)[1].sum() + x.view(2, 3, 2, 3).movedim((2, 3), (0, 1))[1].sum()
    ),
    "stacked and moved otherwise": lambda x, y: (
        torch.stack((x, y)).movedim(1, -1).sum() + torch.stack((x, y)).permute(1, 3, 2, 0).flatten(-2)
        + torch.stack((x, y), -2).view(2, 6, 6).mT.reshape(2, 6, 6)
    ).sum() + torch.stack((x, y), 1).flatten(1, 2),
    "flipped otherwise": lambda x: (
        x.view(2, 3, 2, 3).flip(-1).flatten(-2) + x.view(2, 3, 3, 2).flip(-2).flatten(-2) + x.flip(-2)
        + x.view(3, 2, 2, 3).flip(-2).view(2, 3, 6) + x.view(2, 3, 2, 3).flip(-1, -2).flatten(-2)
        + x.view(6, 6).flip(0).view(2, 3, 6)
    ),
    "complex numbers of other parts": lambda x, y: torch.view_as_real(
        torch.complex(x[..., 1::2], x[..., ::2]) + torch.complex(x[..., ::2], y[..., 1::2])
        + torch.complex(x[..., :3], x[..., 3:])
        + torch.view_as_complex(x.view(3, 2, 3, 2)).view(2, 3, 3) + torch.view_as_complex(torch.stack((x, y), -1))[..., :3]
    ).flatten(-2),
    "parts of other complex numbers": lambda x, y: (
        torch.cat((torch.complex(x, y).imag, torch.complex(x, y).real), -1)
        + torch.stack((torch.complex(x, y).imag, torch.complex(x, y).real), -1).flatten(-2)
        + torch.stack((torch.complex(x, y).real, torch.complex(y, x).imag), -1).flatten(-2)
        + torch.cat(columns_of(torch.complex(x, y))[::-1], -2).reshape(2, 3, 12)
        + torch.view_as_real(torch.complex(x, y)).permute(0, 3, 1, 2).reshape(2, 3, 12)
    ),
    "a narrowed leading dimension": lambda x: x.narrow(1, 1, 2)[:1] + x.narrow(0, 0, 1)[:, :2],
    "a stack in front": lambda x, y: torch.stack((x, y), 0).flatten(0, 1) + torch.stack((x, y, x, y), -1).view(4, 3, 12)[..., :6],
    "matrices of matrices": lambda x, y: x @ y.transpose(1, 2) + torch.bmm(x, y.mT),
    "a vector": lambda m, b, v: m @ v @ b + (b @ v.T).sum(),
    "rows put back otherwise": lambda x, w: F.linear(x.view(-1, 6), w).view(3, 2, 4),
    "not itself": lambda x, y: x * torch.sigmoid(y) + x * y,
    "an integer index": lambda x: x[..., 2] + x[0, 1, 2],
    "an added dimension": lambda x: x[..., None].sum() + x[None],
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_what_no_equation_may_change(name: str) -> None:
    given = _arguments(NEAR[name])
    assert_sound(trace(NEAR[name], given), list(given.values()))


@cases
@given(program=programs)
def test_expressions_of_random_programs(program: dict[str, Any]) -> None:
    """Views, writes in place and equal operations around them: no value is taken for another."""
    module = trace(function_of({**program, "steps": [s for s in program["steps"] if s[0] != "write"]}), inputs())
    assert_sound(module, list(inputs().values()))
