"""LayerNorm in any spelling becomes one operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.layer_norm import layer_norm
from ..rewrite.graph import dtype_of, sizes, traced_size
from ..rewrite.match import Match
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call


class FuseLayerNorm(RewriteRule):
    """(x − mean x) · rsqrt(var x + eps) · w + b  →  layer_norm(x, w, b, eps)"""

    name = "layer_norm"
    variants = {
        "form": ("library", "by hand", "by hand, c(rw)", "by hand, (cw)r"),
        "weight": ("none", "w", "1 + w"),
        "bias": (False, True),
    }

    def pattern(self, x: Any, w: Any, b: Any, eps: Any, shape: Any, *, form: str, weight: str, bias: bool) -> Any:
        """``F.layer_norm``, alone or with an affine map of its own behind it, and the formula written out."""
        if form in ("by hand, c(rw)", "by hand, (cw)r") and weight == "none":
            return None
        if form == "library" and weight == "none":
            return None if bias else F.layer_norm(x, shape, w, b, eps)
        if form == "library":
            y, factors = F.layer_norm(x, shape, None, None, eps), list[Any]()
        else:
            y = x - x.mean(-1, keepdim=True)
            factors = [torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)]
        if weight != "none":
            factors.append(w if weight == "w" else 1 + w)
        factors = factors[::-1] if form.endswith("(cw)r") else factors
        for factor in [factors[0] * factors[1]] if form.endswith("c(rw)") else factors:
            y = y * factor
        return y + b if bias else y

    def check(self, m: Match) -> Refusal | None:
        """One weight and bias per feature, a constant eps, the last dimension alone.

        A size that is a symbol is what the weight or the shape written out makes it: no other would run.
        """
        size = traced_size(m.x)
        if size is None or not (dtype_of(m.x) or torch.int).is_floating_point:
            return self.refuse(m, "the input has no dimension, or is not floating point")
        for name in ("w", "b"):
            bound = getattr(m, name)
            if bound is not None and sizes(bound) != (size,):
                return self.refuse(m, f"{name} has shape {list(sizes(bound))}, not one number per feature")
        if not isinstance(m.eps, float | int):
            return self.refuse(m, "eps is computed by the graph, not a constant")
        if m.form == "library" and tuple(m.shape) != (size,):
            return self.refuse(m, "it normalizes over several dimensions")
        return None

    def rewrite(self, m: Match, x: Any, w: Any, b: Any, eps: Any, shape: Any) -> Any:
        """The operator, returning what the matched code returned."""
        offset = 1.0 if m.weight == "1 + w" else 0.0
        return call(layer_norm, x, w, b, float(m.eps), offset=offset, dtype=dtype_of(m.root))
