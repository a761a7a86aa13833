"""Which option for each group: the least total cost within a number of bytes, or the fewest bytes within a cost.

A group is one weight (of one linear, or of several that share it) and is called by a path; its options are formats with
their exact bytes and a cost, such as the divergence that the format alone causes. Costs add up here: what that misses,
:mod:`weft.quant.refine` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import BudgetError, PlanError
from .knapsack_core import Best, Row, hull_edges, make_row, minimize, undominated

MAX_STATES = 20_000
"""States that the exact solver keeps at a time; models of 700 linears need some hundreds."""

_SLACK = 1e-12
"""Sums of costs depend on their order: so much more is let into the search, and what is really above a limit taken out."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group's weight."""

    name: str
    bytes: int
    cost: float


@dataclass(frozen=True)
class Group:
    """A weight that is stored in one of several ways."""

    path: str
    options: tuple[Option, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Option]:
        """The options by their name."""
        return {option.name: option for option in self.options}


@dataclass(frozen=True)
class Solution:
    """A choice of one option a group: its bytes and cost, and how far from the best it can be.

    ``bound`` is the least that any choice within the limit can have of what was minimized (cost, or bytes); ``exact``
    says that the choice reaches it.
    """

    choice: dict[str, str]
    bytes: int
    cost: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class Breakpoint:
    """One point of a curve: the totals after the group at ``path`` went to ``name`` (the first point: nothing did)."""

    bytes: int
    cost: float
    path: str = ""
    name: str = ""


@dataclass(frozen=True)
class Curve:
    """Totals from the fewest bytes to the least cost, each point one change away from the one before it.

    Every point is the best choice for its own bytes. Between two points a better choice than the lower one may exist,
    which :func:`solve` finds.
    """

    start: dict[str, str]
    points: tuple[Breakpoint, ...]

    def choice(self, index: int) -> dict[str, str]:
        """The option of each group at the point ``index``."""
        found = dict(self.start)
        for point in self.points[1 : index % len(self.points) + 1]:
            found[point.path] = point.name
        return found

    def within(self, budget: int) -> int | None:
        """The index of the last point of at most ``budget`` bytes; None if even the first has more."""
        fitting = [i for i, point in enumerate(self.points) if point.bytes <= budget]
        return fitting[-1] if fitting else None


def check_groups(groups: Sequence[Group]) -> None:
    """Refuse what has no meaning.

    Raises:
        PlanError: two groups of one path, a group without options, two options of one name, negative or fractional
            bytes, a cost that is negative, infinite or NaN.
    """
    if len({g.path for g in groups}) != len(groups):
        raise PlanError(f"two groups have one path: {_repeated(g.path for g in groups)}")
    for group in groups:
        names = [o.name for o in group.options]
        if not names or len(set(names)) != len(names):
            raise PlanError(f"{group.path}: options must be one or more of different names, not {names}")
        for option in group.options:
            _check_option(group.path, option)


def _check_option(path: str, option: Option) -> None:
    if not isinstance(option.bytes, int) or option.bytes < 0:
        raise PlanError(f"{path}: {option.name} takes {option.bytes!r} bytes: a whole number from 0 on is needed")
    if not (math.isfinite(option.cost) and option.cost >= 0):
        raise PlanError(f"{path}: {option.name} costs {option.cost!r}: a finite number from 0 on is needed")


