"""The knapsack against every choice there is, and at the sizes of real models."""

from __future__ import annotations

import itertools
import math
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.quant.errors import BudgetError, PlanError
from weft.quant.knapsack import (
    Group,
    Option,
    curve,
    exact_curve,
    smallest_bytes,
    smallest_cost,
    solve,
    solve_for_cost,
    total_bytes,
    total_cost,
)

many = settings(max_examples=int(os.environ.get("WEFT_EXAMPLES", "300")), derandomize=True, deadline=None)
costs = st.one_of(st.integers(0, 40).map(lambda n: n / 8), st.floats(0, 10, allow_subnormal=True), st.just(0.0))
small_options = st.lists(st.tuples(st.integers(0, 30), costs), min_size=1, max_size=5)


@st.composite
def group_lists(draw: st.DrawFn) -> list[Group]:
    """Few groups with few options, many of them alike, so that ties are common."""
    found = []
    for i in range(draw(st.integers(1, 6))):
        options = draw(small_options)
        found.append(Group(f"layers.{i}", tuple(Option(f"f{k}", b, c) for k, (b, c) in enumerate(options))))
    return found


def every_choice(groups: list[Group]) -> list[tuple[int, float]]:
    """Bytes and cost of every choice."""
    picks = itertools.product(*(g.options for g in groups))
    return [(sum(o.bytes for o in p), math.fsum(o.cost for o in p)) for p in picks]


@many
@given(group_lists(), st.integers(0, 180))
def test_no_choice_within_the_budget_costs_less(groups: list[Group], budget: int) -> None:
    fitting = [c for b, c in every_choice(groups) if b <= budget]
    if not fitting:
        with pytest.raises(BudgetError) as refused:
            solve(groups, budget)
        assert refused.value.smallest == min(b for b, _ in every_choice(groups))
        assert refused.value.asked == budget
        return
    found = solve(groups, budget)
    assert found.exact
    assert found.bytes == total_bytes(groups, found.choice) <= budget
    assert found.cost == total_cost(groups, found.choice)
    assert found.cost == pytest.approx(min(fitting), rel=1e-9, abs=1e-12)
    assert found.bound == pytest.approx(found.cost, rel=1e-9, abs=1e-12)


@many
@given(group_lists(), st.floats(0, 20))
def test_no_choice_within_the_cost_is_smaller(groups: list[Group], limit: float) -> None:
    fitting = [b for b, c in every_choice(groups) if c <= limit]
    if not fitting:
        with pytest.raises(BudgetError, match="KL"):
            solve_for_cost(groups, limit)
        return
    found = solve_for_cost(groups, limit)
    assert found.cost == total_cost(groups, found.choice) <= limit
    assert found.bytes == total_bytes(groups, found.choice) == min(fitting)


@many
@given(group_lists(), st.randoms(use_true_random=False), st.integers(0, 180))
def test_the_order_of_groups_and_options_decides_nothing(groups: list[Group], rng: random.Random, budget: int) -> None:
    shuffled = [Group(g.path, tuple(rng.sample(g.options, len(g.options)))) for g in rng.sample(groups, len(groups))]
    budget = max(budget, smallest_bytes(groups))
    assert solve(groups, budget).choice == solve(shuffled, budget).choice
    assert list(solve(groups, budget).choice) == [g.path for g in groups]
    assert curve(groups).points == curve(shuffled).points


@many
@given(group_lists())
def test_more_bytes_never_cost_more(groups: list[Group]) -> None:
    least = smallest_bytes(groups)
    found = [solve(groups, least + extra).cost for extra in range(0, 60, 3)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found))


