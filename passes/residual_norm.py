"""A residual addition and the norm that reads it become one operator with two results."""

from __future__ import annotations

from typing import Any

from ..kernels.residual_rms_norm import residual_rms_norm
from ..kernels.rms_norm import rms_norm
from ..rewrite.graph import sizes
from ..rewrite.match import Match
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call


class FuseResidualNorm(RewriteRule):
    """h = x + r, rms_norm(h)  →  residual_rms_norm(x, r)"""

    name = "residual_norm"
    absorb_cast = False

    def pattern(self, x: Any, r: Any, w: Any, eps: Any, offset: Any, eps_mode: Any, dtype: Any) -> Any:
        """The sum is a result too: the residual stream goes on with it."""
        h = x + r
        return call(rms_norm, h, w, eps, offset=offset, eps_mode=eps_mode, dtype=dtype), h

    def check(self, m: Match) -> Refusal | None:
        """Two tensors of one shape: a broadcast sum is no residual stream."""
        if not sizes(m.x) or sizes(m.x) != sizes(m.r):
            return self.refuse(m, f"the addends have shapes {list(sizes(m.x))} and {list(sizes(m.r))}")
        return None

    def rewrite(self, m: Match, x: Any, r: Any, w: Any, eps: Any, offset: Any, eps_mode: Any, dtype: Any) -> Any:
        """The norm and the sum, from one pass over memory."""
        both = call(residual_rms_norm, x, r, w, eps, offset=offset, eps_mode=eps_mode, dtype=dtype)
        return both[0], both[1]
