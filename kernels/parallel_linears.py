"""Several linears that read one x (q, k and v; gate and up), each over a dense or a 4-bit weight, with or without LoRA.

    yᵢ = x · Wᵢᵀ + biasᵢ + scaleᵢ · (zᵢ · Aᵢᵀ) · Bᵢᵀ          zᵢ: x, or x after the adapter's own dropout

    dx = sum over i (dyᵢ · Wᵢ + dzᵢ)          the others as in :mod:`weft.kernels.lora_linear`

The adapters that read x share one product, t = x · [A₁; A₂; …]ᵀ, and one for dx and one for dA; dx is summed in one
buffer. Saved for the backward: x once, t, the zᵢ, the Aᵢ, Bᵢ and stored weights, each only if a gradient needs it.

A list that mixes tensors and None loses its gradients in ``register_autograd`` (torch 2.11 to 2.13): the operator takes
lists of the tensors that exist, and a plan that says whose they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..quant.layout import Layout
from . import lora_linear
from .linears import Linear, backward, forward, gradient_sizes
from .operator import operator
from .quant_linear import autocast_dtype, cast_dense, no_autocast


def reference(
    x: Tensor,
    weights: Sequence[list[Tensor]],
    layouts: Sequence[str],
    biases: Sequence[Tensor | None] | None = None,
    a: Sequence[Tensor | None] | None = None,
    b: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    *,
    x_adapters: Sequence[Tensor | None] | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The formula in plain differentiable torch; arguments as in :func:`parallel_linears`."""
    none = [None] * len(weights)
    each = zip(weights, layouts, biases or none, a or none, b or none, scales or [1.0] * len(weights), strict=True)
    return tuple(
        lora_linear.reference(x, *operands, x_adapter=z, adapter_dtype=adapter_dtype)
        for operands, z in zip(each, x_adapters or none, strict=True)
    )


@dataclass(frozen=True)
class Slot:
    """Which tensors of the flat list are one linear's: its weight's, then bias, A, B and z where they exist."""

    layout: Layout
    tensors: int
    bias: bool
    adapter: bool
    own: bool
    z: bool

    def encode(self) -> str:
        """For example ``nf4:4096:4096:64:256/5/0100``."""
        return f"{self.layout.encode()}/{self.tensors}/{self.bias:d}{self.adapter:d}{self.own:d}{self.z:d}"


@lru_cache(maxsize=4096)
def encode(slots: tuple[Slot, ...]) -> str:
    """The plan of an operator, from one slot a linear."""
    return ",".join(slot.encode() for slot in slots)


@lru_cache(maxsize=4096)
def decode(plan: str) -> tuple[Slot, ...]:
    """Inverse of :func:`encode`."""
    slots = []
    for text in plan.split(","):
        layout, tensors, flags = text.split("/")
        slots.append(Slot(Layout.decode(layout), int(tensors), *(flag == "1" for flag in flags)))
    return tuple(slots)


def unflatten(plan: str, items: Sequence[Any], absent: Any) -> Iterator[tuple[Slot, list[Any], Any, Any, Any, Any]]:
    """Each slot with its weight's items, and those of bias, A, B and z, or ``absent``."""
    each = iter(items)
    for slot in decode(plan):
        weight = [next(each) for _ in range(slot.tensors)]
        yield (
            slot,
            weight,
            *(next(each) if has else absent for has in (slot.bias, slot.adapter, slot.adapter, slot.z)),
        )


def linears(plan: str, tensors: list[Tensor], scales: list[float]) -> list[Linear]:
    """The operands behind a flat list."""
    parts = zip(unflatten(plan, tensors, None), scales, strict=True)
    return [Linear(weight, slot.layout, scale, slot.own, *rest) for (slot, weight, *rest), scale in parts]


@operator("weft::parallel_linears")
def _parallel_linears(
    x: Tensor, tensors: list[Tensor], plan: str, scales: list[float], dtype: torch.dtype, updated: bool
) -> list[Tensor]:
    """Every y, and last t for the backward if there is an adapter.

    Unless ``updated``, y is without what the adapters add: who reads it adds that, and gives the gradients of the sums.
    """
    with no_autocast(x):
        ys, t = forward(x, linears(plan, tensors, scales), dtype, updated)
    return ys if t is None else [*ys, t]


@_parallel_linears.register_fake
def _(
    x: Tensor, tensors: list[Tensor], plan: str, scales: list[float], dtype: torch.dtype, updated: bool
) -> list[Tensor]:
    parts, lead = linears(plan, tensors, scales), x.shape[:-1]
    ys = [x.new_empty((*lead, part.layout.out_features)) for part in parts]
    if any(part.a is not None for part in parts):
        ys.append(x.new_empty((*lead, sum(part.rank for part in parts)), dtype=dtype))
    return ys


