"""The gate and up linears of a GLU feed-forward (arXiv:2002.05202) with their adapters (arXiv:2106.09685), and the activation.

    gate' = gate + s · t · Bᵀ        up' likewise        y = a(gate') · up'

gate and up are the products with the frozen weights, t = x · Aᵀ that of x with both adapters side by side. To add the update to
a product is to read and to write it once more, 470 MB for 8192 × 14336 in 16 bits; here it is added where gate and up are read
anyway, for the activation and for its gradients. It is never stored, and rounded with y alone.

Saved for the backward: gate, up, t and B. What a gradient needs of x, A, B and the weights follows from dgate' and dup' as in
:mod:`weft.kernels.parallel_linears`, which is where they go.
"""

# Pyright knows Triton's static arguments and tuples only as what they are outside of a kernel.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import activations as A
from . import gated_activation as G
from . import parallel_linears
from .dispatch import compute_dtype, use_triton
from .operator import operator
from .quant_linear import autocast_dtype
from .rows import INTERPRETED
from .toolchain import tl, triton


class Tile(NamedTuple):
    """What a program does: ``strip`` tiles, one below the other, with the same rows of B, read ``stages`` ahead."""

    rows: int
    columns: int
    warps: int
    strip: int = 1
    stages: int = 1


FORWARD = BACKWARD = Tile(64, 64, 4, strip=16, stages=3)
"""The fastest of ``benchmarks.sweep --only gated`` for 8192 rows of 14336: 86 and 88 % of the copy bandwidth, for 56 and 62 with
a tile a program, whose reads wait for each other."""
LEAST_RANK = 16
"""Columns of the matrix units' smallest operand."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def reference(
    gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Sequence[float], activation: str
) -> Tensor:
    """The formula in plain differentiable torch; arguments as in :func:`gated_update`."""
    x, u = _sums(gate, up, t, b_gate, b_up, scales, compute_dtype(gate))
    return (A.ACTIVATION[activation](x) * u).to(gate.dtype)


def _sums(
    gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Sequence[float], wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """gate' and up' in ``wide``."""
    parts = t.split([b_gate.shape[1], b_up.shape[1]], -1)
    both = zip((gate, up), parts, (b_gate, b_up), scales, strict=True)
    x, u = (y.to(wide) + part.to(wide) @ b.to(t.dtype).to(wide).t() * scale for y, part, b, scale in both)
    return x, u


@triton.jit
def _rows_of(b, column, columns, RANK: tl.constexpr, K: tl.constexpr, NUMBER: tl.constexpr):
    """Bᵀ's columns of a tile. B is read as it lies: its rows are short, and side by side."""
    k = tl.arange(0, K)[None, :]
    read = tl.load(b + column[:, None] * RANK + k, mask=(column < columns)[:, None] & (k < RANK), other=0.0)
    return tl.trans(read.to(NUMBER))


@triton.jit
def _update(t, at, row, right, rows, stride, scale, RANK: tl.constexpr, K: tl.constexpr):
    """A tile of scale · t[:, at : at + RANK] · bᵀ in float32."""
    k = tl.arange(0, K)[None, :]
    left = tl.load(t + row * stride + at + k, mask=(row < rows) & (k < RANK), other=0.0)
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return scale * tl.dot(left, right)


