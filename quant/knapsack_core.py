"""The multiple-choice knapsack by itself: one option a row, total weight within a limit, total value as small as can be.

A row's options on the lower convex hull of (weight, value) are all that the linear relaxation uses. Taking hull edges by
falling slope until one no longer fits gives the relaxation's optimum; that edge's slope is the price λ of a unit of
weight. Then, from that base, any other choice costs

    value ≥ base value − λ · (limit − base weight) + Σ d,      d = Δvalue + λ · Δweight ≥ 0

so options whose own d is above the gap to the best choice known are out, which leaves few rows. Those are combined by
dynamic programming over undominated (weight, value) states, rows with slopes closest to λ first: what is left at each
stage gains at most ``up`` a unit of room and loses at least ``down`` a unit of excess, and a state whose bound is above
the best known is dropped (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_ROUNDING = 1e-12
"""An improvement below this share of the gap between relaxation and greedy choice counts as rounding."""

_STEEPEST = 1e200
"""Slopes stay finite where two weights differ by next to nothing."""


@dataclass(frozen=True)
class Row:
    """The undominated options of one group, by rising weight and falling value."""

    weights: tuple[float, ...]
    values: tuple[float, ...]
    hull: tuple[int, ...]


@dataclass(frozen=True)
class Edge:
    """A step along one row's hull; more value is saved for a unit of weight the larger ``slope`` is."""

    slope: float
    row: int
    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Best:
    """An option for each row, and the least total value that any choice within the limit can have."""

    picks: tuple[int, ...]
    bound: float
    exact: bool


@dataclass(frozen=True)
class _Stage:
    """One row of the core: its options relative to the base, and the slopes of the rows behind it."""

    row: int
    options: NDArray[np.intp]
    weights: Floats
    values: Floats
    up: float = 0.0
    down: float = math.inf


def undominated(weights: list[float], values: list[float]) -> list[int]:
    """Indices by rising weight and strictly falling value; of equal options the first."""
    kept: list[int] = []
    for i in sorted(range(len(weights)), key=lambda i: (weights[i], values[i], i)):
        if not kept or values[i] < values[kept[-1]]:
            kept.append(i)
    return kept


def make_row(weights: list[float], values: list[float]) -> Row:
    """A row of undominated options with its lower hull."""
    hull: list[int] = []
    for i in range(len(weights)):
        while len(hull) > 1 and _slope(weights, values, hull[-2], hull[-1]) <= _slope(weights, values, hull[-1], i):
            hull.pop()
        hull.append(i)
    return Row(tuple(weights), tuple(values), tuple(hull))


def _slope(weights: list[float] | tuple[float, ...], values: list[float] | tuple[float, ...], a: int, b: int) -> float:
    return min((values[a] - values[b]) / (weights[b] - weights[a]), _STEEPEST)


def hull_edges(rows: list[Row]) -> list[Edge]:
    """Every hull edge, the steepest first; equal slopes by row."""
    edges = [
        Edge(_slope(row.weights, row.values, a, b), index, a, b, row.weights[b] - row.weights[a])
        for index, row in enumerate(rows)
        for a, b in zip(row.hull, row.hull[1:], strict=False)
    ]
    return sorted(edges, key=lambda e: (-e.slope, e.row, e.start))


def minimize(rows: list[Row], limit: float, max_states: int) -> Best:
    """The choice of least value within ``limit``, which the lightest options must fit.

    Exact (up to rounding) while the dynamic programme keeps at most ``max_states`` states; beyond, the states of the
    largest bounds are dropped and ``bound`` says how much better a choice may at most be.
    """
    base, price, room, rest = _relax(rows, limit)
    if not rest:
        return Best(tuple(base), _total(rows, base), True)
    incumbent = _fill(base, room, rest)
    saved = _total(rows, incumbent) - _total(rows, base)
    stages = _core(rows, base, price, gap=saved + price * room)
    picks, bound = _search(stages, room, saved, price, max_states)
    found = incumbent if picks is None else [*base]
    for row, option in (picks or {}).items():
        found[row] = option
    total = _total(rows, found)
    return Best(tuple(found), min(total, _total(rows, base) + bound), bound == math.inf)


def _total(rows: list[Row], picks: list[int]) -> float:
    return math.fsum(row.values[k] for row, k in zip(rows, picks, strict=True))


