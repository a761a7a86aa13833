"""Products of two matrices that are rounded to 8 bits, each row with a scale of its own.

    y = x · Wᵀ  ≈  s_x · (q_x · q_Wᵀ) · s_W        q = e4m3(row / s)        s = 2 ^ ceil(log2(amax(row) / 448))

e4m3 (OCP 8-bit floating point, revision 1.0; arXiv:2209.05433) has 3 bits of mantissa, 448 for its largest number and
2⁻⁹ for its smallest. A scale is the least power of two under which a row fits: dividing by it and multiplying with it is
exact, and all that is lost is one rounding of each element. That rounding is then the same under every scale, but for what
is subnormal: the weight that the backward sees is the one that the forward saw, though their scales go along other
dimensions. With amax / 448 it would be another, of the same error; only a row's largest element would be exact.

    |x − s q| ≤ 2⁻⁴ |x| + 2⁻¹⁰ s        (s < amax / 224; never below 2⁻¹²⁶)

From which :func:`error_bound` follows. A row that holds NaN or infinity has the scale NaN and q = 0: every product with
it is NaN, where other products would be NaN or infinite. A row of zeros has the scale 2⁻¹²⁶.

Scales go along what remains, not along what is summed: the rows of x and W for x · Wᵀ; for dy · W the rows of dy and the
columns of W, which are therefore quantized apart, and turned, for the matrix units want both sides along the sum.

Nothing is kept unless the layout asks for it (:mod:`.fp8_kept`): a weight stays as it is stored and is quantized for each
product. Read and written for each bfloat16
weight are 2 + 1 bytes by rows, 2 + 2 + 1 by columns (the amax first), and a 4-bit weight is dequantized before. The linears
of a Llama-3-8B block, 218 M weights, take 0.65 GB of traffic forward and 1.09 GB backward; of memory, for a moment, one
byte for each weight of one linear. Up to :data:`FEW_ROWS` rows, where a product is bound by reading the weight, it is read
as it is stored.
"""

# Pyright knows Triton's static loops only as what they are outside of a kernel.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..quant.layout import Layout
from .dispatch import use_triton
from .rows import INTERPRETED, TILE, blocks, inside
from .toolchain import tl, triton

E4M3 = torch.float8_e4m3fn
LARGEST, SMALLEST_SCALE = 448.0, 2.0**-126
MULTIPLE = 16
"""Of this many elements are both sizes of a weight: ``torch._scaled_mm`` takes no others."""
FEW_ROWS = 16
"""Up to here a product reads the weight as it is stored."""
FAST_ACCUMULATION = True
"""Whether whole sums stay in the matrix units, which on Hopper keep some 14 bits of them (DeepSeek-V3, arXiv:2412.19437, 3.3.2);
else parts are added up in float32. Products of normal numbers on an H200 are off by 3.773 % instead of 3.771 % over 4096 terms,
by 3.819 instead of 3.809 over 14336: rounding to e4m3 hides it; and take 630 µs instead of 695 (8192 × 4096 → 14336), 646 instead
of 686 (8192 × 14336 → 4096)."""
STEP, LOST = 32, 2.0**-13
"""Terms that a matrix unit adds at once, and what may be lost then of the sum of magnitudes so far."""
PER_THREAD = 32
ROWS, COLS, TILES, WARPS = 64, 64, 8, 4
"""Tile of the kernels on columns, how many of them one program looks through for the amax, and their warps."""

ROUNDING, UNDERFLOW = 2.0**-4, 2.0**-10
"""What rounding to e4m3 changes: relative to a number, and relative to the scale where numbers are subnormal."""
OTHERWISE = 2.0**-6
"""For all else that is rounded, of |x| · |W|ᵀ: operands, dequantized weights and results to bfloat16, sums in float32."""

Quantized = tuple[Tensor, Tensor]
"""Rows in e4m3, (rows, columns), contiguous, and the float32 scale of each, (rows,)."""


