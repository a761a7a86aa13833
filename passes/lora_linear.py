"""A linear and the low-rank update beside it become one operator."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from ..kernels.lora_linear import lora_linear
from ..kernels.lora_update import lora_update
from ..rewrite.graph import dtype_of, sizes, tensor_of
from ..rewrite.match import Match
from ..rewrite.pattern import columns, gemm_4bit
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call
from .storage import (
    adapter_dtype,
    dense_layout,
    layout_4bit,
    problem_4bit,
    product_dtype,
    same_input,
    tensors_4bit,
)

PLACES = {
    "after twice": ("after", "after"),
    "after, and divided": ("after", "after, divided"),
    "divided, and after": ("after, divided", "after"),
    "between and after": ("between", "after"),
    "after": ("", "after"),
    "divided": ("", "after, divided"),
    "between": ("", "between"),
    "between, divided": ("", "between, divided"),
    "before": ("", "before"),
    "not": ("", ""),
}
"""Where the wildcards ``gain`` and ``scale`` are applied: before both products, between them, or after both.

What a tensor divides is told apart, since one over it is no value of the graph. A number's inverse is a number.
"""
BIASES = {"none": (False, False), "of B": (False, True), "of both": (True, True)}
"""Which of the adapter's two products have a bias."""


class FuseLoraLinear(RewriteRule):
    """x Wᵀ + b ± s (x Aᵀ) Bᵀ  →  lora_linear(x, W, b, A, B, ±s);  x Wᵀ + b ± s ((x Aᵀ + d) Bᵀ + e) likewise, with another b

    A scale that the graph computes is taken into the factor beside it: one number a feature, as in DoRA and VeRA, scales
    the rows of B, the columns of B, or the columns of A; a tensor of no dimension all of B, or of A.
    """

    name = "lora_linear"
    variants = {
        "base": ("rows", "columns", "4-bit", "any"),
        "down": ("rows", "columns"),
        "scaled": tuple(PLACES),
        "biases": tuple(BIASES),
        "sign": (1.0, -1.0),
    }

    def pattern(
        self, x: Any, w: Any, xa: Any, a: Any, b: Any, scale: Any, gain: Any, y: Any,
        packed: Any, shape: Any, absmax: Any, block: Any, kind: Any, bias: Any, absmax8: Any, code: Any, offset: Any,
        low: Any, high: Any, *, base: str, down: str, scaled: str, biases: str, sign: float,
    ) -> Any:  # fmt: skip
        """Any storage of the base, adapters by rows (PEFT) or by columns, added or taken off, the scale wherever it is.

        An adapter that has a bias is scaled behind, if at all.
        """
        if biases != "none" and scaled not in ("after", "divided", "not"):
            return None
        product = F.linear if down == "rows" else columns
        shifts = [shift if there else None for shift, there in zip((low, high), BIASES[biases], strict=True)]

        def applied(t: Any, here: str) -> Any:
            for factor, place in zip((gain, scale), PLACES[scaled], strict=True):
                t = t * factor if place == here else t / factor if place == f"{here}, divided" else t
            return t

        inner = applied(product(applied(xa, "before"), a, shifts[0]), "between")
        update = applied(product(inner, b, shifts[1]), "after")
        bases = {
            "rows": lambda: F.linear(x, w, bias),
            "columns": lambda: columns(x, w, bias),
            "4-bit": lambda: gemm_4bit(x, packed, shape, absmax, block, kind, bias, absmax8, code, offset),
            "any": lambda: y,
        }
        return bases[base]() + update if sign > 0 else bases[base]() - update

    def accepts(self, m: Match) -> bool:
        """A scale is a number, or one a feature: two linears around an activation or a gate are no adapter.

        Nor are two linears with biases, unless there are fewer features between them than on either side.
        """
        if m.biases != "none" and not _is_narrow(m):
            return False
        return all(s is None or isinstance(s, float | int) or _is_row(s) for s in (m.scale, m.gain))

    def check(self, m: Match) -> Refusal | None:
        """Two matrices that fit, scales in the dtype of the factor that takes them in, and a base of the result's shape."""
        if len(sizes(m.a)) != 2 or len(sizes(m.b)) != 2:
            return self.refuse(m, f"the adapter's factors have shapes {list(sizes(m.a))} and {list(sizes(m.b))}")
        factor = m.a if m.scaled == "before" else m.b
        if any(isinstance(s, fx.Node) and sizes(s) and dtype_of(s) != dtype_of(factor) for s in (m.scale, m.gain)):
            return self.refuse(m, f"the scale is no constant and not in the adapter's dtype {dtype_of(factor)}")
        if m.base == "any" and sizes(m.y) != sizes(m.root):
            return self.refuse(m, "what the update is added to is broadcast")
        if m.base in ("rows", "columns") and len(sizes(m.w)) != 2:
            return self.refuse(m, "the base weight is no matrix")
        problem = problem_4bit(m) if m.base == "4-bit" else None
        return self.refuse(m, problem) if problem else None

    def rewrite(
        self, m: Match, x: Any, w: Any, xa: Any, a: Any, b: Any, scale: Any, gain: Any, y: Any, low: Any, high: Any,
        **storage: Any,
    ) -> Any:  # fmt: skip
        """The operator for the base's storage; an unknown base product stays, and is updated.

        What an adapter's biases add is one row for all, which goes into the bias of the base.
        """
        if m.down == "columns":
            a, b = a.t(), b.t()
        row: Any = high if low is None else F.linear(low, b, high)
        constant = m.sign
        for given, place in zip((gain, scale), PLACES[m.scaled], strict=True):
            if isinstance(given, fx.Proxy):
                a, b = _scale_factor(place, a, b, given)
                row = None if row is None else _scaled_row(place, row, given)
            elif given is not None:
                constant *= float(given)
        scale, row = constant, row if row is None or constant == 1 else row * constant
        if m.base == "any":
            found = call(lora_update, y, xa, a, b, scale, adapter_dtype=adapter_dtype(m.a, m.xa))
            return found if row is None else (found + row).to(dtype_of(m.root))
        if m.base == "4-bit":
            weight, layout = tensors_4bit(m, storage), layout_4bit(m)
        else:
            weight, layout = [w], dense_layout(m.w, by_rows=m.base == "rows")
        dropped = None if same_input(m.x, m.xa) else xa
        bias = storage["bias"]
        if row is not None:
            bias = (row if bias is None else bias + row).to(dtype_of(m.x))
        kind = adapter_dtype(m.a, m.x)
        found = call(lora_linear, x, weight, layout.encode(), bias, a, b, scale, x_adapter=dropped, adapter_dtype=kind)
        return found if product_dtype(m.x) == dtype_of(m.root) else found.to(dtype_of(m.root))


