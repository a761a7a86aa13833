"""How far off a replacement is, and how far it may be: forward and gradients, against float64.

It passes if the largest error of each output and each gradient is at most twice the original's own, in the same dtype, plus one
unit in the last place. Of an original in float64 nothing more exact is known: its own error is taken to be √n units in the last
place at least, for the n numbers of its largest input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .exact import Float64, upcast

Run = tuple[list[Tensor], list[Tensor | None]]
"""Outputs and gradients."""


@dataclass(frozen=True)
class Error:
    """The largest error of one result of a replacement, that of the original, and one unit in the last place of the result."""

    found: float
    own: float
    unit: float

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.found / (2 * self.own + self.unit)

    def beside(self, other: Error | None) -> Error:
        """Of both draws together."""
        if other is None:
            return self
        return Error(max(self.found, other.found), max(self.own, other.own), max(self.unit, other.unit))


def judge(old: fx.GraphModule, new: Callable[..., Any], inputs: Sequence[Any]) -> tuple[float | None, str | None]:
    """The error of ``new`` on ``inputs`` as a share of what is allowed, and the reason for rejection if it exceeds 1."""
    return verdict(errors(old, new, inputs, [upcast(i) for i in inputs]))


def verdict(found: Mapping[str, Error | None]) -> tuple[float | None, str | None]:
    """The largest share of what is allowed, or the first above 1 with the reason for rejection; None where there is no result."""
    worst = 0.0
    for name, error in found.items():
        if error is None:
            return None, f"replay: {name} has no gradient"
        if not error.share <= 1.0:
            return error.share, f"replay: {name} is off by {error.share:.3g} times what is allowed"
        worst = max(worst, error.share)
    return worst, None


def errors(
    old: fx.GraphModule,
    new: Callable[..., Any],
    inputs: Sequence[Any],
    wide: Sequence[Any],
    *,
    tracked: bool = False,
    on_host: bool = False,
) -> dict[str, Error | None]:
    """Of each output and gradient by name; None for a gradient that ``new`` does not have.

    Args:
        old: the graph that ``new`` stands for.
        wide: the inputs in float64.
        tracked: compare gradients, too.
        on_host: ``wide`` is in the host's memory.
    """
    exact = _run(Float64(old, on_host).run, wide, tracked)
    eager = _run(old, inputs, tracked)
    ours = _run(new, inputs, tracked)
    terms = max((i.numel() for i in inputs if isinstance(i, Tensor)), default=0)
    return {
        name: None if got is None else _error(truth, peer, got, terms)
        for name, truth, peer, got in _compare(exact, eager, ours)
        if truth is not None and peer is not None
    }


def _run(function: Any, inputs: Sequence[Any], tracked: bool) -> Run:
    """Outputs and, where ``tracked``, gradients of all tracked inputs for the same drawn output gradients."""
    inputs = [i.detach().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs]
    arguments = iter(inputs)
    with torch.set_grad_enabled(tracked):
        outputs = function(*arguments)
    outputs = [o for o in outputs if isinstance(o, Tensor)]
    leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    live = [o for o in outputs if o.requires_grad]
    if not (tracked and live and leaves):
        return outputs, []
    generator = torch.Generator().manual_seed(1)
    # laid out like the outputs, as gradients of a model are: cuDNN keeps its plans for attention (torch 2.11) by the strides of
    # q, k and v alone, and one made for a gradient of other strides computes nonsense for the next
    seeds = [torch.empty_like(o).copy_(torch.randn(o.shape, generator=generator)) for o in live]
    with _no_autocast():
        return [o.detach() for o in outputs], list(torch.autograd.grad(live, leaves, seeds, allow_unused=True))


def _no_autocast() -> AbstractContextManager[Any]:
    kind = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return torch.autocast(kind, enabled=False)


def _compare(exact: Run, eager: Run, ours: Run) -> list[tuple[str, Tensor | None, Tensor | None, Tensor | None]]:
    outputs = [(f"output {i}", *t) for i, t in enumerate(zip(exact[0], eager[0], ours[0], strict=True))]
    ours_grads = ours[1] or [None] * len(eager[1])
    return outputs + [(f"gradient {i}", *t) for i, t in enumerate(zip(exact[1], eager[1], ours_grads, strict=True))]


def _error(truth: Tensor, peer: Tensor, got: Tensor, terms: int) -> Error:
    """Of ``got`` and of ``peer``; NaN where the NaN and infinities of the two differ."""
    finite = torch.isfinite(peer)
    if got.shape != peer.shape or not torch.equal(torch.isfinite(got), finite):
        return Error(float("nan"), 0.0, 1.0)
    if not got.dtype.is_floating_point:
        return Error(0.0 if torch.equal(got, peer) else float("inf"), 0.0, 1.0)
    peer, got, finite = (t.to(truth.device) for t in (peer, got, finite))
    exact = truth.double().masked_fill(~finite, 0)
    size = lambda t: float(t.abs().max()) if t.numel() else 0.0  # noqa: E731
    own = size((peer.double() - exact).masked_fill(~finite, 0))
    if peer.dtype == torch.float64:
        own = max(own, torch.finfo(peer.dtype).eps * terms**0.5 * size(exact))
    found, precision = size((got.double() - exact).masked_fill(~finite, 0)), torch.finfo(got.dtype)
    return Error(found, own, precision.eps * max(size(exact), precision.tiny))
