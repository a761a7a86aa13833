"""A linear whose weight is stored in 4 bits: y = x · Wᵀ + bias, with W = dequantize(weight) (QLoRA, arXiv:2305.14314).

    dx = dy · W        dbias = sum over rows (dy)        the weight is frozen

Many rows: W is dequantized into a temporary and the product is cuBLAS', or that of :mod:`.fp8` where the layout says so.
Few rows, as in decoding, are bound by reading the weight: the kernels of :mod:`.quant_matvec` and :mod:`.quant_rows` read the
packed words and keep W in registers.
Saved for the backward: nothing but the packed weight; it is dequantized again.

The first half of this file is what all linears share: how the weight of a layout enters a product.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import four_bit
from ..quant.layout import Layout
from . import fp8, fp8_kept
from .dequantize_4bit import dense
from .dispatch import shaped, use_triton
from .operator import operator
from .quant_matvec import matvec, serves


def reference(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`quant_linear`."""
    return F.linear(x, four_bit.dequantize(weight, Layout.decode(layout), x.dtype), bias)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast a linear's operands, None where it would leave them alone."""
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if eligible and torch.is_autocast_enabled(x.device.type) else None


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For an operator's body: its operands have been cast outside, and what it widens must stay wide."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def cast_dense(weight: list[Tensor], layout: str, dtype: torch.dtype) -> list[Tensor]:
    """``weight`` as autocast would hand it to a linear: a dense one in ``dtype``, a 4-bit one as it is."""
    return weight if Layout.decode(layout).is_4bit else [weight[0].to(dtype)]


def product(
    x: Tensor, weight: list[Tensor], layout: Layout, bias: Tensor | None, quantized: fp8.Quantized | None = None
) -> Tensor:
    """x · Wᵀ + bias for a matrix ``x`` (rows, in_features), as a new contiguous (rows, out_features).

    ``quantized`` is x in FP8, where a caller has it for several products already.

    Raises:
        ValueError: ``x`` has other columns than W, or FP8 does not serve W's sizes.
    """
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"a linear with {layout.in_features} input features was given {tuple(x.shape)}")
    if fp8.serves(x, layout):
        left = fp8.quantize_rows(x) if quantized is None else quantized
        return fp8.multiply(left, fp8_kept.quantized(weight, layout, x.dtype), x.dtype, bias)
    if use_triton(x) and serves(x, layout):
        return matvec(x, weight, layout, bias)
    return F.linear(x, dense(weight, layout, x.dtype), bias)


def x_gradient(dy: Tensor, weight: list[Tensor], layout: Layout, over: Tensor | None = None) -> Tensor:
    """dy · W for a matrix ``dy`` (rows, out_features), as a contiguous (rows, in_features): a new one, or ``over`` where that can
    hold it."""
    fits = over is not None and over.is_contiguous() and over.dtype == dy.dtype
    out = over.view(dy.shape[0], layout.in_features) if fits and over is not None else None
    if fp8.serves(dy, layout):
        turned = fp8_kept.quantized(weight, layout, dy.dtype, columns=True)
        return fp8.multiply(fp8.quantize_rows(dy), turned, dy.dtype, out=out)
    return torch.mm(dy, dense(weight, layout, dy.dtype), out=out)


@operator("weft::quant_linear")
def _quant_linear(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    with no_autocast(x):
        y = product(x.reshape(-1, x.shape[-1]), weight, Layout.decode(layout), bias)
    return shaped(y, *x.shape[:-1], y.shape[-1])


@_quant_linear.register_fake
def _(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], Layout.decode(layout).out_features))


@operator("weft::quant_linear_backward")
def _quant_linear_backward(dy: Tensor, weight: list[Tensor], layout: str, needs: list[bool]) -> list[Tensor]:
    """The gradients of x and bias, those that ``needs`` names."""
    shape, rows, grads = Layout.decode(layout), dy.reshape(-1, dy.shape[-1]), []
    with no_autocast(dy):
        if needs[0]:
            grads.append(shaped(x_gradient(rows, weight, shape), *dy.shape[:-1], shape.in_features))
        if needs[1]:
            grads.append(rows.sum(0))
    return grads


@_quant_linear_backward.register_fake
def _(dy: Tensor, weight: list[Tensor], layout: str, needs: list[bool]) -> list[Tensor]:
    shape = Layout.decode(layout)
    sizes = ((*dy.shape[:-1], shape.in_features), (shape.out_features,))
    return [dy.new_empty(size) for size, need in zip(sizes, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, ctx.layout, _ = inputs
    ctx.save_for_backward(*weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs_x, needs_weight, _, needs_bias = ctx.needs_input_grad
    grads = iter(_quant_linear_backward(dy, list(ctx.saved_tensors), ctx.layout, [needs_x, needs_bias]))
    dx, dbias = (next(grads) if need else None for need in (needs_x, needs_bias))
    return dx, [None] * len(needs_weight), None, dbias


_quant_linear.register_autograd(_backward, setup_context=_setup_context)


def quant_linear(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None = None) -> Tensor:
    """A linear over a 4-bit weight; under autocast x and bias are cast as ``F.linear`` casts them.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64, any strides.
        weight: the tensors of a ``nf4`` or ``fp4`` layout (see :mod:`weft.quant.layout`); it gets no gradient.
        layout: the encoded :class:`~weft.quant.layout.Layout`.
        bias: (out_features,), of x's dtype.

    Returns:
        (..., out_features) in x's dtype, autocast's where it is on.

    Raises:
        ValueError: ``layout`` is not a 4-bit layout, or its in_features are not those of x.
    """
    if not Layout.decode(layout).is_4bit:
        raise ValueError(f"{layout} is not a 4-bit layout; lora_linear and parallel_linears take dense weights")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _quant_linear(x, weight, layout, bias)
