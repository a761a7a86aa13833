"""Linears over 4-bit weights with the adapter beside the weight: one product where there would be two.

    y = [x | t] · [W | scale · B]ᵀ + bias

W is dequantized anyway, so that it costs nothing to leave room beside it; x is copied once for all linears that read it. What
is saved is reading and writing y once more. Microseconds of an H200, 8192 rows, bfloat16, rank 16, and 86 for the copy of
4096 columns of x, 279 for one of 14336:

    in -> out           the product alone    adapter added after    widened
    4096 -> 14336                    1253                   1465       1316
    4096 -> 4096                      348                    401        408
    14336 -> 4096                    1216                   1315       1265

gate and up together gain 298 of 2930 for one copy; nothing else does: :func:`serves`. A weight that is dense already would have
to be copied, too (145).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.layout import Layout
from . import split
from .dequantize_4bit import dequantize_into

WORTH = 4
"""How many times wider all outputs together must be than x, whose copy they have to pay for."""
OUT_OF_CACHE = 2**26
"""Bytes of outputs below which what is added to them is still in a cache."""
MULTIPLE = 16
"""Of this many elements are the columns beside a weight, so that its rows stay aligned."""


def serves(rows: Tensor, layouts: Sequence[Layout], dtype: torch.dtype) -> bool:
    """Whether linears of these layouts, each with an adapter in ``dtype``, read a widened copy of the matrix ``rows``."""
    outs = sum(layout.out_features for layout in layouts if layout.is_4bit)
    fits = all(layout.in_features == rows.shape[1] for layout in layouts)
    large = rows.shape[0] * outs * rows.element_size() >= OUT_OF_CACHE
    narrow = rows.element_size() == 2 and (rows.dtype == dtype or split.serves(rows, dtype))
    return rows.is_cuda and narrow and fits and large and outs >= WORTH * rows.shape[1]


class Widened:
    """A matrix x with room for the columns of t of one adapter after the other."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._copy: Tensor | None = None

    def product(
        self, weight: list[Tensor], layout: Layout, bias: Tensor | None, t: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """y of one linear, with its adapter."""
        left, right = t, (b.to(t.dtype) * scale).t()
        if t.dtype != self._rows.dtype:
            left, right = split.pair(t, right)
        ins, columns = layout.in_features, left.shape[1]
        x = self._with(-(-columns // MULTIPLE) * MULTIPLE)
        w = x.new_empty((layout.out_features, x.shape[1]))
        dequantize_into(w[:, :ins], weight, layout)
        for wide, narrow in ((x, left), (w, right.t())):
            beside = wide[:, ins:]
            if beside.shape[1] > columns:
                beside[:, columns:] = 0
                beside = beside[:, :columns]
            beside.copy_(narrow)
        return F.linear(x, w, bias)

    def _with(self, room: int) -> Tensor:
        """x with so many columns beside it."""
        rows, ins = self._rows.shape
        if self._copy is None or self._copy.shape[1] != ins + room:
            self._copy = self._rows.new_empty((rows, ins + room))
            self._copy[:, :ins] = self._rows
        return self._copy
