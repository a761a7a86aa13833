"""The minimum cut against every set of operations there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.rewrite.remat import INFINITE, Choice, Operation, Problem, choose, frontier, one_more, recomputed


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A random graph of up to eight operations, each with one output or several.

    Some values cannot be saved: their operations can be done again. Some operations cannot be done again: what they make can
    be saved.
    """
    operations, producer, size = dict[str, Operation](), dict[str, str](), dict[str, float]()
    for i in range(draw(st.integers(1, 8))):
        reads = tuple(sorted(draw(st.sets(st.sampled_from(sorted(producer)), max_size=3)))) if producer else ()
        once = draw(st.integers(0, 5)) == 0
        operations[f"op{i}"] = Operation(INFINITE if once else draw(st.integers(0, 9)), reads)
        for k in range(draw(st.integers(1, 3))):
            producer[f"v{i}.{k}"] = f"op{i}"
            fixed = not once and draw(st.integers(0, 3)) == 0
            size[f"v{i}.{k}"] = INFINITE if fixed else draw(st.integers(0, 9))
    needed = draw(st.lists(st.sampled_from(sorted(producer)), min_size=1, unique=True))
    return Problem(operations, producer, size, tuple(needed))


def every_choice(problem: Problem) -> Iterator[tuple[float, float]]:
    """Bytes and seconds of every set of operations that are done again."""
    names = list(problem.operations)
    for mask in range(1 << len(names)):
        redone = {n for i, n in enumerate(names) if mask >> i & 1}
        wanted = {*problem.needed, *(v for n in redone for v in problem.operations[n].reads)}
        saved = [v for v in wanted if problem.producer[v] not in redone]
        yield sum(problem.size[v] for v in saved), sum(problem.operations[n].seconds for n in redone)


def least(problem: Problem, cost: Callable[[float, float], float]) -> float:
    """The least cost of all."""
    return min(cost(*choice) for choice in every_choice(problem))


def assert_feasible(problem: Problem, choice: Choice) -> None:
    """From what is saved everything that is needed can be made, in the time and bytes that the choice states."""
    wanted, redone = list(problem.needed), set[str]()
    while wanted:
        value = wanted.pop()
        name = problem.producer[value]
        if value not in choice.saved and name not in redone:
            redone.add(name)
            wanted += problem.operations[name].reads
    assert sum(problem.operations[n].seconds for n in redone) == choice.seconds < INFINITE
    assert sum(problem.size[v] for v in choice.saved) == choice.bytes < INFINITE


@given(problems(), st.sampled_from([0.25, 1.0, 4.0, 1000.0]))
def test_the_cut_costs_the_least_of_all_sets(problem: Problem, price: float) -> None:
    choice = choose(problem, price)
    assert_feasible(problem, choice)
    assert choice.seconds + price * choice.bytes == least(problem, lambda b, t: t + price * b if b < INFINITE else b)


@given(problems())
def test_the_frontier_falls_in_bytes_and_rises_in_time(problem: Problem) -> None:
    found = frontier(problem, 0.01, 1e4)
    for before, after in pairwise(found):
        assert after.bytes < before.bytes and after.seconds > before.seconds
    assert found[-1].bytes == least(problem, lambda b, t: b if t < INFINITE else t)
    assert found[0].seconds == least(problem, lambda b, t: t if b < INFINITE else b)


@given(problems())
def test_no_choice_has_both_fewer_bytes_and_less_time_than_one_of_the_frontier(problem: Problem) -> None:
    for choice in frontier(problem, 0.01, 2.0):
        better = [(b, t) for b, t in every_choice(problem) if b <= choice.bytes and t <= choice.seconds]
        assert all((b, t) == (choice.bytes, choice.seconds) for b, t in better)


def test_one_output_of_a_call_is_saved_without_the_others() -> None:
    problem = Problem(
        {"op": Operation(INFINITE, ())}, {"wide": "op", "narrow": "op"}, {"wide": 9, "narrow": 1}, ("narrow",)
    )
    assert choose(problem, 1.0) == Choice(frozenset({"narrow"}), 1, 0)


@pytest.mark.parametrize(("price", "saved", "seconds"), [(1e-3, {"a", "b", "c"}, 0), (1e3, set(), 6)])
def test_a_chain_is_saved_whole_or_not_at_all(price: float, saved: set[str], seconds: float) -> None:
    names = ("a", "b", "c")
    operations = {n: Operation(i + 1, names[i - 1 : i] if i else ()) for i, n in enumerate(names)}
    choice = choose(Problem(operations, {n: n for n in names}, dict.fromkeys(names, 4), names), price)
    assert choice.saved == saved and choice.seconds == seconds and math.isfinite(choice.bytes)


def test_one_operation_less_is_looked_at_where_no_price_would_choose_it() -> None:
    """Of two that read x, the wide one is worth more a byte; the narrow one, of two results, is spared where only it fits."""
    operations = {"wide": Operation(6.0, ()), "narrow": Operation(1.0, ()), "idle": Operation(0.01, ())}
    producer = {"w": "wide", "n": "narrow", "m": "narrow", "i": "idle"}
    size = {"w": 10.0, "n": 2.0, "m": 1.0, "i": 1.0}
    problem = Problem(operations, producer, size, tuple(producer))
    choices = [Choice(frozenset(producer), 14, 0.0), Choice(frozenset("w"), 10, 1.01), Choice(frozenset(), 0, 7.01)]
    found = one_more(problem, choices)
    assert Choice(frozenset("nm"), 3, 6.01) in found
    assert all(c.saved != frozenset("i") for c in found), "it is worth too little"
    assert recomputed(problem, frozenset("n")) == {"wide": {"w"}, "narrow": {"m"}, "idle": {"i"}}
