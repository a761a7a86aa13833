"""Which format each linear is stored in, with everything that was measured, so that other budgets need no new measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import plan_file, plan_text
from .budget import DEFAULT_FORMATS, PrecisionBudget, format_bytes, parse_memory
from .errors import BudgetError, PlanError, PlanMismatchError
from .knapsack import (
    Curve,
    Group,
    check_groups,
    curve,
    smallest_bytes,
    smallest_cost,
    solve,
    solve_for_cost,
)
from .layers import BitChoice, CurvePoint, Layer, LayerKey, LayerOption, check_layer, layer_key
from .surrogate import Measured, corrected, formats_of

__all__ = [
    "BitChoice",
    "CurvePoint",
    "Layer",
    "LayerKey",
    "LayerOption",
    "Measured",
    "PrecisionBudget",
    "PrecisionPlan",
    "format_bytes",
    "layer_key",
    "parse_memory",
]


@dataclass(frozen=True)
class PrecisionPlan:
    """A format for every linear of a model.

    Attributes:
        layers: every weight that could be quantized, in the model's order, with its options.
        formats: the choice, one for each of ``layers``.
        fixed_bytes: of all parameters and buffers that are none of ``layers``, as they are after rewriting.
        kl: the divergence measured for the choice; None if this very choice was not measured.
        measured: whole choices and their divergences; predictions are fitted to them.
        notes: where the calibration data came from, what was tried.
        budget: what was asked for.
    """

    layers: tuple[Layer, ...]
    formats: tuple[str, ...]
    fixed_bytes: int
    kl: float | None = None
    measured: tuple[Measured, ...] = ()
    notes: tuple[str, ...] = ()
    budget: PrecisionBudget | None = None

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The layers as the knapsack sees them, with stand-alone sensitivities."""
        return tuple(layer.group for layer in self.layers)

    @cached_property
    def expected(self) -> tuple[Group, ...]:
        """``groups`` with sensitivities fitted to what was measured jointly."""
        return tuple(corrected(self.groups, self.measured))

    @property
    def choice(self) -> dict[str, str]:
        """The format of every linear by its path."""
        return {p: f for layer, f in zip(self.layers, self.formats, strict=True) for p in layer.paths}

    @cached_property
    def choices(self) -> tuple[BitChoice, ...]:
        """One record a linear, in the model's order."""
        return tuple(plan_text.bit_choices(self))

    @property
    def total_bytes(self) -> int:
        """All parameters and buffers after rewriting."""
        chosen = zip(self.layers, self.formats, strict=True)
        return self.fixed_bytes + sum(layer.option(f).bytes for layer, f in chosen)

    @property
    def smallest_bytes(self) -> int:
        """The least that any choice takes."""
        return self.fixed_bytes + smallest_bytes(self.groups)

    @property
    def predicted(self) -> float:
        """The divergence expected of the choice: sensitivities, fitted to what was measured, added up."""
        return math.fsum(g.by_name[f].cost for g, f in zip(self.expected, self.formats, strict=True))

    @cached_property
    def steps(self) -> Curve:
        """The curve as changes of one layer each; ``steps.choice(i)`` is what ``curve[i]`` stands for."""
        return curve(self.expected)

    @cached_property
    def curve(self) -> tuple[CurvePoint, ...]:
        """Memory of the whole model and the divergence expected there, from the smallest choice on."""
        return tuple(CurvePoint(self.fixed_bytes + p.bytes, p.cost) for p in self.steps.points)

    @property
    def fingerprint(self) -> tuple[LayerKey, ...]:
        """Path, shape and dtype of every linear that the plan is for."""
        return tuple(layer_key(p, layer.shape, layer.dtype) for layer in self.layers for p in layer.paths)

    def check_layers(self, found: Iterable[LayerKey]) -> None:
        """Refuse to be applied to other layers than those that the plan was made for.

        Args:
            found: :func:`weft.quant.layers.layer_key` of each linear of the model.

        Raises:
            PlanMismatchError: it names the first difference.
        """
        theirs = {path: (shape, dtype) for path, shape, dtype in found}
        for path, shape, dtype in self.fingerprint:
            if path not in theirs:
                raise PlanMismatchError(f"the plan has a linear {path or '(top)'}, this model does not")
            there = theirs.pop(path)
            if there != (shape, dtype):
                raise PlanMismatchError(
                    f"{path or '(top)'} is {_words(*there)} in this model, {_words(shape, dtype)} in the plan"
                )
        for path in theirs:
            raise PlanMismatchError(f"this model has a linear {path or '(top)'}, the plan does not")

    def at(self, memory: str | int | None = None, max_kl: float | None = None) -> PrecisionPlan:
        """The plan for another budget, from the same measurements.

        A choice that was measured is taken where it does no worse than what is predicted of the best unmeasured one;
        ``kl`` of the result says which it is: None is a prediction, which ``max_kl`` then holds for.

        Raises:
            BudgetError: no choice meets the budget; it names the smallest that can be met.
            PlanError: the budget has no meaning.
        """
        budget = PrecisionBudget(memory, max_kl, self.budget.formats if self.budget else DEFAULT_FORMATS)
        formats = self._smallest_below(budget.max_kl) if budget.max_kl is not None else self._best_within(budget.bytes)
        kl = {m.formats: m.kl for m in self.measured}.get(formats)
        plan = replace(self, formats=formats, kl=kl, budget=budget)
        if budget.bytes is not None and plan.total_bytes > budget.bytes:
            raise BudgetError(plan.total_bytes, budget.bytes)
        return plan

    def _best_within(self, memory: int | None) -> tuple[str, ...]:
        assert memory is not None
        if memory < self.smallest_bytes:
            raise BudgetError(self.smallest_bytes, memory)
        room = memory - self.fixed_bytes
        solution = solve(self.expected, room)
        known = {m.formats: m.kl for m in self.measured if self._bytes(m.formats) <= room}
        found = formats_of(self.groups, solution.choice)
        best = min(known, key=lambda f: (known[f], self._bytes(f)), default=found)
        return best if known.get(best, math.inf) <= known.get(found, solution.cost) else found

    def _smallest_below(self, max_kl: float) -> tuple[str, ...]:
        known = {m.formats: m.kl for m in self.measured}
        good = [f for f, kl in known.items() if kl <= max_kl]
        limit, least = max_kl, smallest_cost(self.expected)
        while limit >= least:
            solution = solve_for_cost(self.expected, limit)
            found = formats_of(self.groups, solution.choice)
            if known.get(found, 0.0) <= max_kl:
                good.append(found)
                break
            limit = math.nextafter(0.98 * min(limit, solution.cost), -math.inf)  # measured, and worse than predicted
        if not good:
            raise BudgetError(min([least, *known.values()] if least > max_kl else known.values()), max_kl, "KL")
        return min(good, key=self._bytes)

    def _bytes(self, formats: Sequence[str]) -> int:
        return sum(g.by_name[f].bytes for g, f in zip(self.groups, formats, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, lossless, for JSON."""
        return plan_file.to_dict(self)

    def to_json(self, path: str | Path) -> None:
        """Write the plan to ``path``."""
        Path(path).write_text(plan_file.to_text(self), encoding="utf-8")

    @classmethod
    def from_dict(cls, data: Any, source: str = "the plan") -> PrecisionPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            PlanError: ``data`` is no plan; it names ``source`` and what is wrong.
        """
        return plan_file.from_dict(cls, data, source)

    @classmethod
    def from_json(cls, source: str | Path) -> PrecisionPlan:
        """Read a plan from a file, or from JSON text.

        Raises:
            PlanError: the file is missing, corrupt, truncated, or no plan; it names the file and what is wrong.
        """
        text, name = plan_file.read(source)
        return cls.from_dict(plan_file.parse(text, name), name)

    def __str__(self) -> str:
        return plan_text.to_text(self)


def _words(shape: tuple[int, ...], dtype: str) -> str:
    return f"{' × '.join(map(str, shape))} {dtype}"


def _check(plan: PrecisionPlan) -> None:
    """Refuse a plan that contradicts itself."""
    for layer in plan.layers:
        check_layer(layer)
    check_groups(plan.groups)
    paths = [p for layer in plan.layers for p in layer.paths]
    if len(set(paths)) != len(paths):
        raise PlanError(f"two layers have one path: {next(p for p in paths if paths.count(p) > 1)}")
    for formats in (plan.formats, *(m.formats for m in plan.measured)):
        if len(formats) != len(plan.layers):
            raise PlanError(f"{len(formats)} formats were chosen for {len(plan.layers)} layers")
        for group, format in zip(plan.groups, formats, strict=True):
            if format not in group.by_name:
                raise PlanError(f"{group.path}: {format} was chosen, which is none of {', '.join(group.by_name)}")
    if isinstance(plan.fixed_bytes, bool) or not isinstance(plan.fixed_bytes, int) or plan.fixed_bytes < 0:
        raise PlanError(f"fixed_bytes must be a whole number from 0 on, not {plan.fixed_bytes!r}")
    if any(math.isnan(kl) for kl in (plan.kl or 0.0, *(m.kl for m in plan.measured))):
        raise PlanError("a measured divergence is NaN")
