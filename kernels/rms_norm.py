"""RMSNorm over the last dimension (arXiv:1910.07467), in every spelling of where eps goes and what the weight is.

    m = mean(x²)        n = x · r        y = n · w        w = offset + weight, or 1 without a weight

    eps_mode    r                        k
    inside      1 / sqrt(m + eps)        1
    outside     1 / (sqrt(m) + eps)      1 + eps / sqrt(m),  0 where m = 0
    clamp       1 / max(sqrt(m), eps)    1,                  0 where sqrt(m) ≤ eps

    g = dy · w        dx = r · (g - n · k · mean(g · n))        dweight = sum over rows (dy · n)

Arithmetic is in float32 with one rounding at the end. Saved for the backward: x, weight, and r (float32, one a row).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import rows as R
from .dispatch import compute_dtype
from .operator import operator
from .toolchain import tl, triton

EpsMode = Literal["inside", "outside", "clamp"]

PER_THREAD = 16
BLAS_ROWS = 64
"""Rows that a matrix product adds up at a time."""


def reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    eps_mode: EpsMode = "inside",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`rms_norm`."""
    wide = x.to(compute_dtype(x))
    if eps_mode == "inside":
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    else:
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y = wide / (rms + eps if eps_mode == "outside" else rms.clamp_min(eps))
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y.to(dtype or x.dtype)


@triton.jit
def reciprocal(m, eps, MODE: tl.constexpr):
    """r of each row. A row costs one, so that the correctly rounded functions are free."""
    if MODE == "inside":
        bottom = tl.sqrt_rn(m + eps)
    elif MODE == "outside":
        bottom = tl.sqrt_rn(m) + eps
    else:
        bottom = tl.maximum(tl.sqrt_rn(m), eps, propagate_nan=tl.PropagateNan.ALL)
    return tl.div_rn(tl.full(m.shape, 1.0, tl.float32), bottom)


