"""What an index of slices takes of a tensor."""

from __future__ import annotations

from typing import Any


def by_dimension(index: Any, dims: int) -> list[tuple[int, slice[Any, Any, Any]]] | None:
    """Which dimension of ``dims`` each slice in ``index`` is of; None where it holds anything else, such as a number."""
    parts = index if isinstance(index, tuple) else (index,)
    gaps = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(gaps) > 1 or not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return None
    at = gaps[0] if gaps else len(parts)
    after = parts[at + 1 :]
    return [*enumerate(parts[:at]), *enumerate(after, dims - len(after))]
