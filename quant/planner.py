"""From measured layers to a plan: limit the formats, solve, refine on the joint divergence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .budget import PrecisionBudget
from .errors import BudgetError
from .knapsack import Group, curve
from .layers import Layer
from .plan import PrecisionPlan
from .refine import Measure, Refined, refine, refine_for_kl
from .surrogate import Measured, formats_of

_CURVE_POINTS = 8
"""Whole choices that are measured along the curve where no budget was asked for."""


def make_plan(
    layers: Iterable[Layer],
    fixed_bytes: int,
    budget: PrecisionBudget | None = None,
    measure: Measure | None = None,
    max_measurements: int = 48,
    notes: Sequence[str] = (),
) -> PrecisionPlan:
    """Choose a format for every layer.

    Args:
        layers: every weight that may be quantized, measured, in the model's order.
        fixed_bytes: of all parameters and buffers that are none of ``layers``, as they are after rewriting.
        budget: None takes the smallest choice, and measures some along the curve.
        measure: the joint divergence on the calibration data of a choice (first path of each layer to a format's name);
            None plans with the layers' own sensitivities alone, and the plan has no ``kl``.
        max_measurements: how often ``measure`` is called at most.
        notes: for the plan, for example where the calibration data came from.

    Raises:
        BudgetError: no choice meets the budget; it names the smallest that can be met, ``fixed_bytes`` included.
        PlanError: the layers have no meaning, or ``measure`` gives NaN.
    """
    kept = tuple(layer.limited(budget.formats) if budget else layer for layer in layers)
    blank = PrecisionPlan(
        kept, tuple(layer.smallest.format for layer in kept), fixed_bytes, notes=tuple(notes), budget=budget
    )
    if measure is None:
        return blank.at(budget.memory, budget.max_kl) if budget else blank
    if budget is None:
        return _measured_curve(blank, measure, min(max_measurements, _CURVE_POINTS))
    return _refined(blank, budget, measure, max_measurements)


def uniform_starts(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Every layer in one format, for each format that is the smallest for most; layers without it in their smallest."""
    smallest = {g.path: min(g.options, key=lambda o: (o.bytes, o.cost, o.name)) for g in groups}
    counts = Counter(o.name for g in groups for o in g.options if o.bytes == smallest[g.path].bytes)
    names = [name for name, count in counts.items() if 2 * count > len(groups)]
    return [{g.path: name if name in g.by_name else smallest[g.path].name for g in groups} for name in names]


def _refined(plan: PrecisionPlan, budget: PrecisionBudget, measure: Measure, limit: int) -> PrecisionPlan:
    """The plan improved on measurements; starts beyond what may be measured are left out, the last ones first."""
    starts = uniform_starts(plan.groups)[: max(limit - 1, 0)]
    if budget.max_kl is not None:
        found = refine_for_kl(plan.groups, budget.max_kl, measure, starts, limit)
    else:
        assert budget.bytes is not None
        if budget.bytes < plan.smallest_bytes:
            raise BudgetError(plan.smallest_bytes, budget.bytes)
        found = refine(plan.groups, budget.bytes - plan.fixed_bytes, measure, starts, limit)
    if budget.bytes is not None and plan.fixed_bytes + found.bytes > budget.bytes:
        raise BudgetError(plan.fixed_bytes + found.bytes, budget.bytes)
    return _filled_in(plan, found, starts)


def _filled_in(plan: PrecisionPlan, found: Refined, starts: Sequence[Mapping[str, str]]) -> PrecisionPlan:
    kl = {m.formats: m.kl for m in found.measured}
    said = [f"{_most(s)} everywhere: KL {kl[f]:.3g}" for s in starts if (f := formats_of(plan.groups, s)) in kl]
    note = "; ".join([f"{found.measurements} choices were measured as a whole", *said])
    formats = formats_of(plan.groups, found.choice)
    return replace(plan, formats=formats, kl=found.kl, measured=found.measured, notes=(*plan.notes, note))


def _most(choice: Mapping[str, str]) -> str:
    return Counter(choice.values()).most_common(1)[0][0] if choice else "nothing"


def _measured_curve(plan: PrecisionPlan, measure: Measure, count: int) -> PrecisionPlan:
    """``plan`` with choices from the smallest on measured, evenly spaced along the curve."""
    line = curve(plan.groups)
    last = len(line.points) - 1
    picks = sorted({round(last * i / max(count, 1)) for i in range(count)})
    choices = [line.choice(i) for i in picks]
    measured = tuple(Measured(formats_of(plan.groups, c), float(measure(c))) for c in choices)
    kl = {m.formats: m.kl for m in measured}.get(plan.formats)
    note = f"no budget was asked for: the smallest choice; {len(measured)} choices along the curve were measured as a whole"
    return replace(plan, kl=kl, measured=measured, notes=(*plan.notes, note))
