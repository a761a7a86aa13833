"""The 4-bit linear of a few rows, as in decoding: y = x · Wᵀ + bias, bound by reading the packed weight.

One row: W exists in registers only, in float32. A thread keeps its part of x while it goes through the words of several
outputs, and its sums until the end, so that a weight costs little more than a shift, a look-up and a multiply-add.

    y[o] = bias[o] + sum over blocks (scale[o, block] · sum over the block (code[q[o, i]] · x[i]))

The 16 values of the code lie in the lanes of each half warp, where a shuffle fetches one by its nibble in a single
instruction: half of what a load from the first-level cache needs with its address.

Several rows: :mod:`.quant_rows`, or where that does not serve, a kernel that rounds a weight to the dtype of x, as any other
linear would have it, and has it meet all of them in Triton's product of matrices, which takes 16 rows at the price of one.
"""

# Pyright knows Triton's tuples and static loops only as what they are outside of a kernel.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant.layout import Layout
from . import dispatch, quant_rows
from .dequantize_4bit import arguments, block_scale, looked_up, stacked
from .rows import INTERPRETED, rounded
from .toolchain import tl, triton


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time: outputs, packed words along a row of W; its warps, and blocks under way."""

    outs: int
    words: int
    warps: int
    stages: int = 1


ONE_ROW, SEVERAL = Tile(8, 256, 4), Tile(64, 32, 4, 2)
NARROW, NARROW_OUTS = Tile(4, 512, 4), 2048
"""For one row and so few outputs that programs of eight would leave multiprocessors idle."""
ALONE = 2
"""Up to here rows are sooner done each by itself than together in Triton's product of matrices."""
FEW_ROWS, FEW_WIDE_ROWS = 16, 4
"""Up to here these kernels beat dequantizing first; in float32, whose rows are always done each by itself."""
LEAST_ROWS = 16
"""Rows of the matrix units' smallest operand."""

SHUFFLES = tl.constexpr(not dispatch.INTERPRETED and torch.version.hip is None)
"""Whether look-ups are PTX instructions. Elsewhere they are loads."""

_SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)
_LANE = tl.constexpr(
    "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mad.wide.u32 at, lane, 4, $1;"
    " ld.global.nc.b32 $0, [at]; }"
)
# 0x101f: a lane counts from the begin of its half warp, by the lowest four bits
_SHUFFLE = tl.constexpr(
    "{ .reg .b32 n;"
    + "".join(f" shr.u32 n, $8, {s}; shfl.sync.idx.b32 ${i}, $9, n, 0x101f, -1;" for i, s in enumerate(_SHIFTS))
    + " }"
)

_BEGIN = "{ .reg .pred p; .reg .b32 a<8>; setp.ne.b32 p, $9, 0;" + "".join(f" mov.b32 a{i}, 0;" for i in range(8))
_BEGIN += " @p ld.global.nc.v4.b32 {a0, a1, a2, a3}, [$8];"
_WIDE = tl.constexpr(
    f"{_BEGIN} @p ld.global.nc.v4.b32 {{a4, a5, a6, a7}}, [$8+16];"
    + "".join(f" mov.b32 ${i}, a{i};" for i in range(8))
    + " }"
)
_NARROW = tl.constexpr(_BEGIN + "".join(f" mov.b32 {{${2 * i}, ${2 * i + 1}}}, a{i};" for i in range(4)) + " }")


@triton.jit
def lane_table(code, like):
    """What :func:`look_up` reads, for words in the shape of ``like``: the code's value of each lane, or where they are."""
    table = code + like * 0
    if SHUFFLES:
        table = tl.inline_asm_elementwise(_LANE, "=f,l", [table], dtype=tl.float32, is_pure=True, pack=1)
    return table


@triton.jit
def look_up(table, bits):
    """The eight values of the code, in order, that each word of ``bits`` stands for."""
    if SHUFFLES:
        values = tl.inline_asm_elementwise(
            _SHUFFLE, "=f,=f,=f,=f,=f,=f,=f,=f,r,f", [bits, table], is_pure=False, pack=1,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        )  # fmt: skip
    else:
        values = looked_up(table, bits)
    return values


