"""LayerNorm over the last dimension (arXiv:1607.06450), with w or 1 + w as its weight.

    mu = mean(x)        r = 1 / sqrt(mean((x - mu)²) + eps)        n = (x - mu) · r
    y = n · w + bias    w = offset + weight, or 1 without a weight

    g = dy · w        dx = r · (g - mean(g) - n · mean(g · n))
    dweight = sum over rows (dy · n)        dbias = sum over rows (dy)

The variance is that of the centred row, never mean(x²) - mu², which cancels. Arithmetic is in float32 with one rounding
at the end. Saved for the backward: x, weight, mu and r (float32, one a row).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows as R
from .dispatch import compute_dtype

PER_THREAD, PER_THREAD_BACKWARD = 32, 16
PROGRAMS = 2
"""Programs a multiprocessor in the backward; each holds one partial sum of the gradients of weight and bias."""


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`layer_norm`."""
    wide = x.to(compute_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(dtype or x.dtype)


@triton.jit
def _forward(
    x, y, mu, r, weight, bias, sizes, x_strides, y_strides, mu_strides, r_strides, rows, cols, eps, offset,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    # A row that fits is one block whose loops have one step and vanish: it is read once and stays in registers.
    span = COLS if WHOLE else cols
    x += R.row_start(row, sizes, x_strides)[:, None]
    y += R.row_start(row, sizes, y_strides)[:, None]
    sums = tl.zeros((ROWS, COLS), tl.float32)
    value = sums
    for start in range(0, span, COLS):
        value = R.load(x, x_strides, row, rows, start + col, cols)
        sums += value
    mean = tl.sum(sums, 1) / cols
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, span, COLS):
        if not WHOLE:
            value = R.load(x, x_strides, row, rows, start + col, cols)
        centred = tl.where((start + col < cols)[None, :], value - mean[:, None], 0.0)
        squares += centred * centred
    scale = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(tl.sum(squares, 1) / cols + eps))
    tl.store(mu + R.row_start(row, sizes, mu_strides), mean, mask=row < rows)
    tl.store(r + R.row_start(row, sizes, r_strides), scale, mask=row < rows)
    for start in range(0, span, COLS):
        if not WHOLE:
            value = R.load(x, x_strides, row, rows, start + col, cols)
        result = (value - mean[:, None]) * scale[:, None]
        result *= R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
        if HAS_BIAS:
            result += R.load_vector(bias, start + col, cols, 0.0, HAS_BIAS)
        R.store(y, y_strides, row, rows, start + col, cols, result)


