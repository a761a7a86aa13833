"""What the linears with adapters share: the formulas of :mod:`weft.kernels.lora_linear`, for several that read one x.

    t = z · Aᵀ         y = x · Wᵀ + bias + scale · t · Bᵀ
    g = scale · dy · B        dA = gᵀ · z        dB = scale · dyᵀ · t        dz = g · A
    dx = sum over linears (dy · W + dz)          dW = dyᵀ · x                dbias = sum over rows (dy)

The adapters that read x itself share one product with [A₁; A₂; …] each way. Plain functions under the operators, below
autograd. Gradients are named by position: 0 is x's, 1 + 5i … 5 + 5i are those of linear i's weight, bias, a, b and z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant.layout import Layout
from . import fp8, split, widened
from .dequantize_4bit import dense
from .dispatch import shaped
from .quant_linear import product, x_gradient

CHUNK = 2**24
"""Elements of a product in another dtype than its sum that are computed before they are rounded into it."""


@dataclass(frozen=True)
class Linear:
    """One of the linears that read x; a and b are None without an adapter, ``own``: the adapter reads z, not x."""

    weight: list[Tensor]
    layout: Layout
    scale: float = 1.0
    own: bool = False
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    z: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of t that are this linear's."""
        return 0 if self.a is None else self.a.shape[0]


