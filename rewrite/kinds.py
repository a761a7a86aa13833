"""What a block returns, as far as a graph around it has to know: told from one call, made of fake tensors in the next.

A kind is LIKE, of a tensor of the type of the block's input; the dtype of a tensor that is a single number; which argument a
tensor is that is handed on; "none"; or a tuple of kinds. OTHER is what is none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kind = Any
LIKE, OTHER, NONE = "like", "other", "none"


@dataclass(frozen=True)
class HandedOn:
    """The kind of a result that is an argument, such as the memory of an encoder: its place among the tensors."""

    place: int


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a call's arguments, the block's input first."""
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def kind_of(result: Any, tensors: Sequence[Tensor]) -> Kind:
    """The kind of what a block returned that was given ``tensors``."""
    if type(result) is tuple:
        kinds = tuple(NONE if r is None else kind_of(r, tensors) for r in result)
        return OTHER if OTHER in kinds else kinds
    if not isinstance(result, Tensor) or not tensors or result.device != tensors[0].device:
        return OTHER
    if place := next((i for i, t in enumerate(tensors) if t is result), 0):
        return HandedOn(place)  # though it be like the input: in another call it may not be
    if _like(result, tensors[0]):
        return LIKE
    return result.dtype if result.dim() == 0 else OTHER


def _like(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype)


def fits(kind: Kind, result: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether ``result`` is of this kind, of which it need not be alone: an argument that is handed on may be like the input."""
    if isinstance(kind, tuple):
        same = type(result) is tuple and len(result) == len(kind)
        return same and all(fits(k, r, tensors) for k, r in zip(kind, result, strict=True))
    if kind == NONE or not isinstance(result, Tensor) or not tensors or result.device != tensors[0].device:
        return kind == NONE and result is None
    if isinstance(kind, HandedOn):
        return kind.place < len(tensors) and result is tensors[kind.place]
    return _like(result, tensors[0]) if kind == LIKE else result.dim() == 0 and result.dtype == kind


def made_like(kind: Kind, tensors: Sequence[Tensor]) -> Any:
    """A fake result of ``kind``."""
    if kind == NONE:
        return None
    if isinstance(kind, tuple):
        return tuple(made_like(k, tensors) for k in kind)
    if isinstance(kind, HandedOn):
        t = tensors[kind.place]
        return t.new_empty_strided(t.size(), t.stride()).requires_grad_(t.requires_grad)
    given = tensors[0]
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
