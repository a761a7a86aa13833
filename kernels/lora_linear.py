"""A linear with a low-rank adapter (LoRA, arXiv:2106.09685), over a dense or a 4-bit weight (QLoRA, arXiv:2305.14314).

    t = z · Aᵀ        y = x · Wᵀ + bias + scale · t · Bᵀ        z: x, or x after the adapter's own dropout

    g  = scale · dy · B        dA = gᵀ · z        dB = scale · dyᵀ · t        dz = g · A
    dx = dy · W (+ dz)         dW = dyᵀ · x       dbias = sum over rows (dy)

The matrix products are cuBLAS'. What is fused is their traffic: both terms of y, and of dx, are summed in one buffer by
the product's own epilogue (``addmm_``), and no third tensor of y's or x's size is made.
Saved for the backward: t (rows × rank) if B needs a gradient, x or z if A or a dense W does, A, B and the stored
weight; never a dequantized weight nor y.

The formulas themselves are in :mod:`weft.kernels.linears`, which parallel_linears shares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import four_bit
from ..quant.layout import Layout
from .dequantize_4bit import dense
from .linears import Linear, backward, forward, gradient_sizes
from .operator import operator
from .quant_linear import autocast_dtype, cast_dense, no_autocast


def reference(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    *,
    x_adapter: Tensor | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`lora_linear`, without ``a`` no adapter."""
    shape, dtype = Layout.decode(layout), adapter_dtype or x.dtype
    w = four_bit.dequantize(weight, shape, x.dtype) if shape.is_4bit else dense(weight, shape, x.dtype)
    y = F.linear(x, w, bias)
    if a is None or b is None:
        return y
    z = (x if x_adapter is None else x_adapter).to(dtype)
    return (y + F.linear(F.linear(z, a.to(dtype)), b.to(dtype)) * scale).to(x.dtype)


@operator("weft::lora_linear")
def _lora_linear(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    x_adapter: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y, and t for the backward."""
    own = x_adapter is not None
    with no_autocast(x):
        ys, t = forward(x, [Linear(weight, Layout.decode(layout), scale, own, bias, a, b, x_adapter)], dtype)
    assert t is not None
    return ys[0], t


@_lora_linear.register_fake
def _(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    x_adapter: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], Layout.decode(layout).out_features))
    return y, x.new_empty((*x.shape[:-1], a.shape[0]), dtype=dtype)


@operator("weft::lora_linear_backward")
def _lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    weight: list[Tensor],
    layout: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    own: bool,
    z: Tensor | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x, weight, bias, a, b and x_adapter, those that ``needs`` names."""
    with no_autocast(dy):
        linear = Linear(weight, Layout.decode(layout), scale, own, None, a, b, z)
        return backward([dy], x, t, [linear], dtype, needs)


@_lora_linear_backward.register_overwriting("x")
def _(dy: Tensor, x: Tensor | None, *rest: Any) -> list[Tensor]:
    t, weight, layout, a, b, scale, own, z, dtype, needs = rest
    with no_autocast(dy):
        linear = Linear(weight, Layout.decode(layout), scale, own, None, a, b, z)
        return backward([dy], x, t, [linear], dtype, needs, over=x)


@_lora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    weight: list[Tensor],
    layout: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    own: bool,
    z: Tensor | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    sizes = gradient_sizes(dy, [Linear(weight, Layout.decode(layout), a=a, b=b)], dtype, needs)
    return [dy.new_empty(size, dtype=kind) for size, kind in sizes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.layout, bias, a, b, ctx.scale, z, ctx.dtype = inputs
    ctx.needs = [p is not None and p.requires_grad for p in (x, weight[0], bias, a, b, z)]
    ctx.own, ctx.z_dtype = z is not None, None if z is None else z.dtype
    _, needs_weight, _, needs_a, needs_b, _ = ctx.needs
    ctx.save_for_backward(
        x if needs_weight or (needs_a and z is None) else None,
        output[1] if needs_b else None,
        z if needs_a else None,
        a,
        b,
        *weight,
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, t, z, a, b, *weight = ctx.saved_tensors
    needs = ctx.needs
    found = iter(_lora_linear_backward(dy, x, t, weight, ctx.layout, a, b, ctx.scale, ctx.own, z, ctx.dtype, needs))
    dx, dw, dbias, da, db, dz = (next(found) if need else None for need in needs)
    dz = None if dz is None else dz.to(ctx.z_dtype)
    return dx, [dw] + [None] * (len(weight) - 1), None, dbias, da, db, None, dz, None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def lora_linear(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    x_adapter: Tensor | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear with a low-rank adapter: x Wᵀ + bias + scale · (z Aᵀ) Bᵀ.

    Under autocast x, a dense weight and the bias are cast as ``F.linear`` casts them; the adapter runs in that dtype.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64, any strides.
        weight: the tensors of ``layout`` (see :mod:`weft.quant.layout`); a dense one may require a gradient and has
            x's dtype.
        layout: the encoded :class:`~weft.quant.layout.Layout`, of any kind.
        bias: (out_features,), of x's dtype.
        a: (rank, in_features), of any floating-point dtype; its gradient comes in it.
        b: (out_features, rank), likewise.
        scale: factor of the adapter.
        x_adapter: z, of x's shape, where it is not x: x after the adapter's dropout.
        adapter_dtype: in which the adapter's two products are computed; x's if None. PEFT's float32 adapter over a
            bfloat16 base computes in float32.

    Returns:
        (..., out_features) in x's dtype, autocast's where it is on.

    Raises:
        ValueError: ``layout`` is malformed or its in_features are not those of x.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        adapter_dtype, x, weight = dtype, x.to(dtype), cast_dense(weight, layout, dtype)
        bias, x_adapter = (None if v is None else v.to(dtype) for v in (bias, x_adapter))
    return _lora_linear(x, weight, layout, bias, a, b, scale, x_adapter, adapter_dtype or x.dtype)[0]
