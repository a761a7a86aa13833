"""The 4-bit linear of a few rows on NVIDIA's matrix units: y = x · Wᵀ + bias, W in registers only, with 16 bits of each weight.

    y[r, o] = bias[o] + sum over blocks (scale[o, block] · sum over the block (code[q[o, i]] · x[r, i]))

A byte holds two weights. A table in shared memory has, for each of the 256 bytes, the two numbers of the code that it stands
for, as x's dtype can hold them, and what that rounds off: hi and lo, code = hi + lo. A look-up is one load of 8 bytes; there are
16 copies, so that the lanes of a half warp, which are served together, never meet in a bank.

The instruction ``mma.m16n8k16`` (PTX ISA, "Matrix Fragments for mma.m16n8k16") multiplies 16 rows of A by 8 columns of B. Here A
has the hi of eight outputs above their lo, so that what a lane has looked up is its fragment as it is; B is eight rows of x. The
order of a product's terms does not matter, as long as A and B agree: a lane takes 16 neighbours of a block of 64 weights.
The warps of a program share the blocks of its eight outputs.
"""

# Pyright knows Triton's tuples and static loops only as what they are outside of a kernel.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..quant.layout import Layout
from . import dispatch
from .dequantize_4bit import arguments, block_scale, stacked
from .rows import rounded, units
from .toolchain import tl, triton

WARPS, UNROLL, RESIDENT = 4, 4, 4
"""Warps of a program, blocks of 64 weights that a warp has under way at a time, programs of a multiprocessor."""
STEP = tl.constexpr(64)
"""Weights that a warp's instructions take of each output at a time: blocks have so many, or a multiple."""
OUTS, ROWS = tl.constexpr(8), tl.constexpr(8)
"""Outputs of a program, and rows that one instruction takes."""
_TABLE = 256 * 16 * 8
TABLE_BYTES = tl.constexpr(_TABLE)
"""An entry for each byte, in 16 copies, of two numbers of 16 bits as hi and lo."""

_DECLARE = tl.constexpr(f"{{ .shared .align 16 .b8 weft_pairs[{_TABLE}]; mov.u32 $0, weft_pairs; }}")
_EIGHT_BYTES = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.nc.v2.b32 {$0, $1}, [$2]; }"
)
_SIXTEEN_BYTES = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $5, 0;"
    + "".join(f" mov.b32 ${i}, 0;" for i in range(4))
    + " @p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)


def _put(kind: str) -> str:
    """Stores two copies of hi and lo of the numbers $2 and $3 at $1."""
    widened = {
        "bf16": "shl.b32 u, h, 16; mov.b32 a, u; and.b32 u, h, 0xffff0000; mov.b32 b, u;",
        "f16": "{ .reg .b16 p, q; mov.b32 {p, q}, h; cvt.f32.f16 a, p; cvt.f32.f16 b, q; }",
    }
    return (
        f"{{ .reg .b32 h, l, u; .reg .f32 a, b; cvt.rn.{kind}x2.f32 h, $3, $2; {widened[kind]}"
        f" sub.f32 a, $2, a; sub.f32 b, $3, b; cvt.rn.{kind}x2.f32 l, b, a;"
        " st.shared.v4.b32 [$1], {h, l, h, l}; mov.b32 $0, 0; }"
    )


def _multiply(kind: str, tiles: int) -> str:
    """Looks up the four bytes of a word and multiplies them by as many times eight rows.

    Operands: 4 sums a tile, out; the word; the lane's copy of the table; 4 registers of x a tile; the sums so far.
    """
    word, x, sums = 4 * tiles, 4 * tiles + 2, 8 * tiles + 2
    text = "{ .reg .b32 h<4>, l<4>, t; .reg .f32 c<4>;"
    for i in range(4):
        text += f" prmt.b32 t, ${word}, 0, 0x444{i}; mad.lo.u32 t, t, 128, ${word + 1};"
        text += f" ld.shared.v2.b32 {{h{i}, l{i}}}, [t];"
    for n in range(0, 4 * tiles, 4):
        before, after = (", ".join(f"${at + n + i}" for i in range(4)) for at in (sums, 0))
        product = f" mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        text += f"{product} {{c0, c1, c2, c3}}, {{h0, l0, h1, l1}}, {{${x + n}, ${x + n + 1}}}, {{{before}}};"
        text += f"{product} {{{after}}}, {{h2, l2, h3, l3}}, {{${x + n + 2}, ${x + n + 3}}}, {{c0, c1, c2, c3}};"
    return text + " }"


