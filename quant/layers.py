"""What a plan knows of each weight: where it stands, and what each format would take and do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import PlanError
from .knapsack import Group, Option
from .stored import FORMATS


@dataclass(frozen=True)
class LayerOption:
    """A format for a weight.

    Attributes:
        bytes: exact, with scales and tables.
        sensitivity: KL divergence of the model's output with this weight alone in this format.
        error: relative error of the linear's output on the calibration data; None where it was not measured.
        weight_error: relative error of the weight; None where it was not measured.
    """

    format: str
    bytes: int
    sensitivity: float
    error: float | None = None
    weight_error: float | None = None


@dataclass(frozen=True)
class Layer:
    """A weight: of one linear, or of several that share it (they are counted once, for the first).

    Attributes:
        paths: of the modules.
        dtype: as torch names it, without ``torch.``.
        outliers: channels of the input that stand out on the calibration data.
        pinned: why there is no choice, if there is none.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    options: tuple[LayerOption, ...]
    outliers: int = 0
    pinned: str = ""

    @property
    def path(self) -> str:
        """The first path: what measures and choices call this weight by."""
        return self.paths[0]

    def option(self, format: str) -> LayerOption:
        """The option of a format."""
        return next(o for o in self.options if o.format == format)

    @property
    def smallest(self) -> LayerOption:
        """The option of fewest bytes; of several the least sensitive."""
        return min(self.options, key=lambda o: (o.bytes, o.sensitivity, o.format))

    @property
    def next_larger(self) -> LayerOption | None:
        """The smallest option that takes more bytes than the smallest."""
        larger = [o for o in self.options if o.bytes > self.smallest.bytes]
        return min(larger, key=lambda o: (o.bytes, o.sensitivity, o.format), default=None)

    @property
    def group(self) -> Group:
        """This weight for the knapsack."""
        return Group(self.path, tuple(Option(o.format, o.bytes, o.sensitivity) for o in self.options))

    def limited(self, formats: Iterable[str]) -> Layer:
        """This weight with the options among ``formats``; a pinned one as it is.

        Raises:
            PlanError: none is left.
        """
        kept = tuple(o for o in self.options if o.format in set(formats))
        if not kept and not self.pinned:
            raise PlanError(
                f"{self.path}: of {', '.join(formats)} none was measured: {[o.format for o in self.options]}"
            )
        return self if self.pinned else Layer(self.paths, self.shape, self.dtype, kept, self.outliers)


@dataclass(frozen=True)
class BitChoice:
    """What was chosen for one linear, and why. Linears that share a weight count its bytes once, at the first."""

    module_path: str
    format: str
    bits: float
    error: float | None
    bytes: int
    reason: str
    sensitivity: float
    weight_error: float | None = None
    outliers: int = 0


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curve of memory and divergence: bytes of the whole model, and the divergence expected there."""

    bytes: int
    kl: float


LayerKey = tuple[str, tuple[int, ...], str]
"""A linear's path, its weight's shape and dtype."""


def layer_key(path: str, shape: Iterable[int], dtype: Any) -> LayerKey:
    """What a plan's fingerprint holds of a linear; ``dtype`` is a torch dtype or its name."""
    return path, tuple(int(n) for n in shape), str(dtype).removeprefix("torch.")


def check_layer(layer: Layer) -> None:
    """Refuse a layer that has no meaning; costs and bytes are checked with the knapsack.

    Raises:
        PlanError: it has no path, no weight, an unknown format, or an error that is no number.
    """
    if not layer.paths or not all(isinstance(p, str) for p in layer.paths):
        raise PlanError(f"a layer needs the paths of its modules, not {layer.paths!r}")
    if not layer.shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in layer.shape):
        raise PlanError(f"{layer.path}: no weight has the shape {layer.shape!r}")
    for option in layer.options:
        if option.format not in FORMATS:
            raise PlanError(f"{layer.path}: no such format: {option.format!r}; there are {', '.join(FORMATS)}")
        for error in (option.error, option.weight_error):
            if error is not None and not (math.isfinite(error) and error >= 0):
                raise PlanError(f"{layer.path}: {option.format} has the error {error!r}: it must be finite, from 0 on")
