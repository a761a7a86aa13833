"""Attention whose keys and values are repeated for grouped heads becomes one operator that reads them as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels.attention import attention
from ..rewrite import pattern as spelt
from ..rewrite.graph import dtype_of, fixed_size, hint, settled, sizes, value
from ..rewrite.match import Match
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call


class FuseAttention(RewriteRule):
    """softmax(scale · q · repeat(k)ᵀ + mask) · repeat(v)  →  attention(q, k, v, mask, scale)"""

    name = "attention"
    variants = {"grouped": (True, False)}
    absorb_cast = False

    def pattern(
        self, q: Any, k: Any, v: Any, mask: Any, p: Any, causal: Any, scale: Any, gqa: Any, n: Any, *, grouped: bool
    ) -> Any:
        """The library's function, with each head of k and v repeated in front of it, or not."""
        if grouped:
            k, v = spelt.repeated(k, n, 1), spelt.repeated(v, n, 1)
        return spelt.attention(q, k, v, mask, p, causal, scale, gqa)

    def check(self, m: Match) -> Refusal | None:
        """No dropout; (batch, heads, length, head_dim); a causal flag and a scale that are constants."""
        if m.p != 0:
            return self.refuse(m, f"attention weights are dropped out with probability {_named(m.p)}")
        if not isinstance(m.causal, bool) or not (m.scale is None or isinstance(m.scale, float | int)):
            return self.refuse(m, "the scale or the causal flag is computed by the graph, not a constant")
        if m.causal and m.mask is not None:
            return self.refuse(m, "a mask and a causal flag at once")
        shapes = [sizes(x) for x in (m.q, m.k, m.v)]
        if any(len(s) != 4 for s in shapes):
            return self.refuse(m, f"q, k and v have shapes {[list(s) for s in shapes]}, not four dimensions each")
        if len({hint(s[0]) for s in shapes}) > 1 or hint(shapes[1][1]) != hint(shapes[2][1]):
            return self.refuse(m, f"q, k and v of shapes {[list(s) for s in shapes]} are broadcast")
        heads, shared = fixed_size(m.q, 1), fixed_size(m.k, 1)
        if not heads or not shared or heads % shared:
            return self.refuse(m, f"{shared} heads of keys do not divide {heads} heads of queries")
        return None

    def rewrite(self, m: Match, q: Any, k: Any, v: Any, mask: Any, scale: Any, **_: Any) -> Any:
        """The operator in the dtype in which the matched code computed, whatever its inputs were cast from."""
        dtype = dtype_of(m.root)
        mixed = any(dtype_of(x) != dtype for x in (m.q, m.k, m.v))
        q, k, v = (x if dtype_of(n) == dtype else x.to(dtype) for x, n in ((q, m.q), (k, m.k), (v, m.v)))
        if mixed and mask is not None and (dtype_of(m.mask) or torch.int).is_floating_point:
            mask = mask.to(dtype)
        return call(attention, q, k, v, mask, is_causal=m.causal, scale=scale)


def _named(x: Any) -> Any:
    return settled(value(x)) if isinstance(x, fx.Node) else x