@cache
def missing(device: torch.device) -> str:
    """Why ``device`` multiplies no FP8 matrices; "" where it does, and for a CPU, which computes what they would be."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"FP8 products run on NVIDIA's GPUs, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    own = "sm_{}{}".format(*capability)
    return "" if capability >= (8, 9) else f"FP8 products need a GPU of sm_89 or later, and this is {own}"


def sizes_problem(layout: Layout) -> str:
    """Why a weight of these sizes is in no FP8 product; "" where it may be."""
    if layout.in_features % MULTIPLE == 0 and layout.out_features % MULTIPLE == 0:
        return ""
    return f"FP8 products take sizes divisible by {MULTIPLE}, and the weight is {layout.out_features} x {layout.in_features}"


def serves(rows: Tensor, layout: Layout) -> bool:
    """Whether a product of the matrix ``rows`` with a weight is computed in FP8: as its layout says, but for few rows, and
    for float64, in which the exact product is asked for.

    Raises:
        ValueError: the layout says so, and the weight's sizes are not divisible by :data:`MULTIPLE`.
    """
    if not layout.fp8:
        return False
    problem = sizes_problem(layout)
    if problem:
        raise ValueError(problem)
    return rows.dtype != torch.float64 and rows.shape[0] > FEW_ROWS


def quantize_reference(matrix: Tensor) -> Quantized:
    """:func:`quantize_rows` in plain torch."""
    wide = matrix.float()
    amax = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    mantissa, exponent = torch.frexp(amax)
    # In [0.5, 1) times a power of two: 448 is 0.875 · 2⁹.
    power = torch.where(amax > 0, exponent - torch.where(mantissa <= LARGEST / 512, 9, 8), -126)
    # A power of two is put together from its bits, which no GPU's exp2 promises to hit.
    scale = ((power.clamp(-126, 127) + 127) << 23).to(torch.int32).view(torch.float32)
    scale = torch.where(amax.isfinite(), scale, torch.nan)
    scaled = torch.where(amax.isfinite()[:, None], wide / scale[:, None], 0.0)
    return scaled.to(E4M3, memory_format=torch.contiguous_format), scale


@triton.jit
def _magnitude(value):
    """|value| as an integer in the same order, NaN above infinity: Triton's maximum of floats would lose it."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest):
    """The scale of rows whose largest magnitude has these bits, and its reciprocal: 0 where that is not finite."""
    # 448 has the mantissa 0x600000: what is larger carries into the exponent.
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    finite = largest < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, tl.where(finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(value, reciprocal):
    """The bits of value · reciprocal in e4m3, to nearest even; 0 where the reciprocal is."""
    scaled = tl.where(reciprocal > 0, value.to(tl.float32), 0.0) * reciprocal
    if INTERPRETED:  # whose cast is not to nearest
        bits = scaled.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # The last bit of a float32 from 2¹⁴ to 2¹⁵ is 2⁻⁹, as that of a subnormal e4m3.
        tiny = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = (tl.where(size < 0x3C800000, tiny, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return code


@triton.jit(do_not_specialize=["rows"])
def _quantize_rows(
    x, out, scales, stride, rows, cols, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    # A row that fits is one block whose loops have one step and vanish: it is read once and stays in registers.
    span = COLS if WHOLE else cols
    largest = tl.zeros((ROWS,), tl.int32)
    value = tl.zeros((ROWS, COLS), x.dtype.element_ty)
    x += row.to(tl.int64)[:, None] * stride
    out += row.to(tl.int64)[:, None] * cols
    for start in range(0, span, COLS):
        at = start + col
        value = tl.load(x + at[None, :], mask=inside(row, rows, at, cols), other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitude(value), 1))
    scale, reciprocal = _scale(largest)
    tl.store(scales + row, scale, mask=row < rows)
    for start in range(0, span, COLS):
        at = start + col
        there = inside(row, rows, at, cols)
        if not WHOLE:
            value = tl.load(x + at[None, :], mask=there, other=0.0)
        tl.store(out + at[None, :], _e4m3(value, reciprocal[:, None]), mask=there)


@triton.jit
def _largest_of_columns(
    x, largest, stride, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * (ROWS * TILES)
    found = tl.zeros((COLS,), tl.int32)
    for tile in range(TILES):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        there = x + row.to(tl.int64)[:, None] * stride + col[None, :]
        value = tl.load(there, mask=inside(row, rows, col, cols), other=0.0)
        found = tl.maximum(found, tl.max(_magnitude(value), 0))
    tl.atomic_max(largest + col, found, mask=col < cols, sem="relaxed")


@triton.jit
def _quantize_columns(x, largest, out, scales, stride, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of x, which is read along its rows and written along its columns."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    scale, reciprocal = _scale(tl.load(largest + col, mask=col < cols, other=0))
    if tl.program_id(1) == 0:
        tl.store(scales + col, scale, mask=col < cols)
    there = x + row.to(tl.int64)[:, None] * stride + col[None, :]
    value = tl.load(there, mask=inside(row, rows, col, cols), other=0.0)
    turned = tl.trans(_e4m3(value, reciprocal[None, :]))
    tl.store(out + col.to(tl.int64)[:, None] * rows + row[None, :], turned, mask=inside(col, cols, row, rows))


def quantize_rows(matrix: Tensor) -> Quantized:
    """The rows of a matrix in e4m3, and the scale of each; see the formula above.

    Args:
        matrix: (rows, columns) in float32, bfloat16 or float16, any strides. If they are those of a transpose, each tile
            is turned as it is rounded, and nothing is copied.

    Returns:
        ``q``, (rows, columns) in float8_e4m3fn, contiguous, and ``scale``, (rows,) in float32.
    """
    if not use_triton(matrix) or (matrix.is_cuda and missing(matrix.device)):
        return quantize_reference(matrix)
    (rows, cols), device = matrix.shape, matrix.device
    out, scales = torch.empty((rows, cols), dtype=E4M3, device=device), torch.empty(rows, device=device)
    if not matrix.numel():
        return out, scales.fill_(SMALLEST_SCALE)
    along = cols == 1 or matrix.stride(1) == 1
    matrix = matrix if along or matrix.stride(0) == 1 else matrix.contiguous()
    with torch.cuda.device_of(matrix):
        if along or matrix.stride(1) == 1:
            count, options = blocks(matrix, PER_THREAD, TILE)
            kernel: Any = _quantize_rows
            kernel[(count,)](matrix, out.view(torch.uint8), scales, matrix.stride(0), **options)
        else:
            _turned(matrix.t(), out.view(torch.uint8), scales)
    return out, scales


def _turned(x: Tensor, out: Tensor, scales: Tensor) -> None:
    """Quantizes the columns of ``x``, (m, n) with rows along memory, as the rows of ``out``, (n, m)."""
    largest = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    across, down = triton.cdiv(x.shape[1], COLS), triton.cdiv(x.shape[0], ROWS)
    first: Any = _largest_of_columns
    second: Any = _quantize_columns
    sizes, tile = (x.stride(0), *x.shape), {"ROWS": ROWS, "COLS": COLS, "num_warps": WARPS}
    first[(across, triton.cdiv(down, TILES))](x, largest, *sizes, TILES=TILES, **tile)
    second[(across, down)](x, largest, out, scales, *sizes, **tile)


def multiply(
    left: Quantized, right: Quantized, dtype: torch.dtype, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """left · rightᵀ + bias, contiguous, from (m, k) and (n, k); k and n are divisible by :data:`MULTIPLE`. It is written to
    ``out``, (m, n) and contiguous, if that is of the dtype that the product has.

    The matrix units round the result to bfloat16, whatever ``dtype`` it is then given in. On a CPU, and on GPUs without
    FP8, it is computed in float32 and rounded once.
    """
    (x, x_scale), (w, w_scale) = left, right
    if x.is_cuda and x.numel() and w.numel() and not missing(x.device):
        scales, options = (x_scale[:, None], w_scale[None, :]), {"use_fast_accum": FAST_ACCUMULATION}
        options |= {"out": out} if out is not None and out.dtype == torch.bfloat16 else {}
        y = torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16, **options)  # pyright: ignore
    else:
        y = (x.float() @ w.float().t()).mul_(w_scale).mul_(x_scale[:, None])
    y = y.to(dtype)
    return y if bias is None else y.add_(bias)


def error_bound(left: Tensor, right: Tensor) -> Tensor:
    """How far each element of left · rightᵀ may be off in FP8, (m, n) in float64, for (m, k) and (n, k).

        (2u + u² + r + l k) |x| |W|ᵀ + (1 + u) v (s_x Σ|W| + s_W Σ|x|) + k v² s_x s_W

    with u = :data:`ROUNDING`, v = :data:`UNDERFLOW`, r = :data:`OTHERWISE`, l = :data:`LOST` / :data:`STEP`: what
    (|x| + |δx|)(|W| + |δW|) exceeds |x| |W| by, where |δ| ≤ u |·| + v s; r for what else is rounded, l k for what matrix
    units lose.
    """
    x, w = left.double().abs(), right.double().abs()
    s, t = (quantize_reference(m)[1].double() for m in (left, right))
    u, v = ROUNDING, UNDERFLOW
    tiny = s[:, None] * w.sum(1) + t * x.sum(1)[:, None]
    lost = FAST_ACCUMULATION * LOST / STEP * x.shape[1]
    return (2 * u + u**2 + OTHERWISE + lost) * (x @ w.t()) + (1 + u) * v * tiny + x.shape[1] * v**2 * s[:, None] * t
