"""Stands for ``torch.cuda.CUDAGraph`` where there is no GPU: computes again from the addresses that it recorded, and writes over
the results that it returned, as a CUDA graph would."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.rewrite.cuda_graphs import Recordings
from weft.rewrite.joint import Function

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def at_address(x: Any) -> Any:
    """The memory where ``x`` lies, whoever else refers to it."""
    if not isinstance(x, Tensor):
        return x
    held = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    memory = (ctypes.c_byte * held).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())


class Rerun:
    """Stands for a CUDA graph: reads and writes the same memory each time."""

    def __init__(self, function: Function, inputs: Sequence[Any]) -> None:
        self.function = function
        self.inputs = [at_address(x) for x in inputs]

    def replay(self) -> None:
        """Run what was recorded."""
        self.function(list(self.inputs))


class Stand(Recordings):
    """Records with the stand-in."""

    def capture(self, function: Function, inputs: Sequence[Any]) -> Any:
        """Nothing runs."""
        return Rerun(function, inputs)
