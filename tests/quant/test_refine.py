"""Refinement on measures with interactions, where costs that were measured alone mislead."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.quant.errors import BudgetError, PlanError
from weft.quant.knapsack import Group, Option, smallest_bytes, solve, total_bytes, total_cost
from weft.quant.refine import refine, refine_for_kl
from weft.quant.surrogate import Measured, corrected, formats_of

many = settings(max_examples=int(os.environ.get("WEFT_EXAMPLES", "40")), derandomize=True, deadline=None)
FORMATS = {"nf4": (5, 1.0), "nf4-feedback": (5, 0.6), "int8": (10, 0.05), "16-bit": (20, 0.0)}


def layers(count: int, seed: int) -> list[Group]:
    """Linears of three sizes with stand-alone costs over two orders of magnitude."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        size, damage = rng.choice((1, 1, 3)), rng.lognormvariate(-5, 1)
        options = (Option(f, size * b, damage * c) for f, (b, c) in FORMATS.items())
        found.append(Group(f"layers.{i}", tuple(options)))
    return found


class Truth:
    """A divergence with pairwise interactions of either sign, and a record of what was asked."""

    def __init__(self, groups: list[Group], seed: int, strength: float = 1.0) -> None:
        rng = random.Random(seed)
        self.groups, self.asked = groups, []
        pairs = [*itertools.combinations(range(len(groups)), 2)]
        self.pairs = [
            (a, b, strength * rng.uniform(-0.5, 1)) for a, b in rng.sample(pairs, min(len(pairs), len(groups)))
        ]

    def __call__(self, choice: Mapping[str, str]) -> float:
        self.asked.append(formats_of(self.groups, choice))
        return self.true(choice)

    def true(self, choice: Mapping[str, str]) -> float:
        costs = [g.by_name[choice[g.path]].cost for g in self.groups]
        together = math.fsum(w * math.sqrt(costs[a] * costs[b]) for a, b, w in self.pairs)
        return max(math.fsum(costs) + together, 0.0)


def uniform(groups: list[Group], name: str) -> dict[str, str]:
    return {g.path: name for g in groups}


@many
@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(0, 1), st.integers(3, 30), st.floats(0, 3))
def test_nothing_that_fits_and_was_measured_is_better(
    count: int, seed: int, share: float, limit: int, strength: float
) -> None:
    groups, truth = layers(count, seed), Truth(layers(count, seed), seed, strength)
    budget = int(smallest_bytes(groups) * (1 + share))
    starts = [uniform(groups, "nf4"), uniform(groups, "int8")]
    found = refine(groups, budget, truth, starts, max_measurements=limit)
    assert found.bytes == total_bytes(groups, found.choice) <= budget
    assert found.kl == truth.true(found.choice)
    assert len(truth.asked) == len(set(truth.asked)) == found.measurements <= limit
    assert tuple(m.formats for m in found.measured) == tuple(truth.asked)
    for start in [*starts, solve(groups, budget).choice]:
        if total_bytes(groups, start) <= budget:
            assert formats_of(groups, start) in truth.asked
            assert found.kl <= truth.true(start)
    again = refine(groups, budget, Truth(groups, seed, strength), starts, max_measurements=limit)
    assert again == found


@many
@given(st.integers(1, 10), st.integers(0, 10**6), st.floats(0.05, 1), st.integers(4, 40), st.floats(0, 3))
def test_the_fewest_bytes_below_a_divergence(count: int, seed: int, share: float, limit: int, strength: float) -> None:
    groups, truth = layers(count, seed), Truth(layers(count, seed), seed, strength)
    starts = [uniform(groups, "nf4"), uniform(groups, "int8")]
    max_kl = share * truth.true(starts[0])
    found = refine_for_kl(groups, max_kl, truth, starts, max_measurements=limit)
    assert found.kl == truth.true(found.choice) <= max_kl
    assert found.bytes == total_bytes(groups, found.choice)
    assert len(truth.asked) == len(set(truth.asked)) == found.measurements <= limit
    assert all(found.bytes <= total_bytes(groups, s) for s in starts if truth.true(s) <= max_kl)
    assert refine_for_kl(groups, max_kl, Truth(groups, seed, strength), starts, limit) == found


