"""Reads safetensors checkpoints one tensor at a time."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.rewrite.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGE = 1 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint, read anew whenever it is indexed; nothing of the file stays in memory."""

    file: Path
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        try:
            with safe_open(self.file, framework="pt", device="cpu") as shard:
                mapped = shard.get_tensor(self.name)
                if mapped.nbytes > _LARGE:
                    _trim()
                return mapped[index].clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read: {error}") from error


def _trim() -> None:
    """Have glibc give back what was freed between tensors that stay: it keeps it, and memory grows with the checkpoint.

    Other allocators have no such function, and most no such habit.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def lazy_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint in ``folder``, by name.

    Raises:
        CheckpointError: there is none, a shard is missing or cut off, or does not hold what the index says.
    """
    if (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX)
    elif (folder / SINGLE).is_file():
        listed = dict.fromkeys(_names(folder / SINGLE), SINGLE)
    else:
        raise CheckpointError(f"{folder} holds no safetensors checkpoint: neither {SINGLE} nor {INDEX}")
    held = {file: _names(folder / file) for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        if name not in held[file]:
            raise CheckpointError(f"{folder / file} lacks {name}, which the index says it holds")
    return {name: LazyTensor(folder / file, name) for name, file in listed.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint, or cut off: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} is no index of a checkpoint: its weight_map names no files")
    return found


def _names(shard: Path) -> set[str]:
    if not shard.is_file():
        raise CheckpointError(f"{shard} is missing: the checkpoint is not whole")
    try:
        with safe_open(shard, framework="pt", device="cpu") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shard} is no safetensors file, or cut off: {error}") from error
