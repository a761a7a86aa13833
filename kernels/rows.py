"""How the norms see a tensor: independent rows of numbers that lie anywhere in memory.

The leading dimensions are put in the memory order of the first tensor and merged where every tensor lets them, so that
a contiguous tensor, and a (B, H, T, D) view of a (B, T, H, D) one, become plain matrices. What cannot be merged costs
an integer division a row. Three leading dimensions are the most a kernel takes; :func:`flat` ensures it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .toolchain import tl, triton

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)
Strides = tuple[int, int, int, int]

LONGEST = 16384
"""Longest row, in elements, that a program holds in registers at once; it walks over longer ones block by block."""
TILE, TALL = 4096, 8192
"""Elements that a program takes at a time if its rows are shorter than this; and where it would wait for its own sums: a
forward, whose rows are then two that hide each other's, and a backward with sums over all rows, which has fewer of them."""
PER_THREAD_BACKWARD, RESIDENT_WARPS = 32, 8
"""Elements that a thread of a backward kernel takes, and warps of it for which a multiprocessor has registers."""
STAGES, SHARED_BYTES = 3, 96 * 1024
"""How many blocks a backward has under way, this one included, and the shared memory that the others may take."""
TOTAL_ROWS, TOTAL_COLS, TOTAL_WARPS = 512, 16, 8
"""Tile in which partial sums are added up: all of them at once, so that the reads do not wait for each other."""