def _repeated(paths: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(p for p in paths if p in seen or seen.add(p))


def total_bytes(groups: Sequence[Group], choice: Mapping[str, str]) -> int:
    """The bytes of ``choice``."""
    return sum(g.by_name[choice[g.path]].bytes for g in groups)


def total_cost(groups: Sequence[Group], choice: Mapping[str, str]) -> float:
    """The costs of ``choice``, added up."""
    return math.fsum(g.by_name[choice[g.path]].cost for g in groups)


def smallest_bytes(groups: Sequence[Group]) -> int:
    """The fewest bytes that any choice takes."""
    return sum(min(o.bytes for o in g.options) for g in groups)


def smallest_cost(groups: Sequence[Group]) -> float:
    """The least cost that any choice has."""
    return math.fsum(min(o.cost for o in g.options) for g in groups)


def solve(groups: Sequence[Group], budget: int, max_states: int = MAX_STATES) -> Solution:
    """The choice of least cost that takes at most ``budget`` bytes, the same for any order of the groups.

    Args:
        budget: bytes.
        max_states: that the exact solver may keep; where it needs more, ``Solution.bound`` says how good the choice is.

    Raises:
        BudgetError: the smallest choice takes more bytes; it names how many.
        PlanError: see :func:`check_groups`.
    """
    check_groups(groups)
    if smallest_bytes(groups) > budget:
        raise BudgetError(smallest_bytes(groups), budget)
    rows, names = _rows(groups, by_cost=False)
    return _solution(groups, names, minimize(rows, budget, max_states))


def solve_for_cost(groups: Sequence[Group], max_cost: float, max_states: int = MAX_STATES) -> Solution:
    """The choice of fewest bytes that costs at most ``max_cost``.

    Raises:
        BudgetError: every choice costs more; it names the least cost.
        PlanError: see :func:`check_groups`.
    """
    check_groups(groups)
    if not smallest_cost(groups) <= max_cost:
        raise BudgetError(smallest_cost(groups), max_cost, "KL")
    rows, names = _rows(groups, by_cost=True)
    limit = max_cost * (1 + _SLACK)
    while (found := _solution(groups, names, minimize(rows, limit, max_states))).cost > max_cost:
        limit = max(limit - max(found.cost - max_cost, math.ulp(limit)), smallest_cost(groups))
    return found


def curve(groups: Sequence[Group]) -> Curve:
    """All breakpoints from the fewest bytes to the least cost, along the lower hulls of the groups.

    Raises:
        PlanError: see :func:`check_groups`.
    """
    check_groups(groups)
    rows, names = _rows(groups, by_cost=False)
    paths = sorted(g.path for g in groups)
    costs = [row.values[0] for row in rows]
    taken = sum(int(row.weights[0]) for row in rows)
    points = [Breakpoint(taken, math.fsum(costs))]
    for edge in hull_edges(rows):
        costs[edge.row] = rows[edge.row].values[edge.end]
        taken += int(edge.weight)
        points.append(Breakpoint(taken, math.fsum(costs), paths[edge.row], names[edge.row][edge.end]))
    lightest = {path: own[0] for path, own in zip(paths, names, strict=True)}
    return Curve({g.path: lightest[g.path] for g in groups}, tuple(points))


def exact_curve(groups: Sequence[Group], budgets: Iterable[int]) -> list[Solution]:
    """:func:`solve` for each budget that can be met, from the smallest; those that gain nothing are left out."""
    found: list[Solution] = []
    for budget in sorted(b for b in set(budgets) if b >= smallest_bytes(groups)):
        solution = solve(groups, budget)
        if not found or solution.cost < found[-1].cost:
            found.append(solution)
    return found


def _rows(groups: Sequence[Group], by_cost: bool) -> tuple[list[Row], list[list[str]]]:
    """The groups as rows of a knapsack, ordered by path so that ties fall alike for any order of the groups."""
    rows, names = [], []
    for group in sorted(groups, key=lambda g: g.path):
        options = sorted(group.options, key=lambda o: o.name)
        sizes, costs = [float(o.bytes) for o in options], [float(o.cost) for o in options]
        weights, values = (costs, sizes) if by_cost else (sizes, costs)
        kept = undominated(weights, values)
        rows.append(make_row([weights[i] for i in kept], [values[i] for i in kept]))
        names.append([options[i].name for i in kept])
    return rows, names


def _solution(groups: Sequence[Group], names: list[list[str]], best: Best) -> Solution:
    paths = sorted(g.path for g in groups)
    chosen = {path: own[k] for path, own, k in zip(paths, names, best.picks, strict=True)}
    choice = {g.path: chosen[g.path] for g in groups}
    return Solution(choice, total_bytes(groups, choice), total_cost(groups, choice), best.bound, best.exact)
