"""A 4-bit linear without an adapter becomes one operator."""

from __future__ import annotations

from typing import Any

from ..kernels.quant_linear import quant_linear
from ..rewrite.match import Match
from ..rewrite.pattern import gemm_4bit
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call
from .storage import layout_4bit, problem_4bit, tensors_4bit


class FuseQuantLinear(RewriteRule):
    """x · dequantize(W)ᵀ + b  →  quant_linear(x, W, b)"""

    name = "quant_linear"
    absorb_cast = False

    def pattern(
        self, x: Any, packed: Any, shape: Any, absmax: Any, block: Any, kind: Any, bias: Any, absmax8: Any, code: Any,
        offset: Any,
    ) -> Any:  # fmt: skip
        """The product that bitsandbytes' ``Linear4bit`` runs, with or without its autograd function around it."""
        return gemm_4bit(x, packed, shape, absmax, block, kind, bias, absmax8, code, offset)

    def check(self, m: Match) -> Refusal | None:
        """A storage that the kernels read."""
        problem = problem_4bit(m)
        return self.refuse(m, problem) if problem else None

    def rewrite(self, m: Match, x: Any, **storage: Any) -> Any:
        """The operator on the same packed tensors."""
        return call(quant_linear, x, tensors_4bit(m, storage), layout_4bit(m).encode(), storage["bias"])
