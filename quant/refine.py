"""Improve a choice of formats on the divergence that it really causes.

Costs measured one group at a time do not add up exactly: quantizing two layers together may do more harm than both alone,
or less. So whole choices are measured, few of them, for each costs a pass over the calibration data:

1. every start, for example uniform NF4 and the knapsack's choice;
2. then by turns the knapsack's choice under costs corrected by all measurements so far (:mod:`weft.quant.surrogate`),
   and the most promising swap around the best choice so far: one group demoted, one or more promoted.

What is returned was measured, and nothing measured is better: no start that fits is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import BudgetError, PlanError
from .knapsack import (
    Group,
    check_groups,
    smallest_bytes,
    smallest_cost,
    solve,
    solve_for_cost,
    total_bytes,
)
from .moves import Floats, filled, neighbours
from .surrogate import Measured, corrected, formats_of

Measure = Callable[[Mapping[str, str]], float]
"""The joint divergence of a choice (path of a group to name of an option) on the calibration data."""
_SEARCH_STATES = 1000
"""The costs searched under are a guess: the search under them need not be exact."""


@dataclass(frozen=True)
class Refined:
    """The best measured choice, and everything that was measured on the way (what was known before, first)."""

    choice: dict[str, str]
    bytes: int
    kl: float
    measurements: int
    measured: tuple[Measured, ...]


class _Meter:
    """Counts measurements and remembers them: no choice is measured twice."""

    def __init__(self, groups: Sequence[Group], measure: Measure, limit: int, known: Sequence[Measured]) -> None:
        self.groups, self.limit, self.count = groups, limit, 0
        self.known = {m.formats: m for m in known}
        self._measure = measure

    @property
    def measured(self) -> tuple[Measured, ...]:
        return tuple(self.known.values())

    def __call__(self, formats: tuple[str, ...]) -> None:
        if formats in self.known:
            return
        if self.count >= self.limit:
            raise PlanError(f"{self.limit} measurements are too few: every start must be measured")
        self.count += 1
        kl = float(self._measure({g.path: f for g, f in zip(self.groups, formats, strict=True)}))
        if math.isnan(kl):
            raise PlanError(f"measurement {self.count} gave NaN for the formats {', '.join(sorted(set(formats)))}")
        self.known[formats] = Measured(formats, kl)

    def bytes(self, formats: tuple[str, ...]) -> int:
        return sum(g.by_name[f].bytes for g, f in zip(self.groups, formats, strict=True))

    def best(self, key: Callable[[Measured], tuple[float, ...] | None]) -> Measured | None:
        """The measured choice of the smallest key, the earliest of equal ones; those of key None are left out."""
        keyed = [(k, m) for m in self.measured if (k := key(m)) is not None]
        return min(keyed, key=lambda pair: pair[0])[1] if keyed else None

    def first_new(self, proposals: Iterator[tuple[str, ...]]) -> tuple[str, ...] | None:
        return next((p for p in proposals if p not in self.known), None)

    def refined(self, best: Measured) -> Refined:
        choice = best.choice(self.groups)
        return Refined(choice, total_bytes(self.groups, choice), best.kl, self.count, self.measured)


def refine(
    groups: Sequence[Group],
    budget: int,
    measure: Measure,
    starts: Sequence[Mapping[str, str]] = (),
    max_measurements: int = 64,
    known: Sequence[Measured] = (),
) -> Refined:
    """The choice of least measured divergence that was found within ``budget`` bytes.

    Args:
        groups: with the bytes and the stand-alone cost of each option.
        budget: bytes; starts that take more are left out.
        measure: the true joint divergence of a choice.
        starts: measured first, beside the knapsack's own choice.
        max_measurements: how often ``measure`` is called at most.
        known: measurements from before; they are not repeated, and their choices compete.

    Raises:
        BudgetError: no choice takes so few bytes.
        PlanError: ``measure`` gives NaN, ``max_measurements`` does not suffice for the starts, a start names a group or
            option that is not there, or see :func:`weft.quant.knapsack.check_groups`.
    """
    first = formats_of(groups, solve(groups, budget).choice)
    meter = _Meter(groups, measure, max_measurements, known)
    for start in dict.fromkeys([*_checked(groups, starts), first]):
        if meter.bytes(start) <= budget:
            meter(start)

    def within(m: Measured) -> tuple[float, ...] | None:
        return (m.kl, meter.bytes(m.formats)) if meter.bytes(m.formats) <= budget else None

    while (best := meter.best(within)) and meter.count < max_measurements:
        proposal = meter.first_new(_within_budget(meter, best, budget))
        if proposal is None:
            break
        meter(proposal)
    assert best is not None
    return meter.refined(meter.best(within) or best)


def _within_budget(meter: _Meter, best: Measured, budget: int) -> Iterator[tuple[str, ...]]:
    """What to measure next: by turns the corrected knapsack's choice or a swap, then more swaps."""
    groups = corrected(meter.groups, meter.measured)
    room = budget - meter.bytes(best.formats)
    if meter.count % 2 == 0:
        yield formats_of(groups, solve(groups, budget, _SEARCH_STATES).choice)

    def rank(more_bytes: Floats, more_cost: Floats) -> Floats:
        return np.where(more_bytes <= room, more_cost, np.inf)

    for swap in neighbours(groups, best.formats, rank):
        yield filled(groups, swap, budget - meter.bytes(swap))
        yield swap


