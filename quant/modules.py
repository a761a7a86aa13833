"""Puts stored weights into a model: bitsandbytes' own modules, so that PEFT, TRL, saving and other loaders know them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import QuantizationError
from .formats import Stored, as_parameter

_bnb_nn: Any = bnb.nn
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_state_dict_hooks")


@dataclass(frozen=True)
class Replaced:
    """One weight that was replaced, and how to give the former back."""

    name: str
    restore: Callable[[], None]


def give_back(replaced: Sequence[Replaced]) -> None:
    """Restore every weight, last replaced first."""
    for each in reversed(replaced):
        each.restore()


def acts_as(owner: nn.Module, attribute: str) -> str | None:
    """Whether a module computes x Wᵀ + b (``"rows"``) or x W + b (``"columns"``) with its parameter; None: neither.

    Found out by running it: what a module is called says nothing of what it does.
    """
    weight = getattr(owner, attribute, None)
    names = {name for name, _ in owner.named_parameters()}
    if attribute != "weight" or not isinstance(weight, Tensor) or weight.dim() != 2 or not names <= {"weight", "bias"}:
        return None
    for layout, matrix in (("rows", weight.detach()), ("columns", weight.detach().t())):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, matrix.shape[1], generator=generator).to(weight.device, weight.dtype)
        bias = getattr(owner, "bias", None)
        if bias is not None and bias.shape != matrix.shape[:1]:
            continue
        expected = F.linear(x, matrix, None if bias is None else bias.detach())
        with torch.no_grad():
            found = _call(owner, x)
        if (
            isinstance(found, Tensor)
            and found.shape == expected.shape
            and torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
        ):
            return layout
    return None


def _call(owner: nn.Module, x: Tensor) -> Any:
    """What the class's own forward gives, None where it does not take one tensor of that shape."""
    try:
        return type(owner).forward(owner, x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def put_stored(model: nn.Module, name: str, stored: Stored) -> Replaced:
    """Store the parameter ``name`` of ``model`` as ``stored`` says, on the device where it is, wherever it is read.

    A module that acts as a linear becomes bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, with its bias, hooks and mode;
    a parameter of any other module (such as stacked experts) is dequantized whenever it is read. Tied modules get one
    storage.

    Args:
        stored: of a linear's weight as (out_features, in_features); of any other parameter as it lies.

    Returns:
        How to give the former weight back; until then it waits in the host's memory.

    Raises:
        QuantizationError: int8 storage of a parameter that is no linear's weight, or tied modules of which one reads the
            weight, another its transpose; nothing is changed then.
    """
    parameter = model.get_parameter(name)
    device = parameter.device
    owners = _owners(model, parameter)
    layouts = [acts_as(owner, attribute) for owner, attribute in owners]
    _check_owners(name, stored, layouts)
    packed: Any = as_parameter(stored.to(device))
    restores = [
        _put_module(model, owner, stored, packed) if layout else _put_parameter(owner, attribute, packed)
        for (owner, attribute), layout in zip(owners, layouts, strict=True)
    ]
    parameter.data = parameter.data.cpu()

    def restore() -> None:
        parameter.data = parameter.data.to(device)
        for each in reversed(restores):
            each()

    return Replaced(name, restore)


def _owners(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every module that holds ``parameter``, and what it calls it."""
    return [(m, key) for m in model.modules() for key, held in m._parameters.items() if held is parameter]


def _check_owners(name: str, stored: Stored, layouts: Sequence[str | None]) -> None:
    if stored.format.kind == "int8" and None in layouts:
        raise QuantizationError(f"{name} is no linear's weight: it can be stored in 4 or in 16 bits, not as int8")
    if len({layout == "columns" for layout in layouts}) > 1:
        raise QuantizationError(
            f"{name} is read as it lies by one module and transposed by another: leave it in 16 bits"
        )


def _put_module(model: nn.Module, old: nn.Module, stored: Stored, packed: Any) -> Callable[[], None]:
    """A linear of bitsandbytes in the place of ``old``; returns how to give that back."""
    new = _linear(stored, packed, getattr(old, "bias", None))
    new.train(old.training)
    new.source_cls = type(old)  # as transformers notes it when it replaces a linear
    for kept in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, kept).update(getattr(old, kept))
    places = [(parent, key) for parent in model.modules() for key, m in parent._modules.items() if m is old]
    for parent, key in places:
        parent._modules[key] = new

    def restore() -> None:
        for parent, key in places:
            parent._modules[key] = old

    return restore


def _linear(stored: Stored, weight: Any, bias: nn.Parameter | None) -> Any:
    rows, columns = stored.shape
    with torch.device("meta"):
        if stored.format.kind == "int8":
            new: Any = _bnb_nn.Linear8bitLt(columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=6.0)
        else:
            new = _bnb_nn.Linear4bit(
                columns, rows, bias=bias is not None, compute_dtype=stored.dtype, quant_type=stored.format.kind,
                compress_statistics=stored.format.double_quantized,
            )  # fmt: skip
    new.weight, new.bias = weight, bias
    if stored.format.kind != "int8":
        weight.module, new.quant_state = new, weight.quant_state
    return new


def _put_parameter(owner: nn.Module, attribute: str, packed: Any) -> Callable[[], None]:
    """A parameter that is dequantized when it is read; returns how to give the former back."""
    old, order = owner.get_parameter(attribute), list(owner._parameters)
    hooks: Any = [getattr(owner, kind) for kind in _HOOKS]
    before = [set(kind) for kind in hooks]
    setattr(owner, attribute, nn.Parameter(packed.data, requires_grad=False))
    replace_parameter_4bit_prequantized(owner, attribute, packed.quant_state.as_dict(packed=True), old.device)
    added = [(kind, key) for kind, known in zip(hooks, before, strict=True) for key in kind if key not in known]

    def restore() -> None:
        parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
        setattr(owner, attribute, old)
        owner._parameters.update({key: owner._parameters.pop(key) for key in order})
        for kind, key in added:
            kind.pop(key, None)

    return restore
