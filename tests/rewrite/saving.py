"""Graphs of forward and backward, and what a call of one really saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from weft.rewrite.dynamo_settings import dynamo_settings
from weft.rewrite.joint import JointGraph, Prepare, Recorder, is_random, recompute_problem
from weft.rewrite.remat import Choice, Problem, frontier
from weft.rewrite.sizes import evaluator


class Captured:
    """A function as Dynamo captures it, lowered through its joint graph.

    Attributes:
        joint: of the last capture.
        args: of the last call, as the graph takes them.
        graphs: how many were captured.
    """

    def __init__(
        self, function: Callable[..., Any], recorded: Recorder | None = None, prepared: Prepare | None = None
    ) -> None:
        self.recorded, self.prepared = recorded, prepared
        self.graphs = 0
        self.args: tuple[Any, ...] = ()
        self.saved: frozenset[str] | None = None
        self._compiled = torch.compile(function, backend=self._backend, dynamic=True)

    def _backend(self, module: fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        self.joint = joint = JointGraph(module, fakes, self.recorded, self.prepared)
        joint.lower()

        def run(*args: Any) -> Any:
            self.args = args
            return joint.lower(self.saved)(*args)

        return run

    def __call__(self, *args: Any, saved: frozenset[str] | None = None) -> Any:
        self.saved = saved
        with dynamo_settings():
            return self._compiled(*args)

    def problem(self) -> Problem:
        """What to save at the sizes of the last call, where every call takes a second."""
        assert self.joint.graph is not None
        once = self.joint.only_once(self.joint.graph)
        return recompute_problem(self.joint.graph, once, lambda _: 1.0, evaluator(self.joint.fakes, self.args))

    def choices(self) -> list[Choice]:
        """From all to as little as possible."""
        return frontier(self.problem(), 1e-12, 100.0)


class SavedBytes:
    """Bytes of the different storages that were saved for a backward, those of the excluded left out."""

    def __init__(self, excluded: Sequence[Tensor]) -> None:
        self.excluded = {t.untyped_storage()._cdata for t in excluded}
        self.kept: dict[int, Tensor] = {}

    def note(self, saved: Tensor) -> Tensor:
        """A hook of autograd."""
        if saved.untyped_storage()._cdata not in self.excluded:
            self.kept[saved.untyped_storage()._cdata] = saved
        return saved

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())


@contextmanager
def counting(*excluded: Tensor) -> Any:
    """Count what is saved inside, besides ``excluded``."""
    count = SavedBytes(excluded)
    with saved_tensors_hooks(count.note, lambda kept: kept):
        yield count


def random_calls(graph: fx.Graph | None) -> list[str]:
    """The calls of ``graph`` that draw."""
    assert graph is not None
    return [n.name for n in graph.nodes if n.op == "call_function" and is_random(n)]


def run(
    function: Callable[..., Any], leaves: Sequence[Tensor], excluded: Sequence[Tensor] = ()
) -> tuple[list[Tensor], int]:
    """Outputs and gradients of a call on fresh copies of ``leaves``, and the bytes that it saved."""
    fresh = [t.detach().clone().requires_grad_(t.requires_grad) for t in leaves]
    with counting(*fresh, *excluded) as count:
        output = function(*fresh)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    total = sum(
        (o * torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o)).sum() for o in outputs if o.requires_grad
    )
    assert isinstance(total, Tensor)
    total.backward()
    grads = [t.grad for t in fresh if t.requires_grad]
    return [*(o.detach() for o in outputs), *(torch.zeros(()) if g is None else g for g in grads)], count.bytes


def parameters(model: nn.Module) -> list[Tensor]:
    """All that a model holds."""
    return [*model.parameters(), *model.buffers()]
