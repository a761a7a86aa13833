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
    """Store the parameter ``name`` of ``model`` as ``stored`` says, on the device where it is.

    A module that acts as a linear becomes bitsandbytes' ``Linear4bit`` or ``Linear8bitLt``, with its bias, hooks and mode;
    a parameter of any other module (such as stacked experts) is dequantized whenever it is read.

    Args:
        stored: of a linear's weight as (out_features, in_features); of any other parameter as it lies.

    Returns:
        How to give the former weight back; until then it waits in the host's memory.

    Raises:
        QuantizationError: int8 storage of a parameter that is no linear's weight.
    """
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    stored = stored.to(owner.get_parameter(attribute).device)
    if acts_as(owner, attribute):
        return _put_module(model, path, owner, stored)
    if stored.format.kind == "int8":
        raise QuantizationError(f"{name} is no linear's weight: it can be stored in 4 or in 16 bits, not as int8")
    return _put_parameter(owner, attribute, name, stored)


def _put_module(model: nn.Module, path: str, old: nn.Module, stored: Stored) -> Replaced:
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    new = _linear(stored, getattr(old, "bias", None))
    new.train(old.training)
    for kept in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, kept).update(getattr(old, kept))
    parent._modules[child] = new
    weight: Any = old.weight
    device = weight.device
    weight.data = weight.data.cpu()

    def restore() -> None:
        weight.data = weight.data.to(device)
        parent._modules[child] = old

    return Replaced(path, restore)


def _linear(stored: Stored, bias: nn.Parameter | None) -> nn.Module:
    rows, columns = stored.shape
    with torch.device("meta"):
        if stored.format.kind == "int8":
            new: Any = _bnb_nn.Linear8bitLt(columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=6.0)
        else:
            new = _bnb_nn.Linear4bit(
                columns, rows, bias=bias is not None, compute_dtype=stored.dtype, quant_type=stored.format.kind,
                compress_statistics=stored.format.double_quantized,
            )  # fmt: skip
    weight: Any = as_parameter(stored)
    new.weight, new.bias = weight, bias
    if stored.format.kind != "int8":
        weight.module, new.quant_state = new, weight.quant_state
    return new


def _put_parameter(owner: nn.Module, attribute: str, name: str, stored: Stored) -> Replaced:
    old = owner.get_parameter(attribute)
    device = old.device
    packed: Any = as_parameter(stored)
    setattr(owner, attribute, nn.Parameter(packed.data, requires_grad=False))
    replace_parameter_4bit_prequantized(owner, attribute, packed.quant_state.as_dict(packed=True), device)
    old.data = old.data.cpu()

    def restore() -> None:
        parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
        old.data = old.data.to(device)
        setattr(owner, attribute, old)

    return Replaced(name, restore)
