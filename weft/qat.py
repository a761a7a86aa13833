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
from weft.wrappers import innermost

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
    return {name: PLAIN.get(f, f) for name, f in zip(_names(model, plan), plan.formats, strict=True)}


def _names(model: nn.Module, plan: PrecisionPlan) -> list[str]:
    """What the plan's layers are called in ``model``, in the plan's order."""
    root = innermost(model)
    prefix = next(path for path, m in model.named_modules() if m is root)
    names = {_without_adapters(n.removeprefix(f"{prefix}.")): n for n, _ in model.named_parameters()}
    names |= {_without_adapters(n): n for n, _ in model.named_parameters()}
    missing = next((layer.path for layer in plan.layers if layer.path not in names), None)
    if missing is not None:
        raise PrecisionError(f"the plan is for another model: it has {missing}, this model does not")
    return [names[layer.path] for layer in plan.layers]


def _without_adapters(name: str) -> str:
    return name.replace(".base_layer.", ".").removesuffix(".weight")


def plain(plan: PrecisionPlan, model: nn.Module) -> PrecisionPlan:
    """``plan`` with plain formats, for the names that parameters have in ``model``."""
    pairs = zip(plan.layers, _names(model, plan), strict=True)
    layers = tuple(_plain_layer(layer, name.removesuffix(".weight")) for layer, name in pairs)
    return replace(plan, layers=layers, formats=tuple(PLAIN.get(f, f) for f in plan.formats), measured=(), kl=None)


def _plain_layer(layer: Layer, path: str) -> Layer:
    options = {PLAIN.get(o.format, o.format): replace(o, format=PLAIN.get(o.format, o.format)) for o in layer.options}
    own = {o.format: o for o in layer.options}
    return replace(layer, paths=(path,), options=tuple((options | own)[f] for f in options))


def _lies_by_columns(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    return acts_as(model.get_submodule(path), attribute) == "columns"