def matrix(x: Tensor) -> Tensor:
    """``x`` with its leading dimensions merged."""
    return x.reshape(-1, x.shape[-1])


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` that does not copy a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def readable(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as :func:`times` reads it for results in ``dtype``: cast once for several products, or not at all."""
    return wide if split.serves(wide, dtype) else wide.to(dtype)


def times(wide: Tensor, factor: Tensor, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """wide · factor, computed in ``dtype``, or its transpose; the factor is narrow."""
    if split.serves(wide, dtype):
        return split.product(wide, factor.to(dtype), turned=turned)
    left, right = wide.to(dtype), factor.to(dtype)
    return right.t() @ left.t() if turned else left @ right


def scaled_product(wide: Tensor, factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · wide · factor, as :func:`times` computes it."""
    if split.serves(wide, dtype):
        return split.product(wide, factor.to(dtype)).mul_(scale)
    left, right = wide.to(dtype), factor.to(dtype)
    return left.new_empty((left.shape[0], right.shape[1])).addmm_(left, right, beta=0, alpha=scale)


def add_product(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """y += scale · left · right in place, for a narrow left and right.

    Operands in another dtype than y's, if they cannot be split, need a temporary in theirs, which is kept small.
    """
    if left.dtype != y.dtype and split.serves(y, left.dtype):
        left, right = split.pair(left, right)
    if left.dtype == y.dtype:
        y.addmm_(left, right, alpha=scale)
        return
    rows = max(CHUNK // max(y.shape[1], 1), 1)
    for part, factor in zip(y.split(rows), left.split(rows), strict=True):
        part.add_(factor @ right, alpha=scale)


def forward(
    x: Tensor, linears: list[Linear], dtype: torch.dtype, updated: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """y of each linear, and t of all adapters side by side, computed in ``dtype``; None without an adapter.

    Unless ``updated``, whoever reads y and t adds scale · t · Bᵀ.
    """
    rows, lead = matrix(x), x.shape[:-1]
    shared = [linear.a for linear in linears if linear.a is not None and not linear.own]
    fused = times(rows, joined(shared, 0).t(), dtype) if shared else rows.new_empty((rows.shape[0], 0))
    ts, column = [], 0
    for linear in linears:
        if linear.a is not None and linear.z is not None:
            ts.append(times(matrix(linear.z), linear.a.t(), dtype))
        else:
            ts.append(fused[:, column : column + linear.rank])
            column += linear.rank
    ys = [shaped(y, *lead, y.shape[-1]) for y in _outputs(rows, linears, ts, dtype, updated)]
    adapted = [t for linear, t in zip(linears, ts, strict=True) if linear.a is not None]
    if not adapted:
        return ys, None
    t = fused if len(adapted) == len(shared) else joined(adapted, 1)
    return ys, shaped(t, *lead, t.shape[-1])


def _outputs(rows: Tensor, linears: list[Linear], ts: list[Tensor], dtype: torch.dtype, updated: bool) -> list[Tensor]:
    """y of each linear from its t; x is widened once for all linears that want it so, and quantized once."""
    layouts = [linear.layout for linear in linears if updated and linear.b is not None and not linear.layout.fp8]
    beside = widened.Widened(rows) if widened.serves(rows, layouts, dtype) else None
    quantized = fp8.quantize_rows(rows) if any(fp8.serves(rows, linear.layout) for linear in linears) else None
    ys = []
    for linear, t in zip(linears, ts, strict=True):
        if beside is not None and linear.b is not None and linear.layout.is_4bit and not linear.layout.fp8:
            ys.append(beside.product(linear.weight, linear.layout, linear.bias, t, linear.b, linear.scale))
            continue
        ys.append(product(rows, linear.weight, linear.layout, linear.bias, quantized))
        if updated and linear.b is not None:
            add_product(ys[-1], t, linear.b.t().to(t.dtype), linear.scale)
    return ys


def backward(
    dys: list[Tensor], x: Tensor | None, t: Tensor | None, linears: list[Linear], dtype: torch.dtype, needs: list[bool],
    over: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients that ``needs`` names: of x, then each linear's weight, bias, a, b, and z, the last in ``dtype``.

    dx is written to ``over`` if that is given, and can hold it; it may be x, which is read before.
    """
    rows, lead = [matrix(dy) for dy in dys], dys[0].shape[:-1]
    grads: dict[int, Tensor] = {}
    gs: dict[int, Tensor] = {}
    column = 0
    for i, (linear, dy) in enumerate(zip(linears, rows, strict=True)):
        weight, bias, a, b, z = range(1 + 5 * i, 6 + 5 * i)
        if needs[weight] and x is not None:
            grads[weight] = dy.t() @ matrix(x) if linear.layout.kind == "rows" else matrix(x).t() @ dy
        if needs[bias]:
            grads[bias] = dy.sum(0)
        if linear.a is None or linear.b is None:
            continue
        wide = readable(dy, dtype)
        if needs[a] or needs[z] or (needs[0] and not linear.own):
            gs[i] = scaled_product(wide, linear.b, linear.scale, dtype)
        if needs[b] and t is not None:
            part = matrix(t)[:, column : column + linear.rank]
            grads[b] = scaled_product(wide.t(), part, linear.scale, dtype).to(linear.b.dtype)
        if needs[z]:
            grads[z] = shaped(gs[i] @ linear.a.to(dtype), *lead, linear.layout.in_features)
        column += linear.rank
    grads |= _a_gradients(x, linears, gs, dtype, needs)
    if needs[0]:
        grads[0] = shaped(_x_gradient(rows, linears, gs, dtype, over), *lead, linears[0].layout.in_features)
    return [grads[i] for i, need in enumerate(needs) if need]


def _x_gradient(
    rows: list[Tensor], linears: list[Linear], gs: dict[int, Tensor], dtype: torch.dtype, over: Tensor | None = None
) -> Tensor:
    """dx of all linears, summed in one buffer; one dequantized weight lives at a time."""
    dx = x_gradient(rows[0], linears[0].weight, linears[0].layout, over)
    for dy, linear in zip(rows[1:], linears[1:], strict=True):
        if fp8.serves(dy, linear.layout):
            dx.add_(x_gradient(dy, linear.weight, linear.layout))
        else:
            dx.addmm_(dy, dense(linear.weight, linear.layout, dy.dtype))
    shared = [(gs[i], linear.a) for i, linear in enumerate(linears) if linear.a is not None and not linear.own]
    if shared:
        add_product(dx, joined([g for g, _ in shared], 1), joined([a for _, a in shared], 0).to(dtype))
    return dx


def _a_gradients(
    x: Tensor | None, linears: list[Linear], gs: dict[int, Tensor], dtype: torch.dtype, needs: list[bool]
) -> dict[int, Tensor]:
    """dA of each adapter that wants one: one product for those that read x, so that x is read once."""
    wanted = [(3 + 5 * i, linear.a, linear, gs[i]) for i, linear in enumerate(linears) if needs[3 + 5 * i]]
    own = [
        (at, a, times(matrix(linear.z).t(), g, dtype, turned=True))
        for at, a, linear, g in wanted
        if linear.z is not None
    ]
    shared = [(at, a, g) for at, a, linear, g in wanted if not linear.own]
    if shared and x is not None:
        fused = times(matrix(x).t(), joined([g for _, _, g in shared], 1), dtype, turned=True)
        parts = fused.split([g.shape[1] for _, _, g in shared])
        own += [
            (at, a, part.clone() if len(parts) > 1 else part) for (at, a, _), part in zip(shared, parts, strict=True)
        ]
    return {at: grad.to(a.dtype) for at, a, grad in own if a is not None}


def gradient_sizes(
    dy: Tensor, linears: list[Linear], dtype: torch.dtype, needs: list[bool]
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each gradient that :func:`backward` returns, for the fakes."""
    wide = (*dy.shape[:-1], linears[0].layout.in_features)
    sizes: list[Any] = [(wide, dy.dtype)]
    for linear in linears:
        a, b = linear.a, linear.b
        sizes += [(linear.weight[0].shape, dy.dtype), ((linear.layout.out_features,), dy.dtype)]
        sizes += [(p.shape, p.dtype) if p is not None else None for p in (a, b)] + [(wide, dtype)]
    return [size for size, need in zip(sizes, needs, strict=True) if need]
