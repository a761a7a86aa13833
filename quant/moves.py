"""The choices next to a choice: one group changed, or two, with a guess at what the change does, the best guess first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .knapsack import Group

Floats = NDArray[np.float64]
MOST = 512
"""Moves that are ranked at a time; far more than are ever measured from one choice."""


class Rank(Protocol):
    """How promising changes of bytes and of cost are: the smallest first, infinity for never."""

    def __call__(self, more_bytes: Floats, more_cost: Floats) -> Floats:
        """One number for each change."""
        ...


@dataclass(frozen=True)
class Moves:
    """Every change of one group: which group goes to which option, and what that changes."""

    groups: NDArray[np.intp]
    names: tuple[str, ...]
    bytes: Floats
    costs: Floats


def moves_from(groups: Sequence[Group], formats: Sequence[str]) -> Moves:
    """All changes of one group, in the groups' and options' order."""
    found = [
        (i, o.name, float(o.bytes - g.by_name[now].bytes), o.cost - g.by_name[now].cost)
        for i, (g, now) in enumerate(zip(groups, formats, strict=True))
        for o in g.options
        if o.name != now
    ]
    columns = list(zip(*found, strict=True)) or [(), (), (), ()]
    index = np.array(columns[0], dtype=np.intp)
    return Moves(index, tuple(columns[1]), np.array(columns[2], dtype=float), np.array(columns[3], dtype=float))


def neighbours(groups: Sequence[Group], formats: tuple[str, ...], rank: Rank) -> Iterator[tuple[str, ...]]:
    """Choices one or two changes away from ``formats``, the most promising first; ties by the groups' order."""
    moves = moves_from(groups, formats)
    lighter, heavier = np.flatnonzero(moves.bytes < 0), np.flatnonzero(moves.bytes > 0)
    singles = rank(moves.bytes, moves.costs)
    pairs = rank(
        (moves.bytes[lighter, None] + moves.bytes[heavier]).ravel(),
        (moves.costs[lighter, None] + moves.costs[heavier]).ravel(),
    )
    same = moves.groups[lighter, None] == moves.groups[heavier]
    pairs[same.ravel()] = np.inf
    for index in _smallest(np.concatenate((singles, pairs))):
        if index < len(singles):
            yield _changed(formats, moves, [int(index)])
            continue
        down, up = divmod(int(index) - len(singles), len(heavier))
        yield _changed(formats, moves, [int(lighter[down]), int(heavier[up])])


def _smallest(keys: Floats) -> Iterator[int]:
    count = min(MOST, keys.size)
    if not count:
        return
    bar = np.partition(keys, count - 1)[count - 1]
    near = np.flatnonzero((keys <= bar) & (keys < np.inf))
    yield from near[np.argsort(keys[near], kind="stable")][:MOST].tolist()


def _changed(formats: tuple[str, ...], moves: Moves, taken: Sequence[int]) -> tuple[str, ...]:
    found = list(formats)
    for i in taken:
        found[moves.groups[i]] = moves.names[i]
    return tuple(found)


def filled(groups: Sequence[Group], formats: tuple[str, ...], room: int) -> tuple[str, ...]:
    """``formats`` with further groups promoted where that fits into ``room`` bytes, the most cost a byte first."""
    moves = moves_from(groups, formats)
    saves = np.flatnonzero((moves.costs < 0) & (moves.bytes <= room))
    rate = moves.costs[saves] / np.maximum(moves.bytes[saves], 1.0)
    taken: dict[int, int] = {}
    for i in saves[np.argsort(rate, kind="stable")].tolist():
        if moves.groups[i] not in taken and moves.bytes[i] <= room:
            taken[int(moves.groups[i])] = i
            room -= int(max(moves.bytes[i], 0.0))
    return _changed(formats, moves, list(taken.values()))
