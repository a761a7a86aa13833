"""Runs a model from one of its blocks on: what comes before it is remembered.

A change inside block i changes nothing before it. Calls of earlier blocks return what they returned when the batch was
recorded, so that measuring every layer of a model alone costs about half a forward for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class _Enough(Exception):
    """The block of interest has run."""


@dataclass
class Prefix:
    """One batch through a model: what every block call returned, and the model's output.

    Args:
        model: the model; its blocks' forwards are replaced while one of the methods runs, and given back.
        blocks: the blocks, in any order. A block may be called several times.
        inputs: keyword arguments of the model's forward.
    """

    model: nn.Module
    blocks: list[nn.Module]
    inputs: Mapping[str, Any]
    calls: list[tuple[nn.Module, Any]] = field(default_factory=list)
    first_use: dict[nn.Module, int] = field(default_factory=dict)
    """For every module outside the blocks that ran, how many blocks had been called by then."""

    def record(self, results: bool = True) -> Any:
        """Run everything, remember which blocks were called (and what they returned, if ``results``); return the output."""
        self.calls.clear()
        self.first_use.clear()

        def keep(block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            # a copy: the model may write into what a block returned
            self.calls.append((block, tree_map(_copied, result) if results else None))
            return result

        inside = {m for b in self.blocks for m in b.modules()}

        def note(module: nn.Module, _: Any) -> None:
            self.first_use.setdefault(module, len(self.calls))

        handles = [m.register_forward_pre_hook(note) for m in self.model.modules() if m not in inside]
        try:
            return self._run(keep)
        finally:
            for handle in handles:
                handle.remove()

    def run_from(self, position: int) -> Any:
        """The output where nothing changed that runs before the call of a block at ``position``."""
        return self._run(_Skip(self.calls, position))

    def run_until(self, block: nn.Module) -> None:
        """Run everything up to the last call of ``block``, and stop there."""
        last = max(i for i, (b, _) in enumerate(self.calls) if b is block)
        count = 0

        def stop(current: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal count
            result = forward(*args, **kwargs)
            count += 1
            if count > last:
                raise _Enough
            return result

        try:
            self._run(stop)
        except _Enough:
            return

    def position(self, block: nn.Module) -> int:
        """How many calls of blocks come before the first of ``block``; 0 for one that never ran."""
        return next((i for i, (b, _) in enumerate(self.calls) if b is block), 0)

    def _run(self, around: Callable[..., Any]) -> Any:
        with _replaced(self.blocks, around), torch.no_grad():
            return self.model(**self.inputs)


@dataclass
class _Skip:
    calls: list[tuple[nn.Module, Any]]
    first: int
    count: int = 0

    def __call__(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        at, self.count = self.count, self.count + 1
        if at >= self.first:
            return forward(*args, **kwargs)
        known, result = self.calls[at]
        if known is not block:
            raise RuntimeError("the blocks were called in another order than when the batch was recorded")
        return tree_map(_copied, result) if at == self.first - 1 else result


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


@contextmanager
def _replaced(blocks: list[nn.Module], around: Callable[..., Any]) -> Iterator[None]:
    """``around(block, forward, args, kwargs)`` in place of each block's forward."""
    before = [(b, b.__dict__.get("forward")) for b in blocks]
    for block in blocks:
        forward = block.forward
        block.__dict__["forward"] = lambda *args, b=block, f=forward, **kwargs: around(b, f, args, kwargs)
    try:
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward
