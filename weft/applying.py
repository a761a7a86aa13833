"""Puts a precision plan into force: weights are stored as it says, in bitsandbytes' own modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.quant.errors import PlanError, QuantizationError
from weft.quant.formats import FORMATS, Stored, quantize
from weft.quant.layers import layer_key
from weft.quant.modules import Replaced, acts_as, give_back, put_stored
from weft.quant.plan import PrecisionPlan
from weft.rewrite.errors import PrecisionError
from weft.wrappers import plan_for


def apply_plan(model: nn.Module, plan: PrecisionPlan, stored: Mapping[str, Stored] | None = None) -> list[Replaced]:
    """Store the weights of ``model`` as ``plan`` says; returns how to give each back: former weights wait on the host.

    Args:
        stored: weights quantized already, by name of the parameter; others are quantized here, without statistics.

    Raises:
        PrecisionError: the plan is for other layers or shapes, asks for error feedback on a weight that is not in
            ``stored``, or a weight holds NaN; the model is then as it was.
    """
    if not stored:  # who quantized them has looked
        refuse_unusable(model)
    plan = plan_for(model, plan)
    names = {name.removesuffix(".weight"): name for name, _ in model.named_parameters()}
    _check_fit(model, plan, names)
    chosen = {names[layer.path]: f for layer, f in zip(plan.layers, plan.formats, strict=True)}
    ready = {
        name: (stored or {}).get(name) or _quantized(model, name, format_name)
        for name, format_name in chosen.items()
        if FORMATS[format_name].kind != "dense"
    }
    done: list[Replaced] = []
    try:
        done.extend(put_stored(model, name, weight) for name, weight in ready.items())
    except QuantizationError as error:
        give_back(done)
        raise PrecisionError(str(error)) from error
    return done


def refuse_unusable(model: nn.Module) -> None:
    """Refuse models in which something is quantized already, or holds NaN or infinity: it would spoil its whole block.

    Raises:
        PrecisionError: it names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state") or hasattr(parameter, "SCB"):
            raise PrecisionError(
                f"{name} is quantized already: load the model in 16 bits, or leave out precision to optimize it as it is"
            )
        if not torch.isfinite(parameter).all():
            raise PrecisionError(f"{name} holds NaN or infinity: mend the checkpoint before its precision is planned")


def _check_fit(model: nn.Module, plan: PrecisionPlan, names: Mapping[str, str]) -> None:
    everywhere = {n.removesuffix(".weight"): p for n, p in model.named_parameters(remove_duplicate=False)}
    first = {id(p): n for n, p in model.named_parameters()}
    found = []
    for path in (p for layer in plan.layers for p in layer.paths if p in everywhere):
        weight = _as_stored(model, names.get(path, first[id(everywhere[path])]))
        found.append(layer_key(path, weight.shape, weight.dtype))
    try:
        plan.check_layers(found)
    except PlanError as error:
        raise PrecisionError(str(error)) from error


def _as_stored(model: nn.Module, name: str) -> Tensor:
    """A parameter as it is stored: a linear's as (out_features, in_features), any other as it lies."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    weight = owner.get_parameter(attribute).detach()
    return weight.t() if acts_as(owner, attribute) == "columns" else weight


def _quantized(model: nn.Module, name: str, format_name: str) -> Stored:
    if FORMATS[format_name].feedback:
        raise PrecisionError(
            f"the plan stores {name} with error feedback, which needs calibration data: "
            "optimize(model, precision=plan, calibration=batches)"
        )
    try:
        return quantize(_as_stored(model, name), FORMATS[format_name]).to("cpu")
    except QuantizationError as error:
        raise PrecisionError(f"{name}: {error}") from error