@triton.jit
def _backward(
    x, grad, mu, r, dx, weight, partial, sizes, x_strides, grad_strides, mu_strides, r_strides, dx_strides,
    rows, cols, offset, HAS_WEIGHT: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, COLS)
    span = COLS if WHOLE else cols
    for_weight = partial + program.to(tl.int64) * cols
    for_bias = for_weight + tl.num_programs(0).to(tl.int64) * cols
    factor = R.load_vector(weight, col, cols, offset, HAS_WEIGHT)
    weight_sum = tl.zeros((ROWS, COLS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(program.to(INDEX) * ROWS, rows, tl.num_programs(0).to(INDEX) * ROWS):
        row = first + tl.arange(0, ROWS)
        x_row = x + R.row_start(row, sizes, x_strides)[:, None]
        grad_row = grad + R.row_start(row, sizes, grad_strides)[:, None]
        mean = tl.load(mu + R.row_start(row, sizes, mu_strides), mask=row < rows, other=0.0)[:, None]
        scale = tl.load(r + R.row_start(row, sizes, r_strides), mask=row < rows, other=0.0)[:, None]
        sums = tl.zeros((ROWS, COLS), tl.float32)
        dots = tl.zeros((ROWS, COLS), tl.float32)
        unit, dy = sums, sums
        for start in range(0, span, COLS):
            unit = (R.load(x_row, x_strides, row, rows, start + col, cols) - mean) * scale
            dy = R.load(grad_row, grad_strides, row, rows, start + col, cols)
            if not WHOLE:
                factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
            sums += dy * factor
            dots += dy * factor * unit
        shift = (tl.sum(sums, 1) / cols)[:, None]
        lean = (tl.sum(dots, 1) / cols)[:, None]
        for start in range(0, span, COLS):
            if not WHOLE:
                unit = (R.load(x_row, x_strides, row, rows, start + col, cols) - mean) * scale
                dy = R.load(grad_row, grad_strides, row, rows, start + col, cols)
                factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
            if NEEDS_X:
                dx_row = dx + R.row_start(row, sizes, dx_strides)[:, None]
                result = (dy * factor - shift - unit * lean) * scale
                R.store(dx_row, dx_strides, row, rows, start + col, cols, result)
            if WHOLE:
                if NEEDS_WEIGHT:
                    weight_sum += dy * unit
                if NEEDS_BIAS:
                    bias_sum += dy
            else:
                if NEEDS_WEIGHT:
                    R.accumulate(for_weight, start + col, cols, tl.sum(dy * unit, 0))
                if NEEDS_BIAS:
                    R.accumulate(for_bias, start + col, cols, tl.sum(dy, 0))
    if NEEDS_WEIGHT and WHOLE:
        tl.store(for_weight + col, tl.sum(weight_sum, 0), mask=col < cols)
    if NEEDS_BIAS and WHOLE:
        tl.store(for_bias + col, tl.sum(bias_sum, 0), mask=col < cols)


def _launch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mu: Tensor, r: Tensor, eps: float, offset: float
) -> None:
    count, options = R.blocks(x, PER_THREAD)
    options |= {"eps": eps, "offset": offset, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    R.launch(_forward, count, (x, y, mu, r), (weight, bias), options)


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, r: Tensor, dx: Tensor | None,
    needs_weight: bool, needs_bias: bool, offset: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx in its buffer, dweight and dbias in float32; None for one not needed."""
    count, options = R.blocks(x, PER_THREAD_BACKWARD)
    count = min(count, R.persistent(x, PROGRAMS))
    partial = R.partial_sums(x, count, 2)
    options |= {"offset": offset, "HAS_WEIGHT": weight is not None}
    options |= {"NEEDS_X": dx is not None, "NEEDS_WEIGHT": needs_weight, "NEEDS_BIAS": needs_bias}
    R.launch(_backward, count, (x, grad, mu, r, dx), (weight, partial), options)
    return dx, partial[0].sum(0) if needs_weight else None, partial[1].sum(0) if needs_bias else None


def _plain_operands(x: Tensor, weight: Tensor | None, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and w for torch's own kernel, which on the CPU computes in float32 on a low-precision x if w is float32."""
    compute = compute_dtype(x)
    narrow = x.device.type == "cpu" and x.dtype == dtype
    factor = x.new_ones(x.shape[-1:], dtype=compute) if weight is None else weight.to(compute).add(offset)
    return x if narrow else x.to(compute), factor


def _order(x: Tensor) -> list[int]:
    return [*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1]


def _matrix(x: Tensor, order: list[int]) -> Tensor:
    return x.permute(order).reshape(-1, x.shape[-1])


def _put(matrix: Tensor, out: Tensor, order: list[int]) -> Tensor:
    """``matrix`` with the shape, strides and dtype of ``out``: itself if it lies so, else copied there."""
    shaped = matrix.view([out.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(out.dim())])
    return shaped if shaped.stride() == out.stride() and shaped.dtype == out.dtype else out.copy_(shaped)


def _plain_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: tuple[Tensor, Tensor, Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mu and r from torch's own kernel, in memory order where that spares a copy."""
    order, (y, mu, r) = _order(x), out
    wide, factor = _plain_operands(x, weight, offset, y.dtype)
    shift = torch.zeros_like(factor) if bias is None else bias.to(factor.dtype)
    results = torch.native_layer_norm(_matrix(wide, order), x.shape[-1:], factor, shift, eps)
    return _put(results[0], y, order), _put(results[1], mu, order), _put(results[2], r, order)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, r: Tensor, dx: Tensor | None,
    needs_weight: bool, needs_bias: bool, offset: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    order = _order(x)
    wide, factor = _plain_operands(x, weight, offset, grad.dtype)
    slopes, values, mean, scale = (_matrix(t, order) for t in (grad.to(wide.dtype), wide, mu, r))
    result, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        slopes, values, x.shape[-1:], mean, scale, factor, factor, [dx is not None, needs_weight, needs_bias]
    )
    return None if dx is None else _put(result, dx, order), dweight, dbias


def empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, mu and r in the memory order of x."""
    per_row = [torch.empty_like(x[..., :1], dtype=compute_dtype(x)) for _ in range(2)]
    return torch.empty_like(x, dtype=dtype), per_row[0], per_row[1]


@torch.library.custom_op("weft::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out = empty(x, dtype)
    if x.numel() and not R.kernel_runs(x):
        return _plain_forward(x, weight, bias, out, eps, offset)
    if x.numel():
        _launch_forward(x, weight, bias, *out, eps, offset)
    return out


@torch.library.custom_op("weft::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, r: Tensor, offset: float,
    needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, and dweight and dbias in the dtype of the arithmetic; an empty tensor for one not needed."""
    out = _empty_gradients(x, needs_x, needs_weight, needs_bias)
    if not x.numel():
        return out[0], out[1].zero_(), out[2].zero_()
    run = _launch_backward if R.kernel_runs(x) else _plain_backward
    grads = run(grad, x, weight, mu, r, out[0] if needs_x else None, needs_weight, needs_bias, offset)
    dx, dweight, dbias = (empty if grad is None else grad for empty, grad in zip(out, grads, strict=True))
    return dx, dweight, dbias


def _empty_gradients(x: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    vectors = [
        x.new_empty(x.shape[-1] if needed else 0, dtype=compute_dtype(x)) for needed in (needs_weight, needs_bias)
    ]
    return torch.empty_like(x) if needs_x else x.new_empty(0), vectors[0], vectors[1]


_layer_norm.register_fake(lambda x, weight, bias, eps, offset, dtype: empty(x, dtype))
_layer_norm_backward.register_fake(
    lambda grad, x, weight, mu, r, offset, *needs: _empty_gradients(x, *needs),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.offset, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, mu, r = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    dx, dweight, dbias = _layer_norm_backward(grad, x, weight, mu, r, ctx.offset, *needs)
    vectors = (dweight.to(weight.dtype) if needs[1] else None, dbias.to(ctx.bias_dtype) if needs[2] else None)
    return dx if needs[0] else None, *vectors, None, None, None


_layer_norm.register_autograd(_differentiate, setup_context=_setup_context)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalization over the last dimension (arXiv:1607.06450), with the biased variance.

    Args:
        x: (..., D), any strides; float32, bfloat16, float16, or float64 (served by plain torch).
        weight: (D,) in any floating-point dtype, or None for a factor of 1.
        bias: (D,) in any floating-point dtype, or None.
        eps: added to the variance.
        offset: added to the weight: 1.0 for models that store w - 1.
        dtype: of the result; None for that of x.

    Returns:
        (..., D) in the memory order of x.

    Raises:
        ValueError: x has no dimension, or weight or bias is not (D,).
    """
    R.check(x, weight, bias)
    y, _, _ = _layer_norm(R.flat(x), weight, bias, eps, offset, dtype or x.dtype)
    return y.view(x.shape)
