"""The gate of an MLP, activation(gate) · up, becomes one operator."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.gated_activation import gated_activation, gated_activation_packed
from ..rewrite.graph import dtype_of, sizes, static_size, tensor_of
from ..rewrite.match import Match
from ..rewrite.pattern import part
from ..rewrite.report import Refusal
from ..rewrite.rule import RewriteRule, call

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "gelu, by hand": lambda g: g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0))),
    "gelu, by hand, no division": lambda g: g * 0.5 * (1.0 + torch.erf(g * math.sqrt(0.5))),
    "gelu_tanh, by hand": lambda g: 0.5 * g * (1.0 + torch.tanh(ROOT_2_OVER_PI * (g + 0.044715 * torch.pow(g, 3.0)))),
    "gelu_tanh, as sigmoid": lambda g: g * torch.sigmoid(2 * ROOT_2_OVER_PI * (g + 0.044715 * torch.pow(g, 3.0))),
    "quick_gelu": lambda g: g * torch.sigmoid(1.702 * g),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g) ** 2,
    "clamp": lambda g: torch.clamp_min(g, 0),
    "maximum": lambda g: torch.maximum(g, g.new_zeros(())),
    "positive": lambda g: torch.where(g > 0, g, 0),
    "masked": lambda g: g * (g > 0),
    "relu2, clamp": lambda g: torch.clamp_min(g, 0) ** 2,
    "relu2, maximum": lambda g: torch.maximum(g, g.new_zeros(())) ** 2,
    "positive2": lambda g: torch.where(g > 0, g, 0) ** 2,
    "masked2": lambda g: (g * (g > 0)) ** 2,
    "masked2, relu": lambda g: F.relu(g) * g,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The spellings of each activation; what follows a comma only tells spellings apart.

A relu by hand is an activation of its own where it differs from the others at 0, at NaN or at infinity: relu(x)·x is the
square of x·(x > 0), for both make NaN of −∞. No spelling of any is x·y·(x > 0), or x²·(x > 0): where the product overflows, the
mask comes too late, and makes NaN.
"""


class FuseGatedMlp(RewriteRule):
    """activation(gate) · up  →  gated_activation(gate, up)"""

    name = "gated_mlp"
    variants = {"activation": tuple(ACTIVATIONS), "packed": (True, False)}

    def pattern(
        self, gate: Any, up: Any, x: Any, a: Any, b: Any, c: Any, d: Any, step: Any, *, activation: str, packed: bool
    ) -> Any:
        """Gate and up as two tensors, or as two parts of one."""
        if packed:
            gate, up = part(x, a, b, step), part(x, c, d, step)
        return ACTIVATIONS[activation](gate) * up

    def accepts(self, m: Match) -> bool:
        """Two tensors: an activation times a number is a capped logit, say."""
        return m.packed or (tensor_of(m.gate) is not None and tensor_of(m.up) is not None)

    def check(self, m: Match) -> Refusal | None:
        """Two floating-point tensors of one shape; the two parts of a packed tensor are all of it."""
        if m.packed:
            if _order(m) is None:
                return self.refuse(m, "gate and up are not the two halves of one tensor")
            return None
        if not sizes(m.gate) or sizes(m.gate) != sizes(m.up):
            return self.refuse(m, f"gate and up have shapes {list(sizes(m.gate))} and {list(sizes(m.up))}")
        if m.gate is m.up or not all((dtype_of(n) or torch.int).is_floating_point for n in (m.gate, m.up)):
            return self.refuse(m, "gate and up are one tensor, or not floating point")
        return None

    def rewrite(self, m: Match, gate: Any, up: Any, x: Any, **_: Any) -> Any:
        """The operator for the two tensors, or for the packed one."""
        activation = m.activation.partition(",")[0]
        if not m.packed:
            return call(gated_activation, gate, up, activation)
        gate_first, interleaved = _order(m) or (True, False)
        return call(gated_activation_packed, x, activation, gate_first=gate_first, interleaved=interleaved)


def _order(m: Match) -> tuple[bool, bool] | None:
    """Whether gate comes first, and whether the two alternate; None if they are not the two halves."""
    size = static_size(m.x)
    if size is None:
        return None
    gate, up = (m.a, size if m.b is None else m.b), (m.c, size if m.d is None else m.d)
    halves, pairs = ((0, size // 2), (size // 2, size)), ((0, size), (1, size))
    if m.step == 1 and {gate, up} == set(halves):
        return gate == halves[0], False
    if m.step == 2 and {gate, up} == set(pairs):
        return gate == pairs[0], True
    return None