_PUT_BF16, _PUT_F16 = (tl.constexpr(_put(kind)) for kind in ("bf16", "f16"))
_ONE_BF16, _TWO_BF16 = (tl.constexpr(_multiply("bf16", tiles)) for tiles in (1, 2))
_ONE_F16, _TWO_F16 = (tl.constexpr(_multiply("f16", tiles)) for tiles in (1, 2))
_ONE_OPERANDS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 6 + ["f"] * 4))
_TWO_OPERANDS = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 10 + ["f"] * 8))


@triton.jit
def _read_two(start, mask):
    """The two words from each address on; 0 where masked."""
    return tl.inline_asm_elementwise(
        _EIGHT_BYTES, "=&r,=&r,l,r", [start, mask.to(tl.int32)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _read_eight(start, mask):
    """The eight words from each address on; 0 where masked."""
    found = ()
    for half in tl.static_range(2):
        four = tl.inline_asm_elementwise(
            _SIXTEEN_BYTES, "=&r,=&r,=&r,=&r,l,r", [start + 4 * half, mask.to(tl.int32)], is_pure=True, pack=1,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        )  # fmt: skip
        found = found + (four[0], four[1], four[2], four[3])
    return found


@triton.jit
def _fill(table, code, thread, THREADS: tl.constexpr, HALF: tl.constexpr):
    """Threads write the table, 16 bytes at a time."""
    asm: tl.constexpr = _PUT_F16 if HALF else _PUT_BF16
    for part in tl.static_range(TABLE_BYTES // (16 * THREADS)):
        at = part * THREADS + thread
        byte = at // 8
        numbers = [table + at * 16, tl.load(code + byte // 16), tl.load(code + byte % 16)]
        tl.inline_asm_elementwise(asm, "=r,r,f,f", numbers, dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _block_sums(first, second, table, x, zero, HALF: tl.constexpr, TILES: tl.constexpr):
    """Of a block, for each tile: hi of two rows, lo of the same. ``first`` and ``second`` are its words, x 8 registers a tile."""
    if TILES == 1:
        sums = (zero, zero, zero, zero)
        one: tl.constexpr = _ONE_F16 if HALF else _ONE_BF16
        for w in tl.static_range(2):
            sums = tl.inline_asm_elementwise(
                one, _ONE_OPERANDS,
                [first if w == 0 else second, table, x[4 * w], x[4 * w + 1], x[4 * w + 2], x[4 * w + 3],
                 sums[0], sums[1], sums[2], sums[3]],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
    else:
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        both: tl.constexpr = _TWO_F16 if HALF else _TWO_BF16
        for w in tl.static_range(2):
            sums = tl.inline_asm_elementwise(
                both, _TWO_OPERANDS,
                [first if w == 0 else second, table, x[4 * w], x[4 * w + 1], x[4 * w + 2], x[4 * w + 3],
                 x[8 + 4 * w], x[9 + 4 * w], x[10 + 4 * w], x[11 + 4 * w],
                 sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=False, pack=1,
            )  # fmt: skip
    return sums


@triton.jit
def _few_rows(
    x, packed, absmax, nested_absmax, nested_code, nested_offset, code, bias, y, rows, outs, ins,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Eight outputs at a time of up to 8 · TILES rows. Tensors have an element a thread; a lane is in group lane / 4, which is
    its output and its row of x, and the lane % 4 of that its part of a block."""
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    THREADS: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = BLOCK_SIZE // STEP
    words, pairs = packed.to(tl.pointer_type(tl.int32)), x.to(tl.pointer_type(tl.int32))
    thread = tl.arange(0, THREADS)
    warp, group, part = thread // 32, thread % 32 // 4, thread % 4
    zero = tl.zeros((THREADS,), tl.float32)
    table = tl.inline_asm_elementwise(_DECLARE, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    _fill(table, code, thread, THREADS, HALF)
    table += thread % 16 * 8
    count = ins // STEP
    lane, result = tl.arange(0, 32)[:, None], tl.arange(0, 2 * TILES)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(outs, OUTS), tl.num_programs(0)):
        # Past the last output it is taken again, and not stored.
        begin = tl.minimum(tile * OUTS + group, outs - 1) * count
        total = ()
        for _ in tl.static_range(2 * TILES):
            total = total + (zero,)
        for first in range(0, count, WARPS * UNROLL):
            bits, scales = (), ()
            for u in tl.static_range(UNROLL):
                at = first + u * WARPS + warp
                two = _read_two(words + (begin + at) * 8 + part * 2, at < count)
                bits = bits + (two[0], two[1])
            for u in tl.static_range(UNROLL):
                at = first + u * WARPS + warp
                block = (begin + at) // STEPS
                scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, block, at < count, NESTED)
                scales = scales + (scale,)
            for u in tl.static_range(UNROLL):
                at, numbers = first + u * WARPS + warp, ()
                for n in tl.static_range(TILES):
                    row = n * ROWS + group
                    here = (at < count) & (row < rows)
                    numbers = numbers + _read_eight(pairs + (row * ins + at * STEP + part * 16) // 2, here)
                sums, grown = _block_sums(bits[2 * u], bits[2 * u + 1], table, numbers, zero, HALF, TILES), ()
                for i in tl.static_range(2 * TILES):
                    hi, lo = sums[i // 2 * 4 + i % 2], sums[i // 2 * 4 + i % 2 + 2]
                    # An infinity of x is in hi as in the product with W; lo has other signs, or zeros.
                    exact = tl.where(tl.abs(hi) < float("inf"), hi + lo, hi)
                    grown = grown + (total[i] + exact * scales[u],)
                total = grown
        whole = tl.sum(tl.reshape(stacked(total, 2 * TILES), [WARPS, 32, 2 * TILES]), 0)
        out, row = tile * OUTS + lane // 4, result // 2 * ROWS + lane % 4 * 2 + result % 2
        if BIAS:
            whole += tl.load(bias + out, mask=out < outs, other=0.0).to(tl.float32)
        mask = (row < rows) & (out < outs)
        tl.store(y + row * outs + out, rounded(whole, y.dtype.element_ty), mask=mask)


def serves(x: Tensor, weight: list[Tensor], layout: Layout) -> bool:
    """Whether this kernel runs here and takes a matrix ``x`` of up to 16 rows."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not _has_instructions(x.device):
        return False
    return layout.block_size % STEP.value == 0 and weight[0].data_ptr() % 8 == 0 and 0 < x.shape[0] <= 2 * ROWS.value


@cache
def _has_instructions(device: torch.device) -> bool:
    """They came with compute capability 8.0."""
    here = device.type == "cuda" and torch.version.hip is None and not dispatch.INTERPRETED
    return here and torch.cuda.get_device_capability(device) >= (8, 0)


def multiply(x: Tensor, weight: list[Tensor], layout: Layout, bias: Tensor | None, y: Tensor) -> None:
    """Fills y with x · Wᵀ + bias for an ``x`` that :func:`serves` accepts, contiguous and at a multiple of 16 bytes."""
    tensors, sizes = arguments(weight, layout)
    programs = min(triton.cdiv(layout.out_features, OUTS.value), RESIDENT * units(x.device))
    options = {**sizes, "BIAS": bias is not None, "TILES": triton.cdiv(x.shape[0], ROWS.value)}
    options |= {"WARPS": WARPS, "UNROLL": UNROLL, "num_warps": WARPS}
    given = (x, *tensors, y if bias is None else bias.contiguous(), y, *y.shape, layout.in_features)
    launch: Any = _few_rows[(programs,)]
    with torch.cuda.device_of(x):
        launch(*given, **options)
