"""Finds a pattern in the canonical view of a graph: commutative, blind to casts, with the nearest miss remembered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from .expr import Expr, strip_casts
from .pattern import Pattern

COMMUTATIVE = frozenset(("add", "mul", "maximum"))

Bindings = dict[str, Any]


@dataclass
class Miss:
    """How far the best failed attempt came: operations that matched, where it stopped and why."""

    progress: int = 0
    node: fx.Node | None = None
    reason: str = ""

    def note(self, progress: int, target: Any, reason: str) -> None:
        """Keep this attempt if none came further."""
        if progress > self.progress:
            node = target.node if isinstance(target, Expr) else None
            self.progress, self.reason, self.node = progress, reason, node or self.node


@dataclass
class Match:
    """A pattern found: graph nodes (or constants, or None) for its wildcards, and nodes for its outputs.

    ``anchor`` is the node that the pattern's last operation matched: the root, but for casts taken in behind it, which may
    stand in another module.
    """

    pattern: Pattern
    outputs: tuple[fx.Node, ...]
    bindings: Bindings
    anchor: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    handed_on: frozenset[fx.Node] = frozenset()
    """Those of ``nodes`` that only hand an input on, such as a cast to the dtype that it has."""

    @property
    def root(self) -> fx.Node:
        """The node whose value the replacement computes first."""
        return self.outputs[0]

    def __getattr__(self, name: str) -> Any:
        """``match.x``: the node or constant bound to wildcard ``x``, or the value of variant ``x``."""
        bindings, pattern = self.__dict__.get("bindings", {}), self.__dict__.get("pattern")
        if name in bindings:
            return bindings[name]
        if pattern is not None and name in pattern.variant:
            return pattern.variant[name]
        if pattern is not None and name in pattern.wildcards:
            return None
        raise AttributeError(name)

    def inputs(self) -> list[fx.Node]:
        """The distinct nodes bound to wildcards."""
        found = dict[fx.Node, None]()
        map_arg(tuple(self.bindings.values()), lambda n: found.setdefault(n))
        return list(found)


def find(pattern: Pattern, target: Expr, miss: Miss) -> Iterator[tuple[tuple[fx.Node, ...], Bindings]]:
    """Every way in which ``pattern`` matches at ``target``: the nodes of its outputs, and its wildcards' bindings."""
    for state in _match(pattern.root, target, _State(), miss):
        nodes = tuple(state.seen[id(e)] for e in pattern.outputs if id(e) in state.seen)
        if len(nodes) == len(pattern.outputs):
            yield nodes, {k: _nodes(v) for k, v in state.bound.items()}


def _nodes(bound: Any) -> Any:
    """What a wildcard is bound to, with nodes in place of their expressions."""
    if isinstance(bound, slice):
        return slice(_nodes(bound.start), _nodes(bound.stop), _nodes(bound.step))
    if isinstance(bound, tuple | list):
        return tuple(_nodes(b) for b in bound)
    return bound.node if isinstance(bound, Expr) else bound


@dataclass(frozen=True)
class _State:
    bound: Bindings = field(default_factory=dict)
    seen: dict[int, fx.Node] = field(default_factory=dict)
    progress: int = 0


def _match(pattern: Any, target: Any, state: _State, miss: Miss) -> Iterator[_State]:
    if not isinstance(pattern, Expr):
        yield from _match_constant(pattern, target, state, miss)
    elif pattern.op == "?":
        yield from _bind(pattern.args[0], target, state, miss)
    else:
        yield from _match_operation(pattern, target, state, miss)


def _match_operation(pattern: Expr, target: Any, state: _State, miss: Miss) -> Iterator[_State]:
    outer = target
    target = strip_casts(target, only_widening=False)
    if not isinstance(target, Expr) or target.op != pattern.op or len(target.args) != len(pattern.args):
        miss.note(state.progress, target, f"expected {pattern.op}, found {_named(target)}")
        return
    node = outer.node if state.progress == 0 else target.node
    seen = {**state.seen, id(pattern): node} if node is not None else state.seen
    state = _State(state.bound, seen, state.progress + 1)
    orders = [target.args]
    if pattern.op in COMMUTATIVE:
        orders.append((target.args[1], target.args[0]))
    for args in orders:
        yield from _match_all(pattern.args, args, state, miss)


def _match_all(patterns: Any, targets: Any, state: _State, miss: Miss) -> Iterator[_State]:
    if not patterns:
        yield state
        return
    for inner in _match(patterns[0], targets[0], state, miss):
        yield from _match_all(patterns[1:], targets[1:], inner, miss)


def _match_constant(pattern: Any, target: Any, state: _State, miss: Miss) -> Iterator[_State]:
    if isinstance(pattern, tuple | list):
        if isinstance(target, tuple | list) and len(pattern) == len(target):
            yield from _match_all(tuple(pattern), tuple(target), state, miss)
        return
    numbers = isinstance(pattern, float | int) and isinstance(target, float | int)
    if (
        pattern is target
        or (numbers and _same_number(pattern, target))
        or (isinstance(pattern, str) and pattern == target)
    ):
        yield state
    else:
        miss.note(state.progress, target, f"expected the constant {pattern!r}, found {_named(target)}")


def _named(target: Any) -> str:
    """What was found, in a word: a whole expression may share parts with itself so often that writing it takes minutes."""
    if isinstance(target, Expr):
        return target.op
    return f"{len(target)} values" if isinstance(target, tuple | list) else repr(target)


def _same_number(a: float, b: float) -> bool:
    """Equal, or equal as far as people write out √2 and the like: below the precision of float32."""
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-7))


def _bind(name: str, target: Any, state: _State, miss: Miss) -> Iterator[_State]:
    target = strip_casts(target, only_widening=True)
    if isinstance(target, Expr) and target.node is None:
        miss.note(state.progress, target, f"{name!r} is no single value of the graph")
        return
    if name in state.bound:
        known = state.bound[name]
        if known is target or (not isinstance(target, Expr) and known == target):
            yield state
        else:
            miss.note(state.progress, target, f"{name!r} would stand for two different values")
        return
    yield _State({**state.bound, name: target}, state.seen, state.progress)