def best_of_all(groups: list[Group], truth: Truth, budget: int) -> float:
    """The true optimum of a small instance."""
    every = itertools.product(*([o.name for o in g.options] for g in groups))
    choices = (dict(zip((g.path for g in groups), names, strict=True)) for names in every)
    return min(truth.true(c) for c in choices if total_bytes(groups, c) <= budget)


def test_half_of_what_the_additive_model_misses_is_found() -> None:
    missed, left = 0.0, 0.0
    for seed in range(12):
        groups = layers(7, seed)
        truth, budget = Truth(groups, seed, strength=3.0), int(smallest_bytes(groups) * 1.6)
        best = best_of_all(groups, truth, budget)
        additive = truth.true(solve(groups, budget).choice)
        found = refine(groups, budget, truth, [uniform(groups, "nf4")], max_measurements=40)
        assert best <= found.kl <= additive
        missed, left = missed + additive - best, left + found.kl - best
    assert missed > 0
    assert left < 0.5 * missed


def test_a_pair_that_only_hurts_together_is_found_among_200_layers() -> None:
    groups = layers(200, 1)
    a, b = groups[17].path, groups[171].path

    def measure(choice: Mapping[str, str]) -> float:
        both = choice[a].startswith("nf4") and choice[b].startswith("nf4")
        return total_cost(groups, choice) + 5.0 * both

    budget = int(smallest_bytes(groups) * 1.1)
    start = uniform(groups, "nf4-feedback")
    found = refine(groups, budget, measure, [start], max_measurements=64)
    assert found.kl < 1.0 < 5.0 < measure(start)


def test_costs_are_corrected_toward_what_was_measured() -> None:
    groups = layers(20, 5)
    truth = [Group(g.path, tuple(Option(o.name, o.bytes, 3 * o.cost) for o in g.options)) for g in groups]
    choices = [uniform(groups, "nf4"), solve(groups, int(smallest_bytes(groups) * 1.3)).choice]
    measured = [Measured(formats_of(groups, c), total_cost(truth, c)) for c in choices]
    better = corrected(groups, measured)
    other = solve(groups, int(smallest_bytes(groups) * 1.6)).choice
    assert total_cost(better, other) == pytest.approx(total_cost(truth, other), rel=0.3)
    assert all(g.by_name["16-bit"].cost == 0.0 for g in better)
    assert corrected(groups, [Measured(measured[0].formats, math.inf)]) == groups
    assert corrected(groups, []) == groups


def test_known_measurements_are_not_repeated() -> None:
    groups = layers(8, 2)
    truth, budget = Truth(groups, 2), int(smallest_bytes(groups) * 1.5)
    first = refine(groups, budget, truth, [uniform(groups, "nf4")], max_measurements=10)
    asked = len(truth.asked)
    second = refine(groups, budget, truth, [uniform(groups, "nf4")], max_measurements=10, known=first.measured)
    assert len(truth.asked) == len(set(truth.asked)) == asked + second.measurements
    assert second.kl <= first.kl
    assert second.measured[: len(first.measured)] == first.measured


def test_a_choice_that_blows_up_is_only_a_bad_choice() -> None:
    groups = layers(6, 3)
    broken = groups[2].path
    budget = int(smallest_bytes(groups) * 1.5)

    def measure(choice: Mapping[str, str]) -> float:
        return math.inf if choice[broken] == "nf4" else total_cost(groups, choice)

    found = refine(groups, budget, measure, [uniform(groups, "nf4")], max_measurements=20)
    assert math.isfinite(found.kl) and found.choice[broken] != "nf4"


def test_what_cannot_be_met_is_said() -> None:
    groups = layers(4, 0)
    with pytest.raises(BudgetError, match=f"can be met is {smallest_bytes(groups):,}"):
        refine(groups, smallest_bytes(groups) - 1, Truth(groups, 0))
    with pytest.raises(BudgetError, match="KL") as refused:
        refine_for_kl(groups, 1e-3, lambda choice: 0.5 + total_cost(groups, choice), max_measurements=5)
    assert refused.value.smallest == 0.5
    with pytest.raises(PlanError, match="1 measurements are too few"):
        refine(groups, 10**6, Truth(groups, 0), [uniform(groups, "nf4")], max_measurements=1)
    with pytest.raises(PlanError, match="gave NaN"):
        refine(groups, 10**6, lambda choice: math.nan)
    with pytest.raises(PlanError, match=r"'int3' for layers\.0"):
        refine(groups, 10**6, Truth(groups, 0), [uniform(groups, "int3")])