@triton.jit
def slope(r, eps, MODE: tl.constexpr):
    """k of each row from its r."""
    one = tl.full(r.shape, 1.0, tl.float32)
    if MODE == "outside":
        rms = tl.div_rn(one, r) - eps
        one = tl.where(rms > 0, 1.0 + eps / tl.where(rms > 0, rms, 1.0), 0.0)
    elif MODE == "clamp":
        one = tl.where(r == tl.div_rn(one, one * eps), 0.0, 1.0)
    return one


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, y, r, weight, sizes, x_strides, y_strides, r_strides, rows, cols, eps, offset,
    MODE: tl.constexpr, HAS_WEIGHT: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    # A row that fits is one block whose loops have one step and vanish: it is read once and stays in registers.
    span = COLS if WHOLE else cols
    x += R.row_start(row, sizes, x_strides)[:, None]
    y += R.row_start(row, sizes, y_strides)[:, None]
    squares = tl.zeros((ROWS, COLS), tl.float32)
    value = squares
    for start in range(0, span, COLS):
        value = R.load(x, x_strides, row, rows, start + col, cols)
        squares += value * value
    scale = reciprocal(tl.sum(squares, 1) / cols, eps, MODE)
    tl.store(r + R.row_start(row, sizes, r_strides), scale, mask=row < rows)
    for start in range(0, span, COLS):
        if not WHOLE:
            value = R.load(x, x_strides, row, rows, start + col, cols)
        factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
        R.store(y, y_strides, row, rows, start + col, cols, value * scale[:, None] * factor)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x, grad, r, extra, dx, weight, partial, sizes,
    x_strides, grad_strides, r_strides, extra_strides, dx_strides, rows, cols, eps, offset,
    MODE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_EXTRA: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, COLS)
    span = COLS if WHOLE else cols
    partial += program.to(tl.int64) * cols
    factor = R.load_vector(weight, col, cols, offset, HAS_WEIGHT)
    total = tl.zeros((ROWS, COLS), tl.float32)
    begin, step = program.to(INDEX) * ROWS, tl.num_programs(0).to(INDEX) * ROWS
    for first in tl.range(begin, rows, step, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = first + tl.arange(0, ROWS)
        x_row = x + R.row_start(row, sizes, x_strides)[:, None]
        grad_row = grad + R.row_start(row, sizes, grad_strides)[:, None]
        scale = tl.load(r + R.row_start(row, sizes, r_strides), mask=row < rows, other=1.0)
        dots = tl.zeros((ROWS, COLS), tl.float32)
        unit, dy = dots, dots
        for start in range(0, span, COLS):
            unit = R.load(x_row, x_strides, row, rows, start + col, cols) * scale[:, None]
            dy = R.load(grad_row, grad_strides, row, rows, start + col, cols)
            if not WHOLE:
                factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
            dots += dy * factor * unit
        lean = slope(scale, eps, MODE) * tl.sum(dots, 1) / cols
        for start in range(0, span, COLS):
            if not WHOLE:
                unit = R.load(x_row, x_strides, row, rows, start + col, cols) * scale[:, None]
                dy = R.load(grad_row, grad_strides, row, rows, start + col, cols)
                factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
            if NEEDS_X:
                result = (dy * factor - unit * lean[:, None]) * scale[:, None]
                if HAS_EXTRA:
                    extra_row = extra + R.row_start(row, sizes, extra_strides)[:, None]
                    result += R.load(extra_row, extra_strides, row, rows, start + col, cols)
                dx_row = dx + R.row_start(row, sizes, dx_strides)[:, None]
                R.store(dx_row, dx_strides, row, rows, start + col, cols, result)
            if NEEDS_WEIGHT:
                if WHOLE:
                    total += dy * unit
                else:
                    R.accumulate(partial, start + col, cols, tl.sum(dy * unit, 0))
    if NEEDS_WEIGHT and WHOLE:
        tl.store(partial + col, tl.sum(total, 0), mask=col < cols)


def _launch_forward(
    x: Tensor, weight: Tensor | None, y: Tensor, r: Tensor, eps: float, offset: float, mode: str
) -> None:
    count, options = R.blocks(x, PER_THREAD, R.TALL)
    options |= {"eps": eps, "offset": offset, "MODE": mode, "HAS_WEIGHT": weight is not None}
    R.launch(_forward, count, (x, y, r), (weight,), options)


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, r: Tensor, extra: Tensor | None, dx: Tensor | None,
    needs_weight: bool, eps: float, offset: float, mode: str,
) -> Tensor:  # fmt: skip
    """Fills ``dx`` if there is one, and returns the weight's gradient, nothing if it is not needed."""
    count, options = R.backward_blocks(x, needs_weight, (x, grad, extra))
    partial = R.partial_sums(x, count if needs_weight else 0)
    options |= {"eps": eps, "offset": offset, "MODE": mode, "HAS_WEIGHT": weight is not None}
    options |= {"HAS_EXTRA": extra is not None, "NEEDS_X": dx is not None, "NEEDS_WEIGHT": needs_weight}
    R.launch(_backward, count, (x, grad, r, extra, dx), (weight, partial), options)
    return R.totals(partial, x.dtype if weight is None else weight.dtype)[0] if needs_weight else x.new_empty(0)


def _plain_forward(
    x: Tensor, weight: Tensor | None, y: Tensor, r: Tensor, eps: float, offset: float, mode: str
) -> None:
    wide = x.to(r.dtype)
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.5)
    if mode == "inside":
        r.copy_(rms.square_().add_(eps).rsqrt_())
    else:
        r.copy_((rms.add_(eps) if mode == "outside" else rms.clamp_min_(eps)).reciprocal_())
    result = y if y.dtype == r.dtype else torch.empty_like(wide) if wide is x else wide
    torch.mul(wide, r, out=result)
    if weight is not None:
        result.mul_(weight.to(r.dtype).add(offset))
    if result is not y:
        y.copy_(result)


