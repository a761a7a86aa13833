"""What a block returns, as far as a graph around it has to know: told from one call, made of fake tensors in the next.

A kind is LIKE, of a tensor of the type of the block's input; the dtype of a tensor that is a single number; "none"; or a tuple of
kinds. OTHER is what is none of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Kind = Any
LIKE, OTHER, NONE = "like", "other", "none"


def kind_of(result: Any, given: Tensor | None) -> Kind:
    """The kind of what a block returned that was given ``given``."""
    if type(result) is tuple:
        kinds = tuple(NONE if r is None else kind_of(r, given) for r in result)
        return OTHER if OTHER in kinds else kinds
    if not isinstance(result, Tensor) or given is None or result.device != given.device:
        return OTHER
    if (result.shape, result.dtype) == (given.shape, given.dtype):
        return LIKE
    return result.dtype if result.dim() == 0 else OTHER


def made_like(kind: Kind, given: Tensor) -> Any:
    """A fake result of ``kind``."""
    if kind == NONE:
        return None
    if isinstance(kind, tuple):
        return tuple(made_like(k, given) for k in kind)
    made = torch.empty_like(given) if kind == LIKE else given.new_empty((), dtype=kind)
    return made.requires_grad_(torch.is_grad_enabled() and made.is_floating_point())


def form_of(arguments: Any) -> Any:
    """What of a call's arguments may settle the kind of its result: which are tensors, containers, flags or None."""
    if isinstance(arguments, tuple | list):
        return tuple(form_of(a) for a in arguments)
    if isinstance(arguments, dict):
        return tuple((k, form_of(a)) for k, a in sorted(arguments.items(), key=lambda item: str(item[0])))
    if arguments is None or isinstance(arguments, bool | str):
        return arguments
    plain = (Tensor, "tensor"), (int | torch.SymInt, "int"), (float | torch.SymFloat, "float")
    return next((name for kind, name in plain if isinstance(arguments, kind)), type(arguments).__name__)
