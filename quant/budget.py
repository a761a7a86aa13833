"""What a model may take, or how far it may go from the original."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import PlanError
from .stored import FORMATS

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)} | {p: UNITS[f"{p}B"] for p in "KMGT"}
DEFAULT_FORMATS = ("nf4", "nf4-feedback", "int8", "16-bit")


@dataclass(frozen=True)
class PrecisionBudget:
    """A limit on memory, on the divergence of the model's output, or on both; one at least.

    Args:
        memory: of all parameters and buffers after rewriting: bytes, or text such as ``"6GB"`` (10⁹) or ``"5.5 GiB"``
            (2³⁰). Within it the least divergence is sought.
        max_kl: the largest KL divergence from the original on the calibration data. The fewest bytes are sought.
        formats: that may be used.

    Raises:
        PlanError: an argument has no meaning.
    """

    memory: str | int | None = None
    max_kl: float | None = None
    formats: tuple[str, ...] = DEFAULT_FORMATS

    def __post_init__(self) -> None:
        if self.memory is None and self.max_kl is None:
            raise PlanError('a budget limits memory or divergence: PrecisionBudget(memory="6GB") or (max_kl=0.02)')
        if self.memory is not None:
            parse_memory(self.memory)
        if self.max_kl is not None:
            _check_kl(self.max_kl)
        check_formats(self.formats)
        object.__setattr__(self, "formats", tuple(self.formats))

    @property
    def bytes(self) -> int | None:
        """``memory`` in bytes."""
        return None if self.memory is None else parse_memory(self.memory)

    def __str__(self) -> str:
        memory = None if self.bytes is None else f"at most {format_bytes(self.bytes)}"
        kl = None if self.max_kl is None else f"KL at most {self.max_kl:g}"
        return " and ".join(part for part in (memory, kl) if part)


def parse_memory(memory: str | int) -> int:
    """Bytes, from bytes or from a number with a unit: B, KB to TB (powers of 1000), KiB to TiB (powers of 1024).

    Raises:
        PlanError: it is neither, or not above zero.
    """
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*", memory, re.ASCII)
        if not found or found[2].upper() not in UNITS:
            raise PlanError(f'memory must be a number of bytes or text like "6GB" or "5.5 GiB", not {memory!r}')
        amount = float(found[1]) * UNITS[found[2].upper()]
        memory = int(amount) if math.isfinite(amount) else 0
    if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
        raise PlanError(f'memory must be a whole number of bytes above 0 or text like "6GB", not {memory!r}')
    return memory


def format_bytes(count: float) -> str:
    """``count`` in the largest unit that leaves at least one, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _check_kl(max_kl: float) -> None:
    if isinstance(max_kl, bool) or not isinstance(max_kl, int | float) or not (math.isfinite(max_kl) and max_kl >= 0):
        raise PlanError(f"max_kl must be a finite number from 0 on, not {max_kl!r}")


def check_formats(formats: Sequence[str]) -> None:
    """Refuse what is no sequence of different names of formats.

    Raises:
        PlanError: it says what is wrong.
    """
    if isinstance(formats, str) or not formats or len(set(formats)) != len(formats):
        raise PlanError(f"formats must be different names of formats, one or more, not {formats!r}")
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise PlanError(f"no such format: {', '.join(map(repr, unknown))}; there are {', '.join(FORMATS)}")