@triton.jit
def _load_eight(start, mask):
    """Eight neighbours from each address on, in float32; 0 where masked. As loads they would end in other threads."""
    values = ()
    if SHUFFLES:
        if start.dtype.element_ty == tl.float32:
            found = tl.inline_asm_elementwise(
                _WIDE, "=r,=r,=r,=r,=r,=r,=r,=r,l,r", [start, mask.to(tl.int32)], is_pure=True, pack=1,
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            )  # fmt: skip
        else:
            found = tl.inline_asm_elementwise(
                _NARROW, "=h,=h,=h,=h,=h,=h,=h,=h,l,r", [start, mask.to(tl.int32)], is_pure=True, pack=1,
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            )  # fmt: skip
        for i in tl.static_range(8):
            values = values + (found[i].to(start.dtype.element_ty, bitcast=True).to(tl.float32),)
    else:
        for i in tl.static_range(8):
            values = values + (tl.load(start + i, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _one_row(
    x, packed, absmax, nested_absmax, nested_code, nested_offset, code, bias, y, outs, ins,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """OUTS outputs of a row. Tensors have one dimension, in which a thread's words, x and sums stay its own."""
    WORDS: tl.constexpr = BLOCK_SIZE // 8
    words = packed.to(tl.pointer_type(tl.int32))
    within = tl.arange(0, BLOCKS * WORDS)
    table = lane_table(code, within)
    blocks = ins // BLOCK_SIZE
    first_out = tl.program_id(0) * OUTS
    x += tl.program_id(1) * ins
    sums = ()
    for _ in tl.static_range(OUTS):
        sums = sums + (tl.zeros((BLOCKS * WORDS,), tl.float32),)
    for first in range(0, blocks, BLOCKS):
        column, word = first + tl.arange(0, BLOCKS), first * WORDS + within
        there, live = column < blocks, word < blocks * WORDS
        bits, scales, grown = (), (), ()
        for o in tl.static_range(OUTS):
            # Past the last output it is taken again, and not stored.
            start = tl.minimum(first_out + o, outs - 1) * blocks
            bits = bits + (tl.load(words + start * WORDS + word, mask=live, other=0),)
            scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, start + column, there, NESTED)
            scales = scales + (scale,)
        numbers = _load_eight(x + word * 8, live)
        for o in tl.static_range(OUTS):
            w = look_up(table, bits[o])
            part = w[0] * numbers[0]
            for i in tl.static_range(1, 8):
                part += w[i] * numbers[i]
            part = tl.reshape(part, [BLOCKS, WORDS]) * scales[o][:, None]
            grown = grown + (sums[o] + tl.reshape(part, [BLOCKS * WORDS]),)
        sums = grown
    total = tl.sum(tl.reshape(stacked(sums, OUTS), [BLOCKS * WORDS, OUTS]), 0)
    out = first_out + tl.arange(0, OUTS)
    if BIAS:
        total += tl.load(bias + out, mask=out < outs, other=0.0).to(tl.float32)
    tl.store(y + tl.program_id(1) * outs + out, rounded(total, y.dtype.element_ty), mask=out < outs)


@triton.jit
def _several_rows(
    x, packed, absmax, nested_absmax, nested_code, nested_offset, code, bias, y, rows, outs, ins,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """OUTS outputs of up to ROWS rows."""
    WORDS: tl.constexpr = BLOCK_SIZE // 8
    words = packed.to(tl.pointer_type(tl.int32))
    within = tl.arange(0, BLOCKS * WORDS)
    row, out = tl.arange(0, ROWS), tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    in_rows, in_outs = (row < rows)[:, None], (out < outs)[:, None]
    table = lane_table(code, tl.zeros((OUTS, BLOCKS * WORDS), tl.int32))
    blocks = ins // BLOCK_SIZE
    start = out[:, None] * blocks
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        column, word = first + tl.arange(0, BLOCKS)[None, :], first * WORDS + within[None, :]
        bits = tl.load(words + start * WORDS + word, mask=in_outs & (word < blocks * WORDS), other=0)
        there = in_outs & (column < blocks)
        scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, start + column, there, NESTED)
        scale = tl.broadcast_to(scale[:, :, None], [OUTS, BLOCKS, WORDS]).reshape([OUTS, BLOCKS * WORDS])
        found, values = look_up(table, bits), ()
        for i in tl.static_range(8):
            values = values + (rounded(found[i] * scale, x.dtype.element_ty),)
        w = tl.reshape(stacked(values, 8), [OUTS, 8 * BLOCKS * WORDS])
        feature = first * BLOCK_SIZE + tl.arange(0, 8 * BLOCKS * WORDS)[None, :]
        operand = tl.load(x + row[:, None] * ins + feature, mask=in_rows & (feature < ins), other=0.0)
        if INTERPRETED:
            w, operand = w.to(tl.float32), operand.to(tl.float32)
        total = tl.dot(operand, tl.trans(w), total)
    if BIAS:
        total += tl.load(bias + out, mask=out < outs, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * outs + out[None, :], rounded(total, y.dtype.element_ty), mask=in_rows & (out < outs))


def serves(x: Tensor, layout: Layout) -> bool:
    """Whether a kernel takes a matrix ``x``: it has few rows, and each row of W begins with a block of its own."""
    whole = layout.is_4bit and layout.in_features % layout.block_size == 0
    # Words are counted in int32.
    small = layout.out_features * layout.in_features < 2**34
    few = FEW_WIDE_ROWS if x.dtype == torch.float32 else FEW_ROWS
    return whole and small and 0 < x.shape[0] <= few and x.dtype != torch.float64


def matvec(x: Tensor, weight: list[Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias for an ``x`` that :func:`serves` accepts."""
    rows, outs = x.shape[0], layout.out_features
    y = x.new_empty((rows, outs))
    if not outs:
        return y
    # 16 bytes are read at a time.
    x = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    if rows > 1 and quant_rows.serves(x, weight, layout):
        quant_rows.multiply(x, weight, layout, bias, y)
        return y
    # The matrix units would round a float32, and shared memory does not hold the larger blocks of so many outputs.
    alone = rows <= ALONE or x.dtype == torch.float32 or layout.block_size > 8 * SEVERAL.words
    tile, kernel = (NARROW if outs <= NARROW_OUTS else ONE_ROW, _one_row) if alone else (SEVERAL, _several_rows)
    tensors, sizes = arguments(weight, layout)
    given = (x, *tensors, y if bias is None else bias.contiguous(), y, *(() if alone else (rows,)), outs)
    options = {
        **sizes,
        "BIAS": bias is not None,
        "OUTS": tile.outs,
        "BLOCKS": max(tile.words * 8 // layout.block_size, 1),
    }
    options |= {"num_warps": tile.warps, "num_stages": tile.stages} | ({} if alone else {"ROWS": LEAST_ROWS})
    launch: Any = kernel[(triton.cdiv(outs, tile.outs), rows if alone else 1)]
    with torch.cuda.device_of(x):
        launch(*given, layout.in_features, **options)
    return y