@many
@given(group_lists())
def test_each_point_of_the_curve_is_the_best_for_its_bytes(groups: list[Group]) -> None:
    found, every = curve(groups), every_choice(groups)
    assert found.points[0].bytes == smallest_bytes(groups)
    assert found.points[-1].cost == smallest_cost(groups)
    for i, point in enumerate(found.points):
        choice = found.choice(i)
        assert (point.bytes, point.cost) == (total_bytes(groups, choice), total_cost(groups, choice))
        assert point.cost <= min(c for b, c in every if b <= point.bytes) + 1e-9
        assert found.within(point.bytes) is not None
    assert found.within(found.points[0].bytes - 1) is None
    assert found.choice(-1) == found.choice(len(found.points) - 1)


@many
@given(group_lists(), st.integers(0, 180), st.integers(1, 3))
def test_with_too_few_states_the_bound_still_holds(groups: list[Group], budget: int, states: int) -> None:
    budget = max(budget, smallest_bytes(groups))
    found = solve(groups, budget, max_states=states)
    best = min(c for b, c in every_choice(groups) if b <= budget)
    assert found.bytes <= budget
    assert found.bound <= best + 1e-9 <= found.cost + 2e-9
    if found.exact:
        assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_the_exact_curve_lies_on_or_below_the_greedy_one() -> None:
    groups = model(blocks=4, seed=3)
    budgets = [p.bytes + 1_000_000 for p in curve(groups).points]
    exact = exact_curve(groups, [0, *budgets])
    assert all(a.bytes < b.bytes and a.cost > b.cost for a, b in itertools.pairwise(exact))
    assert all(min(s.cost for s in exact if s.bytes <= p.bytes + 1_000_000) <= p.cost for p in curve(groups).points)


def model(blocks: int, seed: int, alike: bool = True) -> list[Group]:
    """A decoder with seven linears a block and a cost for each format that falls with its bytes."""
    rng, groups = random.Random(seed), []
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    for i, (rows, columns) in itertools.product(range(blocks), shapes):
        size, damage = rows * (columns if alike else columns - rng.randrange(999)), rng.lognormvariate(-7, 1.5)
        factors = {"nf4": (0.516, 1.0), "nf4-feedback": (0.516, 0.6), "int8": (1.0, 0.05), "16-bit": (2.0, 0.0)}
        options = (Option(f, int(size * b), damage * c * rng.uniform(0.5, 1)) for f, (b, c) in factors.items())
        groups.append(Group(f"layers.{i}.linear{len(groups)}", tuple(options)))
    return groups


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_models_of_700_linears_are_solved_exactly(seed: int, alike: bool) -> None:
    groups = model(blocks=100, seed=seed, alike=alike)
    started = time.process_time()
    line = curve(groups)
    for share in (0.02, 0.1, 0.37, 0.8):
        budget = int(smallest_bytes(groups) * (1 + share))
        found, below = solve(groups, budget), line.within(budget)
        assert found.exact and found.bytes <= budget and below is not None
        assert found.cost <= line.points[below].cost
        inverse = solve_for_cost(groups, found.cost)
        assert inverse.bytes <= found.bytes and inverse.cost <= found.cost
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("a", ())], "a: options must be one or more"),
        ([Group("a", (Option("x", 1, 0.0), Option("x", 2, 0.0)))], "a: options must be"),
        ([Group("a", (Option("x", 1, 0.0),)), Group("a", (Option("x", 1, 0.0),))], "two groups have one path: a"),
        ([Group("a", (Option("x", -1, 0.0),))], "a: x takes -1 bytes"),
        ([Group("a", (Option("x", 1.5, 0.0),))], r"a: x takes 1\.5 bytes"),  # type: ignore[arg-type]
        ([Group("a", (Option("x", 1, -0.1),))], r"a: x costs -0\.1"),
        ([Group("a", (Option("x", 1, math.nan),))], "a: x costs nan"),
        ([Group("a", (Option("x", 1, math.inf),))], "a: x costs inf"),
    ],
)
def test_what_has_no_meaning_is_refused(groups: list[Group], message: str) -> None:
    for call in (lambda: solve(groups, 100), lambda: solve_for_cost(groups, 1.0), lambda: curve(groups)):
        with pytest.raises(PlanError, match=message):
            call()
