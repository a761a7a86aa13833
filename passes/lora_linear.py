"""A linear and the low-rank update beside it become one operator."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ..kernels.lora_linear import lora_linear
from ..kernels.lora_update import lora_update
from ..rewrite.graph import dtype_of, sizes
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


class FuseLoraLinear(RewriteRule):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ  →  lora_linear(x, W, b, A, B, s)"""

    name = "lora_linear"
    variants = {
        "base": ("rows", "columns", "4-bit", "any"),
        "down": ("rows", "columns"),
        "scaled": ("after", "between", "before", "not"),
    }

    def pattern(
        self, x: Any, w: Any, xa: Any, a: Any, b: Any, scale: Any, y: Any,
        packed: Any, shape: Any, absmax: Any, block: Any, kind: Any, bias: Any, absmax8: Any, code: Any, offset: Any,
        *, base: str, down: str, scaled: str,
    ) -> Any:  # fmt: skip
        """Any storage of the base, adapters by rows (PEFT) or by columns, the scale wherever it is applied."""
        product = F.linear if down == "rows" else lambda t, m: columns(t, m, None)
        low = product(xa * scale if scaled == "before" else xa, a)
        update = product(low * scale if scaled == "between" else low, b)
        update = update * scale if scaled == "after" else update
        bases = {
            "rows": lambda: F.linear(x, w, bias),
            "columns": lambda: columns(x, w, bias),
            "4-bit": lambda: gemm_4bit(x, packed, shape, absmax, block, kind, bias, absmax8, code, offset),
            "any": lambda: y,
        }
        return bases[base]() + update

    def check(self, m: Match) -> Refusal | None:
        """Two matrices that fit, a constant scale, and a base of the result's shape."""
        if m.scale is not None and not isinstance(m.scale, float | int):
            return self.refuse(m, "the scale is computed by the graph, not a constant")
        if len(sizes(m.a)) != 2 or len(sizes(m.b)) != 2:
            return self.refuse(m, f"the adapter's factors have shapes {list(sizes(m.a))} and {list(sizes(m.b))}")
        if m.base == "any" and sizes(m.y) != sizes(m.root):
            return self.refuse(m, "what the update is added to is broadcast")
        if m.base in ("rows", "columns") and len(sizes(m.w)) != 2:
            return self.refuse(m, "the base weight is no matrix")
        problem = problem_4bit(m) if m.base == "4-bit" else None
        return self.refuse(m, problem) if problem else None

    def rewrite(self, m: Match, x: Any, w: Any, xa: Any, a: Any, b: Any, scale: Any, y: Any, **storage: Any) -> Any:
        """The operator for the base's storage; an unknown base product stays, and is updated."""
        if m.down == "columns":
            a, b = a.t(), b.t()
        scale = 1.0 if m.scale is None else float(m.scale)
        if m.base == "any":
            return call(lora_update, y, xa, a, b, scale, adapter_dtype=adapter_dtype(m.a, m.xa))
        if m.base == "4-bit":
            weight, layout = tensors_4bit(m, storage), layout_4bit(m)
        else:
            weight, layout = [w], dense_layout(m.w, by_rows=m.base == "rows")
        dropped = None if same_input(m.x, m.xa) else xa
        kind = adapter_dtype(m.a, m.x)
        found = call(
            lora_linear, x, weight, layout.encode(), storage["bias"], a, b, scale, x_adapter=dropped, adapter_dtype=kind
        )
        return found if product_dtype(m.x) == dtype_of(m.root) else found.to(dtype_of(m.root))