def _relax(rows: list[Row], limit: float) -> tuple[list[int], float, float, list[Edge]]:
    """Hull edges taken while they fit: the choice, the price of weight, the room left, the edges not taken."""
    picks, room = [0] * len(rows), limit - math.fsum(row.weights[0] for row in rows)
    edges = hull_edges(rows)
    for i, edge in enumerate(edges):
        if edge.weight > room:
            return picks, edge.slope, room, edges[i:]
        picks[edge.row] = edge.end
        room -= edge.weight
    return picks, 0.0, room, []


def _fill(base: list[int], room: float, edges: list[Edge]) -> list[int]:
    """``base`` with every further edge taken that fits and continues its row's own."""
    picks = [*base]
    for edge in edges:
        if edge.weight <= room and picks[edge.row] == edge.start:
            picks[edge.row] = edge.end
            room -= edge.weight
    return picks


def _core(rows: list[Row], base: list[int], price: float, gap: float) -> list[_Stage]:
    """The rows that can still change, those with a slope next to ``price`` first, and what the rows behind each offer."""
    ranked: list[tuple[float, int, _Stage]] = []
    for index, (row, pick) in enumerate(zip(rows, base, strict=True)):
        weights, values = np.array(row.weights) - row.weights[pick], np.array(row.values) - row.values[pick]
        kept = np.flatnonzero((values + price * weights < gap) | (weights == 0))
        others = kept[kept != pick]
        if others.size:
            distance = np.abs(_gains(values[others], weights[others]) - price).min()
            ranked.append((float(distance), index, _Stage(index, kept, weights[kept], values[kept])))
    stages = [stage for _, _, stage in sorted(ranked, key=lambda r: r[:2])]
    up, down = 0.0, math.inf
    for i in reversed(range(len(stages))):
        stages[i] = replace(stages[i], up=up, down=down)
        gains = _gains(stages[i].values, stages[i].weights)
        up = max((up, *gains[stages[i].weights > 0]))
        down = min((down, *gains[stages[i].weights < 0]))
    return stages


def _gains(values: Floats, weights: Floats) -> Floats:
    """Value saved a unit of weight, for changes to the base; finite, and of no meaning for no change."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.clip(-values / weights, -_STEEPEST, _STEEPEST)


def _search(
    stages: list[_Stage], room: float, best: float, price: float, max_states: int
) -> tuple[dict[int, int] | None, float]:
    """The changes to the base that beat ``best`` the most (None: nothing does), and the least bound that was dropped."""
    weights, values = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    found: tuple[int, int, int] | None = None
    dropped, rounding = math.inf, _ROUNDING * (best + price * room)
    for depth, stage in enumerate(stages):
        weights, values, parents, options = _combine(weights, values, stage)
        fitting = int(np.searchsorted(weights, room, side="right")) - 1
        if fitting >= 0 and values[fitting] < best - rounding:
            best, found = float(values[fitting]), (depth, int(parents[fitting]), int(options[fitting]))
        bounds = _bounds(weights, values, room, stage)
        keep = np.flatnonzero(bounds < best - rounding)
        if keep.size > max_states:
            by_bound = keep[np.argsort(bounds[keep], kind="stable")]
            dropped = min(dropped, float(bounds[by_bound[max_states]]))
            keep = np.sort(by_bound[:max_states])
        weights, values = weights[keep], values[keep]
        history.append((parents[keep].astype(np.int32), options[keep].astype(np.int16)))
        if not keep.size:
            break
    return None if found is None else _trace(stages, history, *found), dropped


def _combine(weights: Floats, values: Floats, stage: _Stage) -> tuple[Floats, Floats, NDArray, NDArray]:
    """Every state with every option of the stage, undominated, by rising weight; with parents and options."""
    all_weights = (weights[:, None] + stage.weights).ravel()
    all_values = (values[:, None] + stage.values).ravel()
    order = np.lexsort((all_values, all_weights))
    ordered = all_values[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    order = order[ordered < before]
    return all_weights[order], all_values[order], order // stage.weights.size, order % stage.weights.size


def _bounds(weights: Floats, values: Floats, room: float, stage: _Stage) -> Floats:
    """The least value that each state can come to with the rows behind ``stage``."""
    over = weights > room
    bounds = values - stage.up * (room - weights)
    bounds[over] = values[over] + stage.down * (weights[over] - room)
    return bounds


def _trace(
    stages: list[_Stage],
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]],
    depth: int,
    parent: int,
    option: int,
) -> dict[int, int]:
    picks = {stages[depth].row: int(stages[depth].options[option])}
    for i in range(depth - 1, -1, -1):
        parents, options = history[i]
        picks[stages[i].row] = int(stages[i].options[options[parent]])
        parent = int(parents[parent])
    return picks
