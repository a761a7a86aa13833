"""RMSNorm in any spelling becomes one operator."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.rms_norm import rms_norm
from ..rewrite.graph import dtype_of, fixed_size, sizes, traced_size
from ..rewrite.match import Match
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call

ROOTS = {
    "inside": lambda m, eps: torch.rsqrt(m + eps),
    "outside": lambda m, eps: 1 / (torch.sqrt(m) + eps),
    "clamp": lambda m, eps: 1 / torch.sqrt(m).clamp(min=eps),
    "clamp_mean": lambda m, eps: torch.rsqrt(m.clamp(min=eps)),
    "none": lambda m, eps: torch.rsqrt(m),
}
"""Where people put eps: each is a function of the mean square."""

WEIGHTS = {"none": None, "w": lambda w: w, "1 + w": lambda w: 1 + w}
ORDERS = {
    "(xr)w": lambda x, r, w: (x * r) * w,
    "x(rw)": lambda x, r, w: x * (r * w),
    "(xw)r": lambda x, r, w: (x * w) * r,
}


class FuseRmsNorm(RewriteRule):
    """x · r(mean x²) · w  →  rms_norm(x, w, eps)"""

    name = "rms_norm"
    variants = {
        "form": ("library", "normalize", *ROOTS),
        "scaled": (False, True),
        "weight": tuple(WEIGHTS),
        "order": tuple(ORDERS),
    }

    def pattern(
        self, x: Any, w: Any, eps: Any, shape: Any, scale: Any, *, form: str, scaled: bool, weight: str, order: str
    ) -> Any:
        """Every place of eps, with and without weight, multiplied in every order; ``F.rms_norm``; ``F.normalize · √d``."""
        if (
            scaled and form not in ROOTS
        ):  # the root may be a constant factor off: that of a sum is, and an unbiased deviation
            return None
        if order != "(xr)w" and (weight == "none" or form in ("library", "normalize")):
            return None
        if form == "library" and weight == "none":
            return F.rms_norm(x, shape, w, eps)
        if form in ("library", "normalize"):
            y = F.rms_norm(x, shape, None, eps) if form == "library" else F.normalize(x, 2.0, -1, eps) * scale
            return y if weight == "none" else y * WEIGHTS[weight](w)
        r = ROOTS[form](x.pow(2).mean(-1, keepdim=True), eps)
        r = r * scale if scaled else r
        return x * r if weight == "none" else ORDERS[order](x, r, WEIGHTS[weight](w))

    def accepts(self, m: Match) -> bool:
        """The factor of a scaled root is a constant: what else stands there is a weight."""
        return not m.scaled or isinstance(m.scale, float | int)

    def check(self, m: Match) -> Refusal | None:
        """One weight per feature, a constant eps, and a mean over the whole last dimension.

        A size that is a symbol is what the weight or the shape written out makes it: no other would run.
        """
        size = traced_size(m.x)
        if size is None or not (dtype_of(m.x) or torch.int).is_floating_point:
            return self.refuse(m, "the input has no dimension, or is not floating point")
        if m.w is not None and sizes(m.w) != (size,):
            return self.refuse(m, f"the weight has shape {list(sizes(m.w))}, not one number per feature")
        if m.form != "none" and not isinstance(m.eps, float | int | None):
            return self.refuse(m, "eps is computed by the graph, not a constant")
        if m.form == "library" and tuple(m.shape) != (size,):
            return self.refuse(m, "it normalizes over several dimensions")
        if m.form == "normalize" and not _is_root(m.scale, fixed_size(m.x)):
            return self.refuse(m, "the factor after F.normalize is not the square root of the size")
        return None

    def rewrite(self, m: Match, x: Any, w: Any, eps: Any, shape: Any, scale: Any) -> Any:
        """The operator, returning what the matched code returned."""
        mode, eps = _eps(m)
        offset = 1.0 if m.weight == "1 + w" else 0.0
        y = call(rms_norm, x, w, eps, offset=offset, eps_mode=mode, dtype=dtype_of(m.root))
        return y * float(m.scale) if m.scaled else y


def _is_root(scale: Any, size: int | None) -> bool:
    return isinstance(scale, float | int) and size is not None and math.isclose(scale, size**0.5, rel_tol=1e-6)


def _eps(m: Match) -> tuple[str, float]:
    """The operator's place for eps, and eps as it counts there."""
    if m.form == "library":
        return "inside", torch.finfo(dtype_of(m.x) or torch.float32).eps if m.eps is None else float(m.eps)
    if m.form == "none":
        return "inside", 0.0
    if m.form == "normalize":  # x / max(‖x‖, e) · √d = x / max(√mean x², e/√d)
        return "clamp", float(m.eps) / float(m.scale)
    if m.form == "clamp_mean":
        return "clamp", float(m.eps) ** 0.5
    return m.form, float(m.eps)
