"""A tensor that is written part by part, as one operation without side effects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[int, int, int] | int
"""Of the last dimension, the elements of ``range(*part)``, or the one element at a number."""


def written(
    values: Sequence[Tensor], parts: Sequence[Part], size: int, order: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A new tensor y with y[..., part] = value for each of ``parts``, which together are its whole last dimension.

    It makes the same copies that the writes made, into memory of the same order, and so costs what they cost: what no rule
    takes further runs as it was written. Joining the values would be one copy less where they lie in the order of y, and
    one more where they do not.

    Args:
        values: one for each part, (..., length of the part), or (...) for a part that is a number.
        parts: in ascending order of their first element.
        size: of the last dimension of y.
        order: the dimensions of y from the slowest to the fastest in memory.
        dtype: of y, to which the values are converted.

    Returns:
        y of (..., ``size``).
    """
    lead = values[0].shape if isinstance(parts[0], int) else values[0].shape[:-1]
    shape = (*lead, size)
    made = values[0].new_empty([shape[d] for d in order], dtype=dtype)
    made = made.permute([order.index(d) for d in range(len(order))])
    for value, part in zip(values, parts, strict=True):
        made[..., part if isinstance(part, int) else slice(*part)] = value
    return made
