"""What the blocks of a model really hold between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..models import Inputs, batch, llama, outcome, with_lora

INPUTS = batch(3, 24, padded=True)


def adapted(layers: int = 3, **changes: Any) -> Any:
    """A Llama of ``layers`` blocks with adapters, whose first block is like the others: its input needs a gradient."""
    model = with_lora(llama(num_hidden_layers=layers, **changes))
    model.enable_input_require_grads()
    return model


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers."""
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2].isdigit() and "layers" in n.split(".")[-2]}


def held_bytes(model: Any, inputs: Inputs = INPUTS) -> dict[str, int]:
    """By planned block, bytes of the storages that its node in autograd's graph holds after a forward.

    Arguments besides its input, and parameters, are left out. Hooks of autograd would turn the plan off.
    """
    given = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    nodes: dict[str, Any] = {}

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = [*args[1:], *(v for name, v in kwargs.items() if name != "hidden_states")]
        given.update(t.untyped_storage()._cdata for t in tree_leaves(others) if isinstance(t, Tensor))

    def leave(path: str, result: Any) -> None:
        nodes[path] = next(t for t in tree_leaves(result) if isinstance(t, Tensor)).grad_fn

    blocks = blocks_of(model)
    hooks = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in blocks.values()]
    hooks += [m.register_forward_hook(lambda _, __, out, path=path: leave(path, out)) for path, m in blocks.items()]
    try:
        loss = model(**inputs).loss
    finally:
        for hook in hooks:
            hook.remove()
    assert loss.requires_grad and blocks
    return {path: _saved(node, given) for path, node in nodes.items()}


def _saved(node: Any, given: set[int]) -> int:
    kept = [*node.saved_tensors, *getattr(node, "_tensors_no_vc_check", ())]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept if isinstance(t, Tensor)}
    return sum(size for key, size in storages.items() if key not in given)


def step(model: Any, inputs: Inputs = INPUTS, seed: int = 0) -> dict[str, Tensor]:
    """Loss, logits and gradients, with the same random numbers each time."""
    torch.manual_seed(seed)
    return outcome(model, inputs)
