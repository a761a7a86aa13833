"""Transformers' own switch for checkpointing: blocks that are planned obey it in their own way.

A transformers layer hands its forward to ``_gradient_checkpointing_func``, an attribute that
``gradient_checkpointing_enable()`` sets, before or after ``optimize``. Run as it is, it would compute the whole block again,
what no gradient needs included. Where a block's memory is planned, the attribute tells the plan instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from weft.rewrite.step_memory import StepMemory

NAME = "_gradient_checkpointing_func"


class Obeyed:
    """In place of a layer's checkpointing function."""

    def __init__(self, original: Callable[..., Any], memory: StepMemory) -> None:
        self.original = original
        self.memory = memory

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(function, *args, **kwargs)
        with self.memory.checkpointing():
            return function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.original,)  # of the standard library: a saved model loads where weft is not installed


def obeying(blocks: Sequence[nn.Module], memory: StepMemory) -> Callable[[], None]:
    """A function that puts :class:`Obeyed` where ``blocks`` have a checkpointing function of transformers."""

    def look() -> None:
        for block in blocks:
            given = vars(block).get(NAME)
            if given is not None and not isinstance(given, Obeyed):
                setattr(block, NAME, Obeyed(given, memory))

    return look


def release(model: nn.Module) -> None:
    """Give every layer its own checkpointing function back."""
    for module in model.modules():
        given = vars(module).get(NAME)
        if isinstance(given, Obeyed):
            setattr(module, NAME, given.original)
