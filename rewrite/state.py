"""What a forward call may change in a model besides its gradients, kept aside and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run calls of ``model`` that leave no trace: modes, buffers, plain attributes of modules, and the storage of parameters.

    Libraries of quantized layers repack a weight when it is first used, and keep how on the parameter.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes = [(m, {k: v for k, v in vars(m).items() if type(v) in _PLAIN}) for m in model.modules()]
    parameters = [(p, p.data, _two_levels(p)) for p in model.parameters()]
    try:
        yield
    finally:
        for module, kept in attributes:
            vars(module).update({k: v for k, v in kept.items() if k in vars(module)})
        for parameter, data, kept in parameters:
            _give_back(parameter, data, kept)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """As :func:`preserved`, in evaluation mode and without gradients; the random state is as before afterwards, too."""
    with preserved(model), torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        yield


def _two_levels(parameter: Tensor) -> list[tuple[Any, dict[str, Any]]]:
    """The attributes of ``parameter``, and those of what they hold."""
    held = [
        v for v in vars(parameter).values() if hasattr(v, "__dict__") and not isinstance(v, Tensor | nn.Module | type)
    ]
    return [(owner, dict(vars(owner))) for owner in (parameter, *held)]


def _give_back(parameter: Tensor, data: Tensor, kept: list[tuple[Any, dict[str, Any]]]) -> None:
    if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
        parameter.data = data
    for owner, attributes in kept:
        for added in vars(owner).keys() - attributes.keys():
            del vars(owner)[added]
        vars(owner).update(attributes)
