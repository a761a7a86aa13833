"""A linear whose weight is stored in 4 bits: y = x · Wᵀ + bias, with W = dequantize(weight) (QLoRA, arXiv:2305.14314).

    dx = dy · W        dbias = sum over rows (dy)        the weight is frozen

Many rows: W is dequantized into a temporary and the product is cuBLAS'. Few rows, as in decoding, are bound by reading
the weight: a matrix-vector kernel reads the packed words and keeps W in registers, in float32.
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
from .dequantize_4bit import arguments, block_scale, dequantized
from .dispatch import shaped, use_triton
from .rows import rounded
from .toolchain import tl, triton

FEW_ROWS = 8
"""Up to here the matrix-vector kernel beats dequantizing first; its arithmetic grows with the rows."""

TILE_WORDS, WARPS, STAGES = 128, 4, 1
"""Matrix-vector kernel: packed words along a row that are read at a time, warps, and loads in flight."""


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


def dense(weight: list[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The (out_features, in_features) matrix of any layout: a view of a dense weight, a temporary of a 4-bit one."""
    if layout.is_4bit:
        return dequantized(weight, layout, dtype)
    return weight[0] if layout.kind == "rows" else weight[0].t()


def product(x: Tensor, weight: list[Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for a matrix ``x`` (rows, in_features), as a new contiguous (rows, out_features).

    Raises:
        ValueError: ``x`` has other columns than W.
    """
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"a linear with {layout.in_features} input features was given {tuple(x.shape)}")
    if 0 < x.shape[0] <= FEW_ROWS and layout.is_4bit and use_triton(x) and _whole_blocks(weight, layout, x.dtype):
        return _matvec(x.contiguous(), weight, layout, bias)
    return F.linear(x, dense(weight, layout, x.dtype), bias)


def _whole_blocks(weight: list[Tensor], layout: Layout, dtype: torch.dtype) -> bool:
    """Whether every row of W begins with a block of its own, in an aligned word."""
    aligned = weight[0].data_ptr() % 4 == 0
    return dtype != torch.float64 and aligned and layout.in_features % layout.block_size == 0


@triton.jit
def _matvec_kernel(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    bias,
    y,
    rows,
    outs,
    ins,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """OUTS outputs of all rows. A thread keeps one sum for each of its words, so that only the end exchanges any."""
    WORDS: tl.constexpr = BLOCK_SIZE // 8
    row, out = tl.arange(0, ROWS), tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    in_rows, in_outs = row < rows, out < outs
    table = tl.load(code + tl.arange(0, 16))
    words, within, nibble = packed.to(tl.pointer_type(tl.uint32)), tl.arange(0, WORDS), tl.arange(0, 8)
    # Nibbles come first: a tensor's leading dimension lies in a thread's own registers.
    shifts = ((nibble * 4) ^ 4).to(tl.uint32)[:, None, None, None]
    blocks = ins // BLOCK_SIZE
    start = out.to(tl.int64)[:, None] * blocks
    sums = tl.zeros((ROWS, OUTS, BLOCKS, WORDS), tl.float32)
    for first in tl.range(0, blocks, BLOCKS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column = first + tl.arange(0, BLOCKS)
        in_row = column < blocks
        block, there = start + column[None, :], in_outs[:, None] & in_row[None, :]
        scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, block, there, NESTED)
        at = block[:, :, None] * WORDS + within[None, None, :]
        bits = tl.load(words + at, mask=there[:, :, None], other=0)
        codes = ((bits[None] >> shifts) & 15).to(tl.int32)
        w = tl.gather(table, tl.reshape(codes, [8 * OUTS * BLOCKS * WORDS]), 0)
        w = tl.reshape(w, [8, 1, OUTS, BLOCKS, WORDS])
        feature = (column[:, None] * WORDS + within[None, :])[None, None] * 8 + nibble[:, None, None, None]
        there_x = in_rows[None, :, None, None] & in_row[None, None, :, None]
        operand = tl.load(x + row[None, :, None, None] * ins + feature, mask=there_x, other=0.0).to(tl.float32)
        sums += tl.sum(w * operand[:, :, None], 0) * scale[None, :, :, None]
    total = tl.sum(tl.reshape(sums, [ROWS, OUTS, BLOCKS * WORDS]), 2)
    if BIAS:
        total += tl.load(bias + out, mask=in_outs, other=0.0).to(tl.float32)[None, :]
    there_y = in_rows[:, None] & in_outs[None, :]
    tl.store(y + row[:, None] * outs + out[None, :], rounded(total, y.dtype.element_ty), mask=there_y)


def _matvec(x: Tensor, weight: list[Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    rows, outs = x.shape[0], layout.out_features
    y = x.new_empty((rows, outs))
    tensors, sizes = arguments(weight, layout)
    padded = triton.next_power_of_2(rows)
    tile = {"ROWS": padded, "OUTS": 8 if padded <= 4 else 4, "BLOCKS": max(TILE_WORDS * 8 // layout.block_size, 1)}
    options = {**sizes, **tile, "BIAS": bias is not None, "STAGES": STAGES, "num_warps": WARPS}
    given = bias.contiguous() if bias is not None else y
    kernel: Any = _matvec_kernel
    grid = (triton.cdiv(outs, tile["OUTS"]),)
    if outs:
        kernel[grid](x, *tensors, given, y, rows, outs, layout.in_features, **options, enable_fp_fusion=True)
    return y


@torch.library.custom_op("weft::quant_linear", mutates_args=())
def _quant_linear(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    with no_autocast(x):
        y = product(x.reshape(-1, x.shape[-1]), weight, Layout.decode(layout), bias)
    return shaped(y, *x.shape[:-1], y.shape[-1])


@_quant_linear.register_fake
def _(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], Layout.decode(layout).out_features))


@torch.library.custom_op("weft::quant_linear_backward", mutates_args=())
def _quant_linear_backward(dy: Tensor, weight: list[Tensor], layout: str, needs: list[bool]) -> list[Tensor]:
    """The gradients of x and bias, those that ``needs`` names."""
    shape, rows, grads = Layout.decode(layout), dy.reshape(-1, dy.shape[-1]), []
    with no_autocast(dy):
        if needs[0]:
            grads.append(shaped(rows @ dense(weight, shape, dy.dtype), *dy.shape[:-1], shape.in_features))
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
