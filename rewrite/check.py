"""What a model must be before it is touched. Every refusal names the module and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .errors import OptionError, UnsupportedModelError


def check_model(model: Any) -> None:
    """Refuse models that cannot be captured, or whose weights are not where they are computed with.

    Raises:
        OptionError: not an ``nn.Module``.
        UnsupportedModelError: no parameters, meta, offloaded or uninitialized weights, several devices, compiled already.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"optimize() takes a torch.nn.Module, not {type(model).__name__}")
    _check_compiled(model)
    _check_hooks(model)
    _check_weights(model)


def _check_compiled(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or _is_compiled(module):
            raise UnsupportedModelError(
                f"{path or type(module).__name__} is compiled already: call optimize() on the model before torch.compile"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{path or type(module).__name__} is a TorchScript module: optimize() the original"
            )


def _is_compiled(module: nn.Module) -> bool:
    """By ``module.compile()``, or by ``module.forward = torch.compile(module.forward)``."""
    forward = vars(module).get("forward")
    wrapped = getattr(forward, "_torchdynamo_orig_callable", None) is not None
    return module._compiled_call_impl is not None or (wrapped and not getattr(forward, "_torchdynamo_disable", False))


def _check_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(_moves_weights(h, module) for h in (hook, *getattr(hook, "hooks", ()))):
            raise UnsupportedModelError(
                f"the weights of {path or 'the model'} are offloaded by accelerate: load the model onto one device "
                '(device_map={"": 0}) before optimize()'
            )


def _moves_weights(hook: Any, module: nn.Module) -> bool:
    """Whether a hook brings the weights to where they are computed with when they are used."""
    where = getattr(hook, "execution_device", None)
    kinds = {p.device.type for p in module.parameters()}
    elsewhere = where is not None and kinds - {torch.device(where).type}
    return bool(getattr(hook, "offload", False) or elsewhere)


def _check_weights(model: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(held):
            raise UnsupportedModelError(f"{name} has no shape yet: call the model once before optimize()")
        if held.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device: load the weights before optimize()")
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if not devices:
        raise UnsupportedModelError(f"{type(model).__name__} has no parameters: there is nothing to optimize")
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise UnsupportedModelError(
            f"the weights are on several devices ({where}): move the model to one with model.to(device)"
        )


def check_gradients(model: nn.Module) -> None:
    """Refuse to train where autograd records nothing, or through weights that pass no gradient on.

    Raises:
        OptionError: under ``torch.inference_mode()``.
        UnsupportedModelError: weights made under it, or 4-bit weights that were repacked for inference.
    """
    if torch.is_inference_mode_enabled():
        raise OptionError(
            'mode is "train", and torch.inference_mode() is on: call optimize() outside of it, or with mode="inference"'
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedModelError(
                f"{name} was made under torch.inference_mode(), and autograd records nothing of it: make or load the model "
                'outside of it before optimize(), or optimize(mode="inference")'
            )
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"bitsandbytes repacked {name} when the model ran in evaluation mode on this CPU, and passes no gradient "
                "through it: load the model again, or have it unpacked by model.state_dict(), before optimize()"
            )
