"""NF4 and FP4 dequantization, the scales' own dequantization included, in one pass over memory.

    w[i] = round(code[q[i]] · scale[i / block_size])        scale as in :mod:`weft.quant.four_bit`

Equal to bitsandbytes bit for bit. No gradient: the weight is frozen. Source: QLoRA (arXiv:2305.14314).

A thread takes a word of eight weights and writes them as 16 bytes (in bfloat16), so that a warp's accesses are whole cache
lines and a word has one scale. The 16 values of the code are loads from the first-level cache: memory is what it waits for.
"""

# Pyright knows Triton's tuples and static loops only as what they are outside of a kernel.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import four_bit
from ..quant.layout import Layout
from .dispatch import use_triton
from .operator import operator
from .rows import rounded
from .toolchain import tl, triton

WARPS, UNROLL = 2, 4
"""Warps of a program, and the words that each thread has under way at a time."""
NO_GAP = {"COLUMNS": 1, "GAP": 0}
"""Constants of the kernel for rows that follow each other: the same for weights of all widths."""

NATIVE_CPU = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_CPU_BLOCK = 1024
"""Largest block of bitsandbytes' CPU kernel; above it bitsandbytes itself falls back to torch."""


def reference(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    """The formula in plain torch; arguments as in :func:`dequantize_4bit`."""
    return four_bit.dequantize(weight, Layout.decode(layout), dtype)


@triton.jit
def block_scale(absmax, nested_absmax, nested_code, nested_offset, block, mask, NESTED: tl.constexpr):
    """The float32 scales of some blocks, 0 where masked; NESTED scales share one ``nested_absmax``, 0: not nested."""
    if NESTED == 0:
        scale = tl.load(absmax + block, mask=mask, other=0.0).to(tl.float32)
    else:
        index = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_code + index) * tl.load(nested_absmax + block // NESTED, mask=mask, other=0.0)
        scale = scale + tl.load(nested_offset)
    return scale


@triton.jit
def looked_up(code, bits):
    """The eight values of the code, in order, that each word of ``bits`` stands for."""
    values = ()
    for i in tl.static_range(8):
        values = values + (tl.load(code + ((bits >> ((i * 4) ^ 4)) & 15)),)
    return values


@triton.jit
def stacked(parts, COUNT: tl.constexpr):
    """COUNT tensors as one, whose last dimensions number them, in twos; each thread puts its own side by side."""
    for level in tl.static_range(7):
        if COUNT >> (level + 1) > 0:
            joined = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                joined = joined + (tl.join(parts[i], parts[i + (COUNT >> (level + 1))]),)
            parts = joined
    return parts[0]


@triton.jit
def _dequantize(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    out,
    count,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
    COLUMNS: tl.constexpr,
    GAP: tl.constexpr,
):
    """UNROLL times WORDS words, eight of the ``count`` weights each, the first in the high nibble of the first byte.

    After every COLUMNS weights GAP elements of ``out`` are left out.
    """
    first = tl.program_id(0).to(tl.int64) * (WORDS * UNROLL)
    words = packed.to(tl.pointer_type(tl.int32))
    lane = tl.arange(0, WORDS)
    bits, scales = (), ()
    for i in tl.static_range(UNROLL):
        word = first + i * WORDS + lane
        mask = word * 8 < count
        bits = bits + (tl.load(words + word, mask=mask, other=0),)
        block = word // (BLOCK_SIZE // 8)
        scales = scales + (block_scale(absmax, nested_absmax, nested_code, nested_offset, block, mask, NESTED),)
    for i in tl.static_range(UNROLL):
        found, values = looked_up(code, bits[i]), ()
        for j in tl.static_range(8):
            values = values + (found[j] * scales[i],)
        values = tl.reshape(stacked(values, 8), [8 * WORDS])
        element = (first + i * WORDS) * 8 + tl.arange(0, 8 * WORDS)
        there = element if GAP == 0 else element + element // COLUMNS * GAP
        tl.store(out + there, rounded(values, out.dtype.element_ty), mask=element < count)


def arguments(weight: list[Tensor], layout: Layout) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What every kernel that reads 4-bit weights takes: packed words, statistics and code, and the block sizes.

    Raises:
        ValueError: ``layout`` is not a 4-bit one, or its block size is not a power of two of at least 8.
    """
    size = layout.block_size
    if not layout.is_4bit or size < 8 or size & (size - 1):
        raise ValueError(f"{layout.encode()}: expected a 4-bit layout with a power of two as block size")
    statistics = [t.contiguous() for t in (weight[1:] if len(weight) == 5 else [weight[1]] * 4)]
    nested = layout.nested_block_size if len(weight) == 5 else 0
    code = four_bit.code_table(layout.kind, weight[0].device)
    packed = four_bit.packed_bytes(weight)
    if packed.numel() % 4 or packed.data_ptr() % 4:
        packed = F.pad(packed, (0, -packed.numel() % 4))
    return (packed, *statistics, code), {"BLOCK_SIZE": size, "NESTED": nested}


def _launch(weight: list[Tensor], layout: Layout, out: Tensor) -> None:
    """Runs the kernel. A compiler's fused multiply-add would round a nested scale once instead of twice: off."""
    tensors, sizes = arguments(weight, layout)
    kernel: Any = _dequantize
    if out.numel():
        words = 32 * WARPS
        grid = (triton.cdiv(out.numel(), 8 * words * UNROLL),)
        options = {"WORDS": words, "UNROLL": UNROLL, "num_warps": WARPS, "enable_fp_fusion": False, **NO_GAP}
        if not out.is_contiguous():
            options |= {"COLUMNS": out.shape[1], "GAP": out.stride(0) - out.shape[1]}
        with torch.cuda.device_of(out):
            kernel[grid](*tensors, out, out.numel(), **sizes, **options)


def _native_cpu(weight: list[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' CPU kernel, some five times faster than torch.

    It reads a scale too few where a block runs over the end of a row (0.50.2), so it is shown one row for each block.
    """
    import bitsandbytes  # noqa: F401  (registers the operator)

    native, size = torch.ops.bitsandbytes, layout.block_size
    scales, *nested = (t.contiguous() for t in weight[1:])
    if nested:
        absmax, code, offset = nested
        scales = native.dequantize_blockwise.default(scales, absmax, code, layout.nested_block_size, torch.float32)
        scales += offset
    shape = [layout.out_features * layout.in_features // size, size]
    packed = four_bit.packed_bytes(weight)
    w = native.dequantize_4bit.default(packed, scales, size, layout.kind, shape, dtype)
    return w.view(layout.out_features, layout.in_features)


def dequantized(weight: list[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The body of the operator, for operators that use a dequantized weight for a moment."""
    if use_triton(weight[0]) and dtype != torch.float64:
        out = torch.empty((layout.out_features, layout.in_features), dtype=dtype, device=weight[0].device)
        _launch(weight, layout, out)
        return out
    count = layout.out_features * layout.in_features
    native = weight[0].is_cpu and layout.is_4bit and dtype in NATIVE_CPU and layout.block_size <= NATIVE_CPU_BLOCK
    if native and count and count % layout.block_size == 0 and weight[-1].dtype == torch.float32:
        return _native_cpu(weight, layout, dtype)
    return four_bit.dequantize(weight, layout, dtype)


def dequantize_into(out: Tensor, weight: list[Tensor], layout: Layout) -> None:
    """Fills ``out``, (out_features, in_features), whose rows may be further apart than they are long."""
    if use_triton(out) and out.dtype != torch.float64:
        _launch(weight, layout, out)
    else:
        out.copy_(dequantized(weight, layout, out.dtype))


@operator("weft::dequantize_4bit")
def _dequantize_4bit(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    return dequantized(weight, Layout.decode(layout), dtype)


@_dequantize_4bit.register_fake
def _(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    shape = Layout.decode(layout)
    return weight[0].new_empty((shape.out_features, shape.in_features), dtype=dtype)


def dequantize_4bit(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    """The dense weight behind a 4-bit one, bit for bit what ``bitsandbytes.functional.dequantize_4bit`` returns.

    Args:
        weight: the tensors of a ``nf4`` or ``fp4`` layout (see :mod:`weft.quant.layout`).
        layout: the encoded :class:`~weft.quant.layout.Layout`; block sizes are powers of two.
        dtype: of the result: float32, bfloat16, float16, or float64 (the float32 product, widened).

    Returns:
        (out_features, in_features), contiguous, without a gradient.

    Raises:
        ValueError: ``layout`` is not a 4-bit layout.
    """
    return _dequantize_4bit(weight, layout, dtype)


def dense(weight: list[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The (out_features, in_features) matrix of any layout: a view of a dense weight, a temporary of a 4-bit one."""
    if layout.is_4bit:
        return dequantized(weight, layout, dtype)
    return weight[0] if layout.kind == "rows" else weight[0].t()
