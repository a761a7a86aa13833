"""Every error of the engine and the face. Each message names the module or file, what is wrong, and what to do."""

from __future__ import annotations

from weft.errors import WeftError


class UnsupportedModelError(WeftError, ValueError):
    """The model, as it stands, cannot be optimized: offloaded, on the meta device, compiled already, without parameters."""


class ExampleInputsError(WeftError, ValueError):
    """Example inputs are missing, cannot be made from the model's config, or do not fit the model's forward."""


class OptionError(WeftError, ValueError):
    """An argument of a public function has a wrong type or value."""


class CalibrationError(WeftError, ValueError):
    """The calibration batches are empty, do not fit the model's forward, or make it predict NaN."""


class PrecisionError(WeftError, ValueError):
    """A weight, a plan or a budget that precision planning cannot work with."""


class PackingError(WeftError, ValueError):
    """Documents that cannot share a row: the model would let one see another, or they do not fit the rows."""


class CheckpointError(WeftError, ValueError):
    """A checkpoint that cannot be loaded: a shard or a tensor is missing, cut off, or of another shape than the model's."""


class CaptureError(WeftError, RuntimeError):
    """A call broke an assumption that a captured graph rests on and that no guard checks."""


class InternalError(WeftError, RuntimeError):
    """weft itself failed where the model alone does not: a bug, with the original error as its cause."""


class UndoError(WeftError, RuntimeError):
    """``undo`` cannot restore the model: weft never optimized it, or its former weights were not kept."""


class DroppedOutputError(WeftError, AttributeError):
    """An output was read that a rewrite, at the user's request, no longer computes."""


class PatternError(WeftError, ValueError):
    """A rewrite rule is malformed: its pattern, its variants and its replacement do not fit each other."""


class VerificationError(WeftError, AssertionError):
    """A graph broke an invariant (lint, shapes, dtypes) that no later pass could repair."""


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
