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
from torch import Tensor

from . import rows as R
from .dispatch import compute_dtype, owned
from .operator import operator
from .toolchain import tl, triton

PER_THREAD = 32


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


@triton.jit(do_not_specialize=["rows"])
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


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x, grad, mu, r, extra, dx, weight, partial, sizes,
    x_strides, grad_strides, mu_strides, r_strides, extra_strides, dx_strides,
    rows, cols, offset, HAS_WEIGHT: tl.constexpr, HAS_EXTRA: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    INDEX: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    col = tl.arange(0, COLS)
    span = COLS if WHOLE else cols
    for_weight = partial + program.to(tl.int64) * cols
    for_bias = for_weight + tl.num_programs(0).to(tl.int64) * cols
    factor = R.load_vector(weight, col, cols, offset, HAS_WEIGHT)
    weight_sum = tl.zeros((ROWS, COLS), tl.float32)
    bias_sum = tl.zeros((ROWS, COLS), tl.float32)
    begin, step = program.to(INDEX) * ROWS, tl.num_programs(0).to(INDEX) * ROWS
    for first in tl.range(begin, rows, step, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
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
        # One reduction: each has the program's warps wait for one another.
        shift, lean = tl.split(tl.sum(tl.join(sums, dots), 1) * scale / cols)
        for start in range(0, span, COLS):
            if not WHOLE:
                unit = (R.load(x_row, x_strides, row, rows, start + col, cols) - mean) * scale
                dy = R.load(grad_row, grad_strides, row, rows, start + col, cols)
                factor = R.load_vector(weight, start + col, cols, offset, HAS_WEIGHT)
            if NEEDS_X:
                dx_row = dx + R.row_start(row, sizes, dx_strides)[:, None]
                result = dy * factor * scale - (unit * lean[:, None] + shift[:, None])
                if HAS_EXTRA:
                    extra_row = extra + R.row_start(row, sizes, extra_strides)[:, None]
                    result += R.load(extra_row, extra_strides, row, rows, start + col, cols)
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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, mu, r = empty(x, dtype)
    count, options = R.blocks(x, PER_THREAD, R.TALL)
    options |= {"eps": eps, "offset": offset, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    R.launch(_forward, count, (x, y, mu, r), (weight, bias), options)
    return y, mu, r


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, r: Tensor, extra: Tensor | None, offset: float,
    bias_dtype: torch.dtype | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dweight and dbias, the latter two in the dtype of what they belong to; None for one not needed."""
    dx = torch.empty_like(x) if needs[0] else None
    count, options = R.backward_blocks(x, any(needs[1:]), (x, grad, extra))
    partial = R.partial_sums(x, count if any(needs[1:]) else 0, 2)
    options |= {"offset": offset, "HAS_WEIGHT": weight is not None, "HAS_EXTRA": extra is not None}
    options |= {"NEEDS_X": needs[0], "NEEDS_WEIGHT": needs[1], "NEEDS_BIAS": needs[2]}
    R.launch(_backward, count, (x, grad, mu, r, extra, dx), (weight, partial), options)
    if not any(needs[1:]):
        return dx, None, None
    wanted = slice(0 if needs[1] else 1, 2 if needs[2] else 1)
    found = iter(R.totals(partial[wanted], *_vector_dtypes(x, weight, bias_dtype)[wanted]))
    return dx, *(next(found) if need else None for need in needs[1:])


def _vector_dtypes(x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """Those of dweight and dbias."""
    compute = compute_dtype(x)
    return compute if weight is None else weight.dtype, bias_dtype or compute


def _factor(x: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """w in the dtype of the arithmetic, which is also what makes torch's own kernel compute in it."""
    compute = compute_dtype(x)
    return x.new_ones(x.shape[-1:], dtype=compute) if weight is None else weight.to(compute).add(offset)


def _order(x: Tensor) -> list[int]:
    return [*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1]


def _matrix(x: Tensor, order: list[int]) -> Tensor:
    return x.permute(order).reshape(-1, x.shape[-1])


def _put(matrix: Tensor, like: Tensor, order: list[int]) -> Tensor:
    """``matrix`` with the shape, strides and dtype of the meta tensor ``like``, which mostly is a view of it."""
    with owned():
        whole = matrix.view([like.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(like.dim())])
    if whole.stride() == like.stride() and whole.dtype == like.dtype:
        return whole
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=matrix.device).copy_(whole)


def _plain_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """From torch's own kernel, on rows in memory order. On the CPU it takes a low-precision x as it is."""
    order, factor = _order(x), _factor(x, weight, offset)
    shift = torch.zeros_like(factor) if bias is None else bias.to(factor.dtype)
    wide = x if x.device.type == "cpu" and x.dtype == dtype else x.to(factor.dtype)
    results = torch.native_layer_norm(_matrix(wide, order), x.shape[-1:], factor, shift, eps)
    y, mu, r = (_put(*pair, order) for pair in zip(results, empty(x, dtype, "meta"), strict=True))
    return y, mu, r


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, r: Tensor, extra: Tensor | None, offset: float,
    bias_dtype: torch.dtype | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As :func:`_launch_backward`. Torch's kernel sums dweight and dbias in the dtype of x, so they need it upcast."""
    order, factor = _order(x), _factor(x, weight, offset)
    narrow = x.device.type == "cpu" and grad.dtype == x.dtype and not any(needs[1:])
    dtype = x.dtype if narrow else factor.dtype
    dy, wide, mean, scale = (_matrix(t, order) for t in (grad.to(dtype), x.to(dtype), mu, r))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, wide, x.shape[-1:], mean, scale, factor, factor, list(needs)
    )
    if dx is not None and extra is not None:
        dx += _matrix(extra, order)
    pairs = zip((dweight, dbias), _vector_dtypes(x, weight, bias_dtype), strict=True)
    vectors = (None if vector is None else vector.to(dtype) for vector, dtype in pairs)
    return None if dx is None else _put(dx, torch.empty_like(x, device="meta"), order), *vectors


