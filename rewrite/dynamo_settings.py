"""Dynamo's settings while one of our regions runs. They are the process's own, and are given back after each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DYNAMO_SETTINGS = {
    "specialize_float": True,
    "specialize_int": True,
    "skip_nnmodule_hook_guards": False,
    "recompile_limit": 256,
    "accumulated_recompile_limit": 4096,
    "fake_tensor_cache_enabled": False,
}
"""In force while one of our regions runs: constants stay constants, and no graph is dropped for being one too many.

No cache of fake tensors: with symbolic sizes, making and checking an entry costs more than the shape that it spares (a sixth of
``optimize``).
"""


class _Inside(threading.local):
    """Whether this thread has set Dynamo's settings."""

    settings = False


_inside = _Inside()


@contextmanager
def dynamo_settings() -> Iterator[None]:
    """:data:`DYNAMO_SETTINGS`, for as long as a region runs.

    Plain assignment: ``config.patch`` takes 0.3 ms, more than a decoding step has for a layer. A region inside another finds
    them set.
    """
    config = torch._dynamo.config
    if _inside.settings:
        yield
        return
    kept = {name: getattr(config, name) for name in DYNAMO_SETTINGS}
    _inside.settings = True
    for name, setting in DYNAMO_SETTINGS.items():
        setattr(config, name, setting)
    try:
        yield
    finally:
        _inside.settings = False
        for name, setting in kept.items():
            setattr(config, name, setting)