def refine_for_kl(
    groups: Sequence[Group],
    max_kl: float,
    measure: Measure,
    starts: Sequence[Mapping[str, str]] = (),
    max_measurements: int = 64,
    known: Sequence[Measured] = (),
) -> Refined:
    """The choice of fewest bytes that was found with a measured divergence of at most ``max_kl``.

    Arguments and errors are those of :func:`refine`; the last measurement is kept for the choice of least cost until
    something meets ``max_kl``.

    Raises:
        BudgetError: not even the choice of least cost meets ``max_kl``; it names the least divergence measured.
    """
    check_groups(groups)
    meter = _Meter(groups, measure, max_measurements, known)
    safest = formats_of(groups, solve_for_cost(groups, smallest_cost(groups)).choice)
    for start in dict.fromkeys(_checked(groups, starts)):
        meter(start)

    def below(m: Measured) -> tuple[float, ...] | None:
        return (meter.bytes(m.formats), m.kl) if m.kl <= max_kl else None

    misses = 0
    while True:
        best = meter.best(below)
        if best is None and safest in meter.known:
            raise BudgetError(min(m.kl for m in meter.measured), max_kl, "KL")
        left = max_measurements - meter.count
        if best is not None and (left <= 0 or meter.bytes(best.formats) == smallest_bytes(groups)):
            return meter.refined(best)
        last = best is None and left <= 1
        around = _toward_kl(meter, max_kl, misses) if best is None else _below_kl(meter, best, max_kl)
        proposal = safest if last else meter.first_new(around)
        if proposal is None and best is not None:
            return meter.refined(best)
        meter(proposal or safest)
        misses += 1


def _toward_kl(meter: _Meter, max_kl: float, misses: int) -> Iterator[tuple[str, ...]]:
    """What to measure while nothing meets ``max_kl``: the fewest bytes that should, ever more cautious."""
    groups = corrected(meter.groups, meter.measured)
    for step in range(misses, misses + 8):
        target = max(smallest_cost(groups), max_kl * 0.8**step)
        yield formats_of(groups, solve_for_cost(groups, target, _SEARCH_STATES).choice)


def _below_kl(meter: _Meter, best: Measured, max_kl: float) -> Iterator[tuple[str, ...]]:
    """What to measure once ``best`` meets ``max_kl``: by turns the corrected knapsack's choice or a swap, then swaps."""
    groups = corrected(meter.groups, meter.measured)
    most = meter.bytes(best.formats)
    if meter.count % 2 == 0 and smallest_cost(groups) <= max_kl:
        found = formats_of(groups, solve_for_cost(groups, max_kl, _SEARCH_STATES).choice)
        if meter.bytes(found) < most:
            yield found

    def rank(more_bytes: Floats, more_cost: Floats) -> Floats:
        excess = best.kl + more_cost - max_kl
        return np.where(more_bytes < 0, np.where(excess <= 0, more_bytes / most, excess), np.inf)

    yield from neighbours(groups, best.formats, rank)


def _checked(groups: Sequence[Group], starts: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """The starts in the groups' order."""
    for start in starts:
        for group in groups:
            if start.get(group.path) not in group.by_name:
                raise PlanError(
                    f"a start takes {start.get(group.path)!r} for {group.path}, which has {list(group.by_name)}"
                )
    return [formats_of(groups, start) for start in starts]
