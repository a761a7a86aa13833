"""What the files beside this one hold, one for each theme of equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cases = dict[str, list[tuple[Callable[..., Any], Callable[..., Any]]]]
"""By the name of an equation, two spellings of one value each."""
