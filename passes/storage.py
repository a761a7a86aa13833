"""What rules over linears share: the storage of a matched weight, as operators take it."""

from __future__ import annotations

from typing import Any

import torch

from ..quant.layout import Layout
from ..rewrite.graph import dtype_of, sizes
from ..rewrite.match import Match
from ..rewrite.vocabulary import operation

STORAGE = ("packed", "shape", "absmax", "block", "kind", "bias", "absmax8", "code", "offset")
"""The wildcards of a 4-bit product, in the order of ``bitsandbytes::gemm_4bit``."""


def layout_4bit(m: Match) -> Layout:
    """The layout of a matched 4-bit weight; bitsandbytes fixes nested blocks to 256 scales."""
    rows, columns = m.shape
    return Layout(m.kind, int(rows), int(columns), int(m.block), 256 if m.absmax8 is not None else 0)


def tensors_4bit(m: Match, bound: dict[str, Any]) -> list[Any]:
    """The tensors of a matched 4-bit weight, from proxies ``bound`` to its wildcards."""
    if m.absmax8 is None:
        return [bound["packed"], bound["absmax"]]
    return [bound["packed"], bound["absmax8"], bound["absmax"], bound["code"], bound["offset"]]


def problem_4bit(m: Match) -> str | None:
    """Why a matched 4-bit weight is not one that the kernels read, if so."""
    if m.kind not in ("nf4", "fp4"):
        return f"the storage {m.kind!r} is unknown"
    if not isinstance(m.block, int) or len(m.shape) != 2:
        return "the block size or the shape is not constant"
    return None


def dense_layout(node: Any, *, by_rows: bool) -> Layout:
    """The layout of a dense matrix stored as (out, in) or as (in, out)."""
    first, second = sizes(node)
    return Layout("rows", first, second) if by_rows else Layout("columns", second, first)


def product_dtype(x: Any) -> torch.dtype | None:
    """The dtype in which a linear of ``x`` computes: autocast's where it is on, else that of x."""
    device = x.meta["val"].device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype_of(x)


def adapter_dtype(a: Any, x: Any) -> torch.dtype | None:
    """The dtype in which a low-rank product ran that cast x to the adapter's; None where that is the base product's."""
    autocast = torch.is_autocast_enabled(a.meta["val"].device.type)
    return None if autocast or dtype_of(a) == dtype_of(x) else dtype_of(a)


def same_input(x: Any, xa: Any) -> bool:
    """Whether base and adapter read one value: the same node, or one that both their products round to one dtype."""
    if x is xa:
        return True
    rounded = x.op == "call_method" and operation(x) == "cast" and x.args[0] is xa
    return rounded and product_dtype(xa) == dtype_of(x)
