"""Runs the blocks of a model in training: each call saves for its backward what the plan of its step says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .joint import JointGraph
from .placement import BlockCosts
from .rates import Rates, measured_rates
from .recompute import block_costs
from .step_memory import StepMemory, shapes_of

REMEMBERED = 256
"""Sizes of calls whose options are kept. A call no larger than one that left room to save all is not looked at anew."""


@dataclass
class BlockGraph:
    """The rewritten graph of a block, in training; one for all blocks that share it."""

    joint: JointGraph
    memory: StepMemory
    place: Callable[[], str]
    checkpointed: bool = False
    _costs: dict[Any, BlockCosts] = field(default_factory=dict)
    _others: dict[int, BlockGraph] = field(default_factory=dict)

    def without_gradient(self, at: int) -> BlockGraph:
        """The same where the input at this position needs no gradient."""
        if at not in self._others:
            joint = self.joint.without_gradient(at)
            self._others[at] = BlockGraph(joint, self.memory, self.place, self.checkpointed)
        return self._others[at]

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled() or self.memory.tried:
            return self.joint.lower()(*args)
        if _saving_is_hooked():
            return self.joint.lower()(
                *args
            )  # somebody else's checkpoint or offloading decides what is kept, and asks twice
        option = self.memory.option(self.place(), self, args)
        with self.memory.saving(option, args):
            result = self.joint.lower(option.saved)(*args)
        if not option.host_bytes:
            self.memory.saved_here(result)
        return result

    def costs(self, args: Sequence[Any], checkpointed: bool = False) -> BlockCosts:
        """The options at the sizes of ``args``; only the thriftiest for a block whose model asked for checkpointing."""
        checkpointed = checkpointed or self.checkpointed
        key = (checkpointed, shapes_of(args))
        if key not in self._costs:
            if len(self._costs) >= REMEMBERED:
                self._costs.clear()
            larger = next((c for k, c in self._costs.items() if _at_most(key, k) and self.memory.roomy(c)), None)
            self._costs[key] = larger or block_costs(self.joint, args, _rates(args), checkpointed)
        return self._costs[key]


def _at_most(a: Any, b: Any) -> bool:
    """Whether every size in ``a`` is at most that in ``b``, and what is no size is equal."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_at_most, a, b))
    return a <= b if type(a) is int and type(b) is int else a is b or a == b


def _saving_is_hooked() -> bool:
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return autograd._top_saved_tensors_default_hooks(True) is not None


def _rates(args: Sequence[Any]) -> Rates:
    floating = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
    return measured_rates(floating.device, floating.dtype)