@operator("weft::parallel_linears_backward")
def _parallel_linears_backward(
    dys: list[Tensor],
    x: Tensor | None,
    t: Tensor | None,
    tensors: list[Tensor],
    plan: str,
    scales: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` names, in the order of :mod:`weft.kernels.linears`."""
    with no_autocast(dys[0]):
        return backward(dys, x, t, linears(plan, tensors, scales), dtype, needs)


@_parallel_linears_backward.register_fake
def _(
    dys: list[Tensor],
    x: Tensor | None,
    t: Tensor | None,
    tensors: list[Tensor],
    plan: str,
    scales: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    sizes = gradient_sizes(dys[0], linears(plan, tensors, scales), dtype, needs)
    return [dys[0].new_empty(size, dtype=kind) for size, kind in sizes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, ctx.plan, ctx.scales, ctx.dtype, _ = inputs
    ctx.needs, ctx.z_dtypes = [x.requires_grad], []
    kept, slots, fixed, save_x, save_t = [], [], [], False, False
    for y, (slot, weight, bias, a, b, z) in zip(output, unflatten(ctx.plan, tensors, None), strict=False):
        needs = [p is not None and p.requires_grad for p in (weight[0], bias, a, b, z)]
        ctx.needs += needs
        fixed += [] if x.requires_grad or any(needs) else [y]
        ctx.z_dtypes.append(None if z is None else z.dtype)
        save_x |= needs[0] or (needs[2] and not slot.own)
        save_t |= needs[3]
        save_z = slot.own and needs[2]
        kept += [*weight, *((a, b) if slot.adapter else ()), *((z,) if save_z else ())]
        slots.append(Slot(slot.layout, slot.tensors, False, slot.adapter, slot.own, save_z))
    ctx.saved_plan = encode(tuple(slots))
    ctx.save_for_backward(x if save_x else None, output[-1] if save_t else None, *kept)
    ctx.mark_non_differentiable(*fixed, *output[len(slots) :])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, t, *tensors = ctx.saved_tensors
    slots = decode(ctx.plan)
    given = next(dy for dy in grads if dy is not None)
    outs = [(*given.shape[:-1], slot.layout.out_features) for slot in slots]
    dys = [given.new_zeros(out) if dy is None else dy for dy, out in zip(grads, outs, strict=False)]
    found = iter(_parallel_linears_backward(dys, x, t, tensors, ctx.saved_plan, ctx.scales, ctx.dtype, ctx.needs))
    dx, *rest = (next(found) if need else None for need in ctx.needs)
    flat: list[Tensor | None] = []
    for i, (slot, kind) in enumerate(zip(slots, ctx.z_dtypes, strict=True)):
        dw, dbias, da, db, dz = rest[5 * i : 5 * i + 5]
        flat += [dw, *[None] * (slot.tensors - 1), *([dbias] if slot.bias else ()), *([da, db] if slot.adapter else ())]
        flat += [None if dz is None else dz.to(kind)] if slot.z else []
    return dx, flat, None, None, None, None


_parallel_linears.register_autograd(_backward, setup_context=_setup_context)


def parallel_linears(
    x: Tensor,
    weights: Sequence[list[Tensor]],
    layouts: Sequence[str],
    biases: Sequence[Tensor | None] | None = None,
    a: Sequence[Tensor | None] | None = None,
    b: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    *,
    x_adapters: Sequence[Tensor | None] | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Several linears of one x, each as :func:`weft.kernels.lora_linear.lora_linear` computes it.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64, any strides.
        weights: one list of tensors a linear; see :mod:`weft.quant.layout`.
        layouts: the encoded :class:`~weft.quant.layout.Layout` of each, all of the same in_features.
        biases: (out_features,) each, None where a linear has none; or None.
        a: (rank, in_features) each, None where a linear has no adapter; or None. Ranks may differ.
        b: (out_features, rank) each, where ``a`` is given.
        scales: factor of each adapter; 1 if None.
        x_adapters: the adapter's own input, of x's shape, where it is not x; or None.
        adapter_dtype: in which the adapters' products are computed; x's if None.

    Returns:
        One (..., out_features) a linear, in x's dtype, autocast's where it is on.

    Raises:
        ValueError: the sequences differ in length, or a layout is malformed or has other in_features than x.
    """
    operands = _operands(x, weights, layouts, biases, a, b, scales, x_adapters, adapter_dtype)
    return tuple(_parallel_linears(*operands, True)[: len(weights)])


def without_updates(
    x: Tensor,
    weights: Sequence[list[Tensor]],
    layouts: Sequence[str],
    biases: Sequence[Tensor | None] | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    adapter_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The products with the weights alone, and t of all adapters side by side; arguments as of :func:`parallel_linears`.

    Their gradients are taken for those of the sums yᵢ + scaleᵢ · tᵢ · Bᵢᵀ, from which those of x, A, B and the weights follow:
    for an operator that adds the updates itself.
    """
    return _parallel_linears(*_operands(x, weights, layouts, biases, a, b, scales, None, adapter_dtype), False)


def _operands(
    x: Tensor,
    weights: Sequence[list[Tensor]],
    layouts: Sequence[str],
    biases: Sequence[Tensor | None] | None,
    a: Sequence[Tensor | None] | None,
    b: Sequence[Tensor | None] | None,
    scales: Sequence[float] | None,
    x_adapters: Sequence[Tensor | None] | None,
    adapter_dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor], str, list[float], torch.dtype]:
    """What the operator takes: x and other tensors, cast as autocast wants, whose they are, scales and the adapters' dtype."""
    none, dtype = [None] * len(weights), autocast_dtype(x)
    if dtype is not None:
        adapter_dtype, x = dtype, x.to(dtype)
        weights = [cast_dense(*each, dtype) for each in zip(weights, layouts, strict=True)]
        biases, x_adapters = ([v if v is None else v.to(dtype) for v in vs or none] for vs in (biases, x_adapters))
    tensors, slots = [], []
    each = zip(weights, layouts, biases or none, a or none, b or none, x_adapters or none, strict=True)
    for weight, layout, *optional in each:
        present = [v is not None for v in optional]
        slots.append(Slot(Layout.decode(layout), len(weight), present[0], present[1], present[3], present[3]))
        tensors += [*weight, *(v for v in optional if v is not None)]
    factors = [1.0] * len(weights) if scales is None else list(scales)
    return x, tensors, encode(tuple(slots)), factors, adapter_dtype or x.dtype