def empty(x: Tensor, dtype: torch.dtype, device: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, mu and r in the memory order of x."""
    y = torch.empty_like(x, dtype=dtype, device=device)
    mu, r = (torch.empty_like(x[..., :1], dtype=compute_dtype(x), device=device) for _ in range(2))
    return y, mu, r


@operator("weft::layer_norm")
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return empty(x, dtype)
    return (_launch_forward if R.kernel_runs(x) else _plain_forward)(x, weight, bias, eps, offset, dtype)


@operator("weft::layer_norm_backward", adds="extra")
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mu: Tensor, r: Tensor, extra: Tensor | None, offset: float,
    bias_dtype: torch.dtype | None, needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight and dbias, an empty tensor for one not needed; ``extra`` is a gradient of x from elsewhere, added to dx."""
    needs = (needs_x, needs_weight, needs_bias)
    if not x.numel():
        return _gradients(x, weight, bias_dtype, *needs)
    run = _launch_backward if R.kernel_runs(x) else _plain_backward
    grads = run(grad, x, weight, mu, r, extra, offset, bias_dtype, needs)
    dtypes = (x.dtype, *_vector_dtypes(x, weight, bias_dtype))
    dx, dweight, dbias = (x.new_empty(0, dtype=t) if g is None else g for t, g in zip(dtypes, grads, strict=True))
    return dx, dweight, dbias


def _gradients(
    x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None,
    needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the backward returns for an empty x, and in shape for any."""
    pairs = zip((needs_weight, needs_bias), _vector_dtypes(x, weight, bias_dtype), strict=True)
    dweight, dbias = (x.new_zeros(x.shape[-1] if need else 0, dtype=dtype) for need, dtype in pairs)
    return torch.empty_like(x) if needs_x else x.new_empty(0), dweight, dbias


_layer_norm.register_fake(lambda x, weight, bias, eps, offset, dtype: empty(x, dtype))
_layer_norm_backward.register_fake(
    lambda grad, x, weight, mu, r, extra, offset, bias_dtype, *needs: _gradients(x, weight, bias_dtype, *needs),
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
    grads = _layer_norm_backward(grad, x, weight, mu, r, None, ctx.offset, ctx.bias_dtype, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


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
    return R.unflat(y, x)
