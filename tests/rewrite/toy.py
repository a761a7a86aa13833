"""Rules simple enough to see through, for tests of the engine around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.rewrite.match import Match
from weft.rewrite.report import Refusal
from weft.rewrite.rule import RewriteRule, call
from weft.rewrite.siblings import SiblingRule


def sine_of_square(x: Tensor) -> Tensor:
    """The operator of the toy rule."""
    return torch.sin(x * x)


class FuseSine(RewriteRule):
    """sin(x²)  →  sine_of_square(x)"""

    name = "sine"

    def pattern(self, x: Any) -> Any:
        return torch.sin(x * x)

    def rewrite(self, m: Match, x: Any) -> Any:
        return call(sine_of_square, x)


def sine_and_square(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both values."""
    return torch.sin(x * x), x * x


class FuseSineKeepingTheSquare(RewriteRule):
    """sin(x²), x²  →  one operator with two results"""

    name = "sine_and_square"

    def pattern(self, x: Any) -> Any:
        square = x * x
        return torch.sin(square), square

    def rewrite(self, m: Match, x: Any) -> Any:
        both = call(sine_and_square, x)
        return both[0], both[1]


def scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """(x + y)·s"""
    return (x + y) * scale


class FuseScaledSum(RewriteRule):
    """(x + y) s  →  scaled(x, y, s),  for a positive constant s"""

    name = "scaled"

    def pattern(self, x: Any, y: Any, s: Any) -> Any:
        return (x + y) * s

    def check(self, m: Match) -> Refusal | None:
        if not isinstance(m.s, float) or m.s <= 0:
            return self.refuse(m, "the scale is no positive constant")
        return None

    def rewrite(self, m: Match, x: Any, y: Any, s: Any) -> Any:
        return call(scaled, x, y, s)


def both_exponentials(xs: list[Tensor]) -> list[Tensor]:
    """exp of each."""
    return [torch.exp(x) for x in xs]


class MergeExponentials(SiblingRule):
    """exp(x₁), exp(x₂)  →  both_exponentials([x₁, x₂])"""

    name = "exponentials"

    def key(self, node: Any) -> Any:
        return "exp" if node.target is torch.exp else None

    def merge(self, nodes: list[Any], values: list[Any]) -> list[Any] | None:
        merged = call(both_exponentials, [v.args[0] for v in values])
        return [merged[i] for i in range(len(nodes))]