@triton.jit
def _updated(
    gate, up, t, right_gate, right_up, row, first, rows, columns, stride, scale_gate, scale_up,
    RANK: tl.constexpr, RANK_UP: tl.constexpr, K: tl.constexpr, K_UP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of gate' and of up'."""
    # the large reads first: what the matrix units wait for in the meantime is in a cache
    x, u = (
        G.load(gate, columns, row, first, rows, columns, COLUMNS),
        G.load(up, columns, row, first, rows, columns, COLUMNS),
    )
    x += _update(t, 0, row, right_gate, rows, stride, scale_gate, RANK, K)
    u += _update(t, RANK, row, right_up, rows, stride, scale_up, RANK_UP, K_UP)
    return x, u


@triton.jit
def _operands(
    t, b_gate, b_up, columns, RANK: tl.constexpr, RANK_UP: tl.constexpr, K: tl.constexpr, K_UP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Rows of a program's first tile, its first column, and what all of its tiles multiply with."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, COLUMNS)
    row, first = program // across * (ROWS * STRIP) + tl.arange(0, ROWS)[:, None], program % across * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    right_gate = _rows_of(b_gate, column, columns, RANK, K, t.dtype.element_ty)
    right_up = _rows_of(b_up, column, columns, RANK_UP, K_UP, t.dtype.element_ty)
    return row, first, right_gate, right_up


@triton.jit(do_not_specialize=["rows"])
def _forward(
    gate, up, t, b_gate, b_up, out, rows, columns, stride, scale_gate, scale_up,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, RANK_UP: tl.constexpr, K: tl.constexpr, K_UP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, first, right_gate, right_up = _operands(t, b_gate, b_up, columns, RANK, RANK_UP, K, K_UP, ROWS, COLUMNS, STRIP)
    for _ in tl.range(0, STRIP, num_stages=STAGES):
        x, u = _updated(
            gate, up, t, right_gate, right_up, row, first, rows, columns, stride, scale_gate, scale_up,
            RANK, RANK_UP, K, K_UP, COLUMNS,
        )  # fmt: skip
        y, _ = A.curve(x, x, ACTIVATION)
        G.store(out, columns, row, first, rows, columns, y * u, COLUMNS)
        row += ROWS


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad, gate, up, t, b_gate, b_up, dgate, dup, rows, columns, stride, scale_gate, scale_up,
    ACTIVATION: tl.constexpr, RANK: tl.constexpr, RANK_UP: tl.constexpr, K: tl.constexpr, K_UP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, first, right_gate, right_up = _operands(t, b_gate, b_up, columns, RANK, RANK_UP, K, K_UP, ROWS, COLUMNS, STRIP)
    for _ in tl.range(0, STRIP, num_stages=STAGES):
        d = G.load(grad, columns, row, first, rows, columns, COLUMNS)
        x, u = _updated(
            gate, up, t, right_gate, right_up, row, first, rows, columns, stride, scale_gate, scale_up,
            RANK, RANK_UP, K, K_UP, COLUMNS,
        )  # fmt: skip
        y, dx = A.curve(x, d * u, ACTIVATION)
        G.store(dgate, columns, row, first, rows, columns, dx, COLUMNS)
        G.store(dup, columns, row, first, rows, columns, d * y, COLUMNS)
        row += ROWS


def _launch(
    kernel: Any, tile: Tile, tensors: list[Tensor], t: Tensor, b: list[Tensor], out: list[Tensor], scales: Any,
    activation: str,
) -> None:  # fmt: skip
    """Run ``kernel`` over matrices of one shape; ``tensors`` end with gate and up."""
    matrices = [x.contiguous() for x in tensors]
    columns = out[0].shape[-1]
    rows, flat = out[0].numel() // columns, G.as_rows(t)
    ranks = [each.shape[1] for each in b]
    padded = [max(triton.next_power_of_2(rank), LEAST_RANK) for rank in ranks]
    grid = (triton.cdiv(rows, tile.rows * tile.strip) * triton.cdiv(columns, tile.columns),)
    sizes = {"RANK": ranks[0], "RANK_UP": ranks[1], "K": padded[0], "K_UP": padded[1]}
    with torch.cuda.device_of(out[0]):
        kernel[grid](
            *matrices, flat, *(each.contiguous() for each in b), *out, rows, columns, flat.stride(0), *scales,
            ACTIVATION=activation, ROWS=tile.rows, COLUMNS=tile.columns, STRIP=tile.strip, STAGES=tile.stages,
            num_warps=tile.warps, **sizes,
        )  # fmt: skip


@operator("weft::gated_update")
def _gated_update(
    gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: list[float], activation: str
) -> Tensor:
    if not _on_triton(gate, t):
        return reference(gate, up, t, b_gate, b_up, scales, activation)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        _launch(_forward, FORWARD, [gate, up], t, [b_gate, b_up], [out], scales, activation)
    return out


@_gated_update.register_fake
def _(gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Any, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@operator("weft::gated_update_backward")
def _gated_update_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    t: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    scales: list[float],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """dgate' and dup'."""
    if not _on_triton(gate, t):
        x, u = _sums(gate, up, t, b_gate, b_up, scales, compute_dtype(gate))
        dup = A.ACTIVATION[activation](x).mul_(grad).to(gate.dtype)
        return A.CHAIN[activation](grad * u, x).to(gate.dtype), dup
    out = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (gate, up)]
    return _launch_backward(out, grad, gate, up, t, b_gate, b_up, scales, activation)


def _launch_backward(
    out: list[Tensor], grad: Tensor, gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Any,
    activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if grad.numel():
        _launch(_backward, BACKWARD, [grad, gate, up], t, [b_gate, b_up], out, scales, activation)
    return out[0], out[1]


@_gated_update_backward.register_overwriting("gate", "up")
def _(
    grad: Tensor, gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Any, activation: str
) -> tuple[Tensor, Tensor]:
    # a program reads each of its elements, of these two before it writes there, and no other program does
    if not _on_triton(gate, t) or not (gate.is_contiguous() and up.is_contiguous()):
        return _gated_update_backward(grad, gate, up, t, b_gate, b_up, scales, activation)
    return _launch_backward([gate, up], grad, gate, up, t, b_gate, b_up, scales, activation)


@_gated_update_backward.register_fake
def _(
    grad: Tensor, gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Any, activation: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _on_triton(gate: Tensor, t: Tensor) -> bool:
    return use_triton(gate) and gate.dtype in SIXTEEN_BITS and t.dtype == gate.dtype


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scales, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dgate, dup = _gated_update_backward(grad, *ctx.saved_tensors, ctx.scales, ctx.activation)
    return dgate, dup, None, None, None, None, None


_gated_update.register_autograd(_gradients, setup_context=_setup_context)


def gated_update(
    gate: Tensor, up: Tensor, t: Tensor, b_gate: Tensor, b_up: Tensor, scales: Sequence[float], activation: str
) -> Tensor:
    """a(gate + s · t · Bᵀ) · (up + s · t · Bᵀ); its gradients are those of gate and up alone, and not of t and B.

    Args:
        gate, up: (..., F), of one shape and floating-point dtype.
        t: (..., rank of gate + rank of up): x · Aᵀ of both adapters side by side. It and B are rounded to its dtype.
        b_gate, b_up: (F, rank), any floating-point dtype.
        scales: factor of each update.
        activation: one of :data:`weft.kernels.gated_activation.ACTIVATIONS`.

    Returns:
        (..., F), contiguous, in gate's dtype.

    Raises:
        ValueError: ``activation`` is unknown, or gate or up are not of floating point.
    """
    G.check(activation, gate, up)
    return _gated_update(gate, up, t, b_gate, b_up, list(scales), activation)


def serves(x: Tensor, adapter_dtype: torch.dtype | None) -> bool:
    """Whether updates wait for the activation: of adapters that compute in x's 16 bits, or autocast's, on a GPU."""
    cast = autocast_dtype(x)
    dtypes = {cast} if cast is not None else {x.dtype, adapter_dtype or x.dtype}
    return use_triton(x) and len(dtypes) == 1 and dtypes <= set(SIXTEEN_BITS)


def gated_linears(
    x: Tensor,
    weights: Sequence[list[Tensor]],
    layouts: Sequence[str],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    activation: str,
    *,
    adapter_dtype: torch.dtype | None = None,
) -> Tensor:
    """gated_activation(*parallel_linears(x, …), activation) of two linears with adapters, gate's first.

    Where :func:`serves` says no, it is just that.

    Args:
        x: (..., in_features); all others as in :func:`weft.kernels.parallel_linears.parallel_linears`, two of each.
        activation: one of :data:`weft.kernels.gated_activation.ACTIVATIONS`.

    Returns:
        (..., out_features), in the dtype of the linears' results.

    Raises:
        ValueError: as those two.
    """
    if not serves(x, adapter_dtype):
        both = parallel_linears.parallel_linears(
            x, weights, layouts, biases, a, b, scales, adapter_dtype=adapter_dtype
        )  # fmt: skip
        return G.gated_activation(*both, activation)
    gate, up, t = parallel_linears.without_updates(x, weights, layouts, biases, a, b, scales, adapter_dtype)
    return gated_update(gate, up, t, *b, scales, activation)
