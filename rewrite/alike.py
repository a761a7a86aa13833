"""Lets the first block of a model have the graph of the others, though its input needs no gradient.

Dynamo has a graph for each pattern of inputs that need gradients. Where embeddings are frozen, as they are beside adapters, that
has the first block captured for itself, in each form that it is called in: half of what capturing a model takes. So the block
is called with an alias of its input that needs a gradient, and the graph, when it runs, is given the input itself: no gradient
is computed that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Alias:
    """An input and its alias; whether a graph has met it."""

    alias: Tensor
    given: Tensor
    met: bool = False

    def instead(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], int | None]:
        """The arguments of a graph with the input in the alias' place, and where that is."""
        at = next((i for i, a in enumerate(arguments) if a is self.alias), None)
        if at is None:
            return arguments, None
        self.met = True
        return (*arguments[:at], self.given, *arguments[at + 1 :]), at


class _Aliased(torch.autograd.Function):
    """As the input of the other blocks it is no leaf, which may be written to in place."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        empty: Any = torch.empty(0, dtype=x.dtype, device=x.device)
        return empty.set_(x)  # a view of x would not be writable

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


class Alike:
    """The first argument of one block, call after call. After a call in which no graph met the alias there is none any more."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.met = True
        self._one = torch.ones((), requires_grad=True)

    @torch.compiler.disable()  # where a graph around the block was interrupted, Dynamo would capture this
    def alias(self, first: Any) -> Alias | None:
        """For ``first``; None where there is no need, or no use."""
        if type(first) is not Tensor or not first.is_floating_point() or first.is_inference():
            return None
        if torch._C._are_functorch_transforms_active() or not any(p.requires_grad for p in self.module.parameters()):
            return None
        alias: Any = _Aliased.apply(self._one, first)
        return Alias(alias, first)


def swapped(args: tuple[Any, ...], kwargs: dict[str, Any], alias: Alias) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with the alias in the input's place."""
    swap = lambda a: alias.alias if a is alias.given else a  # noqa: E731
    return tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}
