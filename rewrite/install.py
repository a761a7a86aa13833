"""Puts captured regions into one model instance, and takes them out again. Nothing global is patched.

A replaced forward is an instance attribute (:mod:`.forwards`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from .alike import Alike, swapped
from .cache import layer_number, narrow_caches, widen_caches
from .capture import Session
from .dynamo_settings import dynamo_settings
from .forwards import InlineForward, InstalledForward
from .kinds import LIKE
from .ladder import TracedRun
from .regions import Site


def _own_error(original: Callable[..., Any], args: Any, kwargs: Any) -> Exception | None:
    """What the model itself raises on a call that Dynamo could not capture: a wrong shape or type, most often."""
    try:
        original(*args, **kwargs)
    except Exception as error:
        return error
    return None


def _with_code_of_its_own(forward: Any, codes: list[tuple[types.CodeType, types.CodeType]]) -> Any:
    """``forward`` with a copy of its code, the same one for all blocks of a class.

    Dynamo keeps graphs by code object, and gives up a code object for good where one model of the class defeats it: models
    that were optimized apart, or that somebody compiles, would get into each other's way.
    """
    function = getattr(forward, "__func__", None)
    if not isinstance(function, types.FunctionType) or getattr(function, "_torchdynamo_disable", False):
        return forward
    code = next((own for known, own in codes if known is function.__code__), None)
    if code is None:
        code = function.__code__.replace()
        codes.append((function.__code__, code))
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__, copied.__qualname__ = function.__kwdefaults__, function.__qualname__
    copied.__dict__.update(function.__dict__)
    return types.MethodType(copied, forward.__self__)


@dataclass
class Installation:
    """The replaced forwards of one model."""

    session: Session
    replaced: dict[str, InstalledForward] = field(default_factory=dict)
    codes: dict[Any, list[tuple[types.CodeType, types.CodeType]]] = field(default_factory=dict)
    """By form of call, forwards' code and the copy of it that Dynamo keeps its graphs with."""

    def install(self, site: Site) -> None:
        """Replace the forward of one module."""
        original = site.module.forward
        run = self._runner(site, original)
        kind = InlineForward if site.role == "inline" else InstalledForward
        forward = kind(site.module, run, original)
        forward.captures = site.role != "opaque"
        self.replaced[site.path] = forward
        site.module.__dict__["forward"] = forward.shown

    def inline_blocks_keep_type(self) -> bool:
        """Whether every inline block ran and returned what Dynamo can be told of."""
        return all(f.keeps_type() for f in self.replaced.values() if isinstance(f, InlineForward))

    def _runner(self, site: Site, original: Callable[..., Any]) -> Callable[..., Any]:
        if site.role == "traced":
            return torch.compiler.disable(TracedRun(self.session, site, original, self._descend).run)
        return self._opaque(original) if site.role == "opaque" else self._region(site, original)

    def _opaque(self, original: Callable[..., Any]) -> Callable[..., Any]:
        uncaptured, before = torch.compiler.disable(original), self.session.before

        @torch.compiler.disable(recursive=False)
        def run(*args: Any, **kwargs: Any) -> Any:
            for call in before:
                call()
            return uncaptured(*args, **kwargs)

        return run

    def _descend(self, site: Site) -> None:
        if all(f.module is not site.module for f in self.replaced.values()):
            self.install(site)

    def _region(self, site: Site, original: Callable[..., Any]) -> Callable[..., Any]:
        compiled = dict[Any, Any]()
        inline = [f for f in self.replaced.values() if isinstance(f, InlineForward)] if not site.alike else []
        # What these return may depend on their modes, which Dynamo does not look at: each has graphs of its own.
        told = [f.module for f in inline if set(f.kinds.values()) != {LIKE}]
        session, path, layer = self.session, site.path, layer_number(site.module)
        memory = session.memory if session.memory and path in session.memory.paths else None
        alike = Alike(site.module) if site.alike else None

        @torch.compiler.disable(recursive=False)  # called where Dynamo gave a frame up, it would be captured itself
        def run(*args: Any, **kwargs: Any) -> Any:
            if layer is not None:
                kwargs = narrow_caches(kwargs, layer)
            alias, given, named = None, args, kwargs
            if alike is not None and alike.met and torch.is_grad_enabled():
                first = args[0] if args else next(iter(kwargs.values()), None)
                alias = None if getattr(first, "requires_grad", True) else alike.alias(first)
            if alias is not None:
                given, named = swapped(args, kwargs, alias)
            try:
                with session.inside(path, alias), dynamo_settings(), memory.running(path) if memory else nullcontext():
                    form = (*[module.training for module in told], len(given), frozenset(named))
                    if form not in compiled:
                        compiled[form] = self._compiled(original, form)
                    result = widen_caches(compiled[form](*given, **named))
                if alike is not None and alias is not None:
                    alike.met = alias.met
                return result
            except TorchDynamoException as error:
                failure = error
            raise _own_error(original, args, kwargs) or failure

        return run

    def _compiled(self, original: Callable[..., Any], form: Any) -> Any:
        """For calls of one form. Graphs of one code are compared with each call of it, and Dynamo (torch 2.13) fails over an
        argument that a call lacks where it says which of the others are one tensor."""
        captured = _with_code_of_its_own(original, self.codes.setdefault(form, []))
        return torch.compile(captured, backend=self.session.compiler, dynamic=True)

    def remove(self, path: str) -> None:
        """Give one module its former forward back."""
        self.replaced.pop(path).remove()

    def remove_all(self) -> None:
        """Give every module its former forward back, last installed first."""
        for path in reversed(list(self.replaced)):
            self.remove(path)

    def drop_unused(self) -> None:
        """Give back the forwards in whose graphs nothing was rewritten: a guard check there buys nothing."""
        useful = {path for record in self.session.report.graphs if record.rewrites for path in record.region.paths}
        for path in [p for p, f in self.replaced.items() if p not in useful and f.captures]:
            self.remove(path)
        if not any(f.captures for f in self.replaced.values()):
            self.remove_all()
