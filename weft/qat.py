"""Quantization-aware training: train with weights as they will be stored, then store them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from weft.api import optimize, undo
from weft.passes.defaults import default_passes
from weft.passes.fake_quantize import FakeQuantize
from weft.quant.formats import FORMATS
from weft.quant.layers import Layer
from weft.quant.modules import acts_as
from weft.quant.plan import PrecisionPlan
from weft.rewrite.errors import PrecisionError
from weft.rewrite.pipeline import Pass
from weft.wrappers import plan_for

PLAIN = {"nf4-searched": "nf4", "nf4-feedback": "nf4"}
"""Formats whose codes are searched are trained, and stored, with the plain ones: training finds the better weights."""


def qat_passes(model: nn.Module, plan: PrecisionPlan, *, activations: bool = False) -> tuple[Pass, ...]:
    """The passes with which ``optimize(model, mode="train", passes=...)`` trains for ``plan``.

    Weights stay in 16 or 32 bits and are trained (or frozen under adapters) as ever; every product reads them as the plan
    will store them. :func:`convert` then stores them.

    Args:
        model: the one that will be optimized, with its adapters.
        plan: of this model, or of the one inside its adapters.
        activations: round the inputs of int8 linears to int8 as well, as they will be.

    Raises:
        PrecisionError: the plan is for another model.
    """
    parameters = dict(model.named_parameters())
    chosen = planned_formats(model, plan)
    kept = {name: FORMATS[f] for name, f in chosen.items() if FORMATS[f].kind != "dense"}
    formats = {id(parameters[name]): f for name, f in kept.items()}
    turned = frozenset(id(parameters[name]) for name in kept if _lies_by_columns(model, name))
    return (FakeQuantize(formats, turned, activations), *default_passes("train"))


def convert(model: nn.Module, plan: PrecisionPlan, **options: Any) -> nn.Module:
    """Store the weights that were trained for ``plan``, and optimize the model again.

    Args:
        options: further arguments of ``optimize``, such as ``mode``.

    Raises:
        PrecisionError: the plan is for another model, or a weight became NaN.
    """
    if hasattr(model, "rewrite_report"):
        undo(model)
    return optimize(model, precision=plain(plan, model), **options)


def planned_formats(model: nn.Module, plan: PrecisionPlan) -> dict[str, str]:
    """The format of each parameter, by its name in ``model``, which may have adapters that the plan's model had not."""
    plan = _fitting(model, plan)
    names = {name.removesuffix(".weight"): name for name, _ in model.named_parameters()}
    pairs = zip(plan.layers, plan.formats, strict=True)
    return {names[layer.path]: PLAIN.get(f, f) for layer, f in pairs}


def _fitting(model: nn.Module, plan: PrecisionPlan) -> PrecisionPlan:
    """``plan`` with the paths that its weights have in ``model``."""
    plan = plan_for(model, plan)
    there = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
    missing = next((layer.path for layer in plan.layers if layer.path not in there), None)
    if missing is not None:
        raise PrecisionError(f"the plan is for another model: it has {missing}, this model does not")
    return plan


def plain(plan: PrecisionPlan, model: nn.Module) -> PrecisionPlan:
    """``plan`` with plain formats, for the names that parameters have in ``model``."""
    plan = _fitting(model, plan)
    layers = tuple(_plain_layer(layer) for layer in plan.layers)
    return replace(plan, layers=layers, formats=tuple(PLAIN.get(f, f) for f in plan.formats), measured=(), kl=None)


def _plain_layer(layer: Layer) -> Layer:
    options = {PLAIN.get(o.format, o.format): replace(o, format=PLAIN.get(o.format, o.format)) for o in layer.options}
    own = {o.format: o for o in layer.options}
    return replace(layer, paths=layer.paths[:1], options=tuple((options | own)[f] for f in options))


def _lies_by_columns(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return acts_as(model.get_submodule(path), attribute) == "columns"
