"""Triton where it is installed. Elsewhere kernels can still be defined, though not launched: operators run their references."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:

    def _define(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
        return kernel if kernel is not None else lambda f: f

    triton = SimpleNamespace(jit=_define)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["tl", "triton"]
