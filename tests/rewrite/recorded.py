"""Stands for ``torch.cuda.CUDAGraph`` where there is no GPU: computes again from the addresses that it recorded, writes over the
results that it returned, and spoils what may lie where it computes, as a CUDA graph would."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

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


def captured(function: Function) -> Function:
    """``function`` as a stream that is captured would run it: a recording overwrites no operand."""

    def run(arguments: list[Any]) -> Any:
        with patch("weft.kernels.operator._runs_again", lambda: True):
            return function(arguments)

    return run


class Rerun:
    """Stands for a CUDA graph: reads and writes the same memory each time."""

    def __init__(self, function: Function, inputs: Sequence[Any], made: list[Rerun]) -> None:
        self.function = captured(function)
        self.inputs = [at_address(x) for x in inputs]
        self.results = list(self.function(list(self.inputs)))
        inputs_at = {x.untyped_storage().data_ptr() for x in self.inputs if isinstance(x, Tensor)}
        both = zip(self.results, self.function(list(self.inputs)), strict=True)
        self.pooled = [
            (i, r)
            for i, (r, again) in enumerate(both)
            if isinstance(r, Tensor) and r is not again and r.untyped_storage().data_ptr() not in inputs_at
        ]
        """Results in the memory of all graphs; others are copied to the same tensors each time, or are inputs."""
        self.later = made
        self.number = len(made)
        made.append(self)

    def replay(self) -> None:
        """Run what was recorded; graphs made later find NaN where their results were."""
        for graph in self.later[self.number + 1 :]:
            for _, result in graph.pooled:
                result.untyped_storage().fill_(0xFF)
        results = self.function(list(self.inputs))
        for i, mine in self.pooled:
            mine.copy_(results[i])


class Stand(Recordings):
    """Records with the stand-in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.graphs: list[Rerun] = []

    def capture(self, function: Function, inputs: Sequence[Any]) -> Any:
        """What runs changes nothing that is looked at."""
        graph = Rerun(function, inputs, self.graphs)
        return graph, graph.results
