"""Activation functions a(x) and their slopes a'(x), in torch and in Triton.

With σ the logistic function and Φ, φ the distribution and density of the normal law:

    silu         x σ(x)                                σ + x σ (1 - σ)              arXiv:1702.03118
    quick_gelu   x σ(1.702 x)                          σ + 1.702 x σ (1 - σ)        arXiv:1606.08415, section 2
    gelu         x Φ(x)                                Φ + x φ                      arXiv:1606.08415
    gelu_tanh    x (1 + tanh u) / 2 = x σ(2u)          σ + 2 u' x σ (1 - σ)         u = √(2/π) (x + 0.044715 x³)
    relu         max(x, 0)                             [x > 0]
    clamp        max(x, 0)                             [x ≥ 0]                      torch.clamp(x, min=0)
    maximum      max(x, 0)                             ([x > 0] + [x ≥ 0]) / 2      torch.maximum(x, 0)
    positive     x > 0 ? x : 0                         [x > 0]                      torch.where(x > 0, x, 0)
    masked       x · [x > 0]                           [x > 0]
    relu2, positive2, masked2: their squares           2 a(x) a'(x)                 arXiv:2109.08668
    sigmoid      σ                                     σ (1 - σ)
    tanh         tanh x                                1 - tanh² x
    identity     x                                     1

The five that are max(x, 0) differ at 0, in a', and where x is not finite: of NaN, ``positive`` makes 0, the others NaN;
of -∞, ``masked`` makes NaN, the others 0. A NaN passes a gradient on in relu and maximum, and none in clamp and positive.
Squared, the first three are one, but for a NaN's gradient: a slope at 0 is multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import compute_dtype
from .toolchain import tl, triton

aten = torch.ops.aten


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


def _in_place(backward: Any, *arguments: Any, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda d, x: backward.grad_input(d, x, *arguments, grad_input=d, **options)


def _sigmoid_chain(d: Tensor, x: Tensor) -> Tensor:
    y = torch.sigmoid(_wide(x))
    return d * y.mul_(1 - y)


def _select(d: Tensor, x: Tensor) -> Tensor:
    return d.masked_fill_(~(x > 0), 0)


def _halve_at_zero(d: Tensor, x: Tensor) -> Tensor:
    return torch.where(x == 0, d / 2, aten.threshold_backward(d, x, 0))


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, x.new_zeros(())),
    "positive": lambda x: torch.where(x > 0, x, 0),
    "positive2": lambda x: torch.where(x > 0, x, 0).square(),
    "masked": lambda x: x * (x > 0),
    "masked2": lambda x: (x * (x > 0)).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": torch.clone,
    "quick_gelu": lambda x: torch.sigmoid(_wide(x) * 1.702) * x,
}
"""a(x), always a new tensor. What torch's own operators would round more than once comes in float32."""

CHAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _in_place(aten.silu_backward),
    "gelu": _in_place(aten.gelu_backward),
    "gelu_tanh": _in_place(aten.gelu_backward, approximate="tanh"),
    "relu": _in_place(aten.threshold_backward, 0),
    "relu2": lambda d, x: _in_place(aten.threshold_backward, 0)(d.mul_(x).mul_(2), x),
    "clamp": lambda d, x: d.masked_fill_(~(x >= 0), 0),
    "maximum": _halve_at_zero,
    "positive": _select,
    "positive2": lambda d, x: _select(d.mul_(x).mul_(2), x),
    "masked": lambda d, x: d.mul_(x > 0),
    "masked2": lambda d, x: d.mul_(x * (x > 0)).mul_(2).mul_(x > 0),
    "sigmoid": _sigmoid_chain,
    "tanh": lambda d, x: d * (1 - torch.tanh(_wide(x)).square_()),
    "identity": lambda d, x: d,
    "quick_gelu": lambda d, x: aten.silu_backward(_wide(d), 1.702 * _wide(x)),
}
"""d · a'(x) from d, which may be overwritten, and x of the same dtype; without a gradient of its own."""


@triton.jit
def _tanh(x):
    # Near 0 the exponential's form would cancel. Lambert's continued fraction x/(1+x²/(3+x²/(5+x²/(7+x²/9)))) is off by
    # less than 1e-9 of its value there.
    z = x * x
    near = x * ((945 + z * (105 + z)) / (945 + z * (420 + z * 15)))
    size = tl.abs(x)
    far = 1 - 2 / (1 + tl.exp(2 * size))
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def curve(x, d, ACTIVATION: tl.constexpr):
    """a(x) and d · a'(x). Comparisons let NaN pass, and relu's slope selects, so that an infinite d times 0 is 0."""
    y, dx = x, d
    if ACTIVATION == "silu" or ACTIVATION == "quick_gelu" or ACTIVATION == "gelu_tanh":
        if ACTIVATION == "gelu_tanh":
            slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
            s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        else:
            slope = 1.702 if ACTIVATION == "quick_gelu" else 1.0
            s = tl.sigmoid(slope * x)
        y = x * s
        dx = d * s * (1 + x * (1 - s) * slope)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        y = x * below
        dx = d * (below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))
    elif ACTIVATION == "relu" or ACTIVATION == "relu2":
        y = tl.where(x <= 0, 0.0, x)
        dx = tl.where(x <= 0, 0.0, d)
    elif ACTIVATION == "clamp":
        y = tl.where(x <= 0, 0.0, x)
        dx = tl.where(x >= 0, d, 0.0)
    elif ACTIVATION == "maximum":
        y = tl.where(x <= 0, 0.0, x)
        dx = tl.where(x == 0, 0.5 * d, tl.where(x < 0, 0.0, d))
    elif ACTIVATION == "positive" or ACTIVATION == "positive2":
        y = tl.where(x > 0, x, 0.0)
        dx = tl.where(x > 0, d, 0.0)
    elif ACTIVATION == "masked" or ACTIVATION == "masked2":
        mask = tl.where(x > 0, 1.0, 0.0)
        y = x * mask
        dx = d * mask
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
        dx = d * y * (1 - y)
    elif ACTIVATION == "tanh":
        y = _tanh(x)
        dx = d * (1 - y * y)
    if ACTIVATION == "relu2" or ACTIVATION == "positive2" or ACTIVATION == "masked2":
        dx = 2 * y * dx
        y = y * y
    return y, dx
