"""A 4-bit linear without an adapter becomes one operator."""

from __future__ import annotations

from typing import Any

from ..kernels.quant_linear import quant_linear
from ..rewrite.graph import requires_grad
from ..rewrite.match import Match
from ..rewrite.pattern import gemm_4bit, gemv_4bit
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call
from .storage import layout_4bit, problem_4bit, tensors_4bit


class FuseQuantLinear(RewriteRule):
    """x · dequantize(W)ᵀ + b  →  quant_linear(x, W, b)"""

    name = "quant_linear"
    absorb_cast = False
    variants = {"repacked": (False, True)}

    def pattern(
        self, x: Any, packed: Any, shape: Any, absmax: Any, block: Any, kind: Any, bias: Any, absmax8: Any, code: Any,
        offset: Any, *, repacked: bool,
    ) -> Any:  # fmt: skip
        """The products that bitsandbytes' ``Linear4bit`` runs; the repacked one is known in order to be refused."""
        if repacked:
            return gemv_4bit(x, packed, shape, absmax, code, block)
        return gemm_4bit(x, packed, shape, absmax, block, kind, bias, absmax8, code, offset)

    def check(self, m: Match) -> Refusal | None:
        """A storage that the kernels read."""
        if m.repacked:
            lost = ", which passes no gradient on" if requires_grad(m.x) else ""
            return self.refuse(m, f"bitsandbytes repacked the weight for a CPU kernel of its own{lost}")
        problem = problem_4bit(m)
        return self.refuse(m, problem) if problem else None

    def rewrite(self, m: Match, x: Any, **storage: Any) -> Any:
        """The operator on the same packed tensors."""
        return call(quant_linear, x, tensors_4bit(m, storage), layout_4bit(m).encode(), storage["bias"])
