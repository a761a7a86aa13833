"""What others wrap around a model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from weft.quant.plan import Measured, PrecisionPlan


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers such as PEFT's, whose ``generate`` calls it; else ``model`` itself."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def own_path(path: str) -> str:
    """The path of a module in the model inside PEFT's wrappers: ``base_model.model.h.0.mlp.base_layer`` is ``h.0.mlp``."""
    inner = ".".join(part for part in path.split(".") if part != "base_layer")
    return inner.removeprefix("base_model.model.")


def plan_for(model: nn.Module, plan: PrecisionPlan) -> PrecisionPlan:
    """``plan`` with the paths that its weights have in ``model``: the one it was made for, or the same with or without adapters.

    Of a plan for a model with adapters, those are left out where ``model`` has none. Weights that ``model`` lacks keep the
    plan's paths, for whoever checks that it fits.
    """
    there = [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False)]
    if {p for layer in plan.layers for p in layer.paths} <= set(there):
        return plan
    by_own = {own_path(path): path for path in there}
    layers = [replace(la, paths=tuple(by_own.get(own_path(p), p) for p in la.paths)) for la in plan.layers]
    known = set(there)
    kept = [i for i, layer in enumerate(layers) if not layer.pinned or known.intersection(layer.paths)]
    measured = tuple(Measured(tuple(m.formats[i] for i in kept), m.kl) for m in plan.measured)
    return replace(
        plan, layers=tuple(layers[i] for i in kept), formats=tuple(plan.formats[i] for i in kept), measured=measured
    )
