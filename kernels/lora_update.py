"""A low-rank adapter (LoRA, arXiv:2106.09685) on top of a product that stays opaque, such as bitsandbytes' int8.

    t = x · Aᵀ        out = y + scale · t · Bᵀ

    g = scale · dout · B        dy = dout        dx = g · A        dA = gᵀ · x        dB = scale · doutᵀ · t

Saved for the backward: t (rows × rank) if B needs a gradient, x if A does, A and B; never y or the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import shaped
from .linears import add_product, matrix, readable, scaled_product, times
from .operator import operator
from .quant_linear import autocast_dtype, no_autocast


def reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, *, adapter_dtype: torch.dtype | None = None
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`lora_update`."""
    dtype = adapter_dtype or x.dtype
    return (y + F.linear(F.linear(x.to(dtype), a.to(dtype)), b.to(dtype)) * scale).to(y.dtype)


@operator("weft::lora_update")
def _lora_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result, and t for the backward."""
    with no_autocast(x):
        t = times(matrix(x), a.t(), dtype)
        out = y.clone(memory_format=torch.contiguous_format)
        add_product(out.view(t.shape[0], y.shape[-1]), t, b.t().to(dtype), scale)
    return out, shaped(t, *x.shape[:-1], t.shape[-1])


@_lora_update.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), x.new_empty((*x.shape[:-1], a.shape[0]), dtype=dtype)


@operator("weft::lora_update_backward")
def _lora_update_backward(
    dout: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of x (in ``dtype``), a and b, those that ``needs`` names."""
    grads: list[Tensor] = []
    with no_autocast(dout):
        wide = readable(matrix(dout), dtype)
        if needs[0] or needs[1]:
            g = scaled_product(wide, b, scale, dtype)
            if needs[0]:
                grads.append(shaped(g @ a.to(dtype), *dout.shape[:-1], a.shape[1]))
            if needs[1] and x is not None:
                grads.append(times(matrix(x).t(), g, dtype, turned=True).to(a.dtype))
        if needs[2] and t is not None:
            grads.append(scaled_product(wide.t(), matrix(t), scale, dtype).to(b.dtype))
    return grads


@_lora_update_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    dx = dout.new_empty((*dout.shape[:-1], a.shape[1]), dtype=dtype)
    return [grad for grad, need in zip((dx, a.new_empty(a.shape), b.new_empty(b.shape)), needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, x, a, b, ctx.scale, ctx.dtype = inputs
    ctx.y_dtype, ctx.x_dtype = y.dtype, x.dtype
    ctx.needs = [p.requires_grad for p in (x, a, b)]
    ctx.save_for_backward(x if ctx.needs[1] else None, output[1] if ctx.needs[2] else None, a, b)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, t, a, b = ctx.saved_tensors
    found: Any = iter(())
    if any(ctx.needs):
        found = iter(_lora_update_backward(dout, x, t, a, b, ctx.scale, ctx.dtype, ctx.needs))
    dx, da, db = (next(found) if need else None for need in ctx.needs)
    return dout, None if dx is None else dx.to(ctx.x_dtype), da, db, None, None


_lora_update.register_autograd(_backward, setup_context=_setup_context)


def lora_update(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, *, adapter_dtype: torch.dtype | None = None
) -> Tensor:
    """y + scale · (x Aᵀ) Bᵀ as a new tensor, for a base product y that no operator of weft computes.

    Under autocast the adapter's products run in autocast's dtype.

    Args:
        y: (..., out_features), float32, bfloat16, float16 or float64, any strides.
        x: (..., in_features) with y's leading dimensions, any floating-point dtype, any strides.
        a: (rank, in_features), of any floating-point dtype; its gradient comes in it.
        b: (out_features, rank), likewise.
        scale: factor of the adapter.
        adapter_dtype: in which the two products are computed; x's if None.

    Returns:
        (..., out_features) in y's dtype.

    Raises:
        RuntimeError: shapes that do not fit, as torch's matrix products report them.
    """
    dtype = autocast_dtype(x) or adapter_dtype or x.dtype
    return _lora_update(y, x, a, b, scale, dtype)[0]
