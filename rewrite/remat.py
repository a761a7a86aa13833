"""Which values of a forward to save for the backward, and which to compute again: a minimum cut.

For each operation v, x(v) = 1 if the backward computes it again, which takes t(v) seconds. A value u of b(u) bytes must be at
hand, a(u) = 1, if the backward reads it or an operation that is computed again does; it is then saved unless the operation p(u)
that makes it is computed again. At a price of λ seconds a byte, the least

    Σ t(v) · x(v)  +  λ · Σ b(u) · [a(u) = 1 and x(p(u)) = 0]

is a minimum cut of a graph with an edge v → sink of capacity t(v), u → p(u) of capacity λ·b(u), and edges that cannot be cut
for what implies what. As λ grows the saved bytes shrink, from everything that the backward reads to the graph's inputs alone.
(The selection problem: Balinski 1970, Picard 1976. Recomputation as a cut: Jain et al., Checkmate, arXiv:1910.02653.)
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

Value = Any
INFINITE = float("inf")


@dataclass(frozen=True)
class Operation:
    """One operation of the forward.

    ``reads`` are the values that computing it needs, inputs of the graph left out: they are at hand. ``seconds`` is infinite
    for what must not be done twice.
    """

    seconds: float
    reads: tuple[Value, ...]


@dataclass(frozen=True)
class Problem:
    """The operations by name; of each value that operation which makes it, and its bytes (infinite: cannot be saved)."""

    operations: dict[str, Operation]
    producer: dict[Value, str]
    size: dict[Value, float]
    needed: tuple[Value, ...]


@dataclass(frozen=True)
class Choice:
    """What is saved, its bytes, and the time to compute the rest again."""

    saved: frozenset[Value]
    bytes: int
    seconds: float


CUTS = 15
"""Prices that :func:`frontier` asks at, at most: a few milliseconds each for a block."""
FINE = 1 / 32
"""Of the most bytes that are saved, what two choices may be apart without one being looked for between them."""
UNLIKE = 1e-3
"""By what share sizes are taken to differ there, so that of values that are worth the same one can be saved alone."""

WORTH = 1 / 50
"""Of what computing all again takes, what one operation less must save to be looked at."""


def choose(problem: Problem, price: float, unlike: float = 0.0) -> Choice:
    """The cheapest choice where a byte costs ``price`` seconds, more than none; up to ``unlike`` of its price more for values
    that are made later."""
    graph = nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    for name, operation in problem.operations.items():
        _edge(graph, ("op", name), "sink", operation.seconds)
        for value in operation.reads:
            _edge(graph, ("op", name), ("value", value), INFINITE)
    for i, (value, producer) in enumerate(problem.producer.items()):
        more = 1 + unlike * i / len(problem.producer)
        _edge(graph, ("value", value), ("op", producer), problem.size[value] * price * more)
    for value in problem.needed:
        _edge(graph, "source", ("value", value), INFINITE)
    _, (again, _) = nx.minimum_cut(graph, "source", "sink")
    saved = frozenset(
        v for v, producer in problem.producer.items() if ("value", v) in again and ("op", producer) not in again
    )
    redone = [o.seconds for name, o in problem.operations.items() if ("op", name) in again]
    return Choice(saved, int(sum(problem.size[v] for v in saved)), sum(redone))


def recomputed(problem: Problem, saved: frozenset[Value]) -> dict[str, set[Value]]:
    """The operations that are done again if no more than ``saved`` is, and which results of each are for."""
    found, pending = dict[str, set[Value]](), list(problem.needed)
    while pending:
        value = pending.pop()
        name = problem.producer.get(value)
        if value in saved or name is None:
            continue
        if name not in found:
            found[name] = set()
            pending += problem.operations[name].reads
        found[name].add(value)
    return found


def one_more(problem: Problem, choices: Sequence[Choice]) -> list[Choice]:
    """What sparing one operation more than a choice does comes to: what no price would choose, where a little room is left.

    Of those, each that is worth :data:`WORTH`, and faster than all that save no more bytes.
    """
    longest = max((c.seconds for c in choices), default=0.0)
    found = list[Choice]()
    for choice in choices:
        for results in recomputed(problem, choice.saved).values():
            size = sum(problem.size[v] for v in results)
            if size < INFINITE:
                saved = choice.saved | results
                seconds = sum(problem.operations[name].seconds for name in recomputed(problem, saved))
                if choice.seconds - seconds >= WORTH * longest:
                    found.append(Choice(saved, choice.bytes + int(size), seconds))
    kept, best = list[Choice](), INFINITE
    for choice in sorted([*choices, *found], key=lambda c: (c.bytes, c.seconds)):
        if choice.seconds < best:
            best = choice.seconds
            kept.append(choice)
    return [c for c in kept if c not in choices]


def _edge(graph: nx.DiGraph, start: Any, end: Any, capacity: float) -> None:
    # networkx takes an edge without capacity for one that cannot be cut
    if capacity == INFINITE:
        graph.add_edge(start, end)
    else:
        graph.add_edge(start, end, capacity=capacity)


def frontier(problem: Problem, cheapest: float, dearest: float) -> list[Choice]:
    """Different choices between those at these two prices, most bytes first; only those that are faster the more they save.

    Between the two that are furthest apart in bytes the next is looked for, at the price at which these cost the same: a third
    one that is worth it at any price is cheaper there.
    """
    found = [choose(problem, cheapest), choose(problem, dearest)]
    gaps, serial = [(found[1].bytes - found[0].bytes, 0, *found)], itertools.count(1)
    for _ in range(2, CUTS):
        if not gaps or -gaps[0][0] <= FINE * found[0].bytes:
            break
        apart, _, more, less = heapq.heappop(gaps)
        if more.seconds >= less.seconds:
            break
        between = choose(problem, (less.seconds - more.seconds) / -apart, UNLIKE)
        if less.bytes < between.bytes < more.bytes and more.seconds < between.seconds < less.seconds:
            found.append(between)
            for a, b in ((more, between), (between, less)):
                heapq.heappush(gaps, (b.bytes - a.bytes, next(serial), a, b))
    kept: list[Choice] = []
    for choice in sorted(found, key=lambda c: (-c.bytes, c.seconds)):
        while kept and choice.seconds <= kept[-1].seconds:
            kept.pop()
        if not kept or choice.bytes < kept[-1].bytes:
            kept.append(choice)
    return kept