def blocks(x: Tensor, per_thread: int, tile: int) -> tuple[int, dict[str, Any]]:
    """Number of blocks that the rows of ``x`` make, and the launch options that all kernels on rows share.

    A block is one row, or several short ones of ``tile`` elements, or a part of a row that is longer than :data:`LONGEST`;
    with ``per_thread`` elements a thread. Row numbers are int32, whose division is cheap, unless there are too many.
    """
    rows, cols = math.prod(x.shape[:-1]), x.shape[-1]
    width = min(triton.next_power_of_2(cols), LONGEST)
    height = min(triton.next_power_of_2(rows), max(tile // width, 1))
    warps = min(max(width * height // (32 * per_thread), 1), 16)
    index = tl.int32 if rows < 2**30 else tl.int64
    options = {"rows": rows, "cols": cols, "ROWS": height, "COLS": width, "WHOLE": cols <= width, "INDEX": index}
    return triton.cdiv(rows, height), {**options, "num_warps": warps}  # pyright: ignore


def kernel_runs(x: Tensor) -> bool:
    """Whether the norm of ``x`` launches its kernel, which computes in float32."""
    return dispatch.use_triton(x) and x.dtype != torch.float64


def check(x: Tensor, *vectors: Tensor | None) -> None:
    """Raises ValueError unless ``x`` is (..., D) and each vector (D,)."""
    if x.dim() == 0 or any(v is not None and v.shape != x.shape[-1:] for v in vectors):
        shapes = [None if v is None else tuple(v.shape) for v in vectors]
        raise ValueError(f"a norm of x {tuple(x.shape)} over its last dimension cannot take vectors of shapes {shapes}")


def flat(x: Tensor) -> Tensor:
    """``x`` with its outermost dimensions merged until three are left before the last: a view where possible."""
    return x if x.dim() <= 4 else x.flatten(0, -4)


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """The norm of ``flat(x)`` in the shape of ``x``."""
    return y if x.dim() <= 4 else dispatch.shaped(y, *x.shape)


def layout(lead: Tensor, *others: Tensor) -> tuple[tuple[int, int], tuple[Strides, ...]]:
    """The last two of three joint leading sizes in the memory order of ``lead``, and the strides of each tensor.

    Triton folds a size of 1, so the ones of a matrix come last.

    Args:
        lead: (..., cols), at most three leading dimensions.
        others: tensors with the same leading dimensions; any strides.
    """
    tensors = (lead, *others)
    sizes, strides = [1], [(0,) * len(tensors)]
    for dim in sorted(range(lead.dim() - 1), key=lead.stride, reverse=True):
        size, steps = lead.shape[dim], tuple(t.stride(dim) for t in tensors)
        if sizes[-1] == 1 or all(outer == size * inner for outer, inner in zip(strides[-1], steps, strict=True)):
            sizes[-1], strides[-1] = sizes[-1] * size, steps
        elif size != 1:
            sizes.append(size)
            strides.append(steps)
    sizes += [1] * (3 - len(sizes))
    strides += [(0,) * len(tensors)] * (3 - len(strides))
    columns = [t.stride(-1) for t in tensors]
    each = tuple((a, b, c, d) for a, b, c, d in zip(*strides, columns, strict=True))
    return (sizes[1], sizes[2]), each


def backward_blocks(x: Tensor, sums: bool, read: tuple[Tensor | None, ...]) -> tuple[int, dict[str, Any]]:
    """As :func:`blocks`: programs of a backward, and its launch options with STAGES, how many blocks one has under way.

    Without ``sums`` over all rows, one a block. With them only as many as run at once, since each leaves a partial sum:
    each takes many blocks, and fetches those of the tensors ``read`` ahead, as far as shared memory allows.
    """
    if not sums:
        count, options = blocks(x, PER_THREAD_BACKWARD, TILE)
        return count, options | {"STAGES": 1}
    ahead = sum(t.element_size() for t in read if t is not None) * (STAGES - 1)
    count, options = blocks(x, PER_THREAD_BACKWARD, TALL if TALL * ahead <= SHARED_BYTES else TILE)
    fits = options["WHOLE"] and options["ROWS"] * options["COLS"] * ahead <= SHARED_BYTES
    count = min(count, units(x.device) * max(RESIDENT_WARPS // options["num_warps"], 1))
    return count, options | {"STAGES": STAGES if fits else 1}


@cache
def units(device: torch.device) -> int:
    """Multiprocessors of ``device``; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    kernel: Any,
    count: int,
    tensors: tuple[Tensor | None, ...],
    vectors: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> None:
    """Calls ``kernel(*tensors, *vectors, sizes, *strides, **options)`` on ``count`` programs of the tensors' device.

    Sizes and strides are those of :func:`layout` of ``tensors``. What is None the kernel will not touch.
    """
    lead = next(t for t in tensors if t is not None)
    there = [lead if t is None else t for t in tensors]
    dense = [lead if v is None else v.contiguous() for v in vectors]
    sizes, strides = layout(*there)
    with torch.cuda.device_of(lead):
        kernel[(count,)](*there, *dense, sizes, *strides, **options)


def partial_sums(x: Tensor, count: int, vectors: int = 1) -> Tensor:
    """(vectors, count, cols) in float32 for sums over rows, one for each program; zero if it adds them up there."""
    make = torch.empty if x.shape[-1] <= LONGEST else torch.zeros
    return make((vectors, count, x.shape[-1]), dtype=torch.float32, device=x.device)


def totals(partial: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """The sums of up to two :func:`partial_sums`, each in a dtype of its own, in one launch."""
    _, count, cols = partial.shape
    sums = [partial.new_empty(cols, dtype=dtype) for dtype in dtypes]
    height = min(triton.next_power_of_2(count), TOTAL_ROWS)
    kernel: Any = _totals
    with torch.cuda.device_of(partial):
        kernel[(triton.cdiv(cols, TOTAL_COLS), len(sums))](
            partial, sums[0], sums[-1], count, cols, ROWS=height, COLS=TOTAL_COLS, num_warps=TOTAL_WARPS
        )
    return sums


@triton.jit
def _totals(partial, first, second, count, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    partial += tl.program_id(1).to(tl.int64) * count * cols
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        there = partial + row[:, None].to(tl.int64) * cols + col[None, :]
        sums += tl.load(there, mask=inside(row, count, col, cols), other=0.0)
    total = tl.sum(sums, 0)
    if tl.program_id(1) == 0:
        tl.store(first + col, rounded(total, first.dtype.element_ty), mask=col < cols)
    else:
        tl.store(second + col, rounded(total, second.dtype.element_ty), mask=col < cols)


@triton.jit
def row_start(row, sizes, strides):
    """Offset of each row, in elements, for sizes and strides from :func:`layout`."""
    rest = row // sizes[1]
    outer = (rest // sizes[0]).to(tl.int64) * strides[0]
    return outer + (rest % sizes[0]).to(tl.int64) * strides[1] + (row % sizes[1]).to(tl.int64) * strides[2]


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """``value`` in ``DTYPE``, to nearest even: also in the interpreter, which truncates a float32 to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def inside(row, rows, col, cols):
    """Which elements of a block exist."""
    return (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def load(start, strides, row, rows, col, cols):
    """The block at columns ``col`` of the rows that begin at ``start`` (rows, 1), in float32; 0 outside the matrix."""
    there = start + col[None, :].to(tl.int64) * strides[3]
    return tl.load(there, mask=inside(row, rows, col, cols), other=0.0).to(tl.float32)


@triton.jit
def store(start, strides, row, rows, col, cols, value):
    """Writes what :func:`load` reads, rounded to the dtype behind ``start``."""
    there = start + col[None, :].to(tl.int64) * strides[3]
    tl.store(there, rounded(value, start.dtype.element_ty), mask=inside(row, rows, col, cols))


@triton.jit
def load_vector(pointer, col, cols, offset, PRESENT: tl.constexpr):
    """``offset + vector`` as (1, cols) in float32, or 1 where there is no vector."""
    if PRESENT:
        vector = tl.load(pointer + col, mask=col < cols, other=0.0).to(tl.float32)[None, :] + offset
    else:
        vector = tl.full((1, 1), 1.0, tl.float32)
    return vector


@triton.jit
def accumulate(pointer, col, cols, value):
    """Adds ``value`` to a program's own float32 vector."""
    tl.store(pointer + col, tl.load(pointer + col, mask=col < cols) + value, mask=col < cols)
    # The next load may give an element to another thread.
    tl.debug_barrier()
