"""Every error that quantization and its planning raise on purpose. The caller adds the module's path where it is missing."""

from __future__ import annotations

from weft.errors import WeftError


class QuantizationError(WeftError, ValueError):
    """A weight cannot be stored in a format: NaN or infinity in it, nothing in it, a dtype or shape the format lacks."""


class PlanError(WeftError, ValueError):
    """A plan, a budget or what a plan is made from has no meaning, or a plan's file cannot be read."""


class PlanMismatchError(PlanError):
    """A plan was made for other layers, shapes or dtypes than those it is applied to."""


class BudgetError(PlanError):
    """No choice of formats meets the budget; ``smallest`` can be met, ``asked`` was."""

    def __init__(self, smallest: float, asked: float, unit: str = "bytes") -> None:
        super().__init__(
            f"no choice of formats meets a budget of {asked:,} {unit}: the smallest that can be met is {smallest:,}"
        )
        self.smallest, self.asked, self.unit = smallest, asked, unit

    def __reduce__(self) -> tuple[type, tuple[float, float, str]]:
        return type(self), (self.smallest, self.asked, self.unit)
