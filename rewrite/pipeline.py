"""Runs passes over a captured graph, in order, with its invariants checked after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import fx

from . import graph as g
from .driver import Outcome, Verifier, apply_rule
from .errors import VerificationError
from .report import GraphRecord
from .rule import RewriteRule
from .siblings import SiblingRule, apply_sibling_rule


@runtime_checkable
class Pass(Protocol):
    """Anything with a name that changes a graph module in place and says what it did. Its fields are its options."""

    @property
    def name(self) -> str:
        """As reports print it."""
        ...

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Change ``module.graph``; module paths in the outcome are relative to the captured region."""
        ...


@dataclass(frozen=True)
class Rules:
    """A pass that applies rules to a fixed point, one after the other."""

    name: str
    rules: tuple[RewriteRule | SiblingRule, ...]

    def run(self, module: fx.GraphModule, verifier: Verifier | None) -> Outcome:
        """Apply each rule wherever it matches."""
        outcome = Outcome()
        for rule in self.rules:
            if isinstance(rule, SiblingRule):
                outcome.extend(apply_sibling_rule(module, rule, verifier))
            else:
                outcome.extend(apply_rule(module, rule, verifier))
        return outcome


def run_pipeline(
    module: fx.GraphModule, passes: Sequence[Pass], verifier: Verifier | None, record: GraphRecord
) -> None:
    """Run ``passes`` over ``module`` and the graphs inside it, filling ``record``.

    Raises:
        VerificationError: a pass left a malformed graph, or changed the type of an output.
    """
    captured = _operations(module)
    record.region.nodes_before += len(captured)
    for each in passes:
        started, before = time.perf_counter(), len(record.rewrites)
        for part in list(g.subgraphs(module)):
            _run_pass(each, part, verifier, record)
        left = [n for n in captured if not n._erased]
        if len(record.rewrites) > before:  # a pass without any, such as one that drops what is idle, replaces nothing
            record.region.nodes_covered += len(captured) - len(left)
        captured = left
        record.seconds[each.name] = record.seconds.get(each.name, 0.0) + time.perf_counter() - started
    record.region.nodes_after += len(_operations(module))


def _run_pass(each: Pass, module: fx.GraphModule, verifier: Verifier | None, record: GraphRecord) -> None:
    before = _output_types(module)
    outcome = each.run(module, verifier)
    record.rewrites += outcome.rewrites
    record.refusals += outcome.refusals
    record.misses += outcome.misses
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"pass {each.name!r} left a malformed graph: {error}") from error
    after = _output_types(module)
    if before != after:
        raise VerificationError(f"pass {each.name!r} changed the outputs from {before} to {after}")
    module.recompile()


def _output_types(module: fx.GraphModule) -> list[Any]:
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    found = [g.tensor_of(n) for n in output.all_input_nodes]
    return [None if t is None else (t.dtype, t.ndim, t.device) for t in found]


def _operations(module: fx.GraphModule) -> list[fx.Node]:
    return [n for part in g.subgraphs(module) for n in part.graph.nodes if n.op in ("call_function", "call_method")]