def _plain_slope(r: Tensor, eps: float, mode: str) -> Tensor | float:
    if mode == "outside":
        rms = r.reciprocal() - eps
        return torch.where(rms > 0, 1 + eps / rms, 0.0)
    return 1.0 if mode == "inside" else (r != torch.full_like(r, eps).reciprocal_()).to(r.dtype)


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """The sum of ``rows``, each times its weight. One product would add them up one by one, with an error that grows so."""
    whole = len(rows) // BLAS_ROWS * BLAS_ROWS
    blocks = torch.bmm(weights[:whole].view(-1, 1, BLAS_ROWS), rows[:whole].view(-1, BLAS_ROWS, rows.shape[1]))
    return blocks.sum((0, 1)).add_(torch.mv(rows[whole:].t(), weights[whole:]))


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, r: Tensor, extra: Tensor | None, dx: Tensor | None,
    needs_weight: bool, eps: float, offset: float, mode: str,
) -> Tensor:  # fmt: skip
    """As :func:`_launch_backward`. One buffer of the size of x serves all; below float32 the operands are upcast."""
    wide, dy, cols = x.to(r.dtype), grad.to(r.dtype), x.shape[-1]
    buffer = dx if dx is not None and dx.dtype == r.dtype else torch.empty_like(x, dtype=r.dtype)
    torch.mul(dy, wide, out=buffer)
    dweight = _weighted_sum(buffer.reshape(-1, cols), r.reshape(-1)) if needs_weight else x.new_empty(0)
    if dx is None:
        return dweight
    factor = None if weight is None else weight.to(r.dtype).add(offset)
    dots = buffer.sum(-1, keepdim=True) if factor is None else torch.matmul(buffer, factor[:, None])
    lean = dots.mul_(r / cols).mul_(_plain_slope(r, eps, mode)).mul_(r).mul_(r)
    torch.mul(dy, r, out=buffer)
    if factor is not None:
        buffer.mul_(factor)
    buffer.addcmul_(wide, lean, value=-1)
    if extra is not None:
        buffer.add_(extra)
    if buffer is not dx:
        dx.copy_(buffer)
    return dweight


def empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialized y and r in the memory order of x."""
    return torch.empty_like(x, dtype=dtype), torch.empty_like(x[..., :1], dtype=compute_dtype(x))


@operator("weft::rms_norm")
def _rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, eps_mode: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y, r = empty(x, dtype)
    forward(x, weight, y, r, eps, offset, eps_mode)
    return y, r


def forward(x: Tensor, weight: Tensor | None, y: Tensor, r: Tensor, eps: float, offset: float, mode: str) -> None:
    """Fills y and r."""
    if x.numel():
        (_launch_forward if R.kernel_runs(x) else _plain_forward)(x, weight, y, r, eps, offset, mode)


@operator("weft::rms_norm_backward", adds="extra")
def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, r: Tensor, extra: Tensor | None, eps: float, offset: float,
    eps_mode: str, needs_x: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dweight, an empty tensor for one not needed; ``extra`` is a gradient of x from elsewhere, added to dx."""
    dx, dweight = _empty_gradients(x, weight, needs_x, needs_weight)
    if not x.numel():
        return dx, dweight.zero_()
    run = _launch_backward if R.kernel_runs(x) else _plain_backward
    sums = run(grad, x, weight, r, extra, dx if needs_x else None, needs_weight, eps, offset, eps_mode)
    return dx, sums.to(dweight.dtype) if needs_weight else dweight


def _empty_gradients(x: Tensor, weight: Tensor | None, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if needs_weight and weight is not None else x.new_empty(0)
    return torch.empty_like(x) if needs_x else x.new_empty(0), dweight


_rms_norm.register_fake(lambda x, weight, eps, offset, eps_mode, dtype: empty(x, dtype))
backward.register_fake(
    lambda grad, x, weight, r, extra, eps, offset, eps_mode, needs_x, needs_weight: _empty_gradients(
        x, weight, needs_x, needs_weight
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, *ctx.arguments, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, r = ctx.saved_tensors
    (eps, offset, mode), (needs_x, needs_weight) = ctx.arguments, ctx.needs_input_grad[:2]
    dx, dweight = backward(grad, x, weight, r, None, eps, offset, mode, needs_x, needs_weight)
    return dx if needs_x else None, dweight if needs_weight else None, None, None, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_setup_context)


def check_mode(eps_mode: str) -> None:
    """Raises ValueError for an unknown ``eps_mode``."""
    if eps_mode not in ("inside", "outside", "clamp"):
        raise ValueError(f"eps_mode is {eps_mode!r}, not inside, outside or clamp")


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    eps_mode: EpsMode = "inside",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Root mean square normalization over the last dimension (arXiv:1910.07467).

    Args:
        x: (..., D), any strides; float32, bfloat16, float16, or float64 (served by plain torch).
        weight: (D,) in any floating-point dtype, or None for a factor of 1.
        eps: ``eps_mode`` says where it goes: inside the square root, outside (added to it), or as its lower bound.
        offset: added to the weight: 1.0 for models that store w - 1.
        dtype: of the result; None for that of x.

    Returns:
        (..., D) in the memory order of x.

    Raises:
        ValueError: x has no dimension, the weight is not (D,), or the mode is unknown.
    """
    R.check(x, weight)
    check_mode(eps_mode)
    y, _ = _rms_norm(R.flat(x), weight, eps, offset, eps_mode, dtype or x.dtype)
    return R.unflat(y, x)
