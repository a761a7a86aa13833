"""What the precision benchmarks compare: plain formats, plans of several sizes, and choices that measure nothing."""

from __future__ import annotations

import copy
import logging
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weft import PrecisionBudget, plan_precision
from weft.applying import apply_plan
from weft.passes.sensitivity import nudged
from weft.precision import store_as_planned
from weft.quant.budget import DEFAULT_FORMATS
from weft.quant.layers import Layer
from weft.quant.plan import PrecisionPlan

MORE_BYTES = (0.0, 0.02, 0.05, 0.10)
"""How much more than plain NF4 the plans may take."""
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says for each product that int8 goes through float16
Batches = Sequence[Mapping[str, Any]]


def with_formats(plan: PrecisionPlan, choose: Callable[[int, Layer], str]) -> PrecisionPlan:
    """``plan`` with other formats; layers that have no choice, or not that one, stay as they are."""
    wanted = [choose(i, la) for i, la in enumerate(plan.layers)]
    has = [{o.format for o in la.options} for la in plan.layers]
    formats = tuple(f if f in options else "16-bit" for f, options in zip(wanted, has, strict=True))
    return replace(plan, formats=formats, kl=None, budget=None)


def kept_in_order(plan: PrecisionPlan, order: list[int], room: int) -> PrecisionPlan:
    """NF4 but for the first layers of ``order`` that fit into ``room`` bytes in 16 bits."""
    kept = set[int]()
    for i in order:
        candidate = with_formats(plan, lambda j, _, i=i: "16-bit" if j in kept | {i} else "nf4")
        if candidate.total_bytes <= room:
            kept.add(i)
    return with_formats(plan, lambda j, _: "16-bit" if j in kept else "nf4")


@dataclass(frozen=True)
class Choices:
    """What is compared, by name; the plan without a budget that holds every sensitivity; seconds a plan took on average."""

    plans: dict[str, PrecisionPlan]
    curve: PrecisionPlan
    seconds: float


def choices(model: nn.Module, calibration: Batches, sizes: Sequence[float] = MORE_BYTES) -> Choices:
    """Plan for every size, relative to plain NF4's."""
    started = time.monotonic()
    plan = plan_precision(model, calibration, formats=DEFAULT_FORMATS, measurements=8)
    uniform = {f: with_formats(plan, lambda _, la, f=f: f) for f in ("nf4", "nf4-feedback", "int8")}
    found = {"plain NF4": uniform["nf4"], "NF4 with feedback": uniform["nf4-feedback"], "int8": uniform["int8"]}
    plain = uniform["nf4"].total_bytes
    for more in sizes:
        budget = PrecisionBudget(memory=int(plain * (1 + more)))
        found[f"weft, +{more:.0%}"] = plan_precision(model, calibration, budget=budget)
    seconds = (time.monotonic() - started) / (1 + len(sizes))
    most = f"+{sizes[-1]:.0%}"
    room = int(plain * (1 + sizes[-1]))
    found[f"weft, {most}, from the curve"] = plan.at(memory=room)
    free = [i for i, la in enumerate(plan.layers) if not la.pinned]
    shuffled = random.Random(1).sample(free, len(free))
    ends = sorted(free, key=lambda i: min(i - free[0], free[-1] - i))
    found[f"random layers in 16 bits, {most}"] = kept_in_order(plan, shuffled, room)
    found[f"first and last layers in 16 bits, {most}"] = kept_in_order(plan, ends, room)
    return Choices(found, plan, seconds)


def interval(values: Tensor) -> dict[str, float]:
    """Mean and half the 95 % confidence interval over sequences."""
    return {"mean": float(values.mean()), "half": float(1.96 * values.std() / math.sqrt(len(values)))}


def part_of(path: str) -> str:
    """The part of a model that a weight is in: what comes before the first number in its path, else its module's."""
    return re.split(r"\.\d+(?:\.|$)", path)[0] if re.search(r"\.\d", path) else path.rpartition(".")[0]


def parts_of(plan: PrecisionPlan) -> list[str]:
    """In the model's order."""
    return list(dict.fromkeys(part_of(layer.path) for layer in plan.layers if not layer.pinned))


def only_in(plan: PrecisionPlan, part: str) -> PrecisionPlan:
    """NF4 for the weights of one part, 16 bits for all others."""
    return with_formats(plan, lambda _, la: "nf4" if part_of(la.path) == part else "16-bit")


def stored_copy(model: nn.Module, plan: PrecisionPlan, calibration: Batches) -> Any:
    """A copy of ``model`` that stores its weights as ``plan`` says."""
    other = copy.deepcopy(model)
    apply_plan(other, plan, store_as_planned(other, plan, calibration))
    return other


@torch.no_grad()
def rounded_otherwise(model: nn.Module, plan: PrecisionPlan) -> Any:
    """A copy of ``model`` in 16 bits that differs in last bits of one weight only: how far rounding alone goes."""
    other = copy.deepcopy(model)
    first = next(layer.path for layer in plan.layers if not layer.pinned)
    weight = other.get_submodule(first).get_parameter("weight")
    weight.copy_(nudged(weight))
    return other


def plan_record(plan: PrecisionPlan) -> dict[str, Any]:
    """What an arm's record says of its plan."""
    return {"bytes": plan.total_bytes, "formats": Counter(plan.formats), "calibration_kl": plan.kl}


def measured_record(choices: Choices) -> dict[str, Any]:
    """The curve, and for every weight and format the relative error of its product and what it does alone."""
    curve = choices.curve
    layers = [
        {"path": layer.path, "shape": layer.shape, "outliers": layer.outliers,
         "options": {o.format: {"bytes": o.bytes, "error": o.error, "alone": o.sensitivity} for o in layer.options}}
        for layer in curve.layers if not layer.pinned
    ]  # fmt: skip
    points = [{"bytes": p.bytes, "kl": p.kl} for p in curve.curve]
    return {"planning_seconds": round(choices.seconds, 1), "notes": curve.notes, "curve": points, "layers": layers}
