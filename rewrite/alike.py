"""Lets the first block of a model have the graph of the others, though its input needs no gradient.

Dynamo has a graph for each pattern of inputs that need gradients. Where embeddings are frozen, as they are beside adapters, that
has the first block captured for itself, in each form that it is called in: half of what capturing a model takes. So the block
is called with an alias of its input that needs a gradient, and the graph, when it runs, is given the input itself: no gradient
is computed that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """The input of one block, call after call. After a call in which no graph met the alias there is none any more."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.met = True
        self._one = torch.ones((), requires_grad=True)

    @contextmanager
    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any, Alias | None]]:
        """The arguments to call the block with."""
        given = self._input(args, kwargs)
        if given is None:
            yield args, kwargs, None
            return
        alias: Any = _Aliased.apply(self._one, given)
        found = Alias(alias, given)
        swap = lambda a: alias if a is given else a  # noqa: E731
        yield tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}, found
        self.met = found.met

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if not self.met or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return None
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()), None)
        if first is None or type(first) is not Tensor or first.requires_grad or first.is_inference():
            return None
        return first if any(p.requires_grad for p in self.module.parameters()) else None
