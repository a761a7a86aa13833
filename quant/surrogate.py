"""What each option really costs, as far as joint measurements tell.

Costs measured one group at a time add up to a first guess at the divergence of a whole choice. Measuring whole choices
shows where that guess is wrong. Given costs c and measured choices X (a row of zeros and ones each) with divergences y,
the corrected costs are the posterior mean of a linear model y = Xθ + noise with the prior

    θ ~ N(c, diag((spread · s)²) + shared² · G ∘ s sᵀ + common² · c cᵀ),    s = c + floor,  G = 1 within a group, else 0

that is: all costs may be off by one common factor (errors compound, or cancel), those of one group by another, and each
may be off by itself in proportion to its size. Without the second, an option that was never measured in a whole choice
would look better than its neighbour that was, whenever whole choices do more harm than their parts. A group's largest
option stays at zero if it costs nothing: it is the weight as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .knapsack import Group, Option

Floats = NDArray[np.float64]
_SPREAD, _SHARED, _COMMON, _FLOOR = 0.2, 0.45, 1.0, 0.1
_NOISE, _RESOLUTION = 0.02, 1e-5
"""How far a measurement may be off the linear model: a share of itself, and of the largest number in sight."""
_NOTHING = 1e-12
"""Costs below this share of a measured divergence explain nothing of it."""


@dataclass(frozen=True)
class Measured:
    """A choice, one option name a group in the groups' order, and the divergence measured for it."""

    formats: tuple[str, ...]
    kl: float

    def choice(self, groups: Sequence[Group]) -> dict[str, str]:
        """The option of each group."""
        return {g.path: name for g, name in zip(groups, self.formats, strict=True)}


def formats_of(groups: Sequence[Group], choice: Mapping[str, str]) -> tuple[str, ...]:
    """``choice`` in the groups' order."""
    return tuple(choice[g.path] for g in groups)


def corrected(groups: Sequence[Group], measured: Sequence[Measured]) -> list[Group]:
    """``groups`` with costs that fit ``measured``, none below zero; unchanged without measurements, or if all are zero.

    Measurements that are infinite count for nothing here: no sum of costs explains them.
    """
    used = [m for m in measured if math.isfinite(m.kl)]
    prior = np.array([o.cost for g in groups for o in g.options])
    if not used or not prior.max(initial=0.0) > _NOTHING * max(m.kl for m in used):
        return list(groups)
    chosen = _incidence(groups, used)
    largest = [max(o.bytes for o in g.options) for g in groups]
    sure = [o.cost == 0 and o.bytes == most for g, most in zip(groups, largest, strict=True) for o in g.options]
    group_of = np.repeat(np.arange(len(groups)), [len(g.options) for g in groups])
    found = _posterior(prior, np.array(sure), group_of, chosen, np.array([m.kl for m in used]))
    costs = iter(np.maximum(found, 0.0).tolist())
    return [Group(g.path, tuple(Option(o.name, o.bytes, next(costs)) for o in g.options)) for g in groups]


def _incidence(groups: Sequence[Group], measured: Sequence[Measured]) -> Floats:
    columns = {(g.path, o.name): i for i, (g, o) in enumerate((g, o) for g in groups for o in g.options)}
    chosen = np.zeros((len(measured), len(columns)))
    for row, m in enumerate(measured):
        chosen[row, [columns[g.path, name] for g, name in zip(groups, m.formats, strict=True)]] = 1
    return chosen


def _posterior(
    prior: Floats, sure: NDArray[np.bool_], group_of: NDArray[np.intp], chosen: Floats, kl: Floats
) -> Floats:
    scale = max(prior.max(), kl.max())
    prior, kl = prior / scale, kl / scale
    floor = _FLOOR * np.median(prior[prior > 0])
    size = np.where(sure, 0.0, prior + floor)
    guess = chosen @ prior
    first = np.flatnonzero(np.diff(group_of, prepend=-1))
    of_groups = np.add.reduceat(chosen * size, first, axis=1)[:, group_of]
    covariance = chosen * (_SPREAD * size) ** 2 + _SHARED**2 * of_groups * size + _COMMON**2 * np.outer(guess, prior)
    noise = _NOISE * np.maximum(kl, guess) + _RESOLUTION
    gram = covariance @ chosen.T + np.diag(noise**2)
    return scale * (prior + covariance.T @ np.linalg.solve(gram, kl - guess))
