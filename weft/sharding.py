"""Models sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``): where to cut them, and what 4-bit weights need."""

from __future__ import annotations

from typing import Any

import torch
from packaging import version
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.hooks import RemovableHandle

from weft.rewrite.errors import OptionError, UnsupportedModelError
from weft.rewrite.regions import find_blocks

TORCH = version.parse(torch.__version__)
SHARDS_WHOLE_NUMBERS = "2.13"
"""Before this version FSDP2 makes a shard a parameter with a gradient, which whole numbers cannot have, and casts all alike."""


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """``fully_shard`` on every block of ``model`` and on the rest, in place; 4-bit weights stay usable.

    Blocks are found as ``optimize`` finds them: the repeated children of one class. Optimize the model before.

    Args:
        options: of ``fully_shard``, such as ``mesh``, ``mp_policy`` or ``reshard_after_forward``.

    Raises:
        UnsupportedModelError: as :func:`keep_four_bit` does.
        OptionError: weights are packed into whole numbers in a version of torch that shards none.
    """
    _check_storage(model)
    keep_four_bit(model)
    for block in find_blocks(model).values():
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def keep_four_bit(model: nn.Module) -> list[RemovableHandle]:
    """Let 4-bit weights be sharded: call it once, before ``fully_shard`` or accelerate's ``prepare``.

    FSDP2 hands modules a plain tensor of packed codes, without the scales that bitsandbytes keeps beside it. bitsandbytes
    mends that inside every linear's forward, by an assignment that Dynamo cannot capture, so that each block would fall
    into pieces. Here it is done when a block is entered. The scales themselves are not sharded.

    Returns:
        The hooks, one for each block with 4-bit weights, and one for the rest of the model.

    Raises:
        UnsupportedModelError: the model is sharded already and a weight's scales are lost.
    """
    blocks = {path: [*block.modules()] for path, block in find_blocks(model).items()}
    inside = {id(m) for modules in blocks.values() for m in modules}
    groups = [(model.get_submodule(path), modules) for path, modules in blocks.items()]
    groups.append((model, [m for m in model.modules() if id(m) not in inside]))
    names = {id(m): path for path, m in model.named_modules()}
    handles = []
    for owner, modules in groups:
        packed = [m for m in modules if _is_packed(m)]
        for module in packed:
            _remember_scales(module, names[id(module)])
        if packed:
            handles.append(owner.register_forward_pre_hook(_Restore(packed)))
    return handles


def _check_storage(model: nn.Module) -> None:
    packed = next((path for path, m in model.named_modules() if _is_packed(m) and _is_whole(m)), None)
    if packed is not None and version.parse(SHARDS_WHOLE_NUMBERS) > TORCH:
        raise OptionError(
            f"{packed}.weight is packed into whole numbers, which FSDP2 of torch before {SHARDS_WHOLE_NUMBERS} cannot shard: "
            "load the model with bnb_4bit_quant_storage=torch.bfloat16"
        )


def _is_packed(module: Any) -> bool:
    return hasattr(module, "quant_state") and hasattr(module, "quant_storage")


def _is_whole(module: Any) -> bool:
    return not module.weight.is_floating_point()


def _remember_scales(module: nn.Module, path: str) -> None:
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        raise UnsupportedModelError(
            f"{path}.weight is sharded already, and its scales are lost: call weft.sharding.keep_four_bit(model) before "
            "fully_shard, once the weights are quantized"
        )
    module.quant_state = state


class _Restore:
    """Puts the scales back beside the packed weights that a block was just handed."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.made: dict[int, tuple[Any, Any]] = {}

    def __call__(self, *_: Any) -> None:
        for module in self.modules:
            given: Any = module.weight
            if getattr(given, "quant_state", None) is not None:
                continue
            known, whole = self.made.get(id(module), (None, None))
            if known is not given:
                whole = _with_scales(given, module)
                self.made[id(module)] = (given, whole)
            module.weight = whole


def _with_scales(weight: Any, module: Any) -> Any:
    """A 4-bit parameter over the same memory."""
    from bitsandbytes.nn.modules import Params4bit

    settings: dict[str, Any] = {"quant_storage": module.quant_storage, "bnb_quantized": True}
    made: Any = Params4bit(weight, **settings)
    made.quant_state = module.quant_state
    return made
