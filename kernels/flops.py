"""Floating-point operations of the operators whose time goes into matrix products.

Registered with torch's counter (``torch.utils.flop_counter``), so that ``FlopCounterMode`` counts a rewritten model as it
counts the original, and a planner knows what computing them again would cost. Adapters are left out: their products are
bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..quant.layout import Layout
from . import attention, linear_cross_entropy, lora_linear, parallel_linears, quant_linear
from .parallel_linears import decode

Shape = Sequence[int]
ops: Any = torch.ops.weft
REGISTERED = (attention, linear_cross_entropy, lora_linear, parallel_linears, quant_linear)
"""The modules whose operators are counted: importing them defines these."""


def _product(x: Shape, layout: Layout) -> int:
    """Of x · Wᵀ, a multiplication and an addition for each weight and row."""
    return 2 * math.prod(x[:-1]) * layout.in_features * layout.out_features


@register_flop_formula(ops.lora_linear)
def _lora_linear(x: Shape, weight: Any, layout: str, *_: Any, **__: Any) -> int:
    return _product(x, Layout.decode(layout))


@register_flop_formula(ops.quant_linear)
def _quant_linear(x: Shape, weight: Any, layout: str, *_: Any, **__: Any) -> int:
    return _product(x, Layout.decode(layout))


@register_flop_formula(ops.parallel_linears)
def _parallel_linears(x: Shape, tensors: Any, plan: str, *_: Any, **__: Any) -> int:
    return sum(_product(x, slot.layout) for slot in decode(plan))


@register_flop_formula(ops.lora_linear_backward)
def _lora_linear_backward(dy: Shape, x: Any, t: Any, weight: Any, layout: str, *rest: Any, **__: Any) -> int:
    return _gradients(dy, Layout.decode(layout), rest[-1][:2])


@register_flop_formula(ops.quant_linear_backward)
def _quant_linear_backward(dy: Shape, weight: Any, layout: str, *_: Any, **__: Any) -> int:
    return _product(dy, Layout.decode(layout))


@register_flop_formula(ops.parallel_linears_backward)
def _parallel_linears_backward(
    dys: Sequence[Shape], x: Any, t: Any, tensors: Any, plan: str, *rest: Any, **_: Any
) -> int:
    slots, needs = decode(plan), rest[-1]
    return sum(
        _gradients(dy, slot.layout, (needs[0], needs[1 + 5 * i]))
        for i, (dy, slot) in enumerate(zip(dys, slots, strict=True))
    )


def _gradients(dy: Shape, layout: Layout, needs: Sequence[bool]) -> int:
    """Of dx and dW, those that are needed."""
    return sum(map(bool, needs)) * _product(dy, layout)


@register_flop_formula(ops.attention)
def _attention(q: Shape, k: Shape, v: Shape, mask: Any, is_causal: bool, *_: Any, **__: Any) -> int:
    """Scores and their sum of values; half of each where every token sees those before it alone."""
    return 2 * 2 * math.prod(q[:-1]) * k[-2] * q[-1] // (2 if is_causal else 1)


@register_flop_formula(ops.attention_backward)
def _attention_backward(
    grad: Any, q: Shape, k: Shape, v: Any, mask: Any, out: Any, lse: Any, is_causal: bool, *_: Any, **__: Any
) -> int:
    """The scores again, and four gradients."""
    return 5 * 2 * math.prod(q[:-1]) * k[-2] * q[-1] // (2 if is_causal else 1)


@register_flop_formula(ops.linear_cross_entropy)
def _linear_cross_entropy(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """The logits, and the gradients that the forward computes with them."""
    return 3 * 2 * math.prod(x[:-1]) * weight[0] * weight[1]
