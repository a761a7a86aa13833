"""What happens to modules that Dynamo captured nothing of: torch.fx traces them, then the modules inside, then nothing does."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .capture import Session
from .errors import first_line
from .regions import Site, has_forward
from .report import GraphRecord, RegionRecord, join
from .trace import PLAIN, Traced, state, trace

_log = logging.getLogger(__name__)

MOST_GRAPHS = 16
"""Graphs kept for one module; calls that fit none of so many run as the model was written."""


def unreached(root: nn.Module, prefix: str, reached: Iterable[int]) -> list[Site]:
    """The outermost modules with a forward of which no captured graph reads any parameter.

    Args:
        reached: identities of the parameters that are inputs of captured graphs.
    """
    return list(_unreached(root, prefix, frozenset(reached)))


def _unreached(module: nn.Module, path: str, reached: frozenset[int]) -> Iterator[Site]:
    parameters = {id(p) for p in module.parameters()}
    if parameters and not parameters & reached and has_forward(module):
        yield Site(path, module, "traced")
        return
    if parameters - reached:
        for name, child in module.named_children():
            yield from _unreached(child, join(path, name), reached)


def outside(sites: Iterable[Site], traced: Iterable[Site]) -> list[Site]:
    """Those of ``sites`` that are not inside one of ``traced``."""
    covered = {id(m) for t in traced for m in t.module.modules()}
    return [s for s in sites if id(s.module) not in covered]


@contextmanager
def noting_calls(sites: Iterable[Site]) -> Iterator[set[str]]:
    """The paths of those modules that are called meanwhile."""
    called: set[str] = set()
    handles = [s.module.register_forward_pre_hook(lambda *_, path=s.path: called.add(path)) for s in sites]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class TracedRun:
    """Runs a module as :mod:`trace` captured it, anew for each kind of arguments and each state of the module."""

    def __init__(
        self, session: Session, site: Site, original: Callable[..., Any], descend: Callable[[Site], None]
    ) -> None:
        self.session, self.site, self.original, self.descend = session, site, original, descend
        self.signature = inspect.signature(original)
        self.graphs: dict[Any, list[tuple[Traced, Callable[..., Any]]]] = {}
        self.hopeless: set[Any] = set()
        self.count = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        bound = self.signature.bind(*args, **kwargs)
        leaves, spec = tree_flatten((bound.args, bound.kwargs))
        root = self.site.module
        key = (repr(spec), tuple(_kind(leaf) for leaf in leaves), state(root))
        for traced, function in self.graphs.get(key, ()):
            inputs = traced.inputs(root, leaves)
            if traced.fits(inputs):
                return function(*inputs)
        if key in self.hopeless or _is_traced(leaves) or self.count >= MOST_GRAPHS:
            return self.original(*args, **kwargs)
        made = self._capture(leaves, spec)
        self.count += 1
        if made is None:
            self.hopeless.add(key)
            return self.original(*args, **kwargs)
        self.graphs.setdefault(key, []).append(made)
        return made[1](*made[0].inputs(root, leaves))

    def _capture(self, leaves: list[Any], spec: Any) -> tuple[Traced, Callable[..., Any]] | None:
        with self.session.inside(self.site.path):
            try:
                traced = trace(self.site.module, self.original, leaves, spec)
            except Exception as error:  # the forward was given proxies, on which it may do anything
                _log.debug("tracing %s failed", self.site.path, exc_info=True)
                self._leave(first_line(error))
                return None
            inputs = traced.inputs(self.site.module, leaves)
            compiled = self.session.compile(traced.module, inputs, "fx")
        return traced, self._inside(compiled)

    def _inside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            with self.session.inside(self.site.path):
                return compiled(*inputs)

        return run

    def _leave(self, why: str) -> None:
        """Say that this forward runs as written, and try the modules that it calls."""
        path = self.site.path
        record = RegionRecord([path], "untouched", note=f"torch.fx could not trace it: {why}", places=[path])
        self.session.report.graphs.append(GraphRecord(record))
        if not self.graphs:
            for name, child in self.site.module.named_children():
                for site in _unreached(child, join(path, name), frozenset()):
                    self.descend(site)


def _is_traced(leaves: list[Any]) -> bool:
    """Whether someone else is tracing this call."""
    return any(isinstance(leaf, Tensor) and type(leaf) not in (Tensor, nn.Parameter) for leaf in leaves)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim(), leaf.device, leaf.requires_grad
    return (type(leaf), leaf) if isinstance(leaf, PLAIN) else type(leaf)
