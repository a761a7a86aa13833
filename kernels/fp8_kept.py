"""Weights that are not trained, kept in e4m3 beside what they are stored as: by rows for x · Wᵀ, by columns for dy · W.

To quantize a bfloat16 weight for each product takes 8 bytes of traffic a step; here it is done once, for 2 bytes of memory.

The copies are of weights that stay as they are. A change that torch counts (``Tensor._version``: any operation in place, loading
a state) has them made anew, where they lay. One behind torch's back, through ``weight.data``, is not seen: :func:`forget` is for
that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..quant.layout import Layout
from . import fp8
from .dequantize_4bit import dense
from .dispatch import records

Key = tuple[Layout, torch.dtype, bool]


@dataclass
class _Weight:
    """The copies of one weight, and the version of it that each is of."""

    storage: StorageWeakRef
    copies: dict[Key, tuple[int, fp8.Quantized]] = field(default_factory=dict)


_KEPT: dict[int, _Weight] = {}
"""By address of a weight's first tensor."""


def quantized(weight: list[Tensor], layout: Layout, dtype: torch.dtype, *, columns: bool = False) -> fp8.Quantized:
    """The rows of W, or its columns, as :func:`.fp8.quantize_rows` makes them; kept if the layout says so.

    Args:
        weight: the tensors of ``layout``.
        dtype: to which a 4-bit weight is dequantized.
    """
    first, key = weight[0], (layout, dtype, columns)
    kept = _of(first) if layout.kept and not first.is_inference() else None
    version, copy = kept.copies.get(key, (-1, None)) if kept is not None else (-1, None)
    if copy is not None and version == first._version:
        return copy
    matrix = dense(weight, layout, dtype)
    made = fp8.quantize_rows(matrix.t() if columns else matrix)
    if kept is None or records():
        return made  # what a recording computes lies in its own memory, and is there when it is replayed
    if copy is not None:  # a recording may read it where it lies
        for target, source in zip(copy, made, strict=True):
            target.view(torch.uint8).copy_(source.view(torch.uint8))
    kept.copies[key] = first._version, made if copy is None else copy
    return kept.copies[key][1]


def _of(first: Tensor) -> _Weight:
    """What is kept of a weight; those that are gone are dropped when one is new."""
    known = _KEPT.get(first.data_ptr())
    if known is None or known.storage.expired():
        for address in [a for a, each in _KEPT.items() if each.storage.expired()]:
            del _KEPT[address]
        known = _KEPT[first.data_ptr()] = _Weight(StorageWeakRef(first.untyped_storage()))
    return known


def forget(weights: Iterable[Tensor]) -> None:
    """Let go of the copies of these weights: of all that have an address."""
    for weight in weights:
        _KEPT.pop(weight.data_ptr(), None)


def kept_bytes() -> int:
    """What all copies take."""
    copies = [copy for weight in _KEPT.values() for _, copy in weight.copies.values()]
    return sum(tensor.nbytes for copy in copies for tensor in copy)
