"""Budgets, plans, other plans from the same measurements, and what they say."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.quant.budget import PrecisionBudget, format_bytes, parse_memory
from weft.quant.errors import BudgetError, PlanError, PlanMismatchError
from weft.quant.knapsack import exact_curve
from weft.quant.plan import Layer, LayerOption, Measured, PrecisionPlan, layer_key
from weft.quant.planner import make_plan, uniform_starts

from .plans import PARTS, additive, any_plans, layer, model_layers

many = settings(max_examples=int(os.environ.get("WEFT_EXAMPLES", "200")), derandomize=True, deadline=None)


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GB", 6 * 10**9), ("6GiB", 6 * 2**30), ("500 MB", 5 * 10**8), (" 1.5tb ", 15 * 10**11), ("7 kib", 7168)]
    + [("12 B", 12), ("2G", 2 * 10**9), (".5MB", 500_000), (123, 123)],
)
def test_memory_is_read(text: str | int, count: int) -> None:
    assert parse_memory(text) == PrecisionBudget(memory=text).bytes == count


@pytest.mark.parametrize(
    "text", ["6", "GB", "six GB", "-6GB", "6 GB RAM", "", "0GB", 0, -1, True, 1.5, "1e3 MB", "9" * 400 + "GB"]
)
def test_memory_without_meaning_is_refused(text: Any) -> None:
    with pytest.raises(PlanError, match="memory must be"):
        PrecisionBudget(memory=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "limits memory or divergence"),
        ({"max_kl": -0.1}, "max_kl must be"),
        ({"max_kl": math.nan}, "max_kl must be"),
        ({"max_kl": "low"}, "max_kl must be"),
        ({"max_kl": 0.1, "formats": ()}, "formats must be"),
        ({"max_kl": 0.1, "formats": "nf4"}, "formats must be"),
        ({"max_kl": 0.1, "formats": ("nf4", "nf4")}, "formats must be"),
        ({"max_kl": 0.1, "formats": ("nf4", "int3")}, "no such format: 'int3'"),
    ],
)
def test_budgets_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PrecisionBudget(**options)


@many
@given(st.integers(1, 10**13))
def test_sizes_are_written_with_three_digits(count: int) -> None:
    number, unit = format_bytes(count).split()
    assert parse_memory(f"{float(number):.12f}{unit}") == pytest.approx(count, rel=5.1e-3)


def test_a_planted_layer_is_found() -> None:
    for seed in range(24):
        rng = random.Random(seed)
        planted = f"model.layers.{rng.randrange(4)}.{rng.choice([*PARTS])}"
        layers = model_layers(4, seed, {planted: 0.3})
        blank = make_plan(layers, 1000)
        room = next(la.option("16-bit").bytes - la.smallest.bytes for la in layers if la.path == planted)
        budget = PrecisionBudget(memory=blank.smallest_bytes + room)
        plan = make_plan(layers, 1000, budget, lambda choice, own=layers: additive(own, choice, 1.3))
        assert plan.choice[planted] in ("16-bit", "int8")
        assert plan.total_bytes <= blank.smallest_bytes + room
        assert plan.kl is not None and plan.kl < 0.1 < additive(layers, blank.choice)


def test_a_plan_says_what_was_chosen_and_why() -> None:
    layers = model_layers(3, 1, {"model.layers.1.mlp.down_proj": 0.31})
    plan = make_plan(
        layers, 1000, PrecisionBudget(memory=222_000), lambda c: additive(layers, c), notes=["random tokens"]
    )
    by_path = {c.module_path: c for c in plan.choices}
    found = by_path["model.layers.1.mlp.down_proj"]
    assert found.format == "16-bit" and found.bits == 16.0 and found.bytes == 32768 and found.error == 0.0
    assert re.fullmatch(r"KL \+0\.19 alone, 9\d % of the total; 16-bit costs 24\.3 KB", found.reason)
    assert by_path["lm_head"].reason == "read by others" and by_path["lm_head"].bytes == 128_000
    assert by_path["model.embed"].reason == "shares the weight of lm_head" and by_path["model.embed"].bytes == 0
    assert sum(c.bytes for c in plan.choices) + 1000 == plan.total_bytes <= 222_000
    assert [c.module_path for c in plan.choices] == [p for la in layers for p in la.paths]
    low = next(c for c in plan.choices if c.format == "nf4-feedback")
    assert re.fullmatch(r"KL \+0\.00\d+ alone, .* % of the total; int8 would cost .* KB", low.reason)
    text = str(plan)
    assert "note: random tokens" in text and "asked: at most 222 KB" in text and "← this plan" in text
    assert "read by others" in text and found.reason in text and "nf4-feedback everywhere: KL" in text


def test_layers_of_one_kind_share_a_line() -> None:
    text = str(make_plan(model_layers(8), 1000))
    assert "model.layers.0-7.mlp.up_proj" in text
    assert len(text.splitlines()) < 25
    assert "predicted, not measured" in text


@many
@given(any_plans())
def test_every_plan_can_be_read(plan: PrecisionPlan) -> None:
    assert str(plan)
    assert sum(c.bytes for c in plan.choices) + plan.fixed_bytes == plan.total_bytes
    assert plan.curve[0].bytes == plan.smallest_bytes <= plan.total_bytes
    assert all(a.kl >= b.kl and a.bytes <= b.bytes for a, b in zip(plan.curve, plan.curve[1:], strict=False))
    plan.check_layers(plan.fingerprint)


@many
@given(any_plans(), st.integers(0, 10**12), st.floats(0, 100))
def test_other_budgets_need_no_measuring(plan: PrecisionPlan, room: int, max_kl: float) -> None:
    memory = max(plan.smallest_bytes + room, 1)
    other = plan.at(memory=memory)
    assert other.total_bytes <= memory
    known = {m.formats: m.kl for m in plan.measured}
    fitting = [m for m in plan.measured if replace(plan, formats=m.formats).total_bytes <= memory]
    assert other.kl == known.get(other.formats)
    expected = other.kl if other.kl is not None else other.predicted
    assert all(expected <= m.kl * (1 + 1e-9) for m in fitting)
    good = [replace(plan, formats=m.formats).total_bytes for m in plan.measured if m.kl <= max_kl]
    try:
        below = plan.at(max_kl=max_kl)
    except BudgetError as error:
        assert error.smallest > max_kl and not good
        return
    assert (below.kl if below.kl is not None else below.predicted) <= max_kl
    assert all(below.total_bytes <= size for size in good)
    if below.total_bytes > 1:
        with pytest.raises(BudgetError):
            plan.at(memory=below.total_bytes - 1, max_kl=max_kl)


def test_predictions_follow_what_was_measured() -> None:
    layers = model_layers(6, 2)
    plan = make_plan(layers, 1000, None, lambda c: additive(layers, c, 2.5))
    assert plan.kl == additive(layers, plan.choice, 2.5)
    for share in (1.1, 1.4, 1.9):
        other = plan.at(memory=int(plan.smallest_bytes * share))
        assert other.predicted == pytest.approx(additive(layers, other.choice, 2.5), rel=0.1)


def test_a_budget_that_cannot_be_met_names_the_smallest() -> None:
    layers = model_layers(2)
    smallest = make_plan(layers, 1000).smallest_bytes
    measure = lambda c: 0.5 + additive(layers, c)  # noqa: E731
    for measured in (None, measure):
        with pytest.raises(BudgetError, match=f"can be met is {smallest:,}") as refused:
            make_plan(layers, 1000, PrecisionBudget(memory=smallest - 1), measured)
        assert (refused.value.smallest, refused.value.asked) == (smallest, smallest - 1)
    with pytest.raises(BudgetError, match="KL") as refused:
        make_plan(layers, 1000, PrecisionBudget(max_kl=0.1), measure)
    assert refused.value.smallest == 0.5
    found = make_plan(layers, 1000, PrecisionBudget(max_kl=0.002), lambda c: additive(layers, c))
    assert found.kl is not None and found.kl <= 0.002
    with pytest.raises(BudgetError):
        make_plan(layers, 1000, PrecisionBudget(memory=smallest, max_kl=0.002), lambda c: additive(layers, c))


def test_a_measured_plan_is_no_worse_than_uniform_4_bit() -> None:
    layers = model_layers(3, 4)

    def measure(choice: Mapping[str, str]) -> float:
        compound = sum(choice[la.path] == "nf4-feedback" for la in layers)
        return additive(layers, choice) * (1 + compound**2)  # feedback looks better alone, and is worse together

    plan = make_plan(layers, 1000, PrecisionBudget(memory=make_plan(layers, 1000).smallest_bytes), measure)
    assert plan.kl is not None
    assert plan.kl <= min(measure(s) for s in uniform_starts(plan.groups))
    assert set(plan.formats) == {"nf4", "16-bit"}
    assert "nf4 everywhere: KL" in plan.notes[-1]


def test_only_the_formats_asked_for_are_used() -> None:
    layers = model_layers(2)
    plan = make_plan(layers, 0, PrecisionBudget(memory="1MB", formats=("nf4", "int8")))
    assert set(plan.formats) == {"int8", "16-bit"} and plan.choice["lm_head"] == "16-bit"
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.q_proj: of fp4 none was measured"):
        make_plan(layers, 0, PrecisionBudget(memory="1MB", formats=("fp4",)))


def test_a_model_without_linears_has_a_plan() -> None:
    plan = make_plan((), 500, PrecisionBudget(memory=500), lambda choice: 0.0)
    assert (plan.total_bytes, plan.kl, plan.choices) == (500, 0.0, ())
    assert str(plan)


def test_a_plan_for_other_layers_is_refused() -> None:
    plan = make_plan(model_layers(2), 0)
    own = [*plan.fingerprint]
    plan.check_layers(reversed(own))
    assert layer_key("lm_head", torch.Size((1000, 64)), torch.bfloat16) in own
    cases: list[tuple[list[Any], str]] = [
        (own[1:], r"the plan has a linear model\.layers\.0\.self_attn\.q_proj, this model does not"),
        ([*own, ("extra", (1, 2), "float32")], "this model has a linear extra, the plan does not"),
        (
            [(own[0][0], (64, 65), "bfloat16"), *own[1:]],
            "q_proj is 64 × 65 bfloat16 in this model, 64 × 64 bfloat16 in",
        ),
        (
            [(own[0][0], (64, 64), "float16"), *own[1:]],
            "is 64 × 64 float16 in this model, 64 × 64 bfloat16 in the plan",
        ),
    ]
    for found, message in cases:
        with pytest.raises(PlanMismatchError, match=message):
            plan.check_layers(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ("nf4",)}, "1 formats were chosen for 2 layers"),
        ({"formats": ("fp4", "nf4")}, "a: fp4 was chosen"),
        ({"fixed_bytes": -1}, "fixed_bytes must be"),
        ({"kl": math.nan}, "NaN"),
        ({"measured": (Measured(("nf4", "nf4"), math.nan),)}, "NaN"),
        ({"measured": (Measured(("nf4",), 0.1),)}, "1 formats were chosen for 2"),
        ({"layers": (layer("a", (2, 2), 0.1), layer("a", (2, 2), 0.1))}, "one path: a"),
        (
            {"layers": (layer("a", (2, 2), 0.1), Layer(("b", "a"), (2,), "f", (LayerOption("nf4", 1, 0),)))},
            "one path: a",
        ),
        ({"layers": (layer("a", (2, 2), 0.1), layer("b", (2, 0), 0.1))}, "b: no weight has the shape"),
        ({"layers": (layer("a", (2, 2), 0.1), layer("b", (2, 2), math.nan))}, "b: nf4 costs nan"),
        ({"layers": (layer("a", (2, 2), 0.1), Layer((), (2,), "f", ()))}, "needs the paths"),
        (
            {"layers": (layer("a", (2, 2), 0.1), Layer(("b",), (2,), "f", (LayerOption("q4", 1, 0),)))},
            "b: no such format",
        ),
        (
            {"layers": (layer("a", (2, 2), 0.1), Layer(("b",), (2,), "f", (LayerOption("nf4", 1, 0, math.inf),)))},
            "error inf",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = PrecisionPlan((layer("a", (2, 2), 0.1), layer("b", (2, 2), 0.1)), ("nf4", "nf4"), 0)
    with pytest.raises(PlanError, match=message):
        replace(plan, **changes)


def test_the_curve_is_that_of_the_knapsack() -> None:
    plan = make_plan(model_layers(3), 1000)
    assert plan.curve[-1].kl == 0.0
    assert len(plan.curve) > 12
    exact = exact_curve(plan.groups, [p.bytes - 1000 for p in plan.curve])
    assert [s.cost for s in exact] == pytest.approx([p.kl for p in plan.curve], rel=1e-9, abs=1e-12)
    for i in (0, 5, -1):
        formats = tuple(plan.steps.choice(i)[la.path] for la in plan.layers)
        assert replace(plan, formats=formats).total_bytes == plan.curve[i].bytes