def _is_narrow(m: Match) -> bool:
    """Whether the adapter has fewer features between its two products than in front and behind."""
    shapes = [sizes(n) if m.down == "rows" else sizes(n)[::-1] for n in (m.a, m.b)]
    if [len(s) for s in shapes] != [2, 2]:
        return False
    (rank, inputs), (outputs, _) = shapes
    return bool(rank < min(inputs, outputs))


def _is_row(scale: Any) -> bool:
    """Whether ``scale`` holds numbers along the last dimension alone."""
    return isinstance(scale, fx.Node) and tensor_of(scale) is not None and all(size == 1 for size in sizes(scale)[:-1])


def _scaled_row(place: str, row: Any, scale: Any) -> Any:
    """What the biases add, scaled as the adapter is."""
    scale = scale.reshape(-1) if sizes(scale.node) else scale
    return row / scale if place.endswith("divided") else row * scale


def _scale_factor(place: str, a: Any, b: Any, scale: Any) -> tuple[Any, Any]:
    """The factors with ``scale`` taken in.

    One without a dimension is not given any: as it is, it may be on the host, and of a wider dtype that changes no result's.
    """
    where, _, divided = place.partition(", ")
    if sizes(scale.node):
        scale = scale.reshape(-1, 1) if where == "after" else scale.reshape(1, -1)
    scale = scale.reciprocal() if divided else scale
    return (a * scale, b) if where == "before" else (a, b * scale)
