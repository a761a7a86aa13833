"""Residual add and RMSNorm in one pass: what lies between two sublayers of a pre-norm transformer.

    h = x + residual, rounded to the promoted dtype of both        y = rms_norm(h)

    dx = dresidual = dh + (gradient of rms_norm at h)        dweight as of rms_norm

Formulas of the norm: :mod:`.rms_norm`. Saved for the backward: h (which the model keeps anyway), weight, and r
(float32, one a row).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rms_norm as norm
from . import rows as R
from .operator import operator
from .toolchain import tl, triton


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    eps_mode: norm.EpsMode = "inside",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain differentiable torch; arguments as in :func:`residual_rms_norm`."""
    h = x + residual
    return norm.reference(h, weight, eps, offset=offset, eps_mode=eps_mode, dtype=dtype), h


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, residual, h, y, r, weight, sizes, x_strides, residual_strides, h_strides, y_strides, r_strides,
    rows, cols, eps, offset, MODE: tl.constexpr, HAS_WEIGHT: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    span = COLS if WHOLE else cols
    x += R.row_start(row, sizes, x_strides)[:, None]
    residual += R.row_start(row, sizes, residual_strides)[:, None]
    h += R.row_start(row, sizes, h_strides)[:, None]
    y += R.row_start(row, sizes, y_strides)[:, None]
    squares = tl.zeros((ROWS, COLS), tl.float32)
    value = squares
    for start in range(0, span, COLS):
        value = R.load(x, x_strides, row, rows, start + col, cols)
        value += R.load(residual, residual_strides, row, rows, start + col, cols)
        # The norm is that of the sum as stored, which is also what the backward sees.
        value = R.rounded(value, h.dtype.element_ty).to(tl.float32)
        R.store(h, h_strides, row, rows, start + col, cols, value)
        squares += value * value
    scale = norm.reciprocal(tl.sum(squares, 1) / cols, eps, MODE)
    tl.store(r + R.row_start(row, sizes, r_strides), scale, mask=row < rows)
    if not WHOLE:
        tl.debug_barrier()
    for start in range(0, span, COLS):
        if not WHOLE:
            value = R.load(h, h_strides, row, rows, start + col, cols)
        factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
        R.store(y, y_strides, row, rows, start + col, cols, value * scale[:, None] * factor)


def _launch_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, h: Tensor, y: Tensor, r: Tensor,
    eps: float, offset: float, mode: str,
) -> None:  # fmt: skip
    count, options = R.blocks(x, norm.PER_THREAD, R.TILE)
    options |= {"eps": eps, "offset": offset, "MODE": mode, "HAS_WEIGHT": weight is not None}
    R.launch(_forward, count, (x, residual, h, y, r), (weight,), options)


def _empty(x: Tensor, residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    y, r = norm.empty(h, dtype)
    return y, h, r


@operator("weft::residual_rms_norm")
def _residual_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, eps_mode: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, r = _empty(x, residual, dtype)
    if x.numel() and R.kernel_runs(h):
        _launch_forward(x, residual, weight, h, y, r, eps, offset, eps_mode)
    else:
        torch.add(x, residual, out=h)
        norm.forward(h, weight, y, r, eps, offset, eps_mode)
    return y, h, r


_residual_rms_norm.register_fake(
    lambda x, residual, weight, eps, offset, eps_mode, dtype: _empty(x, residual, dtype),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, *ctx.arguments, _ = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, output[2])
    # Where only the weight learns, the sum must not look as if it did.
    ctx.mark_non_differentiable(*(output[2:] if x.requires_grad or residual.requires_grad else output[1:]))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    h, weight, r = ctx.saved_tensors
    needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
    total, dweight = dh, None
    if dy is not None:
        needs_h, (eps, offset, mode) = needs_x or needs_residual, ctx.arguments
        extra = dh if needs_h else None
        total, dweight = norm.backward(dy, h, weight, r, extra, eps, offset, mode, needs_h, needs_weight)
    # One tensor may be the gradient of both: autograd never adds into a gradient that somebody else holds.
    dx, dresidual = (None if total is None else total.to(dtype) for dtype in ctx.dtypes)
    grads = (dx if needs_x else None, dresidual if needs_residual else None, dweight if needs_weight else None)
    return *grads, None, None, None, None


_residual_rms_norm.register_autograd(_differentiate, setup_context=_setup_context)


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    eps_mode: norm.EpsMode = "inside",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and ``y = rms_norm(h, weight, eps, ...)`` in one pass.

    Args:
        x: (..., D), any strides.
        residual: as x, possibly of another floating-point dtype.
        weight, eps, offset, eps_mode, dtype: as in :func:`.rms_norm.rms_norm`; the default dtype is that of h.

    Returns:
        ``(y, h)``, both in the memory order of x; h in the promoted dtype of x and residual, to which it is rounded
        before it is normalized.

    Raises:
        ValueError: the shapes of x and residual differ, or an argument is wrong as for ``rms_norm``.
    """
    if x.shape != residual.shape:
        raise ValueError(f"residual_rms_norm: x is {tuple(x.shape)}, residual {tuple(residual.shape)}")
    R.check(x, weight)
    norm.check_mode(eps_mode)
    dtype = dtype or torch.promote_types(x.dtype, residual.dtype)
    y, h, _ = _residual_rms_norm(R.flat(x), R.flat(residual), weight, eps, offset, eps_mode, dtype)
    return R.unflat(y, x), R.unflat(h, x)
